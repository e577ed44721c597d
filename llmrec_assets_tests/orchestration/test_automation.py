"""Declarative automation: changed data is followed to the end of the graph, a rerun is not.

Most tests tell the instance of materializations and their data versions without making anything;
the conditions are the real graph's.
"""

from __future__ import annotations

import itertools
import os
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import dagster as dg
import pytest

from llmrec_assets.definitions import build_defs
from llmrec_assets.orchestration.automation import (
    on_changed_data,
    on_changed_data_at_rest,
    retrain_on_changed_data,
)

if TYPE_CHECKING:
    from conftest import Home

SOURCE = ("movielens_files", "users", "movies", "incoming_ratings", "ratings")
#: Made when somebody asks, never by itself.
CHAMPION = ("champion", "promotions")
ALIGNMENT = {
    *("sampled_responses", "preference_pairs", "dpo_checkpoint", "reward_model"),
    *("rlhf_checkpoint", "dpo_responses", "rlhf_responses"),
    *("dpo_recommendations", "rlhf_recommendations"),
}


@dataclass
class World:
    """An instance in which assets have been materialized, and the automation's memory."""

    defs: dg.Definitions
    instance: dg.DagsterInstance
    cursor: object = None
    numbers: Iterator[int] = field(default_factory=lambda: itertools.count(1))
    versions: dict[tuple[str, str], str] = field(default_factory=dict)

    @property
    def graph(self) -> dg.AssetGraph:
        return self.defs.resolve_asset_graph()

    def partition(self, asset: str, dataset: str = "sample", recipe: str = "tiny") -> str:
        if asset in SOURCE:
            return dataset
        return recipe if asset == "base_model" else f"{dataset}|{recipe}"

    def ordered(self) -> list[str]:
        """Every asset that automation looks after, upstream first."""
        names = [key.to_user_string() for key in self.graph.toposorted_asset_keys]
        return [name for name in names if name not in CHAMPION]

    def make(self, asset: str, partition: str | None = None, changed: bool = True) -> None:
        """The asset has been materialized; with ``changed`` to a new data version."""
        partition = partition or self.partition(asset)
        place = (asset, partition)
        if changed or place not in self.versions:
            self.versions[place] = f"v{next(self.numbers)}"
        self.instance.report_runless_asset_event(
            dg.AssetMaterialization(
                asset, partition=partition, tags={"dagster/data_version": self.versions[place]}
            )
        )

    def make_all(self, dataset: str = "sample", without: set[str] = frozenset()) -> None:
        for asset in self.ordered():
            if asset not in without:
                self.make(asset, self.partition(asset, dataset))

    def tick(self) -> set[tuple[str, str]]:
        """(asset, partition) of everything requested now."""
        result = dg.evaluate_automation_conditions(
            self.defs, self.instance, asset_selection=dg.AssetSelection.all(), cursor=self.cursor
        )
        self.cursor = result.cursor
        return {
            (asset, str(partition))
            for asset in self.ordered()
            for partition in result.get_requested_partitions(dg.AssetKey(asset))
        }

    def below(self, *assets: str) -> set[str]:
        """Everything that depends on these, directly or not."""
        found: set[str] = set()
        for asset in self.ordered():
            parents = {
                key.to_user_string() for key in self.graph.get(dg.AssetKey(asset)).parent_keys
            }
            if parents & (found | set(assets)):
                found.add(asset)
        return found


@pytest.fixture(scope="module")
def defs() -> dg.Definitions:
    return build_defs()


@pytest.fixture
def world(defs: dg.Definitions) -> Iterator[World]:
    """``sample | tiny`` has run; the automation has looked once."""
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(defs, instance)
        world.make_all()
        world.tick()
        yield world


