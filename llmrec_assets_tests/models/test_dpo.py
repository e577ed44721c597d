"""DPO: the loss by hand, what it moves, who may train, and that a kill changes nothing."""

import math
import os
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch
from datasets import Dataset
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import DPOConfig, DPOTrainer

from llmrec_assets.ground.errors import DataError, RecipeError
from llmrec_assets.ground.recipes import BaseModelRecipe, DpoRecipe, LoraRecipe
from llmrec_assets.models import dpo as dpo_module
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.chat import completion_ids, prompt_ids
from llmrec_assets.models.device import Device
from llmrec_assets.models.dpo import train_dpo_on_pairs
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.shared_prompts import CHOSEN, PROMPT, REJECTED
from llmrec_assets.models.training import last_complete_checkpoint, lora_config, save_adapter

CPU = Device("cpu", "CPU", "cpu")
TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=3)
RECIPE = DpoRecipe(
    lora=LoraRecipe(r=4, alpha=8),
    learning_rate=1e-2,
    batch_size=2,
    micro_batch_size=2,
    epochs=2,
    save_steps=2,
    dtype="float32",
)


def make_prompts(n_train: int = 12, n_validation: int = 4) -> pd.DataFrame:
    n = n_train + n_validation
    return pd.DataFrame(
        {
            "user_id": range(n),
            "window_index": 0,
            "split": ["train"] * n_train + ["validation"] * n_validation,
            "prompt": [f"User {'x' * (i % 4)}{i} liked film {i % 3}. Recommend." for i in range(n)],
        }
    )


def make_pairs(prompts: pd.DataFrame) -> pd.DataFrame:
    """One pair a prompt: the even answer of two is chosen; lengths differ."""
    pairs = prompts[["user_id", "window_index", "split"]].assign(pair=0)
    return pairs.assign(
        chosen=[f'["Heat {2 * (i % 3)} (1995)"]' for i in pairs["user_id"]],
        rejected=[f'["Alien {i % 5} (1979)", "Brazil"]' for i in pairs["user_id"]],
    )


def make_sft_adapter(base_dir: Path, directory: Path) -> Path:
    """An adapter that changes the model: as if SFT had trained it."""
    model = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    model = get_peft_model(model, lora_config(LoraRecipe(r=2, alpha=4), "CAUSAL_LM"))
    torch.manual_seed(11)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return save_adapter(model, directory, base_dir.name)


@pytest.fixture(scope="module")
def model_dirs(tmp_path_factory) -> tuple[Path, Path]:
    base_dir = prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]
    return base_dir, make_sft_adapter(base_dir, tmp_path_factory.mktemp("sft") / "adapter")


PROMPTS = make_prompts()
PAIRS = make_pairs(PROMPTS)


def _train(dirs, work: Path, recipe=RECIPE, pairs=PAIRS, prompts=PROMPTS, progress=lambda e: None):
    return train_dpo_on_pairs(
        *dirs,
        prompts,
        pairs,
        recipe,
        seed=5,
        work_dir=work,
        device=CPU,
        progress=progress,
    )


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def _log_prob(model, tokenizer, prompt: str, answer: str) -> float:
    """Summed log-probability of an answer, one sequence, token by token."""
    asked, learnt = prompt_ids(tokenizer, prompt), completion_ids(tokenizer, prompt, answer)
    ids = torch.tensor([asked + learnt])
    with torch.no_grad():
        log_p = model(input_ids=ids).logits[0].log_softmax(-1)
    return sum(float(log_p[len(asked) + t - 1, token]) for t, token in enumerate(learnt))


def _margins(policy, reference, tokenizer, rows: pd.DataFrame, beta: float) -> list[float]:
    found = []
    for row in rows.merge(PROMPTS[["user_id", "prompt"]], on="user_id").itertuples():
        chosen, rejected = (
            _log_prob(policy, tokenizer, row.prompt, answer)
            - _log_prob(reference, tokenizer, row.prompt, answer)
            for answer in (row.chosen, row.rejected)
        )
        found.append(beta * (chosen - rejected))
    return found


