"""From a source to logged events: gate, day partition, snapshots, point-in-time join.

A day's manifest is written last, so a killed ingestion is simply done again. Nothing is written downstream of a gate that
failed. `ingest_day` takes one day as it arrives, with its volume judged; `ingest_history` takes all days up to one at once,
where unusual volume is a warning (unless the day was refused for it before).
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import date, timedelta
from functools import cached_property
from itertools import accumulate
from typing import Any

import pyarrow as pa

from limaml import schema, telemetry
from limaml.config import Config
from limaml.errors import ConfigError, DataError, GateError, UnreadableDayError
from limaml.events import catalogue, gates, snapshots, state
from limaml.events.casting import declared_events
from limaml.events.day_store import DayManifest, EventStore, canonical, conforms, content_hash, events_path
from limaml.events.declared import require_declared
from limaml.events.embedded import with_embedded
from limaml.events.expectations import Finding, GateResult
from limaml.events.gate_report import report_html
from limaml.events.logged import keep_logged_features, logged_path, write_logged
from limaml.events.point_in_time import join
from limaml.events.sources import Source, open_source
from limaml.io.locks import Lock, exclusive
from limaml.io.storage import Storage, each_in_threads
from limaml.progress import tracked

_JOIN_VALUES = 5_000_000
"""Features that one point-in-time join of the history adds: bounds memory. Each join reads all snapshots of the span."""
_LOCK_WAIT_S = 120.0
_NAMED = 5
"""How many of many are named in a result of at most 4 KiB."""
_REMEDY = "correct the day at its source and ingest it again"
_log = telemetry.get_logger(__name__)


@dataclass(frozen=True)
class _Places:
    """What every step works with."""

    cfg: Config
    storage: Storage
    store: EventStore
    source: Source
    lock: Lock
    tables: schema.Tables
    last: date
    """The last day that is asked for."""
    ignored: set[str] = field(default_factory=set)
    """Columns of events that no feature reads, as they were first seen."""

    def declared_events(self, day: date, delivered: pa.Table) -> pa.Table:
        """A day's events in the declared columns; what no feature reads is logged once."""
        table, ignored = declared_events(self.tables, delivered)
        new = sorted(set(ignored) - self.ignored)
        if new:
            _log.warning("columns_ignored", of="events", first_seen=day.isoformat(), columns=new)
            self.ignored.update(new)
        return table

    @cached_property
    def catalogue(self) -> dict[str, pa.Table]:
        """Known users and items as delivered, in the declared columns; what no feature reads is logged."""
        found = {}
        # A corrected day does not make the ids of later ones unknown.
        users, items = self.source.catalogue(max([self.last, *self.store.days("passed")]))
        known = (users, with_embedded(self.cfg, items))
        for kind, delivered in zip(catalogue.kinds(self.tables).values(), known, strict=True):
            found[kind.name], ignored = catalogue.declared(kind, self.tables, delivered)
            if ignored:
                _log.warning("columns_ignored", of=kind.catalogue.name, columns=ignored)
        return found


@dataclass(frozen=True)
class _Delivery:
    """One day as delivered, with what is already known about it. `table` is canonical if it conforms to the schema."""

    day: date
    table: pa.Table
    known: DayManifest | None
    sha256: str

    @property
    def revision(self) -> int:
        """The revision this content is, or becomes once accepted."""
        if self.known is None or self.known.status != "passed":
            return 1
        return self.known.revision + (self.known.sha256 != self.sha256)


def ingest_history(cfg: Config, through: date, today: date) -> dict[str, Any]:
    """Ingest every day up to `through` that is new or has changed; all of them or, if a gate fails, none.

    Returns counts and the number of days with warnings, whose report is in `reports/`. Raises GateError naming every failing
    day, ConfigError if `through` is not over yet or lies before the source's first day.
    """
    with _open(cfg, through, today) as places:
        days = [day for day in places.source.days() if day <= through]
        if not days:
            first = places.source.days()[0]
            raise ConfigError(f"through must be a day of the source, from {first} on, got {through}; choose a later day")
        known = places.store.manifests()
        _refuse_before_first(known, days[0])
        reading = tracked(days, "reading", "days", len(days))
        deliveries = [d for day in reading if (d := _read(places, day, known.get(day))) is not None]
        delivered = {d.day for d in deliveries}
        missing = [day for day in days if day not in delivered and _is_open(known.get(day))]
        fresh = [d for d in deliveries if not _is_complete(places.storage, d)]
        results = _gate(places, fresh, deliveries, strict=[d.day for d in fresh if d.known and d.known.status == "quarantined"])
        if not fresh:
            _let_windows_pass(places, known, missing)
        for day in missing:
            places.lock.check()
            places.store.record_no_data(day)
        summary = {
            "status": "ingested" if fresh else "unchanged",
            "through": through.isoformat(),
            "days": len(days),
            "ingested": len(fresh),
            "unchanged": len(deliveries) - len(fresh),
            "no_data": len(days) - len(deliveries),
            "rows": sum(d.table.num_rows for d in fresh),
            "warned_days": sum(bool(result.warnings) for result in results.values()),
        } | _left_out(places.source)
        if fresh:
            summary["report"] = _write_history_report(places.storage, through, results)
            _accept(places, fresh, results)
        return summary


