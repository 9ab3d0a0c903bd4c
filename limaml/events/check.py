"""All gates over all days of a source, with nothing stored: what is wrong, where, and which bounds its days suggest."""

import math
import statistics
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, timedelta
from tempfile import TemporaryDirectory

import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.config import Config, SourceConfig, not_permitted
from limaml.errors import DataError, UnreadableDayError
from limaml.events import catalogue, gates
from limaml.events.casting import declared_events
from limaml.events.day_store import canonical, conforms
from limaml.events.embedded import with_embedded
from limaml.events.expectations import Finding, GateResult
from limaml.events.sources import Source, open_source
from limaml.progress import tracked

_BATCH_ROWS = 500_000
"""Rows whose gates run together: bounds memory."""
_SHOWN = 12
_REMEDY = "Correct these at the source, or what [source] maps them to, and check again. Nothing was stored."
_SPARE = 0.5
"""Suggested bounds lie so far beyond what was seen."""


@dataclass
class Report:
    """What `limaml check` found."""

    first: date | None = None
    last: date | None = None
    days: int = 0
    empty: int = 0
    rows: int = 0
    users: int = 0
    items: int = 0
    wrong: list[str] = field(default_factory=list)
    odd: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)
    ignored: list[str] = field(default_factory=list)
    not_permitted: list[str] = field(default_factory=list)
    bounds: dict[str, tuple[float, str]] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """One screen."""
        span = f"{self.first} to {self.last}" if self.first else "no day"
        rows = f"{self.days} days ({span}, {self.empty} without rows), {self.rows} events"
        head = f"{rows}, {self.users} users, {self.items} items"
        parts = [
            [head],
            _listed("Wrong, and refused at ingestion", self.wrong),
            _listed("Odd, and let through with a warning", self.odd),
            _listed("Refused when a model is trained", self.not_permitted),
            _listed("Left out", self.left_out),
            _listed("Columns that no feature reads", self.ignored),
            ["Bounds that these days suggest for [source]:"] if self.bounds else [],
            [f"  {name} = {value:g}  # {why}" for name, (value, why) in self.bounds.items()],
            [_REMEDY if self.wrong else "Nothing is wrong."],
        ]
        return [line for part in parts for line in part]


def _listed(title: str, what: Sequence[str]) -> list[str]:
    more = [f"  and {len(what) - _SHOWN} more"] if len(what) > _SHOWN else []
    return [f"{title}:", *(f"  - {line}" for line in what[:_SHOWN]), *more] if what else []


def check(cfg: Config, today: date) -> Report:
    """Read every day of the source through its gates. Raises ConfigError or DataError where the source cannot be opened."""
    with TemporaryDirectory(prefix="limaml-check-") as folder:
        # A replayed source notes its shift there.
        source = open_source(cfg.model_copy(update={"storage": cfg.storage.model_copy(update={"root": folder})}), today)
        report = Report()
        days = source.days()
        report.first, report.last = days[0], days[-1]
        report.left_out = list(source.left_out)
        report.not_permitted = list(not_permitted(cfg))
        known = _catalogue(cfg, source, days[-1], report)
        found = _Found()
        results = _days(cfg, source, days, known, report, found)
        for result in results:
            found.add(result)
        report.wrong += found.lines(critical=True)
        report.odd += found.lines(critical=False)
        report.bounds = _bounds(found, cfg.source)
        return report


def _catalogue(cfg: Config, source: Source, last: date, report: Report) -> dict[str, pa.Table]:
    tables, known = schema.tables(cfg.features), {}
    users, items = source.catalogue(last)
    try:
        items = with_embedded(cfg, items)
    except DataError as error:
        report.wrong.append(str(error))
    for kind, delivered in zip(catalogue.kinds(tables).values(), (users, items), strict=True):
        known[kind.name], ignored = catalogue.declared(kind, tables, delivered)
        if ignored:
            report.ignored.append(f"{kind.catalogue.name}: {', '.join(ignored)}")
        result = gates.check_catalogue(known[kind.name], kind.delivered)
        if not result.success:
            report.wrong.append(f"{result.what}: {result.explain()}")
    report.users, report.items = known["user"].num_rows, known["item"].num_rows
    return known


