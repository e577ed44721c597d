"""What every test gets: places of its own, and where the real data is.

No test may touch the project's ``data``, the user's ``DAGSTER_HOME`` or the device lock that a
training on this machine holds. A ``Home`` is one such set of places, with the graph built on it.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import uuid
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import dagster as dg
import pytest
from ui_session import clicked, page, page_or_none, ui  # noqa: F401  (fixtures for all tests)

from llmrec_assets.definitions import build_defs
from llmrec_assets.ground.store import Store
from llmrec_assets.orchestration.resources import GpuResource, StoreResource
from llmrec_assets.runs import run_partition

PROJECT = Path(__file__).resolve().parents[1]
_NAMED_DATA = os.environ.get("LLMREC_DATA_DIR")
_OURS = (
    *("LLMREC_HOME", "LLMREC_LOCK_DIR", "LLMREC_SAMPLE_DIR", "LLMREC_RECIPES_DIR", "LLMREC_DEVICE"),
    "DAGSTER_HOME",
)

# The test model has two layers: a second thread would only spin. Before torch is imported.
os.environ.setdefault("OMP_NUM_THREADS", "1")


def pytest_configure(config: pytest.Config) -> None:
    """Interrupts as in a foreground job; temporary directories in memory, where there is room for
    the 600 MB they take.

    Every transaction of Dagster's SQLite files waits for the disk: 46 ms each instead of 0.3 ms on
    a development machine, and a run makes hundreds.
    """
    # A shell starts background jobs with SIGINT ignored. Dagster then ignores SIGTERM too, its log
    # followers inherit that where a run is in a thread, and each is waited for in vain for 30 s.
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    memory = Path("/dev/shm")
    usable = memory.is_dir() and os.access(memory, os.W_OK)
    if usable and shutil.disk_usage(memory).free > 4e9 and config.option.basetemp is None:
        os.environ.setdefault("PYTEST_DEBUG_TEMPROOT", str(memory))


@pytest.fixture(autouse=True)
def _isolated(
    request: pytest.FixtureRequest,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Whatever a test forgets to name lands in a directory that exists for it alone."""
    places = tmp_path_factory.getbasetemp() / "isolated" / uuid.uuid4().hex
    for name in _OURS:
        monkeypatch.delenv(name, raising=False)
    (places / "dagster").mkdir(parents=True)
    monkeypatch.setenv("LLMREC_HOME", str(places / "home"))
    monkeypatch.setenv("DAGSTER_HOME", str(places / "dagster"))
    monkeypatch.setenv("LLMREC_LOCK_DIR", str(places / "locks"))
    monkeypatch.setenv("LLMREC_DEVICE", "cpu")
    if "orchestration" in request.path.parts:
        monkeypatch.delenv("LLMREC_DATA_DIR", raising=False)


@pytest.fixture(scope="session")
def real_data() -> Callable[[str], Path]:
    """``real_data("ml-100k")`` is the directory of that data set; skips where there is none."""

    def find(dataset: str) -> Path:
        places = [*([Path(_NAMED_DATA)] if _NAMED_DATA else []), PROJECT.parent / "shared" / "data"]
        for place in places:
            if (place / dataset).is_dir():
                return place / dataset
        pytest.skip(f"{dataset} is not in {' or '.join(map(str, places))}: set LLMREC_DATA_DIR")

    return find