def ingest_day(cfg: Config, day: date, today: date) -> dict[str, Any]:
    """Ingest one day as it arrives, its volume judged; the same content again changes nothing.

    Returns `status`: ingested, corrected (an accepted day has new content and got the next revision), unchanged or no_data.
    Raises GateError if the gate fails, with the day put into quarantine; ConfigError if the day is not over yet.
    """
    with _open(cfg, day, today) as places:
        manifests = places.store.manifests()
        _refuse_before_first(manifests, day)
        known = manifests.get(day)
        delivery = _read(places, day, known)
        if delivery is None:
            if known is None or _is_open(known):
                _let_windows_pass(places, manifests, [day])
                places.lock.check()
                manifest = places.store.record_no_data(day)
            else:
                manifest = known
            status = "no_data" if manifest.status == "no_data" else "unchanged"
            known_rows = {"revision": manifest.revision, "rows": manifest.rows}
            return {"status": status, "day": day.isoformat()} | known_rows | _left_out(places.source)
        summary = {"day": day.isoformat(), "revision": delivery.revision, "rows": delivery.table.num_rows}
        summary |= _left_out(places.source)
        if _is_complete(places.storage, delivery):
            return summary | {"status": "unchanged"}
        results = _gate(places, [delivery], [], strict=[day])
        _accept(places, [delivery], results)
        return summary | {"status": "ingested" if delivery.revision == 1 else "corrected"}


def _left_out(source: Source) -> dict[str, Any]:
    """For a verb's result: what the source leaves out, if anything; the log has all of it."""
    return {"left_out": list(source.left_out[:_NAMED]), "num_left_out": len(source.left_out)} if source.left_out else {}


def _is_open(known: DayManifest | None) -> bool:
    """Whether nothing was accepted for a day yet, so that its absence from the source is news."""
    return known is None or known.status == "quarantined"


def _refuse_before_first(known: Mapping[date, DayManifest], day: date) -> None:
    """Snapshots begin with the first day that passed: an older one would have no catalogue to join."""
    first = min((d for d, manifest in known.items() if manifest.status == "passed"), default=day)
    if day < first:
        raise DataError(
            f"day must not be before the first day ingested ({first}), got {day}; load it into an empty storage.root"
        )


@contextmanager
def _open(cfg: Config, last: date, today: date) -> Iterator[_Places]:
    """Open source and storage for a day that is over; one ingestion at a time. What the source leaves out is logged."""
    if last >= today:
        raise ConfigError(
            f"a day must be over before it is ingested: it must be before {today}, got {last}; choose an earlier day"
        )
    with exclusive(cfg, "ingest", _LOCK_WAIT_S) as lock:
        storage = Storage(cfg.storage.root)
        source = open_source(cfg, today)
        for reason in source.left_out:
            _log.warning("source_left_out", reason=reason)
        tables = schema.tables(cfg.features)
        require_declared(storage, tables)
        yield _Places(cfg, storage, EventStore(storage), source, lock, tables, last)


def _read(places: _Places, day: date, known: DayManifest | None) -> _Delivery | None:
    """One day from the source; None if it has none. What cannot be read goes to quarantine."""
    try:
        table = places.source.read_day(day)
    except UnreadableDayError as error:
        finding = Finding("day_to_be_readable", True, False, "the source can read the day", 0, (str(error),))
        result = GateResult(f"events of {day.isoformat()}", 0, (finding,))
        _refuse(places, {day: error.raw}, {day: result})
    if table is None:
        return None
    table = places.declared_events(day, table)
    if conforms(table, places.tables.events):  # Otherwise it stays as it came, and its gate says what is wrong with it.
        table = canonical(table, places.tables.events)
    return _Delivery(day, table, known, content_hash(table))


