"""The champion's directory: it stands alone, and answers as the policy it was packed from."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from llmrec_assets.ground.challengers import Challenger, Source, read_challenger, read_source
from llmrec_assets.ground.champion import read_served, write_served
from llmrec_assets.ground.errors import RecipeError, StoreError
from llmrec_assets.ground.recipes import PromptRecipe, load_recipe
from llmrec_assets.ground.serving import Served, serving_prompts
from llmrec_assets.models.champion import load_champion, pack_champion, validation_lists
from llmrec_assets.models.chat import prompt_ids
from llmrec_assets.models.device import Device
from llmrec_assets.models.loading import load_policy

if TYPE_CHECKING:
    from conftest import FinishedRun

CPU = Device("cpu", "CPU", "cpu")
ON = {"dtype": torch.float32, "device": CPU.torch}
QUESTION = "User: 33 years old. Liked: Alien (1979)."


def challenger(finished: FinishedRun, stage: str) -> Challenger:
    return read_challenger(finished.home.store, "sample", "tiny", stage, "code")


@pytest.fixture(scope="module")
def source(finished: FinishedRun) -> Source:
    return read_source(finished.home.store, "sample")


@pytest.fixture(scope="module", params=["sft", "dpo", "rlhf"])
def packed(
    request: pytest.FixtureRequest, finished: FinishedRun, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Challenger, Path]:
    found = challenger(finished, request.param)
    return found, pack_champion(found, tmp_path_factory.mktemp("champion") / request.param)


#: What anybody does with the directory, in it, and isolated from this project.
LOAD = """
import json, os, sys
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

for directory in sys.argv[2:]:
    os.chdir(directory)
    tokenizer = AutoTokenizer.from_pretrained("model")
    model = AutoModelForCausalLM.from_pretrained("model", dtype="auto")
    if os.path.isdir("adapter"):
        model = PeftModel.from_pretrained(model, "adapter")
    message = [{"role": "user", "content": sys.argv[1]}]
    text = tokenizer.apply_chat_template(message, tokenize=False, add_generation_prompt=True)
    ids = tokenizer(text, add_special_tokens=False, return_tensors="pt").input_ids
    with torch.inference_mode():
        logits = model.eval()(ids).logits[0, -1].tolist()
    ours = [name for name in sys.modules if name.startswith("llmrec")]
    print("TOLD", json.dumps({"logits": logits, "ours": ours}))
