"""Recipes: the committed ones say what the paper says, and no mistake passes silently."""

from __future__ import annotations

import copy
import re
from pathlib import Path
from typing import Any

import pytest
import yaml
from bad_input import RECIPE, RECIPE_TEXT
from pydantic import ValidationError

from llmrec_assets.ground.errors import RecipeError
from llmrec_assets.ground.recipes import RECIPES_DIR, Recipe, load_recipe, recipe_names

MINIMAL: dict[str, Any] = {
    "description": "for tests",
    "expected_peak_memory_gb": 2,
    "base_model": {"source": "tiny", "name": "tiny-llama", "label": "tiny"},
    "sft": {
        "lora": {"r": 4, "alpha": 8},
        "learning_rate": 0.01,
        "batch_size": 8,
        "micro_batch_size": 4,
        "epochs": 1,
    },
    "dpo": {"lora": {"r": 4, "alpha": 8}, "learning_rate": 0.001, "epochs": 1},
    "reward": {"lora": {"r": 4, "alpha": 8}, "learning_rate": 0.001, "epochs": 1},
    "rlhf": {"lora": {"r": 4, "alpha": 8}},
}


def write(directory: Path, text: str, name: str = "mine") -> Path:
    (directory / f"{name}.yaml").write_text(text, encoding="utf-8")
    return directory


def with_value(path: str, value: object) -> dict[str, Any]:
    raw = copy.deepcopy(MINIMAL)
    *sections, key = path.split(".")
    place = raw
    for section in sections:
        place = place.setdefault(section, {})
    place[key] = value
    return raw


# -- the committed recipes ----------------------------------------------------------------


def test_the_committed_recipes():
    assert recipe_names() == [
        "cpu",
        "cpu-anonymised",
        "cpu-one-window",
        "paper",
        "quickstart",
        "tiny",
    ]
    assert recipe_names() == sorted(path.stem for path in RECIPES_DIR.iterdir())


@pytest.mark.parametrize("name", recipe_names())
def test_every_committed_recipe_loads(name):
    recipe = load_recipe(name)
    assert recipe.name == name
    assert recipe.description.strip()


def test_the_paper_recipe_holds_the_papers_values():
    paper = load_recipe("paper")
    assert paper.base_model.name == "meta-llama/Llama-3.2-1B-Instruct"
    assert paper.splits.model_dump() == {"train": 0.70, "validation": 0.15, "test": 0.15}
    assert paper.windows.model_dump() == {
        "window_size": 10,
        "balance": "either",
        "min_per_class": 5,
        "min_ground_truth": 1,
        "top_k": 5,
        "liked_min": 3,
        "windows_per_user": {"train": 1, "validation": 1, "test": 1},
        "protocol": "user-split",
        "temporal_quantile": 0.8,
        "temporal_time": None,
    }
    assert paper.prompts.model_dump() == {
        "template": "figure2",
        "max_per_class": 5,
        "titles": "real",
    }
    assert paper.sft.lora.model_dump() == {
        "r": 256,
        "alpha": 128,
        "dropout": 0.05,
        "target_modules": "all-linear",
    }
    assert paper.sft.learning_rate == 5e-5
    assert paper.sft.batch_size == 8
    assert paper.sft.epochs == 3
    assert paper.sft.max_examples is None
    assert paper.evaluation.max_test_users is None


def test_decoding_of_the_paper_recipe_is_written_out_and_greedy():
    generation = load_recipe("paper").generation
    assert not generation.do_sample
    assert (generation.temperature, generation.top_k, generation.top_p) == (1.0, 0, 1.0)


def flat(values: dict[str, Any], at: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in values.items():
        inner = flat(value, f"{at}{key}.") if isinstance(value, dict) else {at + key: value}
        found.update(inner)
    return found


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("cpu-anonymised", {"prompts.titles": ("real", "invented")}),
        (
            "cpu-one-window",
            {
                "windows.windows_per_user.train": (5, 1),
                "evaluation.max_test_users": (None, 120),
            },
        ),
    ],
)
def test_a_relative_of_cpu_differs_in_what_it_says_alone(name, expected):
    cpu, relative = (flat(load_recipe(n).model_dump()) for n in ("cpu", name))
    differing = {key: (cpu[key], relative[key]) for key in cpu if cpu[key] != relative[key]}
    del differing["name"], differing["description"]
    assert cpu.keys() == relative.keys()
    assert differing == expected


