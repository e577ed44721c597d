"""Declarative automation: what is materialized because data it depends on changed.

What belongs here: the condition and the switch. What does not: schedules (``schedules``), noticing
files (``sensors``).

Seen in Dagster 1.13 (``evaluate_automation_conditions``), and why the condition is not ``eager()``:

- ``eager()`` reacts to updates: a rerun with identical results would train everything again.
- ``since_last_handled()`` forgets an update that comes after the asset itself was made but within
  the same tick: its reset is an ``or``, which drops the times by which ``since`` would tell.
  ``newly_updated`` and ``newly_requested``, each a reset of its own, keep them.
- ``data_version_changed()`` carries no times. So updates decide what is handled, and a changed
  version counts for as long as an update is not handled.
- ``will_be_requested()`` lets a change travel: everything below it stands in one run, in order.
  Without it, answers would be generated anew from new ratings and old prompts, and then again.
- An asset that is made from the old while its input changes would count as newer than the change.
  And half of a data set's tables new is no moment to train. So nothing of a `dataset | recipe` is
  requested while a run that ends in its ``report`` or in its data set's ``ratings`` goes on.
- ``missing()`` stays missing: turning the switch on trains no partition that nobody ever ran.
"""

from __future__ import annotations

import dagster as dg

_Condition = dg.AutomationCondition

_updated = _Condition.any_deps_match(_Condition.newly_updated())
_unhandled = _updated.since(_Condition.newly_updated()) & _updated.since(
    _Condition.newly_requested()
)
_changed = _Condition.any_deps_match(_Condition.data_version_changed()).since(~_unhandled)

#: For the tables of a data set, and the base model.
on_changed_data = (
    ((_unhandled & _changed) | _Condition.any_deps_match(_Condition.will_be_requested()))
    & ~_Condition.missing()
    & ~_Condition.any_deps_in_progress()
    & ~_Condition.in_progress()
).with_label("on_changed_data")

#: For everything of a `dataset | recipe`.
on_changed_data_at_rest = (
    on_changed_data
    & ~_Condition.asset_matches("ratings", _Condition.in_progress())
    & ~_Condition.asset_matches("report", _Condition.in_progress())
).with_label("on_changed_data_at_rest")

retrain_on_changed_data = dg.AutomationConditionSensorDefinition(
    "retrain_on_changed_data",
    target=dg.AssetSelection.all(),
    default_status=dg.DefaultSensorStatus.STOPPED,
    minimum_interval_seconds=60,
    emit_backfills=False,  # a run per `dataset | recipe`, as everybody else starts them
    run_tags={"llmrec/why": "data changed"},
    description="Materializes what has been materialized before and whose data changed since, and "
    "everything below it. A rerun with identical results changes nothing and requests nothing.",
)
