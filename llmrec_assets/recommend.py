"""Recommendations from a data set's champion: the function behind ``llmrec recommend``.

    from llmrec_assets.recommend import recommend

    recommend("ml-100k", users=[7]).frame

What belongs here: finding the champion, the data set's tables and the device. What does not: the
answer itself (``models.recommend``), printing it (``cli``).
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from llmrec_assets.ground.champion import read_served
from llmrec_assets.ground.errors import DataError, RecipeError
from llmrec_assets.ground.histories import known_histories, read_histories
from llmrec_assets.ground.stages import CHAMPION
from llmrec_assets.orchestration.partitions import DATASETS
from llmrec_assets.orchestration.resources import GpuResource, StoreResource

_LOG = logging.getLogger("llmrec")

#: What a score is, by decoding.
_SCORES = {
    "ranked": "natural logarithm of the probability that the champion names this title first, "
    "given the user's history; higher is better; comparable within one user only",
    "constrained": "none: the list is drawn, not scored",
    "free": "none: the list is written, not scored",
}


@dataclass(frozen=True)
class Recommendations:
    """``frame``: user, rank, movie_id, title, score, reason. ``champion``: the version that
    answered, ``score``: what its scores are, ``reason``: what its reasons are."""

    frame: pd.DataFrame
    champion: str
    score: str
    reason: str = (
        "counted from the data set's ratings and genres, not said by the model: the liked film of "
        "the user's own history that this one is most like"
    )


def recommend(
    dataset: str,
    *,
    users: Sequence[int] | None = None,
    file: Path | None = None,
    k: int = 5,
    storage: StoreResource | None = None,
    gpu: GpuResource | None = None,
) -> Recommendations:
    """At most ``k`` films for each user, none of them rated by the user, best first.

    Waits for the device while a training has it.

    Args:
        users: users of the data set, asked about with all their current ratings; or
        file: a file of users or of histories (``ground.histories``).
        storage: where everything is kept; default: ``LLMREC_HOME``.
        gpu: the device; default: the best at hand.

    Raises:
        RecipeError: no such data set.
        DataError: an unknown user or film, an empty history, a ``k`` that cannot be had.
        StoreError: the data set has no champion, or the champion is damaged.
    """
    if dataset not in DATASETS:
        raise RecipeError(f"no data set named {dataset!r}: known are {', '.join(DATASETS)}")
    if (users is None) == (file is None):
        raise DataError("name either users of the data set or a file")
    store = (storage or StoreResource()).store()
    if store.current(CHAMPION, dataset, kind="checkpoints") is None:
        raise DataError(
            f"{dataset} has no champion yet: run a recipe (`llmrec run --dataset {dataset} "
            f"--recipe …`), then crown it (`llmrec promote --dataset {dataset} --recipe …`)"
        )
    directory = store.checkpoint(CHAMPION, dataset)
    served, catalogue = read_served(directory)
    ratings, people = (store.read_table(name, dataset).frame for name in ("ratings", "users"))
    if file is not None:
        histories = read_histories(file, ratings, people, catalogue, dataset)
    else:
        histories = known_histories(users or [], ratings, people, dataset)
    from llmrec_assets.models.recommend import recommend_films

    with (gpu or GpuResource()).lease(_LOG, f"recommend {dataset}") as device:
        frame = recommend_films(directory, histories, ratings, k=k, device=device)
    return Recommendations(frame, directory.name, _SCORES[served.decoding])
