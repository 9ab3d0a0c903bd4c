"""Protocol, configurations, what ships, and tables 1 and 2: the methods and what ours gain over them."""

from collections.abc import Sequence

from experiments.reporting.text import (
    METRICS,
    OURS,
    PERSONAL_KS,
    RIVALS,
    Results,
    by_number,
    change,
    mean,
    name_of,
    negated,
    number,
    ordered,
    pick,
    points,
    table,
)

_BLOCKS = ("prior", "row_mlp", "full", "id_mlp", "stored")
_STORABLE = ("stored", "row_mlp", "id_mlp", "history")
"""Of ours, those that serve from a stored vector."""


def protocol(results: Results) -> list[str]:
    if "protocol" not in results:
        return []
    found = results["protocol"]
    header = ("origin", "train users (rows)", "validation users", "test users", "first-k users (query rows)", "served rows")
    rows = [
        (
            str(at + 1),
            f"{origin['train_users']} ({origin['train_rows']:,})",
            str(origin["validation_users"]),
            str(origin["test_users"]),
            f"{origin['first_k_users']} ({origin['first_k_rows']:,})",
            f"{origin['served_rows']:,}, of which {origin['served_returning_rows']:,} of returning users",
        )
        for at, origin in enumerate(found["origins"])
    ]
    return ["## How it was measured", "", *table(header, rows), *_rules(found["draws"], found["seeds"], found["ks"]), ""]


def _rules(draws: int, seeds: int, ks: Sequence[int]) -> list[str]:
    return [
        "- Rolling origins on MovieLens-100K: train on users who arrived before a cut, on events before it; choose everything"
        " on the validation users who arrived next; judge the users who arrived after those. No validation user of an origin is"
        " judged at another; no row is judged at two.",
        f"- *First k*: the support is a test user's first k events, k = {', '.join(map(str, ks))}; the query rows are the same"
        " for all k. `k >= 20` is the mean of the values at k = 20 and k = 50.",
        "- *As served*: the support is what a daily refresh would have seen; returning training users are shown apart.",
        f"- {seeds} seeds for what is fitted at random. A metric is computed within an origin and a seed, then averaged. The"
        f" intervals are 95 %, from {draws:,} draws of users, the same draws at all origins and k; differences are paired.",
        "- **MovieLens' figures are exploratory.** Earlier explorations saw these users ([LOG.md](../LOG.md) says how often),"
        " so they suggest what to expect elsewhere and prove nothing. Designs were frozen before the test run.",
    ]


def configurations(results: Results) -> list[str]:
    """How many each method was given, and what the best was worth on validation users."""
    given = results.get("configurations", {})
    if not given:
        return []
    rows = [
        (name_of(name), str(given[name]), points(pick(results, "designs", name, "validation"), 2)) for name in ordered(given)
    ]
    return [
        "## Configurations each method was given",
        "",
        *table(("method", "configurations", "validation number of the best"), rows),
        "The validation number is the mean of pooled and per-user AUC over both protocols. Rivals choose their own support-time"
        " fit (steps, rate, shrinkage, by number of support rows) on validation users besides. Before that"
        " search settings were tried by hand, of ours more than of any rival ([LOG.md](../LOG.md) has the counts), so ours is"
        " the more optimistic validation number.",
        "",
        shipped(results),
        "",
    ]


def shipped(results: Results) -> str:
    """What `configs/movielens.toml` holds and why; which other of ours validated higher, if one did."""
    design = pick(results, "designs", "stored")
    if design is None:
        return "What ships was not chosen by these results."
    settings = ", ".join(f"`{override}`" for override in design["design"].get("overrides", ()))
    text = (
        f"Shipped in `configs/movielens.toml`: LiMAML with stored embeddings, {settings or 'its settings unchanged'}; on the"
        f" validation users the best of {design['configurations']} (validation number {points(design['validation'], 2)})."
    )
    others = {name: pick(results, "designs", name, "validation") for name in _STORABLE if name != "stored"}
    higher = [name for name, value in others.items() if value is not None and value > design["validation"]]
    for name in ordered(higher):
        text += f" *{name_of(name)}* validated higher ({points(others[name], 2)}) and does not ship."
    for name in ordered(set(others) - set(higher)):
        gain = negated(pick(results, "delta_auc", "stored", name, "20+"))
        if gain is not None and (gain["low"] or 0.0) > 0.0:
            text += (
                f" *{name_of(name)}* validated lower ({points(others[name], 2)}) and does better on the judged users"
                f" (pooled, k >= 20: {change(gain)}); judged users choose nothing, so it does not ship."
            )
    return text