"""


def test_it_loads_with_plain_transformers_and_peft(finished: FinishedRun, tmp_path: Path) -> None:
    """SFT's directory is a model; DPO's a model and an adapter on top."""
    packed = {
        stage: (found, pack_champion(found, tmp_path / stage))
        for stage in ("sft", "dpo")
        for found in [challenger(finished, stage)]
    }
    assert not (tmp_path / "sft" / "adapter").exists() and (tmp_path / "dpo" / "adapter").is_dir()
    done = subprocess.run(
        [sys.executable, "-I", "-c", LOAD, QUESTION, *(str(path) for _, path in packed.values())],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "HOME": str(tmp_path)},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    lines = [line for line in done.stdout.splitlines() if line.startswith("TOLD ")]
    for line, (found, _) in zip(lines, packed.values(), strict=True):
        told = json.loads(line.removeprefix("TOLD "))
        assert told["ours"] == []
        plain = torch.tensor(told["logits"])
        model, tokenizer = load_policy(found.base_model, found.adapters, **ON)
        merged, *live = found.adapters
        composed, _ = load_policy(found.base_model, [merged], **ON)
        for adapter in live:
            composed = PeftModel.from_pretrained(composed, adapter).eval()
        ids = torch.tensor([prompt_ids(tokenizer, QUESTION)])
        with torch.inference_mode():
            assert torch.equal(plain, composed(ids).logits[0, -1])
            # in float32 ours merges the second adapter
            assert torch.allclose(plain, model(ids).logits[0, -1], atol=1e-5)


def test_loaded_again_it_is_the_policy_bit_by_bit(packed: tuple[Challenger, Path]) -> None:
    found, directory = packed
    model, tokenizer = load_champion(directory, **ON)
    theirs, _ = load_policy(found.base_model, found.adapters, **ON)
    ids = torch.tensor([prompt_ids(tokenizer, QUESTION)])
    with torch.inference_mode():
        assert torch.equal(model(ids).logits, theirs(ids).logits)
    if found.served.stage != "sft":
        weights = "adapter_model.safetensors"
        ours, own = load_file(directory / "adapter" / weights), found.adapters[-1] / weights
        assert all(torch.equal(tensor, ours[name]) for name, tensor in load_file(own).items())


def test_nothing_in_it_points_outside(packed: tuple[Challenger, Path]) -> None:
    found, directory = packed
    files = {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}
    assert {Path(name).suffix for name in files} <= {".safetensors", ".json", ".jinja", ".parquet"}
    assert not any(path.is_symlink() for path in directory.rglob("*"))
    for path in directory.rglob("*.json"):
        text = path.read_text()
        assert str(directory.parent) not in text and "/tmp" not in text
        assert found.base_model.name not in text and str(found.base_model) not in text
    if (directory / "adapter").is_dir():
        config = json.loads((directory / "adapter" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == "model"
    served, catalogue = read_served(directory)
    assert served == found.served
    assert catalogue.equals(found.catalogue)


def test_a_window_of_its_own_recipe_is_asked_with_that_windows_prompt(
    finished: FinishedRun, source: Source
) -> None:
    found = challenger(finished, "sft")
    asked = found.validation_prompts(left_out=set())
    assert len(asked) > 40 and set(asked["split"]) == {"validation"}
    made = serving_prompts(asked, source.ratings.frame, source.users, found.catalogue, found.served)
    assert made["prompt"].tolist() == asked["prompt"].tolist()
    assert made["context_movie_ids"].tolist() == asked["context_movie_ids"].tolist()
    # the answer is not even there to be shown
    assert not any(made["ground_truth_movie_ids"])


def lists(directory: Path, found: Challenger, source: Source, work: Path, left_out: set[int]):
    return validation_lists(
        directory,
        found.validation_prompts(left_out),
        source,
        side="champion",
        version="v",
        prompts_version="p",
        top_k=5,
        seed=1,
        code="code",
        work_dir=work,
        device=CPU,
    )


def test_a_champion_of_another_recipe_answers_the_challengers_windows_in_its_own_words(
    finished: FinishedRun, source: Source, tmp_path: Path
) -> None:
    found = challenger(finished, "sft")
    directory = pack_champion(found, tmp_path / "champion")
    other = found.served.model_copy(
        update={
            "prompts": PromptRecipe(template="figure2"),
            "windows": found.served.windows.model_copy(update={"window_size": 4, "top_k": 3}),
            "generation": found.served.generation.model_copy(update={"beams": 3}),
        }
    )
    unknown = int(found.catalogue["movie_id"].iloc[0])
    write_served(directory, other, found.catalogue[found.catalogue["movie_id"] != unknown])
    left_out = set(found.validation_prompts(set())["user_id"].tolist()[:30])
    made = lists(directory, found, source, tmp_path, left_out)
    asked = found.validation_prompts(left_out)
    assert set(zip(made["user_id"], made["window_index"], strict=True)) == set(
        zip(asked["user_id"], asked["window_index"], strict=True)
    )
    assert made["rank"].max() == 5  # the challenger's k, whatever it was trained for
    assert unknown not in set(made["movie_id"])
    assert not made["is_seen"].any() and made["movie_id"].notna().all()


def test_answers_that_a_killed_run_finished_are_not_made_again(
    finished: FinishedRun, source: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from llmrec_assets.models import champion

    found = challenger(finished, "sft")
    directory = pack_champion(found, tmp_path / "champion")
    left_out = set(found.validation_prompts(set())["user_id"].tolist()[:60])
    first = lists(directory, found, source, tmp_path, left_out)

    def refuse(*args: object, **options: object) -> None:
        raise AssertionError("answered again")

    monkeypatch.setattr(champion, "answer_prompts", refuse)
    assert lists(directory, found, source, tmp_path, left_out).equals(first)
    with pytest.raises(AssertionError, match="answered again"):
        lists(directory, found, source, tmp_path, left_out - {max(left_out)})


def test_a_description_of_another_version_of_the_project_is_refused(tmp_path: Path) -> None:
    (tmp_path / "champion.json").write_text('{"dataset": "sample", "oracle": true}')
    with pytest.raises(StoreError, match=r"promoted by another version of this project.*oracle"):
        read_served(tmp_path)


def test_served_by_the_decoding_that_the_recipe_names() -> None:
    recipe = load_recipe("tiny")
    served = Served.of(recipe, "sample", "dpo")
    assert served.decoding == recipe.promotion.decoding == "ranked"
    assert served.generation_for(60).beams == 60
    assert served.generation_for(2).beams == recipe.generation.beams


@pytest.mark.parametrize(
    ("recipe", "stage", "said"),
    [
        ("cpu-anonymised", None, "shows invented titles: it is a control"),
        ("tiny", "base", "no stage named 'base' can be champion"),
        ("tinny", None, "no recipe named 'tinny'"),
    ],
)
def test_what_cannot_challenge_is_refused(
    finished: FinishedRun, recipe: str, stage: str | None, said: str
) -> None:
    with pytest.raises(RecipeError, match=said):
        read_challenger(finished.home.store, "sample", recipe, stage, "code")
