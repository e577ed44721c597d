"""A run worker with step processes, for ``test_executor``: ``python executor_case.py DIR NAME``."""

import os
import sys
import time
from pathlib import Path

import dagster as dg

from llmrec_assets.orchestration.executor import step_executor
from llmrec_assets.orchestration.resources import GPU_POOL
from llmrec_assets.orchestration.run_worker import end_with_run_worker


def tell(context: dg.OpExecutionContext | dg.AssetExecutionContext) -> None:
    """Says who it is and what was there before it began."""
    context.log.info(
        f"step {os.getpid()} of {os.getppid()}, "
        f"definitions {'llmrec_assets.definitions' in sys.modules}, "
        f"ground {'llmrec_assets.ground.windows' in sys.modules}, "
        f"models {'torch' in sys.modules}"
    )


@dg.op
def told(context: dg.OpExecutionContext) -> None:
    tell(context)


@dg.asset
def without_a_model(context: dg.AssetExecutionContext) -> None:
    tell(context)


@dg.asset(pool=GPU_POOL)
def with_a_model(context: dg.AssetExecutionContext) -> None:
    tell(context)


@dg.op(pool=GPU_POOL)
def multiplies(context: dg.OpExecutionContext) -> None:
    """As a step with a model does, on threads of its own."""
    loaded = "torch" in sys.modules
    import torch

    torch.set_num_threads(2)
    x = torch.ones(600, 600)
    found = (x @ x).sum().item() / 600**3
    context.log.info(f"step {os.getpid()} of {os.getppid()}, loaded {loaded}, found {found:g}")


@dg.op
def sleeps() -> None:
    end_with_run_worker()
    Path(os.environ["CASE_DIR"], "pid").write_text(str(os.getpid()))
    time.sleep(120)


@dg.job(executor_def=step_executor)
def tells() -> None:
    told.alias("first")()
    told.alias("second")()


@dg.job(executor_def=step_executor)
def trains() -> None:
    multiplies.alias("first")()
    multiplies.alias("second")()


@dg.job(executor_def=step_executor)
def waits() -> None:
    sleeps()


def both() -> dg.JobDefinition:
    assets = [without_a_model, with_a_model]
    jobs = [dg.define_asset_job("both")]
    return dg.Definitions(assets=assets, jobs=jobs, executor=step_executor).resolve_job_def("both")


if __name__ == "__main__":
    directory, name, *selected = sys.argv[1:]
    os.environ["CASE_DIR"] = directory
    job = {"tells": tells, "trains": trains, "waits": waits, "both": both}[name]
    with dg.DagsterInstance.from_config(directory) as instance:
        keys = [dg.AssetKey(asset) for asset in selected] or None
        result = dg.execute_job(dg.reconstructable(job), instance=instance, asset_selection=keys)
        for entry in instance.all_logs(result.run_id):
            if entry.user_message.startswith("step "):
                print(entry.user_message)
    sys.exit(not result.success)