def test_losses_equal_a_hand_computed_case(model_dirs, tmp_path: Path) -> None:
    """Both pairs in every batch: step 1 is ln 2, step 2 and the validation are by hand."""
    pairs = pd.concat([PAIRS.iloc[:2], PAIRS.iloc[-3:]])
    recipe = RECIPE.model_copy(
        update={"save_steps": 1, "beta": 0.3, "learning_rate": 1e-3, "lr_scheduler": "constant"}
    )
    adapter, facts = _train(model_dirs, tmp_path, recipe, pairs)
    (_, first), (_, second) = facts["curves"]["losses"]
    assert first == pytest.approx(math.log(2), abs=1e-6)

    reference, tokenizer = load_policy(
        model_dirs[0], [model_dirs[1]], dtype=torch.float32, device=CPU.torch
    )

    def by_hand(directory: Path, rows: pd.DataFrame) -> tuple[float, float, float]:
        policy, _ = load_policy(
            model_dirs[0], [model_dirs[1], directory], dtype=torch.float32, device=CPU.torch
        )
        margins = _margins(policy, reference, tokenizer, rows, 0.3)
        n = len(margins)
        loss = sum(-math.log(1 / (1 + math.exp(-m))) for m in margins) / n
        return loss, sum(margins) / n, sum(m > 0 for m in margins) / n

    loss, margin, accuracy = by_hand(tmp_path / "checkpoint-1", pairs.iloc[:2])
    assert abs(margin) > 1e-3, "a step must have moved the policy for this to show anything"
    assert second == pytest.approx(loss, abs=1e-5)
    assert facts["curves"]["margins"][1][1] == pytest.approx(margin, abs=1e-4)
    assert facts["curves"]["accuracies"][1][1] == accuracy
    loss, margin, accuracy = by_hand(adapter, pairs.iloc[-3:])
    validation = facts["validation"]
    assert validation["loss"] == pytest.approx(loss, abs=1e-5)
    assert validation["margin"] == pytest.approx(margin, abs=1e-4)
    assert validation["accuracy"] == pytest.approx(accuracy)
    assert (validation["pairs"], validation["users"]) == (3, 3)


