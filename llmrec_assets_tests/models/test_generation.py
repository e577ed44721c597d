"""Generation: batching, ends, and that the recipe's sampling is what is passed."""

import copy
from pathlib import Path

import pytest
import torch
from free_text import generate_responses

from llmrec_assets.ground.recipes import BaseModelRecipe, GenerationRecipe
from llmrec_assets.models.base import prepare_base_model
from llmrec_assets.models.chat import prompt_ids
from llmrec_assets.models.loading import load_policy

TINY = BaseModelRecipe(source="tiny", name="tiny", dtype="float32", label="tiny", seed=4)
PROMPTS = ["A.", "Recommend five films for a user who liked Heat (1995).", "Why?", "B " * 30]


@pytest.fixture(scope="module")
def policy(tmp_path_factory):
    directory, _ = prepare_base_model(TINY, tmp_path_factory.mktemp("base") / "files")
    return load_policy(directory, [], dtype=torch.float32, device=torch.device("cpu"))


def _recipe(**values) -> GenerationRecipe:
    return GenerationRecipe(max_new_tokens=12, dtype="float32", **values)


def _texts(policy, recipe, seed=0) -> list[str]:
    return [r.text for r in generate_responses(*policy, PROMPTS, recipe, seed=seed)]


def test_greedy_answers_do_not_depend_on_the_batch(policy) -> None:
    alone = _texts(policy, _recipe(batch_size=1))
    assert _texts(policy, _recipe(batch_size=4)) == alone
    assert _texts(policy, _recipe(batch_size=3)) == alone


def test_greedy_equals_the_argmax_of_the_forward_pass(policy) -> None:
    model, tokenizer = policy
    (response,) = generate_responses(model, tokenizer, PROMPTS[:1], _recipe(batch_size=1), seed=0)
    ids = prompt_ids(tokenizer, PROMPTS[0])
    assert response.n_prompt_tokens == len(ids)
    answer: list[int] = []
    for _ in range(12):
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids + answer])).logits[0, -1]
        if int(logits.argmax()) == tokenizer.eos_token_id:
            break
        answer.append(int(logits.argmax()))
    assert response.text == tokenizer.decode(answer, skip_special_tokens=True)
    assert response.n_response_tokens == len(answer)
    assert response.finished == (len(answer) < 12)


def test_sampling_is_seeded_and_ignores_the_models_own_settings(policy) -> None:
    model, _ = policy
    sampled = _recipe(batch_size=4, do_sample=True, temperature=1.0)
    expected = _texts(policy, sampled, seed=1)
    assert expected == _texts(policy, sampled, seed=1)
    assert expected != _texts(policy, sampled, seed=2)
    model.generation_config.top_k = 1
    try:
        assert _texts(policy, sampled, seed=1) == expected
    finally:
        model.generation_config.top_k = None


def test_sampled_answers_depend_on_seed_and_key_alone(policy) -> None:
    """Not on the batch, nor on which other prompts are asked, nor in which order."""
    keys = [(7, 0), (7, 1), (8, 0), (9, 0)]

    def texts(order: list[int], size: int) -> list[str]:
        recipe = _recipe(batch_size=size, do_sample=True)
        asked, named = [PROMPTS[i] for i in order], [keys[i] for i in order]
        answers = generate_responses(*policy, asked, recipe, seed=1, keys=named)
        return [answer.text for answer in answers]

    expected = texts([0, 1, 2, 3], 1)
    assert texts([0, 1, 2, 3], 3) == expected
    assert texts([3, 1], 2) == [expected[3], expected[1]]
    keys[1] = (7, 2)
    changed = texts([0, 1, 2, 3], 4)
    assert [a == b for a, b in zip(changed, expected, strict=True)] == [True, False, True, True]


def test_two_models_answer_with_common_random_numbers(policy) -> None:
    """The same noise moves both: a model that hardly differs gives mostly the same answers."""
    model, tokenizer = policy
    sampled = _recipe(batch_size=4, do_sample=True)
    expected = _texts(policy, sampled, seed=3)
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.model.norm.weight.mul_(1 + 1e-5)
    assert _texts((other, tokenizer), sampled, seed=3) == expected


def test_an_answer_ends_at_the_first_end_token(policy) -> None:
    model, tokenizer = policy
    recipe = _recipe(batch_size=1)
    (whole,) = generate_responses(model, tokenizer, PROMPTS[:1], recipe, seed=0)
    first = tokenizer(whole.text, add_special_tokens=False)["input_ids"][0]
    model.generation_config.eos_token_id = [first]
    try:
        (cut,) = generate_responses(model, tokenizer, PROMPTS[:1], recipe, seed=0)
    finally:
        model.generation_config.eos_token_id = tokenizer.eos_token_id
    assert cut.finished
    assert len(cut.text) < len(whole.text)


def test_progress_counts_prompts(policy) -> None:
    events = []
    generate_responses(*policy, PROMPTS, _recipe(batch_size=3), seed=0, progress=events.append)
    assert [(e.step, e.total) for e in events] == [(3, 4), (4, 4)]


def test_no_prompt_gives_no_response(policy) -> None:
    assert generate_responses(*policy, [], _recipe(), seed=0) == []


def test_published_base_has_no_machine_path(tmp_path: Path) -> None:
    directory, facts = prepare_base_model(TINY, tmp_path / "files")
    assert facts["label"] == "tiny"
    assert {p.suffix for p in directory.iterdir()} <= {".safetensors", ".json", ".jinja"}
    for path in directory.glob("*.json"):
        assert str(tmp_path) not in path.read_text()
