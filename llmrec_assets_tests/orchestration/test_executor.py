"""Step processes: forked from a server that holds the definitions, and gone with their run."""

import importlib.util
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import dagster as dg
import psutil
import pytest

from llmrec_assets.definitions import defs
from llmrec_assets.orchestration import executor

CASE = Path(__file__).with_name("executor_case.py")


def _start(directory: Path, name: str, *selected: str) -> subprocess.Popen:
    (directory / "dagster.yaml").write_text("telemetry:\n  enabled: false\n")
    return subprocess.Popen(
        [sys.executable, CASE, directory, name, *selected],
        cwd=CASE.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "DAGSTER_HOME": str(directory)},
    )


def _waiting(directory: Path) -> tuple[subprocess.Popen, psutil.Process, psutil.Process]:
    """A run, its step that sleeps, and that step's parent."""
    run = _start(directory, "waits")
    told = directory / "pid"
    deadline = time.monotonic() + 120
    while not (told.exists() and told.read_text()):
        assert time.monotonic() < deadline
        assert run.poll() is None, run.communicate()[1][-3000:]
        time.sleep(0.1)
    step = psutil.Process(int(told.read_text()))
    return run, step, step.parent()


@pytest.mark.skipif(not executor.forks(), reason="steps are not forked here")
def test_steps_are_forked_from_one_server_with_the_definitions(tmp_path: Path) -> None:
    run = _start(tmp_path, "tells")
    out, err = run.communicate(timeout=120)
    assert run.returncode == 0, err[-3000:]
    lines = [line.split(", ") for line in out.splitlines()]
    assert len(lines) == 2
    assert {tuple(line[1:]) for line in lines} == {
        ("definitions True", "ground True", "models False")
    }
    steps, servers = zip(
        *[line[0].removeprefix("step ").split(" of ") for line in lines], strict=True
    )
    assert len(set(steps)) == 2
    assert len(set(servers)) == 1
    assert str(run.pid) not in servers


@pytest.mark.skipif(not executor.forks(), reason="steps are not forked here")
def test_models_are_there_and_compute_in_forked_steps(tmp_path: Path) -> None:
    run = _start(tmp_path, "trains")
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err[-3000:]
    lines = [line.split(", ")[1:] for line in out.splitlines()]
    preloaded = executor.MODELS in executor.preloaded(with_models=True)
    assert lines == [[f"loaded {preloaded}", "found 1"]] * 2


@pytest.mark.skipif(not executor.forks(), reason="steps are not forked here")
@pytest.mark.parametrize("asset", ["without_a_model", "with_a_model"])
def test_a_run_of_some_assets_imports_models_for_those_alone(tmp_path: Path, asset: str) -> None:
    run = _start(tmp_path, "both", asset)
    out, err = run.communicate(timeout=200)
    assert run.returncode == 0, err[-3000:]
    (line,) = out.splitlines()
    models = asset == "with_a_model" and executor.MODELS in executor.preloaded(with_models=True)
    assert line.endswith(f"models {models}")


@pytest.mark.parametrize("signal_number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.skipif(not executor.forks(), reason="steps are not forked here")
def test_a_run_that_is_asked_to_end_leaves_no_process(tmp_path: Path, signal_number: int) -> None:
    """The signal goes to all, as a shell or a service manager sends it."""
    run, step, server = _waiting(tmp_path)
    os.killpg(run.pid, signal_number)
    run.communicate(timeout=60)
    assert not psutil.wait_procs([step, server], timeout=30)[1]


@pytest.mark.skipif(not executor.forks(), reason="steps are not forked here")
def test_a_step_ends_with_its_server(tmp_path: Path) -> None:
    run, step, server = _waiting(tmp_path)
    server.kill()
    assert not psutil.wait_procs([step], timeout=30)[1]
    run.communicate(timeout=60)
    assert run.returncode != 0


@pytest.mark.skipif(sys.platform == "win32", reason="needs SIGKILL")
def test_a_killed_run_takes_its_steps_and_their_server_along(tmp_path: Path) -> None:
    run, step, server = _waiting(tmp_path)
    run.send_signal(signal.SIGKILL)
    run.wait()
    _, alive = psutil.wait_procs([step, server], timeout=30)
    assert not alive


def test_where_steps_cannot_be_forked_they_are_started_afresh(monkeypatch) -> None:
    monkeypatch.setattr("tempfile.gettempdir", lambda: "/tmp/" + "long" * 20)
    assert executor.forking({"multiprocess": {}}, with_models=True) == {"multiprocess": {}}


@pytest.mark.skipif(not executor.forks(), reason="steps are not forked here")
@pytest.mark.parametrize(
    ("asked", "start_method"),
    [
        ({"multiprocess": {"max_concurrent": 1}}, "forkserver"),
        ({"multiprocess": {"start_method": {"spawn": {}}}}, "spawn"),
        ({"in_process": {}}, None),
    ],
)
def test_what_a_run_asks_for_is_kept(asked: dict, start_method: str | None) -> None:
    found = executor.forking(asked, with_models=False)
    assert list(found) == list(asked)
    if start_method:
        steps = found["multiprocess"]
        assert list(steps["start_method"]) == [start_method]
        assert steps.get("max_concurrent") == asked["multiprocess"].get("max_concurrent")


@pytest.mark.parametrize(
    ("job", "selected", "build", "models"),
    [
        ("recommender", None, "2.13.0+cpu", True),
        ("supervised", None, "2.13.0+cpu", True),
        ("recommender", ["sft_checkpoint", "prompts"], "2.13.0+cpu", True),
        *(("recommender", [name], "2.13.0+cpu", True) for name in executor.FITTING),
        ("recommender", ["prompts", "metric_table"], "2.13.0+cpu", False),
        ("evaluation", None, "2.13.0+cpu", False),
        ("source_data", None, "2.13.0+cpu", False),
        ("recommender", None, "2.13.0+cu130", False),  # one that counted its cards cannot fork
        ("recommender", None, "2.13.0", False),
    ],
)
def test_models_are_imported_beforehand_where_that_pays_and_is_safe(
    monkeypatch: pytest.MonkeyPatch,
    job: str,
    selected: list[str] | None,
    build: str,
    models: bool,
) -> None:
    run = defs.resolve_job_def(job)
    if selected is not None:
        run = run.get_subset(asset_selection={dg.AssetKey(name) for name in selected})
    monkeypatch.setattr("importlib.metadata.version", lambda name: build)
    found = executor.preloaded(executor.uses_models(run))
    assert found[0] == executor.DEFINITIONS
    assert (executor.MODELS in found) == models
    for name in found:
        assert importlib.util.find_spec(name), name


def test_every_job_has_it() -> None:
    for job in defs.resolve_all_job_defs():
        assert job.executor_def is executor.step_executor, job.name
