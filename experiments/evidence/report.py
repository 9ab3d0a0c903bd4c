"""Tables of a world's answers, and REPORT.md of all worlds; pictures are `experiments.evidence.pictures`."""

from collections.abc import Callable, Mapping
from pathlib import Path

from experiments.evidence.answers import OVER, SIDES
from experiments.evidence.arms import RIVALS, WITHOUT, retraining
from experiments.evidence.catalogue import VISITS
from experiments.evidence.groups import ALL, FIRST_20, HALF, NEW, RETURNING, WHOLE
from experiments.evidence.jobs import CADENCES, FUTURE, NEVER, PAST
from experiments.evidence.measure import NDCG, PER_USER, PER_VISIT, POOLED
from experiments.evidence.pictures import PICTURES, write_pictures
from experiments.evidence.reliability import LEAST
from experiments.evidence.titles import cadences, name_of, with_features
from experiments.evidence.worlds import ABOUT
from experiments.markdown import DASH, Results, number, over, pick, table
from limaml.io import atomic

METRICS = {POOLED: "pooled", PER_USER: "per user", PER_VISIT: "per visit", NDCG: "NDCG@10"}
LISTED = {NDCG: "NDCG@10", "hit10": "hit@10", PER_VISIT: "AUC"}
LEVELS = {"log_loss": "log loss", "calibration_error": "calibration error"}
_GROUPS = {
    RETURNING: "returning",
    NEW: "held out",
    FIRST_20: "held out, after 20 rows",
    WHOLE: "whole lists",
    HALF: "first half of the judged days",
}


def methods(found: Results, group: str) -> list[str]:
    """Every method on a group's rows, the best per visit first (of whole lists the best NDCG); what the chosen has over it."""
    shown, compared, by = (LISTED, (NDCG, PER_VISIT), NDCG) if group == WHOLE else (METRICS, tuple(METRICS), PER_VISIT)
    lines = []
    for key, ours in _sides(found):
        gains = found[key][group]
        values = {title: found["methods"][title][group] for title in ({ours, *gains[by]} if gains[by] else ())}
        rows = [
            (
                f"**{name_of(title)}**" if title == ours else name_of(title),
                " / ".join(number(values[title][metric], 2) for metric in shown),
                " / ".join(number(values[title][point], 3) for point in LEVELS),
                *(DASH if title == ours else over(pick(gains, metric, title), 2) for metric in compared),
            )
            for title in sorted(values, key=lambda title: (-(values[title][by] or 0), title))
        ]
        with_it = "with history features" if len(_sides(found)) > 1 else "method"
        what = "without history features" if key.endswith("history") else with_it
        over_it = (f"chosen over it, {shown[metric]}" for metric in compared)
        lines += table((what, " / ".join(shown.values()), " / ".join(LEVELS.values()), *over_it), rows)
    return lines


def lists(found: Results) -> list[str]:
    """Whole lists."""
    return [f"At most {VISITS} visits an origin, all items that anybody was shown that day.", "", *methods(found, WHOLE)]


def halves(found: Results) -> list[str]:
    """What rows add to the prior, earlier ones and those of the other half; and what repeats from half to half."""
    keys = [(variant, metric) for metric in (PER_USER, PER_VISIT) for variant in (PAST, FUTURE)]
    rows = [
        (with_features(title), *(over(of[variant][metric], 2) for variant, metric in keys))
        for title, of in found["halves"].items()
    ]
    what = {PAST: "earlier rows", FUTURE: "the other half's"}
    return [
        "Rows of the first half of the judged days, by known users who came in both halves. An embedding of the other half's"
        " rows is no forecast: it says what rows of the same weeks could add at best.",
        "",
        *table(("over the prior", *(f"{METRICS[metric]}, {what[variant]}" for variant, metric in keys)), rows),
        "Reliability of what the global MLP leaves unexplained, from the halves of each returning user's judged days, taken in"
        " turn: 0 is noise. *Level* is of a user, *taste* of a user's rows with a category, less the level.",
        "",
        *table(
            ("left unexplained by", *(LEAST)),
            [(with_features(title), *(over(of.get(name), 2) for name in LEAST)) for title, of in found["repeats"].items()],
        ),
    ]


