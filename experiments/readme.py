"""The README's section on what is gained, written from experiments/results/results.json; a test holds that they are equal.

.venv/bin/python -m experiments.readme
"""

from pathlib import Path

from experiments.reporting.claims import Claim, claims
from experiments.reporting.gains import gain_rows, shipped
from experiments.reporting.text import METRICS, Results, change, name_of, pick, table
from experiments.results import RESULTS, read

ROOT = Path(__file__).parents[1]
BEGIN = "<!-- figures of experiments/results/results.json: python -m experiments.readme -->\n"
END = "<!-- end of what it gains -->\n"
MISSING = "experiments/results/results.json must exist, with its methods table; run `make experiments`"
_OURS = "stored"


def block(results: Results) -> str:
    """The markdown between the markers."""
    found = results["protocol"]
    users = sum(origin["first_k_users"] for origin in found["origins"])
    rows = sum(origin["first_k_rows"] for origin in found["origins"])
    served = sum(origin["served_rows"] for origin in found["origins"])
    returning = sum(origin["served_returning_rows"] for origin in found["origins"])
    lines = [
        f"{len(found['origins'])} rolling origins, {users} new users with {rows:,} query rows, {found['seeds']} seeds; each"
        " method saw a user's first 20 or 50 rows (mean of both). Differences are AUC points with 95 % paired bootstrap"
        " intervals over users, bold where they exclude zero.",
        "",
        *table(_header("k >= 20", ("",)), gain_rows(results, _OURS, served=False)),
        f"As served daily ({served:,} rows, {returning:,} of them of returning users), where most rows belong to people with no"
        " history before that day:",
        "",
        *table(_header("as served", ("all rows, ", "returning users, ")), gain_rows(results, _OURS, served=True)),
        *_sentences(results),
    ]
    return "\n".join(lines) + "\n"


def _header(what: str, groups: tuple[str, ...]) -> list[str]:
    own = [f"{group}AUC pooled / per-user" for group in groups]
    return [f"method, {what}", *own, *(f"LiMAML over it, {group}{title}" for group in groups for title in METRICS.values())]


def _sentences(results: Results) -> list[str]:
    """What holds, what does not, what ships, how to read it."""
    found = claims(results)
    held, lost = [c for c in found if c.holds], [c for c in found if c.holds is False]
    unknown = [c.text for c in found if c.holds is None]
    return [
        "What LiMAML was to show, and does:",
        "",
        *(map(_reached, held) if held else ["- nothing"]),
        "",
        "What it was to show, and does **not**:",
        "",
        *(map(_missed, lost) if lost else ["- nothing"]),
        "",
        *([f"Not measured: {'; '.join(unknown)}.", ""] if unknown else []),
        *_as_served(results),
        *_with_history(results),
        shipped(results),
        "",
        "Only per-user AUC can change a ranking. The figures are exploratory: earlier explorations saw these users,"
        " [experiments/LOG.md](experiments/LOG.md) says how often and what lost."
        " [experiments/results/REPORT.md](experiments/results/REPORT.md) has all tables.",
    ]


def _reached(claim: Claim) -> str:
    return f"- {claim.text}: {claim.reached}{_because(claim)}"


def _missed(claim: Claim) -> str:
    return f"- {claim.text}: {claim.reached}, goal {claim.goal}{_because(claim)}"


def _because(claim: Claim) -> str:
    return f"; {claim.reason}" if claim.reason else ""


def _as_served(results: Results) -> list[str]:
    """What of the gain is left where most rows have no history yet: per-user AUC alone can change a ranking."""
    found = pick(results, "as_served_delta_peruser_auc", _OURS, "global_mlp", "all")
    if found is None:
        return []
    verdict = "is gained" if found["low"] > 0.0 else "is **lost**" if found["high"] < 0.0 else "is **not** shown to be gained"
    return [f"As served daily, per-user AUC {verdict} over the global MLP: {change(found, 2)} on all rows.", ""]


def _with_history(results: Results) -> list[str]:
    """The same comparison of the variant that is given what the strongest rival has."""
    pair = [pick(results, f"delta_{metric}", "history", "history_mlp", "20+") for metric in METRICS]
    if None in pair:
        return []
    shown = ", ".join(f"{title} {change(each, 2)}" for title, each in zip(METRICS.values(), pair, strict=True))
    return [f"{name_of('history')}, over {name_of('history_mlp')} at k >= 20: {shown}.", ""]


def main() -> None:
    if not (RESULTS / "results.json").exists() or "protocol" not in read():
        raise SystemExit(MISSING)
    path = ROOT / "README.md"
    before, rest = path.read_text().split(BEGIN)
    _, after = rest.split(END)
    path.write_text(before + BEGIN + block(read()) + END + after)


if __name__ == "__main__":
    main()
