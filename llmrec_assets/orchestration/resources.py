"""Resources: where things are stored, and the one chair in front of the GPU.

What belongs here: paths from the environment, the store, the device lease. What does not: choosing
a device or a dtype (``models.device``), publishing (``ground.store``).
"""

import contextlib
import json
import multiprocessing
import os
import stat
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
from filelock import FileLock, Timeout

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.store import Store

if TYPE_CHECKING:
    from llmrec_assets.models.device import Device

GPU_POOL = "gpu"
_PROJECT = Path(__file__).resolve().parents[2]


def home() -> str:
    """``LLMREC_HOME``: where everything is kept (default: the project's ``data``)."""
    return os.environ.get("LLMREC_HOME") or str(_PROJECT / "data")


class StoreResource(dg.ConfigurableResource[Store]):
    """The versioned store and where source files are looked for."""

    location: str = ""
    sample_dir: str = ""
    data_dir: str = ""
    download: bool = True

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
    def lease(self, log: Any, who: str) -> "Iterator[Device]":
        """Waits for the device, says for whom it waits, yields it and leaves it empty."""
        from llmrec_assets.models.device import empty_device, pick_device

        _end_with_run_worker()
        device = pick_device()
        directory = self.lock_directory()
        lock = FileLock(directory / f"{device.key}.lock")
        holder = directory / f"{device.key}.json"
        self._acquire(lock, holder, log, device.name)
        try:
            _write_holder(holder, {"pid": os.getpid(), "who": who, "since": time.time()})
            log.info(f"{who} has the device {device.name}")
            yield device
        finally:
            empty_device(device)
            holder.unlink(missing_ok=True)
            lock.release()

    def _acquire(self, lock: FileLock, holder: Path, log: Any, device_name: str) -> None:
        started, said = time.monotonic(), 0.0
        while True:
            try:
                lock.acquire(timeout=self.poll_seconds)
                return
            except Timeout:
                waited = time.monotonic() - started
                if not said or waited - said >= self.say_every_seconds:
                    said = waited
                    log.info(
                        f"waiting {waited:.0f} s for {device_name}, held by {_read_holder(holder)}"
                    )

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
        directory = Path(tempfile.gettempdir()) / f"llmrec-locks-{os.getuid()}"
        directory.mkdir(mode=0o700, exist_ok=True)
        # The name can be guessed: whoever made the directory first could plant links in it.
        found = directory.lstat()
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.getuid() or found.st_mode & 0o022:
            raise StoreError(
                f"{directory} belongs to somebody else or is open to others: remove it, or name "
                "another directory with LLMREC_LOCK_DIR"
            )
        return directory


def _write_holder(path: Path, fact: dict[str, Any]) -> None:
    aside = path.with_suffix(f".{os.getpid()}")
    aside.write_text(json.dumps(fact))
    os.replace(aside, path)


def _read_holder(path: Path) -> str:
    try:
        fact = json.loads(path.read_text())
        return f"{fact['who']} (process {fact['pid']}, {time.time() - fact['since']:.0f} s)"
    except (OSError, ValueError, KeyError, TypeError):
        return "a process that has just started or ended"


def _end_with_run_worker(poll_seconds: float = 2.0) -> None:
    """A step whose run worker has died ends itself, so that it does not train on unseen.

    Only a step process that multiprocessing started has a run worker; in-process runs have none.
    """
    worker = multiprocessing.parent_process()
    if worker is None:
        return

    def watch() -> None:
        while worker.is_alive():
            time.sleep(poll_seconds)
        os._exit(70)  # at once: trainer checkpoints are complete or unmarked, nothing to tidy

    threading.Thread(target=watch, name="end-with-run-worker", daemon=True).start()