def _is_complete(storage: Storage, delivery: _Delivery) -> bool:
    """Whether this content was accepted and both its files are whole; one that was lost or cut short is written again."""
    day, known = delivery.day, delivery.known
    if known is None or known.status != "passed" or known.sha256 != delivery.sha256:
        return False
    paths = (events_path(day, known.revision), logged_path(day, known.revision))
    return all(storage.num_rows(path) == known.rows for path in paths)


def _gate(
    places: _Places, fresh: Sequence[_Delivery], others: Sequence[_Delivery], strict: Sequence[date]
) -> dict[date, GateResult]:
    """Gate the catalogue and the fresh days. Raises GateError, with every failing day put into quarantine."""
    if not fresh:
        return {}
    for kind in catalogue.kinds(places.tables).values():
        result = gates.check_catalogue(places.catalogue[kind.name], kind.delivered)
        gates.require(result, f"correct the {kind.catalogue.name} at their source and ingest again")
        catalogue.require_same_vectors(places.storage, kind, places.catalogue[kind.name])
    rows = {day: m.rows for day, m in places.store.manifests().items() if m.status == "passed"}
    rows |= {d.day: d.table.num_rows for d in (*others, *fresh)}
    window = places.cfg.source.rows_window_days
    recent = {d.day: [rows[day] for n in range(1, window + 1) if (day := d.day - timedelta(days=n)) in rows] for d in fresh}
    results = gates.check_days(
        {d.day: d.table for d in fresh},
        known_users=places.catalogue["user"]["user_id"].combine_chunks(),
        known_items=places.catalogue["item"]["item_id"].combine_chunks(),
        recent_rows=recent,
        source=places.cfg.source,
        strict_volume=frozenset(strict),
        unread={d.day: places.source.unread(d.day) for d in fresh},
        events=places.tables.events,
    )
    failing = {day: result for day, result in results.items() if not result.success}
    if failing:
        _refuse(places, {d.day: d.table for d in fresh if d.day in failing}, failing)
    return results


def _refuse(places: _Places, contents: Mapping[date, pa.Table | bytes], results: Mapping[date, GateResult]) -> None:
    """Put refused days into quarantine with the reasons. Always raises GateError."""
    messages, failed = [], dict[str, None]()
    for day, content in contents.items():
        result = results[day]
        page = report_html(f"Refused: {result.what}", f"Nothing downstream ran on this day; {_REMEDY}.", [result])
        places.lock.check()
        folder = places.store.quarantine(day, content, result.failed, result.result, page)
        _log.error("day_quarantined", day=day.isoformat(), failed=result.failed, folder=folder)
        messages.append(f"{result.what} failed its gate and is in {folder}: {result.explain()}")
        failed |= dict.fromkeys(result.failed)
    raise GateError("; ".join(messages) + f"; {_REMEDY}", tuple(failed))


def _accept(places: _Places, fresh: Sequence[_Delivery], results: Mapping[date, GateResult]) -> None:
    """Write events, catalogue changes, snapshots and logged features of days that passed, then their manifests."""
    assert all(conforms(d.table, places.tables.events) for d in fresh), "a table that does not conform fails its gate"
    places.lock.check()
    first, last = min(d.day for d in fresh), max(d.day for d in fresh)
    passed = places.store.days("passed")
    newest = max([last, *passed])
    # The first catalogue is known when the first day starts; a later change when its delivery's day ends, as it is online.
    catalogue_day = newest if passed else first - timedelta(days=1)
    changed_from = min(first, catalogue_day)
    state.forget(places.storage, changed_from)
    for kind in catalogue.kinds(places.tables).values():
        places.lock.check()
        catalogue.record(places.storage, kind, places.catalogue[kind.name], catalogue_day)
    _place(places, fresh)
    # A corrected or late day changes what was known at the end of every later one. Features logged with other days stay:
    # they are what those rows were served with.
    places.lock.check()
    recorded = max([newest, *places.store.days("no_data")])
    _log_features(places, fresh, _write_snapshots(places, changed_from, recorded))
    for delivery in fresh:
        result = results[delivery.day]
        rows = delivery.table.num_rows
        places.lock.check()
        places.store.commit(
            DayManifest(delivery.day, "passed", delivery.revision, rows, delivery.sha256, warnings=result.warnings)
        )
        _log.info("day_ingested", day=delivery.day.isoformat(), rows=rows, revision=delivery.revision)


