import hashlib
import math
import os
from itertools import groupby
from pathlib import Path

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llmrec_assets.ground.leaks import window_problems
from llmrec_assets.ground.movielens import read_movies
from llmrec_assets.ground.recipes import SplitRecipe, WindowRecipe, WindowsPerUser
from llmrec_assets.ground.schemas import INTERACTION_WINDOWS
from llmrec_assets.ground.splits import split_users
from llmrec_assets.ground.windows import interaction_windows, valid_cutoffs

RATINGS = ["user_id", "movie_id", "rating", "timestamp"]
DATA = Path(os.environ.get("LLMREC_DATA_DIR") or Path(__file__).parents[3] / "shared" / "data")

#: films 5 and 6 are listed a second time as 15 and 16
CANONICAL = pd.DataFrame({"movie_id": range(1, 17), "canonical_movie_id": range(1, 17)})
CANONICAL.loc[CANONICAL["movie_id"] > 14, "canonical_movie_id"] -= 10

SMALL = WindowRecipe(window_size=3, min_per_class=1, top_k=2)


def _ratings(rows: list[tuple[int, int, int, int]]) -> pd.DataFrame:
    types = {"user_id": "int32", "movie_id": "int32", "rating": "int8", "timestamp": "int64"}
    return pd.DataFrame(rows, columns=RATINGS).astype(types)


def _all(split: str, *users: int) -> pd.DataFrame:
    return pd.DataFrame({"user_id": users, "split": [split] * len(users)}).astype(
        {"user_id": "int32"}
    )


def _listed(windows: pd.DataFrame) -> list[tuple]:
    return [
        tuple(
            list(cell) if hasattr(cell, "__len__") and not isinstance(cell, str) else cell
            for cell in row
        )
        for row in windows.itertuples(index=False)
    ]


def _brute_split_time(ratings: pd.DataFrame, recipe: WindowRecipe) -> float:
    if recipe.protocol == "user-split":
        return math.inf
    if recipe.temporal_time is not None:
        return recipe.temporal_time
    times = ratings["timestamp"].tolist()
    return min(
        (t for t in times if sum(u <= t for u in times) >= recipe.temporal_quantile * len(times)),
        default=0,
    )


def _brute_windows(
    ratings: pd.DataFrame, splits: pd.DataFrame, recipe: WindowRecipe, seed: int, film_of: dict
) -> list[tuple]:
    """The same rules, user by user, in plain Python."""
    found = []
    split_time = _brute_split_time(ratings, recipe)
    for user, split in sorted(zip(splits["user_id"], splits["split"], strict=True)):
        rows = ratings[ratings["user_id"] == user]
        history = sorted(zip(rows["timestamp"], rows["movie_id"], rows["rating"], strict=True))
        if split == "train":
            history = [row for row in history if row[0] <= split_time]
        valid = []
        for cutoff in sorted({time for time, _, _ in history}):
            upto = [row for row in history if row[0] <= cutoff]
            films = {film_of.get(movie, movie) for _, movie, _ in upto}
            truth = []
            for time, movie, rating in history:
                film = film_of.get(movie, movie)
                if time > cutoff and film not in films:
                    films.add(film)
                    if rating >= recipe.liked_min:
                        truth.append(movie)
            liked = sum(rating >= recipe.liked_min for _, _, rating in upto)
            enough = [n >= recipe.min_per_class for n in (liked, len(upto) - liked)]
            ok = all(enough) if recipe.balance == "both" else any(enough)
            if recipe.protocol == "temporal" and split != "train" and cutoff < split_time:
                continue
            if ok and len(truth) >= recipe.min_ground_truth:
                valid.append((cutoff, upto, truth[: recipe.top_k]))
        drawn = sorted(
            valid, key=lambda v: hashlib.md5(f"{seed}:{user}:{v[0]}".encode()).hexdigest()
        )[: getattr(recipe.windows_per_user, split)]
        for index, (cutoff, upto, truth) in enumerate(sorted(drawn, key=lambda v: v[0])):
            context = upto[-recipe.window_size :]
            found.append(
                (
                    user,
                    index,
                    split,
                    cutoff,
                    len(upto),
                    len(valid),
                    [row[1] for row in context],
                    [row[2] for row in context],
                    truth,
                )
            )
    return found


