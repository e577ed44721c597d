"""What is found after a kill and at the end of a run, held against an undisturbed run.

What belongs here: reading the store, the training states and Dagster's history. What does not:
killing (``matrix``). Everything is read anew from the files.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import dagster as dg
import pyarrow.parquet as pq
from attempt import PARTITION, Place, in_a_process

from llmrec_assets.ground.errors import StoreError
from llmrec_assets.ground.retention import published
from llmrec_assets.ground.store import (
    CURRENT,
    Store,
    read_manifest,
    sha256_file,
    verify_checkpoint,
)
from llmrec_assets.ground.tables import content_version
from llmrec_assets.orchestration.resources import GpuResource
from llmrec_assets.orchestration.upkeep import examine_everything

#: Trainings and the sampling go on from a state in their work directory: how one is named there.
STATES = {
    "sft_checkpoint": "checkpoint-*/COMPLETE",
    "dpo_checkpoint": "checkpoint-*/COMPLETE",
    "reward_model": "checkpoint-*/COMPLETE",
    "rlhf_checkpoint": "batch-*/state.json",
    "sampled_responses": "batch-*.json",
}


@dataclass
class Found:
    """What a store holds. ``published``: "tables prompts sample|crash" → versions; ``weights``:
    "sft_checkpoint/adapter_model.safetensors" → sha256 of the version in force."""

    published: dict[str, list[str]] = field(default_factory=dict)
    current: dict[str, str] = field(default_factory=dict)
    weights: dict[str, str] = field(default_factory=dict)
    damaged: list[str] = field(default_factory=list)

    def to_json(self) -> dict[str, object]:
        return dict(vars(self))


def found_in(home: Path) -> Found:
    """Reads every published version whole: a table's content has the hash it is named by, a
    checkpoint's files the hashes of its manifest, and every pointer names a version that is
    there."""
    store, found = Store.at(home), Found()
    for version in published(store) if home.is_dir() else []:
        key = f"{version.kind} {version.asset} {version.partition}"
        found.published.setdefault(key, []).append(version.name)
        try:
            if version.kind == "checkpoints":
                verify_checkpoint(version.path)
            elif content_version(pq.read_table(version.path)) != version.name:
                found.damaged.append(f"{key} {version.name} has another content")
        except (StoreError, OSError, ValueError) as error:
            found.damaged.append(f"{key} {version.name}: {error}")
        if version.is_current:
            found.current[key] = version.name
            if version.kind == "checkpoints":
                for path in sorted(version.path.rglob("*.safetensors")):
                    name = f"{version.asset}/{path.relative_to(version.path)}"
                    found.weights[name] = sha256_file(path)
    for pointer in sorted(home.glob(f"*/**/{CURRENT}")):
        kind, asset, *keys = pointer.parent.relative_to(home).parts
        try:
            named = json.loads(pointer.read_text())["version"]
        except (ValueError, KeyError, TypeError):
            found.damaged.append(f"{pointer.relative_to(home)} cannot be read")
            continue
        key = f"{kind} {asset} {'|'.join(keys)}"
        if found.current.get(key) != named:
            found.damaged.append(f"{pointer.relative_to(home)} names {named}, which is not there")
    return found


def found_at(place: Place) -> Found:
    """``found_in``, read in a process of its own: libraries that start threads must not do so in a
    process that forks attempts."""
    return Found(**in_a_process(lambda: found_in(place.home).to_json()))


def unwell_at(place: Place) -> list[str]:
    """``unwell``, likewise."""
    return list(in_a_process(lambda: list(unwell(place))))


def lost(before: Mapping[str, list[str]], now: Found, reference: Found) -> list[str]:
    """What was published before and is not now, and whatever differs from an undisturbed run:
    also in the middle of a run, nothing may be published that the latter does not publish."""
    problems = [*now.damaged, *gone(before, now)]
    for key, versions in now.published.items():
        other = set(versions) - set(reference.published.get(key, []))
        problems += [f"{key} {name} is not of an undisturbed run" for name in sorted(other)]
    for name, digest in now.weights.items():
        if digest != reference.weights.get(name):
            problems.append(f"weights {name} differ")
    return problems


def gone(before: Mapping[str, list[str]], now: Found) -> list[str]:
    """What was published before and is not now."""
    return [
        f"{key} {name} is gone"
        for key, versions in before.items()
        for name in sorted(set(versions) - set(now.published.get(key, [])))
    ]


def unequal(now: Found, reference: Found) -> list[str]:
    """At the end: all that differs from the undisturbed run."""
    problems = lost({}, now, reference)
    if now.current != reference.current:
        keys = sorted({*now.current, *reference.current})
        problems += [
            f"{key}: {now.current.get(key)} in force, undisturbed {reference.current.get(key)}"
            for key in keys
            if now.current.get(key) != reference.current.get(key)
        ]
    missing = sorted(set(reference.weights) - set(now.weights))
    return problems + [f"weights {name} are missing" for name in missing]


def saved_states(home: Path) -> dict[str, int]:
    """Training or sampling → the newest whole state in its work directory."""
    found = {}
    for asset, pattern in STATES.items():
        root = home / "work" / asset
        steps = [
            int(path.relative_to(work).parts[0].removesuffix(".json").rsplit("-", 1)[1])
            for work in root.glob(f"{PARTITION.replace('|', '/')}/*")
            for path in work.glob(pattern)
        ]
        if steps:
            found[asset] = max(steps)
    return found


def resumed_at(home: Path) -> dict[str, int]:
    """Training → the step its published version says it went on from (0: it began afresh)."""
    store, found = Store.at(home), {}
    for asset in STATES:
        if asset == "sampled_responses":
            continue
        version = store.current(asset, PARTITION, "checkpoints")
        if version is not None:
            path = store.checkpoint_path(asset, PARTITION, version)
            found[asset] = int(read_manifest(path)["facts"]["resumed_at"])
    return found


def unwell(place: Place) -> Iterator[str]:
    """After a run has ended: problems that ``llmrec health`` names, runs that still count as
    going on, places still held in the pool, work left."""
    store = Store.at(place.home)
    with dg.DagsterInstance.from_config(str(place.history)) as instance:
        gpu = GpuResource(lock_dir=str(place.root / "locks"))
        for finding in examine_everything(store, instance, gpu):
            if finding.state == "problem" and finding.check != "disk":
                yield f"health: {finding.check}: {finding.what}"
            if finding.check == "work" and finding.state != "ok":
                yield f"health: {finding.check}: {finding.what}"
        going_on = dg.RunsFilter(
            statuses=[
                dg.DagsterRunStatus.NOT_STARTED,
                dg.DagsterRunStatus.STARTING,
                dg.DagsterRunStatus.STARTED,
            ]
        )
        for run in instance.get_runs(filters=going_on):
            yield f"run {run.run_id} counts as going on"
        pool = instance.event_log_storage.get_concurrency_info("gpu")
        if (pool.slot_count, pool.active_slot_count, pool.pending_step_count) != (1, 0, 0):
            yield f"pool gpu: {pool.active_slot_count} held, {pool.pending_step_count} waiting"
