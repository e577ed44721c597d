"""What clicking in the UI does: ``dagster dev`` on a port of its own, spoken to in GraphQL.

The runs are started through the browser's own mutation and executed by the daemon, every step in a
process of its own (``ui_session``). What a person sees of it: ``test_ui_browser.py``.
"""

from __future__ import annotations

import logging
import socket
import subprocess
from typing import TYPE_CHECKING

import psutil
import pytest
from ui_server import Ui, planted, served, stranger
from ui_session import LONG, PARTITION, TRAININGS, Clicked, duckdb_cli

from llmrec_assets.ground.schemas import SCHEMAS
from llmrec_assets.orchestration.dead_runs import HOST_TAG, launched_process
from llmrec_assets.orchestration.resources import GpuResource
from llmrec_assets.orchestration.run_launcher import WatchedRunLauncher

if TYPE_CHECKING:
    from collections.abc import Callable

    from conftest import FinishedRun, Home

pytestmark = pytest.mark.timeout(900)

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


def test_the_asset_graph_is_served(ui: Ui) -> None:
    nodes = ui.query("{ assetNodes { assetKey { path } groupName description isExecutable } }")
    served = {node["assetKey"]["path"][0]: node for node in nodes["assetNodes"]}
    directories = {"movielens_files", "base_model", "reward_model", "report", "champion"}
    trained = {f"{stage}_checkpoint" for stage in ("sft", "dpo", "rlhf")}
    assert set(served) == set(SCHEMAS) | directories | trained
    assert all(node["isExecutable"] and node["description"] for node in served.values())


def test_a_run_started_by_a_click_gives_what_the_command_gives(
    clicked: Clicked, finished: FinishedRun
) -> None:
    home = clicked.ui.home
    assert home.current() == finished.home.current()
    trained = home.current(kind="checkpoints")
    assert trained == finished.home.current(kind="checkpoints")
    for name in TRAININGS:  # removed before, so trained anew: to the last bit
        (mine,) = home.location.glob(f"checkpoints/{name}/*/*/{trained[name]}/*.safetensors")
        theirs = finished.home.location / mine.relative_to(home.location)
        assert mine.read_bytes() == theirs.read_bytes()


def test_training_queues_behind_training(clicked: Clicked) -> None:
    # Two trainings of one run: one has the pool, the other waits for it.
    (((run, step),), ((other_run, other_step),)) = clicked.claimed, clicked.pending
    assert run == other_run == clicked.first
    assert {step, other_step} == set(TRAININGS)
    # One of another run: it stays in the queue, while what needs no pool overtakes it.
    assert clicked.waiting == {clicked.first: "STARTED", clicked.second: "QUEUED"}
    assert clicked.active <= {0, 1}
    log = clicked.ui.log()
    assert "Step blocked by limit for pool gpu" in log
    assert "held by somebody outside (process" in log  # it had the pool, not yet the device
    pool = clicked.ui.pool()
    assert (pool["slotCount"], pool["activeSlotCount"], pool["pendingStepCount"]) == (1, 0, 0)


def test_the_daemon_can_tell_whether_a_run_it_launched_still_lives(clicked: Clicked) -> None:
    """What the judgement rests on: the words of Dagster's run process, and the launcher's tag."""
    with clicked.ui.home.instance() as instance:
        assert isinstance(instance.run_launcher, WatchedRunLauncher)
        run = instance.get_run_by_id(clicked.first)
        assert run is not None
        assert run.tags[HOST_TAG] == socket.gethostname()
        pid, said = launched_process(instance, run)
        record = instance.get_run_record_by_id(run.run_id)
    assert pid is not None and not psutil.pid_exists(pid)
    assert record.start_time - 30 < said < record.end_time


def test_the_wait_for_the_device_stands_in_the_metadata(clicked: Clicked) -> None:
    waited = []
    for name in TRAININGS:
        answer = clicked.ui.query(WAITED, path=[name])["assetNodeOrError"]
        (shown,) = answer["assetMaterializations"]
        entries = {entry["label"]: entry.get("floatValue") for entry in shown["metadataEntries"]}
        waited.append(entries["waited_for_device_seconds"])
    assert max(waited) > 0  # for somebody outside


