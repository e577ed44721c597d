"""Sensors: what notices new rating files.

What belongs here: looking, and asking for a run. What does not: what a rating file is
(``ground.incoming``), failure alerts (``orchestration.alerts``), declarative automation
(``orchestration.automation``).
"""

import contextlib
import datetime as dt
import hashlib
from collections.abc import Iterator

import dagster as dg
from dagster._core.storage.dagster_run import IN_PROGRESS_RUN_STATUSES

from llmrec_assets.ground import incoming_files
from llmrec_assets.orchestration.assets.source import FINGERPRINT
from llmrec_assets.orchestration.jobs import source_data
from llmrec_assets.orchestration.partitions import DATASETS
from llmrec_assets.orchestration.resources import StoreResource

_PARTITION_TAG = "dagster/partition"


@dg.sensor(
    job=source_data,
    minimum_interval_seconds=30,
    default_status=dg.DefaultSensorStatus.STOPPED,
    description="Runs source_data for a data set when rating files have arrived in "
    "incoming/<data set>. Retraining is another switch: retrain_on_changed_data.",
)
def new_ratings(
    context: dg.SensorEvaluationContext, storage: StoreResource
) -> Iterator[dg.RunRequest | dg.SkipReason]:
    """One run request per data set whose files differ from what ``incoming_ratings`` was made of.

    A set of files (names and content) is asked for once a day: a run that fails is tried again
    tomorrow, and not every thirty seconds.
    """
    today = dt.datetime.now(dt.UTC).date().isoformat()
    nothing = True
    for dataset in DATASETS:
        place = storage.incoming_directory(dataset)
        waiting = []
        for path in incoming_files.settled_files(place):
            with contextlib.suppress(FileNotFoundError):  # a run has just taken it in
                waiting.append(incoming_files.kept_name(path))
        accepted = [path.name for path in incoming_files.accepted_files(place)]
        made_of = _made_of(context.instance, dataset)
        never = made_of is None and not accepted
        if not waiting and (never or made_of == incoming_files.fingerprint(accepted)):
            continue
        nothing = False
        if _is_running(context.instance, dataset):
            continue  # it takes in what is there now; what comes later is seen afterwards
        files = hashlib.sha256(
            f"{incoming_files.fingerprint(waiting)}|{incoming_files.fingerprint(accepted)}".encode()
        ).hexdigest()[:16]
        yield dg.RunRequest(run_key=f"{dataset}-{files}-{today}", partition_key=dataset)
    if nothing:
        yield dg.SkipReason("no new rating files")


def _made_of(instance: dg.DagsterInstance, dataset: str) -> str | None:
    """The fingerprint of the files that the newest ``ratings`` hold; None where they hold none, or
    a run ended between ``incoming_ratings`` and them."""
    newest: list[dg.EventLogRecord] = []
    for asset in ("incoming_ratings", "ratings"):
        wanted = dg.AssetRecordsFilter(asset_key=dg.AssetKey(asset), asset_partitions=[dataset])
        newest += instance.fetch_materializations(wanted, limit=1).records
    if len(newest) < 2 or newest[0].storage_id > newest[1].storage_id:
        return None
    event = newest[0].asset_materialization
    value = event.metadata.get(FINGERPRINT) if event is not None else None
    return None if value is None else str(value.value)


def _is_running(instance: dg.DagsterInstance, dataset: str) -> bool:
    running = dg.RunsFilter(
        job_name=source_data.name,
        tags={_PARTITION_TAG: dataset},
        statuses=[*IN_PROGRESS_RUN_STATUSES, dg.DagsterRunStatus.QUEUED],
    )
    return bool(instance.get_runs(filters=running, limit=1))
