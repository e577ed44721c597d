"""Asking for the rest of a row: greedy, in any batch, long enough for the answer."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from llmrec_assets.ground.memorisation import Question
from llmrec_assets.ground.recipes import BaseModelRecipe, GenerationRecipe
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.device import Device
from llmrec_assets.models.loading import load_policy
from llmrec_assets.models.memorisation import continue_rows

TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=4)
CPU = Device("cpu", "CPU", "cpu")
ANSWERS = ["Heat (1995)", "A Film of a Considerably Longer Name Than the Others (1950)", "Emma"]
QUESTIONS = [
    Question("title of id", "source", f"7|Net, The (1995)\n{i}|", answer, "", "|")
    for i, answer in enumerate(ANSWERS)
]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    directory, _ = prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")
    return directory


def _recipe(batch_size: int) -> GenerationRecipe:
    # temperature and sampling of the recipe must not reach the probe
    return GenerationRecipe(dtype="float32", batch_size=batch_size, do_sample=True, temperature=9.0)


def test_the_continuation_is_the_models_own_argmax_after_the_raw_prompt(base: Path) -> None:
    texts, facts = continue_rows(base, QUESTIONS, _recipe(1), device=CPU)
    assert facts["device"] == "CPU" and facts["seconds"] > 0
    model, tokenizer = load_policy(base, [], dtype=torch.float32, device=torch.device("cpu"))
    ends = {tokenizer.eos_token_id, *tokenizer("\n")["input_ids"]}
    for question, text in zip(QUESTIONS, texts, strict=True):
        ids = tokenizer(question.prompt)["input_ids"]
        room = len(tokenizer(question.answer)["input_ids"]) + 8
        answer: list[int] = []
        for _ in range(room):
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([ids + answer])).logits[0, -1]
            if int(logits.argmax()) in ends:
                break
            answer.append(int(logits.argmax()))
        assert text == tokenizer.decode(answer, skip_special_tokens=True)


def test_batches_change_no_hit_and_keep_the_questions_order(base: Path) -> None:
    alone, _ = continue_rows(base, QUESTIONS, _recipe(1), device=CPU)
    together, _ = continue_rows(base, QUESTIONS, _recipe(3), device=CPU)
    # a batch takes the room of its longest answer: what is read of a shorter one is the same
    for one, other in zip(alone, together, strict=True):
        assert other.startswith(one)


def test_a_model_that_knows_the_row_is_heard_out(base: Path, tmp_path: Path) -> None:
    """Planted memory: trained on one row until it has it by heart, it completes it in full."""
    model, tokenizer = load_policy(base, [], dtype=torch.float32, device=torch.device("cpu"))
    question = QUESTIONS[1]
    whole = tokenizer(f"{question.prompt}{question.answer}\n", return_tensors="pt")["input_ids"]
    model.train()
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(60):
        loss = model(input_ids=whole, labels=whole).loss
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    (text,), _ = continue_rows(tmp_path, [question], _recipe(1), device=CPU)
    assert text == question.answer
