"""Two runs from the UI and a command line at once, with ``kill -9`` of everything in turn.

    python bench/chair.py DIRECTORY                  # minutes; DIRECTORY must not exist
    python bench/chair.py DIRECTORY --last-only      # one run, and everything killed at once

Starts ``dagster dev`` on localhost with homes of its own under DIRECTORY, trains three copies of
the recipe ``tiny`` (longer ones) at once, kills a step, a run worker, a command line, the daemon,
and in the end ``dagster dev`` with its code server and a run worker. Each time it waits until the
device goes to somebody else, and runs what failed again. Then it reads from the event log who used
the device from when to when, and fails where two did at once or a partition is not complete.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Container, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import yaml

PROJECT = Path(__file__).resolve().parents[1]
CLICKS = ("one", "two")
LINE = "three"
RECIPES = (*CLICKS, LINE)
#: What the UI's runs make: two steps at the device each. The command line makes everything.
CLICKED = ("sft_checkpoint", "sft_responses")
#: What is there before: made in one process.
PREPARE = """
import sys
import dagster as dg
from llmrec_assets.runs import _run
from llmrec_assets.definitions import build_defs

defs, instance = build_defs(), dg.DagsterInstance.get()
_run(defs, "source_data", "sample", instance)
names = ("catalogue", "user_splits", "interaction_windows", "prompts")
for recipe in sys.argv[1:]:
    _run(defs, "prepare_base_model", recipe, instance)
    selection = [dg.AssetKey(name) for name in names]
    _run(defs, "recommender", f"sample|{recipe}", instance, selection=selection)
"""
#: Longer than ``tiny``, so that there is something to kill.
LONGER = {"sft": {"epochs": 24, "save_steps": 8}, "evaluation": {"resamples": 200}}
LAUNCH = """
mutation ($params: ExecutionParams!) { launchRun(executionParams: $params) {
  __typename ... on LaunchRunSuccess { run { runId } } ... on PythonError { message } } }
"""
HAS = re.compile(r"(\S+ \S+) has the device .* \(process (\d+)\)")
GIVES = re.compile(r"(\S+ \S+) gives the device back after .* \(process (\d+)\)")


class Chair:
    """The homes, the UI and what was killed when."""

    def __init__(self, root: Path) -> None:
        self.root = root
        root.mkdir(parents=True)
        recipes = root / "recipes"
        recipes.mkdir()
        tiny = yaml.safe_load((PROJECT / "llmrec_assets/recipes/tiny.yaml").read_text())
        for seed, name in enumerate(RECIPES, start=1):
            changed = {**tiny, "seed": seed}
            for section, values in LONGER.items():
                changed[section] = {**tiny[section], **values}
            (recipes / f"{name}.yaml").write_text(yaml.safe_dump(changed))
        (root / "dagster").mkdir()
        shutil.copyfile(PROJECT / "dagster.yaml", root / "dagster" / "dagster.yaml")
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = int(probe.getsockname()[1])
        self.environment = {
            **os.environ,
            "LLMREC_HOME": str(root / "home"),
            "LLMREC_LOCK_DIR": str(root / "locks"),
            "LLMREC_RECIPES_DIR": str(recipes),
            "LLMREC_DEVICE": "cpu",
            "DAGSTER_HOME": str(root / "dagster"),
        }
        self.killed: dict[int, float] = {}
        self.started: list[subprocess.Popen] = []
        self.began = time.time()

    def say(self, text: str) -> None:
        print(f"{time.time() - self.began:7.1f} s  {text}", flush=True)

    def start(self, *command: str) -> subprocess.Popen:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=self.environment,
            cwd=PROJECT,
            stdin=subprocess.DEVNULL,
            stdout=(self.root / "output.log").open("a"),
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        self.started.append(process)
        return process

    def dev(self) -> subprocess.Popen:
        address = ("-h", "127.0.0.1", "-p", str(self.port))
        process = self.start("dagster", "dev", "-w", "workspace.yaml", *address)
        self.until("the UI is up", self.is_up, 240)
        return process

    def is_up(self) -> bool:
        with suppress(OSError, KeyError, ValueError):
            text = "{ workspaceOrError { ... on Workspace { locationEntries { loadStatus } } } }"
            (entry,) = self.query(text)["workspaceOrError"]["locationEntries"]
            return bool(entry["loadStatus"] == "LOADED")
        return False

    def query(self, text: str, **variables: Any) -> Any:
        request = urllib.request.Request(
            f"http://127.0.0.1:{self.port}/graphql",
            json.dumps({"query": text, "variables": variables}).encode(),
            {"Content-Type": "application/json"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            return json.load(response)["data"]

    def launch(self, recipe: str) -> str:
        """What a click on two assets of a partition does."""
        tags = {
            "dagster/partition": f"sample|{recipe}",
            "dagster/partition/dataset": "sample",
            "dagster/partition/recipe": recipe,
        }
        selector = {
            "repositoryLocationName": "llmrec_assets",
            "repositoryName": "__repository__",
            "jobName": "recommender",
            "assetSelection": [{"path": [name]} for name in CLICKED],
        }
        params = {
            "selector": selector,
            "mode": "default",
            "runConfigData": {},
            "executionMetadata": {"tags": [{"key": k, "value": v} for k, v in tags.items()]},
        }
        launched = self.query(LAUNCH, params=params)["launchRun"]
        return str(launched["run"]["runId"])

    def status(self, run_id: str) -> str:
        found = self.query(
            "query ($i: ID!) { runOrError(runId: $i) { ... on Run { status } } }", i=run_id
        )
        return str(found["runOrError"]["status"])

    def holder(self) -> dict[str, Any] | None:
        """Who has the device, as its note says, where that process lives."""
        with suppress(OSError, ValueError):
            fact = json.loads((self.root / "locks" / "cpu.json").read_text())
            if psutil.pid_exists(fact["pid"]):
                return {**fact, "name": fact["who"].split("|")[-1]}
        return None

    def until(self, what: str, found: Callable[[], Any], seconds: float = 600) -> Any:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            value = found()
            if value:
                return value
            time.sleep(0.05)
        raise SystemExit(f"not within {seconds:.0f} s: {what}")

    def held_by(self, wanted: Callable[[dict[str, Any]], bool]) -> dict[str, Any]:
        def look() -> dict[str, Any] | None:
            fact = self.holder()
            return fact if fact is not None and wanted(fact) else None

        return dict(self.until("somebody else has the device", look))

    def kill(self, what: str, *pids: int) -> None:
        for pid in pids:
            self.killed[pid] = time.time()
            os.kill(pid, signal.SIGKILL)
        self.say(f"kill -9 of {what}: {', '.join(map(str, pids))}")

    def ends(self, what: str, pid: int, seconds: float = 60) -> None:
        began = time.monotonic()
        self.until(f"the end of {what}", lambda: not _lives(pid), seconds)
        self.killed.setdefault(pid, time.time())
        self.say(f"    {what} ({pid}) ended after {time.monotonic() - began:.2f} s")

    def freed(self, pid: int) -> None:
        began = time.monotonic()
        now = self.held_by(lambda fact: fact["pid"] != pid)
        self.say(f"    next at the device after {time.monotonic() - began:.1f} s: {now['who']}")


def _lives(pid: int) -> bool:
    with suppress(psutil.Error):
        return bool(psutil.Process(pid).status() != psutil.STATUS_ZOMBIE)
    return False


def _command(pid: int) -> str:
    with suppress(psutil.Error):
        return " ".join(psutil.Process(pid).cmdline())
    return ""


def _run_worker(step: int) -> psutil.Process:
    """The process of a step's run; between the two is the server that the step was forked from."""
    parents = psutil.Process(step).parents()
    return parents["forkserver" in _command(parents[0].pid)]


