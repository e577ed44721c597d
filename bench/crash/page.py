"""The journal as Markdown: moments killed, gone on from, lost.

What belongs here: counting and wording. What does not: measuring (``matrix``).
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from plan import kind_of

Entry = Mapping[str, Any]

#: In the order of the graph: what a killed process was in.
PHASES: dict[str, tuple[str, ...]] = {
    "source tables": ("movielens_files", "movies", "users", "incoming_ratings", "ratings"),
    "base model": ("base_model",),
    "catalogue, windows, prompts": (
        "catalogue",
        "user_splits",
        "interaction_windows",
        "prompts",
    ),
    "classical recommenders, probes": (
        "baseline_recommendations",
        "leave_last_out",
        "memorisation",
    ),
    "SFT": ("sft_checkpoint",),
    "samples, preference pairs": ("sampled_responses", "preference_pairs"),
    "DPO": ("dpo_checkpoint",),
    "reward model": ("reward_model",),
    "PPO": ("rlhf_checkpoint",),
    "answers, grounding": tuple(
        f"{stage}_{what}"
        for stage in ("base", "sft", "dpo", "rlhf")
        for what in ("responses", "recommendations")
    ),
    "evaluation tables": (
        "user_metrics",
        "comparisons",
        "metric_table",
        "beyond_accuracy",
        "group_metrics",
        "sample_recommendations",
    ),
    "report": ("report",),
}
START_UP, BETWEEN = "start-up", "between two steps"


def phases_of(entry: Entry) -> list[str]:
    """What was going on when the kill came: one phase, or two where two steps ran at once."""
    phase_of = {step: phase for phase, steps in PHASES.items() for step in steps}
    # A step process that was killed is no longer going on when its worker has said so.
    during = [entry["step"]] if entry["how"] == "file" else entry["during"]
    found = sorted({phase_of[step] for step in during if step in phase_of})
    if found:
        return found
    return [START_UP if entry["how"] == "start-up" else BETWEEN]


def tables(journal: Path) -> tuple[str, bool]:
    """The page's tables, and whether anything was lost, differed or failed."""
    entries = [json.loads(line) for line in journal.read_text().split("\n")[:-1]]
    ends = [entry for entry in entries if entry["kind"] == "end"]
    ended = {end["run"] for end in ends}
    kills = [entry for entry in entries if entry["kind"] == "kill" and entry["run"] in ended]
    met = [kill for kill in kills if kill["hit"]]
    (reference,) = [entry for entry in entries if entry["kind"] == "undisturbed"]
    problems = [
        f"run {entry['run']}: {problem}"
        for entry in [*kills, *ends]
        for problem in [*entry["lost"], *entry.get("unwell", []), entry.get("failed")]
        if problem
    ]
    problems += [f"run {end['run']} ended with {end['status']}" for end in ends if end["status"]]
    problems += reference["unwell"]
    minutes = (max((e["time"] for e in [*kills, *ends]), default=0) - reference["started"]) / 60
    processor = _processor_seconds(entries)
    text = "\n\n".join(
        [
            f"{len(met)} kills in {len(ends)} runs ({len(kills) - len(met)} came when the command "
            f"had ended); {minutes:.0f} minutes, {processor / 60:.0f} of them of one processor. "
            f"Lost, changed or failed: **{len(problems)}**.",
            _by_phase(met, ends),
            _by(met, "whom", lambda kill: _WHOM[kill["hit"]]),
            _by(
                [kill for kill in met if kill["how"] == "file"],
                "before which file operation",
                lambda kill: f"{kill['before'].split()[0]}: {kind_of(kill['before'])}",
            ),
            _trainings(ends),
            "\n".join(f"- {problem}" for problem in problems),
        ]
    )
    return text, bool(problems)


_WHOM = {
    "command": "the command (one process)",
    "step": "a step process",
    "worker": "the run worker alone, its steps left as orphans",
    "group": "the run worker with all its steps",
}


