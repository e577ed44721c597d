"""Out of memory: smaller batches, the same examples in every step, the same answers."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pandas as pd
import pytest
import test_dpo
import test_reward
import test_sampled
import test_sft
import torch
from free_text import generate_responses
from ppo_cases import CPU, LORA, PROMPTS, TINY, Scripted, random_adapter
from safetensors.torch import load_file
from transformers.models.llama.modeling_llama import LlamaModel

from llmrec_assets.ground.recipes import GenerationRecipe, RlhfRecipe
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.generation import fitting_batches
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.memory import (
    FittingBatches,
    OutOfMemoryError,
    is_out_of_memory,
    train_in_fitting_batches,
)
from llmrec_assets.models.ppo import train_ppo
from llmrec_assets.models.progress import ProgressEvent

Plant = Callable[..., list[int]]


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> Plant:
    """``fits(rows, after=n)``: after n forward passes with more rows than that, none fits any more.
    Returns the rows of those that did not."""

    def plant(rows: int, after: int = 0) -> list[int]:
        forward = LlamaModel.forward
        larger: list[int] = []
        failed: list[int] = []

        def limited(self, input_ids=None, **others):
            n = others["rows"]["shape"][0] if others.get("rows") else len(input_ids)
            if n > rows:
                larger.append(n)
                if len(larger) > after:
                    failed.append(n)
                    raise torch.OutOfMemoryError(f"planted: {n} rows")
            return forward(self, input_ids=input_ids, **others)

        monkeypatch.setattr(LlamaModel, "forward", limited)
        return failed

    return plant


@pytest.fixture(scope="module")
def dirs(tmp_path_factory) -> tuple[Path, Path]:
    base_dir = prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]
    return base_dir, random_adapter(base_dir, tmp_path_factory.mktemp("sft") / "adapter")


def weights(directory: Path) -> dict[str, torch.Tensor]:
    return load_file(directory / "adapter_model.safetensors")


def notes(events: list[ProgressEvent]) -> list[str]:
    return [event.note for event in events if event.note]


class Died(Exception):
    pass


def die_at(step: int) -> Callable[[ProgressEvent], None]:
    def die(event: ProgressEvent) -> None:
        if event.step == step and not event.what.endswith("reference"):
            raise Died

    return die


def test_the_allocators_own_words_are_known() -> None:
    with pytest.raises(RuntimeError, match="DefaultCPUAllocator") as cpu:
        torch.empty(2**60, dtype=torch.uint8)
    for error in (
        cpu.value,
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB."),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be reported"),
        RuntimeError("MPS backend out of memory (MPS allocated: 17.9 GB)"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate`"),
        RuntimeError("unable to mmap 365520 bytes from file: Cannot allocate memory (12)"),
        MemoryError(),
    ):
        assert is_out_of_memory(error)
    for other in (RuntimeError("shape mismatch"), ValueError("out of memory"), OSError(12, "no")):
        assert not is_out_of_memory(other)


def _sft(dirs, work: Path, recipe, progress):
    result = test_sft._train(dirs[0], work, recipe, progress)
    facts = {**result.memory, "resumed_at": result.resumed_at, "losses": result.losses}
    return result.adapter_dir, facts


def _dpo(dirs, work: Path, recipe, progress):
    adapter_dir, facts = test_dpo._train(dirs, work, recipe, progress=progress)
    return adapter_dir, {**facts, "losses": facts["curves"]["losses"]}


def _reward(dirs, work: Path, recipe, progress):
    adapter_dir, facts = test_reward._train(dirs, work, recipe, progress=progress)
    return adapter_dir, {**facts, "losses": facts["curves"]["losses"]}


@pytest.mark.parametrize(
    ("train", "recipe", "rows", "after"),
    [
        # 24 examples, 3 steps an epoch: the sixth micro batch belongs to step 3.
        (_sft, test_sft.RECIPE, 2, 5),
        # 12 pairs, 2 steps an epoch: 3 passes make the reference, the sixth after them is step 4
        (_dpo, test_dpo.RECIPE, 2, 8),
        (_reward, test_reward.RECIPE, 2, 5),
    ],
)
def test_a_training_goes_on_from_its_last_checkpoint_with_half_the_micro_batch(
    dirs, tmp_path: Path, fits: Plant, train, recipe, rows: int, after: int
) -> None:
    """Bit for bit as if a person had gone on from there with that micro batch."""
    recipe = recipe.model_copy(update={"batch_size": 8, "micro_batch_size": 4, "save_steps": 2})
    half = recipe.model_copy(update={"micro_batch_size": 2})
    by_hand = tmp_path / "by-hand"
    with pytest.raises(Died):
        train(dirs, by_hand, recipe, die_at(3))
    expected, expected_facts = train(dirs, by_hand, half, lambda event: None)

    events: list[ProgressEvent] = []
    failed = fits(rows, after)
    found, facts = train(dirs, tmp_path / "limited", recipe, events.append)
    note, *others = notes(events)
    assert len(failed) == 1 + len(others)
    # The reward model scores the validation pairs, 8 answers at once, then 4, then 2.
    assert [other.split(":")[0] for other in others] == ["reward model's scores"] * (
        2 if train is _reward else 0
    )
    assert "out of memory with 4 examples at a time (planted: " in note
    assert "going on from step 2 with 2, 4 times a step: the same 8 examples" in note
    assert (facts["micro_batch_size_used"], facts["resumed_at"]) == (2, 2)
    assert facts["micro_batch_sizes"] == [[0, 4], [2, 2]]
    assert expected_facts["micro_batch_sizes"] == [[0, 2]]
    assert facts["losses"] == expected_facts["losses"]
    theirs = weights(expected)
    assert all(torch.equal(value, theirs[name]) for name, value in weights(found).items())


def test_a_killed_training_goes_on_with_the_size_it_had_found(
    dirs, tmp_path: Path, fits: Plant
) -> None:
    recipe = test_sft.RECIPE.model_copy(update={"batch_size": 6, "micro_batch_size": 6})
    failed = fits(2)
    with pytest.raises(Died):
        _sft(dirs, tmp_path, recipe, die_at(3))
    assert failed == [6, 3]  # 3 is half of 6, and 1 the largest divisor of 6 within half of 3
    _, facts = _sft(dirs, tmp_path, recipe, lambda event: None)
    assert failed == [6, 3]
    assert facts["micro_batch_sizes"] == [[0, 1]]


@pytest.mark.parametrize("train", [_dpo, _reward])
def test_the_micro_batch_size_does_not_change_a_training_on_pairs(
    dirs, tmp_path: Path, train
) -> None:
    """Also in a last batch that micro batches do not divide: 11 pairs in batches of 6."""
    module = test_dpo if train is _dpo else test_reward
    recipe = module.RECIPE.model_copy(update={"batch_size": 6, "save_steps": 100, "epochs": 1})
    data = module.PAIRS[module.PAIRS["user_id"] != 5]
    assert len(data[data["split"] == "train"]) == 11
    curves = []
    for size in (6, 3, 2):
        sized = recipe.model_copy(update={"micro_batch_size": size})
        options = {"pairs": data} if train is _dpo else {"data": (test_reward.PROMPTS, data)}
        _, facts = module._train(dirs, tmp_path / str(size), sized, **options)
        curves.append([loss for _, loss in facts["curves"]["losses"]])
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)
    assert curves[0] == pytest.approx(curves[2], rel=1e-5)


def test_ppo_makes_the_same_minibatches_of_what_fits(dirs, tmp_path: Path, fits: Plant) -> None:
    recipe = RlhfRecipe(
        reward="ndcg",
        lora=LORA,
        learning_rate=2e-3,
        batches=2,
        batch_size=8,
        micro_batch_size=4,
        minibatches=2,
        max_new_tokens=8,
        kl_target=10.0,
        kl_stop=1e6,
        missing_end_penalty=0.0,
        dtype="float32",
    )
    scorer = Scripted(lambda text: len(text) % 7 / 7)

    def train(work: Path, progress=lambda event: None):
        return train_ppo(
            *dirs,
            PROMPTS,
            recipe,
            reward_dir=None,
            scorer=scorer,
            seed=5,
            work_dir=work,
            device=CPU,
            progress=progress,
        )

    expected, expected_facts = train(tmp_path / "whole")
    events: list[ProgressEvent] = []
    failed = fits(3)
    found, facts = train(tmp_path / "limited", events.append)
    assert failed == [8, 4, 4, 8, 4]  # sampling, a micro batch; after starting anew, sampling again
    assert facts["micro_batch_sizes"] == [[0, 2]]
    assert [re.sub(r" \(planted.*", "", note) for note in notes(events)] == [
        "PPO's sampling: out of memory with 8 responses at a time",
        "PPO's sampling: out of memory with 4 responses at a time",
        "PPO: out of memory with 4 examples at a time",
        "PPO's sampling: out of memory with 8 responses at a time",
        "PPO's sampling: out of memory with 4 responses at a time",
    ]
    for name, curve in expected_facts["curves"].items():
        assert facts["curves"][name] == [(b, pytest.approx(v, abs=1e-4)) for b, v in curve], name
    theirs = weights(expected)
    assert all(
        torch.allclose(value, theirs[name], atol=1e-4) for name, value in weights(found).items()
    )


def test_what_is_generated_does_not_depend_on_how_much_fits(
    dirs, tmp_path: Path, fits: Plant
) -> None:
    model, tokenizer = load_policy(dirs[0], [], dtype=torch.float32, device=CPU.torch)
    recipe = GenerationRecipe(max_new_tokens=8, batch_size=8, do_sample=True, dtype="float32")
    prompts = PROMPTS["prompt"].tolist()
    whole = generate_responses(model, tokenizer, prompts, recipe, seed=1)
    sampled, facts = test_sampled._run(dirs[0], tmp_path / "whole")
    assert "samples_at_once" not in facts

    events: list[ProgressEvent] = []
    failed = fits(2)
    batches = fitting_batches(model, recipe, "answers", events.append)
    parts = generate_responses(model, tokenizer, prompts, recipe, seed=1, batches=batches)
    assert parts == whole
    assert (failed, batches.size) == ([8, 4], 2)
    assert "answers: out of memory with 8 prompts at a time" in notes(events)[0]
    again, facts = test_sampled._run(dirs[0], tmp_path / "parts")
    pd.testing.assert_frame_equal(again, sampled)
    assert facts["samples_at_once"] == 1  # of 6: 2 prompts of 3 samples, then 3, then 1


def test_where_nothing_fits_the_message_says_what_would(dirs, tmp_path: Path, fits: Plant) -> None:
    fits(0)
    with pytest.raises(OutOfMemoryError) as raised:
        _sft(dirs, tmp_path, test_sft.RECIPE, lambda event: None)
    message = str(raised.value)
    assert "SFT does not fit on the device, not even one example at a time" in message
    for remedy in (
        "sft.gradient_checkpointing: true",
        "a smaller sft.max_length (the longest example has ",
        "a smaller base_model",
        "a device with more memory than this one (cpu, ",
    ):
        assert remedy in message
    batches = FittingBatches("answers", "prompt", 4, CPU.torch, "a smaller generation.beams")

    def fail(batch) -> None:
        raise MemoryError

    with pytest.raises(OutOfMemoryError, match=r"one prompt at a time \(MemoryError\).*beams"):
        list(batches.map(range(4), fail))


def test_a_damaged_record_of_sizes_and_another_error_are_what_they_are(tmp_path: Path) -> None:
    (tmp_path / "micro_batch_sizes.json").write_text('[[0, "many"]]')
    tried = []

    def train(size: int) -> None:
        tried.append(size)
        raise RuntimeError("shape mismatch")

    with pytest.raises(RuntimeError, match="shape mismatch"):
        train_in_fitting_batches(
            train,
            what="SFT",
            micro_batch_size=4,
            batch_size=8,
            work_dir=tmp_path,
            stands_at=lambda: 0,
            device=CPU,
            remedy="",
        )
    assert tried == [4]


_REAL_LIMIT = """
import json, resource, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_sft
base, work = map(Path, sys.argv[1:])
test_sft.PROMPTS = [prompt + " very" * 200 for prompt in test_sft.PROMPTS[:12]]
test_sft.COMPLETIONS = test_sft.COMPLETIONS[:12]
sizes = {{"batch_size": 12, "micro_batch_size": 12, "epochs": 1}}
recipe = test_sft.RECIPE.model_copy(update=sizes)
one = recipe.model_copy(update={{"micro_batch_size": 1}})
expected = test_sft._train(base, work / "one", one)  # what the libraries need once is there now
held = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
# All 12 ask for 77 MiB at once; what is less leaves no room for the pieces that a failure leaves.
resource.setrlimit(resource.RLIMIT_AS, (held + 64 * 2**20, resource.RLIM_INFINITY))
notes = []
found = test_sft._train(base, work / "limited", recipe, lambda event: notes.append(event.note))
said = [note for note in notes if note]
print(json.dumps([found.memory, said, found.losses, expected.losses]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs /proc and RLIMIT_AS")
def test_a_process_that_may_not_have_more_memory_trains_on(dirs, tmp_path: Path) -> None:
    """No planted error: the kernel refuses, the allocator raises."""
    code = _REAL_LIMIT.format(tests=str(Path(__file__).parent))
    done = subprocess.run(
        [sys.executable, "-c", code, str(dirs[0]), str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=280,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    memory, said, losses, expected = json.loads(done.stdout.splitlines()[-1])
    assert 1 <= memory["micro_batch_size_used"] < 12
    assert "out of memory with 12 examples at a time (DefaultCPUAllocator: can't" in said[0]
    assert [loss for _, loss in losses] == pytest.approx([loss for _, loss in expected], rel=1e-5)
