"""From recommendation lists to the metric table.

What belongs here: metrics per window and the table of means with intervals. What does not: the
metrics' definitions (``metrics``), the bootstrap (``intervals``), and the lists themselves
(``recommendations``, ``baselines``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from llmrec_assets.ground.comparisons import PREDECESSORS
from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.intervals import bootstrap_means
from llmrec_assets.ground.metrics import ideal_dcg
from llmrec_assets.ground.recipes import EvaluationRecipe
from llmrec_assets.ground.recommendations import (
    LIST_KEY,
    WINDOW_KEY,
    canonical_ids,
    stage_key,
    typed,
)
from llmrec_assets.ground.schemas import METRIC_TABLE, USER_METRICS

_METRICS = ["ndcg", "precision", "recall"]
_VERSIONS = ["prompts_version", "recommendations_version", "checkpoint_version", "answer_version"]


def user_metrics(
    recommendations: pd.DataFrame,
    prompts: pd.DataFrame,
    movies: pd.DataFrame,
    protocol: str = "user-split",
) -> pd.DataFrame:
    """NDCG@k, Precision@k, Recall@k and slot counts per window and recommender (paper §4.1).

    The same numbers as ``metrics`` gives window by window, computed on whole columns.

    Args:
        recommendations: ``RECOMMENDATIONS`` of one or several recommenders, with the version of
            the table they stand in as ``recommendations_version`` (``stages.current_stages``).
        prompts: ``PROMPTS``, for the ground truth; it may hold more windows.
        movies: ``MOVIES``; ground truth is made canonical with it.
        protocol: name of the evaluation protocol.

    Returns:
        ``USER_METRICS``, ordered by (stage, decoding, information set, user, window).

    Raises:
        DataError: a window has not exactly the slots 1 to k, a recommender answered other
            windows than the first, or a window has no prompt.
    """
    if recommendations.empty:
        return typed(pd.DataFrame(columns=USER_METRICS.names), USER_METRICS)
    k = int(recommendations["rank"].max())
    lists = _lists(recommendations, k)
    first = recommendations[[*LIST_KEY, *WINDOW_KEY, *_VERSIONS]].iloc[lists[:, 0]]
    table = first.reset_index(drop=True)
    truth = _ground_truth(prompts, canonical_ids(movies))
    asked = truth.windows.get_indexer(pd.MultiIndex.from_frame(table[WINDOW_KEY]))
    if (asked < 0).any():
        lost = table.iloc[int((asked < 0).argmax())]
        raise DataError(
            f"recommendations: user {lost['user_id']}, window {lost['window_index']} has no "
            "prompt: materialize the recommendations again, from these prompts"
        )

    # absent ids are -1, which is no movie id of any source
    films = recommendations["movie_id"].astype("Int32").fillna(-1).to_numpy(dtype=np.int64)[lists]
    duplicate, seen = (
        recommendations[name].to_numpy(dtype=bool)[lists] for name in ("is_duplicate", "is_seen")
    )
    hits = _relevant(films, truth.films[asked]) & ~duplicate & ~seen
    table["hits"] = hits.sum(axis=1)
    table["n_parsed"] = recommendations["text"].notna().to_numpy()[lists].sum(axis=1)
    table["n_in_catalogue"] = (films >= 0).sum(axis=1)
    table["n_duplicate"], table["n_seen"] = duplicate.sum(axis=1), seen.sum(axis=1)
    table["n_ground_truth"] = truth.size[asked]
    ideal = {n: ideal_dcg(k, n) for n in table["n_ground_truth"].unique()}
    table["ndcg"] = _dcg(hits) / table["n_ground_truth"].map(ideal)
    table["precision"] = table["hits"] / k
    table["recall"] = table["hits"] / table["n_ground_truth"]
    table["protocol"] = protocol
    return typed(table, USER_METRICS)


def _lists(recommendations: pd.DataFrame, k: int) -> NDArray[np.int64]:
    """[n_lists, k], where the slots of each list stand, by (list, window) and rank.

    Raises:
        DataError: lists are not of k slots or of one version, or rows answered different windows.
    """
    rank = recommendations["rank"].to_numpy(dtype=np.int64)
    if _are_blocks(recommendations, rank, k):
        list_, n_lists = _list_codes(recommendations, every=k)
        order = np.argsort(list_, kind="stable")
        if not np.array_equal(list_[order], np.arange(n_lists)):
            raise _odd_lists(recommendations, k)
        return order[:, None] * k + np.arange(k)
    list_, n_lists = _list_codes(recommendations)
    slot = list_ * (k + 1) + rank
    order = np.argsort(slot, kind="stable")
    # every row, every window, every rank once: whatever lacks or repeats one is told below
    whole = (np.arange(n_lists)[:, None] * (k + 1) + np.arange(1, k + 1)).ravel()
    if not np.array_equal(slot[order], whole):
        raise _odd_lists(recommendations, k)
    lists = order.reshape(-1, k)
    for name in _VERSIONS:
        code = pd.factorize(recommendations[name])[0][lists]
        mixed = (code != code[:, :1]).any(axis=1)
        if mixed.any():
            odd = recommendations.iloc[lists[mixed.argmax(), 0]]
            raise DataError(
                f"recommendations: {odd['stage']}, user {odd['user_id']}, window "
                f"{odd['window_index']} has slots of more than one {name}: materialize these "
                "recommendations again"
            )
    return lists


def _are_blocks(recommendations: pd.DataFrame, rank: NDArray[np.int64], k: int) -> bool:
    """Whether every k rows are the slots 1 to k of one list and one version, as they are written.

    Then keys are read from one row in k; looking rows up by their text takes most of the time.
    """
    if len(rank) % k or (rank.reshape(-1, k) != np.arange(1, k + 1)).any():
        return False
    for name in (*WINDOW_KEY, *LIST_KEY, *_VERSIONS):
        column = recommendations[name]
        if name in WINDOW_KEY:
            values = column.to_numpy(dtype=float, na_value=np.nan)  # a missing id equals nothing
        else:
            values = column.to_numpy(dtype=object)
        lists = values.reshape(-1, k)
        try:
            if (lists[:, 1:] != lists[:, :1]).any():
                return False
        except TypeError:  # pandas' NA has no truth value
            return False
    return True


def _list_codes(recommendations: pd.DataFrame, every: int = 1) -> tuple[NDArray[np.int64], int]:
    """The list of each row, or of one row in ``every``, numbered by (list key, window), and how
    many lists there are if all rows of the table answered all windows."""
    row, n_rows = _codes(recommendations, LIST_KEY, every)
    window, n_windows = _codes(recommendations, WINDOW_KEY, every)
    return row * n_windows + window, n_rows * n_windows


def _codes(frame: pd.DataFrame, names: Sequence[str], every: int) -> tuple[NDArray[np.int64], int]:
    """Each row's place among the distinct ones in sorted order, and how many those are."""
    code: NDArray[np.int64] = np.zeros(1, dtype=np.int64)
    for name in names:
        part, values = pd.factorize(frame[name].iloc[::every], sort=True)
        if (part < 0).any():
            raise DataError(
                f"recommendations: row {every * int((part < 0).argmax())} has no {name}: "
                "materialize these recommendations again"
            )
        code = code * len(values) + part
    place, distinct = pd.factorize(code, sort=True)
    return place, len(distinct)


