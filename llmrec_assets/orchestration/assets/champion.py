"""Group ``champion``: the policy that serves a data set, and the record of how it came to."""

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import dagster as dg
import pandas as pd

from llmrec_assets.ground import promotion as promoting
from llmrec_assets.ground.challengers import (
    Challenger,
    Source,
    input_problems,
    read_challenger,
    read_source,
    validation_metrics,
)
from llmrec_assets.ground.champion import write_card
from llmrec_assets.ground.errors import DataError, StoreError
from llmrec_assets.ground.promotion import CHALLENGER, CHAMPION, TABLE, Promotion
from llmrec_assets.ground.report import markdown_table
from llmrec_assets.ground.store import Store, read_manifest
from llmrec_assets.orchestration.assets.common import (
    CODE_VERSION,
    directory_options,
    table_options,
)
from llmrec_assets.orchestration.config import PromotionConfig
from llmrec_assets.orchestration.partitions import dataset_partitions
from llmrec_assets.orchestration.progress import report_progress
from llmrec_assets.orchestration.resources import GpuResource, StoreResource
from llmrec_assets.orchestration.results import (
    CheckedResult,
    blocking_checks,
    one_builder,
    table_result,
)

GROUP = "champion"

_SOUND = "challenger_keeps_every_check"
_INPUTS = [
    *("ratings", "users", "movies"),
    *("prompts", "interaction_windows", "user_splits", "catalogue", "preference_pairs"),
    *("sft_checkpoint", "dpo_checkpoint", "reward_model", "rlhf_checkpoint", "metric_table"),
]
_SHOWN = ["decided_at", "decision", "challenger_recipe", "challenger_stage", "reason", "in_force"]


def _out(description: str, name: str, **options: Any) -> dg.AssetOut:
    return dg.AssetOut(key=name, description=description, **options)


@dg.multi_asset(
    name=CHAMPION,
    outs={
        CHAMPION: _out(
            "The policy that serves a data set: weights, catalogue and model card in one "
            "directory, for plain transformers and peft.",
            **directory_options(CHAMPION, GROUP, "huggingface", "safetensors"),
        ),
        TABLE: _out(
            "Every decision about the champion, its numbers and the loser; rows are only added.",
            **table_options(TABLE, GROUP),
        ),
    },
    deps=_INPUTS,
    # Not in the pool: a roll-back must not queue behind a training. A contest takes the lease.
    partitions_def=dataset_partitions,
    check_specs=[
        dg.AssetCheckSpec(
            _SOUND,
            asset=CHAMPION,
            blocking=True,
            description="Every blocking check of the challenger's inputs, run again on what is in "
            "the store, and of its lists for validation users. One that fails leaves the champion.",
        )
    ],
)
def champion(
    context: dg.AssetExecutionContext,
    config: PromotionConfig,
    storage: StoreResource,
    gpu: GpuResource,
) -> CheckedResult:
    """Lets a recipe's policy challenge the champion on validation users, or rolls back."""
    store, dataset = storage.store(), context.partition_key
    with one_builder(store, CHAMPION, dataset, context.log.info):
        past = promoting.recorded(store, dataset)
        past = promoting.with_missing_row(store, dataset, past, context.run_id)
        promotion: Promotion | None
        if config.roll_back_to is not None:
            promotion = _roll_back(context, config, store, past)
            yield from blocking_checks(CHAMPION, {_SOUND: []})
        elif config.challenger is not None:
            promotion, problems = _challenge(context, config, config.challenger, store, gpu, past)
            if problems and promotion is not None:
                yield table_result(TABLE, promoting.with_row(past, promotion))
            yield from blocking_checks(CHAMPION, {_SOUND: problems})
        else:
            raise DataError(
                f"nothing is asked about the champion of {dataset}: name a recipe as challenger "
                "in the run config, or a version as roll_back_to (`llmrec promote` does it)"
            )
        yield from _results(store, dataset, past, promotion)


def _roll_back(
    context: dg.AssetExecutionContext, config: PromotionConfig, store: Store, past: pd.DataFrame
) -> Promotion:
    dataset, version = context.partition_key, str(config.roll_back_to)
    if config.challenger is not None:
        raise DataError("name either a challenger or roll_back_to: they are two questions")
    current = store.current(CHAMPION, dataset, kind="checkpoints")
    kept = [name for name in promoting.kept_champions(store, dataset, past) if name != current]
    side = promoting.side_of(past, version)
    if side is None or version not in kept:
        raise DataError(
            f"{version} cannot be champion of {dataset} again: it must have been, and lie there "
            f"intact; there are {', '.join(kept) or 'none'} beside the current {current}"
        )
    store.adopt(CHAMPION, dataset, version)
    opened = promoting.opened(side, promoting.side_of(past, current), context.run_id)
    return promoting.rolled_back(opened, "asked for by roll_back_to")