def _processor_seconds(entries: Sequence[Entry]) -> float:
    """Each process of this bench counts from 0: the sum over their last values."""
    total = last = 0.0
    for entry in entries:
        if entry["cpu"] < last:
            total += last
        last = entry["cpu"]
    return total + last


def _by_phase(kills: Sequence[Entry], ends: Sequence[Entry]) -> str:
    rows: dict[str, list[Entry]] = defaultdict(list)
    for kill in kills:
        for phase in phases_of(kill):
            rows[phase].append(kill)
    lines = [
        "| killed in | kills | at a file operation | a saved training state was there | lost |",
        "|---|---|---|---|---|",
    ]
    for phase in (START_UP, *PHASES, BETWEEN):
        found = rows.get(phase, [])
        steps = PHASES.get(phase, ())
        trains = [kill for kill in found if any(step in kill["states"] for step in steps)]
        has_states = any(step in _WITH_STATES for step in steps)
        held = [kill["states"] for kill in trains]
        states = [found[step] for found in held for step in steps if step in found]
        saved = f"{len(trains)}" + (f" (step {min(states)} to {max(states)})" if states else "")
        lines.append(
            f"| {phase} | {len(found)} | {sum(kill['how'] == 'file' for kill in found)} | "
            f"{saved if has_states else ''} | {sum(len(kill['lost']) for kill in found)} |"
        )
    return "\n".join(lines)


_WITH_STATES = (
    "sft_checkpoint",
    "dpo_checkpoint",
    "reward_model",
    "rlhf_checkpoint",
    "sampled_responses",
)


def _by(kills: Iterable[Entry], title: str, name: Any) -> str:
    counts = Counter(name(kill) for kill in kills)
    lines = [f"| {title} | kills |", "|---|---|"]
    return "\n".join(lines + [f"| {what} | {n} |" for what, n in sorted(counts.items())])


def _trainings(ends: Sequence[Entry]) -> str:
    lines = ["| training | runs | went on from a saved state | the steps |", "|---|---|---|---|"]
    for asset in ("sft_checkpoint", "dpo_checkpoint", "reward_model", "rlhf_checkpoint"):
        steps = [end["resumed_at"].get(asset, 0) for end in ends]
        later = sorted(step for step in steps if step)
        lines.append(f"| {asset} | {len(steps)} | {len(later)} | {', '.join(map(str, later))} |")
    return "\n".join(lines)


def _named(said: str) -> str:
    """The path in ``llmrec: <path> cannot be written: …``."""
    return said.removeprefix("llmrec: ").split(" cannot be written")[0]


def faults_table(journal: Path) -> tuple[str, bool]:
    """What a full or read-only disk did, and two runs at once; and whether anything was lost, or a
    fault not told."""
    if not journal.exists():
        return "", False
    read = [json.loads(line) for line in journal.read_text().split("\n")[:-1]]
    entries = list({(entry["fault"], entry["what"]): entry for entry in read}.values())
    lines = ["| disk | while writing | exit | names | lost |", "|---|---|---|---|---|"]
    bad = False
    for entry in entries:
        if entry["fault"] == "two at once":
            continue
        told = entry.get("told", entry["status"] == 0)
        bad |= bool(entry["lost"]) or not told or bool(entry.get("traceback"))
        named = re.sub(r"[0-9a-f]{32}|[0-9a-f]{16}", "*", _named(entry["said"]))
        lines.append(
            f"| {entry['fault']} | {entry['what']} | {entry['status']} | "
            f"{named if 'told' in entry else 'ended as undisturbed'} | {len(entry['lost'])} |"
        )
    lines += ["", "| two at once on | exits | trainings published | lost |", "|---|---|---|---|"]
    for entry in entries:
        if entry["fault"] != "two at once":
            continue
        bad |= bool(entry["lost"]) or any(entry["statuses"])
        trained = ", ".join(map(str, entry["trainings"].values()))
        exits = ", ".join(map(str, entry["statuses"]))
        lines.append(f"| {entry['what']} | {exits} | {trained} | {len(entry['lost'])} |")
    return "\n".join(lines), bad