def personal(results: Results, metric: str, method: str) -> float | None:
    """The metric at k >= 20."""
    return mean([pick(results, metric, method, k) for k in PERSONAL_KS])


def methods(results: Results) -> list[str]:
    """Table 1."""
    if "auc" not in results:
        return []
    names, lines = ordered(results["auc"]), ["## Table 1: methods", ""]
    ks = by_number(results["auc"][names[0]])
    for metric, title in METRICS.items():
        header = (f"{title} AUC", *(f"k = {k}" for k in ks), "k >= 20")
        rows = [
            (name_of(m), *(points(pick(results, metric, m, k)) for k in ks), points(personal(results, metric, m)))
            for m in names
        ]
        lines += table(header, rows)
    lines += ["![AUC by number of support rows](methods.png)", ""]
    header = ("method", "log loss, k = 20", "calibration error, k = 20", *_served_titles(("all", "returning", "new")))
    rows = [
        (
            name_of(m),
            number(pick(results, "log_loss", m, "20"), 4),
            number(pick(results, "calibration_error", m, "20"), 4),
            *(points(pick(results, f"as_served_{v}", m, g)) for g in ("all", "returning", "new") for v in METRICS),
        )
        for m in names
    ]
    lines += table(header, rows)
    for ours in OURS:
        lines += _differences(results, ours)
    return lines


def _served_titles(groups: Sequence[str]) -> list[str]:
    return [f"as served, {group}: {title}" for group in groups for title in METRICS.values()]


def _differences(results: Results, ours: str) -> list[str]:
    """Of one of ours against everything else: at k >= 20 by how much people do, then as served."""
    if pick(results, "delta_auc", ours) is None:
        return []
    rivals = ordered(results["delta_auc"][ours])
    groups = ("frequent", "infrequent")
    header = ("less", *METRICS.values(), *(f"{group}: {title}" for group in groups for title in METRICS.values()))
    rows = [
        (
            name_of(rival),
            *(change(pick(results, f"delta_{v}", ours, rival, "20+")) for v in METRICS),
            *(change(pick(results, f"frequency_delta_{v}", ours, rival, g)) for g in groups for v in METRICS),
        )
        for rival in rivals
    ]
    lines = [f"### {name_of(ours)}, less each other method", "", "At k >= 20; frequent and infrequent users are halves:", ""]
    lines += table(header, rows)
    served = ("all", "returning", "new")
    rows = [
        (name_of(rival), *(change(pick(results, f"as_served_delta_{v}", ours, rival, g)) for g in served for v in METRICS))
        for rival in rivals
    ]
    titles = [f"{group}: {title}" for group in served for title in METRICS.values()]
    return [*lines, "As served daily:", "", *table(("less", *titles), rows)]


def stored_embedding(results: Results) -> list[str]:
    """Table 2."""
    if pick(results, "auc", "row_mlp") is None and pick(results, "auc", "full") is None:
        return []
    rows = [
        (
            name_of(m),
            *(points(personal(results, v, m), 2) for v in METRICS),
            *(change(negated(pick(results, f"delta_{v}", "full", m, "20+")), 2) for v in METRICS),
            *(change(pick(results, f"delta_{v}", "stored", m, "20+"), 2) for v in METRICS),
        )
        for m in _BLOCKS
        if m in results["auc"]
    ]
    header = ("k >= 20", *METRICS.values())
    header += tuple(
        f"{title}: {name}" for title in ("less the full network", "the shipped less it") for name in METRICS.values()
    )
    return [
        "## Table 2: what the stored embedding costs",
        "",
        *table(header, rows),
        "Full and stored differ only for the row-level block; for a task-level block they are equal, which a test asserts. The"
        " prior is the shipped network without anything of the user: no embedding.",
        "",
    ]


def gain_rows(results: Results, ours: str, *, served: bool) -> list[tuple[str, ...]]:
    """A row for each rival: its own AUCs, and what ours gains over it, pooled and per-user; ours itself last."""
    groups = ("all", "returning") if served else ("20+",)
    rows = []
    for m in [*(name for name in RIVALS if name in results["auc"]), ours]:
        own, gained = [], []
        for group in groups:
            values = [pick(results, f"as_served_{v}", m, group) if served else personal(results, v, m) for v in METRICS]
            own.append(" / ".join(points(value) for value in values))
            kinds = [f"as_served_delta_{v}" if served else f"delta_{v}" for v in METRICS]
            gained += ["" if m == ours else change(pick(results, kind, ours, m, group)) for kind in kinds]
        rows.append((f"**{name_of(m)}**" if m == ours else name_of(m), *own, *gained))
    return rows
