"""The report: one HTML page without anything to load, tables and plots of one evaluation."""

import base64
import html
import io
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from limaml.evaluation.console_table import METHODS, by_days_rows, by_k_rows, method_rows, methods_in

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; color: #1b1f24; }
table { border-collapse: collapse; margin: .5rem 0 1.5rem; font-variant-numeric: tabular-nums; }
th, td { padding: .25rem .7rem; border-bottom: 1px solid #d5d9de; text-align: right; }
th:first-child, td:first-child { text-align: left; }
tr.limaml td { font-weight: 600; }
.passed { color: #116329; } .failed, .refused { color: #a40e26; } .skipped { color: #6b7280; }
figure { margin: 1rem 0; } img { max-width: 100%; }
"""
_COLOURS = {
    "item_mean": "#9aa3ad",
    "own_rate": "#586e75",
    "user_residual": "#b58900",
    "global_mlp": "#268bd2",
    "wide_deep": "#6c71c4",
    "limaml": "#d33682",
}
_TITLES = dict(METHODS)


def render(result: Mapping[str, Any], history: Mapping[str, Sequence[Mapping[str, float]]]) -> str:
    """The whole page; `result` is what evaluation.json holds, `history` the curves of both fits."""
    decision = result["decision"]
    body = [
        f"<h1>Candidate through {_text(result['through'])}: <span class='{decision}'>{decision}</span></h1>",
        _checks(result["checks"]),
        _lineage(result),
        "<h2>First k rows of a held-out user as support</h2>",
        _figure(_plot_by_k(result["first_k"]), "AUC by number of support rows; bars are 95 % intervals over users"),
        _table(by_k_rows(result["first_k"])),
        "<p>Cells: pooled AUC / per-user AUC. The query rows are the same for every k.</p>",
    ]
    for k in sorted(result["first_k"], key=int):
        table = result["first_k"][k]
        body += [f"<h3>k = {k}: {table['users']} users, {table['rows']} rows</h3>", _table(method_rows(table))]
    body += [
        f"<h2>As served from {_text(result['split']['validation_end'])} on, embeddings refreshed daily</h2>",
        "<h3>Known users by the number of earlier days on which they came</h3>",
        _table(by_days_rows(result["as_served"])),
        "<p>Cells: pooled AUC / per-user AUC. Known users have rows that trained; new are all others, the held-out ones among "
        "them. Support: rows that the embedding was adapted on.</p>",
    ]
    for name, table in result["as_served"].items():
        body += [f"<h3>{_text(name)}: {table['users']} users, {table['rows']} rows</h3>", _table(method_rows(table))]
    body += [
        "<h2>Calibration</h2>",
        _figure(_plot_calibration(result["calibration"]), "Observed rate by predicted probability"),
    ]
    body += ["<h2>Training</h2>", _figure(_plot_training(history), "Training loss and validation AUC by outer step")]
    title = f"LiMAML candidate through {_text(result['through'])}"
    head = f"<head><meta charset='utf-8'><title>{title}</title><style>{_STYLE}</style></head>"
    return f"<!doctype html><html lang='en'>{head}<body>{''.join(body)}</body></html>\n"


def _checks(checks: Sequence[Mapping[str, str]]) -> str:
    rows = "".join(
        f"<tr><td>{_text(check['name'])}</td><td class='{check['outcome']}'>{check['outcome']}</td>"
        f"<td style='text-align:left'>{_text(check['reason'])}</td></tr>"
        for check in checks
    )
    return f"<table><tr><th>rule</th><th>outcome</th><th style='text-align:left'>reason</th></tr>{rows}</table>"


def _lineage(result: Mapping[str, Any]) -> str:
    split, lineage = result["split"], result["lineage"]
    users, rows = split["users"], split["rows"]
    psi = "not defined" if result["refit_psi"] is None else f"{result['refit_psi']:.4f}"
    code, mark = _text(lineage["code_revision"][:12]), _text(lineage["fingerprint"][:12])
    return (
        f"<p>{users['train']} training users ({rows['train']} rows before {_text(split['train_end'])}), "
        f"{users['validation']} validation users ({rows['validation']} rows before {_text(split['validation_end'])}), "
        f"{users['held_out']} held-out users ({_text(split['held_out'])}); "
        f"{rows['all']} rows on {len(lineage['days'])} days in all. "
        f"Refit against twin: population stability index {psi}. "
        f"Code <code>{code}</code>, fingerprint <code>{mark}</code>.</p>"
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    head = "".join(f"<th>{_text(cell)}</th>" for cell in rows[0])
    names = {title: name for name, title in METHODS}
    body = "".join(
        f"<tr class='{names[row[0]]}'>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows[1:]
    )
    return f"<table><tr>{head}</tr>{body}</table>"


def _figure(figure: "Figure", caption: str) -> str:
    buffer = io.BytesIO()
    # No creation date in the file: the same evaluation gives the same page.
    figure.savefig(buffer, format="png", dpi=110, metadata={"Software": None})
    image = base64.b64encode(buffer.getvalue()).decode()
    return f"<figure><img alt='{caption}' src='data:image/png;base64,{image}'><figcaption>{caption}</figcaption></figure>"


def _plot_by_k(first_k: Mapping[str, Mapping[str, Any]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    ks = sorted(first_k, key=int)
    metrics = (("pooled_auc", "Pooled AUC"), ("per_user_auc", "Per-user AUC"))
    for axis, (metric, title) in zip(figure.subplots(1, 2), metrics, strict=True):
        for offset, (name, label) in enumerate(methods_in(first_k[ks[0]])):
            cells = [first_k[k]["methods"][name] for k in ks]
            # A method's points stand beside the others', so that the bars can be told apart.
            at = [position + (offset - 2) * 0.08 for position in range(len(ks))]
            values, errors = [_nan(cell[metric]) for cell in cells], _errors(cells, metric)
            axis.errorbar(at, values, yerr=errors, label=label, color=_COLOURS[name], marker="o", ms=3, capsize=2, lw=1)
        axis.set_xticks(range(len(ks)), ks)
        axis.set(title=title, xlabel="support rows k")
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _errors(cells: Sequence[Mapping[str, Any]], metric: str) -> tuple[list[float], list[float]]:
    """Lengths of the bars below and above each value."""
    below, above = [], []
    for cell in cells:
        value, bounds = _nan(cell[metric]), cell[f"{metric}_interval"]
        below.append(max(value - _nan(bounds["low"]), 0.0))
        above.append(max(_nan(bounds["high"]) - value, 0.0))
    return below, above


def _plot_calibration(calibration: Mapping[str, Mapping[str, Any]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    for axis, (title, curves) in zip(figure.subplots(1, len(calibration), squeeze=False)[0], calibration.items(), strict=True):
        axis.plot([0, 1], [0, 1], color="#cccccc", lw=1)
        for name, curve in curves.items():
            # A bin of a few rows shows noise, not calibration.
            kept = [at for at, weight in enumerate(curve["weight"]) if weight > 0.005]
            x, y = ([curve[key][at] for at in kept] for key in ("mean_probability", "mean_label"))
            axis.plot(x, y, label=_TITLES[name], color=_COLOURS[name], marker="o", ms=3, lw=1)
        axis.set(title=title, xlabel="predicted probability", ylabel="observed rate", xlim=(0, 1), ylim=(0, 1))
        axis.grid(alpha=0.3)
    axis.legend(fontsize=8)
    return figure


def _plot_training(history: Mapping[str, Sequence[Mapping[str, float]]]) -> "Figure":
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    loss, quality = figure.subplots(1, 2)
    for phase, entries in history.items():
        loss.plot([entry["step"] for entry in entries], [entry["train_loss"] for entry in entries], label=phase)
    twin = history["twin"]
    for key in [key for key in twin[0] if key.startswith("validation_")] if twin else []:
        quality.plot([entry["step"] for entry in twin], [entry[key] for entry in twin], label=key.removeprefix("validation_"))
    loss.set(title="Training loss", xlabel="outer step")
    quality.set(title="Validation of the twin", xlabel="outer step")
    for axis in (loss, quality):
        axis.grid(alpha=0.3)
        axis.legend(fontsize=8)
    return figure


def _nan(value: float | None) -> float:
    return float("nan") if value is None else value


def _text(value: object) -> str:
    return html.escape(str(value))
