"""Which columns a table's columns are computed from.

What belongs here: for every derived column, the columns whose values make its value. What does
not: what a column means (``schemas``) and how it is computed (its own module).

A column is named where its values enter; one that only filters or joins is not. What comes from a
model, a file or the recipe has no column to name. ``*_recommendations`` stands for the tables of
all recommenders, ``*_responses`` for those of all stages.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from llmrec_assets.ground.stages import (
    CHECKPOINT_OF_STAGE,
    RECOMMENDATION_TABLES,
    RESPONSE_TABLES,
)

_Columns = Mapping[str, tuple[str, ...]]

_WINDOW = ("user_id", "window_index")
_LIST = ("stage", "decoding", "information_set")
_VERSIONS = ("prompts_version", "checkpoint_version", "answer_version")
#: The films rated by a cut-off.
_SEEN = (
    "ratings.movie_id",
    "ratings.timestamp",
    "prompts.cutoff_timestamp",
    "catalogue.canonical_movie_id",
)
_SLOT = tuple(f"*_recommendations.{name}" for name in ("movie_id", "is_duplicate", "is_seen"))
_HIT = (*_SLOT, "prompts.ground_truth_movie_ids", "movies.canonical_movie_id")
_POPULARITY = ("ratings.movie_id", "user_splits.split", "movies.canonical_movie_id")


def _same(table: str, *names: str) -> dict[str, tuple[str, ...]]:
    """Columns taken over under their own name."""
    return {name: (f"{table}.{name}",) for name in names}


def _all(names: tuple[str, ...], *sources: str) -> dict[str, tuple[str, ...]]:
    """Columns that are computed from the same others."""
    return dict.fromkeys(names, sources)


def _interval(name: str) -> tuple[str, ...]:
    return name, f"{name}_low", f"{name}_high"


def _responses() -> _Columns:
    asked = ("prompts.prompt", "catalogue.title", *_SEEN)
    return {
        **_same("prompts", *_WINDOW),
        **_all(("response", "n_response_tokens", "finished"), *asked),
        "n_prompt_tokens": ("prompts.prompt",),
    }


def _recommendations(stage: str) -> _Columns:
    answers = f"{stage}_responses"
    text = (f"{answers}.response",)
    film = (*text, "catalogue.title", "catalogue.canonical_movie_id")
    return {
        **_same(answers, *_WINDOW, "stage", "decoding", *_VERSIONS),
        **_all(("rank", "text"), *text),
        **_all(("movie_id", "is_duplicate"), *film),
        **_all(("grounding", "similarity"), *text, "catalogue.title"),
        "is_seen": (*film, *_SEEN[:3]),
    }


_COLUMNS: dict[str, _Columns] = {
    "ratings": _same("incoming_ratings", "user_id", "movie_id", "rating", "timestamp"),
    "catalogue": {
        **_same("movies", "movie_id", "year", "release_date", "genres", "canonical_movie_id"),
        # `titles: invented` makes them of id and year, keeping clear of the real ones
        "title": ("movies.title", "movies.canonical_movie_id", "movies.year"),
    },
    "user_splits": {"user_id": ("users.user_id",), "split": ("users.user_id",)},
    "interaction_windows": {
        "user_id": ("ratings.user_id",),
        **_all(("window_index", "cutoff_timestamp", "n_history"), "ratings.timestamp"),
        "split": ("user_splits.split",),
        "n_valid_cutoffs": (
            "ratings.timestamp",
            "ratings.rating",
            "ratings.movie_id",
            "movies.canonical_movie_id",
        ),
        "context_movie_ids": ("ratings.movie_id",),
        "context_ratings": ("ratings.rating",),
        "ground_truth_movie_ids": (
            "ratings.movie_id",
            "ratings.rating",
            "movies.canonical_movie_id",
        ),
    },
    "prompts": {
        **_same(
            "interaction_windows",
            *_WINDOW,
            "split",
            "cutoff_timestamp",
            "context_movie_ids",
            "ground_truth_movie_ids",
        ),
        "prompt": (
            "interaction_windows.context_movie_ids",
            "interaction_windows.context_ratings",
            "interaction_windows.cutoff_timestamp",
            "catalogue.title",
            "catalogue.genres",
            *(f"users.{n}" for n in ("age", "age_band", "gender", "occupation", "city", "state")),
        ),
        "completion": ("interaction_windows.ground_truth_movie_ids", "catalogue.title"),
    },
    "sampled_responses": {
        **_same("prompts", *_WINDOW, "split"),
        **_all(("response", "n_prompt_tokens", "n_response_tokens", "finished"), "prompts.prompt"),
    },
    "preference_pairs": {
        **_same("sampled_responses", *_WINDOW, "split", *_VERSIONS[:2], "sampling_version"),
        "chosen": ("sampled_responses.response", "prompts.completion"),
        "rejected": ("sampled_responses.response",),
        **_all(
            ("chosen_score", "rejected_score"),
            "sampled_responses.response",
            "prompts.ground_truth_movie_ids",
            "catalogue.title",
            *_SEEN,
        ),
        **_all(("chosen_sample", "rejected_sample"), "sampled_responses.sample"),
    },
    **{f"{stage}_responses": _responses() for stage in CHECKPOINT_OF_STAGE},
    **{f"{stage}_recommendations": _recommendations(stage) for stage in CHECKPOINT_OF_STAGE},
    "baseline_recommendations": {
        **_same("prompts", *_WINDOW),
        **_all(
            ("movie_id", "text"),
            "ratings.user_id",
            "ratings.movie_id",
            "ratings.rating",
            "ratings.timestamp",
            "user_splits.split",
            "prompts.context_movie_ids",
            "prompts.cutoff_timestamp",
            "prompts.ground_truth_movie_ids",
            "catalogue.canonical_movie_id",
        ),
    },
    "user_metrics": {
        **_same("*_recommendations", *_WINDOW, *_LIST, *_VERSIONS),
        "ndcg": ("*_recommendations.rank", *_HIT),
        **_all(("precision", "recall", "hits"), *_HIT),
        "n_ground_truth": ("prompts.ground_truth_movie_ids", "movies.canonical_movie_id"),
        "n_parsed": ("*_recommendations.text",),
        "n_in_catalogue": ("*_recommendations.movie_id",),
        "n_duplicate": ("*_recommendations.is_duplicate",),
        "n_seen": ("*_recommendations.is_seen",),
    },
    "comparisons": {
        **_same("user_metrics", "protocol", *_LIST),
        **{f"versus_{name}": (f"user_metrics.{name}",) for name in _LIST},
        "n_users": ("user_metrics.user_id",),
        **_all(
            (
                *_interval("difference"),
                *("n_differ", "deviation", "p", "p_holm", "is_shown", "users_needed"),
            ),
            "user_metrics.ndcg",
        ),
    },
    "metric_table": {
        **_same("user_metrics", "protocol", *_LIST, "hits", *_VERSIONS, "recommendations_version"),
        "n_users": ("user_metrics.user_id",),
        "n_windows": ("user_metrics.window_index",),
        **_all((*_interval("ndcg"), *_interval("ndcg_difference")), "user_metrics.ndcg"),
        **_all(_interval("precision"), "user_metrics.precision"),
        **_all(_interval("recall"), "user_metrics.recall"),
        "versus": ("user_metrics.stage",),
        "ndcg_difference_p": ("comparisons.p",),
        "ndcg_difference_p_holm": ("comparisons.p_holm",),
        "parsable": ("user_metrics.n_parsed",),
        "in_catalogue": ("user_metrics.n_in_catalogue",),
        "duplicate": ("user_metrics.n_duplicate",),
        "seen": ("user_metrics.n_seen",),
    },
    "beyond_accuracy": {
        **_same("*_recommendations", *_LIST),
        "valid": _SLOT,
        "n_films": _SLOT,
        "coverage": (*_SLOT, "movies.canonical_movie_id"),
        **_all(("novelty", "popularity"), *_SLOT, *_POPULARITY),
        "diversity": (*_SLOT, "movies.genres"),
        "miscalibration": (
            *_SLOT,
            *("ratings.movie_id", "ratings.rating", "ratings.timestamp"),
            "prompts.cutoff_timestamp",
            "movies.genres",
        ),
        "prompt_tokens": ("*_responses.n_prompt_tokens",),
        "response_tokens": ("*_responses.n_response_tokens",),
    },
    "group_metrics": {
        **_same("user_metrics", "protocol", *_LIST, "hits"),
        **_all(
            ("group", "position"),
            *("users.age", "users.age_band", "users.gender", "interaction_windows.n_history"),
            "prompts.ground_truth_movie_ids",
            *_POPULARITY,
        ),
        "n_users": ("user_metrics.user_id",),
        **_all(_interval("ndcg"), "user_metrics.ndcg"),
    },
    "sample_recommendations": {
        **_same("*_recommendations", *_WINDOW),
        "text": (
            "*_recommendations.text",
            "catalogue.title",
            "interaction_windows.context_movie_ids",
            "prompts.ground_truth_movie_ids",
        ),
        "title": (
            "*_recommendations.movie_id",
            "catalogue.title",
            "interaction_windows.context_movie_ids",
            "prompts.ground_truth_movie_ids",
        ),
        "is_hit": (*_SLOT, "prompts.ground_truth_movie_ids", "catalogue.canonical_movie_id"),
    },
    "leave_last_out": {
        "n_users": ("ratings.user_id",),
        **_all(
            ("n_items", *_interval("hr"), *_interval("ndcg")),
            *("ratings.movie_id", "ratings.timestamp", "movies.canonical_movie_id"),
        ),
    },
}

_STAND_FOR = {"*_recommendations": RECOMMENDATION_TABLES, "*_responses": RESPONSE_TABLES}


def sources(asset: str) -> _Columns:
    """Column → ``table.column`` of what it is computed from, groups of tables by their pattern;
    columns without any are left out."""
    return _COLUMNS.get(asset, {})


def expanded(columns: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    """(asset, column) of every source, patterns written out."""
    for source in columns:
        table, column = source.split(".")
        yield from ((name, column) for name in _STAND_FOR.get(table, [table]))
