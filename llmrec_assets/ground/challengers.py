"""A challenger: a stage's policy as it is in the store, and whether all that it stands on holds.

What belongs here: reading a challenger of ``dataset | recipe`` and running every blocking check of
its inputs again. What does not: the checks themselves (``leaks``, ``stages``, ``answers`` …), and
the decision (``promotion``).

The checks are run again rather than looked up: what Dagster recorded is about what was there then,
and may be another instance's; this is about the files that would serve.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from llmrec_assets.ground import preferences
from llmrec_assets.ground.answers import constrained_problems, parsing_problems
from llmrec_assets.ground.catalogue import catalogue_problems
from llmrec_assets.ground.errors import DataError, RecipeError, StoreError
from llmrec_assets.ground.evaluation import user_metrics
from llmrec_assets.ground.leaks import prompt_problems, user_split_problems, window_problems
from llmrec_assets.ground.promotion import Side
from llmrec_assets.ground.recipes import Recipe, load_recipe
from llmrec_assets.ground.score_checks import score_problems
from llmrec_assets.ground.serving import Served
from llmrec_assets.ground.stages import (
    CHALLENGER,
    CHECKPOINT_OF_STAGE,
    policy_problems,
    trained_user_problems,
)
from llmrec_assets.ground.store import Store, StoredTable, checkpoint_version, read_manifest

_STAGES = tuple(stage for stage in CHECKPOINT_OF_STAGE if stage != "base")


@dataclass(frozen=True)
class Source:
    """The tables of a data set."""

    ratings: StoredTable
    users: pd.DataFrame
    movies: pd.DataFrame


@dataclass(frozen=True)
class Challenger:
    """A stage's policy and its inputs. ``trainings``: every training behind it, by asset."""

    recipe: Recipe
    served: Served
    partition: str
    prompts: StoredTable
    windows: pd.DataFrame
    user_splits: pd.DataFrame
    catalogue: pd.DataFrame
    base_model: Path
    trainings: dict[str, Path]
    determinants: dict[str, Any]
    test_ndcg: float | None

    @property
    def adapters(self) -> list[Path]:
        """SFT's, then the one trained on top of it."""
        own = CHECKPOINT_OF_STAGE[self.served.stage]
        return [self.trainings[asset] for asset in dict.fromkeys(["sft_checkpoint", own])]

    @property
    def side(self) -> Side:
        served = self.served
        version = checkpoint_version("champion", self.determinants)
        return Side(version, served.recipe, served.stage, served.decoding, self.test_ndcg)

    @property
    def trained_user_ids(self) -> list[int]:
        """Every user that a training behind it saw."""
        facts = [read_manifest(path)["facts"] for path in self.trainings.values()]
        return sorted({user for fact in facts for user in fact.get("trained_user_ids") or []})

    def validation_prompts(self, left_out: set[int]) -> pd.DataFrame:
        """``PROMPTS`` of its validation users but those in ``left_out``, by (user, window)."""
        frame = self.prompts.frame
        asked = frame[(frame["split"] == "validation") & ~frame["user_id"].isin(left_out)]
        return asked.sort_values(["user_id", "window_index"], ignore_index=True)


def read_source(store: Store, dataset: str) -> Source:
    """The current tables of a data set.

    Raises:
        StoreError: one was never materialized, or is damaged.
    """
    users, movies = (store.read_table(name, dataset).frame for name in ("users", "movies"))
    return Source(store.read_table("ratings", dataset), users, movies)


def read_challenger(
    store: Store, dataset: str, recipe_name: str, stage: str | None, code: str
) -> Challenger:
    """What ``dataset | recipe`` has current for its challenging stage.

    Args:
        stage: overrides ``recipe.promotion.stage``.
        code: version of the code that makes a champion of it.

    Raises:
        RecipeError: no such recipe or stage, or one whose titles are invented.
        StoreError: an input was never materialized, or is damaged.
        DataError: it has no validation user.
    """
    recipe = load_recipe(recipe_name)
    if recipe.prompts.titles != "real":
        raise RecipeError(
            f"recipe {recipe.name} shows invented titles: it is a control, and nobody could read "
            "its recommendations; name another recipe"
        )
    stage = stage or recipe.promotion.stage
    if stage not in _STAGES:
        raise RecipeError(f"no stage named {stage!r} can be champion: known are {_STAGES}")
    partition = f"{dataset}|{recipe.name}"
    prompts = store.read_table("prompts", partition)
    if not (prompts.frame["split"] == "validation").any():
        raise DataError(
            f"{partition} has no validation prompt, so nothing can be compared: raise "
            "splits.validation or lower windows.min_per_class in the recipe"
        )
    catalogue = store.read_table("catalogue", partition)
    base_model = store.checkpoint("base_model", recipe.name)
    trainings = {"sft_checkpoint": store.checkpoint("sft_checkpoint", partition)}
    own = CHECKPOINT_OF_STAGE[stage]
    trainings.setdefault(own, store.checkpoint(own, partition))
    rewarded_by = read_manifest(trainings[own])["determinants"].get("reward_model")
    if rewarded_by is not None:
        trainings["reward_model"] = store.checkpoint("reward_model", partition, rewarded_by)
    served = Served.of(recipe, dataset, stage)
    return Challenger(
        recipe=recipe,
        served=served,
        partition=partition,
        prompts=prompts,
        windows=store.read_table("interaction_windows", partition).frame,
        user_splits=store.read_table("user_splits", partition).frame,
        catalogue=catalogue.frame,
        base_model=base_model,
        trainings=trainings,
        determinants={
            "served": served.model_dump(mode="json"),
            "base_model": base_model.name,
            **{asset: path.name for asset, path in trainings.items()},
            "prompts": prompts.version,
            "catalogue": catalogue.version,
            "code": code,
        },
        test_ndcg=_test_ndcg(store, partition, served, trainings[own].name),
    )


