"""One attempt: ``llmrec run``, or the same jobs with a process per step, to be killed from outside
or at a file operation of its own.

What belongs here: starting the command in a process of its own, and the trace that says how far it
came. What does not: when it is killed (``plan``), what is looked at afterwards (``look``).

A *warm* start forks a process in which the libraries are loaded, which saves the fifteen seconds of
processor time that a *cold* start, the command line itself, spends on loading them.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

PROJECT = Path(__file__).resolve().parents[2]
RECIPES = Path(__file__).resolve().parent / "recipes"
DATASET, RECIPE = "sample", "crash"
PARTITION = f"{DATASET}|{RECIPE}"
COMMAND = ["run", "--dataset", DATASET, "--recipe", RECIPE]
_PR_SET_PDEATHSIG = 1
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC


@dataclass(frozen=True)
class Place:
    """Where one run keeps everything; nothing of it is the project's own ``data``."""

    root: Path
    sample: Path
    home_elsewhere: Path | None = None
    history_elsewhere: Path | None = None

    @property
    def home(self) -> Path:
        return self.home_elsewhere or self.root / "home"

    @property
    def history(self) -> Path:
        return self.history_elsewhere or self.root / "dagster"

    @property
    def trace(self) -> Path:
        return self.root / "trace.log"

    @property
    def output(self) -> Path:
        return self.root / "output.log"

    @property
    def modules(self) -> Path:
        return self.root / "modules.json"

    def environment(self) -> dict[str, str]:
        return {
            "LLMREC_HOME": str(self.home),
            "LLMREC_LOCK_DIR": str(self.root / "locks"),
            "LLMREC_SAMPLE_DIR": str(self.sample),
            "LLMREC_RECIPES_DIR": str(RECIPES),
            "LLMREC_DEVICE": "cpu",
            "DAGSTER_HOME": str(self.history),
            "PYTHONUNBUFFERED": "1",
        }


def load_modules(names: Iterable[str]) -> None:
    """Imports what an earlier attempt had imported by its end."""
    for name in names:
        if name not in sys.modules:
            with suppress(Exception):  # made at run time, or only importable from where it was
                importlib.import_module(name)


def load_libraries(modules: Iterable[str] = ()) -> None:
    """Whatever a run loads, before anything is forked. Starts no thread."""
    import llmrec_assets.runs
    from llmrec_assets.models import (  # noqa: F401
        answers,
        base,
        classical_lists,
        dpo,
        leave_last_out,
        memorisation,
        ppo,
        reward,
        sampled,
        sft,
    )

    load_modules(modules)
    defs = llmrec_assets.runs.build_defs()
    for job in ("source_data", "prepare_base_model", "recommender"):
        defs.resolve_job_def(job)
    llmrec_assets.runs.build_defs = lambda: defs


def start_cold(place: Place) -> int:
    """The command line itself, in a process group of its own; returns the process id."""
    with place.output.open("ab") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", "llmrec_assets.cli", *COMMAND],
            env={**os.environ, **place.environment()},
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
    return process.pid


