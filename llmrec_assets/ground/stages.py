"""Which stages stand in the metric table: those made from the current prompts.

What belongs here: what stages and their tables are called, reading the current recommendation
tables of a partition and saying which are missing or stale. What does not: scoring them
(``evaluation``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.store import Store, read_manifest

if TYPE_CHECKING:
    import pandas as pd

#: Tables that hold recommendations for the test windows, and the stages each brings.
STAGES_OF_TABLE = {
    "base_recommendations": ["base"],
    "sft_recommendations": ["sft"],
    "dpo_recommendations": ["dpo"],
    "rlhf_recommendations": ["rlhf"],
    "baseline_recommendations": [
        "popularity",
        "popularity-causal",
        "itemknn",
        "itemknn-causal",
        "ease",
        "als",
        "sasrec",
    ],
}
RECOMMENDATION_TABLES = list(STAGES_OF_TABLE)

#: The checkpoint whose policy answers for a stage. DPO's and RLHF's adapters stand on SFT's.
CHECKPOINT_OF_STAGE = {
    "base": "base_model",
    "sft": "sft_checkpoint",
    "dpo": "dpo_checkpoint",
    "rlhf": "rlhf_checkpoint",
}
RESPONSE_TABLES = [f"{stage}_responses" for stage in CHECKPOINT_OF_STAGE]
#: What the two sides of a promotion are called where a list's stage is asked for; the one in force
#: is also the asset, and the table beside it holds every decision about it.
CHALLENGER, CHAMPION, CHAMPION_RECORD = "challenger", "champion", "promotions"

_INPUT_CHECKPOINTS = ("base_model", "sft_checkpoint", "reward_model")


@dataclass(frozen=True)
class StageTables:
    """Recommendations of every stage that answers the current prompts, with the version of the
    table they come from; ``left_out`` names the others and why. ``versions``: of those tables."""

    recommendations: pd.DataFrame
    left_out: list[str]
    versions: dict[str, str]


def current_stages(
    store: Store, partition: str, prompts_version: str, baselines_version: str
) -> StageTables:
    """Reads the current recommendation tables and keeps those made from ``prompts_version``.

    Args:
        baselines_version: of the recipe (``answers.baselines_version``).

    Raises:
        DataError: none of them is, or the classical lists were made by another recipe. They are
            not left out: without them every bar of the table would be gone.
    """
    import pandas as pd

    kept, left_out, versions = [], [], {}
    for asset in RECOMMENDATION_TABLES:
        if store.current(asset, partition, kind="tables") is None:
            left_out.append(f"{asset} is missing: never materialized for {partition}")
            continue
        table = store.read_table(asset, partition)
        if table.frame.empty:
            left_out.append(f"{asset} is empty: {partition} has no test prompts it could answer")
            continue
        strangers = set(table.frame["stage"]) - set(STAGES_OF_TABLE[asset])
        if strangers:
            left_out.append(
                f"{asset} holds lists of {', '.join(sorted(strangers))}, not of "
                f"{', '.join(STAGES_OF_TABLE[asset])}; materialize it again"
            )
            continue
        made_from = set(table.frame["prompts_version"])
        if made_from != {prompts_version}:
            left_out.append(
                f"{asset} is stale: it answers other prompts than the current ones "
                f"({prompts_version}); materialize it again"
            )
            continue
        stale = _stale_checkpoint(store, partition, table.frame)
        if stale is not None:
            left_out.append(f"{asset} is stale: {stale}; materialize it again")
            continue
        problem = _other_baselines(table.frame, baselines_version)
        if problem is not None:
            raise DataError(f"{asset} is stale: {problem}; materialize {asset} again")
        kept.append(table.frame.assign(recommendations_version=table.version))
        versions[asset] = table.version
    if not kept:
        raise DataError(
            f"no recommendations for {partition} answer the current prompts: " + "; ".join(left_out)
        )
    return StageTables(pd.concat(kept, ignore_index=True), left_out, versions)


def answers_behind(
    store: Store, partition: str, lists: pd.DataFrame
) -> tuple[pd.DataFrame, dict[str, str]]:
    """The current ``RESPONSES`` that ``lists`` (``RECOMMENDATIONS``) were read from: same stage,
    decoding, prompts and checkpoint; and the versions of their tables. Answers made since are left
    out."""
    import pandas as pd

    key = ["stage", "decoding", "prompts_version", "checkpoint_version"]
    wanted = lists[key].drop_duplicates()
    found, versions = [wanted.iloc[:0]], {}
    for stage in sorted(set(wanted["stage"]) & set(CHECKPOINT_OF_STAGE)):
        asset = f"{stage}_responses"
        if store.current(asset, partition, kind="tables") is not None:
            table = store.read_table(asset, partition)
            found.append(table.frame)
            versions[asset] = table.version
    return pd.concat(found, ignore_index=True).merge(wanted, on=key), versions


def answered_stages(store: Store, partition: str) -> tuple[list[str], list[str]]:
    """Stages whose current answers can be grounded and scored again without a model, and why
    the others cannot."""
    prompts = store.current("prompts", partition, kind="tables")
    if prompts is None:
        raise DataError(
            f"prompts has not been materialized for {partition}: there is nothing to evaluate yet"
        )
    kept, left_out = [], []
    for stage in CHECKPOINT_OF_STAGE:
        if store.current(f"{stage}_responses", partition, kind="tables") is None:
            left_out.append(f"{stage}_responses is missing: never materialized for {partition}")
            continue
        frame = store.read_table(f"{stage}_responses", partition).frame
        problems = response_problems(frame, stage, store, partition, prompts)
        left_out += problems
        kept += [] if problems else [stage]
    return kept, left_out


def missing_stages(scored: pd.DataFrame) -> list[str]:
    """Stages that ``scored`` (any table with a ``stage`` column) lacks."""
    present = set(scored["stage"])
    return [s for stages in STAGES_OF_TABLE.values() for s in stages if s not in present]


def require_current(
    table: pd.DataFrame,
    name: str,
    store: Store,
    partition: str,
    prompts_version: str,
    baselines_version: str,
) -> None:
    """Refuses metrics of other prompts, checkpoints or ``baselines`` than the current ones.

    Args:
        table: ``USER_METRICS`` or ``METRIC_TABLE``, called ``name``.
        baselines_version: as for ``current_stages``.

    Raises:
        DataError: a row is of another prompts version, its checkpoint has been replaced, or its
            recommender's hyperparameters have.
    """
    others = set(table["prompts_version"]) - {prompts_version}
    if others:
        raise DataError(
            f"{name} is stale: it scores answers to the prompts {', '.join(sorted(others))}, "
            f"the current ones are {prompts_version}; materialize {name} again"
        )
    for _, rows in table.groupby("stage"):
        stale = _stale_checkpoint(store, partition, rows)
        stale = stale or _other_baselines(rows, baselines_version)
        if stale is not None:
            raise DataError(f"{name} is stale: {stale}; materialize {name} again")


def _other_baselines(lists: pd.DataFrame, baselines_version: str) -> str | None:
    """Why the classical ones among these lists are not those of the recipe, or None."""
    classical = lists[lists["stage"].isin(STAGES_OF_TABLE["baseline_recommendations"])]
    others = set(classical["answer_version"].fillna("unknown")) - {baselines_version}
    if not others:
        return None
    return (
        f"its classical lists were made by baselines {', '.join(sorted(others))}, the recipe's "
        f"section `baselines` is {baselines_version}"
    )


def require_made_from(table: pd.DataFrame, name: str, column: str, current: set[str]) -> None:
    """Refuses a table that was made from others than those that stand beside it.

    Args:
        table: called ``name``; its ``column`` holds the version of what each row was made from.
        current: the versions there may be.

    Raises:
        DataError: a row names another.
    """
    others = set(table[column]) - current
    if others:
        raise DataError(
            f"{name} is stale: its {column} is {', '.join(sorted(others))}, the current one is "
            f"{', '.join(sorted(current)) or 'missing'}; materialize {name} again"
        )


def _stale_checkpoint(store: Store, partition: str, frame: pd.DataFrame) -> str | None:
    """Why these lists or answers of one stage are not its current checkpoint's, or None."""
    stage = str(frame["stage"].iloc[0])
    if stage not in CHECKPOINT_OF_STAGE:
        return None
    asset = CHECKPOINT_OF_STAGE[stage]
    where = partition.split("|")[-1] if asset == "base_model" else partition
    current = store.current(asset, where, kind="checkpoints")
    answered = set(frame["checkpoint_version"])
    if current is None or answered != {current}:
        told = ", ".join(sorted(map(str, answered)))
        return f"{asset} {told} answered, the current one is {current or 'missing'}"
    return _stale_inputs(store, partition, asset, store.checkpoint(asset, where))


