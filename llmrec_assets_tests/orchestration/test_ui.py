"""What clicking in the UI does: ``dagster dev`` on a port of its own, spoken to in GraphQL.

One server and one materialization of ``sample | tiny`` serve all tests of this file; the run is
started through the browser's own mutation and executed by the daemon in many processes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil
import pytest

from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.orchestration.dead_runs import HOST_TAG, launched_process
from llmrec_assets.orchestration.run_launcher import WatchedRunLauncher

if TYPE_CHECKING:
    from conftest import FinishedRun, Home

LAUNCH = """
mutation ($params: ExecutionParams!) {
  launchRun(executionParams: $params) {
    __typename
    ... on LaunchRunSuccess { run { runId } }
    ... on PythonError { message }
    ... on RunConfigValidationInvalid { errors { message } }
  }
}
"""
STATUS = """
query ($id: ID!) {
  runOrError(runId: $id) {
    ... on Run { status stepStats { stepKey status } }
  }
}
"""
POOL = """
{ instance { concurrencyLimit(concurrencyKey: "gpu") {
    slotCount activeSlotCount pendingStepCount claimedSlots { stepKey } } } }
"""
MATERIALIZATION = """
query ($path: [String!]!) {
  assetNodeOrError(assetKey: {path: $path}) {
    ... on AssetNode { assetMaterializations(limit: 1) { runId partition metadataEntries {
      label ... on IntMetadataEntry { intValue } ... on MarkdownMetadataEntry { mdStr } } } }
  }
}
"""
WAITED = """
query ($path: [String!]!) {
  assetNodeOrError(assetKey: {path: $path}) {
    ... on AssetNode { assetMaterializations(limit: 1) { metadataEntries {
      label ... on FloatMetadataEntry { floatValue } } } } }
}
"""
CHECKS = """
query ($path: [String!]!) {
  assetNodeOrError(assetKey: {path: $path}) {
    ... on AssetNode { assetChecksOrError { ... on AssetChecks { checks {
      name blocking executionForLatestMaterialization { status } } } } }
  }
}
"""


@dataclass(frozen=True)
class Ui:
    """A running ``dagster dev`` and the home it works in."""

    home: Home
    port: int

    def query(self, text: str, **variables: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": text, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            answer = json.load(response)
        assert "errors" not in answer, answer["errors"]
        return answer["data"]

    def launch(self, job: str, partition: str) -> str:
        tags = {"dagster/partition": partition}
        if "|" in partition:
            dataset, recipe = partition.split("|")
            tags |= {"dagster/partition/dataset": dataset, "dagster/partition/recipe": recipe}
        launched = self.query(
            LAUNCH,
            params={
                "selector": {
                    "repositoryLocationName": "llmrec_assets",
                    "repositoryName": "__repository__",
                    "jobName": job,
                },
                "mode": "default",
                "runConfigData": {},
                "executionMetadata": {"tags": [{"key": k, "value": v} for k, v in tags.items()]},
            },
        )["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return str(launched["run"]["runId"])

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(self.query(STATUS, id=run_id)["runOrError"])

    def pool(self) -> dict[str, Any]:
        return dict(self.query(POOL)["instance"]["concurrencyLimit"])

    def wait(self, run_id: str, seconds: float, until: Callable[[], bool] | None = None) -> None:
        """Until the run has succeeded, or ``until`` says so."""
        deadline = time.monotonic() + seconds
        while True:
            run = self.run(run_id)
            if until is not None and until():
                return
            if run["status"] == "SUCCESS":
                assert until is None, "the run ended before what was waited for"
                return
            steps = {s["stepKey"]: s["status"] for s in run["stepStats"]}
            assert run["status"] not in ("FAILURE", "CANCELED"), self.failures()
            assert time.monotonic() < deadline, f"{run['status']} after {seconds} s: {steps}"
            time.sleep(0.25)

    def failures(self) -> str:
        lines = (self.home.root / "output.log").read_text().splitlines()
        return "\n".join([line for line in lines if "ERROR" in line or "Error:" in line][-20:])


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="module")
def ui(new_home: Callable[..., Home]) -> Iterator[Ui]:
    home = new_home()
    home.instance().dispose()
    port = free_port()
    server = home.start(
        *(sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml"),
        *("-h", "127.0.0.1", "-p", str(port)),
    )
    ui = Ui(home, port)
    try:
        deadline = time.monotonic() + 90
        while not _ready(ui):
            assert server.poll() is None, (home.root / "output.log").read_text()
            assert time.monotonic() < deadline, "the UI did not come up"
            time.sleep(0.5)
        yield ui
    finally:
        server.terminate()
        with suppress(subprocess.TimeoutExpired):
            server.wait(20)
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)


def _ready(ui: Ui) -> bool:
    try:
        entries = ui.query(
            "{ workspaceOrError { ... on Workspace { locationEntries { name loadStatus "
            "locationOrLoadError { __typename } } } } }"
        )["workspaceOrError"]["locationEntries"]
    except (OSError, urllib.error.URLError):
        return False
    (entry,) = entries
    return bool(
        entry["loadStatus"] == "LOADED"
        and entry["locationOrLoadError"]["__typename"] == "RepositoryLocation"
    )


def test_the_asset_graph_is_served(ui: Ui) -> None:
    nodes = ui.query("{ assetNodes { assetKey { path } groupName description isExecutable } }")
    served = {node["assetKey"]["path"][0]: node for node in nodes["assetNodes"]}
    directories = {"movielens_files", "base_model", "reward_model", "report", "champion"}
    trained = {f"{stage}_checkpoint" for stage in ("sft", "dpo", "rlhf")}
    assert set(served) == set(SCHEMAS) | directories | trained
    assert all(node["isExecutable"] and node["description"] for node in served.values())


HOLDER = """
import sys, duckdb
connection = duckdb.connect(sys.argv[1])  # for reading and writing
print("open", flush=True)
for line in sys.stdin:
    print(connection.sql(line).fetchall()[0][0], flush=True)
