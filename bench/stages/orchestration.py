"""What Dagster costs: the whole graph on the tiny model, warm, beside the same functions in a
script.

Both start from a home in which ``sample | tiny`` has run, so trainings are found published and
everything else is computed again. Ours runs the three jobs with a process a step, one at a time, as
a run from the UI does with a busy pool; the script calls the steps' functions one after the other.
Asserted: both publish the versions that were there. Beside that: loading the definitions, and the
memory of a code server that nobody asks anything.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.frame import PROJECT, Bench, Row, Run, Timer, measure

STAGE = "orchestration"
PARTITION = "sample|tiny"
JOBS = {"source_data": "sample", "prepare_base_model": "tiny", "recommender": PARTITION}
#: Would be reused like the trainings; the script generates them, so the graph does too.
ANSWERS = [f"{stage}_responses" for stage in ("base", "sft", "dpo", "rlhf")] + ["memorisation"]
MAX_OVERHEAD_S, MAX_LOAD_S, MAX_SERVER_MB = 2.5, 2.5, 200.0


def rows(bench: Bench) -> list[Row]:
    return [*_graph(bench), _definitions(bench), _code_server(bench)]


# ---------------------------------------------------------------- the whole graph


def _graph(bench: Bench) -> list[Row]:
    home = bench.directory(STAGE, "home")
    measure(STAGE, "prepared", home, home)
    sides: dict[str, list[Run]] = {"dagster": [], "script": []}
    outs = {side: bench.directory(STAGE, side) for side in sides}
    # once: the difference is divided by some thirty steps, each a repetition of its own
    for side in ("script", "dagster", "script"):
        sides[side].append(measure(STAGE, side, home, outs[side]))
    before = _versions(home)
    assert len(before) > 30, before
    for side, out in outs.items():
        after = _versions(out)
        assert after == before, (side, {name for name in before if after.get(name) != before[name]})
    facts = json.loads((outs["dagster"] / "steps.json").read_text())
    ours, script = (
        statistics.median(run.seconds for run in sides[side]) for side in ("dagster", "script")
    )
    overhead = (ours - script) / facts["steps"]
    return [
        Row(
            f"orchestration, whole graph on the tiny model, warm, {facts['steps']} step processes",
            f"{ours:.3g} s",
            [(f"the same functions in one script: {script:.3g} s", "–")],
            goals={
                f"overhead {overhead:.2f} s a step process, goal {MAX_OVERHEAD_S} s": overhead
                <= MAX_OVERHEAD_S
            },
            notes=[
                f"orchestration: overhead (ours - script) / steps = {overhead:.2f} s a step process"
                f" (goal ≤ {MAX_OVERHEAD_S} s), with what a process imports for itself; starting a"
                f" step process with the definitions loaded, median {facts['start_s']:.2f} s. Both"
                f" published the {len(before)} versions that the first run had"
            ],
            figures={side: [vars(run) for run in runs] for side, runs in sides.items()} | facts,
        )
    ]


def prepared(inputs: Path, out: Path, timer: Timer) -> None:
    """``sample | tiny`` from nothing, in one process."""
    from llmrec_assets.runs import run_partition

    _use(out)
    with _instance(out) as instance, timer():
        run_partition("sample", "tiny", instance=instance)


def dagster(inputs: Path, out: Path, timer: Timer) -> None:
    from concurrent.futures import ProcessPoolExecutor
    from multiprocessing import get_context

    _copy(inputs, out)
    steps, starts = 0, list[float]()
    for job, partition in JOBS.items():
        # A run worker is a process of its own; its start is no part of the run.
        with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as worker:
            seconds, cpu_seconds, n, some = worker.submit(_run, job, partition, out).result()
        timer.seconds, timer.cpu_seconds = timer.seconds + seconds, timer.cpu_seconds + cpu_seconds
        steps, starts = steps + n, starts + some
    (out / "steps.json").write_text(
        json.dumps({"steps": steps, "start_s": statistics.median(starts)})
    )


def _run(job: str, partition: str, out: Path) -> tuple[float, float, int, list[float]]:
    """One job in this process's run: its seconds, those of its own CPU time, its steps, and what
    each took to start."""
    import dagster as dg

    tags = {"dagster/partition": partition}
    if "|" in partition:
        tags |= {
            "dagster/partition/dataset": partition.split("|")[0],
            "dagster/partition/recipe": partition.split("|")[1],
        }
    config: dict[str, Any] = {"execution": {"config": {"multiprocess": {"max_concurrent": 1}}}}
    if job == "recommender":
        config["ops"] = {name: {"config": {"force": True}} for name in ANSWERS}
    with _instance(out) as instance:
        target = dg.reconstructable(globals()[f"{job}_job"])
        began, cpu = time.perf_counter(), time.process_time()
        result = dg.execute_job(
            target, instance=instance, tags=tags, run_config=config, raise_on_error=True
        )
        seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
        steps, starts, asked = 0, [], {}
        for entry in instance.all_logs(result.run_id):
            event = entry.dagster_event
            if event is None:
                continue
            if event.event_type_value == "STEP_WORKER_STARTING":
                asked[entry.step_key] = entry.timestamp
            elif event.event_type_value == "STEP_WORKER_STARTED":
                starts.append(entry.timestamp - asked[entry.step_key])
            steps += event.event_type_value == "STEP_SUCCESS"
    return seconds, cpu_seconds, steps, starts


def source_data_job() -> Any:
    return _job("source_data")


def prepare_base_model_job() -> Any:
    return _job("prepare_base_model")


def recommender_job() -> Any:
    return _job("recommender")


def _job(name: str) -> Any:
    from llmrec_assets.definitions import defs

    return defs.resolve_job_def(name)


def script(inputs: Path, out: Path, timer: Timer) -> None:
    """The graph without Dagster: the functions that its steps call, in their order."""
    _copy(inputs, out)
    with timer():
        _script(out)


def _script(home: Path) -> None:
    import pandas as pd

    from llmrec_assets.ground import beyond, evaluation, incoming, leaks, movielens, sources
    from llmrec_assets.ground import preferences as pairs
    from llmrec_assets.ground.answers import (
        answer_versions,
        baselines_version,
        constrained_problems,
        ground_responses,
        parsing_problems,
        validity,
    )
    from llmrec_assets.ground.catalogue import (
        catalogue_problems,
        real_title_problems,
        shown_catalogue,
    )
    from llmrec_assets.ground.comparisons import comparisons
    from llmrec_assets.ground.groups import group_metrics, user_groups
    from llmrec_assets.ground.memorisation import (
        memorisation_questions,
        memorisation_table,
        read_source_rows,
    )
    from llmrec_assets.ground.prompts import render_prompts
    from llmrec_assets.ground.provenance import CODE_VERSION
    from llmrec_assets.ground.recipes import load_recipe
    from llmrec_assets.ground.recommendations import evaluated_prompts, sample_recommendations
    from llmrec_assets.ground.score_checks import score_problems
    from llmrec_assets.ground.scoring import ResponseScorer
    from llmrec_assets.ground.splits import split_users, temporal_split_time
    from llmrec_assets.ground.stages import answers_behind, current_stages
    from llmrec_assets.ground.store import Store
    from llmrec_assets.ground.windows import interaction_windows
    from llmrec_assets.models.answers import answer_test_prompts
    from llmrec_assets.models.classical_lists import classical_lists, ease_candidates
    from llmrec_assets.models.device import pick_device
    from llmrec_assets.models.leave_last_out import classical_leave_last_out
    from llmrec_assets.models.memorisation import continue_rows

    store, recipe, device = Store.at(home / "home"), load_recipe("tiny"), pick_device()
    seed, top_k = recipe.seed, recipe.windows.top_k

    def publish(asset: str, frame: pd.DataFrame, partition: str = PARTITION) -> Any:
        store.publish_table(asset, partition, frame)
        return store.read_table(asset, partition)

    def held(problems: Any) -> None:
        assert not problems, problems

    # source
    sources.locate(
        "sample",
        data_dir=None,
        sample_dir=PROJECT / "data" / "sample",
        cache_dir=home / "home" / "downloads",
        log=print,
        download=False,
    )
    files = store.checkpoint("movielens_files", "sample")
    movielens.require_readable(files, "sample")
    movies = publish("movies", movielens.read_movies(files, "sample"), "sample").frame
    users = publish("users", movielens.read_users(files, "sample"), "sample").frame
    place = home / "home" / "incoming" / "sample"
    taken = incoming.take_in(place, "sample", users, movies, print)
    publish("incoming_ratings", taken.ratings, "sample")
    read = movielens.read_ratings(files, "sample", users, movies)
    ratings = publish("ratings", incoming.merged([read, taken.ratings]), "sample").frame
    # prompts
    splits = publish("user_splits", split_users(users["user_id"], recipe.splits, seed)).frame
    held(leaks.user_split_problems(splits))
    catalogue = publish("catalogue", shown_catalogue(movies, recipe.prompts, seed)).frame
    held(catalogue_problems(catalogue, movies, recipe.prompts))
    canonical = movies[["movie_id", "canonical_movie_id"]]
    windows = interaction_windows(ratings, splits, recipe.windows, seed, canonical=canonical)
    held(leaks.window_problems(windows, ratings, splits, canonical, recipe.windows))
    windows = publish("interaction_windows", windows).frame
    rendered = render_prompts(windows, users, catalogue, recipe.prompts, recipe.windows)
    held(leaks.prompt_problems(rendered, windows, catalogue))
    held(real_title_problems(rendered, movies, users, recipe.prompts))
    prompts = publish("prompts", rendered)
    # models: published, as the steps find them
    base = store.checkpoint("base_model", "tiny")
    sft, dpo, _, rlhf = (
        store.checkpoint(asset, PARTITION)
        for asset in ("sft_checkpoint", "dpo_checkpoint", "reward_model", "rlhf_checkpoint")
    )
    sampled = store.read_table("sampled_responses", PARTITION)
    publish("sampled_responses", sampled.frame)
    scorer = ResponseScorer(prompts.frame, ratings, catalogue, recipe.grounding, top_k)
    chosen, _ = pairs.preference_pairs(
        sampled.frame, scorer, prompts.frame, recipe.preferences, seed=seed
    )
    held(pairs.problems(chosen, splits))
    publish("preference_pairs", chosen)
    # recommendations
    for stage, adapters in (
        ("base", ()),
        ("sft", (sft,)),
        ("dpo", (sft, dpo)),
        ("rlhf", (sft, rlhf)),
    ):
        made = ease_candidates(prompts.frame, splits, ratings, catalogue, recipe, seed=seed)
        held(made.problems)
        versions = answer_versions(recipe.generation, seed, CODE_VERSION, made.candidates.version)
        answers = answer_test_prompts(
            prompts.frame,
            ratings,
            catalogue,
            base,
            adapters,
            recipe.generation,
            stage=stage,
            prompts_version=prompts.version,
            answer_versions=versions,
            max_users=recipe.evaluation.max_test_users,
            top_k=top_k,
            seed=seed,
            device=device,
            candidates=made.candidates,
        )
        responses = publish(f"{stage}_responses", answers.frame).frame
        held(parsing_problems(catalogue, recipe.grounding))
        grounded = ground_responses(
            responses, prompts.frame, ratings, catalogue, recipe.grounding, top_k
        )
        held(constrained_problems(grounded, prompts.frame, ratings, catalogue, top_k))
        validity(grounded)
        publish(f"{stage}_recommendations", grounded)
    lists = classical_lists(
        prompts.frame,
        splits,
        ratings,
        catalogue,
        recipe,
        prompts_version=prompts.version,
        seed=seed,
        say=print,
    )
    held([problem for found in lists.problems.values() for problem in found])
    publish("baseline_recommendations", lists.frame)
    # evaluation
    until = temporal_split_time(ratings, recipe.windows)
    stages = current_stages(store, PARTITION, prompts.version, baselines_version(recipe.baselines))
    scored = evaluation.user_metrics(
        stages.recommendations, prompts.frame, movies, recipe.windows.protocol
    )
    held(score_problems(scored, stages.recommendations, prompts.frame, ratings, movies, top_k))
    metrics = publish("user_metrics", scored)
    compared = publish(
        "comparisons", comparisons(metrics.frame, recipe.evaluation, seed, metrics.version)
    ).frame
    publish(
        "metric_table",
        evaluation.metric_table(
            metrics.frame, recipe.evaluation, seed=seed, top_k=top_k, comparisons=compared
        ),
    )
    groups = user_groups(
        evaluated_prompts(prompts.frame, recipe.evaluation.max_test_users),
        windows,
        users,
        ratings,
        splits,
        movies,
        until,
    )
    publish(
        "group_metrics",
        group_metrics(metrics.frame, groups, recipe.evaluation, seed, metrics.version),
    )
    behind, _ = answers_behind(store, PARTITION, stages.recommendations)
    publish(
        "beyond_accuracy",
        beyond.beyond_accuracy(
            stages.recommendations,
            prompts.frame,
            ratings,
            splits,
            movies,
            behind,
            liked_min=recipe.windows.liked_min,
            protocol=recipe.windows.protocol,
            until=until,
        ),
    )
    publish(
        "sample_recommendations",
        sample_recommendations(
            prompts.frame,
            windows,
            catalogue,
            stages.recommendations,
            liked_min=recipe.windows.liked_min,
        ),
    )
    last, _ = classical_leave_last_out(
        ratings, movies, recipe.leave_last_out, recipe.evaluation, seed
    )
    publish("leave_last_out", last.frame)
    questions = memorisation_questions(
        read_source_rows(files, "sample"), recipe.probes, recipe.seed
    )
    texts, _ = continue_rows(base, questions, recipe.generation, device=device)
    publish(
        "memorisation",
        memorisation_table(
            questions,
            texts,
            confidence=recipe.evaluation.confidence,
            checkpoint_version=base.name,
        ),
    )
    # its inputs are what they were: the step finds the report published
    store.checkpoint("report", PARTITION)


def _copy(inputs: Path, out: Path) -> None:
    for name in ("home", "dagster"):
        shutil.rmtree(out / name, ignore_errors=True)
    shutil.copytree(inputs / "home", out / "home")
    _use(out)


def _use(out: Path) -> None:
    os.environ |= {
        "LLMREC_HOME": str(out / "home"),
        "LLMREC_LOCK_DIR": str(out / "locks"),
        "LLMREC_DEVICE": "cpu",
        "DAGSTER_HOME": str(out / "dagster"),
    }
    os.environ.pop("LLMREC_DATA_DIR", None)
    (out / "dagster").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(PROJECT / "dagster.yaml", out / "dagster" / "dagster.yaml")


def _instance(out: Path) -> Any:
    import dagster as dg

    return dg.DagsterInstance.from_config(str(out / "dagster"))


def _versions(home: Path) -> Mapping[str, str]:
    """Asset and partition → version in force, of all tables and checkpoints."""
    return {
        str(path.parent.relative_to(home / "home")): json.loads(path.read_text())["version"]
        for path in (home / "home").glob("*/*/**/current.json")
    }


# ---------------------------------------------------------------- definitions and code server


def _definitions(bench: Bench) -> Row:
    out = bench.directory(STAGE, "load")
    runs = [measure(STAGE, "load_definitions", out, out) for _ in range(max(3, bench.repeats))]
    seconds = statistics.median(run.seconds for run in runs)
    spread = f"{min(run.seconds for run in runs):.3g}–{max(run.seconds for run in runs):.3g}"
    return Row(
        "orchestration, loading the definitions",
        f"{seconds:.3g} s ({spread}); {max(run.peak_mb for run in runs):,.0f} MB",
        goals={f"{seconds:.2f} s to load, goal {MAX_LOAD_S} s": seconds <= MAX_LOAD_S},
        figures={"load": [vars(run) for run in runs]},
    )


def load_definitions(inputs: Path, out: Path, timer: Timer) -> None:
    assert "dagster" not in sys.modules and "pandas" not in sys.modules
    with timer():
        from llmrec_assets import definitions
    assert len(list(definitions.defs.resolve_asset_graph().get_all_asset_keys())) > 30


def _code_server(bench: Bench) -> Row:
    """The process that ``dagster dev`` starts for the code location, five seconds after it answers
    first."""
    import psutil
    from dagster._grpc.client import DagsterGrpcClient

    out = bench.directory(STAGE, "server")
    _use(out)
    socket = str(out / "code.sock")
    command = ["api", "grpc", "--socket", socket, "-m", "llmrec_assets.definitions"]
    server = subprocess.Popen(
        [sys.executable, "-m", "dagster", *command],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        client, until = DagsterGrpcClient(socket=socket), time.monotonic() + 120
        while True:
            try:
                client.list_repositories()
                break
            except Exception:  # not listening yet
                if time.monotonic() > until or server.poll() is not None:
                    raise
                time.sleep(0.2)
        time.sleep(5)
        memory = psutil.Process(server.pid).memory_full_info()
    finally:
        server.kill()
        server.wait()
    rss, pss, uss = (value / 1e6 for value in (memory.rss, memory.pss, memory.uss))
    return Row(
        "orchestration, an idle code server",
        f"{rss:.0f} MB resident",
        goals={f"{rss:.0f} MB, goal {MAX_SERVER_MB:.0f} MB": rss <= MAX_SERVER_MB},
        notes=[
            f"orchestration, an idle code server: resident {rss:.0f} MB, of which its own alone "
            f"{uss:.0f} MB; shared pages divided among those who share them (PSS) {pss:.0f} MB"
        ],
        figures={"rss_mb": rss, "pss_mb": pss, "uss_mb": uss},
    )
