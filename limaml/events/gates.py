"""Quality gates: suites built from `schema.py` for days of events, entity features and partitions of embeddings.

Columns, types, nulls, keys, uniqueness, labels and timestamps are critical for every day; whether a day's volume is (rows
against recent days, label rate) is the caller's choice.
"""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import replace
from datetime import date

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.config import SourceConfig
from limaml.errors import GateError
from limaml.events import own_rules
from limaml.events.arrow_findings import has_type, is_vectors, list_findings, type_findings, vector_findings
from limaml.events.expectations import (
    BETWEEN,
    COLUMNS,
    IN_SET,
    NOT_NULL,
    NULL,
    UNIQUE_TOGETHER,
    Expectation,
    Finding,
    GateResult,
    merge,
    shown,
    validate,
    validate_rows,
)

_EXAMPLES = 5
_COMPARED = 1000
"""Unknown ids that are compared with the known ones for a hint."""
_Judge = Callable[[pa.Table, Sequence[Expectation]], tuple[Finding, ...]]


def require(result: GateResult, remedy: str) -> None:
    """Raise GateError with the names of the failed expectations, their rules and values, if the gate failed."""
    if not result.success:
        raise GateError(f"gate of {result.what} failed: {result.explain()}; {remedy}", result.failed)


def check_days(
    deliveries: Mapping[date, pa.Table],
    *,
    known_users: pa.Array,
    known_items: pa.Array,
    recent_rows: Mapping[date, Sequence[int]],
    source: SourceConfig,
    strict_volume: AbstractSet[date],
    unread: Mapping[date, Sequence[str]] | None = None,
    events: schema.Table = schema.EVENTS,
) -> dict[date, GateResult]:
    """Gate days of `events`; `recent_rows` holds the row counts of the days before each, none meaning no judgement.

    `unread` names what lies with a day's files and was not read: a warning. Well-formed days are validated together, since a
    validation takes 0.1 s whatever its size.
    """
    rows = _check_rows(deliveries, events, known_users, known_items)
    volume = _check_volume(deliveries, recent_rows, source, strict_volume)
    return {
        day: GateResult(
            f"events of {day.isoformat()}", table.num_rows, (*rows[day], *volume[day], _unread((unread or {}).get(day, ())))
        )
        for day, table in deliveries.items()
    }


def _unread(names: Sequence[str]) -> Finding:
    return Finding(
        "every_file_of_the_day_to_be_read", False, not names, "Parquet files only", len(names), tuple(names[:_EXAMPLES])
    )


def _check_rows(
    deliveries: Mapping[date, pa.Table], events: schema.Table, users: pa.Array, items: pa.Array
) -> dict[date, tuple[Finding, ...]]:
    def check(days: Sequence[date]) -> tuple[Finding, ...]:
        return _check_span(days[0], days[-1], pa.concat_tables([deliveries[day] for day in days]), events, users, items)

    together = [day for day in sorted(deliveries) if _is_well_formed(day, deliveries[day], events)]
    alone = [day for day in deliveries if day not in set(together)]
    return _each(together, check) | {day: check([day]) for day in alone}


def _each(days: Sequence[date], check: Callable[[Sequence[date]], tuple[Finding, ...]]) -> dict[date, tuple[Finding, ...]]:
    """Findings of every day: days that pass together share them, those that do not are found by halving."""
    if not days:
        return {}
    findings = check(days)
    if len(days) == 1 or all(finding.success for finding in findings):
        return dict.fromkeys(days, findings)
    half = len(days) // 2
    return _each(days[:half], check) | _each(days[half:], check)


def _is_well_formed(day: date, table: pa.Table, events: schema.Table) -> bool:
    """Whether the day may be validated with others: the schema's types, and no row of another day."""
    if not table.schema.equals(events.arrow) or table["timestamp"].null_count or not table.num_rows:
        return False
    # As numbers: an instant may lie beyond the years that Python knows.
    bounds = pc.min_max(table["timestamp"].cast(pa.int64()))
    first, end = (pa.scalar(instant, schema.TIMESTAMP).value for instant in (schema.day_start(day), schema.day_end(day)))
    return bool(bounds["min"].as_py() >= first and bounds["max"].as_py() < end)