def test_the_metric_table_is_shown_with_its_materialization(ui: Ui, finished: FinishedRun) -> None:
    answer = ui.query(MATERIALIZATION, path=["metric_table"])["assetNodeOrError"]
    (shown,) = answer["assetMaterializations"]
    assert (shown["runId"], shown["partition"]) == (finished.run_ids[-1], "sample|tiny")
    entries = {entry["label"]: entry for entry in shown["metadataEntries"]}
    assert entries["dagster/row_count"]["intValue"] == 29
    stages = [
        *(stage for stage in ("base", "sft", "dpo", "rlhf") for _decoding in range(4)),
        *("als", "als", "ease", "ease", "itemknn", "itemknn"),
        *("itemknn-causal", "itemknn-causal", "popularity", "popularity"),
        *("popularity-causal", "sasrec", "sasrec"),
    ]
    for name in ("table", "validity"):
        rows = entries[name]["mdStr"].splitlines()[2:]
        assert [row.split("|")[1].strip() for row in rows] == stages


def test_the_checks_are_shown_as_passed(clicked: Clicked) -> None:
    for asset in ("user_splits", "interaction_windows", "prompts", *TRAININGS):
        answer = clicked.ui.query(CHECKS, path=[asset])["assetNodeOrError"]
        checks = answer["assetChecksOrError"]["checks"]
        assert checks
        for check in checks:
            if not check["blocking"]:  # a reward model of random weights ranks nothing
                continue
            latest = check["executionForLatestMaterialization"]
            assert latest["status"] == "SUCCEEDED", check["name"]


def test_tables_can_be_read_while_a_run_goes_on(clicked: Clicked) -> None:
    assert "24876" in clicked.during["llmrec"]
    assert clicked.during["duckdb"].strip() == "24876"


def test_a_client_that_writes_blocks_no_run_and_no_reader(clicked: Clicked) -> None:
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


@pytest.mark.slow
def test_the_whole_graph_by_clicks_gives_what_the_command_gives(
    new_home: Callable[..., Home], finished: FinishedRun
) -> None:
    """Every step in a process of its own, from the files to the report: `pytest -m slow`."""
    with (
        stranger(401) as hub,
        stranger(200) as webhook,
        served(new_home(), planted(hub, webhook)) as ui,
    ):
        for run_id in [ui.launch("source_data", "sample"), ui.launch("prepare_base_model", "tiny")]:
            ui.wait(run_id, 240)
        ui.wait(ui.launch("recommender", "sample|tiny"), 1200)
        for partition in ("sample", "sample|tiny"):
            assert ui.home.current(partition) == finished.home.current(partition)


def test_a_run_terminated_in_the_ui_ends_canceled_and_leaves_no_process(
    clicked: Clicked, monkeypatch: pytest.MonkeyPatch
) -> None:
    ui = clicked.ui
    monkeypatch.setenv("LLMREC_DEVICE", "cpu")  # as in the UI's environment
    device = GpuResource(lock_dir=str(ui.home.root / "locks"))
    said = len(ui.log())
    with device.lease(logging.getLogger(__name__), "a stranger"):
        force = {"ops": {"sft_checkpoint": {"config": {"force": True}}}}
        run_id = ui.launch("recommender", PARTITION, "sft_checkpoint", config=force)
        ui.wait(run_id, LONG, until=lambda: "held by a stranger" in ui.log()[said:])
        with ui.home.instance() as instance:
            run = instance.get_run_by_id(run_id)
            assert run is not None
            pid, _ = launched_process(instance, run)
        assert pid is not None
        worker = psutil.Process(pid)
        processes = [worker, *worker.children(recursive=True)]
        assert len(processes) >= 3  # the run worker, the server of its steps, and the step
        ui.terminate(run_id)
        ui.wait(run_id, LONG, until=lambda: ui.run(run_id)["status"] == "CANCELED")
        assert not psutil.wait_procs(processes, timeout=30)[1]
