"""What a step that waits for the device shows, and one for which the device is too small."""

import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import dagster as dg
import pytest

from llmrec_assets.orchestration.partitions import run_partitions
from llmrec_assets.orchestration.resources import GpuResource


class Quiet:
    def info(self, text: str) -> None:
        pass


QUIET = Quiet()
PARTITION = dg.MultiPartitionKey({"dataset": "sample", "recipe": "tiny"})


def test_a_waiting_step_shows_for_whom_in_the_ui(tmp_path: Path) -> None:
    """An observation of its asset with a link to the holder's run, and the wait in the metadata."""
    gpu = GpuResource(lock_dir=str(tmp_path), poll_seconds=0.02)
    has = threading.Event()

    @dg.asset(partitions_def=run_partitions)
    def trained(context: dg.AssetExecutionContext, gpu: GpuResource) -> dg.MaterializeResult:
        with gpu.lease_for(context) as lease:
            return dg.MaterializeResult(metadata=lease.facts())

    @dg.op
    def nothing() -> None:
        pass

    @dg.job
    def idle() -> None:
        nothing()

    with dg.instance_for_test() as instance:
        run_id = idle.execute_in_process(instance=instance).run_id

        def observations() -> Sequence[dg.EventLogRecord]:
            return instance.fetch_observations(dg.AssetKey("trained"), limit=5).records

        def hold() -> None:
            with gpu.lease(QUIET, "sft_checkpoint ml-1m|paper", run_id=run_id):
                has.set()
                while not observations():
                    time.sleep(0.05)
                time.sleep(0.4)

        holder = threading.Thread(target=hold)
        holder.start()
        assert has.wait(60)
        result = dg.materialize(
            [trained], partition_key=PARTITION, resources={"gpu": gpu}, instance=instance
        )
        holder.join()
        (record,) = observations()
    (event,) = result.asset_materializations_for_node("trained")
    assert event.metadata["waited_for_device_seconds"].value >= 0.3
    shown = {name: entry.value for name, entry in record.asset_observation.metadata.items()}
    who = f"sft_checkpoint ml-1m|paper (process {os.getpid()}, run {run_id[:8]}, since "
    assert str(shown["held_by"]).startswith(who)
    assert shown["held_by_run"] == run_id
    assert shown["waited_seconds"] == 0  # told at once
    assert record.asset_observation.partition == PARTITION


def test_where_nothing_fits_the_recipes_figure_is_told_too(tmp_path: Path) -> None:
    from llmrec_assets.models.memory import OutOfMemoryError

    @dg.asset(partitions_def=run_partitions)
    def trained(context: dg.AssetExecutionContext, gpu: GpuResource) -> None:
        with gpu.lease_for(context):
            raise OutOfMemoryError("SFT does not fit")

    gpu = GpuResource(lock_dir=str(tmp_path))
    with pytest.raises(OutOfMemoryError, match=r"does not fit. The recipe expects .* about 2 GB"):
        dg.materialize([trained], partition_key=PARTITION, resources={"gpu": gpu})