def _sides(found: Results) -> list[tuple[str, str]]:
    return [(f"gains{side}", found[f"chosen{side}"]) for side in SIDES if f"chosen{side}" in found]


def who(found: Results) -> list[str]:
    """Groups of returning users' rows, and what the chosen arm has over the global MLP and over wide & deep there."""
    wanted = (("over_global", PER_USER), ("over_global", PER_VISIT), ("over_ids", PER_VISIT))
    lines = []
    for suffix in [side for side in SIDES if f"gains{side}" in found]:
        rows = [
            (
                _GROUPS.get(name, name),
                f"{group['rows']:,}",
                *(over(pick(group, f"{key}{suffix}", metric), 2) for key, metric in wanted),
            )
            for name, group in found["groups"].items()
            if name not in (ALL, HALF) and group["rows"] >= 100
        ]
        titles = (f"over {name_of(OVER[key])}, {METRICS[metric]}" for key, metric in wanted)
        lines += table((f"rows{', without history features' if suffix else ''}", "judged", *titles), rows)
    return lines


def first_visits(found: Results) -> list[str]:
    """Held-out users after k rows: per-user AUC and NDCG@10 of each method, and what the rows add to the prior."""
    lines = [
        "The query rows are the same for every k. Features are those logged with a row: counts and history features hold all"
        " rows before its day, not the first k alone.",
        "",
    ]
    for _, ours in _sides(found):
        suffix = WITHOUT if ours.endswith(WITHOUT) else ""
        by_k = {title: of for title, of in found["first_visits"].items() if title.endswith(WITHOUT) == bool(suffix)}
        ks = sorted(next(iter(by_k.values())), key=int)
        rows = [
            (
                f"**{name_of(title)}**" if title == ours else name_of(title),
                *(" / ".join(number(of[k]["values"][metric], 1) for metric in (PER_USER, NDCG)) for k in ks),
            )
            for title, of in sorted(by_k.items(), key=lambda one: (-(one[1][ks[-1]]["values"][PER_USER] or 0), one[0]))
        ]
        where = ", without history features" if suffix else ""
        lines += table((f"per-user AUC / NDCG@10{where}", *(f"k = {k}" for k in ks)), rows)
        rows = [
            (f"origin {at + 1}, {METRICS[metric]}", *(over(by_k[ours][k]["over_prior"][at][metric]) for k in ks[1:]))
            for at in range(len(found["origins"]))
            for metric in (POOLED, PER_USER)
        ]
        lines += table((f"{name_of(ours)}{where}: k rows less none", *(f"k = {k}" for k in ks[1:])), rows)
    return lines


def staleness(found: Results) -> list[str]:
    """Of returning users: what an older embedding loses."""
    rows = []
    for title, by in cadences(found).items():
        of = {cadence: by[cadence][RETURNING] for cadence in (*CADENCES, NEVER)}
        cells = (f"{number(one['values'][PER_VISIT], 2)}, {over(one['over_daily'][PER_VISIT], 2)}" for one in of.values())
        rows.append((title, *cells))
    lines = table(("per visit, and over a daily refresh", *(cadence.replace("_", " ") for cadence in of)), rows)
    return [
        "Refreshed at multiples of 7 and of 28 days since 1970, which may lie before the judged days; *never*: not in them.",
        "",
        *lines,
    ]