def _check_span(
    first: date, last: date, table: pa.Table, events: schema.Table, users: pa.Array, items: pa.Array
) -> tuple[Finding, ...]:
    suite, derived = table_expectations(events, table), {}
    if has_type(table, "timestamp", schema.TIMESTAMP):
        bounds = {"min_value": schema.day_start(first), "max_value": schema.day_end(last), "strict_max": True}
        suite.append(Expectation(BETWEEN, "timestamp", bounds))
    for column, known in (("user_id", users), ("item_id", items)):
        if has_type(table, column, pa.string()):
            name = f"{column}_not_in_catalogue"
            derived[name] = _only_where(pc.invert(pc.is_in(table[column], value_set=known)), table[column])
            rule = f"{column} must be one of the {len(known)} in the catalogue{_alike(derived[name], known)}"
            suite.append(Expectation(NULL, name, rule=rule))
    lengths = tuple(_length_finding(table, column, "event_id") for column in ("user_id", "item_id"))
    return type_findings(events, table) + validate(table, suite, derived) + lengths


def _alike(unknown: pa.ChunkedArray | pa.Array, known: pa.Array) -> str:
    """A hint where an unknown id is a known one but for zeros before it, spaces around it or upper case."""
    missing = pc.drop_null(pc.unique(unknown)).slice(0, _COMPARED)
    if not len(missing):
        return ""
    at = pc.index_in(_bare(missing), value_set=_bare(known))
    pairs = ((one.as_py(), n.as_py()) for one, n in zip(missing, at, strict=True) if n.is_valid)
    one, n = next(pairs, (None, 0))
    return "" if one is None else f", where {one!r} is {known[n].as_py()!r}: write ids alike in both"


def _bare(ids: pa.Array) -> pa.Array:
    return pc.utf8_ltrim(pc.utf8_lower(pc.utf8_trim_whitespace(ids)), "0")


def _length_finding(table: pa.Table, column: str, row: str = "") -> Finding:
    """Whether every id has a length that a request may have; a message names the row by `row`, or by its number."""
    rule = f"{column} must have 1 to {schema.MAX_ID_LENGTH} characters, which a request may have; shorten it in every table"
    name = f"expect_column_value_lengths_to_be_between({column})"
    if not table.num_rows or not has_type(table, column, pa.string()):
        return Finding(name, True, True, rule)
    length = pc.utf8_length(table[column])
    wrong = pc.or_(pc.less(length, 1), pc.greater(length, schema.MAX_ID_LENGTH))
    rows = pc.indices_nonzero(pc.fill_null(wrong, False))
    labels = [table[row][at].as_py() if row in table.column_names else at + 1 for at in rows.slice(0, _EXAMPLES).to_pylist()]
    values = table[column].take(rows.slice(0, _EXAMPLES)).to_pylist()
    examples = tuple(f"{row or 'row'} {shown(at)}: {shown(value)}" for at, value in zip(labels, values, strict=True))
    return Finding(name, True, not len(rows), rule, len(rows), examples)


def _only_where(wrong: pa.ChunkedArray | pa.Array, values: pa.ChunkedArray | pa.Array) -> pa.ChunkedArray | pa.Array:
    """The values that are wrong, null elsewhere: judged by NULL, a message then names them."""
    return pc.if_else(pc.fill_null(wrong, False), values, pa.scalar(None, values.type))


