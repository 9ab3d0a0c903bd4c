"""`limaml status` on one screen: what serves, how fresh each slot is, which days are in, and what was refused."""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from datetime import date, datetime

from limaml import registry, telemetry
from limaml.config import Config
from limaml.embeddings.published import published_files
from limaml.embeddings.slot_state import FILLING, READY, complete_through
from limaml.events.day_store import DayManifest, EventStore
from limaml.governance.card import SHOWN
from limaml.io.storage import Storage
from limaml.local.status import Status
from limaml.monitoring.published import entities_by_age
from limaml.registry import ModelVersion, Registry

_NAMED = 5
"""Days that are named; the others are counted."""
_HOUR_S = 3600.0
_SCREEN = "  {0:<10} {1}"


def screen(cfg: Config, status: Status, now: datetime) -> list[str]:
    """Lines to print. Raises as Registry and Storage do."""
    versions = Registry(cfg.registry).versions()
    manifests = EventStore(Storage(cfg.storage.root)).manifests()
    sections = [
        ("Model", _model(status, versions)),
        ("Slots", _slots(status, versions, now)),
        ("Days", _days(status, manifests)),
        ("Gates", _gates(manifests)),
        ("Entities", _entities(cfg, status, versions)),
    ]
    return [
        _SCREEN.format(title if at == 0 else "", line).rstrip() for title, lines in sections for at, line in enumerate(lines)
    ]


def _model(status: Status, versions: Sequence[ModelVersion]) -> list[str]:
    if status.champion is None:
        return [f"none serves; {len(versions)} registered; trigger limaml_train, or run `make run`"]
    fits = "on the data, configuration and code of now" if status.current else "on other data, configuration or code than now"
    lines = [f"version {status.champion} serves, trained {fits}"]
    champion = next(version for version in versions if version.version == status.champion)
    lines += [value for tag, value in sorted(champion.tags.items()) if tag.startswith(f"{SHOWN}.")]
    newest = versions[0]
    if newest.version != status.champion:
        decision = newest.tags.get(registry.DECISION, "not judged")
        lines.append(f"version {newest.version} is the newest: {decision}, {newest.tags.get(registry.STATE, 'in no slot')}")
    return lines


def _slots(status: Status, versions: Iterable[ModelVersion], now: datetime) -> list[str]:
    lines = []
    for version in versions:
        state = version.tags.get(registry.STATE)
        if state not in (FILLING, READY):
            continue
        role = "serves" if version.version == status.champion else "ready to roll back to" if state == READY else "is filled"
        is_complete = registry.COMPLETE_THROUGH in version.tags
        fresh = f"complete through {_lag(complete_through(version), now)}" if is_complete else "not complete yet"
        lines.append(f"{version.tags[registry.SLOT]:<6} version {version.version} {role}, {fresh}")
    return sorted(lines) or ["both empty"]


def _lag(complete: datetime, now: datetime) -> str:
    return f"{complete:%Y-%m-%d %H:%M} UTC, lag {(now - complete).total_seconds() / _HOUR_S:.1f} h"


def _days(status: Status, manifests: Mapping[date, DayManifest]) -> list[str]:
    passed = [day for day, manifest in manifests.items() if manifest.status == "passed"]
    stored = f"{len(passed)} stored, {passed[0]} to {passed[-1]}" if passed else "none stored"
    lines = [f"{stored}; the source's last is {status.last_day}"]
    lines.append(f"not online yet: {_named(status.pending)}" if status.pending else "all online")
    lines += [f"left out: {reason}" for reason in status.left_out[:_NAMED]]
    return lines


def _gates(manifests: Mapping[date, DayManifest]) -> list[str]:
    counts = Counter(manifest.status for manifest in manifests.values())
    warned = [day for day, manifest in manifests.items() if manifest.warnings]
    lines = [f"{counts['passed']} days passed, {len(warned)} with warnings, {counts['no_data']} without data"]
    for day, manifest in list(manifests.items())[::-1]:
        if manifest.status == "quarantined" and len(lines) <= _NAMED:
            lines.append(f"quarantined: {day}, attempt {manifest.revision}: {', '.join(manifest.failed)}")
    more = counts["quarantined"] - (len(lines) - 1)
    return [*lines, *([f"and {more} more quarantined days"] if more else [])]


def _entities(cfg: Config, status: Status, versions: Iterable[ModelVersion]) -> list[str]:
    champion = next((version for version in versions if version.version == status.champion), None)
    if champion is None or registry.COMPLETE_THROUGH not in champion.tags:
        return ["none published"]
    storage, through = Storage(cfg.storage.root), complete_through(champion)
    lines = []
    for kind in cfg.task_kinds:
        files = published_files(storage, kind.name, champion.version)
        ages = entities_by_age(storage, files, kind.entity_column, through)
        parts = ", ".join(f"{ages[state]:,} {state.replace('_', ' ')}" for state in telemetry.ENTITY_STATES)
        lines.append(f"{kind.name}: {sum(ages.values()):,} with an embedding; newest event: {parts}")
    return lines


def _named(days: Sequence[date]) -> str:
    more = f" and {len(days) - _NAMED} more" if len(days) > _NAMED else ""
    return ", ".join(map(str, days[:_NAMED])) + more
