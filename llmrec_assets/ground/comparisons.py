"""Which rows of the metric table are compared, and what the comparison shows.

What belongs here: choosing pairs of rows and the table of their differences. What does not: the
tests themselves (``significance``, ``intervals``), metrics per user (``evaluation``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import pandas as pd

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.intervals import bootstrap_means
from llmrec_assets.ground.recipes import HYBRID, EvaluationRecipe
from llmrec_assets.ground.recommendations import LIST_KEY, STAGE_ORDER, Row, stage_key, typed
from llmrec_assets.ground.recommender import RANKING
from llmrec_assets.ground.schemas import COMPARISONS
from llmrec_assets.ground.significance import holm, sign_flip_p_values, users_needed

#: The stage a stage was trained from.
PREDECESSORS = {"sft": "base", "dpo": "sft", "rlhf": "sft"}
POPULARITY = "popularity"
#: Sign flips drawn for a p-value, whatever the recipe resamples for an interval. The smallest
#: p-value is one over these: ten thousand would leave little of it after Holm's correction over
#: the hundreds of pairs that several protocols have.
FLIPS = 100_000


def comparison_pairs(rows: Sequence[Row], ndcg: Mapping[Row, float]) -> list[tuple[str, Row, Row]]:
    """The comparisons of one protocol as (reason, row, other row), in the order they are told.

    ``predecessor``: a stage to the one it was trained from, under one decoding and information
    set. ``free decoding``: another decoding to the free text of the same stage. ``proposer``: a
    hybrid to the recommender that proposed what it ranks, in that one's own order. ``best
    classical``: every row to the classical one of its information set with the highest estimate.
    ``popularity``: every row to popularity under its information set, and the LLM's also to
    popularity that sees more. The best classical row is picked on the users it is then tested on,
    which favours it: a row shown to beat it beats the others' estimates too.

    Args:
        rows: the rows there are.
        ndcg: their estimates.
    """
    rows = sorted(rows, key=row_key)
    there = set(rows)
    pairs: list[tuple[str, Row, Row]] = []
    for row in rows:
        before = (PREDECESSORS.get(row[0], ""), *row[1:])
        if before in there:
            pairs.append(("predecessor", row, before))
    for row in rows:
        free = [other for other in rows if other[:2] == (row[0], "free") and row[1] != "free"]
        pairs += [("free decoding", row, other) for other in free]
    for row in rows:
        own = ("ease", RANKING, row[2])
        pairs += [("proposer", row, own)] if row[1] == HYBRID and own in there else []
    classical = [row for row in rows if not is_model(row)]
    for row in rows:
        alike = [other for other in classical if other[2] == row[2]]
        best = max(alike, key=lambda other: ndcg[other], default=row)
        pairs += [("best classical", row, best)] if best != row else []
    for row in rows:
        pairs += [
            (POPULARITY, row, other)
            for other in classical
            if other[0] == POPULARITY and other != row and (is_model(row) or other[2] == row[2])
        ]
    return pairs


def comparisons(
    user_metrics: pd.DataFrame, recipe: EvaluationRecipe, seed: int, user_metrics_version: str
) -> pd.DataFrame:
    """Paired NDCG@k differences by user: interval, p-value, Holm's correction, users it takes.

    A user's windows are averaged first. All differences of a protocol share the bootstrap's draws
    of users and the flipped signs. Holm's correction is over all pairs of the table, over all
    protocols; a pair that stands under two reasons, or the other way round, is one.

    Args:
        user_metrics: ``USER_METRICS``.
        recipe: resamples and confidence; the level is 1 - confidence.
        seed: seed of the resamples and of the flips.
        user_metrics_version: their version, which the table names.

    Returns:
        ``COMPARISONS``, ordered by protocol, reason, row.

    Raises:
        DataError: two rows of a protocol were scored on different users.
    """
    level = 1 - recipe.confidence
    parts = []
    for protocol, metrics in user_metrics.groupby("protocol", sort=True):
        scores = user_scores(metrics)
        rows = list(scores)
        pairs = comparison_pairs(rows, {row: float(scores[row].mean()) for row in rows})
        if pairs:
            parts.append(_differences(str(protocol), scores, pairs, recipe, seed))
    if not parts:
        return typed(pd.DataFrame(columns=COMPARISONS.names), COMPARISONS)
    table = pd.concat(parts, ignore_index=True)
    table["pair"] = pair_keys(table)
    one = table.drop_duplicates("pair")[["pair"]]
    one = one.assign(p_holm=holm(table.loc[one.index, "p"].to_numpy()))
    table = table.merge(one, on="pair", how="left", validate="many_to_one")
    table["n_comparisons"] = len(one)
    table["user_metrics_version"] = user_metrics_version
    table["is_shown"] = table["p_holm"] <= level
    table["users_needed"] = [
        users_needed(difference, deviation, level)
        for difference, deviation in zip(table["difference"], table["deviation"], strict=True)
    ]
    return typed(table, COMPARISONS)


_OTHER = [f"versus_{name}" for name in LIST_KEY]


def pair_keys(comparisons: pd.DataFrame) -> list[str]:
    """What each comparison asks about, whichever of its two rows comes first: A against B and B
    against A are one hypothesis."""
    columns = [comparisons[name].tolist() for name in ("protocol", *LIST_KEY, *_OTHER)]
    n = len(LIST_KEY)
    return [
        repr((protocol, *sorted((tuple(rows[:n]), tuple(rows[n:])))))
        for protocol, *rows in zip(*columns, strict=True)
    ]


def _differences(
    protocol: str,
    scores: Mapping[Row, pd.Series],
    pairs: Sequence[tuple[str, Row, Row]],
    recipe: EvaluationRecipe,
    seed: int,
) -> pd.DataFrame:
    distinct = list(dict.fromkeys((row, other) for _, row, other in pairs))
    values = np.column_stack(
        [scores[row].to_numpy() - scores[other].to_numpy() for row, other in distinct]
    )
    # equal scores that were averaged in another order are equal
    values[np.abs(values) < 1e-12] = 0.0
    signed = np.ones(len(distinct), dtype=bool)
    mean, low, high = bootstrap_means(values, recipe.resamples, seed, recipe.confidence, signed)
    p = sign_flip_p_values(values, FLIPS, seed)
    # one user has no spread that could be known
    deviation = values.std(axis=0, ddof=1) if len(values) > 1 else np.zeros(len(distinct))
    differ = (values != 0).sum(axis=0)
    at = {pair: position for position, pair in enumerate(distinct)}
    found = []
    for reason, row, other in pairs:
        i = at[row, other]
        found.append(
            (protocol, reason, *row, *other, len(values), differ[i], mean[i], low[i], high[i],
             deviation[i], p[i])
        )  # fmt: skip
    names = ["protocol", "reason", *LIST_KEY, *_OTHER, "n_users", "n_differ", "difference",
             "difference_low", "difference_high", "deviation", "p"]  # fmt: skip
    return pd.DataFrame(found, columns=names)


def user_scores(metrics: pd.DataFrame) -> dict[Row, pd.Series]:
    """NDCG@k by user of every row of one protocol, a user's windows averaged, all on the same
    users in the same order.

    Raises:
        DataError: two rows were scored on different users.
    """
    scores: dict[Row, pd.Series] = {}
    for name, part in metrics.groupby(LIST_KEY, sort=True):
        stage, decoding, information_set = map(str, name)
        scores[stage, decoding, information_set] = part.groupby("user_id")["ndcg"].mean()
    first = next(iter(scores.items()), None)
    for row, values in scores.items():
        if first is not None and not values.index.equals(first[1].index):
            raise DataError(
                f"user_metrics: {row[0]} and {first[0][0]} were scored on different users: "
                "materialize their recommendations again, from the same prompts"
            )
    return scores


def is_model(row: Row) -> bool:
    """Whether the row is a stage of the language model rather than a classical recommender."""
    return row[0] in STAGE_ORDER


def row_key(row: Row) -> tuple[int, str, str, str]:
    """Sorts rows: stages as they are trained, then by name, decoding and information set."""
    return (*stage_key(row[0]), row[1], row[2])