def test_only_the_papers_decoding_is_on_by_default_and_in_the_papers_recipe():
    assert load_recipe("paper").generation.decodings == ("free",)
    assert load_recipe("paper").generation.candidates == "none"
    for name in ("cpu", "cpu-anonymised", "cpu-one-window", "tiny"):
        rows = load_recipe(name).generation.rows
        assert rows == ("free", "constrained", "ranked", "ranked-ease")
    assert load_recipe("quickstart").generation.rows == ("free", "ranked")


def test_a_decodings_settings_are_those_it_depends_on():
    generation = load_recipe("cpu").generation
    changed = generation.model_copy(update={"beams": 7, "decodings": ("free",)})
    assert changed.settings("free") == generation.settings("free")
    assert changed.settings("constrained") == generation.settings("constrained")
    assert changed.settings("ranked") != generation.settings("ranked")
    cut = generation.model_copy(update={"max_new_tokens": 9, "temperature": 0.1})
    assert cut.settings("ranked") == generation.settings("ranked")
    assert cut.settings("constrained")["temperature"] == 0.1
    assert cut.settings("free") != generation.settings("free")
    alone = generation.model_copy(update={"candidates": "none", "candidates_per_prompt": 7})
    for row in alone.rows:
        assert alone.settings(row) == generation.settings(row)
    assert changed.settings("ranked-ease") == generation.settings("ranked-ease")
    fewer = generation.model_copy(update={"candidates_per_prompt": 7})
    assert fewer.settings("ranked-ease") != generation.settings("ranked-ease")


def test_fewer_candidates_than_a_list_has_slots_are_refused(tmp_path):
    raw = with_value("generation.candidates", "ease")
    raw["generation"]["candidates_per_prompt"] = 4
    write(tmp_path, yaml.safe_dump(raw))
    with pytest.raises(RecipeError, match=r"candidates_per_prompt 4 cannot fill lists .* 5"):
        load_recipe("mine", tmp_path)


# -- mistakes -----------------------------------------------------------------------------


@pytest.mark.parametrize("case", RECIPE, ids=lambda case: case.what)
def test_a_wrong_value_or_an_unknown_key_names_file_and_key(tmp_path, case):
    write(tmp_path, yaml.safe_dump(with_value(case.path, case.value)))
    with pytest.raises(RecipeError, match=rf"mine\.yaml (.|\n)*  {re.escape(case.said)}"):
        load_recipe("mine", tmp_path)


def test_every_offending_key_is_named_at_once(tmp_path):
    raw = with_value("windows.top_k", 0)
    raw["sft"]["epochs"] = -1
    del raw["description"]
    write(tmp_path, yaml.safe_dump(raw))
    with pytest.raises(RecipeError) as error:
        load_recipe("mine", tmp_path)
    lines = str(error.value).splitlines()
    assert lines[0].startswith("mine.yaml")
    assert sorted(line.split(":")[0].strip() for line in lines[1:]) == [
        "description",
        "sft.epochs",
        "windows.top_k",
    ]


@pytest.mark.parametrize(
    ("path", "value", "said"),
    [
        ("splits", {"train": 0.7, "validation": 0.2, "test": 0.2}, r"  splits: .*= 1\.1.*expected"),
        ("splits", {"train": 0.5}, r"  splits: .*= 0\.8"),
        ("windows.min_ground_truth", 6, r"  windows: .*min_ground_truth 6.*top_k 5"),
        ("sft.micro_batch_size", 3, r"  sft: .*batch_size 8.*micro_batch_size 3"),
        ("generation.decodings", ["free", "ranked", "free"], r"  generation: .*name one twice"),
        ("dpo.micro_batch_size", 3, r"  dpo: .*batch_size 1.*micro_batch_size 3"),
        ("rlhf.micro_batch_size", 3, r"  rlhf: .*batch_size 16.*micro_batch_size 3"),
        ("rlhf.samples_per_prompt", 3, r"  rlhf: .*batch_size 16.*samples_per_prompt 3"),
        ("rlhf.lora", {"r": 4, "alpha": 8, "dropout": 0.1}, r"  rlhf: .*lora\.dropout must be 0"),
        ("rlhf.method", "grpo", r"  rlhf: .*grpo.*reward ndcg"),
    ],
)
def test_values_that_do_not_fit_together(tmp_path, path, value, said):
    write(tmp_path, yaml.safe_dump(with_value(path, value)))
    with pytest.raises(RecipeError, match=rf"mine\.yaml (.|\n)*{said}"):
        load_recipe("mine", tmp_path)