def _check_volume(
    deliveries: Mapping[date, pa.Table],
    recent_rows: Mapping[date, Sequence[int]],
    source: SourceConfig,
    strict: AbstractSet[date],
) -> dict[date, tuple[Finding, ...]]:
    """One line a day: rows, also against the median of recent days, label rate, both labels; not judged where there are few."""
    findings: dict[date, tuple[Finding, ...]] = {}
    for critical in (True, False):
        days = [day for day in deliveries if (day in strict) is critical]
        lines = [_volume(deliveries[day], recent_rows.get(day, ()), source) for day in days]
        if lines:
            table = pa.table({name: pa.array([line[name] for line in lines], pa.float64()) for name in lines[0]})
            findings |= dict(zip(days, validate_rows(table, _volume_suite(source, critical)), strict=True))
    return findings


def _volume(table: pa.Table, recent: Sequence[int], source: SourceConfig) -> dict[str, float | None]:
    median = statistics.median(recent) if recent else 0
    judged = has_type(table, "label", pa.int8()) and table.num_rows >= source.min_rows_for_label_rate
    return {
        "rows": float(table.num_rows),
        "rows_to_recent_median": table.num_rows / median if median else None,
        "label_rate": pc.mean(table["label"]).as_py() if judged else None,
        "distinct_labels": float(pc.count_distinct(table["label"]).as_py()) if judged else None,
    }


def _volume_suite(source: SourceConfig, critical: bool) -> list[Expectation]:
    ratios = {"min_value": source.min_rows_ratio, "max_value": source.max_rows_ratio}
    rates = {"min_value": source.min_label_rate, "max_value": source.max_label_rate}
    return [
        Expectation(BETWEEN, "rows", {"min_value": 1}),
        Expectation(BETWEEN, "rows_to_recent_median", ratios, critical),
        Expectation(BETWEEN, "label_rate", rates, critical),
        # A day on which all or nothing happened is most often a mapping or an export gone wrong.
        Expectation(BETWEEN, "distinct_labels", {"min_value": 2}, critical=False),
    ]


def check_catalogue(table: pa.Table, expected: schema.Table) -> GateResult:
    """Gate a delivered catalogue: as `check_features`, and it must know somebody."""
    result = check_features(table, expected, f"catalogue of {expected.name}")
    good = table.num_rows > 0
    rows = Finding("expect_table_row_count_to_be_between", True, good, "min_value 1", 0, () if good else ("0",))
    lengths = () if expected.key is None else (_length_finding(table, expected.key),)
    return replace(result, findings=(*result.findings, rows, *lengths))


def check_features(table: pa.Table, expected: schema.Table, what: str) -> GateResult:
    """Gate a table of entity features (or of the catalogue): columns, types, nulls, ranges, one row a key and instant."""
    return _check_features(table, expected, what, validate)


def check_snapshots(table: pa.Table, expected: schema.Table, what: str) -> GateResult:
    """`check_features` of what we compute ourselves, by the same rules."""
    return _check_features(table, expected, what, own_rules.judge)


def _check_features(table: pa.Table, expected: schema.Table, what: str, judge: _Judge) -> GateResult:
    suite = table_expectations(expected, table)
    keys = [name for name in (expected.key, "event_timestamp") if name in expected.names]
    if expected.key and len(keys) > 1 and set(keys) <= set(table.column_names):
        suite.append(Expectation(UNIQUE_TOGETHER, "", {"column_list": keys}))
    vectors = [c for c in expected.columns if pa.types.is_fixed_size_list(c.type) and is_vectors(table, c.name)]
    typed = replace(expected, columns=tuple(column for column in expected.columns if column not in vectors))
    findings = (*type_findings(typed, table), *judge(table, suite), *list_findings(expected, table))
    findings += tuple(finding for column in vectors for finding in vector_findings(column, expected.key, table))
    return GateResult(what, table.num_rows, findings)


