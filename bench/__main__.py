"""``make bench``: every stage beside its peers and its floor, in one table.

    make bench                              # all stages
    make bench STAGES=windows,evaluation    # some of them
    python -m bench --repeats 1             # a quick look

Prints Markdown; ``--out`` keeps it, with the raw numbers beside it as JSON. Exits with 1 where a
goal is missed. To add a stage: a module in ``bench/stages`` with ``rows(bench)``, and its name in
``STAGES``.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import time
from pathlib import Path

from bench.frame import Bench, Row, machine, table

#: Ten minutes and more each on two cores.
LANGUAGE_MODELS = ("generation", "sft", "preferences")
#: In the order of the table. ``windows_32m`` takes minutes and gigabytes: only when named.
STAGES = ("windows", "grounding", "evaluation", "orchestration", *LANGUAGE_MODELS)
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
    head, rows = machine(), list[Row]()
    for name in names:
        started = time.perf_counter()
        print(f"{name} …", file=sys.stderr, flush=True)
        with tempfile.TemporaryDirectory(prefix="bench-") as work:
            stage = importlib.import_module(f"bench.stages.{name}")
            rows += stage.rows(Bench(Path(work), arguments.repeats))
        took = time.perf_counter() - started
        print(f"{name}: {took:.0f} s in all", file=sys.stderr, flush=True)
    head += f"; median (min–max) of {arguments.repeats} runs, of slow peers fewer"
    text = f"{head}\n\n{table(rows)}\n"
    print(text)
    if arguments.out:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(text, encoding="utf-8")
        raw = {row.stage: row.figures for row in rows}
        arguments.out.with_suffix(".json").write_text(json.dumps(raw, indent=1), encoding="utf-8")
    sys.exit(not all(met for row in rows for met in row.goals.values()))


if __name__ == "__main__":
    main()
