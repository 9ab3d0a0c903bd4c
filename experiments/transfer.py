"""What helps items that nobody has touched: vectors of their text, and training rows without their item's history.

    python -m experiments.transfer --out experiments/results/transfer.json [--world NAME ...] [--draws 3]

Arms are chosen on rows of items without any before the day, from T1 to T2 and over all draws (`experiments.transfer_jobs`); all
rows from T2 on are judged as a daily refresh serves them, by an item's rows before the day. A fit is a job that is kept, and an
interrupted run goes on where it was.
"""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import date, timedelta
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console

from experiments import transfer_metrics as metrics
from experiments.cached_jobs import Job, JobCache, JobOutput
from experiments.code_digest import revision
from experiments.data import WORK
from experiments.progress import follow
from experiments.transfer_jobs import WORLDS, Arm, deliver, fit_and_score, read
from experiments.transfer_metrics import Ranking, Resamples, Rows, measured
from experiments.transfer_rows import GROUPS, Draw, inside
from limaml.config import Config, load
from limaml.metrics import Floats

TABLE = "transfer"
SHARES = (0.2, 0.5)
"""Of training rows without their item's history; one is chosen."""


@dataclass
class Measurement:
    """A world's draws, and the outputs of its arms in each."""

    draws: list[Draw]
    outputs: dict[Arm, list[JobOutput]]

    def rows(self, *, judged: bool) -> Rows:
        """Of the validation days or of the judged ones; those that every arm has scored."""
        events = []
        for number, draw in enumerate(self.draws):
            at = np.sort(next(iter(self.outputs.values()))[number].arrays["event"])
            events.append(at[(draw.day_E[at] >= draw.first_judged) == judged])
        return Rows.of(self.draws, events)

    def scores(self, arm: Arm, *, judged: bool) -> Floats:
        """In the order of `rows`."""
        parts = []
        for draw, output in zip(self.draws, self.outputs[arm], strict=True):
            order = np.argsort(output.arrays["event"])
            day = draw.day_E[output.arrays["event"][order]]
            parts.append(output.arrays["score_R"][order][(day >= draw.first_judged) == judged])
        return np.concatenate(parts)

    def rankings(self, arm: Arm) -> list[Ranking]:
        return [Ranking(*(output.arrays[name] for name in ("above", "top"))) for output in self.outputs[arm]]

    def validated(self) -> dict[Arm, float]:
        """AUC of the validation days' rows of items without a row before the day."""
        rows, alone = self.rows(judged=False), Resamples.draw(len(self.draws[0].users), self.draws[0].items.num_rows, 0)
        mask = rows.seen_R == 0
        return {
            arm: float(measured(rows, self.scores(arm, judged=False), mask, alone)["pooled_auc"][0]) for arm in self.outputs
        }


def compare(found: Measurement) -> dict[str, Any]:
    """The arms as the validation items choose them, on the judged rows."""
    validated = found.validated()
    hidden = max((arm for arm in validated if arm.hidden and not arm.text), key=validated.__getitem__)
    with_text = max((arm for arm in validated if arm.text), key=validated.__getitem__)
    rows, resamples = found.rows(judged=True), Resamples.draw(len(found.draws[0].users), found.draws[0].items.num_rows)
    arms = [Arm(), Arm(text=True), hidden, Arm(text=True, hidden=hidden.hidden)]
    scores = {arm: found.scores(arm, judged=True) for arm in arms}
    pairs = {"vectors": (with_text, Arm(hidden=with_text.hidden)), "hiding": (hidden, Arm()), "text": (Arm(text=True), Arm())}

    def over(mask_R: metrics.Mask, names: Sequence[str] = tuple(pairs), group: str | None = None) -> dict[str, Any]:
        wanted = {arm for name in names for arm in pairs[name]}
        values = {arm: measured(rows, scores[arm], mask_R, resamples) for arm in wanted}
        if group is not None:
            for arm in wanted:
                values[arm]["ndcg10"] = metrics.ndcg(found.draws, found.rankings(arm), group, resamples)
        return {name: metrics.difference(values[pairs[name][0]], values[pairs[name][1]]) for name in names}

    gains = {group: over(inside(rows.seen_R, group), group=group) for group in GROUPS}
    first = min(draw.first_judged for draw in found.draws)
    week_R, unseen_R = (rows.day_R - first) // 7, rows.seen_R == 0
    weeks = [
        {
            "from": str(date(1970, 1, 1) + timedelta(days=int(first + 7 * week))),
            "rows": int((week_R == week).sum()),
            "unseen_rows": int((unseen_R & (week_R == week)).sum()),
            "items": round(float(np.mean([len(np.unique(d.item_E[d.day_E < first + 7 * week])) for d in found.draws]))),
            "auc": float(measured(rows, scores[Arm()], week_R == week, resamples)["pooled_auc"][0]),
            "all": over(week_R == week),
            "unseen": over(unseen_R & (week_R == week)),
        }
        for week in np.unique(week_R)
    ]
    users = {"new": rows.user_seen_R == 0, "returning": rows.user_seen_R > 0}
    return {
        "draws": len(found.draws),
        "validation_auc_unseen": {arm.name: value for arm, value in validated.items()},
        "chosen": {"hidden": hidden.name, "with_text": with_text.name},
        "rows": {group: int(inside(rows.seen_R, group).sum()) for group in GROUPS},
        "lists": {group: sum(int(draw.lists.sampled[group].sum()) for draw in found.draws) for group in GROUPS},
        "gains": {name: {group: gains[group][name] for group in GROUPS} for name in pairs},
        "weeks": weeks,
        "users": {
            name: {"rows": int(mask.sum()), "all": over(mask), "unseen": over(mask & unseen_R)} for name, mask in users.items()
        },
        "arms": {
            arm.name: {"groups": _of_groups(rows, scores[arm])} | metrics.of_lists(found.draws, found.rankings(arm))
            for arm in arms
        },
    }