def test_every_asset_has_the_condition_and_the_switch_is_off(defs: dg.Definitions) -> None:
    graph = defs.resolve_asset_graph()
    for node in graph.asset_nodes:
        name = node.key.to_user_string()
        if name in CHAMPION:
            assert node.automation_condition is None, "who serves is decided when somebody asks"
            continue
        expected = on_changed_data if name in SOURCE else on_changed_data_at_rest
        assert node.automation_condition == expected, name
    assert retrain_on_changed_data.default_status == dg.DefaultSensorStatus.STOPPED
    automation = [
        sensor
        for sensor in defs.get_repository_def().sensor_defs
        if isinstance(sensor, dg.AutomationConditionSensorDefinition)
    ]
    assert automation == [retrain_on_changed_data]  # Dagster adds no other of its own


def test_turning_it_on_requests_nothing(defs: dg.Definitions) -> None:
    with dg.DagsterInstance.ephemeral() as instance:
        world = World(defs, instance)
        world.make_all()
        assert world.tick() == set()
        assert world.tick() == set()


def test_an_identical_rerun_requests_nothing(world: World) -> None:
    for number, asset in enumerate(world.ordered()):
        world.make(asset, changed=False)
        if number in (4, 20):  # in the middle of the run
            assert world.tick() == set()
    assert world.tick() == set()


def test_changed_ratings_request_all_that_depends_on_them_in_the_partition_that_was_run(
    world: World,
) -> None:
    world.make("ratings")
    requested = world.tick()
    assert requested == {(asset, "sample|tiny") for asset in world.below("ratings")}
    assert ("sft_checkpoint", "sample|tiny") in requested
    assert not {"user_splits", "catalogue", "base_model", "memorisation"} & {
        a for a, _ in requested
    }
    assert world.tick() == set()


def test_the_run_that_was_requested_requests_nothing_more(world: World) -> None:
    world.make("ratings")
    requested = {asset for asset, _ in world.tick()}
    for asset in world.ordered():
        if asset in requested:
            world.make(asset)
            # the run is over for this asset, not for those below: see the test of runs under way
    assert world.tick() == set()
    assert world.tick() == set()


def test_what_a_failed_run_did_not_reach_is_requested_once_more_and_no_third_time(
    world: World,
) -> None:
    world.make("ratings")
    world.tick()
    world.make("interaction_windows")
    world.make("prompts")  # and there the run ends
    left = world.below("prompts")
    assert left <= {asset for asset, _ in world.tick()}
    assert world.tick() == set()


def test_a_run_by_hand_from_the_source_on_requests_nothing(world: World) -> None:
    world.make_all()
    assert world.tick() == set()
    assert world.tick() == set()


def test_new_files_travel_through_the_tables_of_the_data_set_first(world: World) -> None:
    world.make("movielens_files")
    requested = world.tick()
    tables = {(a, "sample") for a in ("users", "movies", "incoming_ratings", "ratings")}
    # the base model's probe reads the files themselves, and the report shows it
    assert requested == tables | {("memorisation", "sample|tiny"), ("report", "sample|tiny")}
    for asset in ("users", "movies", "incoming_ratings"):
        world.make(asset, changed=False)
    world.make("ratings")
    world.make("memorisation", changed=False)
    assert world.tick() == {(asset, "sample|tiny") for asset in world.below("ratings")}


def test_a_change_right_after_the_asset_was_made_is_not_forgotten(world: World) -> None:
    """Both within one tick: first everything was made, then the ratings changed once more."""
    world.make_all()
    world.make("ratings")
    assert world.tick() == {(asset, "sample|tiny") for asset in world.below("ratings")}


def test_a_change_far_down_requests_only_what_lies_below(world: World) -> None:
    world.make("comparisons")
    assert {asset for asset, _ in world.tick()} == {"metric_table", "report"}


def test_what_nobody_has_run_is_not_begun(world: World) -> None:
    """The data set ml-1m stops at SFT; ml-100k has only been read."""
    world.make_all("ml-1m", without=ALIGNMENT)
    for asset in SOURCE:
        world.make(asset, "ml-100k")
    world.tick()
    world.make("ratings", "ml-100k")
    assert world.tick() == set()
    world.make("ratings", "ml-1m")
    below = world.below("ratings") - ALIGNMENT
    assert world.tick() == {(asset, "ml-1m|tiny") for asset in below}
    assert {"sft_checkpoint", "metric_table", "report"} <= below


