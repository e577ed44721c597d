"""Leave-last-out with full ranking, the protocol of the sequential-recommendation literature.

What belongs here: the split, the rank of one target among all films, HR@k and NDCG@k, and the
table of any set of scorers. What does not: the scorers themselves (``models.leave_last_out``),
and the protocols of the LLM's windows (``splits``, ``windows``, ``evaluation``).

Per user the last film is the test target, the last but one the validation target, the rest is
training (Kang & McAuley, "Self-Attentive Sequential Recommendation", ICDM 2018). Feedback is
implicit: every rating is an interaction. Every film the user has not met is ranked, none is
sampled (Krichene & Rendle, "On Sampled Metrics for Item Recommendation", KDD 2020). As in SASRec,
scorers are fitted on training interactions alone; to predict the test target they are shown the
validation film too.

Two limits are the protocol's own. Users are not apart and time is not global: a scorer learns
from other users' later interactions (Ji et al., "A Critical Study on Data Leakage in Recommender
System Offline Evaluation", TOIS 2023). And MovieLens users rated many films at one sitting, so
"next" is often the order of a web page (Woolridge et al., "Sequence or Pseudo-Sequence?", RecSys
2021 workshops). LLM stages are no rows here: their training windows may
hold a user's last film, and a list of k titles ranks no catalogue.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

import duckdb
import numpy as np
import pandas as pd
import pyarrow as pa
from numpy.typing import NDArray

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.intervals import Floats, bootstrap_means
from llmrec_assets.ground.recipes import EvaluationRecipe, LeaveLastOutRecipe
from llmrec_assets.ground.recommendations import typed
from llmrec_assets.ground.schemas import LEAVE_LAST_OUT

Ints = NDArray[np.int64]

#: Users scored at once, which bounds memory at some megabytes.
_USERS_AT_ONCE = 256

# A film rated twice or under two ids is met once, first. Times are shared by many ratings: their
# order is drawn by a hash, as an order by id would favour films by their age in the catalogue.
_HISTORIES = """
WITH met AS (
    SELECT
        r.user_id, coalesce(c.canonical_movie_id, r.movie_id) AS movie_id,
        min(r.timestamp) AS timestamp
    FROM ratings AS r
    LEFT JOIN canonical AS c ON c.movie_id = r.movie_id
    GROUP BY ALL
)
SELECT
    user_id,
    list(movie_id ORDER BY timestamp, md5(user_id || ':' || movie_id), movie_id) AS movie_ids,
    list(timestamp ORDER BY timestamp) AS timestamps
