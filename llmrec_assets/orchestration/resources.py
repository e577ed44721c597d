"""Resources: where things are stored, and the one chair in front of the GPU.

What belongs here: paths from the environment, the store, the device lease. What does not: choosing
a device or a dtype (``models.device``), publishing (``ground.store``).
"""

import contextlib
import dataclasses
import os
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg

from llmrec_assets.ground import surroundings
from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.store import Store
from llmrec_assets.orchestration.partitions import recipe_of
from llmrec_assets.orchestration.run_worker import end_with_run_worker
from llmrec_assets.orchestration.waiting import Tell, holding, log_waiting, show_waiting

if TYPE_CHECKING:
    from llmrec_assets.models.device import Device

GPU_POOL = "gpu"
_PROJECT = Path(__file__).resolve().parents[2]
_TEMPORARY = Path("/tmp")


def home() -> str:
    """``LLMREC_HOME``: where everything is kept (default: the project's ``data``)."""
    return os.environ.get("LLMREC_HOME") or str(_PROJECT / "data")


class StoreResource(dg.ConfigurableResource[Store]):
    """The versioned store and where source files are looked for."""

    location: str = ""
    sample_dir: str = ""
    data_dir: str = ""
    download: bool = True

    def setup_for_execution(self, context: dg.InitResourceContext) -> None:
        """Every step has a store: every step ends with its run worker."""
        end_with_run_worker()

    def store(self) -> Store:
        return Store.at(self.location or home())

    def sample_directory(self) -> Path:
        """The committed sample, or ``LLMREC_SAMPLE_DIR`` (another generator seed)."""
        named = self.sample_dir or os.environ.get("LLMREC_SAMPLE_DIR")
        return Path(named) if named else _PROJECT / "data" / "sample"

    def incoming_directory(self, dataset: str) -> Path:
        """Where new rating files of a data set arrive (``ground.incoming``)."""
        return Path(str(self.store().root)) / "incoming" / dataset

    def user_data_directory(self) -> Path | None:
        """``LLMREC_DATA_DIR``, the directory or zip the user names."""
        named = self.data_dir or os.environ.get("LLMREC_DATA_DIR")
        return Path(named).expanduser() if named else None


@dataclass(frozen=True)
class Lease:
    """The device, and how long was waited for it (seconds)."""

    device: "Device"
    waited_seconds: float = 0.0

    def facts(self) -> dict[str, float]:
        """For the metadata of what is made on it."""
        return {"waited_for_device_seconds": round(self.waited_seconds, 1)}


class GpuResource(dg.ConfigurableResource[Any]):
    """One device, one user at a time.

    The pool ``gpu`` queues steps visibly, but after a killed run worker the orphan step trains on.
    So whoever uses the device also holds an operating-system file lock, keyed by the device and
    kept outside ``LLMREC_HOME``: two projects share one card. The kernel frees a dead holder's.
    """

    lock_dir: str = ""
    poll_seconds: float = 2.0
    say_every_seconds: float = 30.0

    @contextlib.contextmanager
    def lease(
        self,
        log: Any,
        who: str,
        *,
        run_id: str = "",
        waits: Callable[[str], Tell] | None = None,
    ) -> "Iterator[Device]":
        """Waits for the device, says for whom it waits, yields it and leaves it empty.

        Args:
            who: what the device is used for.
            run_id: in which run.
            waits: shows the wait for a device of that name; None: in the log.
        """
        with self._held(log, who, run_id, waits or partial(log_waiting, log)) as held:
            yield held.device

    @contextlib.contextmanager
    def lease_for(self, context: dg.AssetExecutionContext) -> "Iterator[Lease]":
        """``lease`` for the running step, with its waits: in the pool, then for the lock.

        Raises:
            OutOfMemoryError: nothing fits; with the peak that the recipe expects.
        """
        from llmrec_assets.models.memory import OutOfMemoryError

        who = f"{context.asset_key.path[-1]} {context.partition_key}"
        queued = _waited_in_pool(context)
        if queued >= 1:
            context.log.info(f"{who} waited {queued:.0f} s in the pool {GPU_POOL}")
        waits = partial(show_waiting, context)
        try:
            with self._held(context.log, who, context.run_id, waits) as held:
                yield dataclasses.replace(held, waited_seconds=queued + held.waited_seconds)
        except OutOfMemoryError as error:
            expected = recipe_of(context).expected_peak_memory_gb
            raise OutOfMemoryError(
                f"{error}. The recipe expects a peak of about {expected:g} GB"
            ) from error

    @contextlib.contextmanager
    def _held(
        self, log: Any, who: str, run_id: str, waits: Callable[[str], Tell]
    ) -> "Iterator[Lease]":
        from llmrec_assets.models.device import empty_device, pick_device

        end_with_run_worker()
        surroundings.use_models()
        device = pick_device()
        with holding(
            self.lock_directory() / f"{device.key}.lock",
            who,
            waits(device.name),
            run_id=run_id,
            poll_seconds=self.poll_seconds,
            say_every_seconds=self.say_every_seconds,
        ) as waited:
            started = time.monotonic()
            log.info(f"{who} has the device {device.name} (process {os.getpid()})")
            try:
                yield Lease(device, waited)
            finally:
                empty_device(device)
                used = time.monotonic() - started
                log.info(f"{who} gives the device back after {used:.1f} s (process {os.getpid()})")

    def lock_directory(self) -> Path:
        """Where the device's lock lies: outside ``LLMREC_HOME``, for two projects share one card.

        Raises:
            StoreError: it is open to others.
        """
        named = self.lock_dir or os.environ.get("LLMREC_LOCK_DIR")
        if named:
            directory = Path(named)
            directory.mkdir(mode=0o700, parents=True, exist_ok=True)
            return directory
        # Not TMPDIR: a daemon's and a terminal's may differ, and they share the device.
        place = _TEMPORARY if os.access(_TEMPORARY, os.W_OK) else Path(tempfile.gettempdir())
        directory = place / f"llmrec-locks-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        # The name can be guessed: whoever made the directory first could plant links in it.
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise StoreError(
                f"{directory} belongs to somebody else or is open to others: remove it, or name "
                "another directory with LLMREC_LOCK_DIR"
            )
        return directory


def _waited_in_pool(context: dg.AssetExecutionContext) -> float:
    """Seconds between the running step's asking for a place in its pool and getting it; 0 where
    Dagster keeps no such record."""
    storage = context.instance.event_log_storage
    if not storage.supports_global_concurrency_limits:
        return 0.0
    step = context.op_execution_context.get_step_execution_context().step.key
    for asked in storage.get_concurrency_info(GPU_POOL).pending_steps:
        if (asked.run_id, asked.step_key) == (context.run_id, step) and asked.assigned_timestamp:
            return (asked.assigned_timestamp - asked.enqueued_timestamp).total_seconds()
    return 0.0
