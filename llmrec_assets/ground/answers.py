"""Raw answers to slots: parsing, grounding and the seen sets, put together.

What belongs here: the one call that turns a ``*_responses`` table into ``*_recommendations``, its
validity counts, and the versions that tell which answers were decoded alike. What does not: the
parts (``completions``, ``grounding``, ``recommendations``).
"""

from __future__ import annotations

from itertools import zip_longest

import pandas as pd

from llmrec_assets.ground.completions import parse_response, render_completion
from llmrec_assets.ground.grounding import Catalogue, Grounder
from llmrec_assets.ground.recipes import (
    HYBRID,
    BaselinesRecipe,
    GenerationRecipe,
    GroundingRecipe,
)
from llmrec_assets.ground.recommendations import seen_sets, slots
from llmrec_assets.ground.recommender import contract_problems
from llmrec_assets.ground.store import checkpoint_version

#: Titles in one answer of the check: as in the paper's, so that one title can spoil another.
_TITLES_PER_ANSWER = 5


def answer_versions(
    recipe: GenerationRecipe, seed: int, code: str, candidates_version: str | None = None
) -> dict[str, str]:
    """Per decoding the version of how it answers; a stage's rows compare where it is equal.

    A decoding's version does not change with the settings of another one. Rankings draw nothing,
    so theirs does not change with the seed either.

    Args:
        candidates_version: of what the hybrid ranks (``Candidates.version``).

    Raises:
        ValueError: the recipe has the hybrid, and no version of its candidates is given.
    """
    versions: dict[str, str] = {}
    for name in recipe.rows:
        determinants: dict[str, object] = {"generation": recipe.settings(name), "code": code}
        if name not in ("ranked", HYBRID):
            determinants["seed"] = seed
        if name != "free":
            determinants["decoding"] = name
        if name == HYBRID:
            if candidates_version is None:
                raise ValueError(f"{name} answers need the version of their candidates")
            determinants["candidates"] = candidates_version
        versions[name] = checkpoint_version("responses", determinants)
    return versions


def baselines_version(recipe: BaselinesRecipe) -> str:
    """Version of how the classical lists were made: what ``answer_version`` is for an LLM stage."""
    return checkpoint_version("baselines", recipe.model_dump())


def ground_responses(
    responses: pd.DataFrame,
    windows: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    recipe: GroundingRecipe,
    top_k: int,
) -> pd.DataFrame:
    """Rows of ``RECOMMENDATIONS``: exactly ``top_k`` slots for every response.

    Args:
        windows: the ``PROMPTS`` that were answered, for their cut-offs.
    """
    answered = windows.merge(responses[["user_id", "window_index"]], on=["user_id", "window_index"])
    seen = seen_sets(answered, ratings, movies[["movie_id", "canonical_movie_id"]])
    grounder = Grounder(Catalogue(movies), recipe)
    version_of = {
        answered: checkpoint_version(
            "lists", {"answers": answered, "grounding": recipe.model_dump(), "top_k": top_k}
        )
        for answered in responses["answer_version"].unique()
    }
    grounded = responses.assign(answer_version=responses["answer_version"].map(version_of))
    return slots(grounded, parse_response, grounder.ground, seen, top_k)


def parsing_problems(movies: pd.DataFrame, recipe: GroundingRecipe) -> list[str]:
    """Titles that, written as an answer and parsed and grounded again, are not their film.

    The paper's parser broke titles at apostrophes, and WRatio gave the fragments to other films.
    Grounded by the ladder whatever the recipe's method: what the paper's rule does to a title is
    its result, not a fault of the run.

    Args:
        movies: ``MOVIES``.

    Returns:
        One line per title that does not survive; empty where all do.
    """
    grounder = Grounder(Catalogue(movies), recipe.model_copy(update={"method": "ladder"}))
    titles = [title.strip() for title in movies["title"].tolist()]
    films = movies["canonical_movie_id"].tolist()
    problems = []
    for start in range(0, len(titles), _TITLES_PER_ANSWER):
        asked = titles[start : start + _TITLES_PER_ANSWER]
        items = parse_response(render_completion(asked))
        found = [match.movie_id for match in grounder.ground(items)]
        wanted = films[start : start + _TITLES_PER_ANSWER]
        if found == wanted:
            continue
        problems += [
            f"movies: {title!r} (film {film}) is read out of {render_completion(asked)} as "
            f"{item!r}, film {got}: mend completions.parse_response or grounding"
            for title, film, item, got in zip_longest(asked, wanted, items, found)
            if film != got
        ]
    return problems


def constrained_problems(
    recommendations: pd.DataFrame,
    windows: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    top_k: int,
) -> list[str]:
    """Where lists decoded over the catalogue break the contract of ``recommender``.

    Free text promises nothing: its repeated, seen and invented items are counted instead.

    Args:
        recommendations: ``RECOMMENDATIONS`` of one stage.
        windows: the ``PROMPTS`` that were answered.
    """
    rows = recommendations[recommendations["decoding"] != "free"]
    seen = seen_sets(windows, ratings, movies[["movie_id", "canonical_movie_id"]])
    return contract_problems(rows, seen, set(movies["canonical_movie_id"].tolist()), top_k)


def validity(recommendations: pd.DataFrame) -> dict[str, float | int]:
    """Shares of slots that are parsable, in the catalogue, duplicates, already seen."""
    n = len(recommendations)
    if not n:
        return {"slots": 0}
    return {
        "slots": n,
        "parsable": float(recommendations["text"].notna().mean()),
        "in_catalogue": float(recommendations["movie_id"].notna().mean()),
        "duplicate": float(recommendations["is_duplicate"].mean()),
        "seen": float(recommendations["is_seen"].mean()),
    }