FROM met
GROUP BY user_id
HAVING count(*) >= $min_interactions
ORDER BY user_id
"""


@dataclass(frozen=True)
class LeaveLastOut:
    """The split. Films are positions in ``item_ids``."""

    user_ids: Ints
    """[n_users]"""
    item_ids: Ints
    """[n_items] canonical ids of all films these users met, ascending"""
    histories: tuple[Ints, ...]
    """[n_users] training films of each user, oldest first"""
    validation: Ints
    """[n_users] the last film but one"""
    test: Ints
    """[n_users] the last film"""
    share_tied: float
    """share of users whose last film shares its time with the one before: order drawn by hash"""

    def shown_for_test(self) -> list[Ints]:
        """Histories with the validation film: all that precedes the test target."""
        return [
            np.append(history, target)
            for history, target in zip(self.histories, self.validation, strict=True)
        ]


class Scorer(Protocol):
    """A fitted recommender, of any kind."""

    def __call__(self, histories: Sequence[Ints]) -> Floats:
        """Scores every film for users of whom only the history is known.

        Args:
            histories: [n_users] positions of films, oldest first.

        Returns:
            [n_users, n_items], the higher the better; NaN: no opinion, below every score. Films of
            the history may have any score: they are not ranked.
        """
        ...


@dataclass(frozen=True)
class Candidate:
    """One recommender in one setting. The hook for any other recommender: ``fit`` takes the
    training histories and the number of films, and may look at nothing else."""

    recommender: str
    setting: str
    fit: Callable[[Sequence[Ints], int], Scorer]


def leave_last_out(
    ratings: pd.DataFrame, canonical: pd.DataFrame | None, min_interactions: int = 5
) -> LeaveLastOut:
    """Splits every user's films into training, the last but one and the last.

    Args:
        ratings: ``RATINGS``, in any order.
        canonical: ``movie_id`` and ``canonical_movie_id``; ``None``: every id is its own film.
        min_interactions: users with fewer distinct films are left out altogether; at least 3.

    Raises:
        DataError: no user is left.
        ValueError: ``min_interactions`` leaves nothing to train on.
    """
    if min_interactions < 3:
        raise ValueError(f"min_interactions is {min_interactions}: three films make one split")
    if canonical is None:
        canonical = pd.DataFrame({"movie_id": [], "canonical_movie_id": []}, dtype="int32")
    columns = (["user_id", "movie_id", "timestamp"], ["movie_id", "canonical_movie_id"])
    with duckdb.connect(":memory:", config={"threads": 2}) as connection:
        for name, frame, wanted in zip(
            ("ratings", "canonical"), (ratings, canonical), columns, strict=True
        ):
            connection.register(name, pa.Table.from_pandas(frame[wanted], preserve_index=False))
        found = connection.sql(
            _HISTORIES, params={"min_interactions": min_interactions}
        ).to_arrow_table()
    if found.num_rows == 0:
        raise DataError(
            f"leave_last_out: no user has {min_interactions} ratings: materialize ratings again, "
            "or lower leave_last_out.min_interactions in the recipe"
        )
    films = [np.array(row, dtype=np.int64) for row in found["movie_ids"].to_pylist()]
    item_ids = np.unique(np.concatenate(films))
    positions = [np.searchsorted(item_ids, row) for row in films]
    return LeaveLastOut(
        user_ids=found["user_id"].to_numpy().astype(np.int64),
        item_ids=item_ids,
        histories=tuple(row[:-2] for row in positions),
        validation=np.array([row[-2] for row in positions]),
        test=np.array([row[-1] for row in positions]),
        share_tied=float(np.mean([row[-1] == row[-2] for row in found["timestamps"].to_pylist()])),
    )


def target_ranks(scores: Floats, targets: Ints, known: Sequence[Ints]) -> tuple[Ints, Ints]:
    """Where each user's target stands among all films the user has not met.

    Args:
        scores: [n_users, n_items]; NaN stands below every number.
        targets: [n_users] position of the target.
        known: [n_users] positions of films that are not ranked; never the target.

    Returns:
        [n_users] films with a higher score than the target, and [n_users] other films with the
        same score.

    Raises:
        ValueError: a target is among the known films.
    """
    scores = np.where(np.isnan(scores), -np.inf, scores)
    ranked = np.ones(scores.shape, dtype=bool)
    for row, films in enumerate(known):
        ranked[row, films] = False
    rows = np.arange(len(targets))
    if not ranked[rows, targets].all():
        raise ValueError("a target is among the films its user already knows")
    of_target = scores[rows, targets][:, None]
    better = (ranked & (scores > of_target)).sum(axis=1)
    tied = (ranked & (scores == of_target)).sum(axis=1) - 1
    return better, tied


def expected_hit_rate(better: Ints, tied: Ints, k: int) -> Floats:
    """HR@k per user, in [0, 1]: the chance that the target is among the first k.

    Equal scores are in no order, so the mean over all their orders is taken, in closed form
    (McSherry & Najork, "Computing Information Retrieval Performance Measures Efficiently in the
    Presence of Tied Scores", ECIR 2008): a constant scorer hits k times in n_items, and neither
    the order of ids nor a seed matters.

    >>> expected_hit_rate(np.array([4, 4, 5]), np.array([0, 3, 0]), k=5).tolist()
    [1.0, 0.25, 0.0]
    """
    return np.clip(k - better, 0, tied + 1) / (tied + 1)


def expected_ndcg(better: Ints, tied: Ints, k: int) -> Floats:
    """NDCG@k per user, in [0, 1]: 1 / log2(rank + 1) of the only relevant film, 0 beyond rank k.
    Equal scores as in ``expected_hit_rate``.

    >>> expected_ndcg(np.array([0, 2, 0]), np.array([0, 0, 1]), k=2).round(4).tolist()
    [1.0, 0.0, 0.8155]
    """
    discounts = np.concatenate([[0.0], np.cumsum(1 / np.log2(np.arange(k) + 2.0))])
    first, last = np.minimum(better, k), np.minimum(better + tied + 1, k)
    return (discounts[last] - discounts[first]) / (tied + 1)


@dataclass(frozen=True)
class LeaveLastOutResult:
    """``LEAVE_LAST_OUT`` and, per recommender, what the run found out."""

    frame: pd.DataFrame
    seconds: dict[str, float]
    """fitting, validating and testing, over all settings"""
    validation_ndcg: dict[str, dict[str, float]]
    """by setting, at the largest k"""


def leave_last_out_table(
    split: LeaveLastOut,
    candidates: Sequence[Candidate],
    recipe: LeaveLastOutRecipe,
    evaluation: EvaluationRecipe,
    seed: int,
) -> LeaveLastOutResult:
    """Fits every candidate, keeps each recommender's best setting, ranks the test targets.

    The setting is chosen by NDCG at the largest k on the validation targets; the first among
    equals. Intervals: bootstrap over users, the same draws for all recommenders.
    """
    k_chosen = max(recipe.ks)
    seconds: dict[str, float] = {}
    found: dict[str, dict[str, float]] = {}
    best: dict[str, tuple[float, str, Scorer]] = {}
    for candidate in candidates:
        started, name = time.monotonic(), candidate.recommender
        scorer = candidate.fit(split.histories, len(split.item_ids))
        better, tied = _ranks(scorer, split.histories, split.validation)
        score = float(expected_ndcg(better, tied, k_chosen).mean())
        found.setdefault(name, {})[candidate.setting] = score
        if name not in best or score > best[name][0]:
            best[name] = (score, candidate.setting, scorer)
        seconds[name] = seconds.get(name, 0.0) + time.monotonic() - started

    keys, columns = [], []
    for name, (_, setting, scorer) in best.items():
        started = time.monotonic()
        better, tied = _ranks(scorer, split.shown_for_test(), split.test)
        seconds[name] += time.monotonic() - started
        for k in sorted(recipe.ks):
            keys.append((name, setting, k))
            columns += [expected_hit_rate(better, tied, k), expected_ndcg(better, tied, k)]
    rows = []
    if keys:
        estimates = np.stack(
            bootstrap_means(
                np.stack(columns, axis=1), evaluation.resamples, seed, evaluation.confidence
            )
        ).T
        for (name, setting, k), (hr, ndcg) in zip(keys, estimates.reshape(-1, 2, 3), strict=True):
            rows.append((name, setting, k, len(split.test), len(split.item_ids), *hr, *ndcg))
    frame = typed(pd.DataFrame(rows, columns=LEAVE_LAST_OUT.names), LEAVE_LAST_OUT)
    return LeaveLastOutResult(frame, seconds, found)


def _ranks(scorer: Scorer, known: Sequence[Ints], targets: Ints) -> tuple[Ints, Ints]:
    """``target_ranks`` of all users, chunk by chunk."""
    found = [
        target_ranks(scorer(known[rows]), targets[rows], known[rows])
        for rows in _chunks(len(targets))
    ]
    better, tied = (np.concatenate(part) for part in zip(*found, strict=True))
    return better, tied


def _chunks(n: int) -> Iterator[slice]:
    for start in range(0, n, _USERS_AT_ONCE):
        yield slice(start, start + _USERS_AT_ONCE)