def _test_ndcg(store: Store, partition: str, served: Served, checkpoint: str) -> float | None:
    """NDCG@k on test users of this very checkpoint under this decoding, if it was measured."""
    if store.current("metric_table", partition, kind="tables") is None:
        return None
    table = store.read_table("metric_table", partition).frame
    rows = table[
        (table["stage"] == served.stage)
        & (table["decoding"] == served.decoding)
        & (table["checkpoint_version"] == checkpoint)
    ]
    return None if rows.empty else float(rows["ndcg"].iloc[0])


def input_problems(store: Store, challenger: Challenger, source: Source) -> list[str]:
    """What the blocking checks find in the challenger's inputs, each line after its check."""
    ratings, recipe = source.ratings.frame, challenger.recipe
    canonical = source.movies[["movie_id", "canonical_movie_id"]]
    splits, windows, catalogue = (
        challenger.user_splits,
        challenger.windows,
        challenger.catalogue,
    )
    checks: dict[str, Callable[[], Sequence[str]]] = {
        "no_user_in_two_splits": lambda: user_split_problems(splits),
        "no_leak": lambda: window_problems(windows, ratings, splits, canonical, recipe.windows),
        "titles_are_as_the_recipe_says": lambda: catalogue_problems(
            catalogue, source.movies, recipe.prompts
        ),
        "prompts_show_their_windows_only": lambda: prompt_problems(
            challenger.prompts.frame, windows, catalogue
        ),
        "answered_by_its_own_checkpoint": lambda: policy_problems(
            challenger.served.stage,
            challenger.base_model,
            challenger.adapters,
            challenger.partition,
            challenger.prompts.version,
        ),
        "catalogue_survives_parsing": lambda: parsing_problems(catalogue, recipe.grounding),
        "pairs_keep_the_split": lambda: _pair_problems(store, challenger),
    }
    found = [f"{name}: {problem}" for name, check in checks.items() for problem in check()]
    for asset, path in challenger.trainings.items():
        trained = read_manifest(path)["facts"].get("trained_user_ids")
        problems = trained_user_problems(trained, splits)
        found += [f"trained_on_training_users_only, {asset}: {p}" for p in problems]
    return found


def _pair_problems(store: Store, challenger: Challenger) -> list[str]:
    """Of the very pairs that a training behind it names."""
    made_from = [read_manifest(path)["determinants"] for path in challenger.trainings.values()]
    problems = []
    for version in {made["preference_pairs"] for made in made_from if "preference_pairs" in made}:
        try:
            pairs = store.read_table("preference_pairs", challenger.partition, version).frame
        except StoreError as error:
            problems.append(f"{error}; train {challenger.served.stage} again, from current pairs")
            continue
        problems += preferences.problems(pairs, challenger.user_splits)
    return problems


def validation_metrics(
    lists: pd.DataFrame, challenger: Challenger, source: Source
) -> tuple[pd.DataFrame, list[str]]:
    """``USER_METRICS`` of both sides, and what the blocking checks find in the challenger's lists.

    Args:
        lists: ``RECOMMENDATIONS`` for the same validation windows, ``CHALLENGER``'s and, where
            there is one, ``CHAMPION``'s.
    """
    asked = challenger.prompts.frame
    asked = asked[asked["user_id"].isin(lists["user_id"])]
    ratings, recipe = source.ratings.frame, challenger.recipe
    k = recipe.windows.top_k
    metrics = user_metrics(
        lists.assign(recommendations_version="validation"),
        asked,
        source.movies,
        recipe.windows.protocol,
    )
    own = lists[lists["stage"] == CHALLENGER]
    scores = metrics[metrics["stage"] == CHALLENGER]
    contract = constrained_problems(own, asked, ratings, challenger.catalogue, k)
    counted = score_problems(scores, own, asked, ratings, source.movies, k)
    return metrics, [
        *(f"keeps_the_contract: {problem}" for problem in contract),
        *(f"scores_hold: {problem}" for problem in counted),
    ]