ROWS = st.lists(
    st.tuples(st.integers(1, 3), st.integers(1, 16), st.integers(1, 5), st.integers(0, 8)),
    max_size=45,
    unique_by=lambda row: row[:2],
)
RECIPES = st.builds(
    WindowRecipe,
    window_size=st.integers(1, 5),
    balance=st.sampled_from(["either", "both"]),
    min_per_class=st.integers(0, 3),
    min_ground_truth=st.integers(1, 2),
    top_k=st.integers(2, 4),
    liked_min=st.integers(2, 5),
    protocol=st.sampled_from(["user-split", "temporal"]),
    temporal_quantile=st.sampled_from([0.3, 0.5, 0.9]),
    temporal_time=st.sampled_from([None, None, 4]),
    windows_per_user=st.builds(
        WindowsPerUser, train=st.integers(1, 3), validation=st.just(1), test=st.integers(1, 9)
    ),
)


@given(ROWS, RECIPES, st.integers(0, 3), st.randoms())
@settings(max_examples=60, deadline=None)
def test_windows_equal_brute_force_and_pass_the_leak_checks(rows, recipe, seed, random) -> None:
    ratings = _ratings(rows)
    splits = pd.DataFrame({"user_id": [1, 2, 3], "split": ["train", "validation", "test"]})
    film_of = dict(zip(CANONICAL["movie_id"], CANONICAL["canonical_movie_id"], strict=True))
    windows = interaction_windows(ratings, splits, recipe, seed, CANONICAL)
    assert _listed(windows) == _brute_windows(ratings, splits, recipe, seed, film_of)
    assert window_problems(windows, ratings, splits, CANONICAL, recipe) == []
    shuffled = list(rows)
    random.shuffle(shuffled)
    again = interaction_windows(_ratings(shuffled), splits, recipe, seed, CANONICAL, threads=1)
    assert _listed(again) == _listed(windows)


def test_one_user_by_hand() -> None:
    ratings = _ratings(
        [(1, 9, 5, 10), (1, 4, 1, 20), (1, 3, 4, 20), (1, 8, 2, 30), (1, 7, 3, 40), (1, 2, 5, 40),
         (1, 1, 5, 50)]
    )  # fmt: skip
    # at 10, 20, 30 and 40 a liked film stands before and after; at 50 nothing follows
    assert valid_cutoffs(ratings, SMALL)["cutoff_timestamp"].tolist() == [10, 20, 30, 40]
    every = SMALL.model_copy(update={"windows_per_user": WindowsPerUser(test=9)})
    windows = interaction_windows(ratings, _all("test", 1), every, 0)
    assert _listed(windows) == [
        (1, 0, "test", 10, 1, 4, [9], [5], [3, 2]),
        (1, 1, "test", 20, 3, 4, [9, 3, 4], [5, 4, 1], [2, 7]),
        (1, 2, "test", 30, 4, 4, [3, 4, 8], [4, 1, 2], [2, 7]),
        (1, 3, "test", 40, 6, 4, [8, 2, 7], [2, 5, 3], [1]),
    ]
    assert windows.columns.tolist() == INTERACTION_WINDOWS.names


def test_balance_both_wants_both_classes() -> None:
    ratings = _ratings([(1, 1, 5, 1), (1, 2, 5, 2), (1, 3, 1, 3), (1, 4, 5, 4)])
    either, both = SMALL, SMALL.model_copy(update={"balance": "both"})
    assert valid_cutoffs(ratings, either)["cutoff_timestamp"].tolist() == [1, 2, 3]
    assert valid_cutoffs(ratings, both)["cutoff_timestamp"].tolist() == [3]


def test_a_film_under_two_ids_is_no_ground_truth_once_seen_and_only_once() -> None:
    ratings = _ratings([(1, 5, 5, 1), (1, 15, 5, 2), (1, 16, 5, 3), (1, 6, 5, 4), (1, 7, 5, 5)])
    cutoffs = valid_cutoffs(ratings, SMALL, CANONICAL)["cutoff_timestamp"].tolist()
    assert cutoffs == [1, 2, 3, 4]
    every = SMALL.model_copy(update={"windows_per_user": WindowsPerUser(test=9)})
    windows = interaction_windows(ratings, _all("test", 1), every, 0, CANONICAL)
    truths = [list(ids) for ids in windows["ground_truth_movie_ids"]]
    assert truths == [[16, 7], [16, 7], [7], [7]]
    ignored = interaction_windows(ratings, _all("test", 1), every, 0)
    assert list(ignored["ground_truth_movie_ids"][0]) == [15, 16]


