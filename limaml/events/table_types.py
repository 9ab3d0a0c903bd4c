"""Which types the mapped columns of a table may have; what does not fit is refused by its first value."""

from collections.abc import Mapping
from typing import Any
from zoneinfo import ZoneInfo

import duckdb

from limaml.errors import ConfigError
from limaml.events import table_columns as tc
from limaml.events.table_columns import Mapped


def require_zone(zone: str) -> None:
    """Raises ConfigError if `zone` is neither empty nor known."""
    try:
        ZoneInfo(zone or "UTC")
    except (KeyError, ValueError, OSError):
        raise ConfigError(
            f"source.timezone must be a name of the tz database, got {zone!r}; e.g. UTC or Europe/Berlin"
        ) from None


def require_types(connection: Any, view: str, mapped: Mapping[str, Mapped], zone: str) -> None:
    """Raises ConfigError unless ids, label and time are what `limaml.config.TableColumns` says."""
    for key in ("user_id", "item_id", "event_id"):
        if key in mapped:
            require_id(connection, view, mapped[key])
    if "label" in mapped:
        _require_label(connection, view, mapped["label"])
    _require_time(connection, view, mapped["timestamp"], zone)


def require_id(connection: Any, view: str, mapped: Mapped) -> None:
    if not mapped.is_id:
        raise ConfigError(
            f"{mapped.setting} must be whole numbers or text, got {mapped.text!r} of type {mapped.type}, the first value "
            f"{_first_value(connection, view, mapped)}; map one, e.g. CAST({mapped.sql} AS BIGINT)"
        )


def _require_label(connection: Any, view: str, label: Mapped) -> None:
    if not (label.type == "BOOLEAN" or label.is_number):
        column = label.columns[0] if label.columns else "outcome"
        raise ConfigError(
            f"{label.setting} must be boolean or 0 and 1, got {label.text!r} of type {label.type}, the first value "
            f"{_first_value(connection, view, label)}; write a condition, e.g. label = \"{column} = 'yes'\""
        )


def _require_time(connection: Any, view: str, time: Mapped, zone: str) -> None:
    if not (time.is_number or time.is_text or time.is_naive or time.has_zone):
        raise ConfigError(
            f"{time.setting} must be a time, got {time.text!r} of type {time.type}, the first value "
            f'{_first_value(connection, view, time)}; map one, e.g. timestamp = "to_timestamp(seconds)"'
        )
    if zone or not (time.is_naive or time.is_text):
        return
    value = _first_value(connection, view, time, "true" if time.is_naive else f"NOT regexp_matches({time.sql}, {tc.ZONED})")
    if value is not None:
        raise ConfigError(
            f"source.timezone must say where clocks showed the times of {time.setting} ({time.text!r}), which carry no zone, "
            f'got \'\' and the first value {value}; set it, e.g. timezone = "UTC" or "Europe/Berlin"'
        )


def _first_value(connection: Any, view: str, mapped: Mapped, where: str = "true") -> str | None:
    """The first value for a message; None if there is none, or if an expression fails, which reading then says."""
    connection.execute("SET preserve_insertion_order = true")  # Otherwise it would be anyone's value.
    try:
        rows = connection.execute(
            f"SELECT CAST({mapped.sql} AS VARCHAR) FROM {view} WHERE {mapped.sql} IS NOT NULL AND {where} LIMIT 1"  # noqa: S608
        ).fetchall()
    except duckdb.Error:
        return None
    finally:
        connection.execute("SET preserve_insertion_order = false")
    return tc.cut(rows[0][0]) if rows else None