def _challenge(
    context: dg.AssetExecutionContext,
    config: PromotionConfig,
    recipe_name: str,
    store: Store,
    gpu: GpuResource,
    past: pd.DataFrame,
) -> tuple[Promotion | None, list[str]]:
    """The decision, None where nothing was to be decided, and what the checks found."""
    dataset = context.partition_key
    source = read_source(store, dataset)
    challenger = read_challenger(store, dataset, recipe_name, config.stage, CODE_VERSION)
    current = store.current(CHAMPION, dataset, kind="checkpoints")
    opened = promoting.opened(
        challenger.side,
        promoting.side_of(past, current),
        context.run_id,
        k=challenger.recipe.windows.top_k,
        prompts_version=challenger.prompts.version,
        ratings_version=source.ratings.version,
    )
    problems = input_problems(store, challenger, source)
    if problems:
        return promoting.refused(opened, problems), problems
    opponent = None
    if current is not None:
        try:
            opponent = store.checkpoint(CHAMPION, dataset)
        except StoreError as error:
            if not config.force:
                raise
            context.log.warning(f"{error}; the challenger takes its place without a comparison")
    if opponent is not None:
        told = promoting.settled(past, opened, challenger.recipe.promotion.margin)
        if opponent.name.split("-")[0] == opened.challenger:
            context.log.info(f"{opponent.name} is the champion already")
            return None, []
        if told is not None and not config.force:
            context.log.info(f"decided already, force decides again: {told}")
            return None, []
    return _contest(context, store, gpu, challenger, source, opponent, opened)


def _contest(
    context: dg.AssetExecutionContext,
    store: Store,
    gpu: GpuResource,
    challenger: Challenger,
    source: Source,
    opponent: Path | None,
    opened: Promotion,
) -> tuple[Promotion, list[str]]:
    from llmrec_assets.models.champion import pack_champion, validation_lists

    dataset, recipe = context.partition_key, challenger.recipe
    trained = [] if opponent is None else read_manifest(opponent)["facts"]["trained_user_ids"]
    asked = challenger.validation_prompts(left_out=set(trained))
    left_out = challenger.validation_prompts(left_out=set())["user_id"].nunique()
    opened = replace(opened, users_left_out=int(left_out - asked["user_id"].nunique()))
    if asked.empty:
        return promoting.without_opponent(opened), []
    version = opened.challenger
    work = store.work_directory(CHAMPION, dataset, version)
    intact = store.find_intact(CHAMPION, dataset, version)
    with gpu.lease(context.log, f"{CHAMPION} {dataset}") as device:
        files = intact or pack_champion(challenger, work / "files")
        sides = [(CHALLENGER, version, files)]
        if opponent is not None:
            sides.append((CHAMPION, opponent.name, opponent))
        lists = [
            validation_lists(
                directory,
                asked,
                source,
                side=side,
                version=name,
                prompts_version=challenger.prompts.version,
                top_k=recipe.windows.top_k,
                seed=recipe.seed,
                code=CODE_VERSION,
                work_dir=work,
                device=device,
                progress=report_progress(context),
            )
            for side, name, directory in sides
        ]
    metrics, problems = validation_metrics(pd.concat(lists, ignore_index=True), challenger, source)
    if problems:
        return promoting.refused(opened, problems), problems
    promotion = promoting.judged(
        opened,
        metrics,
        recipe.evaluation,
        margin=recipe.promotion.margin,
        seed=recipe.seed,
    )
    if promotion.in_force == version:
        if intact is not None:
            store.adopt(CHAMPION, dataset, intact.name)
            published = intact
        else:
            write_card(files, challenger.served, promotion)
            published = store.publish_checkpoint(
                CHAMPION,
                dataset,
                version,
                files,
                determinants=challenger.determinants,
                facts={
                    "promotion": asdict(promotion),
                    "trained_user_ids": challenger.trained_user_ids,
                    "run_id": context.run_id,
                },
            )
        promotion = replace(promotion, challenger=published.name, in_force=published.name)
    store.remove_work(work)
    return promotion, []


def _results(
    store: Store, dataset: str, past: pd.DataFrame, promotion: Promotion | None
) -> Iterator[dg.MaterializeResult]:
    """The record with its new row, and the champion in force, whichever it is."""
    table = past if promotion is None else promoting.with_row(past, promotion)
    shown = dg.MetadataValue.md(markdown_table(table[_SHOWN].tail(10)))
    yield table_result(TABLE, table, {"latest": shown})
    path = store.checkpoint(CHAMPION, dataset)
    told = (
        {name: value for name, value in asdict(promotion).items() if value is not None}
        if (promotion)
        else {"decision": "nothing to decide"}
    )
    yield dg.MaterializeResult(
        asset_key=CHAMPION,
        value=path,
        data_version=dg.DataVersion(path.name),
        metadata={
            "path": dg.MetadataValue.path(str(path)),
            "card": dg.MetadataValue.md((path / "README.md").read_text(encoding="utf-8")),
            **told,
        },
    )
