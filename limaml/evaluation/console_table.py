"""The quality table as text, from an evaluation's JSON; standard library only, so that whoever prints it starts fast."""

from collections.abc import Mapping, Sequence
from typing import Any

METHODS = (
    ("item_mean", "item mean"),
    ("own_rate", "user's own rate of the item"),
    ("user_residual", "item mean + user residual"),
    ("global_mlp", "global MLP"),
    ("wide_deep", "wide and deep, user ids"),
    ("limaml", "LiMAML"),
)
Table = Mapping[str, Any]


def methods_in(table: Table) -> list[tuple[str, str]]:
    """Methods of a table with their titles, in their order; a rate that is not declared is none."""
    return [(name, title) for name, title in METHODS if name in table["methods"]]


def console_table(result: Table) -> str:
    """Lines to print: known users as served, held-out users as served and by first-k; what the gate reads comes first."""
    gate = result["gate"]
    sections = {
        "first_k": _first_k(result["first_k"], str(gate["k"])),
        "as_served_known": [*_served(result, "known", "known users"), "", *_by_days(result["as_served"])],
        "as_served_held_out": _served(result, "held_out", "held-out users"),
        "as_served": _served(result, "all", "all users"),
    }
    ordered = [sections.pop(gate["protocol"]), *sections.values()]
    return "\n\n".join("\n".join(lines) for lines in ordered)


def method_rows(table: Table) -> list[list[str]]:
    """A header and one row of cells a method: values, differences to both rivals, log loss, calibration error."""
    rows = [["method", "pooled AUC", "vs global MLP", "per-user AUC", "vs global MLP", "vs user residual", "log loss", "ECE"]]
    for name, title in methods_in(table):
        values = table["methods"][name]
        rows.append(
            [
                title,
                number(values["pooled_auc"]),
                difference(values.get("pooled_auc_vs_global_mlp")),
                number(values["per_user_auc"]),
                difference(values.get("per_user_auc_vs_global_mlp")),
                difference(values.get("per_user_auc_vs_user_residual")),
                number(values["log_loss"]),
                number(values["calibration_error"]),
            ]
        )
    return rows


def number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4f}"


def difference(found: Mapping[str, float | None] | None) -> str:
    """`+0.0123 [+0.0100, +0.0140]`; a dash where there is nothing to compare."""
    if found is None or found["value"] is None:
        return "-"
    if found["low"] is None or found["high"] is None:
        return f"{found['value']:+.4f}"
    return f"{found['value']:+.4f} [{found['low']:+.4f}, {found['high']:+.4f}]"


def by_k_rows(first_k: Mapping[str, Table]) -> list[list[str]]:
    """A header and one row a method: pooled / per-user AUC for each k."""
    return _side_by_side({f"k={k}": first_k[k] for k in sorted(first_k, key=int)})


def by_days_rows(as_served: Mapping[str, Table]) -> list[list[str]]:
    """A header and one row a method: pooled / per-user AUC of known users by their number of earlier days with rows."""
    prefix = "known days "
    tables = {name.removeprefix(prefix): table for name, table in as_served.items() if name.startswith(prefix)}
    ordered = sorted(tables.items(), key=lambda item: int(item[0].split("-")[0].rstrip("+")))
    return _side_by_side({f"{name} ({table['rows']} rows)": table for name, table in ordered})


def _side_by_side(tables: Mapping[str, Table]) -> list[list[str]]:
    rows = [["method", *tables]]
    for name, title in methods_in(next(iter(tables.values()))):
        cells = [table["methods"][name] for table in tables.values()]
        rows.append([title, *(f"{number(cell['pooled_auc'])} / {number(cell['per_user_auc'])}" for cell in cells)])
    return rows


def _first_k(first_k: Mapping[str, Table], gate_k: str) -> list[str]:
    table = first_k[gate_k]
    counts = f"{table['users']} held-out users, {table['rows']} query rows"
    lines = [f"First {gate_k} rows as support: {counts}; intervals: 95 %, paired over users", *aligned(method_rows(table))]
    return [*lines, "", "By number of support rows (pooled AUC / per-user AUC)", *aligned(by_k_rows(first_k))]


def _served(result: Table, group: str, what: str) -> list[str]:
    table, since = result["as_served"][group], result["split"]["validation_end"]
    counts = f"{what} from {since} on: {table['users']} users, {table['rows']} rows"
    return [f"As served daily, {counts}", *aligned(method_rows(table))]


def _by_days(as_served: Mapping[str, Table]) -> list[str]:
    lines = aligned(by_days_rows(as_served))
    return ["Known users by the number of earlier days on which they came (pooled AUC / per-user AUC)", *lines]


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Lines with the first cells on the left and the others on the right of columns of one width each."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