def _of_groups(rows: Rows, score_R: Floats) -> dict[str, Any]:
    alone = Resamples(*(np.ones((1, int(each.max()) + 1)) for each in (rows.user_R, rows.item_R)))
    found = metrics.calibration(rows, score_R)
    aucs = {group: measured(rows, score_R, inside(rows.seen_R, group), alone)["pooled_auc"][0] for group in GROUPS}
    return {group: {"pooled_auc": float(aucs[group])} | values for group, values in found.items()}


def measure(cfg: Config, name: str, num_draws: int, folder: Path, workers: int, console: Console) -> dict[str, Any]:
    """All arms of a world: each share without vectors first, then the best one with them."""
    mark = f"{revision('transfer_jobs', 'transfer_rows', 'inner_loop')}-{name}"
    roots = [folder / f"{name}{number}" for number in range(num_draws)]
    configs = [deliver(cfg, name, number, root) for number, root in enumerate(roots)]
    found = Measurement([read(each, root) for each, root in zip(configs, roots, strict=True)], {})
    cache_of_jobs = JobCache(folder / "jobs", mark)

    def run(arms: Sequence[Arm]) -> None:
        shared = [
            {"world": name, "folder": str(root), "config": each.model_dump(mode="json")}
            for root, each in zip(roots, configs, strict=True)
        ]
        jobs = {
            (number, arm): Job(TABLE, f"{name}/{number}/{arm.name}", params | {"arm": asdict(arm)})
            for arm in arms  # So that the draws' first jobs, which ingest, are side by side.
            for number, params in enumerate(shared)
        }
        outputs = follow(list(jobs.values()), {TABLE: fit_and_score}, cache_of_jobs, workers, console)
        found.outputs |= {arm: [outputs[jobs[number, arm]] for number in range(num_draws)] for arm in arms}

    run([Arm(), Arm(text=True), *(Arm(hidden=share) for share in SHARES)])
    run([Arm(text=True, hidden=max(SHARES, key=lambda share: found.validated()[Arm(hidden=share)]))])
    return compare(found)


def main(
    out: Annotated[Path, typer.Option(help="File of the results; worlds that are there already are kept.")],
    world: Annotated[list[str] | None, typer.Option(help="movielens or grocery; both by default.")] = None,
    draws: Annotated[int, typer.Option(help="Draws of new items.")] = 3,
    workers: Annotated[int, typer.Option(help="Processes, one thread each.")] = 1,
) -> None:
    """Measure worlds one after another, and write after each."""
    console = Console()
    results: dict[str, Any] = json.loads(out.read_text()) if out.exists() else {"gains": {}, "worlds": {}}
    for name in world or WORLDS:
        cfg = load(f"configs/{name}.toml", ["training.num_workers=1", *WORLDS[name].overrides])
        found = measure(cfg, name, draws, WORK / TABLE, workers, console)
        results["gains"][name] = found["gains"].pop("vectors")
        results["worlds"][name] = found
        out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        console.print(name, results["gains"][name], found["gains"])


if __name__ == "__main__":
    typer.run(main)
