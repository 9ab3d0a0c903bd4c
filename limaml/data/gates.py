"""Quality gates: Great Expectations suites built from `schema.py`, and what they found.

Two kinds of expectation: *critical* ones fail a gate; *warning* ones are reported. Whether a day's volume (rows against recent
days, label rate) is critical is the caller's choice; its columns, types, nulls, keys, labels and timestamps always are.
GX 1.24 is imported inside `_validate`: it takes three seconds, so that many days are best validated in one process.
"""

import functools
import os
import statistics
from collections.abc import Callable, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field
from datetime import date
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.config import SourceConfig
from limaml.errors import GateError

if TYPE_CHECKING:
    import pandas as pd

_EXAMPLES = 5
_BETWEEN = "expect_column_values_to_be_between"
_IN_SET = "expect_column_values_to_be_in_set"
# How an Arrow column must arrive in pandas, in the words of expect_column_values_to_be_of_type.
_TYPES = {
    pa.string(): "str",
    schema.TIMESTAMP: "Timestamp",
    pa.int8(): "int8",
    pa.int64(): "int64",
    pa.float32(): "float32",
    pa.list_(pa.string()): "list",
}


@dataclass(frozen=True, eq=False)
class Expectation:
    """One expectation before Great Expectations is imported: its class, what it is about, and its bounds."""

    type: str
    column: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    critical: bool = True

    @property
    def name(self) -> str:
        return f"{self.type}({self.column})" if self.column else self.type


@dataclass(frozen=True)
class Finding:
    """What came of one expectation: examples are offending values, or what was observed instead."""

    expectation: str
    critical: bool
    success: bool
    rule: str
    unexpected: int = 0
    examples: tuple[str, ...] = ()


@dataclass(frozen=True)
class GateResult:
    """Outcome of one gate. `failed` and `warnings` name expectations, in the order in which they were asked."""

    what: str
    rows: int
    findings: tuple[Finding, ...]

    @property
    def failed(self) -> tuple[str, ...]:
        return tuple(f.expectation for f in self.findings if not f.success and f.critical)

    @property
    def warnings(self) -> tuple[str, ...]:
        return tuple(f.expectation for f in self.findings if not f.success and not f.critical)

    @property
    def success(self) -> bool:
        return not self.failed

    @property
    def result(self) -> dict[str, Any]:
        """The whole as JSON values."""
        findings = [vars(f) | {"examples": list(f.examples)} for f in self.findings]
        return {"what": self.what, "success": self.success, "rows": self.rows, "findings": findings}

    def explain(self) -> str:
        """Every failed critical expectation with its rule and offending values, on one line."""
        return "; ".join(_sentence(f) for f in self.findings if not f.success and f.critical)


def _sentence(finding: Finding) -> str:
    count = f"{finding.unexpected} rows, " if finding.unexpected else ""
    examples = f" [{count}e.g. {', '.join(finding.examples)}]" if finding.examples else ""
    return f"{finding.expectation}: {finding.rule}{examples}"


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
) -> dict[date, GateResult]:
    """Gate days of events; `recent_rows` holds the row counts of the days before each, none meaning no judgement.

    Well-formed days are validated together, since a validation takes 0.1 s whatever its size.
    """
    rows = _check_rows(deliveries, known_users, known_items)
    volume = _check_volume(deliveries, recent_rows, source, strict_volume)
    return {
        day: GateResult(f"events of {day.isoformat()}", table.num_rows, rows[day] + volume[day])
        for day, table in deliveries.items()
    }


def _check_rows(deliveries: Mapping[date, pa.Table], users: pa.Array, items: pa.Array) -> dict[date, tuple[Finding, ...]]:
    def validate(days: Sequence[date]) -> tuple[Finding, ...]:
        return _check_span(days[0], days[-1], pa.concat_tables([deliveries[day] for day in days]), users, items)

    together = [day for day in sorted(deliveries) if _is_well_formed(day, deliveries[day])]
    alone = [day for day in deliveries if day not in set(together)]
    return _each(together, validate) | {day: validate([day]) for day in alone}