def _relevant(films: NDArray[np.integer], relevant: NDArray[np.int64]) -> NDArray[np.bool_]:
    """[n_lists, k], whether the film stands among its row's ``relevant`` [n_lists, most]."""
    hits = np.zeros(films.shape, dtype=np.bool_)
    for column in relevant.T:
        hits |= films == column[:, None]
    return hits


def _dcg(hits: NDArray[np.bool_]) -> NDArray[np.float64]:
    """[n_lists], the discounted gains summed by rank.

    With compensation (Kahan, 1965), as pandas sums groups: so a table has the last bits, and the
    version, that it had when pandas summed it.
    """
    total, lost = np.zeros(len(hits)), np.zeros(len(hits))
    for rank, hit in enumerate(hits.T, start=1):
        gain = np.where(hit, 1 / np.log2(rank + 1.0), 0.0) - lost
        grown = total + gain
        lost = grown - total - gain
        total = grown
    return total


@dataclass(frozen=True)
class _GroundTruth:
    """The canonical ground truth films of every window, each once."""

    windows: pd.MultiIndex
    """``WINDOW_KEY``"""
    films: NDArray[np.int64]
    """[n_windows, most films], filled up with 0, which is no movie id"""
    size: NDArray[np.int64]
    """[n_windows], how many films"""


