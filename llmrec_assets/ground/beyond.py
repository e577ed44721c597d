"""What recommendation lists are like beside being right: spread, novelty, variety, fit, cost.

What belongs here: measures of lists that need no ground truth, and their table. What does not:
accuracy (``evaluation``), seen-rate, duplicates and validity by kind (``evaluation``'s metric
table has them).

Only valid slots count: a film of the catalogue that neither stands at a better rank nor was rated
by the cut-off. A refused text has no genres, and a film the user knows is no recommendation, so
either would reward lists for what is of no use. ``valid`` says how many slots that leaves.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations

import numpy as np
import pandas as pd

from llmrec_assets.ground.comparisons import row_key
from llmrec_assets.ground.recommendations import LIST_KEY, WINDOW_KEY, canonical_ids, typed
from llmrec_assets.ground.schemas import BEYOND_ACCURACY

#: Share of a film's genres by genre.
Genres = Mapping[str, float]


def beyond_accuracy(
    recommendations: pd.DataFrame,
    prompts: pd.DataFrame,
    ratings: pd.DataFrame,
    user_splits: pd.DataFrame,
    movies: pd.DataFrame,
    responses: pd.DataFrame | None,
    liked_min: int,
    protocol: str = "user-split",
    until: int | None = None,
) -> pd.DataFrame:
    """One row per recommender; means over users, a user's windows averaged first.

    A list without a valid slot has no novelty, popularity and miscalibration, one with fewer than
    two no diversity; such lists are left out of that mean, and a mean without lists is NULL.

    Args:
        recommendations: ``RECOMMENDATIONS`` of every recommender, with the version of the table
            they stand in as ``recommendations_version`` (``stages.current_stages``).
        prompts: ``PROMPTS``, for the cut-offs.
        ratings: ``RATINGS``: popularity of training users, and what a user liked by the cut-off.
        user_splits: ``USER_SPLITS``.
        movies: ``MOVIES``.
        responses: ``RESPONSES`` that the lists were read from, for the tokens; ``None``: no cost
            is known. Seconds are no part of a table that has to come out the same twice: they
            stand in the metadata of ``*_responses``.
        liked_min: rating from which a film is liked.
        protocol: name of the evaluation protocol.
        until: popularity counts no later rating (``splits.temporal_split_time``).

    Returns:
        ``BEYOND_ACCURACY``, LLM stages in training order, then others by name.
    """
    counts = training_popularity(ratings, user_splits, movies, until)
    information = self_information(counts, int((user_splits["split"] == "train").sum()))
    percentile = popularity_percentiles(counts)
    genres = film_genres(movies)
    asked = recommendations[WINDOW_KEY].drop_duplicates()
    liked = liked_genres(prompts.merge(asked, on=WINDOW_KEY), ratings, movies, genres, liked_min)
    tokens = _costs(responses)
    rows = []
    for name, slot in recommendations.groupby(LIST_KEY, sort=True):
        key = tuple(map(str, name))
        k = int(slot["rank"].max())
        counted = slot["movie_id"].notna() & ~slot["is_duplicate"] & ~slot["is_seen"]
        films = slot["movie_id"].where(counted)
        slot = slot.assign(film=films, valid=counted, novelty=films.map(information),
                           popularity=films.map(percentile))  # fmt: skip
        slot = slot.astype({"novelty": "float64", "popularity": "float64"})
        windows = slot.groupby(WINDOW_KEY)[["valid", "novelty", "popularity"]].mean()
        lists = slot[counted].groupby(WINDOW_KEY)["film"].agg(list).to_dict()
        given = [lists.get(window, []) for window in windows.index.tolist()]
        windows["diversity"] = [intra_list_diversity(films, genres) for films in given]
        windows["miscalibration"] = [
            miscalibration(liked.get(window, {}), films, genres)
            for window, films in zip(windows.index.tolist(), given, strict=True)
        ]
        n_films = films.nunique()
        users = windows.groupby("user_id").mean().mean()
        rows.append(
            {
                "protocol": protocol,
                **dict(zip(LIST_KEY, key, strict=True)),
                "k": k,
                "n_windows": len(windows),
                "n_films": n_films,
                "recommendations_version": slot["recommendations_version"].iloc[0],
                "coverage": n_films / len(counts),
                **users.to_dict(),
                **tokens.get((key[0], key[1]), dict.fromkeys(_COST)),
            }
        )
    rows.sort(key=lambda row: row_key((row["stage"], row["decoding"], row["information_set"])))
    return typed(pd.DataFrame(rows, columns=BEYOND_ACCURACY.names), BEYOND_ACCURACY)


def training_popularity(
    ratings: pd.DataFrame,
    user_splits: pd.DataFrame,
    movies: pd.DataFrame,
    until: int | None = None,
) -> dict[int, int]:
    """Training users who rated each canonical film of the catalogue, 0 where none did.

    Args:
        until: Unix seconds; later ratings are what a list must not know. ``None``: all count.
    """
    film_of = canonical_ids(movies)
    if until is not None:
        ratings = ratings[ratings["timestamp"] <= until]
    train = user_splits.loc[user_splits["split"] == "train", "user_id"]
    rated = ratings.loc[ratings["user_id"].isin(train), ["user_id", "movie_id"]]
    pairs = rated.assign(film=rated["movie_id"].map(film_of))[["user_id", "film"]]
    n_users = pairs.drop_duplicates()["film"].value_counts().to_dict()
    return {film: int(n_users.get(film, 0)) for film in sorted(set(film_of.values()))}


def self_information(counts: Mapping[int, int], n_users: int) -> dict[int, float]:
    """-log2 of the share of training users who rated the film, in bits (Zhou et al., 2010;
    Vargas & Castells, 2011).

    One imaginary user rated everything, so that a film nobody rated is finite: (count + 1) over
    (n_users + 1).

    >>> self_information({7: 3, 8: 0}, n_users=7)
    {7: 1.0, 8: 3.0}
    """
    return {film: float(-np.log2((n + 1) / (n_users + 1))) for film, n in counts.items()}


def popularity_percentiles(counts: Mapping[int, int]) -> dict[int, float]:
    """Share of the other films that are less popular, those as popular counting half: 0 for the
    one least popular film, 1 for the most popular, one half where all are alike.

    >>> popularity_percentiles({1: 0, 2: 5, 3: 5, 4: 9, 5: 1})
    {1: 0.0, 2: 0.625, 3: 0.625, 4: 1.0, 5: 0.25}
    """
    if len(counts) < 2:
        return dict.fromkeys(counts, 0.5)
    ranks = pd.Series(dict(counts)).rank(method="average")
    return {film: float(rank) for film, rank in ((ranks - 1) / (len(counts) - 1)).items()}  # type: ignore[misc]


def film_genres(movies: pd.DataFrame) -> dict[int, frozenset[str]]:
    """Genres by canonical film: those of the row that carries the canonical id."""
    own = movies[movies["movie_id"] == movies["canonical_movie_id"]]
    return {
        int(film): frozenset(genres)
        for film, genres in zip(own["movie_id"].tolist(), own["genres"].tolist(), strict=True)
    }


def intra_list_diversity(
    films: Sequence[int], genres: Mapping[int, frozenset[str]]
) -> float | None:
    """Mean Jaccard distance of the genres over all pairs of a list (Ziegler et al., 2005), in
    [0, 1]; ``None`` under two films. Two films without genres are alike.

    >>> intra_list_diversity([1, 2], {1: frozenset("ab"), 2: frozenset("bc")})
    0.6666666666666667
    """
    pairs = list(combinations(films, 2))
    if not pairs:
        return None
    return sum(_distance(genres[a], genres[b]) for a, b in pairs) / len(pairs)


def _distance(first: frozenset[str], second: frozenset[str]) -> float:
    union = first | second
    return 1 - len(first & second) / len(union) if union else 0.0


def genre_distribution(films: Sequence[int], genres: Mapping[int, frozenset[str]]) -> Genres:
    """p(genre | films): every film spreads one unit over its genres (Steck, 2018, §3.1); films
    without genres say nothing. Empty where none has any.

    >>> genre_distribution([1, 2], {1: frozenset("a"), 2: frozenset("ab")})
    {'a': 0.75, 'b': 0.25}
    """
    weight: dict[str, float] = {}
    told = [film for film in films if genres[film]]
    for film in told:
        for genre in sorted(genres[film]):
            weight[genre] = weight.get(genre, 0.0) + 1 / len(genres[film]) / len(told)
    return weight


def miscalibration(
    liked: Genres, films: Sequence[int], genres: Mapping[int, frozenset[str]]
) -> float | None:
    """How far the list's genres are from the user's (Steck, 2018), 0 alike to 1 disjoint.

    Steck's distributions, compared by the Jensen-Shannon divergence in bits: his Kullback-Leibler
    divergence is infinite for a genre that a list of five lacks, unless it is smoothed by a
    constant of one's choice. ``None`` where either side is empty.
    """
    listed = genre_distribution(films, genres)
    if not liked or not listed:
        return None
    total = 0.0
    for genre in sorted(liked.keys() | listed.keys()):
        p, q = liked.get(genre, 0.0), listed.get(genre, 0.0)
        middle = (p + q) / 2
        total += sum(x * float(np.log2(x / middle)) / 2 for x in (p, q) if x > 0)
    return max(0.0, total)


def liked_genres(
    windows: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    genres: Mapping[int, frozenset[str]],
    liked_min: int,
) -> dict[tuple[int, int], Genres]:
    """``genre_distribution`` of what each window's user liked by the cut-off."""
    film_of = canonical_ids(movies)
    wanted = ratings[
        ratings["user_id"].isin(windows["user_id"].unique()) & (ratings["rating"] >= liked_min)
    ]
    history: dict[int, list[tuple[int, int]]] = {}
    columns = (wanted[name].tolist() for name in ("user_id", "timestamp", "movie_id"))
    for user_id, timestamp, movie_id in zip(*columns, strict=True):
        history.setdefault(user_id, []).append((timestamp, film_of[movie_id]))
    found = {}
    keys = (windows[name].tolist() for name in (*WINDOW_KEY, "cutoff_timestamp"))
    for user_id, window_index, cutoff in zip(*keys, strict=True):
        films = {film for timestamp, film in history.get(user_id, []) if timestamp <= cutoff}
        found[user_id, window_index] = genre_distribution(sorted(films), genres)
    return found


_COST = ("prompt_tokens", "response_tokens")


def _costs(responses: pd.DataFrame | None) -> dict[tuple[str, str], dict[str, float | None]]:
    """Tokens per user by (stage, decoding): summed over a user's windows."""
    if responses is None or responses.empty:
        return {}
    names = {"n_prompt_tokens": "prompt_tokens", "n_response_tokens": "response_tokens"}
    table = responses.rename(columns=names)
    found: dict[tuple[str, str], dict[str, float | None]] = {}
    for (stage, decoding), part in table.groupby(["stage", "decoding"]):
        users = part.groupby("user_id")[list(_COST)].sum(min_count=1).mean()
        found[str(stage), str(decoding)] = {name: float(users[name]) for name in _COST}
    return found