def _each(days: Sequence[date], validate: Callable[[Sequence[date]], tuple[Finding, ...]]) -> dict[date, tuple[Finding, ...]]:
    """Findings of every day: days that pass together share them, those that do not are found by halving."""
    if not days:
        return {}
    findings = validate(days)
    if len(days) == 1 or all(finding.success for finding in findings):
        return dict.fromkeys(days, findings)
    half = len(days) // 2
    return _each(days[:half], validate) | _each(days[half:], validate)


def _is_well_formed(day: date, table: pa.Table) -> bool:
    """Whether the day may be validated with others: the schema's types, and no row of another day."""
    if not table.schema.equals(schema.EVENTS.arrow) or table["timestamp"].null_count or not table.num_rows:
        return False
    bounds = pc.min_max(table["timestamp"])
    return bool(bounds["min"].as_py() >= schema.day_start(day) and bounds["max"].as_py() < schema.day_end(day))


def _check_span(first: date, last: date, table: pa.Table, users: pa.Array, items: pa.Array) -> tuple[Finding, ...]:
    suite, derived = table_expectations(schema.EVENTS, table), {}
    if _has_type(table, "timestamp", schema.TIMESTAMP):
        bounds = {"min_value": schema.day_start(first), "max_value": schema.day_end(last), "strict_max": True}
        suite.append(Expectation(_BETWEEN, "timestamp", bounds))
    for column, known in (("user_id", users), ("item_id", items)):
        if _has_type(table, column, pa.string()):
            derived[f"{column}_in_catalogue"] = pc.is_in(table[column].cast(pa.string()), value_set=known)
            suite.append(Expectation(_IN_SET, f"{column}_in_catalogue", {"value_set": [True]}))
    return _validate(table, suite, derived)


def _check_volume(
    deliveries: Mapping[date, pa.Table],
    recent_rows: Mapping[date, Sequence[int]],
    source: SourceConfig,
    strict: AbstractSet[date],
) -> dict[date, tuple[Finding, ...]]:
    """One line a day: rows, rows against the median of recent days, label rate; not judged where there is too little."""
    findings: dict[date, tuple[Finding, ...]] = {}
    for critical in (True, False):
        days = [day for day in deliveries if (day in strict) is critical]
        lines = [_volume(deliveries[day], recent_rows.get(day, ()), source) for day in days]
        if lines:
            table = pa.table({name: pa.array([line[name] for line in lines], pa.float64()) for name in lines[0]})
            findings |= dict(zip(days, _validate_rows(table, _volume_suite(source, critical)), strict=True))
    return findings


def _volume(table: pa.Table, recent: Sequence[int], source: SourceConfig) -> dict[str, float | None]:
    median = statistics.median(recent) if recent else 0
    judged = _has_type(table, "label", pa.int8()) and table.num_rows >= source.min_rows_for_label_rate
    return {
        "rows": float(table.num_rows),
        "rows_to_recent_median": table.num_rows / median if median else None,
        "label_rate": pc.mean(table["label"]).as_py() if judged else None,
    }


def _volume_suite(source: SourceConfig, critical: bool) -> list[Expectation]:
    ratios = {"min_value": source.min_rows_ratio, "max_value": source.max_rows_ratio}
    rates = {"min_value": source.min_label_rate, "max_value": source.max_label_rate}
    return [
        Expectation(_BETWEEN, "rows", {"min_value": 1}),
        Expectation(_BETWEEN, "rows_to_recent_median", ratios, critical),
        Expectation(_BETWEEN, "label_rate", rates, critical),
    ]


def check_features(table: pa.Table, expected: schema.Table, what: str) -> GateResult:
    """Gate a table of entity features (or of the catalogue): columns, types, nulls, ranges, one row a key and instant."""
    suite = table_expectations(expected, table)
    keys = [name for name in (expected.key, "event_timestamp") if name in expected.names]
    if len(keys) > 1 and set(keys) <= set(table.column_names):
        suite.append(Expectation("expect_compound_columns_to_be_unique", "", {"column_list": keys}))
    return GateResult(what, table.num_rows, _validate(table, suite))


