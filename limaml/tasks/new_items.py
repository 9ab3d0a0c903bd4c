"""Logged rows as they would be if nobody had touched their items yet (DropoutNet, Volkovs et al. 2017)."""

import pyarrow as pa
import pyarrow.compute as pc

from limaml import schema


def without_history(logged: pa.Table, tables: schema.Tables) -> pa.Table:
    """`logged` (`schema.Tables.logged_events`) with each item's aggregates as of an item that the catalogue knows and no event
    does, and without the users' entries for it; what the catalogue says of it stays, and entries for its categories.

    An item that no snapshot knows (all null) stays so: nothing was counted of it.
    """
    for feature in (feature for feature in tables.of("item") if feature.aggregate):
        column, kind = logged[feature.name], schema.arrow_type(feature)
        # As `Subject.projection` of no event: a mean and a day are null then, a count and a rate are not.
        value = pa.scalar({"count": 0, "rate": feature.prior}.get(feature.aggregate or ""), kind)
        logged = _with(logged, feature.name, pc.if_else(column.is_valid(), value, pa.scalar(None, kind)))
    for affinity in tables.affinities:
        for column in affinity.joined if affinity.by == "item_id" else ():
            logged = _with(logged, column.name, pa.nulls(logged.num_rows, column.type))
    return logged


def _with(logged: pa.Table, name: str, column: pa.ChunkedArray | pa.Array) -> pa.Table:
    return logged.set_column(logged.column_names.index(name), logged.schema.field(name), column)
