"""All classical lists for the test windows, and EASE's candidates: fitted, tuned, checked.

What belongs here: which recommender answers which windows with which hyperparameters. What does
not: the recommenders (``classical``, ``sasrec``, ``llmrec_assets.ground.baselines``), what they may
be fitted on (``llmrec_assets.ground.fits``) and what a list must be
(``llmrec_assets.ground.recommender``).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from time import perf_counter
from typing import Any

import pandas as pd

from llmrec_assets.ground import surroundings
from llmrec_assets.ground.answers import baselines_version
from llmrec_assets.ground.baselines import Popularity, popularity_ranking
from llmrec_assets.ground.fits import (
    FitRecord,
    fit_problems,
    fit_record,
    grid_point,
    time_grid,
    training_events,
)
from llmrec_assets.ground.metrics import ndcg, slot_gains
from llmrec_assets.ground.recipes import Recipe
from llmrec_assets.ground.recommendations import (
    canonical_ids,
    evaluated_prompts,
    recommendation_frame,
    seen_sets,
)
from llmrec_assets.ground.recommender import (
    INFORMATION_SETS,
    RANKING,
    RANKING_SHOWN,
    Candidates,
    Recommender,
    Window,
    contract_problems,
    recommended_frame,
    windows_of,
)
from llmrec_assets.ground.splits import temporal_split_time
from llmrec_assets.models.classical import LensKitScorer, ScoredRecommender, component
from llmrec_assets.models.sasrec import SasRecScorer

_TUNED = ("itemknn", "ease", "als", "sasrec")
_CAUSAL = "-causal"

Key = tuple[int, int]
Values = dict[str, Any]


@dataclass(frozen=True)
class ClassicalLists:
    """``frame``: ``RECOMMENDATIONS``; ``facts``: JSON values; ``problems``: by blocking check."""

    frame: pd.DataFrame
    facts: dict[str, Any]
    problems: dict[str, list[str]]


@dataclass(frozen=True)
class Proposal:
    """``problems``: why the candidates must not be used."""

    candidates: Candidates
    validation_ndcg: float
    problems: list[str]


@dataclass(frozen=True)
class Tuned:
    """Hyperparameters with the highest validation NDCG@k (the first of equals), and the lists
    that the test windows get with them."""

    values: Values
    validation_ndcg: float
    lists: list[list[int]]


class Tables:
    """What all fits share: the inputs, and the windows as each information set tells them."""

    def __init__(
        self,
        prompts: pd.DataFrame,
        user_splits: pd.DataFrame,
        ratings: pd.DataFrame,
        movies: pd.DataFrame,
        recipe: Recipe,
        seed: int,
    ) -> None:
        self.ratings, self.user_splits, self.movies = ratings, user_splits, movies
        self.recipe, self.seed = recipe, seed
        self.until = temporal_split_time(ratings, recipe.windows)
        self.top_k, self.liked_min = recipe.windows.top_k, recipe.windows.liked_min
        film_of = canonical_ids(movies)
        self.catalogue = set(film_of.values())
        test = evaluated_prompts(prompts, recipe.evaluation.max_test_users)
        validation = prompts[prompts["split"] == "validation"]
        self.seen = seen_sets(test, ratings, movies)
        #: Users whose windows chose hyperparameters, noted where their ground truth is read.
        self.tuned_on: set[int] = set()
        self.test = self._told(test)
        self.validation = self._told(validation)
        self.truth = {
            (user, index): frozenset(film_of.get(int(i), int(i)) for i in movie_ids)
            for user, index, movie_ids in zip(
                *(validation[n].tolist() for n in ("user_id", "window_index")),
                validation["ground_truth_movie_ids"].tolist(),
                strict=True,
            )
        }

    def _told(self, prompts: pd.DataFrame) -> dict[str, list[Window]]:
        seen = seen_sets(prompts, self.ratings, self.movies)
        figure2 = self.recipe.prompts.template == "figure2"
        return {
            name: windows_of(
                prompts,
                self.ratings,
                self.movies,
                seen,
                information_set=name,
                liked_min=self.liked_min,
                shown_per_class=self.recipe.prompts.max_per_class if figure2 else None,
            )
            for name in INFORMATION_SETS
        }

    def events(self, until: int | None = None) -> pd.DataFrame:
        """Training users' events; under the protocol ``temporal`` those up to its global time,
        where no other ``until`` is asked for."""
        until = self.until if until is None else until
        return training_events(self.ratings, self.user_splits, self.movies, until)

    def ranking(self, events: pd.DataFrame) -> list[int]:
        return popularity_ranking(events, self.movies, self.liked_min)

    def validation_ndcg(self, recommender: Recommender, information_set: str) -> float:
        """Mean NDCG@k over the validation users' windows; 0 where there is none."""
        windows = self.validation[information_set]
        scores = []
        for window, films in zip(windows, recommender.recommend(windows, self.top_k), strict=True):
            self.tuned_on.add(window.user_id)
            slots = [*films, *[None] * (self.top_k - len(films))]
            truth = self.truth[window.key]
            scores.append(ndcg(slot_gains(slots, truth, window.hidden), len(truth)))
        return sum(scores) / len(scores) if scores else 0.0