def check_embeddings(
    table: pa.Table,
    *,
    entity_column: str,
    kind: str,
    dim: int,
    planned: AbstractSet[str],
    version: str,
    min_norm: float,
    max_norm: float,
) -> GateResult:
    """Gate a partition of embeddings: finite, `dim` wide, norms in range, exactly the planned entities, one model version."""
    suite = table_expectations(schema.embeddings(entity_column, dim), table)
    suite += [
        Expectation(_IN_SET, "kind", {"value_set": [kind]}),
        Expectation(_IN_SET, "model_version", {"value_set": [version]}),
        Expectation("expect_table_row_count_to_equal", "", {"value": len(planned)}),
    ]
    derived = {}
    if entity_column in table.column_names:
        derived["entity_planned"] = pc.is_in(table[entity_column], value_set=pa.array(sorted(planned), pa.string()))
        suite.append(Expectation(_IN_SET, "entity_planned", {"value_set": [True]}))
    if "embedding" in table.column_names:
        derived |= _measure_vectors(table["embedding"])
        suite += [
            Expectation(_IN_SET, "embedding_width", {"value_set": [dim]}),
            Expectation(_IN_SET, "embedding_nonfinite", {"value_set": [0]}),
            Expectation(_BETWEEN, "embedding_norm", {"min_value": min_norm, "max_value": max_norm}),
        ]
    there = {*table.column_names, *derived, ""}
    findings = _validate(table, [e for e in suite if e.column in there], derived)
    return GateResult(f"embeddings of kind {kind}, version {version}", table.num_rows, findings)


def _measure_vectors(column: pa.ChunkedArray) -> dict[str, pa.Array]:
    """Width, count of non-finite numbers and norm (of the finite ones) of every vector; a null vector has width 0."""
    vectors = [np.asarray(v if v is not None else [], dtype=np.float64) for v in column.to_pylist()]
    return {
        "embedding_width": pa.array([v.size for v in vectors], pa.int64()),
        "embedding_nonfinite": pa.array([int((~np.isfinite(v)).sum()) for v in vectors], pa.int64()),
        "embedding_norm": pa.array([float(np.linalg.norm(v[np.isfinite(v)])) for v in vectors], pa.float64()),
    }


def table_expectations(expected: schema.Table, table: pa.Table) -> list[Expectation]:
    """What the schema says about every column; a column's values are only judged where it is there with its type."""
    names = {"column_set": list(expected.names), "exact_match": True}
    suite = [Expectation("expect_table_columns_to_match_set", "", names)]
    for column in expected.columns:
        if column.name not in table.column_names or column.type not in _TYPES:
            continue
        suite.append(Expectation("expect_column_values_to_be_of_type", column.name, {"type_": _TYPES[column.type]}))
        if not column.nullable:
            suite.append(Expectation("expect_column_values_to_not_be_null", column.name))
        if not _has_type(table, column.name, column.type):
            continue
        if column.unique:
            suite.append(Expectation("expect_column_values_to_be_unique", column.name))
        if column.allowed is not None:
            suite.append(Expectation(_IN_SET, column.name, {"value_set": list(column.allowed)}))
        if column.minimum is not None or column.maximum is not None:
            bounds = {"min_value": column.minimum, "max_value": column.maximum}
            suite.append(Expectation(_BETWEEN, column.name, bounds))
    return suite


def _has_type(table: pa.Table, column: str, wanted: pa.DataType) -> bool:
    """Whether a column is there and holds the wanted type; other units of time and wider strings are the same in pandas."""
    if column not in table.column_names:
        return False
    have = table.schema.field(column).type
    if pa.types.is_timestamp(wanted):
        return bool(pa.types.is_timestamp(have) and have.tz == wanted.tz)
    return bool(have.equals(wanted) or (pa.types.is_string(wanted) and pa.types.is_large_string(have)))


