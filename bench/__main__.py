"""``make bench``: every stage beside its peers and its floor, in one table.

    make bench                              # all stages
    make bench STAGES=windows,evaluation    # some of them
    python -m bench --repeats 1             # a quick look

Prints Markdown; ``--out`` keeps it after every stage, with the raw numbers beside it as JSON. Exits
with 1 where a goal is missed or a stage failed; the others are measured all the same. To add a
stage: a module in ``bench/stages`` with ``rows(bench)``, and its name in ``STAGES``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
import traceback
from pathlib import Path

from bench.frame import Bench, Row, machine, table

#: In the order of the table; the last three take ten minutes and more each on two cores.
#: ``windows_32m`` takes minutes and gigabytes: only when named.
STAGES = (
    *("windows", "grounding", "evaluation", "orchestration"),
    *("generation", "sft", "preferences"),
)
ON_REQUEST = ("windows_32m",)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--stages", default="", help=f"of {', '.join((*STAGES, *ON_REQUEST))}")
    parser.add_argument(
        "--repeats", type=int, default=5, help="runs of ours; slow peers have fewer"
    )
    parser.add_argument("--out", type=Path, help="Markdown file to write as well")
    arguments = parser.parse_args()
    names = [name for name in arguments.stages.split(",") if name] or list(STAGES)
    if unknown := set(names) - {*STAGES, *ON_REQUEST}:
        parser.error(f"no stage {', '.join(sorted(unknown))}: {', '.join((*STAGES, *ON_REQUEST))}")
    if arguments.repeats < 1:
        parser.error("at least one repeat")
    head = f"{machine()}; median (min–max) of {arguments.repeats} runs, of slow peers fewer"
    rows, failed = list[Row](), list[str]()
    for name in names:
        started = time.perf_counter()
        print(f"{name} …", file=sys.stderr, flush=True)
        try:
            with tempfile.TemporaryDirectory(prefix="bench-") as work:
                stage = importlib.import_module(f"bench.stages.{name}")
                rows += stage.rows(Bench(Path(work), arguments.repeats))
        except Exception:  # an hour of other stages' figures is not lost with it
            traceback.print_exc()
            failed.append(name)
        took = time.perf_counter() - started
        print(f"{name}: {took:.0f} s in all", file=sys.stderr, flush=True)
        text = f"{head}\n\n{table(rows)}\n"
        if failed:
            text += f"\nStages that failed: {', '.join(failed)}\n"
        if arguments.out:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text(text, encoding="utf-8")
            raw = json.dumps({row.stage: row.figures for row in rows}, indent=1)
            arguments.out.with_suffix(".json").write_text(raw, encoding="utf-8")
    print(text)
    sys.exit(bool(failed) or not all(met for row in rows for met in row.goals.values()))


if __name__ == "__main__":
    main()