def classical_lists(
    prompts: pd.DataFrame,
    user_splits: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    recipe: Recipe,
    *,
    prompts_version: str,
    seed: int,
    say: Callable[[str], None] = lambda _: None,
) -> ClassicalLists:
    """Every classical recommender's lists for the test prompts that the LLM stages answer.

    ``itemknn``, ``ease``, ``als`` and ``sasrec`` under both information sets, each tuned on the
    validation windows as that information set tells them; ``popularity``, which asks for nothing,
    once with every seen film left out and once (decoding ``ranking-shown``) with only what the
    prompt shows. ``popularity-causal`` and ``itemknn-causal`` (with ``itemknn``'s values) answer a
    window from a fit on events up to the latest point of a time grid at or before its cut-off.

    Args:
        prompts: ``PROMPTS`` of all splits.
        user_splits: ``USER_SPLITS``.
        ratings: ``RATINGS``.
        movies: ``MOVIES``.
        recipe: sections ``baselines``, ``windows``, ``prompts`` and ``evaluation``.
        prompts_version: version of the prompts answered.
        seed: of ALS' and SASRec's first weights.
        say: is told each recommender's scores and seconds.
    """
    surroundings.use_models()
    tables = Tables(prompts, user_splits, ratings, movies, recipe, seed)
    lists: dict[tuple[str, str, str], list[list[int]]] = {}
    records: list[FitRecord] = []
    tuned: dict[str, dict[str, Tuned]] = {}
    seconds: dict[str, float] = {}
    keys = [window.key for window in tables.test["history"]]
    # what free text can know: a film the user saw earlier may stand in the list, and is a miss
    shown = [replace(w, hidden=frozenset(w.films)) for w in tables.test["prompt"]]

    started = perf_counter()
    events = tables.events()
    popularity = Popularity(tables.ranking(events))
    records.append(fit_record("popularity", events, tables.until, keys))
    for decoding, name, windows in (
        (RANKING, "history", tables.test["history"]),
        (RANKING_SHOWN, "prompt", shown),
    ):
        lists["popularity", decoding, name] = popularity.recommend(windows, tables.top_k)
    seconds["popularity"] = perf_counter() - started

    for stage in _TUNED:
        started = perf_counter()
        events = tables.events()
        records.append(fit_record(stage, events, tables.until, keys))
        tuned[stage] = tune(tables, _candidates(tables, stage, events))
        seconds[stage] = perf_counter() - started
        for name, best in tuned[stage].items():
            lists[stage, RANKING, name] = best.lists
            say(
                f"{stage} ({name}): {best.values}, validation NDCG {best.validation_ndcg:.4f}, "
                f"{seconds[stage]:.1f} s"
            )

    started = perf_counter()
    values = {name: best.values for name, best in tuned["itemknn"].items()}
    for place, answers, fits in _causal(tables, values):
        lists[place] = answers
        records += fits
    seconds["causal"] = perf_counter() - started

    title_of = dict(zip(movies["movie_id"].tolist(), movies["title"].tolist(), strict=True))
    frames = [
        recommended_frame(
            tables.test[name],
            answers,
            tables.seen,
            title_of,
            stage=stage,
            decoding=decoding,
            information_set=name,
            top_k=tables.top_k,
            prompts_version=prompts_version,
            answer_version=baselines_version(recipe.baselines),
        )
        for (stage, decoding, name), answers in sorted(lists.items())
    ]
    frame = pd.concat(frames, ignore_index=True) if keys else recommendation_frame([])
    return ClassicalLists(
        frame, _facts(tuned, records, seconds), _problems(tables, frame, records, shown)
    )