class Scenario:
    """What runs, and what is killed."""

    def __init__(self, chair: Chair, recipes: Sequence[str]) -> None:
        """Prepares what the runs read, in one process, and starts the UI."""
        self.chair = chair
        prepared = subprocess.run(
            [sys.executable, "-c", PREPARE, *recipes],
            env=chair.environment,
            cwd=PROJECT,
            stdout=(chair.root / "output.log").open("a"),
            stderr=subprocess.STDOUT,
        )
        if prepared.returncode:
            raise SystemExit(f"preparing failed: {chair.root / 'output.log'}")
        chair.say("data, prompts and base models are there")
        self.dev = chair.dev()
        chair.say("the UI is up")
        self.runs: dict[str, str] = {}
        self.line: subprocess.Popen | None = None

    def click(self, name: str) -> None:
        self.runs[name] = self.chair.launch(name)

    def command_line(self) -> None:
        command = ("llmrec_assets.cli", "run", "--dataset", "sample", "--recipe", LINE)
        self.line = self.chair.start(*command)

    def again(self, name: str) -> None:
        failed = self.runs[name]
        self.chair.until("the run failed", lambda: self.chair.status(failed) == "FAILURE", 240)
        self.click(name)
        self.chair.say(f"    run of {name} failed, launched again")

    def training(self, done: Container[str] = ()) -> dict[str, Any]:
        """Who trains at the device, once there is something to resume; nobody of ``done``."""
        chair = self.chair

        def look(fact: dict[str, Any]) -> bool:
            return fact["who"].startswith("sft_checkpoint") and fact["name"] not in done

        fact = chair.held_by(look)
        work = chair.root / "home" / "work" / "sft_checkpoint" / "sample" / fact["name"]
        chair.until("a trainer checkpoint", lambda: list(work.glob("*/checkpoint-*/COMPLETE")))
        return fact

    def one_after_the_other(self) -> None:
        """A step, a run worker and the command line, each while it is at the device; the daemon."""
        chair, done = self.chair, set()
        chair.say(f"first at the device: {self.training()['name']}")
        while len(done) < len(RECIPES):
            fact = self.training(done)
            name, pid = fact["name"], fact["pid"]
            if name == LINE:
                chair.kill("llmrec run, at the device", pid)
                assert self.line
                self.line.wait()
                chair.freed(pid)
                self.command_line()
            else:
                if done & set(CLICKS):
                    worker = _run_worker(pid).pid
                    chair.kill(f"a run worker whose step is at the device ({name})", worker)
                    chair.ends("its step", pid)
                else:
                    chair.kill(f"a step at the device ({name})", pid)
                chair.freed(pid)
                self.again(name)
            done.add(name)
        chair.held_by(lambda fact: True)
        processes = psutil.Process(self.dev.pid).children(True)
        chair.kill("the daemon", *(p.pid for p in processes if "_daemon" in _command(p.pid)))
        began = time.monotonic()
        self.dev.wait(120)
        chair.say(f"    dagster dev ended by itself after {time.monotonic() - began:.0f} s")
        chair.say(f"    at the device meanwhile: {(chair.holder() or {}).get('who')}")
        self.dev = chair.dev()
        statuses = {name: chair.status(run_id) for name, run_id in self.runs.items()}
        chair.say(f"    dagster dev is up again; runs: {statuses}")
        for name, status in statuses.items():
            if status == "FAILURE":
                self.again(name)

    def everything_at_once(self) -> None:
        """``dagster dev``, daemon, UI, code servers, and a run worker whose step is at the device:
        nobody is left who was told to look after that run."""
        chair = self.chair
        fact = chair.held_by(lambda fact: fact["name"] in self.runs)
        worker = _run_worker(fact["pid"])
        servers = {p.pid for p in worker.parents() if "dagster" in _command(p.pid)}
        for process in psutil.Process(self.dev.pid).children(True):
            if "dagster" in _command(process.pid):
                servers.add(process.pid)
        chair.kill(
            f"dagster dev, all servers, the daemon and a run worker ({fact['name']})",
            *{self.dev.pid, worker.pid, *servers} - {fact["pid"], os.getpid()},
        )
        chair.ends("its step", fact["pid"])
        if self.line is not None and self.line.poll() is None:
            chair.freed(fact["pid"])
        self.dev = chair.dev()
        chair.say("    dagster dev is up again")
        began, run_id = time.monotonic(), self.runs[fact["name"]]
        chair.until("the dead run's end", lambda: chair.status(run_id) == "FAILURE", 240)
        chair.say(f"    {fact['name']}: FAILURE after {time.monotonic() - began:.0f} s")
        self.again(fact["name"])

    def to_the_end(self) -> None:
        chair = self.chair
        ended = ("SUCCESS", "FAILURE", "CANCELED")
        for name, run_id in self.runs.items():
            chair.until(f"the end of {name}", lambda r=run_id: chair.status(r) in ended, 1800)
            chair.say(f"{name}: {chair.status(run_id)}")
        if self.line is not None:
            if self.line.wait(1800):
                self.command_line()
                self.line.wait(1800)
            chair.say(f"{LINE}: exit status {self.line.returncode}")


