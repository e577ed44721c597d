"""Ranked titles: the log-probabilities are those of plain forward passes."""

from __future__ import annotations

import catalogue_cases as cases
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model

from llmrec_assets.ground.errors import ModelError
from llmrec_assets.models.ranked import Ranking, rank_titles
from llmrec_assets.models.trie import Trie, catalogue_tries

K = 4
TOK = cases.tokenizer()
TRIES = catalogue_tries(TOK, cases.catalogue(), K)
ALL = len(cases.TITLES)
ASKED = cases.prompts(9)


@pytest.fixture
def model():
    return cases.model(TOK)


def _open(i: int) -> np.ndarray:
    films = np.random.default_rng(i).permutation(sorted(set(cases.FILMS)))
    return TRIES.open_titles(frozenset(films[: 2 * i].tolist()))


def _rank(model, which=range(9), beams: int = ALL, **options) -> list[Ranking]:
    return rank_titles(
        model,
        [ASKED[i] for i in which],
        [f"row {i}" for i in which],
        [_open(i) for i in which],
        TRIES,
        beams=beams,
        pad=2,
        **options,
    )


def _path(trie: Trie, title: int) -> list[tuple[int, list[int], int]]:
    """(node, edges of the node, edge taken) from the root to a title."""
    leaf = int(np.flatnonzero(trie.leaves == title)[0])
    node, path = 0, []
    while not trie.is_leaf(node):
        edges = list(range(trie.start[node], trie.start[node + 1]))
        (edge,) = [e for e in edges if trie.low[trie.child[e]] <= leaf < trie.high[trie.child[e]]]
        path.append((node, edges, edge))
        node = int(trie.child[edge])
    return path


def _brute_force(model, i: int, renormalised: bool = False) -> list[tuple[float, int]]:
    """(log-probability, title) of every open film by forward passes, best first."""
    best_of: dict[int, tuple[float, int]] = {}
    for score, title in sorted(_all_scores(model, i, renormalised), reverse=True):
        best_of.setdefault(int(TRIES.films[title]), (score, title))
    return sorted(best_of.values(), reverse=True)


def _all_scores(model, i: int, renormalised: bool = False) -> list[tuple[float, int]]:
    """The same of every open title."""
    trie, room = TRIES.first, TRIES.first.room(_open(i))
    scores = []
    for title in np.flatnonzero(_open(i)).tolist():
        path = _path(trie, title)
        tokens = [int(trie.token[edge]) for _, _, edge in path]
        with torch.no_grad():
            ids = torch.tensor([ASKED[i] + tokens])
            rows = model(input_ids=ids).logits[0, len(ASKED[i]) - 1 : -1].double()
        total = 0.0
        for row, token, (_, edges, _) in zip(rows, tokens, path, strict=True):
            among = row
            if renormalised:
                children = [(int(trie.child[e]), int(trie.token[e])) for e in edges]
                among = row[[t for c, t in children if room[trie.high[c]] > room[trie.low[c]]]]
            total += float(row[token] - among.logsumexp(-1))
        scores.append((total, title))
    return scores


@pytest.mark.parametrize("renormalised", [False, True])
def test_with_a_beam_for_every_title_the_ranking_is_exact(model, renormalised: bool) -> None:
    rankings = _rank(model, renormalised=renormalised)
    for i, ranking in enumerate(rankings):
        expected = _brute_force(model, i, renormalised)[:K]
        assert list(ranking.titles) == [title for _, title in expected]
        assert np.allclose(ranking.log_probabilities, [score for score, _ in expected], atol=1e-4)


def test_every_title_is_scored_as_a_forward_pass_would(model) -> None:
    """The list as long as the catalogue: nothing is pruned, all log-probabilities are compared."""
    movies = cases.movies(cases.TITLES[:12])
    tries = catalogue_tries(TOK, movies, 12)
    (ranking,) = rank_titles(
        model, ASKED[:1], ["row"], [tries.open_titles(frozenset())], tries, beams=12, pad=2
    )
    assert sorted(ranking.titles) == list(range(12))
    paths = {t: [int(tries.first.token[e]) for _, _, e in _path(tries.first, t)] for t in range(12)}
    for title, found in zip(ranking.titles, ranking.log_probabilities, strict=True):
        with torch.no_grad():
            ids = torch.tensor([ASKED[0] + paths[title]])
            rows = model(input_ids=ids).logits[0, len(ASKED[0]) - 1 : -1].double().log_softmax(-1)
        expected = rows.gather(1, torch.tensor(paths[title])[:, None]).sum()
        assert abs(found - float(expected)) < 1e-4
    assert ranking.n_tokens == len(
        {
            tuple(p[:n]) for p in paths.values() for n in range(1, len(p))
        }  # inner nodes, the root not
    )


def test_titles_are_open_distinct_films_also_with_few_beams(model) -> None:
    for i, ranking in enumerate(_rank(model, beams=6)):
        assert _open(i)[list(ranking.titles)].all()
        assert len(set(TRIES.films[list(ranking.titles)])) == K
        exact = {title: score for score, title in _all_scores(model, i)}
        for title, score in zip(ranking.titles, ranking.log_probabilities, strict=True):
            assert abs(exact[title] - score) < 1e-4
        assert list(ranking.log_probabilities) == sorted(ranking.log_probabilities, reverse=True)


def test_batched_is_one_by_one(model) -> None:
    together = _rank(model, beams=8)
    for i in range(len(ASKED)):
        (alone,) = _rank(model, [i], beams=8)
        assert alone.titles == together[i].titles
        assert alone.n_tokens == together[i].n_tokens
        assert np.allclose(alone.log_probabilities, together[i].log_probabilities, atol=1e-4)


def test_eager_attention_gives_the_same(model) -> None:
    expected = _rank(model)
    model.set_attn_implementation("eager")
    for one, other in zip(_rank(model), expected, strict=True):
        assert one.titles == other.titles
        assert np.allclose(one.log_probabilities, other.log_probabilities, atol=1e-4)


def test_a_live_adapter_counts(model) -> None:
    wrapped = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear")).eval()
    torch.manual_seed(0)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.1)
    expected = [_brute_force(wrapped, i)[:K] for i in range(len(ASKED))]
    assert [list(r.titles) for r in _rank(wrapped)] == [[t for _, t in e] for e in expected]
    with wrapped.disable_adapter():
        assert [r.titles for r in _rank(wrapped)] != [tuple(t for _, t in e) for e in expected]


def test_candidates_restrict_the_ranking(model) -> None:
    candidates = frozenset({2, 5, 7, 24})
    (ranking,) = rank_titles(
        model,
        ASKED[:1],
        ["row"],
        [TRIES.open_titles(frozenset(), candidates)],
        TRIES,
        beams=K,
        pad=2,
    )
    assert {int(TRIES.films[title]) for title in ranking.titles} == candidates


def test_what_cannot_be_ranked_says_so(model) -> None:
    with pytest.raises(ValueError, match="3 beams cannot give lists of 4"):
        _rank(model, beams=3)
    open_titles = TRIES.open_titles(frozenset(), frozenset({1}))
    with pytest.raises(ModelError, match=r"user 7: 1 films .* a list needs 4"):
        rank_titles(model, ASKED[:1], ["user 7"], [open_titles], TRIES, beams=9, pad=2)
    with pytest.raises(ValueError, match=r"model\.eval\(\)"):
        _rank(model.train())
    torch.nn.init.constant_(model.eval().model.norm.weight, float("nan"))
    with pytest.raises(ModelError, match="not numbers"):
        _rank(model)


def test_no_prompt_gives_no_ranking(model) -> None:
    assert _rank(model, []) == []
