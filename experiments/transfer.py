"""What helps items that nobody has touched: vectors of their text, and training rows without their item's history.

    python -m experiments.transfer --out experiments/results/transfer.json [--world NAME ...]

Arms are chosen on rows of items without any before the day, from T1 to T2 and over all draws (`experiments.transfer_jobs`); all
rows from T2 on are judged as a daily refresh serves them, by an item's rows before the day. A fit is a job that is kept, and an
interrupted run goes on where it was.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from experiments import transfer_metrics as metrics
from experiments.cached_jobs import Arrays, Job, JobCache, JobOutput
from experiments.code_digest import revision
from experiments.data import WORK
from experiments.evidence.measure import Mask
from experiments.progress import follow
from experiments.transfer_jobs import GROUPS, WORLDS, Arm, Draw, deliver, fit_and_score, inside
from experiments.transfer_metrics import Resamples, Rows, measured
from limaml.config import Config, load
from limaml.metrics import Floats

TABLE, DRAWS = "transfer", 3
SHARES = (0.2, 0.5)
"""Of training rows without their item's history; one is chosen."""
_FITTED_BY = ("transfer_jobs", "evidence/catalogue", "evidence/fit_data", "evidence/worlds")


@dataclass
class Measurement:
    """A world's draws, and the outputs of its arms in each."""

    draws: list[Draw]
    outputs: dict[Arm, list[JobOutput]] = field(default_factory=dict)

    def arrays(self, arm: Arm) -> list[Arrays]:
        return [output.arrays for output in self.outputs[arm]]

    def rows(self) -> Rows:
        """Those that every arm has scored."""
        return Rows.of(self.draws, [arrays["event_R"] for arrays in self.arrays(next(iter(self.outputs)))])

    def scores(self, arm: Arm) -> Floats:
        """In the order of `rows`."""
        return np.concatenate([arrays["score_R"] for arrays in self.arrays(arm)])

    def resamples(self, number: int = metrics.RESAMPLES) -> Resamples:
        return Resamples.draw(len(self.draws[0].users), self.draws[0].items.num_rows, number)

    def validated(self) -> dict[Arm, float]:
        """AUC of the validation days' rows of items without a row before the day."""
        rows, alone = self.rows(), self.resamples(0)
        mask = (rows.day_R < 0) & (rows.seen_R == 0)
        return {arm: float(measured(rows, self.scores(arm), mask, alone)["pooled_auc"][0]) for arm in self.outputs}


def compare(found: Measurement) -> dict[str, Any]:
    """The arms as the validation items choose them, on the judged rows."""
    validated, rows, resamples, alone = found.validated(), found.rows(), found.resamples(), found.resamples(0)
    hidden = max((arm for arm in validated if arm.hidden and not arm.text), key=validated.__getitem__)
    with_text = max((arm for arm in validated if arm.text), key=validated.__getitem__)
    judged_R = rows.day_R >= 0
    rows = rows.where(judged_R)
    arms = [Arm(), Arm(text=True), hidden, Arm(text=True, hidden=hidden.hidden)]
    scores = {arm: found.scores(arm)[judged_R] for arm in arms}
    pairs = {"vectors": (with_text, Arm(hidden=with_text.hidden)), "hiding": (hidden, Arm()), "text": (Arm(text=True), Arm())}

    compared = {arm for pair in pairs.values() for arm in pair}

    def over(mask_R: Mask, group: str = "") -> dict[str, Any]:
        values = {arm: measured(rows, scores[arm], mask_R, resamples) for arm in compared}
        for arm in compared if group else ():
            values[arm]["ndcg10"] = metrics.ndcg(found.draws, found.arrays(arm), group, resamples)
        return {name: metrics.difference(values[after], values[before]) for name, (after, before) in pairs.items()}

    gains = {group: over(inside(rows.seen_R, group), group) for group in GROUPS}
    first, week_R, unseen_R = found.draws[0].first_judged, rows.day_R // 7, rows.seen_R == 0

    def part(mask_R: Mask) -> dict[str, Any]:
        return {"rows": int(mask_R.sum()), "all": over(mask_R), "unseen": over(mask_R & unseen_R)}

    weeks = [
        part(week_R == week)
        | {
            "from": str(date(1970, 1, 1) + timedelta(days=int(first + 7 * week))),
            "unseen_rows": int((unseen_R & (week_R == week)).sum()),
            "items": round(float(np.mean([len(np.unique(d.item_E[d.day_E < first + 7 * week])) for d in found.draws]))),
            "auc": float(measured(rows, scores[Arm()], week_R == week, alone)["pooled_auc"][0]),
        }
        for week in np.unique(week_R)
    ]
    return {
        "draws": len(found.draws),
        "validation_auc_unseen": {arm.name: value for arm, value in validated.items()},
        "chosen": {"hidden": hidden.name, "with_text": with_text.name},
        "rows": {group: int(inside(rows.seen_R, group).sum()) for group in GROUPS},
        "lists": {group: sum(group in one.sampled for draw in found.draws for one in draw.lists) for group in GROUPS},
        "gains": {name: {group: gains[group][name] for group in GROUPS} for name in pairs},
        "weeks": weeks,
        "users": {"new": part(rows.user_seen_R == 0), "returning": part(rows.user_seen_R > 0)},
        "arms": {
            arm.name: {"groups": metrics.of_groups(rows, scores[arm], alone)} | metrics.of_lists(found.draws, found.arrays(arm))
            for arm in arms
        },
    }


def measure(cfg: Config, name: str, folder: Path, workers: int, console: Console) -> dict[str, Any]:
    """All arms of a world: each share without vectors first, then the best one with them."""
    configs = [deliver(cfg, name, number, folder / f"{name}{number}") for number in range(DRAWS)]
    found = Measurement([Draw.read(each) for each in configs])
    cache = JobCache(folder / "jobs", f"{revision(*_FITTED_BY)}-{name}")
    params = [{"world": name, "config": each.model_dump(mode="json")} for each in configs]

    def run(arms: Sequence[Arm]) -> None:
        jobs = {
            arm: [Job(TABLE, f"{name}/{at}/{arm.name}", each | {"arm": asdict(arm)}) for at, each in enumerate(params)]
            for arm in arms  # So that the draws' first jobs, which ingest, are side by side.
        }
        outputs = follow([job for each in jobs.values() for job in each], {TABLE: fit_and_score}, cache, workers, console)
        found.outputs |= {arm: [outputs[job] for job in each] for arm, each in jobs.items()}

    run([Arm(), Arm(text=True), *(Arm(hidden=share) for share in SHARES)])
    run([Arm(text=True, hidden=max(SHARES, key=lambda share: found.validated()[Arm(hidden=share)]))])
    return compare(found)


def main(
    out: Annotated[Path, typer.Option(help="File of the results; worlds that are there already are kept.")],
    world: Annotated[list[str] | None, typer.Option(help="movielens or grocery; both by default.")] = None,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
) -> None:
    """Measure worlds one after another, and write after each."""
    console = Console()
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"gains": {}, "worlds": {}}
    for name in world or WORLDS:
        cfg = load(f"configs/{name}.toml", ["training.num_workers=1", *WORLDS[name].overrides])
        found = measure(cfg, name, WORK / TABLE, workers, console)
        results["gains"][name] = found["gains"].pop("vectors")
        results["worlds"][name] = found
        out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        console.print(name, results["gains"][name], found["gains"])


if __name__ == "__main__":
    typer.run(main)
