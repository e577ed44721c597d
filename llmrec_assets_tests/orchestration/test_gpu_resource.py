"""One device, one user at a time: also when processes are killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from itertools import pairwise
from pathlib import Path

import psutil
import pytest

from llmrec_assets.orchestration import resources
from llmrec_assets.orchestration.resources import GpuResource, home

# A process that takes the lease, as a step does. torch is not needed for that, so that the tests
# are about locks and not about seconds of imports.
TAKER = '''
import json, multiprocessing, os, signal, sys, time, types
from pathlib import Path

fake = types.ModuleType("llmrec_assets.models.device")
fake.pick_device = lambda: types.SimpleNamespace(type="cpu", name="a card", key="card-1")
fake.empty_device = lambda device: None
sys.modules["llmrec_assets.models.device"] = fake

from llmrec_assets.orchestration.resources import GpuResource

class Log:
    def info(self, text):
        print(text, flush=True)

def wait_for(path):
    while not path.exists():
        time.sleep(0.01)

def take_turns(name, place, turns):
    """Enters `turns` times; a marker that must not exist shows a second user."""
    gpu = GpuResource(poll_seconds=0.02)
    (place / f"{name}.ready").touch()
    for other in ("a", "b", "c"):
        wait_for(place / f"{other}.ready")
    for _ in range(turns):
        with gpu.lease(Log(), name):
            marker = os.open(place / "inside", os.O_CREAT | os.O_EXCL)
            time.sleep(0.05)
            os.close(marker)
            (place / "inside").unlink()
        time.sleep(0.005)

def hold(name):
    with GpuResource(poll_seconds=0.1, say_every_seconds=0.3).lease(Log(), name):
        print("HOLDING", os.getpid(), flush=True)
        time.sleep(600)

def use_for_a_moment(place, number):
    """Takes the lease again and again; writes the time as long as it has the device."""
    gpu = GpuResource(poll_seconds=0.01)
    turn = 0
    while True:
        turn += 1
        with gpu.lease(types.SimpleNamespace(info=lambda text: None), f"user {number}"):
            seen = os.open(place / f"{number}-{os.getpid()}-{turn}", os.O_CREAT | os.O_WRONLY)
            for _ in range(20):
                os.write(seen, b"%d\\n" % time.monotonic_ns())
                time.sleep(0.001)
            os.close(seen)
        time.sleep(0.001)

def kill_holders(place, users, kills):
    """Forks users of the device and kills whoever has it, again and again."""
    holder = Path(os.environ["LLMREC_LOCK_DIR"]) / "card-1.json"
    living, started = {}, 0

    def start():
        nonlocal started
        started += 1
        pid = os.fork()
        if pid == 0:
            use_for_a_moment(place, started)
        living[pid] = started

    for _ in range(users):
        start()
    random = __import__("random").Random(7)
    killed = 0
    while killed < kills:
        time.sleep(random.uniform(0, 0.05))
        try:
            pid = json.loads(holder.read_text())["pid"]
        except (OSError, ValueError):
            continue
        if pid in living:
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)
            del living[pid]
            killed += 1
            start()
    for pid in living:
        os.kill(pid, signal.SIGKILL)
    print("KILLED", killed, flush=True)

if __name__ == "__main__":
    what, *rest = sys.argv[1:]
    if what == "turns":
        take_turns(rest[0], Path(rest[1]), int(rest[2]))
    elif what == "hold":
        hold(rest[0])
    elif what == "kills":
        kill_holders(Path(rest[0]), int(rest[1]), int(rest[2]))
    elif what == "worker":  # a run worker with a step process, as Dagster's executor starts it
        step = multiprocessing.get_context("spawn").Process(target=hold, args=(rest[0],))
        step.start()
        step.join()
'''


@pytest.fixture
def taker(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    script = tmp_path / "taker.py"
    script.write_text(TAKER)
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, str(script), *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield start
    for process in started:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        assert process.stdout
        process.stdout.close()


@contextmanager
def within(seconds: float, what: str) -> Iterator[Callable[[], bool]]:
    """``while waiting():`` with a deadline."""
    deadline = time.monotonic() + seconds

    def waiting() -> bool:
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {seconds} s")
        time.sleep(0.05)
        return True

    yield waiting


def pid_holding(process: subprocess.Popen[str]) -> int:
    return int(line_with(process, "HOLDING").split()[1])


def line_with(process: subprocess.Popen[str], text: str, seconds: float = 60) -> str:
    """The next line that holds ``text``; a process that does not print it in time is killed."""
    seen = []
    assert process.stdout
    too_late = threading.Timer(seconds, process.kill)
    too_late.start()
    try:
        for line in process.stdout:
            seen.append(line)
            if text in line:
                return line
    finally:
        too_late.cancel()
    raise AssertionError(f"no line with {text!r} within {seconds} s in {seen}")


def test_no_two_processes_hold_the_device_at_once(taker, tmp_path: Path) -> None:
    turns = 8
    processes = [taker("turns", name, str(tmp_path), str(turns)) for name in "abc"]
    outputs = [process.communicate(timeout=60)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0, 0], outputs
    for name, output in zip("abc", outputs, strict=True):
        assert output.count(f"{name} has the device a card") == turns
    assert any("waiting" in output for output in outputs)  # they did compete


def test_killing_whoever_has_the_device_never_lets_two_use_it(taker, tmp_path: Path) -> None:
    """Five users without a pool, the holder killed 40 times: no two were ever seen at it at once,
    and the device was used after every kill."""
    place = tmp_path / "seen"
    place.mkdir()
    output = taker("kills", str(place), "5", "40").communicate(timeout=120)[0]
    assert "KILLED 40" in output, output
    uses = []
    for file in place.iterdir():
        times = [int(line) for line in file.read_text().split()]
        if times:  # killed before it wrote anything otherwise
            uses.append((times[0], times[-1], len(times)))
    uses.sort()
    assert len(uses) > 40
    assert sum(length < 20 for *_, length in uses) > 10  # killed in the middle of their use
    for (_, last, _), (first, _, _) in pairwise(uses):
        assert last < first


def test_who_waits_is_told_for_whom_and_a_killed_holder_frees_the_device(taker) -> None:
    holder = taker("hold", "sft_checkpoint ml-1m|paper")
    pid = pid_holding(holder)
    waiter = taker("hold", "sft_checkpoint sample|tiny")
    line = line_with(waiter, "waiting")
    assert f"held by sft_checkpoint ml-1m|paper (process {pid}, since " in line
    assert "for a card" in line
    line_with(waiter, "waiting")  # again: it does not fall silent
    holder.kill()
    assert pid_holding(waiter) == waiter.pid


def test_a_step_whose_run_worker_was_killed_ends_and_frees_the_device(taker) -> None:
    worker = taker("worker", "orphan")
    step = psutil.Process(pid_holding(worker))
    assert step.ppid() == worker.pid
    waiter = taker("hold", "the next")
    line_with(waiter, "held by orphan")
    os.kill(worker.pid, signal.SIGKILL)
    with within(10, "the orphan step's end") as waiting:
        while step.is_running() and step.status() != psutil.STATUS_ZOMBIE and waiting():
            pass
    assert pid_holding(waiter) == waiter.pid


def test_a_step_with_a_living_run_worker_keeps_the_device(taker) -> None:
    worker = taker("worker", "a step")
    step = psutil.Process(pid_holding(worker))
    time.sleep(5)  # more than two looks at the parent
    assert step.is_running() and step.status() != psutil.STATUS_ZOMBIE


def test_the_lock_is_the_devices_and_not_the_projects(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Two projects, each with its own LLMREC_HOME and TMPDIR, share one card."""
    monkeypatch.delenv("LLMREC_LOCK_DIR")
    monkeypatch.setattr(resources, "_TEMPORARY", tmp_path)
    places = set()
    for project in ("one", "two"):
        monkeypatch.setenv("TMPDIR", str(tmp_path / f"{project}-tmp"))
        monkeypatch.setattr("tempfile.tempdir", None)
        monkeypatch.setenv("LLMREC_HOME", str(tmp_path / project))
        places.add(GpuResource().lock_directory())
        assert Path(home()) == tmp_path / project
    (place,) = places
    assert place.is_dir() and place.parent == tmp_path
    assert place.stat().st_mode & 0o077 == 0


class Lines(list[str]):
    def info(self, text: str) -> None:
        self.append(text)


def test_a_lease_leaves_nothing_behind_even_when_its_user_fails(tmp_path: Path) -> None:
    def fail_with_the_device() -> None:
        with GpuResource(lock_dir=str(tmp_path)).lease(Lines(), "a failing step") as device:
            assert [p.name for p in tmp_path.glob("*.json")] == [f"{device.key}.json"]
            raise ZeroDivisionError

    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            fail_with_the_device()
        assert not list(tmp_path.glob("*.json"))


def test_a_damaged_holder_file_does_not_stop_who_waits(taker) -> None:
    lock_dir = Path(os.environ["LLMREC_LOCK_DIR"])
    holder = taker("hold", "someone")
    pid_holding(holder)
    (lock_dir / "card-1.json").write_text("{not json")
    waiter = taker("hold", "next")
    line_with(waiter, "held by a process that has just started or ended")
    holder.kill()
    assert pid_holding(waiter) == waiter.pid
