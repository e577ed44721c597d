"""The contract that every classical recommender inherits; ItemKNN and EASE by hand."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd
import pytest
import torch
from lenskit.data import ItemList, RecQuery

from llmrec_assets.ground.baselines import Popularity, popularity_ranking
from llmrec_assets.ground.recipes import SasrecRecipe
from llmrec_assets.ground.recommender import (
    Recommender,
    Window,
    contract_problems,
    recommended_frame,
)
from llmrec_assets.models.classical import LensKitScorer, ScoredRecommender, component
from llmrec_assets.models.sasrec import SasRecScorer

N_FILMS, UNKNOWN = 30, 31
MOVIES = pd.DataFrame({"movie_id": range(1, 32), "canonical_movie_id": [1, 1, *range(3, 32)]})
CATALOGUE = set(MOVIES["canonical_movie_id"])


def invented_events(seed: int = 0) -> pd.DataFrame:
    """40 users of two tastes, odd films and even films; nobody has rated film 31 or, as itself,
    film 2, which is film 1."""
    random = np.random.default_rng(seed)
    rows = []
    for user in range(40):
        taste = [film for film in range(3, N_FILMS + 1) if film % 2 == user % 2]
        for time, film in enumerate(random.permutation(taste)[:8]):
            rows.append((user, int(film), int(random.integers(2, 6)), time))
    return pd.DataFrame(rows, columns=["user_id", "film", "rating", "timestamp"])


EVENTS = invented_events()
RANKING = popularity_ranking(EVENTS, MOVIES, 3)
WINDOWS = [
    Window(101, 0, 9, (3, 5, 7), (True, True, False), frozenset({3, 5, 7, 9})),
    Window(102, 0, 9, (4, 6, 6), (True, True, True), frozenset({4, 6})),
    Window(103, 0, 9, (UNKNOWN,), (True,), frozenset({UNKNOWN})),
    Window(104, 0, 9, (8,), (False,), frozenset({8})),
    Window(105, 0, 9, (), (), frozenset()),
    Window(106, 0, 9, (3, UNKNOWN), (True, True), frozenset(CATALOGUE - {10, 11})),
]
SEEN = {window.key: window.hidden for window in WINDOWS}


def lenskit(stage: str, feedback: str, **values: float) -> Recommender:
    scorer = LensKitScorer(
        component(stage, values),
        EVENTS,
        RANKING,
        only_liked=feedback == "liked",
        liked_min=3,
        seed=1,
    )
    return ScoredRecommender(scorer.using(5), RANKING)


def sasrec(seed: int = 1) -> Recommender:
    recipe = SasrecRecipe(embedding_size=8, blocks=1, max_length=5, batch_size=8, dropout=0.1)
    scorer = SasRecScorer(EVENTS, RANKING, recipe, liked_min=3, seed=seed)
    scorer.train(15)
    return ScoredRecommender(scorer, RANKING)


RECOMMENDERS = {
    "popularity": lambda: Popularity(RANKING),
    "itemknn-liked": lambda: lenskit("itemknn", "liked", max_nbrs=20, save_nbrs=10),
    "itemknn-rated": lambda: lenskit("itemknn", "rated", max_nbrs=20, save_nbrs=10),
    "ease-liked": lambda: lenskit("ease", "liked", regularization=5),
    "ease-rated": lambda: lenskit("ease", "rated", regularization=5),
    "als-liked": lambda: lenskit("als", "liked", embedding_size=4, epochs=3),
    "als-rated": lambda: lenskit("als", "rated", embedding_size=4, epochs=3),
    "sasrec": sasrec,
}


@pytest.fixture(scope="module", params=RECOMMENDERS)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


@pytest.fixture(scope="module")
def recommender(name: str) -> Recommender:
    return RECOMMENDERS[name]()


def frame(windows: Sequence[Window], lists: Sequence[Sequence[int]], top_k: int) -> pd.DataFrame:
    return recommended_frame(
        windows,
        lists,
        SEEN,
        {},
        stage="any",
        decoding="ranking",
        information_set="prompt",
        top_k=top_k,
        prompts_version="p",
    )


@pytest.mark.parametrize("top_k", [1, 5, 40])
def test_every_recommender_keeps_the_contract(recommender: Recommender, top_k: int) -> None:
    lists = recommender.recommend(WINDOWS, top_k)
    assert contract_problems(frame(WINDOWS, lists, top_k), SEEN, CATALOGUE, top_k) == []
    assert set(lists[-1]) <= {10, 11} and len(lists[-1]) == min(top_k, 2)


def test_every_recommender_is_deterministic(name: str, recommender: Recommender) -> None:
    lists = recommender.recommend(WINDOWS, 10)
    assert RECOMMENDERS[name]().recommend(WINDOWS, 10) == lists
    # neither the order of the windows nor their company changes a list
    assert recommender.recommend(WINDOWS[::-1], 10) == lists[::-1]
    assert [recommender.recommend([window], 10)[0] for window in WINDOWS] == lists
    # a shorter list is the beginning of a longer one
    assert recommender.recommend(WINDOWS, 3) == [films[:3] for films in lists]


def test_every_recommender_that_asks_for_taste_finds_it(
    name: str, recommender: Recommender
) -> None:
    odd, even = recommender.recommend(WINDOWS[:2], 5)
    if name == "popularity":
        assert set(odd) & set(even)
    elif name != "sasrec":  # 15 steps teach it nothing
        assert {film % 2 for film in odd} == {1}
        assert {film % 2 for film in even} == {0}


def test_without_a_known_film_popularity_decides(name: str, recommender: Recommender) -> None:
    """The window of film 31, which nobody rated, and the one without films."""
    unknown, nothing = recommender.recommend([WINDOWS[2], WINDOWS[4]], 5)
    assert nothing == RANKING[:5]
    if name != "sasrec":  # it has an untrained vector for film 31
        assert unknown == [film for film in RANKING if film != UNKNOWN][:5]


def scores(stage: str, events: list[tuple[int, int]], query: list[int], **values: float) -> list:
    rows = pd.DataFrame(events, columns=["user_id", "film"]).assign(rating=5, timestamp=0)
    catalogue = sorted(set(rows["film"]))
    scorer = LensKitScorer(
        component(stage, values), rows, catalogue, only_liked=True, liked_min=3, seed=1
    )
    window = Window(9, 0, 0, tuple(query), (True,) * len(query), frozenset(query))
    return scorer.scores([window])[0].tolist()


#: users 1 … 3 like films (1, 2), (1, 3), (2, 3): every film by two users, every pair by one
TRIANGLE = [(1, 1), (1, 2), (2, 1), (2, 3), (3, 2), (3, 3)]


def test_itemknn_by_hand() -> None:
    """Cosine of two films is 1 / (√2 √2) = 0.5; film 3 has it from both films of the query."""
    assert scores("itemknn", TRIANGLE, [1, 2], max_nbrs=20)[2] == pytest.approx(1.0, abs=1e-6)
    assert scores("itemknn", TRIANGLE, [1, 2], max_nbrs=1)[2] == pytest.approx(0.5, abs=1e-6)
    assert scores("itemknn", TRIANGLE, [1], max_nbrs=20)[1:] == pytest.approx([0.5, 0.5], abs=1e-6)


def test_itemknn_weighs_a_rare_film_by_its_own_norm() -> None:
    """Film 1 by users 1 and 2, film 2 by user 1 alone: 1 / (√2 √1)."""
    found = scores("itemknn", [(1, 1), (1, 2), (2, 1), (2, 3)], [2], max_nbrs=20)
    assert found[0] == pytest.approx(1 / np.sqrt(2), abs=1e-6)
    assert np.isnan(found[2])  # never together: no opinion


def test_ease_by_hand() -> None:
    """Steck (2019), eq. 8: B = P / (-diag P), P = (XᵀX + λI)⁻¹.

    XᵀX + I has 3 on the diagonal and 1 elsewhere; P has (3 + 1) / 10 = 0.4 and -0.1: B = 1/4.
    """
    assert scores("ease", TRIANGLE, [1], regularization=1) == pytest.approx(
        [0, 0.25, 0.25], abs=1e-6
    )
    assert scores("ease", TRIANGLE, [1, 2], regularization=1)[2] == pytest.approx(0.5, abs=1e-6)


def test_ease_is_the_formula_on_random_data() -> None:
    liked = EVENTS[EVENTS["rating"] >= 3]
    matrix = pd.crosstab(liked["user_id"], liked["film"]).clip(upper=1)
    inverse = np.linalg.inv(matrix.T.to_numpy() @ matrix.to_numpy() + 5.0 * np.eye(matrix.shape[1]))
    weights = inverse / -np.diag(inverse)
    np.fill_diagonal(weights, 0)
    expected = weights[[list(matrix.columns).index(film) for film in (3, 5)]].sum(axis=0)
    scorer = LensKitScorer(
        component("ease", {"regularization": 5}),
        EVENTS,
        list(matrix.columns),
        only_liked=True,
        liked_min=3,
        seed=1,
    )
    found = scorer.scores(WINDOWS[:1])[0]
    assert found == pytest.approx(expected, abs=1e-5)
    query = RecQuery(history_items=ItemList(item_ids=[3, 5]))
    by_lenskit = scorer._component(query, ItemList(item_ids=list(matrix.columns))).scores()
    assert found == pytest.approx(by_lenskit, abs=1e-6)


def test_a_fit_leaves_the_threads_and_the_random_state_of_the_process_alone() -> None:
    before = torch.get_num_threads(), torch.get_rng_state()
    sasrec()
    lenskit("als", "liked", embedding_size=4, epochs=1)
    assert torch.get_num_threads() == before[0]
    assert torch.equal(torch.get_rng_state(), before[1])