def _days(
    cfg: Config, source: Source, days: Sequence[date], known: Mapping[str, pa.Table], report: Report, found: "_Found"
) -> Iterator[GateResult]:
    """The gates of all days, a batch at a time."""
    tables, unread, batch = schema.tables(cfg.features), dict[str, None](), dict[date, pa.Table]()
    ids = {name: _ids(table, f"{name}_id") for name, table in known.items()}
    for day in tracked(days, "checking", "days", len(days)):
        try:
            table = source.read_day(day)
        except UnreadableDayError as error:
            report.wrong.append(f"{day}: {error}")
            continue
        if table is None:
            report.empty += 1
            continue
        table, ignored = declared_events(tables, table)
        unread.update(dict.fromkeys(ignored))
        batch[day] = canonical(table, tables.events) if conforms(table, tables.events) else table
        found.count(day, batch[day], cfg.source.min_rows_for_label_rate)
        if sum(each.num_rows for each in batch.values()) >= _BATCH_ROWS:
            yield from _gate(cfg, source, batch, ids, found.rows)
            batch = {}
    if batch:
        yield from _gate(cfg, source, batch, ids, found.rows)
    if unread:
        report.ignored.append(f"events: {', '.join(unread)}")
    report.days, report.rows = len(days), sum(found.rows.values())


def _ids(table: pa.Table, key: str) -> pa.Array:
    there = key in table.column_names and table.schema.field(key).type == pa.string()
    return table[key].combine_chunks() if there else pa.array([], pa.string())


def _gate(
    cfg: Config,
    source: Source,
    batch: Mapping[date, pa.Table],
    ids: Mapping[str, pa.Array],
    rows: Mapping[date, int],
) -> Iterator[GateResult]:
    recent = {day: recent_rows(rows, day, cfg.source.rows_window_days) for day in batch}
    results = gates.check_days(
        batch,
        known_users=ids["user"],
        known_items=ids["item"],
        recent_rows=recent,
        source=cfg.source,
        strict_volume=frozenset(),
        unread={day: source.unread(day) for day in batch},
        events=schema.tables(cfg.features).events,
    )
    yield from results.values()


class _Found:
    """What the gates of all days say, each expectation once."""

    def __init__(self) -> None:
        self.rows: dict[date, int] = {}
        self.label_rates: dict[date, float] = {}
        self._failed: dict[tuple[bool, str], list[tuple[str, Finding]]] = {}

    def count(self, day: date, table: pa.Table, min_rows: int) -> None:
        self.rows[day] = table.num_rows
        labelled = "label" in table.column_names and table.schema.field("label").type == pa.int8()
        if table.num_rows >= min_rows and labelled and not table["label"].null_count:
            self.label_rates[day] = pc.mean(table["label"]).as_py()

    def add(self, result: GateResult) -> None:
        for finding in result.findings:
            if not finding.success:
                self._failed.setdefault((finding.critical, finding.expectation), []).append((result.what, finding))

    def lines(self, *, critical: bool) -> list[str]:
        found = []
        for (is_critical, name), days in self._failed.items():
            if is_critical is critical:
                what, finding = days[0]
                more = f" and {len(days) - 1} more days" if len(days) > 1 else ""
                count = f"{finding.unexpected} rows, " if finding.unexpected else ""
                found.append(f"{what}{more}: {name}: {finding.rule} [{count}e.g. {', '.join(finding.examples) or 'none'}]")
        return found


def _bounds(found: _Found, source: SourceConfig) -> dict[str, tuple[float, str]]:
    """What was seen, with half as much again beyond it."""
    bounds: dict[str, tuple[float, str]] = {}
    ratios = {
        day: rows / statistics.median(recent)
        for day, rows in found.rows.items()
        if (recent := recent_rows(found.rows, day, source.rows_window_days))
    }
    if ratios:
        low, high = min(ratios, key=lambda day: ratios[day]), max(ratios, key=lambda day: ratios[day])
        bounds["min_rows_ratio"] = (_down(ratios[low] * _SPARE), f"least: {ratios[low]:.3g} on {low}")
        bounds["max_rows_ratio"] = (_up(ratios[high] / _SPARE), f"most: {ratios[high]:.3g} on {high}")
    rates = found.label_rates
    if rates:
        low, high = min(rates, key=lambda day: rates[day]), max(rates, key=lambda day: rates[day])
        bounds["min_label_rate"] = (_down(rates[low] * _SPARE), f"least: {rates[low]:.3g} on {low}")
        bounds["max_label_rate"] = (_up(1 - (1 - rates[high]) * _SPARE), f"most: {rates[high]:.3g} on {high}")
    return bounds


def recent_rows(rows: Mapping[date, int], day: date, window_days: int) -> list[int]:
    """Rows of the days before one that are known."""
    return [rows[before] for n in range(1, window_days + 1) if (before := day - timedelta(days=n)) in rows]


def _down(value: float) -> float:
    """Two digits, and never above the value."""
    return _rounded(value, math.floor)


def _up(value: float) -> float:
    return _rounded(value, math.ceil)


def _rounded(value: float, direction: Callable[[float], int]) -> float:
    if value <= 0:
        return 0.0
    digits = 1 - math.floor(math.log10(value))
    return float(direction(round(value * 10**digits, 9)) / 10**digits)
