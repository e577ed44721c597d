"""Constrained lists: always k distinct open titles, whatever the loop."""

from __future__ import annotations

import json

import catalogue_cases as cases
import numpy as np
import pytest
import torch

from llmrec_assets.ground.completions import parse_response
from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models.constrained import (
    CatalogueConstraint,
    CatalogueLogitsProcessor,
    ListGrammar,
)
from llmrec_assets.models.sampling import Decoding, sample_tokens, stream
from llmrec_assets.models.trie import catalogue_tries

K = 4
TOK = cases.tokenizer()
TRIES = catalogue_tries(TOK, cases.catalogue(), K)
GRAMMAR = ListGrammar(TRIES)
END = TOK.eos_token_id
SAMPLED = Decoding(TRIES.max_tokens, temperature=1.5)
GREEDY = Decoding(TRIES.max_tokens, do_sample=False)


@pytest.fixture(scope="module")
def model():
    return cases.model(TOK)


def _seen(i: int) -> frozenset[int]:
    """Row i's seen films: up to all but k of them."""
    generator = np.random.default_rng(i)
    films = sorted(set(cases.FILMS))
    n = int(generator.integers(0, len(films) - K + 1))
    return frozenset(generator.permutation(films)[:n].tolist())


def _starts(n: int) -> list:
    return [GRAMMAR.start(f"row {i}", TRIES.open_titles(_seen(i))) for i in range(n)]


def _sample(model, asked, starts, decoding, each: int = 1) -> list[list[str]]:
    keys = [[stream(1, i, j) for j in range(each)] for i in range(len(asked))]
    constraint = CatalogueConstraint(GRAMMAR, [s for s in starts for _ in range(each)])
    samples = sample_tokens(model, asked, keys, decoding, stops=[END], pad=2, constraint=constraint)
    assert all(sample.stop == END for answers in samples for sample in answers)
    return [[TOK.decode(sample.tokens) for sample in answers] for answers in samples]


def _require_valid(text: str, seen: frozenset[int]) -> None:
    titles = json.loads(text)
    assert parse_response(text) == titles
    films = [cases.FILMS[cases.TITLES.index(title)] for title in titles]
    assert len(set(films)) == len(films) == K
    assert not seen & set(films)


