"""The command line: ``llmrec run``, ``promote``, ``recommend``, ``lineage``, ``health``, …

What belongs here: reading arguments, printing. What does not: any work; every command calls one
function of a floor below. Dagster is imported only by the commands that need it.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from pathlib import Path
from typing import Any

from filelock import FileLock

from llmrec_assets.ground.disk import disk_trouble
from llmrec_assets.ground.errors import LlmrecError

_PROJECT = Path(__file__).resolve().parent.parent


def main(arguments: list[str] | None = None) -> int:
    """Entry point; returns the exit status. A user's error is one line, not a traceback."""
    options = _parser().parse_args(arguments)
    try:
        return int(options.command(options) or 0)
    except (LlmrecError, _UsageError) as error:
        print(f"llmrec: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:
        # The reader (`| head`) has left; closing stdout quietly is all there is to do.
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
        return 0
    except Exception as error:
        told = disk_trouble(error, Path(_home()).resolve(), _dagster_home())
        if told is None:
            raise
        print(f"llmrec: {told}", file=sys.stderr)
        return 1


class _UsageError(Exception):
    """A command cannot do what was asked, for a reason its user can mend."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="llmrec", description=__doc__.split("\n")[0])
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="materialize a whole `dataset | recipe`")
    run.add_argument("--dataset", default="sample")
    run.add_argument("--recipe", default="quickstart")
    run.add_argument("--force", action="store_true", help="train again what is published")
    run.add_argument("--seed", type=int, help="override the recipe's seed")
    run.set_defaults(command=_run)

    evaluate = commands.add_parser(
        "evaluate", help="everything after the responses, without a model: tables and report"
    )
    evaluate.add_argument("--dataset", default="sample")
    evaluate.add_argument("--recipe", default="quickstart")
    evaluate.add_argument("--seed", type=int, help="override the recipe's seed")
    evaluate.set_defaults(command=_evaluate)

    promote = commands.add_parser(
        "promote", help="let a recipe challenge its data set's champion, or roll back"
    )
    promote.add_argument("--dataset", default="sample")
    question = promote.add_mutually_exclusive_group(required=True)
    question.add_argument("--recipe", help="the challenger's recipe")
    question.add_argument("--roll-back-to", metavar="VERSION", help="an earlier champion")
    promote.add_argument("--stage", help="sft, dpo or rlhf (default: the recipe's promotion.stage)")
    promote.add_argument("--force", action="store_true", help="decide again what was decided")
    promote.set_defaults(command=_promote)

    recommend = commands.add_parser("recommend", help="films for users, from the champion")
    recommend.add_argument("--dataset", default="sample")
    who = recommend.add_mutually_exclusive_group(required=True)
    who.add_argument("--user", type=int, metavar="ID", help="a user of the data set")
    who.add_argument(
        "--users",
        type=Path,
        metavar="FILE",
        help=".csv, .jsonl or .parquet: user_id alone, or a row a rating with user_id, movie_id or "
        "title, rating, and timestamp if known",
    )
    recommend.add_argument("--k", type=int, default=5, help="films for each user")
    recommend.add_argument("--format", choices=("table", "json", "csv"), default="table")
    recommend.set_defaults(command=_recommend)

    sql = commands.add_parser("sql", help="query the current tables, also while a run is going on")
    sql.add_argument("query")
    sql.set_defaults(command=_sql)

    table = commands.add_parser("table", help="print the metric table")
    table.add_argument("--dataset", default="sample")
    table.add_argument("--recipe", default="quickstart")
    table.add_argument("--markdown", action="store_true", help="as a Markdown table")
    table.set_defaults(command=_table)

    prune = commands.add_parser(
        "prune", help="list old versions that nothing kept cites; with --yes remove them"
    )
    prune.add_argument("--keep", type=int, default=5, help="newest versions kept (default: 5)")
    prune.add_argument("--yes", action="store_true", help="remove what is listed")
    prune.set_defaults(command=_prune)

    health = commands.add_parser(
        "health", help="look at files, manifests, views, leftovers, runs and locks"
    )
    health.add_argument("--repair", action="store_true", help="mend what is safe to mend")
    health.set_defaults(command=_health)

    lineage = commands.add_parser(
        "lineage", help="where a metric table comes from, and what of it is stale"
    )
    lineage.add_argument("--dataset", default="sample")
    lineage.add_argument("--recipe", default="quickstart")
    lineage.add_argument("--stage", help="only what this stage's rows rest on")
    lineage.add_argument("--decoding", help="show only the rows of this decoding")
    lineage.add_argument("--version", help="an older metric_table than the current one")
    lineage.add_argument("--json", action="store_true", help="all that is recorded, as JSON")
    lineage.set_defaults(command=_lineage)

    reproduce = commands.add_parser(
        "reproduce", help="make a metric table again from its record, and compare"
    )
    reproduce.add_argument("--dataset", default="sample")
    reproduce.add_argument("--recipe", default="quickstart")
    reproduce.add_argument("--version", help="an older metric_table than the current one")
    reproduce.set_defaults(command=_reproduce)

    sample = commands.add_parser("sample", help="generate the synthetic sample")
    sample.add_argument("--seed", type=int, default=1)
    sample.add_argument("--out", type=Path, required=True)
    sample.set_defaults(command=_sample)

    init = commands.add_parser("init", help="create DAGSTER_HOME, safely also for two at once")
    init.set_defaults(command=lambda options: _initialise_dagster_home() and 0)
    return parser


def _run(options: argparse.Namespace) -> int:
    _initialise_dagster_home()
    from llmrec_assets.runs import run_partition

    run_partition(options.dataset, options.recipe, force=options.force, seed=options.seed)
    return _show(options)


def _evaluate(options: argparse.Namespace) -> int:
    _initialise_dagster_home()
    from llmrec_assets.runs import evaluate_partition

    evaluate_partition(options.dataset, options.recipe, seed=options.seed)
    return _show(options)


def _promote(options: argparse.Namespace) -> int:
    _initialise_dagster_home()
    from llmrec_assets.ground.promotion import recorded
    from llmrec_assets.runs import promote

    run_id = promote(
        options.dataset,
        challenger=options.recipe,
        stage=options.stage,
        roll_back_to=options.roll_back_to,
        force=options.force,
    )
    last = recorded(_store(), options.dataset).iloc[-1]
    told = f"{last['decision']}: {last['reason']}"
    print(told if last["run_id"] == run_id else "nothing new to decide")
    print(f"champion of {options.dataset}: {last['in_force']}")
    return 0


def _recommend(options: argparse.Namespace) -> int:
    import json
    import logging
    import warnings

    from llmrec_assets.recommend import recommend

    # What the libraries tell their programmers is not for whoever asks for films.
    warnings.filterwarnings("ignore", category=FutureWarning)
    logging.basicConfig(format="%(message)s", stream=sys.stderr)
    logging.getLogger("llmrec").setLevel(logging.INFO)
    users = None if options.user is None else [options.user]
    found = recommend(options.dataset, users=users, file=options.users, k=options.k)
    notes = {"champion": found.champion, "score": found.score, "reason": found.reason}
    if options.format == "json":
        rows = json.loads(found.frame.to_json(orient="records"))
        answer = {"dataset": options.dataset, **notes, "recommendations": rows}
        print(json.dumps(answer, indent=2, ensure_ascii=False))
        return 0
    if options.format == "csv":
        found.frame.to_csv(sys.stdout, index=False)
    else:
        shown = found.frame.assign(score=found.frame["score"].map("{:.2f}".format))
        for name in ("title", "reason"):  # pandas would push text to the right
            width = max(map(len, [name, *shown[name]]))
            shown[name] = shown[name].str.ljust(width)
            shown = shown.rename(columns={name: name.ljust(width)})
        print(f"{options.dataset}{_label(options.dataset)}")
        print(shown.to_string(index=False))
    for name, meaning in notes.items():
        print(f"{name}: {meaning}", file=sys.stderr)
    return 0


def _show(options: argparse.Namespace) -> int:
    """The metric table, and where the report is."""
    _table(options)
    report = _store().checkpoint("report", f"{options.dataset}|{options.recipe}")
    print(f"\nreport: {report / 'report.html'}")
    return 0


def _sql(options: argparse.Namespace) -> int:
    import duckdb

    from llmrec_assets.ground.warehouse import connect

    with connect(_store()) as connection:
        try:
            result = connection.sql(options.query)
        except duckdb.CatalogException as error:
            known = connection.sql("SELECT view_name FROM duckdb_views() WHERE NOT internal")
            names = ", ".join(sorted(row[0] for row in known.fetchall())) or "none yet"
            raise _UsageError(f"{_one_line(error)} Tables: {names}") from error
        except duckdb.Error as error:
            raise _UsageError(_one_line(error)) from error
        if result is not None:
            result.show(max_width=200, max_rows=1000)
    return 0


def _one_line(error: Exception) -> str:
    """DuckDB's message and hints, without its drawing of the query."""
    return " ".join(str(error).split("\nLINE ")[0].split())


def _table(options: argparse.Namespace) -> int:
    from llmrec_assets.ground.formats import FORMATS
    from llmrec_assets.ground.recipes import load_recipe
    from llmrec_assets.ground.report import markdown_table, readable

    if options.dataset not in FORMATS:
        raise _UsageError(f"no data set named {options.dataset!r}: known are {', '.join(FORMATS)}")
    load_recipe(options.recipe)
    stored = _store().read_table("metric_table", f"{options.dataset}|{options.recipe}")
    print(f"\n{options.dataset} | {options.recipe}" + _label(options.dataset))
    shown = readable(stored.frame)
    as_markdown = getattr(options, "markdown", False)
    print(markdown_table(shown) if as_markdown else shown.to_string(index=False))
    return 0


def _label(dataset: str) -> str:
    return "   (synthetic data: shows that the graph works, nothing about films)" * (
        dataset == "sample"
    )


def _prune(options: argparse.Namespace) -> int:
    from llmrec_assets.ground.retention import plan, prune

    found = (prune if options.yes else plan)(_store(), options.keep)
    for line in found.lines():
        print(line)
    if not options.yes and (found.versions or found.work):
        print("nothing was removed: `llmrec prune --yes` removes what is listed")
    return 0


def _health(options: argparse.Namespace) -> int:
    """1 when a problem is left."""
    _initialise_dagster_home()
    import dagster as dg

    from llmrec_assets.orchestration.resources import GpuResource
    from llmrec_assets.orchestration.upkeep import examine_everything, findings_table

    with dg.DagsterInstance.get() as instance:
        findings = examine_everything(_store(), instance, GpuResource(), options.repair)
    print(findings_table(findings).to_string(index=False, justify="left"))
    return int(any(finding.state == "problem" for finding in findings))


def _lineage(options: argparse.Namespace) -> int:
    from llmrec_assets.ground.lineage import stale, trace
    from llmrec_assets.ground.lineage_page import chosen_rows, lineage_json, lineage_text

    store, partition = _store(), f"{options.dataset}|{options.recipe}"
    found = trace(store, "metric_table", partition, options.version, options.stage)
    rows = chosen_rows(store.read_table(*found.root).frame, options.stage, options.decoding)
    show = lineage_json if options.json else lineage_text
    print(show(found, stale(store, found), rows))
    return 0


def _reproduce(options: argparse.Namespace) -> int:
    from llmrec_assets.reproduction import reproduce

    print(reproduce(_store(), options.dataset, options.recipe, options.version))
    return 0


def _sample(options: argparse.Namespace) -> int:
    from llmrec_assets.ground.sample import write_sample

    write_sample(options.out, seed=options.seed)
    return 0


def _store() -> Any:
    from llmrec_assets.ground.store import Store

    return Store.at(_home())


def _home() -> Path | str:
    return os.environ.get("LLMREC_HOME") or _PROJECT / "data"


def _dagster_home() -> Path:
    ours = _PROJECT / "data" / "dagster_home"
    return Path(os.environ.get("DAGSTER_HOME") or ours).expanduser().resolve()


def _initialise_dagster_home() -> Path:
    """``DAGSTER_HOME`` with our ``dagster.yaml`` and created databases.

    Two first users of an empty home would race for its schema, so creation is under a lock. A
    home of the user's own keeps the settings it has.
    """
    ours = _PROJECT / "data" / "dagster_home"
    home = _dagster_home()
    os.environ["DAGSTER_HOME"] = str(home)
    home.mkdir(parents=True, exist_ok=True)
    with FileLock(home / ".init.lock"):
        settings = _PROJECT / "dagster.yaml"
        if settings.is_file() and (home == ours or not (home / "dagster.yaml").exists()):
            # By rename: half a file would be a user's own settings for ever.
            aside = home / ".dagster.yaml"
            shutil.copyfile(settings, aside)
            os.replace(aside, home / "dagster.yaml")
        # Not told by the databases: a kill may have left half a schema, of which two at once would
        # each make the rest.
        initialised = home / ".initialised"
        if not initialised.exists():
            import dagster as dg

            with dg.DagsterInstance.get() as instance:
                instance.get_run_records(limit=1)
            initialised.touch()
    return home


if __name__ == "__main__":
    sys.exit(main())
