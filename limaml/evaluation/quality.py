"""The quality table as text, from an evaluation's JSON; standard library only, so that whoever prints it starts fast."""

from collections.abc import Mapping, Sequence
from typing import Any

METHODS = (
    ("item_mean", "item mean"),
    ("user_residual", "item mean + user residual"),
    ("global_mlp", "global MLP"),
    ("wide_deep", "wide and deep, user ids"),
    ("limaml", "LiMAML"),
)
Table = Mapping[str, Any]


def quality_table(result: Table, gate_k: int) -> str:
    """Lines to print: first-k at `gate_k`, AUC by k, and as served."""
    table = result["first_k"][str(gate_k)]
    served = result["as_served"]
    counts = f"{table['users']} test users, {table['rows']} query rows"
    lines = [f"First {gate_k} rows as support: {counts}; intervals: 95 %, paired over users"]
    lines += _at_k(table)
    lines += ["", "By number of support rows (pooled AUC / per-user AUC)", *_by_k(result["first_k"])]
    for name, what in (("all", "all rows"), ("returning", "returning training users")):
        group = served[name]
        lines += ["", f"As served daily, {what}: {group['users']} users, {group['rows']} rows", *_at_k(group)]
    return "\n".join(lines)


def method_rows(table: Table) -> list[list[str]]:
    """A header and one row of cells a method: values, differences to both rivals, log loss, calibration error."""
    rows = [["method", "pooled AUC", "vs global MLP", "per-user AUC", "vs global MLP", "vs user residual", "log loss", "ECE"]]
    for name, title in METHODS:
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
    ks = sorted(first_k, key=int)
    rows = [["method", *(f"k={k}" for k in ks)]]
    for name, title in METHODS:
        cells = [first_k[k]["methods"][name] for k in ks]
        rows.append([title, *(f"{number(cell['pooled_auc'])} / {number(cell['per_user_auc'])}" for cell in cells)])
    return rows


def _at_k(table: Table) -> list[str]:
    return _aligned(method_rows(table))


def _by_k(first_k: Mapping[str, Table]) -> list[str]:
    return _aligned(by_k_rows(first_k))


def _aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))]
        lines.append("  " + "  ".join(cells).rstrip())
    return lines
