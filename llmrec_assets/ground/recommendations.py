"""Recommendation lists: from raw responses to fixed slots of canonical films.

What belongs here: slots, seen sets, which prompts are answered at all, and one user's lists side
by side. What does not: how a response is parsed (``completions``) and a title grounded
(``grounding``), the classical recommenders (``baselines``, the models floor), and what a list is
worth (``evaluation``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import pandas as pd
import pyarrow as pa
from pandas.api.types import infer_dtype

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.schemas import RECOMMENDATIONS, SAMPLE_RECOMMENDATIONS

if TYPE_CHECKING:
    from llmrec_assets.ground.grounding import Match

#: Canonical ids rated by the cut-off, by (user id, window index).
Seen = Mapping[tuple[int, int], frozenset[int]]

#: Stages in the order they are trained; others follow by name.
STAGE_ORDER = ("base", "sft", "dpo", "rlhf")

_RESPONSE_VERSIONS = ("prompts_version", "checkpoint_version", "answer_version")

#: What identifies a window, and what identifies a recommender's list for it.
WINDOW_KEY = ["user_id", "window_index"]
LIST_KEY = ["stage", "decoding", "information_set"]

#: A recommender's row in a table: stage, decoding, information set.
Row = tuple[str, str, str]


def canonical_ids(movies: pd.DataFrame) -> dict[int, int]:
    """Canonical movie id by movie id, from ``MOVIES``."""
    return dict(
        zip(movies["movie_id"].tolist(), movies["canonical_movie_id"].tolist(), strict=True)
    )


def evaluated_prompts(prompts: pd.DataFrame, max_test_users: int | None) -> pd.DataFrame:
    """The test prompts that every recommender answers, LLM or classical.

    Args:
        prompts: ``PROMPTS``.
        max_test_users: keeps the test users with the smallest ids; ``None`` keeps all.

    Returns:
        Rows of ``PROMPTS``, ordered by (user, window).
    """
    test = prompts[prompts["split"] == "test"].sort_values(WINDOW_KEY)
    if max_test_users is not None:
        test = test[test["user_id"].isin(test["user_id"].unique()[:max_test_users])]
    return test.reset_index(drop=True)


def seen_sets(
    windows: pd.DataFrame, ratings: pd.DataFrame, canonical: pd.DataFrame | None
) -> dict[tuple[int, int], frozenset[int]]:
    """Canonical ids each window's user had rated at or before its cut-off.

    Args:
        windows: ``user_id``, ``window_index`` and ``cutoff_timestamp`` (``INTERACTIONWINDOW_KEYS``
            or ``PROMPTS``).
        ratings: ``RATINGS``.
        canonical: ``movie_id`` and ``canonical_movie_id``; ``None``: every id is its own film.

    Returns:
        The set by (user id, window index), one for every window.
    """
    film_of = {} if canonical is None else canonical_ids(canonical)
    history: dict[int, tuple[list[int], list[int]]] = {}
    wanted = ratings[ratings["user_id"].isin(windows["user_id"].unique())]
    for user_id, rows in wanted.groupby("user_id"):
        films = [film_of.get(movie_id, movie_id) for movie_id in rows["movie_id"].tolist()]
        history[user_id] = (films, rows["timestamp"].tolist())  # type: ignore[index]
    sets = {}
    columns = [windows[name].tolist() for name in (*WINDOW_KEY, "cutoff_timestamp")]
    for user_id, window_index, cutoff in zip(*columns, strict=True):
        films, times = history.get(user_id, ([], []))
        sets[user_id, window_index] = frozenset(
            film for film, time in zip(films, times, strict=True) if time <= cutoff
        )
    return sets


def slots(
    responses: pd.DataFrame,
    parse: Callable[[str], list[str]],
    ground: Callable[[Sequence[str]], Sequence[Match]],
    seen: Seen,
    top_k: int,
) -> pd.DataFrame:
    """Parses and grounds responses into exactly ``top_k`` slots a window (paper §3.5).

    Items beyond ``top_k`` are dropped; a slot without an item has grounding ``missing``.

    Args:
        responses: ``RESPONSES``.
        parse: items of one raw response, best first.
        ground: a match for each text; called once, with every distinct text.
        seen: ``seen_sets`` of the windows.
        top_k: slots per window.

    Returns:
        ``RECOMMENDATIONS``, in the order of the responses, then by rank.

    Raises:
        KeyError: a response answers a window that ``seen`` does not know.
    """
    items = [parse(response)[:top_k] for response in responses["response"].tolist()]
    texts = list(dict.fromkeys(text for row in items for text in row))
    match_of = dict(zip(texts, ground(texts), strict=True)) if texts else {}
    rows = []
    columns = [
        responses[name].tolist() for name in (*WINDOW_KEY, "stage", "decoding", *_RESPONSE_VERSIONS)
    ]
    for answer, user_id, window_index, stage, decoding, *versions in zip(
        items, *columns, strict=True
    ):
        better: set[int] = set()
        for rank in range(1, top_k + 1):
            text = answer[rank - 1] if rank <= len(answer) else None
            match = None if text is None else match_of[text]
            movie_id = None if match is None else match.movie_id
            rows.append(
                (
                    user_id,
                    window_index,
                    stage,
                    decoding,
                    "prompt",
                    rank,
                    text,
                    movie_id,
                    "missing" if match is None else match.method,
                    None if match is None else match.similarity,
                    movie_id in better,
                    movie_id in seen[user_id, window_index],
                    *versions,
                )
            )
            if movie_id is not None:
                better.add(movie_id)
    return recommendation_frame(rows)


def recommendation_frame(rows: Sequence[tuple]) -> pd.DataFrame:
    """``RECOMMENDATIONS`` from tuples in the schema's order, typed also when there is none."""
    return typed(pd.DataFrame(rows, columns=RECOMMENDATIONS.names), RECOMMENDATIONS)