def _place(places: _Places, fresh: Sequence[_Delivery]) -> None:
    def write(delivery: _Delivery) -> None:
        places.lock.check()
        places.store.place(delivery.day, delivery.table, delivery.revision)

    each_in_threads(write, fresh)


def _let_windows_pass(places: _Places, known: Mapping[date, DayManifest], days: Sequence[date]) -> None:
    """Snapshots of days without data, on which events leave windows; before the first day that passed there are none."""
    first = min((day for day, manifest in known.items() if manifest.status == "passed"), default=None)
    for day in days:
        if snapshots.has_windows(places.tables) and first is not None and day > first:
            places.lock.check()
            state.forget(places.storage, day)
            _write_snapshots(places, day, day)


def _write_snapshots(places: _Places, first: date, last: date) -> dict[str, pa.Table]:
    """Write what changed in a span of days, once it has passed its gate; the states of those days are forgotten already.

    Returns what events of those days may be joined with: of each subject the rows before them and those of the days.
    """
    every = snapshots.subjects(places.tables)
    span = snapshots.advance(places.storage, places.tables, first, last)
    known = {name: span.rows(subject) for name, subject in every.items()}
    changed = span.changed(known)
    for name, subject in every.items():
        result = gates.check_snapshots(changed[name], subject.snapshots, f"{name} snapshots of {first} to {last}")
        gates.require(result, "this is a defect of the snapshots, not of the data; the days stay unrecorded")
    snapshots.write(places.storage, places.tables, span, changed)
    for name, number in span.num_dropped.items():
        if number:
            _log.info("affinity_keys_dropped", affinity=name, keys=number, first=first.isoformat(), through=last.isoformat())
    return known


def _log_features(places: _Places, fresh: Sequence[_Delivery], known: Mapping[str, pa.Table]) -> None:
    """Join features to the fresh days' events, in as few joins as memory allows, and write them day by day."""
    group, most = list[_Delivery](), _JOIN_VALUES // max(1, len(places.tables.joined))
    for delivery in (*fresh, None):
        if group and (delivery is None or sum(d.table.num_rows for d in group) + delivery.table.num_rows > most):
            _log_group(places, group, known)
            group = []
        if delivery is not None:
            group.append(delivery)


def _log_group(places: _Places, group: Sequence[_Delivery], known: Mapping[str, pa.Table]) -> None:
    def write(part: tuple[_Delivery, int]) -> None:
        member, end = part
        rows = joined.slice(end - member.table.num_rows, member.table.num_rows)
        rows = keep_logged_features(places.storage, places.tables, member.day, rows, member.revision)
        _require_its_events(member, rows)
        places.lock.check()
        write_logged(places.storage, member.day, rows, member.revision)

    joined = join(pa.concat_tables([d.table for d in group]), places.tables, known)
    each_in_threads(write, zip(group, accumulate(d.table.num_rows for d in group), strict=True))


def _require_its_events(delivery: _Delivery, logged: pa.Table) -> None:
    """Raises DataError unless a day's logged rows are its events, all of them and nothing else."""
    if not logged.select(delivery.table.column_names).equals(delivery.table):
        raise DataError(
            f"logged rows of {delivery.day} must be its {delivery.table.num_rows} events, got {logged.num_rows} rows"
            f"{'' if logged.num_rows != delivery.table.num_rows else ' that differ from them'}; "
            "this is a defect of the join, not of the data; the day stays unrecorded"
        )


def _write_history_report(storage: Storage, through: date, results: Mapping[date, GateResult]) -> str:
    """One page with the days that have warnings; returns its path."""
    warned = [result for result in results.values() if result.warnings]
    title = f"Historical load through {through.isoformat()}"
    note = f"{len(results)} days passed; {len(warned)} of them have unusual volume, which is a warning in a historical load."
    name = f"reports/ingest-{through.isoformat()}"
    storage.write_bytes(f"{name}.html", report_html(title, note, warned, full=False).encode())
    storage.write_json(f"{name}.json", {"title": title, "note": note, "days": [result.result for result in warned]})
    return storage.path(f"{name}.html")