def test_the_real_source_data_run_again_requests_nothing_and_a_new_file_does(
    new_home: Callable[..., Home],
) -> None:
    home = new_home()
    with home.instance() as instance:
        world = World(home.defs(), instance)
        run_source(home, instance)
        for asset in world.ordered():
            if asset not in SOURCE:
                world.make(asset)
        world.tick()
        before = home.store.current("ratings", "sample", "tables")
        run_source(home, instance)
        assert world.tick() == set()
        drop_ratings(home, "new.csv", "1,83,1,1900000000")
        run_source(home, instance)
        assert home.store.current("ratings", "sample", "tables") != before
        assert world.tick() == {(asset, "sample|tiny") for asset in world.below("ratings")}


def run_source(home: Home, instance: dg.DagsterInstance) -> None:
    result = home.materialize(instance, *SOURCE, job="source_data", partition="sample")
    assert result.success


def drop_ratings(home: Home, name: str, *rows: str) -> Path:
    """A rating file that has been lying in the sample's incoming directory for a minute."""
    path = home.location / "incoming" / "sample" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(["user_id,movie_id,rating,timestamp", *rows]) + "\n")
    os.utime(path, (time.time() - 60,) * 2)
    return path


def test_nothing_is_requested_while_the_data_sets_tables_are_being_made(
    new_home: Callable[..., Home],
) -> None:
    """A run has made new films and is still at the ratings: no moment to train."""
    go_on = threading.Event()
    per_dataset = dg.StaticPartitionsDefinition(["sample"])
    per_run = dg.MultiPartitionsDefinition(
        {"dataset": per_dataset, "recipe": dg.StaticPartitionsDefinition(["tiny"])}
    )
    versions = {"movies": "a"}

    def table(name: str, body: Callable[[], str], *deps: str) -> dg.AssetsDefinition:
        @dg.asset(
            name=name,
            deps=list(deps),
            partitions_def=per_dataset,
            automation_condition=on_changed_data,
        )
        def made() -> dg.MaterializeResult:
            return dg.MaterializeResult(data_version=dg.DataVersion(body()))

        return made

    def ratings() -> str:
        assert go_on.wait(60)
        return "r"

    @dg.asset(deps=["movies"], partitions_def=per_run, automation_condition=on_changed_data_at_rest)
    def catalogue() -> None: ...

    @dg.asset(deps=[catalogue], partitions_def=per_run)
    def report() -> None: ...

    source = [
        table("movielens_files", lambda: "f"),
        table("users", lambda: "u"),
        table("movies", lambda: versions["movies"]),
        table("incoming_ratings", lambda: "i", "movies"),
        table("ratings", ratings, "incoming_ratings"),
    ]
    defs = dg.Definitions(assets=[*source, catalogue, report])
    with new_home().instance() as instance:
        world = World(defs, instance)
        go_on.set()
        dg.materialize(source, instance=instance, partition_key="sample")
        world.make("catalogue")
        world.make("report")
        world.tick()
        go_on.clear()
        versions["movies"] = "b"
        thread = threading.Thread(
            target=dg.materialize,
            args=(source,),
            kwargs={"instance": instance, "partition_key": "sample"},
        )
        thread.start()
        try:
            deadline = time.monotonic() + 60
            key = dg.AssetKey("incoming_ratings")
            before = instance.get_latest_materialization_event(key)
            while instance.get_latest_materialization_event(key) == before:
                assert time.monotonic() < deadline
                time.sleep(0.1)
            assert world.tick() == set()
        finally:
            go_on.set()
            thread.join()
        assert world.tick() == {("catalogue", "sample|tiny")}
        assert world.tick() == set()