def _ground_truth(prompts: pd.DataFrame, film_of: Mapping[int, int]) -> _GroundTruth:
    wanted: dict[tuple[int, int], dict[int, None]] = {}
    columns = (prompts[name].tolist() for name in (*WINDOW_KEY, "ground_truth_movie_ids"))
    for user_id, window_index, movie_ids in zip(*columns, strict=True):
        films = dict.fromkeys([film_of.get(i, i) for i in np.asarray(movie_ids).tolist()])
        wanted.setdefault((user_id, window_index), {}).update(films)
    size = np.array([len(films) for films in wanted.values()], dtype=np.int64)
    table = np.zeros((len(wanted), size.max(initial=0)), dtype=np.int64)
    filled = np.arange(table.shape[1]) < size[:, None]
    table[filled] = [film for films in wanted.values() for film in films]
    keys = np.array(list(wanted), dtype=np.int64).reshape(-1, len(WINDOW_KEY))
    return _GroundTruth(pd.MultiIndex.from_arrays(list(keys.T), names=WINDOW_KEY), table, size)


def _odd_lists(slot: pd.DataFrame, k: int) -> DataError:
    """Which list is not k slots, or which rows answered different windows."""
    lists = (
        slot.groupby([*LIST_KEY, *WINDOW_KEY])["rank"].agg(["size", "nunique", "min"]).reset_index()
    )
    # k distinct ranks from 1 up to at most k: those are 1 … k
    bad = lists[(lists["size"] != k) | (lists["nunique"] != k) | (lists["min"] != 1)]
    if len(bad):
        row = bad.iloc[0]
        return DataError(
            f"recommendations: {row['stage']}, user {row['user_id']}, window "
            f"{row['window_index']} has {row['size']} slots, expected ranks 1 to {k} once each: "
            "materialize these recommendations again"
        )
    keys = {
        ", ".join(map(str, name)): set(
            zip(rows["user_id"].tolist(), rows["window_index"].tolist(), strict=True)
        )
        for name, rows in lists.groupby(LIST_KEY)
    }
    (first, wanted), *others = keys.items()
    label, given = next(((name, given) for name, given in others if given != wanted), others[0])
    return DataError(
        f"recommendations: ({label}) and ({first}) answered different windows "
        f"({len(given - wanted)} and {len(wanted - given)} only there): materialize "
        "both again, from the same prompts"
    )


def metric_table(
    user_metrics: pd.DataFrame,
    recipe: EvaluationRecipe,
    seed: int,
    top_k: int,
    versus: Mapping[str, str] | None = None,
    comparisons: pd.DataFrame | None = None,
) -> pd.DataFrame:
    """Means over test users with intervals, one row per recommender.

    A user's windows are averaged first, then users, so a user with many windows weighs no more
    than another. All rows of a protocol share the bootstrap's draws of users.

    Args:
        user_metrics: ``USER_METRICS``.
        recipe: resamples and confidence of the intervals.
        seed: seed of the resamples.
        top_k: slots per window.
        versus: the stage each stage is compared to, within one protocol, decoding and
            information set; where that row does not exist the difference is NULL. Default:
            ``sft`` to ``base``, ``dpo`` and ``rlhf`` to ``sft``.
        comparisons: ``COMPARISONS`` of these metrics, for the p-values of the differences;
            ``None``: they are NULL.

    Returns:
        ``METRIC_TABLE``: ``base``, ``sft``, ``dpo``, ``rlhf``, then others by name.

    Raises:
        DataError: stages answered different prompts or other users, or were decoded or grounded
            in different ways.
    """
    versus = PREDECESSORS if versus is None else versus
    _require_one_prompts_version(user_metrics)
    _require_answered_alike(user_metrics)
    rows: list[dict[str, object]] = []
    for protocol, metrics in user_metrics.groupby("protocol", sort=True):
        rows += _protocol_rows(str(protocol), metrics, recipe, seed, versus)
    p_values = ["ndcg_difference_p", "ndcg_difference_p_holm"]
    table = pd.DataFrame(rows, columns=[n for n in METRIC_TABLE.names if n not in ("k", *p_values)])
    table["k"] = top_k
    table[p_values] = _p_values(table, comparisons)
    for name in ("parsable", "in_catalogue", "duplicate", "seen"):
        table[name] = table[name].astype("float64") / top_k
    return typed(table, METRIC_TABLE)