def test_the_training_equals_trls_own_on_the_same_token_ids(model_dirs, tmp_path: Path) -> None:
    """TRL's loss with its own reference forward (adapter off); batches of unequal lengths."""
    pairs = PAIRS[PAIRS["split"] == "train"]
    recipe = RECIPE.model_copy(update={"batch_size": 4, "epochs": 1, "learning_rate": 1e-3})
    adapter, facts = _train(model_dirs, tmp_path / "ours", recipe, pairs)

    class Trl(DPOTrainer):
        def _prepare_dataset(self, dataset, *args, **kwargs):
            return dataset

    model, tokenizer = load_policy(
        model_dirs[0], [model_dirs[1]], dtype=torch.float32, device=CPU.torch
    )
    rows = pairs.merge(PROMPTS[["user_id", "prompt"]], on="user_id")
    trainer = Trl(
        model=model,
        args=DPOConfig(
            output_dir=str(tmp_path / "trl"),
            per_device_train_batch_size=2,
            gradient_accumulation_steps=2,
            num_train_epochs=1,
            learning_rate=1e-3,
            optim="adamw_torch",
            beta=recipe.beta,
            bf16=False,
            use_cpu=True,
            gradient_checkpointing=False,
            seed=5,
            data_seed=5,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list(
            [
                {
                    "prompt_ids": prompt_ids(tokenizer, row.prompt),
                    "chosen_ids": completion_ids(tokenizer, row.prompt, row.chosen),
                    "rejected_ids": completion_ids(tokenizer, row.prompt, row.rejected),
                }
                for row in rows.itertuples()
            ]
        ),
        processing_class=tokenizer,
        peft_config=lora_config(recipe.lora, "CAUSAL_LM"),
    )
    trainer.train()
    theirs = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [loss for _, loss in facts["curves"]["losses"]] == pytest.approx(
        [entry["loss"] for entry in theirs], abs=1e-5
    )
    assert [value for _, value in facts["curves"]["margins"]] == pytest.approx(
        [entry["rewards/margins"] for entry in theirs], abs=1e-4
    )
    expected = _weights(save_adapter(trainer.model, tmp_path / "adapter", "base"))
    found = _weights(adapter)
    assert all(torch.allclose(found[name], expected[name], atol=1e-5) for name in expected)


def test_the_trainer_sees_the_rendering_of_sft_and_sampling(
    model_dirs, tmp_path: Path, monkeypatch
) -> None:
    seen = []
    real = dpo_module.answer_log_probs

    def spy(model, inputs):
        if model.training:
            seen.append({name: tensor.clone() for name, tensor in inputs.items()})
        return real(model, inputs)

    monkeypatch.setattr(dpo_module, "answer_log_probs", spy)
    one = RECIPE.model_copy(update={"batch_size": 1, "micro_batch_size": 1, "epochs": 1})
    _train(model_dirs, tmp_path, one, PAIRS.iloc[:1])
    (inputs,) = seen
    tokenizer = AutoTokenizer.from_pretrained(model_dirs[0])
    prompt = PROMPTS["prompt"][0]
    ids, parts = inputs["input_ids"][0], inputs["parts"][0]
    assert ids[parts == PROMPT].tolist() == prompt_ids(tokenizer, prompt)
    for part, answer in ((CHOSEN, PAIRS["chosen"][0]), (REJECTED, PAIRS["rejected"][0])):
        answer_ids = ids[parts == part].tolist()
        assert answer_ids == completion_ids(tokenizer, prompt, answer)
        assert tokenizer.decode(answer_ids) == answer + "<|im_end|>"


def test_margins_grow_and_the_chosen_answer_gains_on_the_rejected(
    model_dirs, tmp_path: Path
) -> None:
    events = []
    adapter, facts = _train(
        model_dirs, tmp_path, RECIPE.model_copy(update={"epochs": 3}), progress=events.append
    )
    margins = [value for _, value in facts["curves"]["margins"]]
    assert margins[0] == pytest.approx(0, abs=1e-4)
    assert min(margins[-3:]) > 0.5
    assert [value for _, value in facts["curves"]["accuracies"]][-3:] == [1, 1, 1]
    assert facts["validation"]["accuracy"] == 1
    assert facts["validation"]["loss"] < math.log(2)
    sft, tokenizer = load_policy(
        model_dirs[0], [model_dirs[1]], dtype=torch.float32, device=CPU.torch
    )
    policy, _ = load_policy(
        model_dirs[0], [model_dirs[1], adapter], dtype=torch.float32, device=CPU.torch
    )
    assert all(margin > 0 for margin in _margins(policy, sft, tokenizer, PAIRS, 0.1))
    # the facts
    assert (facts["train_pairs"], facts["validation_pairs"], facts["train_prompts"]) == (12, 4, 12)
    assert facts["steps"] == 18
    assert facts["trained_user_ids"] == list(range(12))
    assert [e.step for e in events if e.what == "DPO"] == list(range(1, 19))
    assert {path.suffix for path in adapter.iterdir()} == {".safetensors", ".json"}
    assert str(model_dirs[0]) not in (adapter / "adapter_config.json").read_text()


def test_the_reference_is_the_sft_policy_with_the_adapter_off(model_dirs, tmp_path: Path) -> None:
    adapter, _ = _train(model_dirs, tmp_path, RECIPE.model_copy(update={"epochs": 1}))
    sft, tokenizer = load_policy(
        model_dirs[0], [model_dirs[1]], dtype=torch.float32, device=CPU.torch
    )
    model = PeftModel.from_pretrained(sft, adapter).eval()
    with model.disable_adapter():
        expected = [
            [_log_prob(model, tokenizer, prompt, answer) for answer in answers]
            for prompt, *answers in zip(
                PROMPTS["prompt"][:3], PAIRS["chosen"], PAIRS["rejected"], strict=False
            )
        ]
    found = load_file(tmp_path / "reference.safetensors")["train"][:3]
    assert torch.allclose(found, torch.tensor(expected), atol=1e-4)


def test_a_reference_that_rounds_otherwise_is_made_again(model_dirs, tmp_path: Path) -> None:
    """Of a training that began before a pair was one row."""
    one = RECIPE.model_copy(update={"epochs": 1})
    expected, _ = _train(model_dirs, tmp_path / "new", one)
    reference = load_file(tmp_path / "new" / "reference.safetensors")
    (tmp_path / "old").mkdir()
    old = {name: value + 1 for name, value in reference.items() if name != "layout"}
    old["micro_batch_size"] = reference["micro_batch_size"]
    save_file(old, tmp_path / "old" / "reference.safetensors")
    found, _ = _train(model_dirs, tmp_path / "old", one)
    again = load_file(tmp_path / "old" / "reference.safetensors")
    assert all(torch.equal(again[name], value) for name, value in reference.items())
    theirs = _weights(expected)
    assert all(torch.equal(value, theirs[name]) for name, value in _weights(found).items())


def test_the_recipes_dropout_is_kept(model_dirs, tmp_path: Path) -> None:
    """TRL switches dropout off unless told otherwise."""
    one = RECIPE.model_copy(update={"epochs": 1})
    dropout = one.model_copy(update={"lora": LoraRecipe(r=4, alpha=8, dropout=0.5)})
    plain, _ = _train(model_dirs, tmp_path / "plain", one)
    dropped, _ = _train(model_dirs, tmp_path / "dropped", dropout)
    expected, found = _weights(plain), _weights(dropped)
    assert not all(torch.equal(expected[name], found[name]) for name in expected)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_users_of_another_split_do_not_train(model_dirs, tmp_path: Path, split: str) -> None:
    prompts = PROMPTS.assign(split=PROMPTS["split"].mask(PROMPTS["user_id"] == 3, split))
    with pytest.raises(DataError, match=rf"user 3 has a pair in split 'train'.*'{split}'"):
        _train(model_dirs, tmp_path, prompts=prompts)


def test_a_user_with_windows_in_two_splits_does_not_train(model_dirs, tmp_path: Path) -> None:
    second = PROMPTS.iloc[[3]].assign(window_index=1, split="test")
    with pytest.raises(DataError, match="user 3 has a pair in split 'train'"):
        _train(model_dirs, tmp_path, prompts=pd.concat([PROMPTS, second]))


def test_training_users_do_not_validate_and_test_users_have_no_pairs(
    model_dirs, tmp_path: Path
) -> None:
    for user, split in ((0, "validation"), (14, "test")):
        wrong = PAIRS.assign(split=PAIRS["split"].mask(PAIRS["user_id"] == user, split))
        with pytest.raises(DataError, match=f"user {user} has a pair in split '{split}'"):
            _train(model_dirs, tmp_path, pairs=wrong)


def test_pairs_without_prompt_or_of_no_training_user_are_refused(
    model_dirs, tmp_path: Path
) -> None:
    with pytest.raises(DataError, match=r"user 99 .* no split of prompts"):
        _train(model_dirs, tmp_path, pairs=PAIRS.assign(user_id=PAIRS["user_id"].replace(3, 99)))
    with pytest.raises(DataError, match="user 0 has a pair for window 7"):
        _train(model_dirs, tmp_path, pairs=PAIRS.assign(window_index=7))
    with pytest.raises(DataError, match=r"sampling\.n"):
        _train(model_dirs, tmp_path, pairs=PAIRS[PAIRS["split"] == "validation"])


def test_a_pair_that_does_not_fit_is_refused_not_cut(model_dirs, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"dpo\.max_length is 8, .* set it to at least"):
        _train(model_dirs, tmp_path, RECIPE.model_copy(update={"max_length": 8}))


def test_no_validation_pair_is_no_validation(model_dirs, tmp_path: Path) -> None:
    _, facts = _train(model_dirs, tmp_path, pairs=PAIRS.iloc[:2])
    assert facts["validation"] is None
    assert facts["validation_pairs"] == 0


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_dpo
test_dpo._train((Path(sys.argv[1]), Path(sys.argv[2])), Path(sys.argv[3]), test_dpo.DROPOUT,
                progress=lambda event: print(event.what, event.step, flush=True))
"""
#: With dropout, so that the random state must come back too.
DROPOUT = RECIPE.model_copy(update={"lora": LoraRecipe(r=4, alpha=8, dropout=0.1)})


# 12 pairs in batches of 2 are 6 steps an epoch: 9 dies in the middle of the second.
def test_killed_and_started_again_ends_with_the_same_weights(model_dirs, tmp_path: Path) -> None:
    undisturbed, expected_facts = _train(model_dirs, tmp_path / "undisturbed", DROPOUT)
    work = tmp_path / "killed"
    child = subprocess.Popen(
        [
            sys.executable,
            "-c",
            _CHILD.format(tests=str(Path(__file__).parent)),
            *map(str, (*model_dirs, work)),
        ],
        stdout=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())},
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip() == "DPO 9":
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert child.returncode == -signal.SIGKILL
    assert last_complete_checkpoint(work) is not None
    resumed, facts = _train(model_dirs, work, DROPOUT)
    assert facts["resumed_at"] in (8, 10)
    assert facts["curves"] == expected_facts["curves"]
    assert facts["validation"] == expected_facts["validation"]
    expected, found = _weights(undisturbed), _weights(resumed)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    # Killed between the last step and publishing, nothing is left to train.
    again, facts = _train(model_dirs, work, DROPOUT)
    assert facts["resumed_at"] == facts["steps"] == 12
    assert facts["validation"] == expected_facts["validation"]
    assert all(torch.equal(expected[name], value) for name, value in _weights(again).items())
