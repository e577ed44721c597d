"""Whoever gets the device looks first whether the very same was published meanwhile."""

from __future__ import annotations

import dagster as dg
import pytest
from conftest import Home

from llmrec_assets.orchestration import resources


def reused(result: dg.ExecuteInProcessResult, asset: str) -> bool:
    assert result.success
    (event,) = result.asset_materializations_for_node(asset)
    return bool(event.metadata["reused"].value)


def leases(instance: dg.DagsterInstance, run_id: str) -> list[str]:
    said = [entry.user_message for entry in instance.all_logs(run_id)]
    return [line for line in said if "has the device" in line]


def test_answers_of_the_very_same_are_not_made_again(
    copied: tuple[Home, dg.DagsterInstance], monkeypatch: pytest.MonkeyPatch
) -> None:
    home, instance = copied
    before = home.current()
    both = ("base_responses", "memorisation")
    result = home.materialize(instance, *both)
    assert [reused(result, name) for name in both] == [True, True]
    assert leases(instance, result.run_id) == []
    assert home.current() == before

    # Looked up in vain at first, as while the other run still makes them; found once its turn came.
    looks = []
    looked = {name: module.made_before for name, module in _modules().items()}

    def later(name: str):
        def look(context, store):
            looks.append(name)
            return None if looks.count(name) == 1 else looked[name](context, store)

        return look

    for name, module in _modules().items():
        monkeypatch.setattr(module, "made_before", later(name))
    monkeypatch.setattr(resources, "_waited_in_pool", lambda context: 5.0)
    result = home.materialize(instance, *both)
    assert [reused(result, name) for name in both] == [True, True]
    assert len(leases(instance, result.run_id)) == 2
    assert home.current() == before
    monkeypatch.undo()


def test_another_seed_or_force_asks_the_model_again(
    copied: tuple[Home, dg.DagsterInstance],
) -> None:
    home, instance = copied
    before = home.current()["base_responses"]
    result = home.materialize(instance, "base_responses", config={"force": True})
    assert not reused(result, "base_responses")
    assert home.current()["base_responses"] == before  # the same answers
    result = home.materialize(instance, "base_responses", config={"seed": 99})
    assert not reused(result, "base_responses")


def _modules():
    from llmrec_assets.orchestration.assets import probes, recommendations

    return {"recommendations": recommendations, "probes": probes}
