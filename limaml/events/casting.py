"""Columns as other tools write them, in the schema's types: what loses nothing is cast, the rest stays as it came."""

from bisect import bisect_left

import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema


def declared_events(tables: schema.Tables, delivered: pa.Table) -> tuple[pa.Table, list[str]]:
    """Delivered events in the declared columns and, where that loses nothing, types; and columns that no feature reads."""
    source = {feature.name: feature.source_column for feature in tables.features if feature.is_delivered}
    wanted = {name: source.get(name, name) for name in tables.events.names}
    there = {name: column for name, column in wanted.items() if column in delivered.column_names}
    ignored = sorted(set(delivered.column_names) - set(there.values()))
    table = pa.Table.from_arrays([delivered[column] for column in there.values()], names=list(there))
    return with_types(table, tables.events), ignored


def with_types(table: pa.Table, expected: schema.Table) -> pa.Table:
    """The table with the schema's type for every column that holds the same values in another form; other columns stay.

    An instant may have any zone and unit (what is finer than a microsecond is cut off); text may be a dictionary, and an id or
    a category a whole number; a label may be any number that is whole, or a boolean; a NaN is a null. A vector may be a list of
    any numbers, or the text of one ("[0.5, 1, -2]", as a CSV file holds it), if all have its width.
    """
    wanted = {column.name: column.type for column in expected.columns}
    columns = [_with_type(table[at], wanted.get(name)) for at, name in enumerate(table.column_names)]
    return pa.Table.from_arrays(columns, names=table.column_names)


def first_misfit(column: pa.ChunkedArray, wanted: pa.DataType) -> int | None:
    """The first row whose value `with_types` cannot give the type; None if there is none, or no value at all."""
    if not _misfits(column, wanted):
        return None
    # A beginning that fits is followed by no shorter one that does not.
    first = bisect_left(range(1, len(column) + 1), True, key=lambda rows: _misfits(column.slice(0, rows), wanted))
    return first if first < len(column) else None


def _misfits(column: pa.ChunkedArray, wanted: pa.DataType) -> bool:
    return bool(column.null_count < len(column) and _with_type(column, wanted).type != wanted)


def _with_type(column: pa.ChunkedArray, wanted: pa.DataType | None) -> pa.ChunkedArray:
    if wanted is None or column.type == wanted:
        return column
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_nan(column), pa.scalar(None, column.type), column)
    if pa.types.is_fixed_size_list(wanted) and _is_text(column.type):
        column = _lists(column)
    if not _may_become(column.type, wanted):
        return column
    try:
        # Nanoseconds have no other form in microseconds.
        cut = pa.types.is_timestamp(column.type) and column.type.unit == "ns"
        return column.cast(wanted, safe=not cut)
    except (pa.ArrowInvalid, pa.ArrowNotImplementedError, pa.ArrowTypeError):  # Its gate says so.
        return column


def _lists(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Texts of lists of numbers as such lists; the column as it came if one is none."""
    texts = pc.utf8_trim_whitespace(column.cast(pa.string()))
    if not pc.all(pc.match_substring_regex(texts, r"^\[[^\[\]]+\]$")).as_py():
        return column
    try:
        parts = pc.split_pattern(pc.utf8_slice_codeunits(texts, 1, -1), ",").combine_chunks()
        numbers = pc.utf8_trim_whitespace(parts.values).cast(pa.float64())
    except pa.ArrowInvalid:
        return column
    return pa.chunked_array([pa.ListArray.from_arrays(parts.offsets, numbers, mask=parts.is_null())])


def _may_become(have: pa.DataType, wanted: pa.DataType) -> bool:
    """Whether a cast keeps what values mean, where it succeeds."""
    if pa.types.is_null(have):
        return True
    if pa.types.is_timestamp(wanted):
        return bool(pa.types.is_timestamp(have) and have.tz is not None)
    if pa.types.is_string(wanted):
        return bool(_is_text(have) or pa.types.is_integer(have) or pa.types.is_boolean(have))
    if pa.types.is_fixed_size_list(wanted):
        return is_list(have) and is_number(have.value_type)
    if pa.types.is_list(wanted):
        return is_list(have) and _may_become_item(have.value_type, wanted.value_type)
    return is_number(have) or bool(pa.types.is_boolean(have) and pa.types.is_integer(wanted))


def is_list(kind: pa.DataType) -> bool:
    return bool(pa.types.is_list(kind) or pa.types.is_large_list(kind) or pa.types.is_fixed_size_list(kind))


def is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_integer(kind) or pa.types.is_floating(kind) or pa.types.is_decimal(kind))


def _may_become_item(have: pa.DataType, wanted: pa.DataType) -> bool:
    return have == wanted or _may_become(have.value_type if pa.types.is_dictionary(have) else have, wanted)


def _is_text(kind: pa.DataType) -> bool:
    return bool(pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind))
