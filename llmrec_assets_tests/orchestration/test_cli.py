"""The command line: what it prints, what it refuses, and that killing it costs only time."""

from __future__ import annotations

import filecmp
import os
import resource
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import pytest

from llmrec_assets import cli
from llmrec_assets.ground import splits
from llmrec_assets.ground.store import read_manifest
from llmrec_assets.orchestration.dead_runs import tags_of_this_process
from llmrec_assets.runs import bury_dead_runs

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

PROJECT = Path(__file__).resolve().parents[2]
LLMREC = (sys.executable, "-m", "llmrec_assets.cli")
NOT_YET, STARTED = dg.DagsterRunStatus.NOT_STARTED, dg.DagsterRunStatus.STARTED
RUN = (*LLMREC, "run", "--dataset", "sample", "--recipe", "tiny")


@pytest.fixture(scope="module")
def two_first_users(new_home: Callable[..., Home]) -> tuple[Home, list[str]]:
    """Two people run the same thing at once in an empty home: the home, and what they saw."""
    home = new_home()
    environment = home.environment()
    processes = [
        subprocess.Popen(
            RUN, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        for _ in range(2)
    ]
    outputs = [process.communicate(timeout=240)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], "\n".join(outputs)[-4000:]
    return home, outputs


def test_another_process_in_another_home_gives_the_same_tables(
    two_first_users: tuple[Home, list[str]], finished: FinishedRun
) -> None:
    home, _ = two_first_users
    for partition in ("sample", "sample|tiny"):
        assert home.current(partition) == finished.home.current(partition)
    checkpoints = home.current(kind="checkpoints")
    assert checkpoints == finished.home.current(kind="checkpoints")


def test_two_first_users_train_once_and_both_see_the_table(
    two_first_users: tuple[Home, list[str]],
) -> None:
    home, outputs = two_first_users
    for asset, partition in (("base_model", "tiny"), ("sft_checkpoint", "sample/tiny")):
        published = home.location / "checkpoints" / asset / partition
        assert len([path for path in published.iterdir() if path.is_dir()]) == 1, asset
    assert sum("published sft_checkpoint" in output for output in outputs) == 1
    for output in outputs:
        table = output[output.index("sample | tiny") :]
        assert "synthetic data" in table.splitlines()[0]
        assert [line.split()[0] for line in table.splitlines()[2:31]] == [
            *(stage for stage in ("base", "sft", "dpo", "rlhf") for _decoding in range(4)),
            *("als", "als", "ease", "ease", "itemknn", "itemknn"),
            *("itemknn-causal", "itemknn-causal", "popularity", "popularity"),
            *("popularity-causal", "sasrec", "sasrec"),
        ]


def test_table_prints_the_published_table(two_first_users: tuple[Home, list[str]]) -> None:
    home, outputs = two_first_users
    done = home.llmrec("table", "--recipe", "tiny")
    assert done.returncode == 0
    assert done.stdout in outputs[0]


def test_evaluate_scores_again_what_has_been_answered_without_a_model(
    finished: FinishedRun, new_home: Callable[..., Home]
) -> None:
    home = new_home(like=finished.home)
    before = home.current()
    for stage in ("dpo", "rlhf"):
        shutil.rmtree(home.location / "tables" / f"{stage}_responses")
        shutil.rmtree(home.location / "tables" / f"{stage}_recommendations")
    before_it = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = home.llmrec("evaluate", "--recipe", "tiny")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    # its own work, not the wall clock: on a busy machine 5 s of it have taken minutes
    seconds = used.ru_utime + used.ru_stime - before_it.ru_utime - before_it.ru_stime
    print(f"llmrec evaluate: {seconds:.0f} s of CPU")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "left out: dpo_responses is missing" in done.stderr
    lines = done.stdout.splitlines()
    stages = [line.split()[0] for line in lines if "popularity" in line or "/" in line]
    assert stages[:8] == ["base"] * 4 + ["sft"] * 4
    report = lines[-1].removeprefix("report: ")
    assert Path(report).is_file()
    after = home.current()
    kept = ("sft_responses", "sft_recommendations", "baseline_recommendations", "prompts")
    assert {name: after[name] for name in kept} == {name: before[name] for name in kept}
    assert after["metric_table"] != before["metric_table"]
    assert 0 < seconds < 30  # about 5: no model is loaded


def test_evaluate_says_when_there_is_nothing_to_evaluate(new_home: Callable[..., Home]) -> None:
    done = new_home().llmrec("evaluate", "--recipe", "tiny")
    assert done.returncode == 1
    assert "prompts has not been materialized for sample|tiny" in done.stderr.splitlines()[-1]


def test_sql_answers_and_names_the_tables_it_knows(
    two_first_users: tuple[Home, list[str]],
) -> None:
    home, _ = two_first_users
    answer = home.llmrec("sql", "select dataset, count(*) as n from ratings group by all")
    assert "24876" in answer.stdout and "sample" in answer.stdout
    unknown = home.llmrec("sql", "select * from rating")
    assert (unknown.returncode, unknown.stdout) == (1, "")
    (line,) = unknown.stderr.splitlines()
    assert "Table with name rating does not exist!" in line
    assert "metric_table, movies, preference_pairs, prompts, ratings, " in line
    for query, found in (
        ("selec", 'syntax error at or near "selec"'),
        ("select stars from ratings", 'Referenced column "stars" not found'),
    ):
        wrong = home.llmrec("sql", query)
        (line,) = wrong.stderr.splitlines()
        assert (wrong.returncode, wrong.stdout) == (1, "") and found in line


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (
            ["table", "--recipe", "tiny"],
            "metric_table has not been materialized for sample|tiny: materialize it first "
            "(`make run`",
        ),
        (
            ["table", "--recipe", "tinny"],
            "no recipe named 'tinny': known recipes are cpu, cpu-anonymised,",
        ),
        (
            ["run", "--recipe", "tinny"],
            "no recipe named 'tinny': known recipes are cpu, cpu-anonymised,",
        ),
        (
            ["table", "--dataset", "ml-20m"],
            "no data set named 'ml-20m': known are ",
        ),
        (
            ["run", "--dataset", "ml-20m"],
            "no data set named 'ml-20m': known are ",
        ),
        (["sql", "select * from ratings"], "Tables: none yet"),
    ],
)
def test_before_any_run_a_user_is_told_what_to_do(
    arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 1
    printed = capsys.readouterr()
    (line,) = printed.err.splitlines()
    assert line.startswith("llmrec: ") and said in line
    assert printed.out == ""
    assert not Path(os.environ["LLMREC_HOME"]).exists()


def _without_a_traceback(printed: pytest.CaptureResult[str]) -> str:
    """The last line; nothing before it may look like a programming error."""
    text = printed.out + printed.err
    for sign in ("Traceback", "Stack Trace", 'File "', "dagster._core"):
        assert sign not in text
    return printed.err.splitlines()[-1]


def test_bad_data_is_a_message_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(PROJECT / "data" / "sample", tmp_path / "sample")
    with (tmp_path / "sample" / "u.data").open("a") as file:
        file.write("1\t5\tgood\t1200566006\n")
    monkeypatch.setenv("LLMREC_SAMPLE_DIR", str(tmp_path / "sample"))
    assert cli.main(["run", "--recipe", "tiny"]) == 1
    assert _without_a_traceback(capfd.readouterr()).startswith(
        "llmrec: ratings: row 24,877 of u.data has rating 'good', expected a whole number"
    )


def test_a_data_set_that_is_not_there_is_a_message_and_no_traceback(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("LLMREC_DATA_DIR", str(tmp_path / "nowhere"))
    assert cli.main(["run", "--dataset", "ml-100k", "--recipe", "tiny"]) == 1
    last = _without_a_traceback(capfd.readouterr())
    assert last.startswith(f"llmrec: ml-100k: LLMREC_DATA_DIR names {tmp_path / 'nowhere'}")


def test_a_blocked_check_is_a_message_and_no_traceback(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], finished: FinishedRun
) -> None:
    split = splits.split_users
    shutil.copytree(finished.home.location, os.environ["LLMREC_HOME"])
    monkeypatch.setattr(
        splits,
        "split_users",
        lambda *args: split(*args).assign(split="somewhere"),
    )
    assert cli.main(["run", "--recipe", "tiny"]) == 1
    assert _without_a_traceback(capfd.readouterr()) == (
        "llmrec: user_splits is not published, check no_user_in_two_splits failed: "
        "unknown split 'somewhere'"
    )


def test_sample_is_reproducible_and_the_committed_one(tmp_path: Path) -> None:
    assert cli.main(["sample", "--seed", "1", "--out", str(tmp_path / "one")]) == 0
    assert cli.main(["sample", "--seed", "2", "--out", str(tmp_path / "two")]) == 0
    names = ["u.data", "u.item", "u.user", "u.genre", "u.occupation"]
    committed = PROJECT / "data" / "sample"
    assert filecmp.cmpfiles(tmp_path / "one", committed, names, shallow=False)[0] == names
    assert "u.data" in filecmp.cmpfiles(tmp_path / "two", committed, names, shallow=False)[1]


def test_first_users_of_an_empty_home_may_initialise_it_at_once(
    new_home: Callable[..., Home],
) -> None:
    home = new_home()
    processes = [home.start(*LLMREC, "init") for _ in range(3)]
    assert [process.wait(60) for process in processes] == [0, 0, 0], (
        home.root / "output.log"
    ).read_text()
    directory = home.root / "dagster"
    assert filecmp.cmp(directory / "dagster.yaml", PROJECT / "dagster.yaml", shallow=False)
    with dg.DagsterInstance.from_config(str(directory)) as instance:
        assert instance.get_runs() == []
        assert instance.event_log_storage.get_concurrency_keys() == set()


def test_init_leaves_the_settings_of_a_users_own_dagster_home_alone(tmp_path: Path) -> None:
    own = "telemetry:\n  enabled: false\n"
    settings = Path(os.environ["DAGSTER_HOME"]) / "dagster.yaml"
    settings.write_text(own)
    assert cli.main(["init"]) == 0
    assert settings.read_text() == own


def test_init_takes_a_relative_dagster_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DAGSTER_HOME", "mine")
    assert cli.main(["init"]) == 0
    assert (tmp_path / "mine" / "history" / "runs.db").exists()


#: One asset of `llmrec run`'s longest job, started as that starts its jobs. Whole runs that are
#: killed everywhere: bench/crash.
SFT_ALONE = """
import dagster as dg
from llmrec_assets import cli, runs

cli._initialise_dagster_home()
with dg.DagsterInstance.get() as instance:
    runs.bury_dead_runs(instance)
    sft = [dg.AssetKey("sft_checkpoint")]
    runs._run(runs.build_defs(), "recommender", "sample|tiny", instance, selection=sft)
"""


def test_killed_while_training_and_run_again_ends_as_if_undisturbed(
    new_home: Callable[..., Home], finished: FinishedRun
) -> None:
    home = new_home(like=finished.home)
    shutil.rmtree(home.location / "checkpoints" / "sft_checkpoint")
    killed = home.start(sys.executable, "-c", SFT_ALONE)
    work = home.location / "work" / "sft_checkpoint"
    deadline = time.monotonic() + 120
    while not list(work.rglob("COMPLETE")):
        assert killed.poll() is None, (home.root / "output.log").read_text()
        assert time.monotonic() < deadline
        time.sleep(0.005)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert "sft_checkpoint" not in home.current(kind="checkpoints")  # it was not done yet
    with home.instance() as instance:
        (dead,) = instance.get_runs(filters=dg.RunsFilter(statuses=[dg.DagsterRunStatus.STARTED]))
        pool = instance.event_log_storage.get_concurrency_info("gpu")
        assert pool.active_run_ids == {dead.run_id}  # the slot would be taken for ever

    again = home.start(sys.executable, "-c", SFT_ALONE)
    assert again.wait(120) == 0, (home.root / "output.log").read_text()[-3000:]
    resumed = home.store.checkpoint("sft_checkpoint", "sample|tiny")
    undisturbed = finished.home.store.checkpoint("sft_checkpoint", "sample|tiny")
    assert resumed.name == undisturbed.name
    assert read_manifest(resumed)["facts"]["resumed_at"] >= 2
    weights = "adapter_model.safetensors"
    assert (resumed / weights).read_bytes() == (undisturbed / weights).read_bytes()
    with home.instance() as instance:
        assert instance.get_run_by_id(dead.run_id).status == dg.DagsterRunStatus.FAILURE
        pool = instance.event_log_storage.get_concurrency_info("gpu")
        assert (pool.slot_count, pool.active_slot_count, pool.pending_step_count) == (1, 0, 0)


def test_only_runs_whose_own_process_is_gone_are_buried() -> None:
    with dg.instance_for_test() as instance, subprocess.Popen(["sleep", "60"]) as other:
        import psutil

        # as tags tell it: from the machine's start on
        began = psutil.Process(other.pid).create_time() - psutil.boot_time()
        tags = {
            "gone": {"llmrec/pid": "999999999", "llmrec/started": "1.0"},
            "gone before its first event": {"llmrec/pid": "999999999", "llmrec/started": "1.0"},
            "pid given to another since": {
                "llmrec/pid": str(other.pid),
                "llmrec/started": str(began - 60),
            },
            "living": {
                "llmrec/pid": str(other.pid),
                "llmrec/started": str(began),
            },
            "this process": tags_of_this_process(),
            "another host's": {
                "llmrec/pid": "999999999",
                "llmrec/started": "1.0",
                "llmrec/host": "elsewhere",
            },
            "the daemon's": {},
        }
        for own in tags.values():
            if own:
                own.setdefault("llmrec/host", socket.gethostname())
        runs = {
            name: instance.create_run_for_job(
                _job(), tags=own, status=NOT_YET if "before" in name else STARTED
            ).run_id
            for name, own in tags.items()
        }
        gone = {"gone", "gone before its first event", "pid given to another since"}
        assert set(bury_dead_runs(instance)) == {runs[name] for name in gone}
        other.kill()
        while psutil.Process(other.pid).status() != psutil.STATUS_ZOMBIE:  # not waited for: dead
            time.sleep(0.01)
        assert bury_dead_runs(instance) == [runs["living"]]
        statuses = {name: instance.get_run_by_id(run_id).status for name, run_id in runs.items()}
    assert NOT_YET not in statuses.values()
    assert {n for n, status in statuses.items() if status == STARTED} == {
        "this process",
        "another host's",
        "the daemon's",
    }


def _job() -> dg.JobDefinition:
    @dg.op
    def nothing() -> None:
        pass

    @dg.job
    def job() -> None:
        nothing()

    return job
