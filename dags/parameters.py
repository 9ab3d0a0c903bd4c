"""What both DAGs share: typed parameters, how a run learns its day, and the defaults of a task."""

from datetime import date, datetime, timedelta
from typing import Any

from airflow.sdk import CronTriggerTimetable, Param
from airflow.sdk.configuration import conf
from airflow.sdk.exceptions import AirflowFailException

# Anchored; the operator passes it on as one element of an argv list, so this is for the reader, not the shell.
DAY_PATTERN = r"^([0-9]{4}-[0-9]{2}-[0-9]{2})?$"

TASK_DEFAULTS: dict[str, Any] = {
    "owner": "limaml",
    "retries": 2,
    "retry_delay": timedelta(seconds=10),
    "depends_on_past": False,
}

_OWNER_LINK = conf.get("limaml", "owner_link", fallback="")
OWNER_LINKS = {"limaml": _OWNER_LINK} if _OWNER_LINK else {}
"""Where the owner's name leads in the list of DAGs: an https: or mailto: address in `[limaml] owner_link`."""


def from_next_tick(cron: str) -> CronTriggerTimetable:
    """A schedule (UTC) that does nothing when the DAG is switched on but wait for its next tick.

    Needs a DAG without start_date: with one, and with any other `run_immediately`, Airflow 3.3 runs the tick before as well.
    """
    return CronTriggerTimetable(cron, timezone="UTC", run_immediately=timedelta(0))


def day_param(title: str) -> Param:
    """A calendar day, or empty for the day before the run's logical date.

    Null is what an empty field of the form gives: one that must be text would be asked for.
    """
    return Param(
        None,
        type=["null", "string"],
        pattern=DAY_PATTERN,
        title=title,
        description="YYYY-MM-DD (UTC). Empty: the day before the run's logical date.",
    )


def day_of(day: str | None, logical_date: datetime | None) -> str:
    """The run's day: the parameter, else the day before the logical date (so that a backfill works).

    Raises AirflowFailException (no retry) if there is neither.
    """
    if day:
        try:
            return date.fromisoformat(day).isoformat()
        except ValueError as error:
            raise AirflowFailException(f"the day must be a calendar day YYYY-MM-DD, got {day!r}: {error}") from None
    if logical_date is None:
        raise AirflowFailException(
            "this run has neither a day parameter nor a logical date, so its day is unknown; "
            'trigger it with a configuration such as {"day": "2026-01-31"} ("through" for limaml_train), or with a logical date'
        )
    return (logical_date.date() - timedelta(days=1)).isoformat()


DAG_MACROS = {"day_of": day_of}
