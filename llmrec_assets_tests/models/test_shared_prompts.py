"""A pair in one row says what its two rows say: log-probabilities, scores and gradients."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, MistralConfig, MistralForCausalLM

from llmrec_assets.ground.recipes import BaseModelRecipe
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.dpo import answer_log_probs
from llmrec_assets.models.fast_layers import speed_up
from llmrec_assets.models.loading import load_tokenizer
from llmrec_assets.models.reward import pair_scores, sequence_classifier
from llmrec_assets.models.shared_prompts import (
    CHOSEN,
    PADDING,
    PROMPT,
    REJECTED,
    PairCollator,
    ends,
    is_fit,
    predicted_from,
    visible,
)

TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=3)
EXAMPLES = [
    {"prompt_ids": [5, 6, 7, 8], "chosen_ids": [9, 10, 1], "rejected_ids": [11, 1]},
    {"prompt_ids": [4], "chosen_ids": [1], "rejected_ids": [12, 9, 13, 14, 1]},
    {"prompt_ids": [3, 20, 21, 22, 23, 24, 25], "chosen_ids": [1], "rejected_ids": [9]},
]


@pytest.fixture(scope="module")
def base_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")[0]


@pytest.fixture(params=["transformers", "fast"])
def model(base_dir: Path, request: pytest.FixtureRequest) -> torch.nn.Module:
    made = AutoModelForCausalLM.from_pretrained(base_dir, dtype=torch.float32)
    if request.param == "fast":
        speed_up(made)
    return made


def test_a_row_is_the_prompt_and_both_answers() -> None:
    batch = PairCollator(pad=0, floats=("weight",))(
        [{**EXAMPLES[0], "weight": 0.5}, {**EXAMPLES[1], "weight": 2.0}]
    )
    assert batch["input_ids"].tolist() == [
        [5, 6, 7, 8, 9, 10, 1, 11, 1],
        [4, 1, 12, 9, 13, 14, 1, 0, 0],
    ]
    assert batch["position_ids"].tolist()[0] == [0, 1, 2, 3, 4, 5, 6, 4, 5]
    assert batch["position_ids"].tolist()[1][:7] == [0, 1, 1, 2, 3, 4, 5]
    parts = batch["parts"]
    assert parts.tolist() == [
        [PROMPT] * 4 + [CHOSEN] * 3 + [REJECTED] * 2,
        [PROMPT] + [CHOSEN] + [REJECTED] * 5 + [PADDING] * 2,
    ]
    assert batch["weight"].tolist() == [0.5, 2.0]
    assert ends(parts).tolist() == [[6, 8], [1, 6]]
    assert predicted_from(parts)[0, 4:].tolist() == [3, 4, 5, 3, 7]
    assert predicted_from(parts)[1, 1:7].tolist() == [0, 0, 2, 3, 4, 5]
    # the first rejected token sees the prompt and itself
    assert visible(parts)[0, 0, 7].tolist() == [True] * 4 + [False] * 3 + [True, False]
    assert visible(parts)[0, 0, 6].tolist() == [True] * 7 + [False] * 2


def _apart(model: torch.nn.Module) -> torch.Tensor:
    """Every answer in a row of its own, [pairs, 2]."""
    found = []
    for example in EXAMPLES:
        for answer in (example["chosen_ids"], example["rejected_ids"]):
            prompt = example["prompt_ids"]
            logits = model(input_ids=torch.tensor([prompt + answer]), use_cache=False).logits[0]
            log_probs = logits.log_softmax(dim=-1)[len(prompt) - 1 : -1]
            found.append(log_probs.gather(1, torch.tensor(answer)[:, None]).sum())
    return torch.stack(found).view(-1, 2)


@pytest.mark.parametrize("shared", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_log_probabilities_and_gradients_are_those_of_rows_apart(
    model: torch.nn.Module, dtype: torch.dtype, shared: bool
) -> None:
    model.to(dtype)
    close = {"atol": 2e-5, "rtol": 1e-4} if dtype == torch.float32 else {"atol": 0.3, "rtol": 0.1}
    weights = torch.tensor([[1.0, -2.0], [0.5, 1.5], [-1.0, 1.0]])  # every answer has a say

    def both(run) -> tuple[torch.Tensor, list[torch.Tensor]]:
        model.zero_grad()
        found = run()
        (found.float() * weights).sum().backward()
        return found.detach().float(), [p.grad.clone() for p in model.parameters()]

    expected, expected_gradients = both(lambda: _apart(model))
    found, gradients = both(lambda: answer_log_probs(model, PairCollator(2, shared)(EXAMPLES)))
    assert torch.allclose(found, expected, **close)
    assert found.abs().min() > 1
    for mine, other in zip(gradients, expected_gradients, strict=True):
        scale = other.abs().max().item()
        assert (mine - other).abs().max() <= (1e-4 if dtype == torch.float32 else 0.1) * scale


def test_padding_and_the_other_pairs_change_nothing(model: torch.nn.Module) -> None:
    collator = PairCollator(pad=0)
    together = answer_log_probs(model, collator(EXAMPLES))
    alone = torch.cat([answer_log_probs(model, collator([example])) for example in EXAMPLES])
    assert torch.allclose(together, alone, atol=1e-5)
    assert torch.equal(together, answer_log_probs(model, PairCollator(pad=9)(EXAMPLES)))


def test_scores_are_those_of_rows_apart(base_dir: Path, model: torch.nn.Module) -> None:
    classifier = sequence_classifier(model, load_tokenizer(base_dir), seed=1)
    expected = [
        classifier(
            input_ids=torch.tensor([example["prompt_ids"] + example[answer]]), use_cache=False
        ).logits.item()
        for example in EXAMPLES
        for answer in ("chosen_ids", "rejected_ids")
    ]
    found = pair_scores(classifier, PairCollator(pad=0)(EXAMPLES), bf16=False)
    assert found.dtype == torch.float32
    assert found.flatten().tolist() == pytest.approx(expected, abs=1e-5)
    classifier.model.to(torch.bfloat16)
    low = pair_scores(classifier, PairCollator(pad=0)(EXAMPLES), bf16=True)
    assert low.dtype == torch.float32
    apart = pair_scores(classifier.float(), PairCollator(0, shared=False)(EXAMPLES), bf16=False)
    assert apart.flatten().tolist() == pytest.approx(expected, abs=0.01)  # once in bfloat16
    assert torch.allclose(low, found, atol=0.05)


def test_a_model_that_may_not_obey_the_mask_gets_a_row_an_answer(base_dir: Path) -> None:
    """Eager attention adds a mask of truth values to the scores: nothing would be hidden."""
    eager = AutoModelForCausalLM.from_pretrained(base_dir, attn_implementation="eager")
    plain = AutoModelForCausalLM.from_pretrained(base_dir)
    assert is_fit(plain)
    assert not is_fit(eager)
    collator = PairCollator(0, shared=is_fit(eager))
    assert torch.allclose(answer_log_probs(eager, collator(EXAMPLES)), _apart(plain), atol=1e-4)
    windowed = MistralForCausalLM(
        MistralConfig(
            vocab_size=32,
            hidden_size=16,
            intermediate_size=16,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=1,
            sliding_window=4,
        )
    )
    assert not is_fit(windowed)
    collator = PairCollator(0, shared=is_fit(windowed))
    assert torch.allclose(
        answer_log_probs(windowed, collator(EXAMPLES)), _apart(windowed), atol=1e-4
    )