@pytest.mark.parametrize("decoding", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_a_thousand_lists_are_valid(model, decoding: Decoding) -> None:
    asked = cases.prompts(1000)
    texts = [t for (t,) in _sample(model, asked, _starts(1000), decoding)]
    for i, text in enumerate(texts):
        _require_valid(text, _seen(i))
    shown = {title for text in texts for title in json.loads(text)}
    if decoding is SAMPLED:
        assert shown == set(cases.TITLES)


def test_a_prompts_samples_keep_their_lists_apart(model) -> None:
    texts = _sample(model, cases.prompts(20), _starts(20), SAMPLED, each=5)
    for i, some in enumerate(texts):
        for text in some:
            _require_valid(text, _seen(i))
    assert sum(len(set(some)) for some in texts) > 60


@pytest.mark.parametrize("decoding", [SAMPLED, GREEDY], ids=["sampled", "greedy"])
def test_batched_is_one_by_one(model, decoding: Decoding) -> None:
    asked, starts = cases.prompts(12), _starts(12)
    together = _sample(model, asked, starts, decoding, each=2)
    for i in range(12):
        keys = [[stream(1, i, j) for j in range(2)]]
        alone = sample_tokens(
            model,
            [asked[i]],
            keys,
            decoding,
            stops=[END],
            pad=2,
            constraint=CatalogueConstraint(GRAMMAR, [starts[i]] * 2),
        )
        assert [TOK.decode(s.tokens) for s in alone[0]] == together[i]


def _generate(model, asked, starts, **options) -> list[str]:
    batch = cases.padded(asked, 2)
    written = model.generate(
        **batch,
        max_new_tokens=TRIES.max_tokens,
        logits_processor=[CatalogueLogitsProcessor(GRAMMAR, starts)],
        pad_token_id=2,
        eos_token_id=END,
        **options,
    )
    return TOK.batch_decode(written[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def test_transformers_greedy_is_ours(model) -> None:
    asked, starts = cases.prompts(30), _starts(30)
    ours = [t for (t,) in _sample(model, asked, starts, GREEDY)]
    assert _generate(model, asked, starts, do_sample=False) == ours


@pytest.mark.parametrize(
    ("n", "options"),
    [
        (1000, {"do_sample": False, "num_beams": 2}),
        (40, {"do_sample": False, "num_beams": 8, "num_return_sequences": 3}),
        (40, {"do_sample": True, "num_beams": 3, "temperature": 2.0}),
        (40, {"do_sample": True, "num_return_sequences": 4, "top_k": 3}),
    ],
    ids=["beams", "wide beams", "sampled beams", "shared prompt"],
)
def test_lists_by_transformers_generate_are_valid(model, n: int, options: dict) -> None:
    torch.manual_seed(0)
    texts = _generate(model, cases.prompts(n), _starts(n), **options)
    each = options.get("num_return_sequences", 1)
    assert len(texts) == n * each
    for i, text in enumerate(texts):
        _require_valid(text, _seen(i // each))


def test_more_beams_than_titles_still_give_a_valid_list(model) -> None:
    """One set of k films is open: beams that ``generate`` has to invent stay behind."""
    films = sorted(set(cases.FILMS))
    seen = frozenset(films[K:])
    starts = [GRAMMAR.start("row", TRIES.open_titles(seen))]
    (text,) = _generate(model, cases.prompts(1), starts, do_sample=False, num_beams=30)
    _require_valid(text, seen)


def test_beams_find_no_less_probable_a_list_than_greedy(model) -> None:
    """By the model's own log-probabilities: ``generate`` scores beams before it masks."""
    asked, starts = cases.prompts(30), _starts(30)

    def log_probability(prompt: list[int], text: str) -> float:
        ids = TOK(text, add_special_tokens=False)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 :]
        return float(logits.log_softmax(-1).gather(1, torch.tensor([*ids, END])[:, None]).sum())

    greedy = _generate(model, asked, starts, do_sample=False)
    beams = _generate(model, asked, starts, do_sample=False, num_beams=6, length_penalty=0.0)
    pairs = [
        (log_probability(p, b), log_probability(p, g))
        for p, b, g in zip(asked, beams, greedy, strict=True)
    ]
    assert np.mean([b >= g - 1e-4 for b, g in pairs]) > 0.9
    assert greedy != beams


def test_the_mask_leaves_what_may_follow_as_it_was() -> None:
    start = GRAMMAR.start("row", TRIES.open_titles(frozenset()))
    logits = torch.randn(2, len(TOK))
    ended = start
    for token in TOK('["Alien", "Aliens (1986)", "Fl", "]"]<|im_end|>', add_special_tokens=False)[
        "input_ids"
    ]:
        ended = GRAMMAR.advance(ended, token)
    masked = GRAMMAR.mask(logits, [start, ended])
    allowed = GRAMMAR.allowed(start)
    assert torch.equal(masked[0, allowed], logits[0, allowed])
    assert masked[0].isfinite().sum() == len(allowed)
    assert masked[1].isfinite().nonzero().flatten().tolist() == [END]


def test_too_few_open_films_name_the_row() -> None:
    films = sorted(set(cases.FILMS))
    # k titles, but two of them are one film's
    open_titles = TRIES.open_titles(frozenset(films[: len(films) - K + 1]))
    assert open_titles.sum() == K
    with pytest.raises(ModelError, match=r"user 7, window 0: 3 films .* a list needs 4"):
        GRAMMAR.start("user 7, window 0", open_titles)


def test_a_token_that_may_not_follow_is_refused() -> None:
    with pytest.raises(ModelError, match="user 7: token 5 may not follow at rank 1"):
        GRAMMAR.advance(GRAMMAR.start("user 7", TRIES.open_titles(frozenset())), 5)


def test_a_processor_of_another_batch_is_refused() -> None:
    processor = CatalogueLogitsProcessor(GRAMMAR, _starts(2))
    with pytest.raises(ModelError, match="3 rows for 2 prompts"):
        processor(torch.zeros(3, 4, dtype=torch.long), torch.zeros(3, len(TOK)))