def _stale_inputs(store: Store, partition: str, asset: str, checkpoint: Path) -> str | None:
    """Which checkpoint under this one has been replaced since: a DPO policy on an older SFT policy
    cannot stand beside the new one."""
    determinants = read_manifest(checkpoint)["determinants"]
    for name in _INPUT_CHECKPOINTS:
        where = partition.split("|")[-1] if name == "base_model" else partition
        current = store.current(name, where, kind="checkpoints")
        if name in determinants and determinants[name] != current:
            return (
                f"{asset} {checkpoint.name} was trained on {name} {determinants[name]}, the "
                f"current one is {current or 'missing'}"
            )
    return None


def checkpoint_problems(
    checkpoint: Path, asset: str, partition: str, determinants: Mapping[str, str]
) -> list[str]:
    """Why a directory is not what ``asset`` published for ``partition`` from these inputs.

    Catches a swapped directory (another asset's or another partition's checkpoint under this
    name) and a stale one. Prompts of another seed split the users anew: a checkpoint trained on
    them may have learnt from today's test users.

    Args:
        determinants: input asset → the version that is current.
    """
    manifest = read_manifest(checkpoint)
    found = {name: manifest.get(name) for name in ("asset", "partition", "version")}
    expected = {"asset": asset, "partition": partition, "version": checkpoint.name}
    problems = [
        f"checkpoint {checkpoint.name} is not what it is taken for: its {name} is "
        f"{found[name]}, expected {expected[name]}: materialize {asset} again with force"
        for name in expected
        if found[name] != expected[name]
    ]
    trained_on = manifest["determinants"]
    problems += [
        f"checkpoint {checkpoint.name} was trained on {name} {trained_on.get(name)}, the current "
        f"version is {version}: materialize {asset} again first"
        for name, version in determinants.items()
        if trained_on.get(name) != version
    ]
    return problems