"""


@dataclass(frozen=True)
class MaterializedByClick:
    ui: Ui
    run_id: str
    active: set[int]
    """Numbers of gpu slots seen in use."""
    pending: int
    """Steps that were seen waiting for the pool while somebody else had its slot."""
    during: dict[str, str]
    """What readers printed while the run went on."""
    holder: subprocess.Popen[str]
    """Has held the warehouse open for writing since before the run ended."""


@pytest.fixture(scope="module")
def clicked(ui: Ui) -> Iterator[MaterializedByClick]:
    """source_data, prepare_base_model and recommender for ``sample | tiny``, clicked in turn.

    While recommender runs: the pool's slot is taken by somebody else for a while, others read
    the tables, and one client keeps the warehouse open for writing.
    """
    prepared = [ui.launch("source_data", "sample"), ui.launch("prepare_base_model", "tiny")]
    for run_id in prepared:
        ui.wait(run_id, 120)
    warehouse = ui.home.location / "warehouse.duckdb"
    during = {}
    with ui.home.instance() as instance:
        storage = instance.event_log_storage
        storage.initialize_concurrency_limit_to_default("gpu")
        assert storage.claim_concurrency_slot("gpu", "somebody", "else").is_claimed
        run_id = ui.launch("recommender", "sample|tiny")
        ui.wait(run_id, 120, until=lambda: ui.pool()["pendingStepCount"] > 0)
        pending = ui.pool()["pendingStepCount"]
        for name, command in {
            "llmrec": [sys.executable, "-m", "llmrec_assets.cli", "sql"],
            "duckdb": [str(duckdb_cli()), "-readonly", "-noheader", "-csv", str(warehouse)],
        }.items():
            done = subprocess.run(
                [*command, "select count(*) as n from ratings"],
                env=ui.home.environment(),
                capture_output=True,
                text=True,
            )
            during[name] = done.stdout + done.stderr
        holder = subprocess.Popen(
            [sys.executable, "-c", HOLDER, str(warehouse)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        assert holder.stdout
        assert holder.stdout.readline() == "open\n"
        assert ui.run(run_id)["status"] == "STARTED"
        storage.free_concurrency_slot_for_step("somebody", "else")
    active = set()

    def look() -> bool:
        active.add(ui.pool()["activeSlotCount"])
        return ui.run(run_id)["status"] == "SUCCESS"

    started = time.monotonic()
    ui.wait(run_id, 180, until=look)
    print(f"recommender, from the first free gpu slot: {time.monotonic() - started:.0f} s")
    try:
        yield MaterializedByClick(ui, run_id, active, pending, during, holder)
    finally:
        holder.kill()
        holder.communicate()


def duckdb_cli() -> Path:
    return Path(sys.executable).with_name("duckdb")


def test_a_run_started_by_a_click_gives_what_the_command_gives(
    clicked: MaterializedByClick, finished: FinishedRun
) -> None:
    for partition in ("sample", "sample|tiny"):
        assert clicked.ui.home.current(partition) == finished.home.current(partition)


def test_training_and_generation_queue_in_the_pool(clicked: MaterializedByClick) -> None:
    assert clicked.pending == 1  # the first of them waited, visibly, for the slot taken elsewhere
    assert clicked.active == {0, 1}
    log = (clicked.ui.home.root / "output.log").read_text()
    assert "Step blocked by limit for pool gpu" in log
    pool = clicked.ui.pool()
    assert (pool["slotCount"], pool["activeSlotCount"], pool["pendingStepCount"]) == (1, 0, 0)


def test_the_daemon_can_tell_whether_a_run_it_launched_still_lives(
    clicked: MaterializedByClick,
) -> None:
    """What the judgement rests on: the words of Dagster's run process, and the launcher's tag."""
    with clicked.ui.home.instance() as instance:
        assert isinstance(instance.run_launcher, WatchedRunLauncher)
        run = instance.get_run_by_id(clicked.run_id)
        assert run is not None
        assert run.tags[HOST_TAG] == socket.gethostname()
        pid, said = launched_process(instance, run)
        record = instance.get_run_record_by_id(run.run_id)
    assert pid is not None and not psutil.pid_exists(pid)
    assert record.start_time - 30 < said < record.end_time


def test_the_wait_for_the_device_stands_in_the_metadata(clicked: MaterializedByClick) -> None:
    answer = clicked.ui.query(WAITED, path=["sft_checkpoint"])["assetNodeOrError"]
    (shown,) = answer["assetMaterializations"]
    waited = {entry["label"]: entry.get("floatValue") for entry in shown["metadataEntries"]}
    assert waited["waited_for_device_seconds"] >= 0


def test_the_metric_table_is_shown_with_its_materialization(clicked: MaterializedByClick) -> None:
    answer = clicked.ui.query(MATERIALIZATION, path=["metric_table"])["assetNodeOrError"]
    (shown,) = answer["assetMaterializations"]
    assert (shown["runId"], shown["partition"]) == (clicked.run_id, "sample|tiny")
    entries = {entry["label"]: entry for entry in shown["metadataEntries"]}
    assert entries["dagster/row_count"]["intValue"] == 29
    table = entries["table"]["mdStr"].splitlines()
    assert [row.split("|")[1].strip() for row in table[2:]] == [
        *(stage for stage in ("base", "sft", "dpo", "rlhf") for _decoding in range(4)),
        *("als", "als", "ease", "ease", "itemknn", "itemknn"),
        *("itemknn-causal", "itemknn-causal", "popularity", "popularity"),
        *("popularity-causal", "sasrec", "sasrec"),
    ]


def test_the_checks_are_shown_as_passed(clicked: MaterializedByClick) -> None:
    for asset in ("user_splits", "interaction_windows", "prompts"):
        answer = clicked.ui.query(CHECKS, path=[asset])["assetNodeOrError"]
        checks = answer["assetChecksOrError"]["checks"]
        assert checks
        for check in checks:
            assert check["blocking"] is True
            latest = check["executionForLatestMaterialization"]
            assert latest["status"] == "SUCCEEDED", check["name"]


def test_tables_can_be_read_while_a_run_goes_on(clicked: MaterializedByClick) -> None:
    assert "24876" in clicked.during["llmrec"]
    assert clicked.during["duckdb"].strip() == "24876"


def test_a_client_that_writes_blocks_no_run_and_no_reader(clicked: MaterializedByClick) -> None:
    holder, home = clicked.holder, clicked.ui.home
    assert holder.poll() is None
    assert holder.stdin
    assert holder.stdout
    holder.stdin.write("select count(*) from ratings\n")
    holder.stdin.flush()
    assert holder.stdout.readline() == "24876\n"  # it still has its connection
    assert "metric_table" in home.llmrec("sql", "show tables").stdout
    rows = subprocess.run(
        [
            *(str(duckdb_cli()), "-readonly", "-noheader", "-csv"),
            str(home.location / "warehouse.duckdb"),
            "select stage, dataset, recipe from metric_table",
        ],
        capture_output=True,
        text=True,
    )
    assert rows.stdout.splitlines()[0] == "base,sample,tiny", rows.stderr
