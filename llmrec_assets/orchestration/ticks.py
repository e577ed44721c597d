"""When schedules are due, and the ticks that nobody ran.

What belongs here: cron strings, the time zone, missed ticks. What does not: what a tick asks for
(``schedules``).

What Dagster does with ticks that nobody was there to run: of a schedule that is switched on, the
newest missed tick is made up for when the daemon is back, older ones are not ("no partition set,
so not trying to catch up"). ``missed_ticks`` names those.
"""

from __future__ import annotations

import datetime as dt
import os
import zoneinfo
from dataclasses import dataclass

import dagster as dg
from dagster._core.definitions.run_request import InstigatorType
from dagster._utils.schedules import schedule_execution_time_iterator

from llmrec_assets.ground.errors import LlmrecError

#: Schedule → cron. At four: no zone changes its clocks then, so the hour exists, and comes once.
CRON = {
    "weekly_retraining": "0 4 * * 0",  # Sunday
    "weekly_retention": "0 4 * * 1",  # Monday
}

#: A tick that has been due for less than this may just be starting.
_GRACE = dt.timedelta(minutes=10)
_LOOK_BACK = dt.timedelta(weeks=5)


def timezone() -> str:
    """``LLMREC_TIMEZONE``, an IANA name; UTC without it.

    Raises:
        LlmrecError: there is no such zone.
    """
    name = os.environ.get("LLMREC_TIMEZONE") or "UTC"
    try:
        zoneinfo.ZoneInfo(name)
    except (zoneinfo.ZoneInfoNotFoundError, ValueError, OSError) as error:
        raise LlmrecError(
            f"LLMREC_TIMEZONE is {name!r}, which is no time zone: use an IANA name such as "
            "Europe/Berlin, or leave it out for UTC"
        ) from error
    return name


@dataclass(frozen=True)
class MissedTick:
    """A time at which a schedule was on and due, and nobody ran it; ``overtaken``: a later tick
    has run since."""

    due: dt.datetime
    overtaken: bool

    def __str__(self) -> str:
        return f"{self.due:%Y-%m-%d %H:%M} {self.due.tzname()}"


def missed_ticks(instance: dg.DagsterInstance, schedule: str, now: dt.datetime) -> list[MissedTick]:
    """The missed ticks of the last five weeks, in the schedule's zone. None when it is off."""
    missed: list[MissedTick] = []
    for state in instance.all_instigator_state(instigator_type=InstigatorType.SCHEDULE):
        if state.instigator_name != schedule or not state.is_running:
            continue
        started = getattr(state.instigator_data, "start_timestamp", None) or now.timestamp()
        since = max(started, (now - _LOOK_BACK).timestamp())
        ticks = instance.get_ticks(state.instigator_origin_id, state.selector_id, after=since - 1)
        ran = {tick.timestamp for tick in ticks}
        for due in schedule_execution_time_iterator(since, CRON[schedule], timezone()):
            if due > now - _GRACE:
                break
            if due.timestamp() not in ran:
                missed.append(MissedTick(due, any(time > due.timestamp() for time in ran)))
    return missed
