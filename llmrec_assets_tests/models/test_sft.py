"""SFT: what is learnt, and that a kill changes nothing."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from free_text import generate_responses
from safetensors.torch import load_file
from transformers import AutoTokenizer

from llmrec_assets.ground.errors import DataError, RecipeError
from llmrec_assets.ground.recipes import BaseModelRecipe, LoraRecipe, SftRecipe
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.device import Device
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.sft import tokenize_examples, train_sft
from llmrec_assets.models.training import last_complete_checkpoint

CPU = Device("cpu", "CPU", "cpu")
TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=3)
RECIPE = SftRecipe(
    lora=LoraRecipe(r=4, alpha=8),
    learning_rate=1e-2,
    batch_size=4,
    micro_batch_size=2,
    epochs=2,
    save_steps=2,
    dtype="float32",
)
PROMPTS = [f"User {i} liked film {i % 5}. Recommend." for i in range(24)]
COMPLETIONS = [f'["Film {i % 5} (19{80 + i % 5})"]' for i in range(24)]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    return prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]


def _train(base_dir: Path, work: Path, recipe: SftRecipe = RECIPE, progress=lambda event: None):
    return train_sft(
        base_dir,
        PROMPTS,
        COMPLETIONS,
        recipe,
        seed=5,
        work_dir=work,
        device=CPU,
        progress=progress,
    )


def _weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def test_labels_cover_the_completion_and_its_end_only(base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    (example,) = tokenize_examples(tokenizer, ["Name a film."], ['["Heat (1995)"]'], 512)
    learnt = [label for label in example["labels"] if label != -100]
    assert tokenizer.decode(learnt) == '["Heat (1995)"]<|im_end|>'
    assert len(example["labels"]) == len(example["input_ids"])
    assert example["input_ids"][-len(learnt) :] == learnt


def test_an_example_that_does_not_fit_is_refused_not_cut(base_dir: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(base_dir)
    with pytest.raises(RecipeError, match=r"max_length is 8, .* set it to at least"):
        tokenize_examples(tokenizer, ["A long prompt about films."], ["[]"], 8)


def test_no_example_says_what_to_change(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="min_per_class"):
        train_sft(base_dir, [], [], RECIPE, seed=0, work_dir=tmp_path, device=CPU)


def test_the_loss_equals_trl_and_a_hand_computed_mean(base_dir: Path, tmp_path: Path) -> None:
    """First logged loss = mean NLL over the labelled tokens of the first batch."""
    one_step = RECIPE.model_copy(update={"batch_size": 24, "micro_batch_size": 24, "epochs": 1})
    result = _train(base_dir, tmp_path / "work", one_step)
    model, tokenizer = load_policy(base_dir, [], dtype=torch.float32, device=CPU.torch)
    total = n = 0.0
    for example in tokenize_examples(tokenizer, PROMPTS, COMPLETIONS, 1024):
        ids, labels = torch.tensor([example["input_ids"]]), torch.tensor(example["labels"])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
        for t in range(1, len(labels)):
            if labels[t] != -100:
                total -= float(log_p[t - 1, labels[t]])
                n += 1
    assert result.losses[0][1] == pytest.approx(total / n, rel=1e-4)
    # TRL's own loss, on the same batch
    import llmrec_assets.models.sft as module

    original = module._CompletionTrainer
    try:
        module._CompletionTrainer = module.SFTTrainer
        trl = _train(base_dir, tmp_path / "trl", one_step)
    finally:
        module._CompletionTrainer = original
    assert trl.losses[0][1] == pytest.approx(result.losses[0][1], rel=1e-5)
    ours, theirs = _weights(result.adapter_dir), _weights(trl.adapter_dir)
    assert all(torch.allclose(ours[name], theirs[name], atol=1e-6) for name in theirs)


def test_training_learns_and_publishes_safetensors_and_json_only(
    base_dir: Path, tmp_path: Path
) -> None:
    events = []
    longer = RECIPE.model_copy(update={"epochs": 8, "learning_rate": 2e-2})
    result = _train(base_dir, tmp_path / "work", longer, events.append)
    assert result.losses[-1][1] < 0.5 * result.losses[0][1]
    assert result.n_examples == 24
    assert result.n_steps == 48
    assert [event.step for event in events] == list(range(1, 49))
    assert events[-1].total == 48
    suffixes = {path.suffix for path in result.adapter_dir.iterdir()}
    assert suffixes == {".safetensors", ".json"}
    config = json.loads((result.adapter_dir / "adapter_config.json").read_text())
    assert str(base_dir) not in json.dumps(config), "no machine path in what is published"


def test_the_adapter_changes_what_is_generated(base_dir: Path, tmp_path: Path) -> None:
    from llmrec_assets.ground.recipes import GenerationRecipe

    longer = RECIPE.model_copy(update={"epochs": 12, "learning_rate": 2e-2})
    result = _train(base_dir, tmp_path / "work", longer)
    greedy = GenerationRecipe(max_new_tokens=24, batch_size=4, dtype="float32")
    model, tokenizer = load_policy(
        base_dir, [result.adapter_dir], dtype=torch.float32, device=CPU.torch
    )
    (answer,) = generate_responses(model, tokenizer, PROMPTS[:1], greedy, seed=0)
    assert answer.text.startswith('["Film ')
    assert answer.finished


def test_incomplete_trainer_checkpoints_are_removed(tmp_path: Path) -> None:
    for step in (2, 10, 4):
        (tmp_path / f"checkpoint-{step}").mkdir()
    for step in (2, 4):
        (tmp_path / f"checkpoint-{step}" / "COMPLETE").touch()
    assert last_complete_checkpoint(tmp_path) == tmp_path / "checkpoint-4"
    assert not (tmp_path / "checkpoint-10").exists()
    assert last_complete_checkpoint(tmp_path / "nothing") is None


_CHILD = """
import sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_sft
test_sft._train(Path(sys.argv[1]), Path(sys.argv[2]),
                progress=lambda event: print(event.step, flush=True))
"""


# 24 examples in batches of 4 are 6 steps an epoch: 3 dies in the first, 9 in the second epoch.
@pytest.mark.parametrize("kill_at", [3, 9])
def test_killed_and_started_again_ends_with_the_same_weights(
    base_dir: Path, tmp_path: Path, kill_at: int
) -> None:
    undisturbed = _train(base_dir, tmp_path / "undisturbed")
    work = tmp_path / "killed"
    code = _CHILD.format(tests=str(Path(__file__).parent))
    environment = {**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    child = subprocess.Popen(
        [sys.executable, "-c", code, str(base_dir), str(work)],
        stdout=subprocess.PIPE,
        text=True,
        env=environment,
    )
    assert child.stdout is not None
    for line in child.stdout:
        if line.strip().isdigit() and int(line) >= kill_at:
            child.send_signal(signal.SIGKILL)
            break
    child.wait()
    assert child.returncode == -signal.SIGKILL
    deadline = time.monotonic() + 10
    while last_complete_checkpoint(work) is None and time.monotonic() < deadline:
        time.sleep(0.1)
    resumed = _train(base_dir, work)
    assert resumed.resumed_at in (kill_at - 1, kill_at + 1)
    assert resumed.losses == undisturbed.losses
    expected, found = _weights(undisturbed.adapter_dir), _weights(resumed.adapter_dir)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
