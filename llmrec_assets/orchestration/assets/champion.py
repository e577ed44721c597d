"""Group ``champion``: the policy that serves a data set, and the record of how it came to."""

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Any

import dagster as dg

from llmrec_assets.ground.errors import DataError
from llmrec_assets.ground.stages import CHAMPION, CHAMPION_RECORD
from llmrec_assets.ground.store import Store
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
    Frame,
    blocking_checks,
    one_builder,
    table_result,
)
from llmrec_assets.orchestration.waiting import show_waiting

if TYPE_CHECKING:
    from llmrec_assets.ground.promotion import Promotion

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
        CHAMPION_RECORD: _out(
            "Every decision about the champion, its numbers and the loser; rows are only added.",
            **table_options(CHAMPION_RECORD, GROUP),
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
    from llmrec_assets.ground import promotion as promoting

    store, dataset, run_id = storage.store(), context.partition_key, context.run_id
    if (config.challenger is None) == (config.roll_back_to is None):
        raise DataError(
            f"one question at a time about the champion of {dataset}: name a recipe as challenger "
            "in the run config, or a version as roll_back_to (`llmrec promote` does it)"
        )
    with one_builder(store, CHAMPION, dataset, context.log.info):
        past = promoting.recorded(store, dataset)
        past = promoting.with_missing_row(store, dataset, past, run_id)
        promotion: Promotion | None
        problems: list[str] = []
        if config.challenger is None:
            version = str(config.roll_back_to)
            promotion = promoting.roll_back(store, dataset, version, past, run_id)
        else:
            from llmrec_assets.models.contest import challenge

            promotion, problems = challenge(
                store,
                dataset,
                config.challenger,
                past,
                stage=config.stage,
                force=config.force,
                run_id=run_id,
                code=CODE_VERSION,
                lease=lambda: gpu.lease(
                    context.log,
                    f"{CHAMPION} {dataset}",
                    run_id=run_id,
                    waits=partial(show_waiting, context, asset=CHAMPION),
                ),
                say=context.log.info,
                progress=report_progress(context, asset=CHAMPION),
            )
        yield _record(past if promotion is None else promoting.with_row(past, promotion))
        yield from blocking_checks(CHAMPION, {_SOUND: problems})
        yield _in_force(store, dataset, promotion)


def _record(table: Frame) -> dg.MaterializeResult:
    from llmrec_assets.ground.report import markdown_table

    latest = dg.MetadataValue.md(markdown_table(table[_SHOWN].tail(10)))
    return table_result(CHAMPION_RECORD, table, {"latest": latest})


def _in_force(store: Store, dataset: str, promotion: "Promotion | None") -> dg.MaterializeResult:
    """The champion, whichever it is, and how it came to that."""
    path = store.checkpoint(CHAMPION, dataset)
    told = {"decision": "nothing to decide"} if promotion is None else asdict(promotion)
    return dg.MaterializeResult(
        asset_key=CHAMPION,
        value=path,
        data_version=dg.DataVersion(path.name),
        metadata={
            "path": dg.MetadataValue.path(str(path)),
            "card": dg.MetadataValue.md((path / "README.md").read_text(encoding="utf-8")),
            **{name: value for name, value in told.items() if value is not None},
        },
    )
