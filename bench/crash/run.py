"""The crash matrix: kills at random moments of whole runs, and what was lost.

.venv/bin/python bench/crash/run.py matrix          # goes on where it was ended
.venv/bin/python bench/crash/run.py faults          # disk full, read-only, two runs at once
.venv/bin/python bench/crash/run.py table           # the page's tables, from the journal
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

HERE = Path(__file__).resolve().parent
#: Below data/, which git ignores.
OUT = HERE.parent.parent / "data" / "bench" / "crash"


def main() -> int:
    """Exits with 1 where anything was lost, differed, or failed by itself."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("what", choices=("matrix", "faults", "table"))
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--runs", type=int, default=13)
    parser.add_argument("--runs-with-steps", type=int, default=2)
    parser.add_argument("--runs-in-trainings", type=int, default=2)
    parser.add_argument("--kills", type=int, default=10, help="of each run")
    parser.add_argument("--seed", type=int, default=1)
    options = parser.parse_args()
    sys.path.insert(0, str(HERE))
    os.environ["LLMREC_RECIPES_DIR"] = str(HERE / "recipes")

    def say(text: str) -> None:
        print(time.strftime("%H:%M:%S"), text, flush=True)

    began = time.monotonic()
    if options.what != "table":
        import attempt

        attempt.load_libraries()
    loading_s = time.monotonic() - began
    if options.what == "matrix":
        import matrix

        matrix.run_matrix(
            options.out.resolve(),
            runs=options.runs,
            runs_with_steps=options.runs_with_steps,
            runs_in_trainings=options.runs_in_trainings,
            kills=options.kills,
            seed=options.seed,
            loading_s=loading_s,
            say=say,
        )
    if options.what == "faults":
        import faults

        faults.run_faults(options.out.resolve(), say)
    import page

    out = options.out.resolve()
    killed, lost = page.tables(out / "journal.jsonl")
    faults_seen, bad = page.faults_table(out / "faults.jsonl")
    print(f"{killed}\n\n{faults_seen}")
    return int(lost or bad)


if __name__ == "__main__":
    sys.exit(main())
