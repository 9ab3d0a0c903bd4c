"""What a gate finds out from Arrow itself: types, lists and vectors, which Great Expectations would see as pandas does."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema
from limaml.events.casting import first_misfit, is_list, is_number
from limaml.events.expectations import Finding, shown

_EXAMPLES = 5


def type_findings(expected: schema.Table, table: pa.Table) -> tuple[Finding, ...]:
    """Whether each column is of the schema's type, in Great Expectations' words: it would see pandas' types, not Arrow's.

    So a column whose values `table_expectations` cannot judge always fails here.
    """
    findings = []
    for column in expected.columns:
        if column.name in table.column_names:
            good = has_type(table, column.name, column.type)
            name, rule = f"expect_column_values_to_be_of_type({column.name})", f"type_ {column.type}"
            findings.append(Finding(name, True, good, rule, 0, () if good else (_misfit(expected, table, column),)))
    return tuple(findings)


def _misfit(expected: schema.Table, table: pa.Table, column: schema.Column) -> str:
    """The type a column has instead, and its first value that is not of the right one, with the key of its row."""
    values = table[column.name]
    row = first_misfit(values, column.type)
    if row is None:
        return str(values.type)
    key = next((c.name for c in expected.columns if c.unique or c.name == expected.key), None)
    where = f"{key} {table[key][row]}" if key in table.column_names and key != column.name else f"row {row + 1}"
    return f"{values.type}: {where}: {shown(values[row].as_py())}"


def list_findings(expected: schema.Table, table: pa.Table) -> tuple[Finding, ...]:
    """Whether the lists hold no null, with the key of its row as an example, and only allowed values."""
    findings = []
    for column in expected.columns:
        if pa.types.is_list(column.type) and has_type(table, column.name, column.type):
            lists = table[column.name].combine_chunks()
            rows = pc.unique(pc.list_parent_indices(lists).filter(pc.is_null(pc.list_flatten(lists))))
            keys = table[expected.key].take(rows.slice(0, _EXAMPLES)) if expected.key in table.column_names else rows
            examples = tuple(f"{expected.key} {key}" for key in keys.to_pylist()[:_EXAMPLES])
            name = f"list_values_to_not_be_null({column.name})"
            findings.append(Finding(name, True, not len(rows), "no null inside a list", len(rows), examples))
            if column.allowed is not None:
                findings.append(_allowed_in_lists(column, pc.drop_null(pc.list_flatten(lists))))
    return tuple(findings)


def is_vectors(table: pa.Table, column: str) -> bool:
    kind = table.schema.field(column).type if column in table.column_names else pa.null()
    return is_list(kind) and is_number(kind.value_type)


def vector_findings(column: schema.Column, key: str | None, table: pa.Table) -> list[Finding]:
    """Whether the vectors have their width and hold finite numbers; examples are the key of a row and what it has instead."""
    keys = table[key] if key in table.column_names else pa.chunked_array([pa.array(range(table.num_rows))])
    delivered = table[column.name].combine_chunks()
    keys, vectors, width = keys.filter(pc.is_valid(delivered)), delivered.drop_null(), column.type.list_size
    widths = pc.list_value_length(vectors).to_numpy()
    other = np.flatnonzero(widths != width)
    examples = tuple(f"{key} {keys[row]}: {widths[row]} numbers" for row in other[:_EXAMPLES].tolist())
    of_width = Finding(f"vector_width_to_be({column.name})", True, not len(other), f"width {width}", len(other), examples)
    values = pc.list_flatten(vectors)
    numbers = values.cast(column.type.value_type, safe=False).to_numpy(zero_copy_only=False)
    # The first of each row.
    at, starts = np.flatnonzero(~np.isfinite(numbers)), np.cumsum(widths) - widths
    rows, first = np.unique(np.searchsorted(starts, at, side="right") - 1, return_index=True)
    at = at[first]
    places = at - starts[rows]
    examples = tuple(
        f"{key} {keys[row]}: {values[number]} at place {place}"
        for row, number, place in zip(rows[:_EXAMPLES].tolist(), at.tolist(), places.tolist(), strict=False)
    )
    name, rule = f"vector_values_to_be_finite({column.name})", f"finite numbers ({column.type.value_type})"
    return [of_width, Finding(name, True, not len(rows), rule, len(rows), examples)]


def _allowed_in_lists(column: schema.Column, values: pa.Array) -> Finding:
    wrong = values.filter(pc.invert(pc.is_in(values, pa.array(column.allowed, values.type))))
    examples = tuple(map(shown, pc.unique(wrong).slice(0, _EXAMPLES).to_pylist()))
    name, rule = f"list_values_to_be_in_set({column.name})", f"value_set {list(column.allowed or ())}"
    return Finding(name, True, not len(wrong), rule, len(wrong), examples)


def has_type(table: pa.Table, column: str, wanted: pa.DataType) -> bool:
    return column in table.column_names and bool(table.schema.field(column).type == wanted)