def _to_pandas(table: pa.Table) -> "pd.DataFrame":
    """Integers keep their width beside nulls, lists of strings become Python lists, everything else is pandas' own choice."""
    import pandas as pd

    integers = {pa.int8(): pd.Int8Dtype(), pa.int64(): pd.Int64Dtype()}
    frame = table.to_pandas(types_mapper=integers.get)
    for name in table.column_names:
        if table.schema.field(name).type == pa.list_(pa.string()):
            frame[name] = table[name].to_pylist()
    return frame


def _validate(
    table: pa.Table, suite: Sequence[Expectation], derived: Mapping[str, pa.Array] | None = None
) -> tuple[Finding, ...]:
    """Run a suite on a table in memory; `derived` columns can be judged too, but are not part of what was delivered."""
    derived = derived or {}
    outcomes = _run(table, suite, derived, "SUMMARY")
    return tuple(_finding(e, outcomes[e.type, e.column], set(derived)) for e in suite)


def _validate_rows(table: pa.Table, suite: Sequence[Expectation]) -> list[tuple[Finding, ...]]:
    """Run a suite of expectations about column values once, and say for every row what came of each."""
    outcomes = _run(table, suite, {}, "COMPLETE")
    unexpected = {e: set(outcomes[e.type, e.column].result["unexpected_index_list"] or ()) for e in suite}
    return [
        tuple(
            Finding(e.name, e.critical, False, _rule(e), 0, (f"{table[e.column][row].as_py():g}",))
            if row in unexpected[e]
            else Finding(e.name, e.critical, True, _rule(e))
            for e in suite
        )
        for row in range(table.num_rows)
    ]


def _run(
    table: pa.Table, suite: Sequence[Expectation], derived: Mapping[str, pa.Array], result_format: str
) -> dict[tuple[str, str], Any]:
    """Great Expectations' outcome of each expectation, by (type, column)."""
    import great_expectations as gx
    import great_expectations.expectations as gxe

    expectations = []
    for expectation in suite:
        arguments = expectation.arguments | ({"column": expectation.column} if expectation.column else {})
        if "column_set" in arguments:
            arguments["column_set"] = [*arguments["column_set"], *derived]
        expectations.append(getattr(gxe, "".join(map(str.capitalize, expectation.type.split("_"))))(**arguments))
    for name, values in derived.items():
        table = table.append_column(name, values)
    batch = _batch_definition().get_batch(batch_parameters={"dataframe": _to_pandas(table)})
    outcome = batch.validate(gx.ExpectationSuite(name="gate", expectations=expectations), result_format=result_format)
    return {(r.expectation_config.type, r.expectation_config.kwargs.get("column", "")): r for r in outcome.results}


@functools.cache
def _batch_definition() -> Any:
    """Whole-dataframe batches in a Great Expectations context that leaves no files, calls nobody and draws no progress bars."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "False")
    import great_expectations as gx

    context = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = {"globally": False}
    asset = context.data_sources.add_pandas("memory").add_dataframe_asset("table")
    return asset.add_batch_definition_whole_dataframe("whole")


def _finding(expectation: Expectation, outcome: Any, derived: AbstractSet[str]) -> Finding:
    result = outcome.result or {}
    examples: tuple[str, ...] = ()
    if not outcome.success:
        values = result.get("partial_unexpected_list") or result.get("observed_value", "")
        if isinstance(values, list):
            values = [value for value in values if value not in derived]
        texts = map(str, values if isinstance(values, list) else [values])
        examples = tuple(list(dict.fromkeys(texts))[:_EXAMPLES]) if values != "" else (_exception(outcome),)
    count = int(result.get("unexpected_count", 0))
    return Finding(expectation.name, expectation.critical, bool(outcome.success), _rule(expectation), count, examples)


def _rule(expectation: Expectation) -> str:
    return ", ".join(f"{name} {_text(value)}" for name, value in expectation.arguments.items()) or "no exception"


def _exception(outcome: Any) -> str:
    """What Great Expectations could not evaluate, in its own words."""
    info = outcome.exception_info or {}
    messages = [info.get("exception_message")] + [i.get("exception_message") for i in info.values() if isinstance(i, dict)]
    return next((str(message) for message in messages if message), "no value")


def _text(value: Any) -> str:
    return value.isoformat() if isinstance(value, date) else str(value)
