"""One kind of task or two? Users adapted, items adapted, and both, on the same rows, as a daily refresh serves them.

    python -m experiments.kinds --out experiments/results/kinds.json [--world NAME ...]

Each world keeps its configuration, its model and its split; only the kinds differ, and every kind takes Newton's step, whose
prior is shrunk on the rows that validate. Differences are paired over users.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import pyarrow.compute as pc
import typer
from rich.console import Console

from experiments.inner_loop import Fitted, Floats, fit_world, worlds
from limaml.config import Config, TaskKindConfig
from limaml.metrics import Bootstrap, Ints, auc, draw_users, interval, mean_per_user_auc
from limaml.training.scoring import embed_others, embed_specs, score_specs

USER = TaskKindConfig(name="user", entity_column="user_id")
ITEM = TaskKindConfig(name="item", entity_column="item_id", support_rows=64, prior_std=0.3)
ARMS = {"user": (USER,), "item": (ITEM,), "both": (USER, ITEM)}
_DRAWS = 1000


@dataclass(frozen=True)
class Judged:
    """Rows of a table of events, in its order, and their scores."""

    row_R: Ints
    score_R: Floats


def measure(cfg: Config, root: str) -> dict[str, Any]:
    """All arms of a world: their values, each arm less users alone with intervals, and what each costs."""
    found, judged, fitted = {}, {}, None
    for name, kinds in ARMS.items():
        meta = cfg.meta.model_copy(update={"inner_step": "newton"})
        fitted = fit_world(cfg.model_copy(update={"task_kinds": kinds, "meta": meta}), root)
        judged[name] = _judge(fitted)
        found[name] = _costs(fitted)
    assert fitted is not None
    rows = np.array(sorted(set.intersection(*(set(each.row_R.tolist()) for each in judged.values()))))
    labels = fitted.logged["label"].to_numpy()[rows].astype(np.float64)
    user_R = pc.dictionary_encode(fitted.logged["user_id"]).combine_chunks().indices.to_numpy()[rows]
    _, user_R = np.unique(user_R, return_inverse=True)
    scores = {name: each.score_R[np.searchsorted(each.row_R, rows)] for name, each in judged.items()}
    num_users = int(user_R.max()) + 1
    bootstrap = Bootstrap(user_R, draw_users(num_users, draws=_DRAWS, seed=0))

    def pooled(score_R: Floats) -> tuple[float, Floats]:
        return auc(labels, score_R), bootstrap.pooled_auc(labels, score_R)

    def per_user(score_R: Floats) -> tuple[float, Floats]:
        return mean_per_user_auc(labels, score_R, user_R, num_users), bootstrap.per_user_auc(labels, score_R)

    for metric, of in {"pooled": pooled, "per_user": per_user}.items():
        measured = {name: of(score_R) for name, score_R in scores.items()}
        for name, (value, draws_B) in measured.items():
            base, base_B = measured["user"]
            gain = interval(100 * (value - base), 100 * (draws_B - base_B))
            found[name][metric] = {"auc": 100 * value, "over_user": gain.as_dict()}
    return {"rows": len(rows), "users": num_users, "arms": found}


def _judge(fitted: Fitted) -> Judged:
    scores = score_specs(fitted.network, fitted.rows, fitted.specs)
    row_R = fitted.rows.source_row[np.concatenate([spec.query for spec in fitted.specs])]
    order = np.argsort(row_R)
    return Judged(row_R[order], scores[order])


def _costs(fitted: Fitted) -> dict[str, Any]:
    """Seconds of a training step, and of adapting what the last day's rows are scored with."""
    last = max(spec.as_of_us for spec in fitted.specs)
    specs = [spec for spec in fitted.specs if spec.as_of_us == last]
    started = time.monotonic()
    embed_specs(fitted.network, fitted.rows, specs)
    others = embed_others(fitted.network, fitted.rows, specs)
    seconds = time.monotonic() - started
    return {
        "best_step": fitted.progress.best_step,
        "shrinkage": fitted.progress.shrinkage,
        "train_seconds": round(fitted.train_seconds, 1),
        "last_day_tasks": len(specs) + sum(len(each.entity_U) for each in others.values()),
        "last_day_seconds": round(seconds, 3),
    }


def main(
    out: Annotated[Path, typer.Option(help="File of the results; worlds that are there already are kept.")],
    world: Annotated[list[str] | None, typer.Option(help="movielens or grocery; both by default.")] = None,
    work: Annotated[str, typer.Option(help="Folder for ingested data, which is then kept.")] = "",
    max_steps: Annotated[int | None, typer.Option(help="Of training; the configured ones by default.")] = None,
) -> None:
    """Measure worlds one after another, and write after each."""
    console, results, known = Console(), json.loads(out.read_text()) if out.exists() else {}, worlds("")
    for name in world or ("movielens", "grocery"):
        cfg, steps = known[name], max_steps or known[name].training.max_steps
        training = {
            "num_workers": 1,
            "max_steps": steps,
            "validate_every": min(cfg.training.validate_every, max(steps // 8, 1)),
        }
        cfg = cfg.model_copy(update={"training": cfg.training.model_copy(update=training)})
        with TemporaryDirectory() as folder:
            found = measure(cfg, f"{work}/{name}" if work else folder)
        results[name] = found | {"max_steps": steps}
        out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        console.print(name, found)


if __name__ == "__main__":
    typer.run(main)