def policy_problems(
    stage: str, base_model: Path, adapters: Sequence[Path], partition: str, prompts_version: str
) -> list[str]:
    """``checkpoint_problems`` of all that a stage's policy stands on.

    Args:
        adapters: SFT's, then the one trained on top of it; none for ``base``.
    """
    problems = checkpoint_problems(base_model, "base_model", partition.split("|")[-1], {})
    made_from = {"base_model": base_model.name, "prompts": prompts_version}
    own = CHECKPOINT_OF_STAGE[stage]
    chain = [] if stage == "base" else list(dict.fromkeys(["sft_checkpoint", own]))
    for asset, adapter in zip(chain, adapters, strict=True):
        problems += checkpoint_problems(adapter, asset, partition, made_from)
        made_from[asset] = adapter.name
    return problems


def require_checkpoint(
    checkpoint: Path, asset: str, partition: str, determinants: Mapping[str, str]
) -> None:
    """``checkpoint_problems`` as an error.

    Raises:
        DataError: there is one.
    """
    problems = checkpoint_problems(checkpoint, asset, partition, determinants)
    if problems:
        raise DataError("; ".join(problems))


def require_sampled_from(
    table: pd.DataFrame, sft_checkpoint: str, prompts_version: str, name: str = "sampled_responses"
) -> None:
    """Refuses samples, or pairs made from them, of another policy or of other prompts.

    Args:
        table: ``SAMPLED_RESPONSES`` or ``PREFERENCE_PAIRS``, called ``name``.

    Raises:
        DataError: rows name another version.
    """
    for column, current in (
        ("checkpoint_version", sft_checkpoint),
        ("prompts_version", prompts_version),
    ):
        others = set(table[column]) - {current}
        if others:
            raise DataError(
                f"{name} is stale: its {column} is {', '.join(sorted(others))}, the current one "
                f"is {current}; materialize sampled_responses and preference_pairs again"
            )


def response_problems(
    responses: pd.DataFrame, stage: str, store: Store, partition: str, prompts_version: str
) -> list[str]:
    """Why a ``*_responses`` table is not what ``stage``'s current checkpoint answered to the
    current prompts."""
    if responses.empty:
        return []
    asked = set(responses["prompts_version"]) - {prompts_version}
    if asked:
        return [
            f"{stage}_responses is stale: it answers the prompts {', '.join(sorted(asked))}, the "
            f"current ones are {prompts_version}; materialize it again"
        ]
    others = set(responses["stage"]) - {stage}
    if others:
        return [f"{stage}_responses holds answers of {', '.join(sorted(others))}"]
    stale = _stale_checkpoint(store, partition, responses)
    return [] if stale is None else [f"{stage}_responses: {stale}; materialize it again"]


def trained_user_problems(
    trained_user_ids: Sequence[int] | None, user_splits: pd.DataFrame
) -> list[str]:
    """Users a training saw although their split is not ``train``.

    Args:
        trained_user_ids: as the manifest's facts name them.
        user_splits: ``USER_SPLITS``, which knows nothing of what the training selected.
    """
    if trained_user_ids is None:
        return ["the manifest does not say which users it was trained on: train again with force"]
    split_of = dict(
        zip(user_splits["user_id"].tolist(), user_splits["split"].tolist(), strict=True)
    )
    return [
        f"user {user} took part in the training, their split is {split_of.get(user, 'unknown')}"
        for user in trained_user_ids
        if split_of.get(user) != "train"
    ]