@dataclass(frozen=True)
class Home:
    """One isolated ``LLMREC_HOME``, ``DAGSTER_HOME`` and lock directory."""

    root: Path
    sample_dir: Path = PROJECT / "data" / "sample"
    started: list[subprocess.Popen] = field(default_factory=list, repr=False)

    @property
    def location(self) -> Path:
        return self.root / "home"

    @property
    def store(self) -> Store:
        return Store.at(self.location)

    def current(self, partition: str = "sample|tiny", kind: str = "tables") -> dict[str, str]:
        """Asset → version in force, of every asset published for ``partition``."""
        names = sorted(path.name for path in (self.location / kind).iterdir())
        versions = {name: self.store.current(name, partition, kind) for name in names}
        return {name: version for name, version in versions.items() if version}

    def environment(self, **changes: str) -> dict[str, str]:
        """For a process of its own."""
        kept = {k: v for k, v in os.environ.items() if k not in (*_OURS, "LLMREC_DATA_DIR")}
        return {
            **kept,
            "LLMREC_HOME": str(self.location),
            "LLMREC_LOCK_DIR": str(self.root / "locks"),
            "LLMREC_SAMPLE_DIR": str(self.sample_dir),
            "LLMREC_DEVICE": "cpu",
            "DAGSTER_HOME": str(self.root / "dagster"),
            "PYTHONUNBUFFERED": "1",
            **changes,
        }

    def llmrec(
        self, *arguments: str, timeout: float = 240, **changes: str
    ) -> subprocess.CompletedProcess[str]:
        """Runs the command line to its end; standard error is kept apart."""
        return subprocess.run(
            [sys.executable, "-m", "llmrec_assets.cli", *arguments],
            env=self.environment(**changes),
            cwd=self.root,
            capture_output=True,
            text=True,
            timeout=timeout,
        )

    def start(self, *command: str, **changes: str) -> subprocess.Popen[str]:
        """Starts a process in a group of its own, its output in ``output.log``."""
        log = (self.root / "output.log").open("a")
        process = subprocess.Popen(
            command,
            env=self.environment(**changes),
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def instance(self) -> dg.DagsterInstance:
        """The Dagster instance under ``DAGSTER_HOME``, with the project's settings."""
        directory = self.root / "dagster"
        directory.mkdir(exist_ok=True)
        shutil.copyfile(PROJECT / "dagster.yaml", directory / "dagster.yaml")
        return dg.DagsterInstance.from_config(str(directory))

    def defs(self) -> dg.Definitions:
        """The project's graph over these places."""
        storage = StoreResource(
            location=str(self.location), sample_dir=str(self.sample_dir), download=False
        )
        gpu = GpuResource(lock_dir=str(self.root / "locks"), poll_seconds=0.05)
        return build_defs(resource_overrides={"storage": storage, "gpu": gpu})

    def run(self, instance: dg.DagsterInstance, **options: Any) -> list[str]:
        """``sample | tiny`` from the files to the metric table, in this process."""
        return run_partition("sample", "tiny", instance=instance, defs=self.defs(), **options)

    def materialize(
        self,
        instance: dg.DagsterInstance,
        *assets: str,
        job: str = "recommender",
        partition: str = "sample|tiny",
        config: dict[str, Any] | None = None,
    ) -> dg.ExecuteInProcessResult:
        """Some assets of a job; a failing step is a result, not an exception. ``config`` goes to
        every one of them."""
        ops = {} if config is None else {"ops": {name: {"config": config} for name in assets}}
        return (
            self.defs()
            .resolve_job_def(job)
            .execute_in_process(
                instance=instance,
                partition_key=partition,
                asset_selection=[dg.AssetKey(name) for name in assets],
                run_config=ops,
                raise_on_error=False,
            )
        )


@pytest.fixture(scope="session")
def new_home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[..., Home]]:
    """Makes a ``Home``: empty, or with everything that another one has published. Processes
    started in it end with the session at the latest."""
    homes = []

    def make(like: Home | None = None, **options: Any) -> Home:
        home = Home(tmp_path_factory.mktemp("place"), **options)
        if like is not None:
            shutil.copytree(like.location, home.location)
        homes.append(home)
        return home

    yield make
    for process in [process for home in homes for process in home.started]:
        if process.poll() is None:
            os.killpg(process.pid, 9)
            process.wait()


@dataclass(frozen=True)
class FinishedRun:
    """A home where ``sample | tiny`` has run once; it is read, never changed."""

    home: Home
    instance: dg.DagsterInstance
    run_ids: list[str]


@pytest.fixture(scope="session")
def finished(new_home: Callable[..., Home]) -> Iterator[FinishedRun]:
    """``sample | tiny``, materialized once for the whole session in this process."""
    home = new_home()
    with home.instance() as instance:
        yield FinishedRun(home, instance, home.run(instance))


@pytest.fixture
def copied(
    finished: FinishedRun, new_home: Callable[..., Home]
) -> Iterator[tuple[Home, dg.DagsterInstance]]:
    """A home of the test's own in which ``sample | tiny`` has run, and an empty instance."""
    home = new_home(like=finished.home)
    with home.instance() as instance:
        yield home, instance