def _protocol_rows(
    protocol: str,
    metrics: pd.DataFrame,
    recipe: EvaluationRecipe,
    seed: int,
    versus: Mapping[str, str],
) -> list[dict[str, object]]:
    lists = {tuple(map(str, name)): rows for name, rows in metrics.groupby(LIST_KEY)}
    names = sorted(lists, key=lambda name: (*stage_key(name[0]), *name[1:]))
    by_user = {name: lists[name].groupby("user_id")[_METRICS].mean() for name in names}
    users = by_user[names[0]].index
    for name in names:
        if not by_user[name].index.equals(users):
            raise DataError(
                f"user_metrics: {name[0]} and {names[0][0]} were scored on different users: "
                "materialize their recommendations again, from the same prompts"
            )
    partner = {name: (versus[name[0]], *name[1:]) for name in names if name[0] in versus}
    paired = [name for name in names if partner.get(name) in by_user]
    columns = [by_user[name].to_numpy() for name in names]
    columns += [
        (by_user[name]["ndcg"] - by_user[partner[name]]["ndcg"]).to_numpy()[:, None]
        for name in paired
    ]
    n_means = len(names) * len(_METRICS)
    signed = np.arange(n_means + len(paired)) >= n_means
    estimates = np.stack(
        bootstrap_means(np.hstack(columns), recipe.resamples, seed, recipe.confidence, signed)
    ).T.tolist()

    rows = []
    for position, name in enumerate(names):
        mine = lists[name]
        row: dict[str, object] = {
            "protocol": protocol,
            **dict(zip(LIST_KEY, name, strict=True)),
            "n_users": len(users),
            "n_windows": len(mine),
            "hits": int(mine["hits"].sum()),
            # per window here, per slot once divided by k
            "parsable": mine["n_parsed"].mean(),
            "in_catalogue": mine["n_in_catalogue"].mean(),
            "duplicate": mine["n_duplicate"].mean(),
            "seen": mine["n_seen"].mean(),
            "versus": partner[name][0] if name in paired else None,
            **{column: mine[column].iloc[0] for column in _VERSIONS},
        }
        for offset, metric in enumerate(_METRICS):
            row |= _interval(metric, estimates[position * len(_METRICS) + offset])
        if name in paired:
            row |= _interval("ndcg_difference", estimates[n_means + paired.index(name)])
        rows.append(row)
    return rows


def _p_values(table: pd.DataFrame, comparisons: pd.DataFrame | None) -> np.ndarray:
    """[n_rows, 2], p and Holm p of every row's difference to ``versus``; NaN where it has none."""
    if comparisons is None:
        return np.full((len(table), 2), np.nan)
    before = comparisons[comparisons["reason"] == "predecessor"]
    key = ["protocol", *LIST_KEY, "versus"]
    before = before.rename(columns={"versus_stage": "versus"})[[*key, "p", "p_holm"]]
    return table[key].merge(before, on=key, how="left")[["p", "p_holm"]].to_numpy(dtype="float64")


def _interval(name: str, estimate: Sequence[float]) -> dict[str, object]:
    return dict(zip((name, f"{name}_low", f"{name}_high"), estimate, strict=True))


def _require_one_prompts_version(user_metrics: pd.DataFrame) -> None:
    answered = user_metrics[["stage", "prompts_version"]].drop_duplicates()
    if answered["prompts_version"].nunique() > 1:
        told = ", ".join(
            f"{stage} {version}" for stage, version in sorted(answered.itertuples(index=False))
        )
        raise DataError(
            f"metric_table: stages answered different versions of the prompts ({told}): "
            "materialize the older responses again"
        )


def _require_answered_alike(user_metrics: pd.DataFrame) -> None:
    """A recipe edited between two stages would compare temperatures, not stages."""
    answered = user_metrics[["stage", "decoding", "answer_version"]].dropna().drop_duplicates()
    for decoding, lists in answered.groupby("decoding"):
        if lists["answer_version"].nunique() > 1:
            told = ", ".join(
                f"{stage} {version}"
                for stage, version in sorted(
                    zip(lists["stage"].tolist(), lists["answer_version"].tolist(), strict=True)
                )
            )
            raise DataError(
                f"metric_table: the {decoding} lists were not decoded, seeded and grounded alike "
                f"({told}): materialize the older responses and recommendations again"
            )
