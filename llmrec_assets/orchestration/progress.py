"""Progress of training and generation, in the log and in the UI.

What belongs here: showing ``models.progress`` events. What does not: producing them.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

import dagster as dg

if TYPE_CHECKING:
    from llmrec_assets.models.progress import Progress, ProgressEvent


def report_progress(
    context: dg.AssetExecutionContext, every_seconds: float = 15.0, asset: str | None = None
) -> Progress:
    """Logs events and records them as ``AssetObservation``s, at most one every ``every_seconds``
    and always the last; notes at once, as warnings. ``asset``: of which asset, in a step that
    makes several."""
    last = -every_seconds

    def show(event: ProgressEvent) -> None:
        nonlocal last
        key = context.asset_key if asset is None else dg.AssetKey(asset)
        if event.note:
            context.log.warning(event.note)
            context.log_event(
                dg.AssetObservation(
                    key, partition=context.partition_key, metadata={"note": event.note}
                )
            )
            return
        now = time.monotonic()
        if now - last < every_seconds and event.step < event.total:
            return
        last = now
        context.log.info(str(event))
        context.log_event(
            dg.AssetObservation(
                asset_key=key,
                partition=context.partition_key,
                metadata={
                    "step": event.step,
                    "of": event.total,
                    "examples_per_second": round(event.examples_per_second, 3),
                    "seconds_left": round(event.seconds_left),
                    **({} if event.loss is None else {"loss": event.loss}),
                },
            )
        )

    return show