def check_embeddings(
    pieces: Iterable[pa.Table],
    *,
    entity_column: str,
    kind: str,
    dim: int,
    planned: pa.Array,
    version: str,
    min_norm: float,
    max_norm: float,
) -> GateResult:
    """Gate a partition of embeddings: finite, `dim` wide, norms in range, exactly the planned entities, one model version.

    It is read in pieces, at least one. Entities are ascending, so that no two pieces hold the same one.
    """
    same = [Expectation(IN_SET, "kind", {"value_set": [kind]}), Expectation(IN_SET, "model_version", {"value_set": [version]})]
    vectors = [
        Expectation(IN_SET, "embedding_width", {"value_set": [dim]}),
        Expectation(IN_SET, "embedding_nonfinite", {"value_set": [0]}),
        Expectation(BETWEEN, "embedding_norm", {"min_value": min_norm, "max_value": max_norm}),
    ]
    order = [
        Expectation(NULL, "entity_not_planned", rule=f"{entity_column} must be one of the {len(planned)} planned"),
        Expectation(NULL, "entity_not_ascending", rule=f"{entity_column} must be greater than the one before it"),
    ]
    found, num_rows, last = [], 0, None
    for table in pieces:
        derived = _measure_vectors(table["embedding"]) if "embedding" in table.column_names else {}
        if entity_column in table.column_names and table.num_rows:
            entities = table[entity_column].combine_chunks()
            derived |= {
                "entity_not_planned": _only_where(pc.invert(pc.is_in(entities, planned)), entities),
                "entity_not_ascending": _only_where(pc.invert(_ascending(entities, last)), entities),
            }
            last = entities[-1].as_py()
        expected = schema.embeddings(entity_column, dim)
        suite = [*table_expectations(expected, table), *same, *order, *vectors]
        there = {*table.column_names, *derived, ""}
        found.append(type_findings(expected, table) + validate(table, [e for e in suite if e.column in there], derived))
        num_rows += table.num_rows
    findings = (*merge(found), _row_count(num_rows, len(planned)))
    return GateResult(f"embeddings of kind {kind}, version {version}", num_rows, findings)


def _row_count(num_rows: int, wanted: int) -> Finding:
    """In Great Expectations' words: it cannot count what it sees in pieces."""
    good = num_rows == wanted
    return Finding("expect_table_row_count_to_equal", True, good, f"value {wanted}", 0, () if good else (str(num_rows),))


def _ascending(entities: pa.Array, last: str | None) -> pa.Array:
    """Whether each entity comes after the one before it, `last` for the first; null beside a null."""
    before = pa.concat_arrays([pa.array([last or ""], entities.type), entities.slice(0, len(entities) - 1)])
    return pc.greater(entities, before)


def _measure_vectors(column: pa.ChunkedArray) -> dict[str, pa.Array]:
    """Width, count of non-finite numbers and norm (of the finite ones) of every vector; a null vector has width 0."""
    vectors = column.combine_chunks()
    row = pc.list_parent_indices(vectors).to_numpy()
    values = pc.list_flatten(vectors).to_numpy(zero_copy_only=False).astype(np.float64)
    finite = np.isfinite(values)
    squares = np.bincount(row, np.where(finite, values, 0.0) ** 2, len(vectors))
    return {
        "embedding_width": pc.fill_null(pc.list_value_length(vectors), 0).cast(pa.int64()),
        "embedding_nonfinite": pa.array(np.bincount(row, ~finite, len(vectors)).astype(np.int64)),
        "embedding_norm": pa.array(np.sqrt(squares)),
    }


def table_expectations(expected: schema.Table, table: pa.Table) -> list[Expectation]:
    """What the schema says about every column; a column's values are judged where it is there with its type."""
    names = {"column_set": list(expected.names), "exact_match": True}
    suite = [Expectation(COLUMNS, "", names)]
    for column in expected.columns:
        if not has_type(table, column.name, column.type):
            continue
        if not column.nullable:
            suite.append(Expectation(NOT_NULL, column.name))
        if column.unique:
            suite.append(Expectation("expect_column_values_to_be_unique", column.name))
        if column.allowed is not None and not pa.types.is_list(column.type):
            suite.append(Expectation(IN_SET, column.name, {"value_set": list(column.allowed)}))
        if column.minimum is not None or column.maximum is not None:
            bounds = {"min_value": column.minimum, "max_value": column.maximum}
            suite.append(Expectation(BETWEEN, column.name, bounds))
    return suite