def ease_candidates(
    prompts: pd.DataFrame,
    user_splits: pd.DataFrame,
    ratings: pd.DataFrame,
    movies: pd.DataFrame,
    recipe: Recipe,
    *,
    seed: int,
) -> Proposal:
    """The unseen films that EASE ranks first for each test prompt, told what the prompt shows:
    fitted and tuned as its row ``prompt`` of ``classical_lists`` is, only the lists are longer.

    Args: as ``classical_lists``; of the recipe also ``generation.candidates_per_prompt``.
    """
    surroundings.use_models()
    name, length = "prompt", recipe.generation.candidates_per_prompt
    tables = Tables(prompts, user_splits, ratings, movies, recipe, seed)
    windows = tables.test[name]
    events = tables.events()
    record = fit_record("ease", events, tables.until, [window.key for window in windows])
    best = tune(tables, _candidates(tables, "ease", events), (name,), length)[name]
    frame = recommended_frame(
        windows,
        best.lists,
        tables.seen,
        {},
        stage="ease",
        decoding=RANKING,
        information_set=name,
        top_k=length,
        prompts_version="",
    )
    films = {window.key: frozenset(own) for window, own in zip(windows, best.lists, strict=True)}
    fit = {
        "stage": record.stage,
        "information_set": name,
        "values": best.values,
        "until": record.until,
        "events_hash": record.events_hash,
    }
    return Proposal(
        Candidates(films, fit),
        best.validation_ndcg,
        [
            *contract_problems(frame, tables.seen, tables.catalogue, length),
            *_fit_problems(tables, [record]),
        ],
    )


def tune(
    tables: Tables,
    candidates: Iterator[tuple[Values, Recommender, Sequence[str]]],
    information_sets: Sequence[str] = INFORMATION_SETS,
    length: int | None = None,
) -> dict[str, Tuned]:
    """The best candidate of each information set by validation NDCG@k.

    Args:
        candidates: (values, recommender, information sets it is a candidate for); one may be the
            same object as the one before, trained further, so its lists are taken at once.
        length: of the test windows' lists; default: k.
    """
    best: dict[str, Tuned] = {}
    for values, recommender, names in candidates:
        for name in names:
            if name not in information_sets:
                continue
            score = tables.validation_ndcg(recommender, name)
            if name not in best or score > best[name].validation_ndcg:
                answers = recommender.recommend(tables.test[name], length or tables.top_k)
                best[name] = Tuned(values, score, answers)
    return best


def _candidates(
    tables: Tables, stage: str, events: pd.DataFrame
) -> Iterator[tuple[Values, Recommender, Sequence[str]]]:
    catalogue = tables.ranking(events)
    if stage == "sasrec":
        recipe = tables.recipe.baselines.sasrec
        sasrec = SasRecScorer(events, catalogue, recipe, tables.liked_min, tables.seed)
        for steps in range(recipe.eval_steps, recipe.steps + 1, recipe.eval_steps):
            sasrec.train(recipe.eval_steps)
            yield {"steps": steps}, ScoredRecommender(sasrec, catalogue), INFORMATION_SETS
        return
    grid: Values = getattr(tables.recipe.baselines, stage).model_dump()
    lasts = grid.pop("last")
    axes = [value if isinstance(value, tuple) else (value,) for value in grid.values()]
    for point in product(*axes):
        values = dict(zip(grid, point, strict=True))
        scorer = _fit(tables, stage, values, events, catalogue)
        told = set()
        for last in sorted(lasts):
            # a prompt shows few films: beyond them every ``last`` asks with all of them
            of_prompt = min(last, tables.recipe.windows.window_size)
            names = ("history",) if of_prompt in told else INFORMATION_SETS
            told.add(of_prompt)
            yield {**values, "last": last}, _asked_with(scorer, last, catalogue), names