def sample_recommendations(
    prompts: pd.DataFrame,
    windows: pd.DataFrame,
    movies: pd.DataFrame,
    recommendations: pd.DataFrame,
    user_id: int | None = None,
    liked_min: int = 3,
) -> pd.DataFrame:
    """One user's first window through the stages, to be read side by side (paper Table 2).

    Args:
        prompts: ``PROMPTS``, for the ground truth.
        windows: ``INTERACTION_WINDOWS``, for the context and its ratings.
        movies: ``MOVIES``.
        recommendations: ``RECOMMENDATIONS`` of every stage to show.
        user_id: whose; ``None``: the smallest id among the recommendations.
        liked_min: rating from which a context film stands under ``liked``.

    Returns:
        ``SAMPLE_RECOMMENDATIONS``: liked, disliked, ground truth, then the stages in training
        order. A stage with several lists for the window names decoding and information set.

    Raises:
        DataError: the user has no recommendations, or their window no prompt.
    """
    if recommendations.empty:
        return typed(pd.DataFrame(columns=SAMPLE_RECOMMENDATIONS.names), SAMPLE_RECOMMENDATIONS)
    user = int(recommendations["user_id"].min()) if user_id is None else user_id
    lists = recommendations[recommendations["user_id"] == user]
    if lists.empty:
        raise DataError(f"sample_recommendations: user {user} has no recommendations")
    index = int(lists["window_index"].min())
    lists = lists[lists["window_index"] == index]
    prompt = _one(prompts, user, index, "prompts")
    window = _one(windows, user, index, "interaction_windows")
    title_of = dict(zip(movies["movie_id"].tolist(), movies["title"].tolist(), strict=True))
    film_of = canonical_ids(movies)

    rated = list(zip(window["context_movie_ids"], window["context_ratings"], strict=True))
    shown = {
        "liked": [int(movie_id) for movie_id, rating in rated if rating >= liked_min],
        "disliked": [int(movie_id) for movie_id, rating in rated if rating < liked_min],
        "ground truth": [int(movie_id) for movie_id in prompt["ground_truth_movie_ids"]],
    }
    rows = [
        (user, index, label, rank, title_of[movie_id], title_of[movie_id], False)
        for label, movie_ids in shown.items()
        for rank, movie_id in enumerate(movie_ids, start=1)
    ]
    truth = {film_of.get(movie_id, movie_id) for movie_id in shown["ground truth"]}
    variants = lists[LIST_KEY].drop_duplicates()["stage"].value_counts()
    by_list = {tuple(map(str, name)): part for name, part in lists.groupby(LIST_KEY)}
    for name in sorted(by_list, key=lambda name: (*stage_key(name[0]), *name[1:])):
        label = name[0] if variants[name[0]] == 1 else f"{name[0]} ({name[1]}, {name[2]})"
        for slot in by_list[name].sort_values("rank").to_dict("records"):
            film = None if pd.isna(slot["movie_id"]) else int(slot["movie_id"])
            counts = not slot["is_duplicate"] and not slot["is_seen"]
            text = None if pd.isna(slot["text"]) else slot["text"]
            title = None if film is None else title_of[film]
            rows.append((user, index, label, slot["rank"], text, title, film in truth and counts))
    table = pd.DataFrame(rows, columns=SAMPLE_RECOMMENDATIONS.names)
    return typed(table, SAMPLE_RECOMMENDATIONS)


def _one(table: pd.DataFrame, user_id: int, window_index: int, name: str) -> dict:
    rows = table[(table["user_id"] == user_id) & (table["window_index"] == window_index)]
    if len(rows) != 1:
        raise DataError(
            f"{name}: user {user_id} has {len(rows)} rows for window {window_index}, expected 1: "
            "materialize the recommendations again, from the same prompts"
        )
    return rows.to_dict("records")[0]


def stage_key(stage: str) -> tuple[int, str]:
    """Sorts stages in the order they are trained, then by name."""
    order = STAGE_ORDER.index(stage) if stage in STAGE_ORDER else len(STAGE_ORDER)
    return order, stage


_DTYPES = {"string": "str", "double": "float64", "float": "float32"}


def _is_text(column: pd.Series, name: str) -> bool:
    """Whether it needs no cast: to look at every value costs a third of writing it as text."""
    kinds = ("string", "empty")
    return name == "string" and column.dtype == object and infer_dtype(column) in kinds


def typed(table: pd.DataFrame, schema: pa.Schema) -> pd.DataFrame:
    """The schema's columns in order and in its types, list columns aside.

    An integer column that may be NULL gets pandas' masked type, so that ids stay integers.
    """
    columns = {}
    for field in schema:
        column, name = table[field.name], str(field.type)
        if field.nullable and name.startswith("int"):
            columns[field.name] = column.astype(name.capitalize())
        else:
            # pandas 2 writes None as the text "None"; the mask takes that back
            cast = column if _is_text(column, name) else column.astype(_DTYPES.get(name, name))
            columns[field.name] = cast.where(column.notna()) if field.nullable else cast
    return pd.DataFrame(columns)