def test_a_lone_second_id_does_not_make_a_cutoff_valid() -> None:
    ratings = _ratings([(1, 5, 5, 1), (1, 15, 5, 2)])
    assert len(valid_cutoffs(ratings, SMALL, CANONICAL)) == 0
    assert len(valid_cutoffs(ratings, SMALL)) == 1


@given(ROWS, ROWS)
@settings(max_examples=20, deadline=None)
def test_another_user_moves_no_window(mine, others) -> None:
    alone = [row for row in mine if row[0] == 1]
    crowd = alone + [row for row in others if row[0] != 1]
    splits = _all("train", 1, 2, 3)
    before = interaction_windows(_ratings(alone), splits, SMALL, 5, CANONICAL)
    after = interaction_windows(_ratings(crowd), splits, SMALL, 5, CANONICAL)
    assert _listed(after[after["user_id"] == 1]) == _listed(before)


def test_temporal_by_hand() -> None:
    """T = 50: the training user's films end there, the test user's cut-offs start there."""
    ratings = _ratings([(u, m, 5, 10 * m) for u in (1, 2) for m in range(1, 9)])
    splits = pd.DataFrame({"user_id": [1, 2], "split": ["train", "test"]})
    recipe = SMALL.model_copy(
        update={
            "protocol": "temporal",
            "temporal_quantile": 0.6,
            "windows_per_user": WindowsPerUser(train=9, test=9),
        }
    )
    windows = interaction_windows(ratings, splits, recipe, 0)
    assert [(row[0], row[3], row[5], row[8]) for row in _listed(windows)] == [
        (1, 10, 4, [2, 3]),
        (1, 20, 4, [3, 4]),
        (1, 30, 4, [4, 5]),
        (1, 40, 4, [5]),
        (2, 50, 3, [6, 7]),
        (2, 60, 3, [7, 8]),
        (2, 70, 3, [8]),
    ]
    assert len(valid_cutoffs(ratings, recipe, user_splits=splits)) == 7
    with pytest.raises(ValueError, match="need user_splits"):
        valid_cutoffs(ratings, recipe)
    explicit = recipe.model_copy(update={"temporal_time": 71})
    later = interaction_windows(ratings, splits, explicit, 0)
    assert set(later["user_id"]) == {1} and later["cutoff_timestamp"].max() == 60


def test_temporal_keeps_every_training_event_before_every_test_event_of_ml_100k() -> None:
    if not (DATA / "ml-100k" / "u.data").is_file():
        pytest.skip(f"no MovieLens 100K in {DATA}; set LLMREC_DATA_DIR")
    ratings = pd.read_csv(DATA / "ml-100k" / "u.data", sep="\t", names=RATINGS)
    splits = split_users(ratings["user_id"], SplitRecipe(), 0)
    recipe = WindowRecipe(protocol="temporal", windows_per_user=WindowsPerUser(train=2, test=5))
    windows = interaction_windows(ratings, splits, recipe, 0)
    assert window_problems(windows, ratings, splits, None, recipe) == []
    rated_at = ratings.set_index(["user_id", "movie_id"])["timestamp"].to_dict()
    train, other = windows["split"] == "train", windows["split"] != "train"
    last = {
        name: [
            max(rated_at[user, movie] for movie in truth)
            for user, truth in windows.loc[rows, ["user_id", "ground_truth_movie_ids"]].values
        ]
        for name, rows in (("train", train), ("other", other))
    }
    assert max(last["train"]) <= windows.loc[other, "cutoff_timestamp"].min()
    assert min(last["other"]) > max(last["train"])
    assert set(windows["split"]) == {"train", "validation", "test"}
    assert windows[other].groupby("user_id").size().max() == 5


