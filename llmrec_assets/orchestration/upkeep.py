"""Looking after it: the jobs ``health`` and ``retention``, and what they see of Dagster.

What belongs here: what an instance holds for runs that are gone, the device lock, missed ticks.
What does not: files (``ground.health``), versions (``ground.retention``).
"""

import dataclasses
import datetime as dt
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import psutil
from filelock import FileLock, Timeout
from pydantic import Field

from llmrec_assets.ground import retention as keeping
from llmrec_assets.ground.errors import LlmrecError
from llmrec_assets.ground.health import Finding, examine
from llmrec_assets.ground.store import Store
from llmrec_assets.orchestration.dead_runs import bury_dead_runs, dead_runs
from llmrec_assets.orchestration.resources import GpuResource, StoreResource
from llmrec_assets.orchestration.ticks import CRON, missed_ticks

if TYPE_CHECKING:
    import pandas as pd

KEEP = 5


def findings_table(findings: Sequence[Finding]) -> "pd.DataFrame":
    """One row a finding."""
    import pandas as pd

    return pd.DataFrame([dataclasses.asdict(finding) for finding in findings])


def examine_everything(
    store: Store, instance: dg.DagsterInstance, gpu: GpuResource, repair: bool = False
) -> list[Finding]:
    """``ground.health.examine``, and the runs, pool slots, device lock and ticks of Dagster."""
    return [
        *examine(store, repair),
        *_runs(instance, repair),
        *_slots(instance, repair),
        *_device(gpu, repair),
        *_ticks(instance),
    ]


def _runs(instance: dg.DagsterInstance, repair: bool) -> list[Finding]:
    dead = dead_runs(instance)
    if repair:
        bury_dead_runs(instance)
    found = []
    for run in dead:
        what = f"{run.job_name} {run.run_id}: the process that ran it is gone"
        if repair:
            found.append(Finding("runs", "mended", f"{what}: marked as failed"))
        else:
            remedy = "`llmrec health --repair` marks it as failed"
            found.append(Finding("runs", "problem", what, remedy))
    return found or [Finding("runs", "ok", "no run without its process")]


def _slots(instance: dg.DagsterInstance, repair: bool) -> list[Finding]:
    storage = instance.event_log_storage
    found = []
    for run_id in sorted(storage.get_concurrency_run_ids()):
        run = instance.get_run_by_id(run_id)
        if run is not None and not run.is_finished:
            continue
        what = f"a place in a pool is held by run {run_id}, which has ended"
        if repair:
            storage.free_concurrency_slots_for_run(run_id)
            found.append(Finding("pools", "mended", f"{what}: freed"))
        else:
            remedy = "the daemon frees it within a minute, or `llmrec health --repair`"
            found.append(Finding("pools", "problem", what, remedy))
    return found or [Finding("pools", "ok", "no place is held by a run that has ended")]


def _device(gpu: GpuResource, repair: bool) -> Iterator[Finding]:
    # Whoever holds the device has made both files; another program's JSON has no lock beside it.
    found = gpu.lock_directory().glob("*.json")
    holders = sorted(path for path in found if path.with_suffix(".lock").exists())
    for path in holders:
        lock = FileLock(path.with_suffix(".lock"))
        try:
            with lock.acquire(timeout=0):
                what = f"{path.name} names {_holder(path)}, and nobody holds the lock"
                if repair:
                    path.unlink(missing_ok=True)
                    yield Finding("device", "mended", f"{what}: removed")
                else:
                    # The kernel has freed the lock: whoever comes next overwrites the file.
                    yield Finding("device", "note", what, "nothing waits for it")
        except Timeout:
            yield Finding("device", "ok", f"{path.stem} is held by {_holder(path)}")
    if not holders:
        yield Finding("device", "ok", "nobody holds the device")


def _holder(path: Path) -> str:
    try:
        fact = json.loads(path.read_text())
        alive = "" if psutil.pid_exists(int(fact["pid"])) else ", gone"
        return f"{fact['who']} (process {fact['pid']}{alive})"
    except (OSError, ValueError, KeyError, TypeError):
        return "somebody"


def _ticks(instance: dg.DagsterInstance) -> list[Finding]:
    found = []
    for schedule in CRON:
        for tick in missed_ticks(instance, schedule, dt.datetime.now(dt.UTC)):
            what = f"{schedule} was due {tick} and did not run"
            if tick.overtaken:
                found.append(Finding("ticks", "note", what, "a later tick has run since"))
            else:
                remedy = "start the daemon (`make ui`): it makes up for the newest missed tick"
                found.append(Finding("ticks", "problem", what, remedy))
    return found or [Finding("ticks", "ok", "no schedule that is on has missed a tick")]


class HealthConfig(dg.Config):
    """Launch-time option of the job ``health``."""

    repair: bool = Field(default=False, description="Mend what is safe to mend.")


@dg.op(description="Looks at files, manifests, views, leftovers, runs, pools, the device, ticks.")
def examine_home(
    context: dg.OpExecutionContext, config: HealthConfig, storage: StoreResource, gpu: GpuResource
) -> None:
    from llmrec_assets.ground.report import markdown_table

    findings = examine_everything(storage.store(), context.instance, gpu, config.repair)
    table = markdown_table(findings_table(findings))
    context.log.info(f"\n{table}")
    context.add_output_metadata({"findings": dg.MetadataValue.md(table)})
    problems = [finding for finding in findings if finding.state == "problem"]
    if problems:
        raise dg.Failure(
            f"{len(problems)} problem{'s' * (len(problems) > 1)}: "
            f"{problems[0].check}: {problems[0].what} ({problems[0].remedy})",
            metadata={"findings": dg.MetadataValue.md(table)},
            allow_retries=False,
        )


@dg.job(
    description="Examines everything that is kept; fails, and so alerts, where it finds a problem."
)
def health() -> None:
    examine_home()


class RetentionConfig(dg.Config):
    """Launch-time options of the job ``retention``."""

    keep: int = Field(default=KEEP, description="Newest versions kept of every asset partition.")
    remove: bool = Field(default=False, description="Remove what is listed; without it, list it.")


@dg.op(description="Lists versions that nothing kept cites, or removes them.")
def remove_old_versions(
    context: dg.OpExecutionContext, config: RetentionConfig, storage: StoreResource
) -> None:
    store = storage.store()
    try:
        found = (keeping.prune if config.remove else keeping.plan)(store, config.keep)
    except LlmrecError as error:
        raise dg.Failure(str(error), allow_retries=False) from error
    done = "removed" if config.remove else "would be removed (set `remove` to do it)"
    context.log.info("\n".join([done, *found.lines()]))
    context.add_output_metadata(
        {"removed": config.remove, "versions": len(found.versions), "bytes": found.size}
    )


@dg.job(
    description="Removes old versions that nothing kept cites. Launched as it is, it only lists."
)
def retention() -> None:
    remove_old_versions()
