"""Recommendations by a champion, for histories that stand in no window.

What belongs here: histories in, ranked films with scores and reasons out. What does not: reading
histories (``ground.histories``), finding the champion and the device (``llmrec_assets.recommend``).
"""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pandas as pd

from llmrec_assets.ground.answers import ground_responses
from llmrec_assets.ground.champion import read_served
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.histories import Histories
from llmrec_assets.ground.reasons import Reasons
from llmrec_assets.ground.recommendations import WINDOW_KEY, canonical_ids
from llmrec_assets.ground.serving import serving_prompts
from llmrec_assets.models.answers import answer_prompts
from llmrec_assets.models.champion import load_champion
from llmrec_assets.models.device import Device
from llmrec_assets.models.progress import Progress, silent

#: Columns of the answer.
COLUMNS = ["user", "rank", "movie_id", "title", "score", "reason"]


def recommend_films(
    directory: Path,
    histories: Histories,
    ratings: pd.DataFrame,
    *,
    k: int,
    device: Device,
    progress: Progress = silent,
) -> pd.DataFrame:
    """At most ``k`` unseen films for every user, best first.

    The prompt is that of a window which ends with the user's last rating. Exactly k films under
    ``ranked`` and ``constrained``; free text may name fewer that exist and are unseen.

    Args:
        directory: a champion's.
        histories: who asks.
        ratings: ``RATINGS`` of the data set, for the reasons.

    Returns:
        ``COLUMNS``, users in the order of ``histories.labels``. ``score``: natural logarithm of
        P(title | prompt) under ``ranked``, NaN under the other decodings.

    Raises:
        DataError: a list of k cannot be given; names why and how many can.
    """
    served, catalogue = read_served(directory)
    own = served.windows.top_k
    if k < 1:
        raise DataError(f"a list of {k} films says nothing: ask for at least 1")
    if k > own and served.decoding != "ranked":
        raise DataError(
            f"the champion writes lists of {own} (decoding {served.decoding}): ask for 1 to {own}"
        )
    _require_films(histories, catalogue, k)
    latest = histories.ratings.groupby("user_id")["timestamp"].max()
    asked = pd.DataFrame({"user_id": list(histories.labels), "window_index": 0})
    asked["cutoff_timestamp"] = asked["user_id"].map(latest)
    prompts = serving_prompts(asked, histories.ratings, histories.users, catalogue, served)
    # The first of several titles, as in training, also where one is wanted: alone, it would be
    # scored with the list's end behind it.
    length = max(k, min(own, 2)) if served.decoding == "ranked" else own
    recipe = served.generation_for(length)
    answers = answer_prompts(
        prompts,
        histories.ratings,
        catalogue,
        partial(load_champion, directory),
        recipe,
        stage=served.stage,
        checkpoint_version=directory.name,
        prompts_version="",
        answer_versions=dict.fromkeys(recipe.decodings, ""),
        top_k=length,
        seed=served.seed,
        device=device,
        progress=progress,
    )
    lists = ground_responses(
        answers.frame, prompts, histories.ratings, catalogue, served.grounding, length
    )
    keys = map(tuple, answers.frame[WINDOW_KEY].to_numpy().tolist())
    scores_of = dict(zip(keys, answers.log_probabilities, strict=True))
    title_of = dict(zip(catalogue["movie_id"], catalogue["title"].str.strip(), strict=True))
    reasons = Reasons(ratings, catalogue, served.windows.liked_min)
    history_of = {int(str(u)): rows for u, rows in histories.ratings.groupby("user_id")}
    rows: list[tuple] = []
    for user, label in histories.labels.items():
        slots = lists[lists["user_id"] == user]
        valid = slots[slots["movie_id"].notna() & ~slots["is_duplicate"] & ~slots["is_seen"]]
        scores = scores_of[user, 0]
        for rank, slot in enumerate(valid.head(k).to_dict("records"), start=1):
            film = int(slot["movie_id"])
            score = scores[slot["rank"] - 1] if scores else float("nan")
            asking = user if histories.of_data_set else None
            reason = reasons.reason(film, history_of[user], asking)
            rows.append((label, rank, film, title_of[film], score, reason))
    return pd.DataFrame(rows, columns=COLUMNS)


def _require_films(histories: Histories, catalogue: pd.DataFrame, k: int) -> None:
    film_of = canonical_ids(catalogue)
    films = set(film_of.values())
    for user, rows in histories.ratings.groupby("user_id"):
        left = len(films - {film_of.get(i, i) for i in rows["movie_id"].tolist()})
        if left < k:
            raise DataError(
                f"user {histories.labels[int(str(user))]} has rated all but {left} of the "
                f"{len(films):,} films there are: ask for at most {left}"
            )