def test_seed_matters_and_users_without_split_get_no_window() -> None:
    ratings = _ratings([(u, m, 5, m) for u in (1, 2) for m in range(1, 15)])
    one = interaction_windows(ratings, _all("train", 1), SMALL, 0)
    assert one["user_id"].tolist() == [1]
    drawn = {
        int(interaction_windows(ratings, _all("train", 1), SMALL, seed)["cutoff_timestamp"][0])
        for seed in range(8)
    }
    assert len(drawn) > 1


def test_nothing_valid_is_an_empty_table() -> None:
    for ratings in (_ratings([]), _ratings([(1, 1, 1, 1)])):
        windows = interaction_windows(ratings, _all("train", 1), SMALL, 0)
        assert len(windows) == 0
        assert windows.columns.tolist() == INTERACTION_WINDOWS.names


@pytest.mark.parametrize("balance", ["either", "both"])
def test_ml_100k_counts_equal_brute_force(balance) -> None:
    if not (DATA / "ml-100k" / "u.data").is_file():
        pytest.skip(f"no MovieLens 100K in {DATA}; set LLMREC_DATA_DIR")
    ratings = pd.read_csv(DATA / "ml-100k" / "u.data", sep="\t", names=RATINGS)
    recipe = WindowRecipe(balance=balance)
    found = valid_cutoffs(ratings, recipe)

    n_valid, users = 0, set()
    of_user: dict[int, list[tuple[int, int]]] = {}
    for user, time, rating in ratings[["user_id", "timestamp", "rating"]].values.tolist():
        of_user.setdefault(user, []).append((time, rating))
    for user, history in of_user.items():
        last_liked = max(time for time, rating in history if rating >= 3)
        liked = disliked = 0
        for time, group in groupby(sorted(history), key=lambda row: row[0]):
            for _, rating in group:
                liked += rating >= 3
                disliked += rating < 3
            enough = (liked >= 5, disliked >= 5)
            if (all(enough) if balance == "both" else any(enough)) and last_liked > time:
                n_valid += 1
                users.add(user)
    assert (len(found), set(found["user_id"])) == (n_valid, users)
    assert n_valid == {"either": 45_914, "both": 30_780}[balance]

    splits = split_users(ratings["user_id"], SplitRecipe(), 0)
    windows = interaction_windows(ratings, splits, recipe, 0)
    assert windows["user_id"].tolist() == sorted(users)
    assert window_problems(windows, ratings, splits, None, recipe) == []


@pytest.mark.parametrize(("balance", "expected"), [("either", 45_911), ("both", 30_779)])
def test_ml_100k_counts_equal_brute_force_with_films_under_two_ids(balance, expected) -> None:
    """What the graph asks: a later liked film counts unless its other id was rated before."""
    if not (DATA / "ml-100k" / "u.data").is_file():
        pytest.skip(f"no MovieLens 100K in {DATA}; set LLMREC_DATA_DIR")
    ratings = pd.read_csv(DATA / "ml-100k" / "u.data", sep="\t", names=RATINGS)
    movies = read_movies(DATA / "ml-100k", "ml-100k")
    found = valid_cutoffs(ratings, WindowRecipe(balance=balance), movies)

    film_of = dict(zip(movies["movie_id"], movies["canonical_movie_id"], strict=True))
    of_user: dict[int, list[tuple[int, int, int]]] = {}
    for user, movie, rating, time in ratings[list(RATINGS)].values.tolist():
        of_user.setdefault(user, []).append((time, movie, rating))
    valid = set()
    for user, history in of_user.items():
        first: dict[int, tuple[int, int]] = {}
        for time, movie, rating in sorted(history):
            first.setdefault(film_of[movie], (time, rating))
        last_liked = max((time for time, rating in first.values() if rating >= 3), default=0)
        for cutoff in {time for time, _, _ in history}:
            ratings_so_far = [rating for time, _, rating in history if time <= cutoff]
            liked = sum(rating >= 3 for rating in ratings_so_far)
            enough = (liked >= 5, len(ratings_so_far) - liked >= 5)
            if (all(enough) if balance == "both" else any(enough)) and last_liked > cutoff:
                valid.add((user, cutoff))
    columns = found[["user_id", "cutoff_timestamp"]]
    assert set(columns.itertuples(index=False, name=None)) == valid
    assert len(valid) == expected
