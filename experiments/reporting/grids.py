"""Tables 3, 6 and 7: sensitivity, recovery of a known answer, cost."""

from collections.abc import Mapping, Sequence
from typing import Any

from experiments.reporting.text import DASH, Results, by_number, number, pick, points, table
from experiments.tables.cost import BASE_DIM, BASE_HIDDEN, BASE_STEPS

Cell = Mapping[str, Any]

TASTES = {"level": "a level", "one_dimension": "a one-dimensional taste", "ten_dimensions": "a ten-dimensional taste"}
BLOCKS = {"task_vector": "task vector", "id_mlp": "id block", "row_mlp": "row-level block"}
_COSTS = {
    "train_step_ms": ("training step, ms", 1),
    "train_step_full_ms": ("the same, full network, ms", 1),
    "adapt_us": ("adapting an entity, us", 1),
    "stored_bytes": ("bytes stored", 0),
    "adapted_bytes": ("bytes of adapted weights", 0),
    "score_stored_us": ("request from stored, us", 0),
    "score_full_us": ("request by adapted weights, us", 0),
}


def sensitivity(results: Results) -> list[str]:
    """Table 3."""
    cells: Sequence[Cell] = results.get("sensitivity", ())
    if not cells:
        return []
    steps = sorted({cell["inner_steps"] for cell in cells})
    rows: dict[tuple[Any, ...], dict[int, Cell]] = {}
    for cell in cells:
        rows.setdefault(setting(cell), {})[cell["inner_steps"]] = cell
    values = [cell["validation_auc"] for cell in cells if not cell["diverged"] and cell["validation_auc"] is not None]
    best = max(values, default=None)
    header = ("order", "inner rates", "outer rate, x", "first inner rate, x", *(f"steps = {n}" for n in steps))
    shown = [
        (*_setting(key), *(_cell(found[n], best) if n in found else DASH for n in steps))
        for key, found in sorted(rows.items(), key=lambda item: (item[0][0] != "second", not item[0][1], item[0][2:]))
    ]
    spread = (
        f" That mean lies between {points(min(values), 2)} and {points(best, 2)}, where a fit did not diverge."
        if values
        else ""
    )
    return [
        "## Table 3: sensitivity",
        "",
        "On validation users: pooled / per-user AUC in points, means over their task lists, origins and seeds, and seconds of"
        " outer steps. Rates are multiples of the shipped ones; with learned rates (Meta-SGD) the first is where they start."
        f" Bold: the best mean of both.{spread}",
        "",
        *table(header, shown),
        "![Sensitivity](sensitivity.png)",
        "",
    ]


def setting(cell: Cell) -> tuple[str, bool, float, float]:
    """All of a cell but its steps."""
    return cell["order"], cell["learned"], cell["outer_rate"], cell["inner_rate"]


def _setting(key: tuple[Any, ...]) -> tuple[str, ...]:
    order, learned, outer_rate, inner_rate = key
    return order, "learned" if learned else "fixed", f"{outer_rate:g}", f"{inner_rate:g}"


def _cell(cell: Cell, best: float | None) -> str:
    if cell["diverged"]:
        return "diverged" if cell["diverged"] >= 1.0 else f"diverged at {100 * cell['diverged']:.0f} % of the origins"
    shown = f"{points(cell['pooled'], 1)} / {points(cell['peruser'], 1)}"
    mark = f"**{shown}**" if cell["validation_auc"] == best else shown
    return f"{mark}, {number(cell['train_seconds'], 1)} s"


def recovery(results: Results) -> list[str]:
    """Table 6."""
    if "recovery" not in results:
        return []
    found, worst = results["recovery"], results.get("recovered_share", {})
    tastes = [taste for taste in TASTES if taste in found]
    ks = by_number({k for taste in tastes for k in found[taste] if k != "0"})
    rows = [(f"k = {k}", *(_recovered(pick(found, taste, k)) for taste in tastes), share(worst.get(k))) for k in ks]
    none = ", ".join(f"{points(pick(found, taste, '0', 'none'))} ({TASTES[taste]})" for taste in tastes)
    return [
        "## Table 6: recovery of a known answer",
        "",
        "Synthetic users with a planted taste, without drift. Share recovered = (LiMAML - no personalisation) / (best possible"
        " given the same k rows - no personalisation), in brackets LiMAML's expected AUC and the best possible. Without"
        f" personalisation the AUC is {none}.",
        "",
        *table(("rows", *(TASTES[taste] for taste in tastes), "least"), rows),
        *_inside_users(results),
        "![Share recovered](recovery.png)",
        "",
    ]


def _inside_users(results: Results) -> list[str]:
    """The same of per-user AUC, for the tastes that can rank one item above another."""
    found = results.get("recovery_peruser", {})
    tastes = [taste for taste in TASTES if any("share" in cell for cell in found.get(taste, {}).values())]
    if not tastes:
        return []
    rows = [
        (f"k = {k}", *(_recovered(pick(found, taste, k)) for taste in tastes)) for k in by_number(found[tastes[0]]) if k != "0"
    ]
    return ["The same of per-user AUC:", "", *table(("rows", *(TASTES[taste] for taste in tastes)), rows)]


def share(value: float | None) -> str:
    return DASH if value is None else f"{points(value)} %"


def _recovered(cell: Mapping[str, float | None] | None) -> str:
    if cell is None or cell.get("share") is None:
        return DASH
    return f"{share(cell['share'])} ({points(cell['limaml'])} of {points(cell['oracle'])})"


def cost(results: Results) -> list[str]:
    """Table 7."""
    if "cost" not in results:
        return []
    found = results["cost"]
    titles = [title for title, _ in _COSTS.values()]
    lines = [
        "## Table 7: cost",
        "",
        "One thread. A training step has 64 tasks of 32 support and 32 query rows; adapting is one entity of 2,048, 32 rows; a"
        " request scores 100 candidates with the entity's row at hand.",
        "",
        f"By inner steps, embedding of {BASE_DIM} floats, hidden layer of {BASE_HIDDEN} where the block has one:",
        "",
    ]
    blocks = [block for block in BLOCKS if block in found]
    by_steps = [(BLOCKS[b], str(c["inner_steps"]), *_costs(c)) for b in blocks for c in at_base_width(found[b])]
    lines += table(("block", "inner steps", *titles), by_steps)
    widths = [(BLOCKS[b], *_widths(c), *_costs(c)) for b in blocks for c in at_base_steps(found[b])]
    lines += [f"By width, at {BASE_STEPS} inner steps:", ""]
    lines += table(("block", "embedding", "hidden", *titles), widths)
    return [*lines, "![Cost](cost.png)", ""]


def at_base_width(cells: Sequence[Cell]) -> list[Cell]:
    chosen = [cell for cell in cells if cell["embedding_dim"] == BASE_DIM and cell["hidden"] in (None, BASE_HIDDEN)]
    return sorted(chosen, key=lambda cell: cell["inner_steps"])


def at_base_steps(cells: Sequence[Cell]) -> list[Cell]:
    chosen = [cell for cell in cells if cell["inner_steps"] == BASE_STEPS]
    return sorted(chosen, key=lambda cell: (cell["embedding_dim"], cell["hidden"] or 0))


def _costs(cell: Cell) -> list[str]:
    return [number(cell[name], digits) for name, (_, digits) in _COSTS.items()]


def _widths(cell: Cell) -> tuple[str, str]:
    return str(cell["embedding_dim"]), DASH if cell["hidden"] is None else str(cell["hidden"])