def cost(found: Results) -> list[str]:
    """What ours cost, with the AUC that they buy, the cheapest to adapt first; and how long every job took."""
    rows, ours = [], {title: one for title, one in found["cost"].items() if "adapt_us" in one}
    for title, one in sorted(ours.items(), key=lambda each: (each[1]["adapt_us"], each[0])):
        served, new = (pick(found, "methods", title, group) or {} for group in (RETURNING, FIRST_20))
        bought = (number(value, 2) for value in (served.get(PER_USER), served.get(PER_VISIT), new.get(PER_USER)))
        spent = (number(one[name], 0) for name in ("train_seconds", "adapt_us", "stored_bytes"))
        rows.append((with_features(title), *bought, *spent, number(pick(found, "validation", title), 4)))
    judged = ("returning, per user", "returning, per visit", "k = 20, per user")
    header = ("ours", *judged, "seconds to train", "µs to adapt a task", "bytes stored", "validation")
    return [
        "Times are of one core that others used as well: a rough guide. Where items alone are adapted, what validates is ranked"
        " inside an item, not inside a user.",
        "",
        *table(header, rows),
        *table(("fitted together", "seeds", "seconds to fit, and to score all that is judged, at one origin"), _fits(found)),
    ]


def _fits(found: Results) -> list[tuple[str, ...]]:
    rows: list[tuple[str, ...]] = []
    for title, one in sorted(found["cost"].items(), key=lambda each: each[1]["seconds"]):
        job = title.removesuffix(WITHOUT)
        fitted, _ = retraining(job)
        names = [name_of(f"{name}{job.removeprefix(fitted)}") for name in RIVALS.get(fitted, (fitted,))]
        features = "" if title == job else f"{WITHOUT} features"
        rows.append(("; ".join(names) + features, str(one["seeds"]), number(one["seconds"], 0)))
    return rows


_SECTIONS: dict[str, Callable[[Results], list[str]]] = {
    "As served daily, returning users: what a stored embedding adds, and to what": lambda found: methods(found, RETURNING),
    "Who gains, and who does not": who,
    "First visits: held-out users after k rows": first_visits,
    "Whole lists: NDCG and hit rate over everything that was on offer that day": lists,
    "How stale it may be": staleness,
    "What newer rows could add at best": halves,
    "What it costs": cost,
    "Held-out users as served daily": lambda found: methods(found, NEW),
}


def about(found: Results) -> str:
    """What was measured, what its terms allow, and what it cannot show."""
    returning = found["groups"][RETURNING]
    return (
        f"{len(found['origins'])} origins (last days {', '.join(found['origins'])}), seeds: {found['seeds']};"
        f" {returning['rows']:,} rows of {returning['users']:,} returning users are judged. Terms: {found['terms']}. It cannot"
        f" show {found['cannot_show']}. Chosen: *{name_of(found['chosen'])}*."
    )


def world(found: Results) -> list[str]:
    """A world's part of the report."""
    lines = [f"## {found['title']}", "", about(found), ""]
    for title, section in _SECTIONS.items():
        lines += [f"### {title}", "", *section(found)]
    return lines


def render(results: Mapping[str, Results]) -> str:
    """REPORT.md: every world's tables."""
    lines = [
        "# What LiMAML gains where people return, and what it costs",
        "",
        "Written by `make experiments` from a results file a world. AUC and NDCG in points (hundredths); differences with"
        " 95 % paired bootstrap intervals over users, bold where they exclude zero; those over days are in the files."
        " *Pooled* ranks all rows together, *per user* inside each user, *per visit* inside a user's day; NDCG@10 is of that"
        " day's rows. *Chosen* is, of ours that the core serves and that have the world's loss, what ships, or else the"
        " simplest, within 0.1 points of the best by the mean of pooled and per-user AUC on rows that validate. History"
        " features are what a user did with an item, or its category, before. The last table of *What it costs* says how many"
        " seeds a method's figures are the means of. Intervals are of users alone.",
        "",
    ]
    lines += [line for name, (text, _) in PICTURES.items() for line in (f"![{text}]({name}.png)", "")]
    lines += [line for name in ABOUT if name in results for line in world(results[name])]
    return "\n".join(lines).strip() + "\n"


def write(results: Mapping[str, Results], folder: Path) -> None:
    """The page and its pictures."""
    write_pictures(results, folder)
    atomic.write(folder / "REPORT.md", render(results))