def _fit(
    tables: Tables,
    stage: str,
    values: Mapping[str, Any],
    events: pd.DataFrame,
    catalogue: Sequence[int],
) -> LensKitScorer:
    options = {name: v for name, v in values.items() if name not in ("feedback", "last")}
    return LensKitScorer(
        component(stage, options),
        events,
        catalogue,
        only_liked=values["feedback"] == "liked",
        liked_min=tables.liked_min,
        seed=tables.seed,
    )


def _asked_with(scorer: LensKitScorer, last: int, catalogue: Sequence[int]) -> Recommender:
    return ScoredRecommender(scorer.using(last), catalogue)


def _causal(
    tables: Tables, values: Mapping[str, Values]
) -> Iterator[tuple[tuple[str, str, str], list[list[int]], list[FitRecord]]]:
    """(list key, answers, records) of the variants that are fitted on the past alone.

    Args:
        values: ItemKNN's by information set.
    """
    cutoffs = [window.cutoff_timestamp for window in tables.test["history"]]
    grid = time_grid(cutoffs, tables.recipe.baselines.causal_grid_points)
    answers: dict[tuple[str, str, str], dict[Key, list[int]]] = {}
    records: dict[tuple[str, str, str], list[FitRecord]] = {}
    for until in grid:
        events = tables.events(until)
        ranking = tables.ranking(events)
        recommenders: list[tuple[str, str, Recommender]] = [
            ("popularity", "history", Popularity(ranking))
        ]
        for name in INFORMATION_SETS:
            scorer = _fit(tables, "itemknn", values[name], events, ranking)
            recommenders.append(
                ("itemknn", name, _asked_with(scorer, values[name]["last"], ranking))
            )
        for stage, name, recommender in recommenders:
            place = (stage + _CAUSAL, RANKING, name)
            windows = [
                w for w in tables.test[name] if grid_point(grid, w.cutoff_timestamp) == until
            ]
            films = recommender.recommend(windows, tables.top_k)
            answers.setdefault(place, {}).update(
                (window.key, own) for window, own in zip(windows, films, strict=True)
            )
            records.setdefault(place, []).append(
                fit_record(place[0], events, until, [window.key for window in windows])
            )
    for place, own in answers.items():
        yield place, [own[window.key] for window in tables.test[place[2]]], records[place]


def _facts(
    tuned: Mapping[str, Mapping[str, Tuned]],
    records: Sequence[FitRecord],
    seconds: Mapping[str, float],
) -> dict[str, Any]:
    return {
        "chosen": {
            f"{stage} ({name})": {**best.values, "validation_ndcg": round(best.validation_ndcg, 6)}
            for stage, by_set in tuned.items()
            for name, best in by_set.items()
        },
        "fits": [
            {
                "stage": record.stage,
                "until": record.until,
                "users": len(record.user_ids),
                "events": record.n_events,
                "events_hash": record.events_hash,
                "windows": len(record.answered),
            }
            for record in records
        ],
        "seconds": {stage: round(spent, 1) for stage, spent in seconds.items()},
    }


def _problems(
    tables: Tables,
    frame: pd.DataFrame,
    records: Sequence[FitRecord],
    shown: Sequence[Window],
) -> dict[str, list[str]]:
    """What the blocking checks of ``baseline_recommendations`` find."""
    knows_only_the_prompt = frame["decoding"] == RANKING_SHOWN
    hidden = {window.key: window.hidden for window in shown}
    return {
        "keeps_the_contract": [
            *contract_problems(
                frame[~knows_only_the_prompt], tables.seen, tables.catalogue, tables.top_k
            ),
            *contract_problems(
                frame[knows_only_the_prompt], hidden, tables.catalogue, tables.top_k
            ),
        ],
        "fitted_on_training_users_only": _fit_problems(tables, records),
    }


def _fit_problems(tables: Tables, records: Sequence[FitRecord]) -> list[str]:
    return fit_problems(
        records,
        tables.tuned_on,
        tables.ratings,
        tables.user_splits,
        tables.movies,
        {window.key: window.cutoff_timestamp for window in tables.test["history"]},
    )
