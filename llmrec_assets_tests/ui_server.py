"""``dagster dev`` on a port of its own, as a person meets it: a server, spoken to in GraphQL.

What belongs here: starting it, launching and awaiting runs, and the strangers it meets there: a
hub that refuses, a webhook. What does not: the browser (``ui_browser``), any test.
"""

from __future__ import annotations

import http.server
import json
import os
import shutil
import signal
import socket
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

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
TERMINATE = "mutation T($id: String!) { terminateRun(runId: $id) { __typename } }"
STATUS = """
query ($id: ID!) {
  runOrError(runId: $id) {
    ... on Run { status stepStats { stepKey status } }
  }
}
"""
POOL = """
{ instance { concurrencyLimit(concurrencyKey: "gpu") {
    slotCount activeSlotCount pendingStepCount
    claimedSlots { runId stepKey } pendingSteps { runId stepKey assignedTimestamp } } } }
"""


@dataclass(frozen=True)
class Ui:
    """A running ``dagster dev``, the home it works in, and what its environment holds."""

    home: Home
    port: int
    planted: Planted

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

    def launch(
        self, job: str, partition: str, *assets: str, config: dict[str, Any] | None = None
    ) -> str:
        """A run of the job for a partition, of all its assets or of some; returns its id."""
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
                    "assetSelection": [{"path": [name]} for name in assets] or None,
                },
                "mode": "default",
                "runConfigData": config or {},
                "executionMetadata": {"tags": [{"key": k, "value": v} for k, v in tags.items()]},
            },
        )["launchRun"]
        assert launched["__typename"] == "LaunchRunSuccess", launched
        return str(launched["run"]["runId"])

    def terminate(self, run_id: str) -> None:
        answer = self.query(TERMINATE, id=run_id)["terminateRun"]
        assert answer["__typename"] == "TerminateRunSuccess", answer

    def run(self, run_id: str) -> dict[str, Any]:
        return dict(self.query(STATUS, id=run_id)["runOrError"])

    def runs(self) -> list[str]:
        """Ids of all runs."""
        answer = self.query("{ runsOrError { ... on Runs { results { runId } } } }")
        return [run["runId"] for run in answer["runsOrError"]["results"]]

    def pool(self) -> dict[str, Any]:
        return dict(self.query(POOL)["instance"]["concurrencyLimit"])

    def claimed(self) -> list[tuple[str, str]]:
        """Run and step of whoever has a slot of the pool."""
        return [(slot["runId"], slot["stepKey"]) for slot in self.pool()["claimedSlots"]]

    def pending(self) -> list[tuple[str, str]]:
        """Run and step of whoever waits for one."""
        waiting = [step for step in self.pool()["pendingSteps"] if not step["assignedTimestamp"]]
        return [(step["runId"], step["stepKey"]) for step in waiting]

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

    def log(self) -> str:
        """All that the server and its runs have printed."""
        return (self.home.root / "output.log").read_text()

    def failures(self) -> str:
        lines = self.log().splitlines()
        return "\n".join([line for line in lines if "ERROR" in line or "Error:" in line][-20:])


@dataclass
class Stranger:
    """A server on this machine that remembers what it was sent, and answers ``status`` to
    everything, quoting the request's ``Authorization``."""

    status: int
    port: int = 0
    posted: list[dict[str, Any]] = field(default_factory=list)
    authorizations: list[str] = field(default_factory=list)


@contextmanager
def stranger(status: int) -> Iterator[Stranger]:
    met = Stranger(status)

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            said = self.headers.get("Authorization") or ""
            met.authorizations.append(said)
            body = json.dumps({"error": f"not allowed with {said}"}).encode()
            self.send_response(met.status)
            self.send_header("X-Error-Message", f"not allowed with {said}")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        do_HEAD = do_GET

        def do_POST(self) -> None:
            met.posted.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
            self.do_GET()

        def log_message(self, format: str, *arguments: object) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    met.port = server.server_port
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield met
    finally:
        server.shutdown()
        server.server_close()


@dataclass(frozen=True)
class Planted:
    """An environment with a secret in every variable of ours that holds one."""

    environment: dict[str, str]
    secrets: dict[str, str]
    """Variable → what must be found nowhere."""
    hub: Stranger
    """Where ``HF_ENDPOINT`` points; refuses, and quotes the token it was shown."""
    webhook: Stranger
    failing_runs: list[str] = field(default_factory=list)
    """Runs that were launched to fail."""


def planted(hub: Stranger, webhook: Stranger) -> Planted:
    names = ("HF_TOKEN", "LLMREC_ALERT_WEBHOOK", "LLMREC_ALERT_EMAIL_PASSWORD", "HTTPS_PROXY")
    secrets = {name: f"hf_Pl4nted{name.replace('_', '').title()}" for name in names}
    return Planted(
        {
            "HF_TOKEN": secrets["HF_TOKEN"],
            "HF_ENDPOINT": f"http://127.0.0.1:{hub.port}",
            "LLMREC_ALERT_WEBHOOK": (
                f"http://127.0.0.1:{webhook.port}/services/{secrets['LLMREC_ALERT_WEBHOOK']}"
            ),
            "LLMREC_ALERT_SMTP": f"127.0.0.1:{free_port()}",  # nobody there
            "LLMREC_ALERT_EMAIL_FROM": "llmrec@example.org",
            "LLMREC_ALERT_EMAIL_TO": "ann@example.org",
            "LLMREC_ALERT_EMAIL_PASSWORD": secrets["LLMREC_ALERT_EMAIL_PASSWORD"],
            "HTTPS_PROXY": f"http://proxy-user:{secrets['HTTPS_PROXY']}@127.0.0.1:{free_port()}",
            "NO_PROXY": "127.0.0.1,localhost",
        },
        secrets,
        hub,
        webhook,
    )


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@contextmanager
def served(home: Home, planted: Planted) -> Iterator[Ui]:
    """``dagster dev`` over ``home``, until the block ends."""
    home.instance().dispose()
    port = free_port()
    server = home.start(
        *(sys.executable, "-m", "dagster", "dev", "-w", "workspace.yaml"),
        *("-h", "127.0.0.1", "-p", str(port)),
        **planted.environment,
        # On a busy machine a code server may take its time over the first launch (default: 60 s).
        DAGSTER_GRPC_TIMEOUT_SECONDS="240",
    )
    ui = Ui(home, port, planted)
    try:
        deadline = time.monotonic() + 240
        while not _ready(ui):
            assert server.poll() is None, (home.root / "output.log").read_text()
            assert time.monotonic() < deadline, "the UI did not come up"
            time.sleep(0.5)
        yield ui
    finally:
        # Asked to end, it waits for half a minute for its own; nothing of it is used again.
        with suppress(ProcessLookupError):
            os.killpg(server.pid, signal.SIGKILL)
        server.wait()


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


def home_with_history(finished: FinishedRun, new_home: Callable[..., Home]) -> Home:
    """A home in which everything has run, with the history of it."""
    home = new_home(like=finished.home)
    shutil.copytree(finished.home.root / "dagster", home.root / "dagster")
    return home
