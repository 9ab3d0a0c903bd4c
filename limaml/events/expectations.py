"""Expectations about a table in memory, run by Great Expectations, and what they found.

Two kinds: *critical* ones fail a gate, the others are warnings. GX 1.24 is imported inside the functions: it takes three
seconds, and a validation 0.1 s whatever its size, so much is best validated in one process and at once.
"""

import functools
import os
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass, field, replace
from datetime import date
from typing import TYPE_CHECKING, Any

import pyarrow as pa

if TYPE_CHECKING:
    import pandas as pd

BETWEEN = "expect_column_values_to_be_between"
IN_SET = "expect_column_values_to_be_in_set"
NULL = "expect_column_values_to_be_null"
NOT_NULL = "expect_column_values_to_not_be_null"
COLUMNS = "expect_table_columns_to_match_set"
UNIQUE_TOGETHER = "expect_compound_columns_to_be_unique"
_EXAMPLES = 5
_SHOWN = 80
"""Characters of a value in a message."""


@dataclass(frozen=True, eq=False)
class Expectation:
    """One expectation before Great Expectations is imported: its class, what it is about, its bounds, and those in words."""

    type: str
    column: str = ""
    arguments: dict[str, Any] = field(default_factory=dict)
    critical: bool = True
    rule: str = ""
    """What to say instead of the arguments."""

    @property
    def name(self) -> str:
        return f"{self.type}({self.column})" if self.column else self.type

    @property
    def words(self) -> str:
        """The rule as a message says it."""
        bounds = ", ".join(f"{name} {_text(value)}" for name, value in self.arguments.items())
        return self.rule or bounds or "no exception"


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


def _to_pandas(table: pa.Table) -> "pd.DataFrame":
    """Integers keep their width beside nulls, text stays Arrow's, lists of it become Python's; the rest is pandas' choice."""
    import pandas as pd

    kinds = {pa.int8(): pd.Int8Dtype(), pa.int64(): pd.Int64Dtype(), pa.string(): pd.ArrowDtype(pa.string())}
    frame = table.to_pandas(types_mapper=kinds.get)
    for name in table.column_names:
        if table.schema.field(name).type == pa.list_(pa.string()):
            frame[name] = table[name].to_pylist()
    return frame


def validate(
    table: pa.Table, suite: Sequence[Expectation], derived: Mapping[str, pa.Array] | None = None
) -> tuple[Finding, ...]:
    """Run a suite on a table in memory; `derived` columns can be judged too, but are not part of what was delivered."""
    derived = derived or {}
    outcomes = _run(table, suite, derived, "SUMMARY")
    return tuple(_finding(e, outcomes[e.type, e.column], set(derived)) for e in suite)


def merge(pieces: Sequence[Sequence[Finding]]) -> tuple[Finding, ...]:
    """Findings about a table that was judged in pieces: what one piece fails, the table fails."""
    merged: dict[str, Finding] = {}
    for finding in (finding for piece in pieces for finding in piece):
        before = merged.setdefault(finding.expectation, finding)
        if before is not finding:
            examples = tuple(dict.fromkeys((*before.examples, *finding.examples)))[:_EXAMPLES]
            success, unexpected = before.success and finding.success, before.unexpected + finding.unexpected
            merged[finding.expectation] = replace(before, success=success, unexpected=unexpected, examples=examples)
    return tuple(merged.values())


def validate_rows(table: pa.Table, suite: Sequence[Expectation]) -> list[tuple[Finding, ...]]:
    """Run a suite of expectations about column values once, and say for every row what came of each."""
    outcomes = _run(table, suite, {}, "COMPLETE")
    unexpected = {e: set(outcomes[e.type, e.column].result["unexpected_index_list"] or ()) for e in suite}
    return [
        tuple(
            Finding(e.name, e.critical, False, e.words, 0, (f"{table[e.column][row].as_py():g}",))
            if row in unexpected[e]
            else Finding(e.name, e.critical, True, e.words)
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
    table = _without_values(table, suite)
    for name, values in derived.items():
        table = table.append_column(name, values)
    batch = _batch_definition().get_batch(batch_parameters={"dataframe": _to_pandas(table)})
    outcome = batch.validate(gx.ExpectationSuite(name="gate", expectations=expectations), result_format=result_format)
    return {(r.expectation_config.type, r.expectation_config.kwargs.get("column", "")): r for r in outcome.results}


def _without_values(table: pa.Table, suite: Sequence[Expectation]) -> pa.Table:
    """Columns that no expectation is about are nulls: only their names matter, and pandas does not take every type."""
    about = {name for e in suite for name in (e.column, *e.arguments.get("column_list", ()))}
    columns = [table[n] if name in about else pa.nulls(table.num_rows) for n, name in enumerate(table.column_names)]
    return pa.Table.from_arrays(columns, names=table.column_names)


@functools.cache
def _batch_definition() -> Any:
    """Whole-dataframe batches in a Great Expectations context that leaves no files, calls nobody and draws no progress bars."""
    os.environ.setdefault("GX_ANALYTICS_ENABLED", "False")
    import great_expectations as gx
    from great_expectations.data_context.types.base import DataContextConfig, InMemoryStoreBackendDefaults, ProgressBarsConfig
    from great_expectations.execution_engine import pandas_execution_engine

    # No fingerprint of frames below a gigabyte: nobody reads it, and of a million events it was 0.9 of 2.4 s.
    pandas_execution_engine.HASH_THRESHOLD = 0
    defaults = InMemoryStoreBackendDefaults(init_temp_docs_sites=False)
    settings = DataContextConfig(store_backend_defaults=defaults, progress_bars=ProgressBarsConfig(globally=False))
    context = gx.get_context(mode="ephemeral", project_config=settings)
    asset = context.data_sources.add_pandas("memory").add_dataframe_asset("table")
    return asset.add_batch_definition_whole_dataframe("whole")


def _finding(expectation: Expectation, outcome: Any, derived: AbstractSet[str]) -> Finding:
    import pandas as pd

    result = outcome.result or {}
    examples: tuple[str, ...] = ()
    if not outcome.success:
        values = result.get("partial_unexpected_list") or result.get("observed_value", "")
        if isinstance(values, list):
            values = [value for value in values if str(value) not in derived]
        listed = values if isinstance(values, list) else [values]
        texts = ("None" if value is pd.NA else shown(value) for value in listed)
        examples = tuple(list(dict.fromkeys(texts))[:_EXAMPLES]) if values != "" else (_exception(outcome),)
    count = int(result.get("unexpected_count", 0))
    return Finding(expectation.name, expectation.critical, bool(outcome.success), expectation.words, count, examples)


def shown(value: Any) -> str:
    """A value as text, in quotes where one could not see all of it; a long one is cut."""
    if isinstance(value, str) and len(value) > _SHOWN:
        return f"{value[:_SHOWN]!r}… ({len(value)} characters)"
    hidden = isinstance(value, str) and (value != value.strip() or not value.isprintable() or not value)
    return repr(value) if hidden else str(value)


def _exception(outcome: Any) -> str:
    """What Great Expectations could not evaluate, in its own words."""
    info = outcome.exception_info or {}
    messages = [info.get("exception_message")] + [i.get("exception_message") for i in info.values() if isinstance(i, dict)]
    return next((str(message) for message in messages if message), "no value")


def _text(value: Any) -> str:
    return value.isoformat() if isinstance(value, date) else str(value)
