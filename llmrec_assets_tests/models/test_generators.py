"""Who draws samples: our loop as ever, vLLM where it is installed, a message where it is not."""

from __future__ import annotations

import sys
from collections import Counter
from contextlib import AbstractContextManager
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.ground.recipes import BaseModelRecipe, SamplingRecipe, load_recipe
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.chat import prompt_ids, stop_ids
from llmrec_assets.models.generators import Engine, Generator, _vllm_rank, open_generator
from llmrec_assets.models.loading import load_policy, load_tokenizer
from llmrec_assets.models.memory import FittingBatches
from llmrec_assets.models.sampling import Decoding, sample_rows, stream

CPU = torch.device("cpu")
TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=4)
DECODING = Decoding(max_new_tokens=12)
GREEDY = Decoding(max_new_tokens=12, do_sample=False)


def _rows() -> FittingBatches:
    return FittingBatches(what="samples", item="sample", size=None, device=CPU, remedy="")


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny tokenizer with a Llama of heads as wide as vLLM knows them."""
    tiny = prepare_base_model(TINY, tmp_path_factory.mktemp("tiny") / "files")[0]
    tokenizer = load_tokenizer(tiny)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        initializer_range=0.15,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    directory = tmp_path_factory.mktemp("base") / "base-1"
    LlamaForCausalLM(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="module")
def adapters(base_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two that change the answers; their rank is none that vLLM can be started for."""
    made = []
    for seed, name in enumerate(("sft-1", "dpo-1")):
        torch.manual_seed(seed)
        config = LoraConfig(
            r=12, lora_alpha=24, target_modules="all-linear", init_lora_weights=False
        )
        made.append(tmp_path_factory.mktemp("adapters") / name)
        get_peft_model(AutoModelForCausalLM.from_pretrained(base_dir), config).save_pretrained(
            made[-1]
        )
    return made


def _asked(base_dir: Path) -> list[list[int]]:
    tokenizer = load_tokenizer(base_dir)
    return [prompt_ids(tokenizer, f"User {i}: " + "Heat (1995) " * i) for i in range(3)]


def _streams(samples: int = 2) -> list[list[int]]:
    return [[stream(1, "sample", i, sample) for sample in range(samples)] for i in range(3)]


def _open(
    engine: Engine, base_dir: Path, adapters: list[Path], work_dir: Path
) -> AbstractContextManager[Generator]:
    return open_generator(
        engine,
        base_dir,
        adapters,
        dtype=torch.float32,
        device=CPU,
        rows=_rows(),
        longest=200,
        work_dir=work_dir,
    )


def test_our_loop_is_the_token_loop(base_dir: Path, tmp_path: Path) -> None:
    model, tokenizer = load_policy(base_dir, [], dtype=torch.float32, device=CPU)
    expected = sample_rows(
        model,
        _asked(base_dir),
        _streams(),
        DECODING,
        stops=stop_ids(tokenizer, model),
        pad=tokenizer.pad_token_id,
        rows=_rows(),
    )
    with _open("transformers", base_dir, [], tmp_path) as generator:
        assert generator.sample(_asked(base_dir), _streams(), DECODING) == expected
    assert not list(tmp_path.iterdir())


def test_without_vllm_the_message_names_the_extra_and_the_way_without(
    base_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "vllm", None)
    with (
        pytest.raises(ModelError, match=r"pip install -e '\.\[vllm\]'.*engine: transformers"),
        _open("vllm", base_dir, [], tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_ranks_are_rounded_up_to_what_vllm_starts_for(adapters: list[Path]) -> None:
    assert _vllm_rank(adapters[0]) == 16


def test_a_recipe_without_vllm_has_the_versions_it_had() -> None:
    assert "engine" not in SamplingRecipe().model_dump()
    assert "engine" not in load_recipe("paper").model_dump()["sampling"]
    assert SamplingRecipe(engine="vllm").model_dump()["engine"] == "vllm"
    assert SamplingRecipe(**SamplingRecipe().model_dump()) == SamplingRecipe()


@pytest.mark.parametrize("n_adapters", [0, 1, 2])
def test_vllm_answers_as_our_loop_does(
    base_dir: Path, adapters: list[Path], tmp_path: Path, n_adapters: int
) -> None:
    pytest.importorskip("vllm", reason="the extra vllm is not installed")
    policy = adapters[:n_adapters]
    with _open("transformers", base_dir, policy, tmp_path) as loop:
        expected = loop.sample(_asked(base_dir), _streams(), GREEDY)
    with _open("vllm", base_dir, policy, tmp_path) as generator:
        assert generator.sample(_asked(base_dir), _streams(), GREEDY) == expected
        drawn = generator.sample(_asked(base_dir), _streams(), DECODING)
        assert [len(samples) for samples in drawn] == [2, 2, 2]
        assert generator.sample(_asked(base_dir)[1:], _streams()[1:], DECODING) == drawn[1:], (
            "a sample's noise is named by its stream, whatever else is drawn"
        )
        narrow = Decoding(max_new_tokens=1, top_k=3)
        counts = Counter(
            sample.tokens[0] if sample.tokens else sample.stop
            for sample in generator.sample(_asked(base_dir), _streams(100), narrow)[0]
        )
        assert 1 < len(counts) <= 3
    assert not list(tmp_path.iterdir()), "the weights went with the generator"
