"""The code location, one page. Tests build the same graph with other resources."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import dagster as dg

from llmrec_assets.orchestration import (
    alerts,
    automation,
    executor,
    jobs,
    schedules,
    sensors,
    upkeep,
)
from llmrec_assets.orchestration.assets import (
    champion,
    evaluation,
    models,
    preferences,
    probes,
    prompts,
    recommendations,
    source,
)
from llmrec_assets.orchestration.io_manager import DirectoryIOManager, TableIOManager
from llmrec_assets.orchestration.resources import GpuResource, StoreResource


def build_defs(
    *,
    resource_overrides: Mapping[str, Any] | None = None,
    step_executor: dg.ExecutorDefinition = executor.step_executor,
) -> dg.Definitions:
    """Assembles the code location; ``resource_overrides`` replaces resources by key."""
    overrides = dict(resource_overrides or {})
    storage = overrides.pop("storage", StoreResource())
    return dg.Definitions(
        assets=[
            *dg.load_assets_from_modules([source], automation_condition=automation.on_changed_data),
            *dg.load_assets_from_modules(
                [prompts, models, preferences, recommendations, evaluation, probes],
                automation_condition=automation.on_changed_data_at_rest,
            ),
            # Who serves is decided when somebody asks, not because data changed.
            *dg.load_assets_from_modules([champion]),
        ],
        jobs=[
            jobs.source_data,
            jobs.prepare_base_model,
            jobs.recommender,
            jobs.supervised,
            jobs.evaluation,
            jobs.promotion,
            upkeep.health,
            upkeep.retention,
        ],
        schedules=[schedules.weekly_retraining, schedules.weekly_retention],
        sensors=[
            sensors.new_ratings,
            automation.retrain_on_changed_data,
            alerts.alert_webhook,
            *alerts.email_sensor(),
        ],
        executor=step_executor,
        resources={
            "storage": storage,
            "gpu": GpuResource(),
            "table_io": TableIOManager(storage=storage),
            "directory_io": DirectoryIOManager(storage=storage),
            **overrides,
        },
    )


defs = build_defs()