def intervals(chair: Chair) -> list[tuple[float, float, str, int, bool]]:
    """(from, to, who, process, given back) of every use of the device, as the event log has it."""
    os.environ.update(chair.environment)
    import dagster as dg

    found, open_ = [], {}
    with dg.DagsterInstance.get() as instance:
        entries = sorted(
            (entry for run in instance.get_runs() for entry in instance.all_logs(run.run_id)),
            key=lambda entry: entry.timestamp,
        )
    for entry in entries:
        if match := HAS.search(entry.user_message or ""):
            open_[int(match[2]), match[1]] = entry.timestamp
        elif match := GIVES.search(entry.user_message or ""):
            key = int(match[2]), match[1]
            found.append((open_.pop(key), entry.timestamp, match[1], key[0], True))
    for (pid, who), since in open_.items():
        found.append((since, chair.killed.get(pid, float("inf")), who, pid, False))
    return sorted(found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("directory", type=Path, help="must not exist")
    parser.add_argument("--last-only", action="store_true", help="one run, everything killed")
    options = parser.parse_args()
    chair = Chair(options.directory.resolve())
    clicks = CLICKS[:1] if options.last_only else CLICKS
    try:
        scenario = Scenario(chair, clicks if options.last_only else RECIPES)
        for name in clicks:
            scenario.click(name)
        if not options.last_only:
            scenario.command_line()
            scenario.one_after_the_other()
        scenario.everything_at_once()
        scenario.to_the_end()
    finally:
        for process in chair.started:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
    last = dict.fromkeys(clicks, CLICKED[-1])
    if not options.last_only:
        last[LINE] = "metric_table"
    tables = chair.root / "home" / "tables"
    complete = all(
        (tables / asset / "sample" / name / "current.json").exists() for name, asset in last.items()
    )
    print("every partition is complete" if complete else "A PARTITION IS NOT COMPLETE")
    uses = intervals(chair)
    overlaps, free_since = 0, 0.0
    for since, to, who, pid, given_back in uses:
        overlaps += since < free_since
        free_since = max(free_since, to)
        end = "" if given_back else "  (killed)"
        print(f"{since - chair.began:8.2f} to {to - chair.began:8.2f}  {who}  process {pid}{end}")
    print(f"{len(uses)} uses of the device, {overlaps} of them while another went on")
    return 1 if overlaps or not complete else 0


if __name__ == "__main__":
    sys.exit(main())