def start_warm(
    place: Place,
    *,
    steps: bool = False,
    at: tuple[str, str] | None = None,
    do: Callable[[], None] | None = None,
    every_file: bool = False,
    bound: bool = False,
) -> int:
    """The same in a forked process; returns its id.

    Args:
        steps: a process per step, under one that runs the job; else all in one process.
        at: (step, file operation as ``described``): when that step is about to do that for the
            first time, its process is killed.
        do: is done there instead, and the process goes on.
        every_file: writes every file operation into the trace.
        bound: permissions bind the process although it is root's.
    """
    pid = os.fork()
    if pid:
        return pid
    code = 1
    try:
        os.setpgid(0, 0)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if bound:
            _give_up_override()
        os.environ.update(place.environment())
        output = os.open(place.output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        for stream in (1, 2):
            os.dup2(output, stream)
        say = _tracer(place.trace)
        going_on = _watch_steps(say)
        if at is not None or every_file:
            _watch_files(place.home, going_on, at, do or _kill_this, say, every_file)
        say("START")
        code = _run_with_step_processes() if steps else _run()
        say(f"END {code}")
        if every_file:
            place.modules.write_text(json.dumps(sorted(sys.modules)))
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        os._exit(code)


def _give_up_override() -> None:
    """Root without the capability to pass over permission bits."""
    libc = ctypes.CDLL(None, use_errno=True)
    header = (ctypes.c_uint32 * 2)(_CAPABILITY_VERSION_3, 0)
    sets = (ctypes.c_uint32 * 6)()  # effective, permitted, inheritable; twice 32 bits
    if libc.capget(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capget")
    for i in range(3):
        sets[i] &= ~_DAC_OVERRIDE_AND_READ_SEARCH
    if libc.capset(header, sets) != 0:
        raise OSError(ctypes.get_errno(), "capset")


_CAPABILITY_VERSION_3 = 0x20080522
_DAC_OVERRIDE_AND_READ_SEARCH = 0b110


def in_a_process(work: Callable[[], Any]) -> Any:
    """``work()`` in a forked process: what starts threads must not do so here, where attempts
    are forked."""
    reader, writer = os.pipe()
    pid = os.fork()
    if not pid:
        code = 1
        try:
            os.close(reader)
            with os.fdopen(writer, "w") as pipe:
                json.dump(work(), pipe)
            code = 0
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            os._exit(code)
    os.close(writer)
    with os.fdopen(reader) as pipe:
        answer = pipe.read()
    _, status = os.waitpid(pid, 0)
    if status:
        raise RuntimeError("looking at the store failed: see the traceback above")
    return json.loads(answer)


def _run() -> int:
    from llmrec_assets import cli

    return cli.main(COMMAND)


def _run_with_step_processes() -> int:
    """``llmrec run`` with Dagster's multiprocess executor: this process is the run worker."""
    sys.path.insert(0, str(Path(__file__).resolve().parent))
    import dagster as dg
    from dagster._core.definitions.reconstruct import ReconstructableRepository

    from llmrec_assets import cli
    from llmrec_assets.orchestration.dead_runs import bury_dead_runs, tags_of_this_process

    cli._initialise_dagster_home()
    repository = ReconstructableRepository.for_module("graph", "defs")
    with dg.DagsterInstance.get() as instance:
        bury_dead_runs(instance)
        for name, partition in (
            ("source_data", DATASET),
            ("prepare_base_model", RECIPE),
            ("recommender", PARTITION),
        ):
            job = repository.get_reconstructable_job(name)
            definition = job.get_definition()
            assert definition.partitions_def is not None
            tags = definition.partitions_def.get_tags_for_partition_key(partition)
            result = dg.execute_job(job, instance=instance, tags={**tags, **tags_of_this_process()})
            if not result.success:
                return 1
    return 0


def _tracer(path: Path) -> Callable[[str], None]:
    descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)

    def say(what: str) -> None:
        # One write of a short line to a file opened for appending is not torn, also when several
        # step processes write.
        os.write(descriptor, f"{time.monotonic():.3f} {os.getpid()} {what}\n".encode())

    return say


def _watch_steps(say: Callable[[str], None]) -> list[str]:
    """Traces steps as Dagster's events are recorded; the list holds this process's own."""
    from dagster._core.instance import DagsterInstance

    record = DagsterInstance.handle_new_event
    going_on: list[str] = []

    def handle(self: Any, event: Any, **options: Any) -> Any:
        found = event.dagster_event
        if found is not None and found.event_type_value in _STEP_EVENTS:
            say(f"{found.event_type_value} {found.step_key}")
            going_on[:] = [step for step in going_on if step != found.step_key]
            if found.event_type_value == "STEP_START":
                going_on.append(str(found.step_key))
        return record(self, event, **options)

    DagsterInstance.handle_new_event = handle  # type: ignore[method-assign]
    return going_on


_STEP_EVENTS = ("STEP_START", "STEP_SUCCESS", "STEP_FAILURE")


def _kill_this() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _watch_files(
    home: Path,
    going_on: list[str],
    at: tuple[str, str] | None,
    do: Callable[[], None],
    say: Callable[[str], None],
    every_file: bool,
) -> None:
    """Python tells before it opens for writing, renames or removes: there it happens."""
    happened = False

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal happened
        if event not in _PLACE_OF or happened:
            return
        operation = described(event, arguments, home)
        if operation is None:
            return
        step = going_on[-1] if going_on else "-"
        if every_file:
            say(f"FILE {step} {operation}")
        if at == (step, operation):
            happened = True
            say(f"KILLED {step} {operation}")
            do()

    sys.addaudithook(hook)


#: Audit event → which argument is the path that changes.
_PLACE_OF: Mapping[str, int] = {
    "open": 0,
    "os.rename": 1,
    "os.remove": 0,
    "os.mkdir": 0,
    "os.utime": 0,
    "shutil.rmtree": 0,
}


def described(event: str, arguments: tuple[Any, ...], home: Path) -> str | None:
    """``rename tables/prompts/sample/crash/current.json``: an operation that changes a file below
    ``home``, versions and random names written as ``*``; None for any other."""
    path = arguments[_PLACE_OF[event]]
    if not isinstance(path, (str, os.PathLike)):
        return None
    text = os.fspath(path)
    if not isinstance(text, str) or not text.startswith(f"{home}{os.sep}"):
        return None
    if event == "open" and not (arguments[2] or 0) & _WRITING:
        return None
    relative = re.sub(r"[0-9a-f]{32}|[0-9a-f]{16}", "*", text[len(str(home)) + 1 :])
    return f"{event.split('.')[-1]} {relative}"