def test_splits_that_sum_to_one_but_for_rounding_are_fine(tmp_path):
    splits = {"train": 0.1, "validation": 0.2, "test": 0.7}
    write(tmp_path, yaml.safe_dump(with_value("splits", splits)))
    assert load_recipe("mine", tmp_path).splits.test == 0.7


@pytest.mark.parametrize("case", RECIPE_TEXT, ids=lambda case: case.what)
def test_a_file_that_is_no_recipe_names_itself(tmp_path, case):
    write(tmp_path, case.text)
    with pytest.raises(RecipeError, match=r"mine\.yaml") as error:
        load_recipe("mine", tmp_path)
    assert case.said in str(error.value)


def test_another_encoding_is_a_recipe_error(tmp_path):
    (tmp_path / "mine.yaml").write_bytes("description: Für".encode("latin-1"))
    with pytest.raises(RecipeError, match=r"mine\.yaml"):
        load_recipe("mine", tmp_path)


@pytest.mark.parametrize(
    ("text", "key", "line"),
    [
        ("sft: {epochs: 1}\nseed: 1\nsft: {epochs: 3}\n", "sft", 3),
        ("sft:\n  epochs: 1\n  epochs: 3\n", "epochs", 3),
    ],
)
def test_a_key_that_stands_twice(tmp_path, text, key, line):
    write(tmp_path, text)
    with pytest.raises(
        RecipeError, match=rf"mine\.yaml (.|\n)*{key} stands twice(.|\n)*line {line}"
    ):
        load_recipe("mine", tmp_path)


@pytest.mark.parametrize(
    "name", ["../mine", "sub/mine", "/etc/mine", "..", ".", "", "mine.yaml", "mine\n", "mïne", "no"]
)
def test_a_name_that_is_no_recipe_lists_the_known_ones(tmp_path, name):
    inside = tmp_path / "recipes"
    (inside / "sub").mkdir(parents=True)
    text = yaml.safe_dump(MINIMAL)
    for directory in (tmp_path, inside, inside / "sub"):
        write(directory, text)
    with pytest.raises(RecipeError, match=r"no recipe named .*: known recipes are mine$"):
        load_recipe(name, inside)


def test_another_name_inside_the_file(tmp_path):
    write(tmp_path, yaml.safe_dump({**MINIMAL, "name": "yours"}))
    with pytest.raises(RecipeError, match=r"mine\.yaml: name is 'yours', expected 'mine'"):
        load_recipe("mine", tmp_path)


def test_the_name_is_the_files(tmp_path):
    write(tmp_path, yaml.safe_dump(MINIMAL), "mine")
    write(tmp_path, yaml.safe_dump({**MINIMAL, "name": "my-own_2"}), "my-own_2")
    assert recipe_names(tmp_path) == ["mine", "my-own_2"]
    assert [load_recipe(name, tmp_path).name for name in recipe_names(tmp_path)] == [
        "mine",
        "my-own_2",
    ]


def test_a_mended_recipe_loads_after_an_error(tmp_path):
    write(tmp_path, "sft: nothing")
    with pytest.raises(RecipeError):
        load_recipe("mine", tmp_path)
    write(tmp_path, yaml.safe_dump(MINIMAL))
    assert load_recipe("mine", tmp_path).sft.batch_size == 8


# -- a recipe is a value ------------------------------------------------------------------


def test_a_recipe_is_frozen_all_the_way_down():
    recipe = load_recipe("tiny")
    places: list[Any] = [recipe]
    for place in places:
        for key in type(place).model_fields:
            value = getattr(place, key)
            with pytest.raises(ValidationError, match="frozen"):
                setattr(place, key, value)
            if hasattr(type(value), "model_fields"):
                places.append(value)
            else:
                assert value is None or isinstance(value, (str, int, float, tuple))
    assert len(places) == 27  # the recipe and its sections


def test_equal_recipes_are_equal_values():
    recipe = load_recipe("paper")
    again = Recipe.model_validate(recipe.model_dump())
    assert again == recipe
    assert hash(again) == hash(recipe)
    assert load_recipe("tiny") != recipe
