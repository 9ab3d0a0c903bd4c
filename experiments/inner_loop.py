"""Does the inner loop hold on any table? One set of defaults, no tuning, on every world: adapted embeddings beside the prior.

    python -m experiments.inner_loop --out experiments/results/inner_loop.json [--world NAME ...] [--kuairand FOLDER]

Of each world's configuration only the data, the features and the split are taken; the model, the inner loop and training are
the defaults. Judged are the rows that the split judges as a daily refresh serves them, once with each task's embedding and once
with the prior for everybody, by the same network: pooled AUC, and AUC within a task (a user's day), which a level that follows
the user from day to day cannot move.
"""

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
import typer
from rich.console import Console

from experiments.data import TODAY
from experiments.evidence.fit_data import FitData
from experiments.evidence.worlds import KUAIRAND_FILES, RETURNING, Origin, ingested
from limaml import metrics
from limaml.config import Config, FeatureConfig, MetaConfig, ModelConfig, TrainingConfig, load
from limaml.events.sources import open_source
from limaml.features.encoder import Encoder
from limaml.models.network import Network
from limaml.tasks.protocols import as_served, query_rows
from limaml.tasks.sampling import TaskRows, TaskSpec
from limaml.training.checkpoint import Progress
from limaml.training.scoring import embed_specs, score_with_embeddings
from limaml.training.twin_and_refit import fit_twin

Floats = npt.NDArray[np.float64]


def worlds(kuairand: str) -> dict[str, Config]:
    """Name -> its configuration: what is public in packages, what is generated, and KuaiRand where its folder is given."""
    found = {"movielens": load("configs/movielens.toml"), "grocery": load("configs/grocery.toml")}
    if kuairand:
        found["kuairand"] = load("configs/kuairand.toml", [f"source.path={kuairand}", *KUAIRAND_FILES])
    for rate in (0.01, 0.1, 0.5):
        for scale in (0.1, 1.0, 10.0):
            own = RETURNING | {"synthetic_label_rate": rate, "synthetic_vector_scale": scale}
            overrides = [f"source.{key}={value}" for key, value in own.items()]
            cfg = load("configs/synthetic.toml", [*overrides, "evaluation.held_out=hash"])
            found[f"synthetic_{rate:g}_{scale:g}"] = with_vector(cfg)
    return found


@dataclass(frozen=True)
class Fitted:
    """A world's twin, and the tasks that its split judges as a daily refresh serves them."""

    network: Network
    progress: Progress
    logged: pa.Table
    rows: TaskRows
    encoder: Encoder
    """What `rows` are encoded with."""
    specs: Sequence[TaskSpec]
    train_seconds: float


def fit_world(cfg: Config, root: str) -> Fitted:
    """Ingest into `root`, if it is not yet, and train the twin."""
    cfg = ingested(cfg, Path(root))
    data = FitData(cfg, Origin.read(cfg, open_source(cfg, TODAY).days()[-1]))
    started = time.monotonic()
    network, progress = fit_twin(cfg, data.training.rows, data.encoder.dims, data.network_validator)
    seconds = time.monotonic() - started
    rows, support_rows = data.test.rows, cfg.support_rows_of(cfg.task_kind.name)
    specs = as_served(rows, from_us=data.origin.split.validation_end_us, support_rows=support_rows)
    return Fitted(network, progress, data.origin.logged, rows, data.encoder, specs, seconds)


def measure(cfg: Config, root: str, training: TrainingConfig | None = None) -> dict[str, Any]:
    """Train the twin with the defaults (`training`: another one's steps), and judge it with and without adaptation."""
    started = time.monotonic()
    defaults = {"model": ModelConfig(), "meta": MetaConfig(), "training": training or TrainingConfig(num_workers=1)}
    fitted = fit_world(cfg.model_copy(update=defaults), root)
    network, progress, rows, specs = fitted.network, fitted.progress, fitted.rows, fitted.specs
    queries = query_rows(rows, specs)
    task_R = np.repeat(np.arange(len(specs)), [len(spec.query) for spec in specs])
    embedding_TD = embed_specs(network, rows, specs)
    prior_TD = network.priors()[network.kind].detach().expand(len(specs), -1)
    adapted, prior = (score_with_embeddings(network, rows, specs, each) for each in (embedding_TD, prior_TD))
    return {
        "rows": len(queries),
        "label_rate": float(queries.labels.mean()),
        "rows_with_support": float((queries.support_sizes > 0).mean()),
        "best_step": progress.best_step,
        "shrinkage": progress.shrinkage,
        "finite": bool(torch.isfinite(embedding_TD).all()),
        "points": {
            name: {"prior": before, "adapted": after, "gain": after - before}
            for name, before, after in _aucs(queries.labels, prior, adapted, task_R, len(specs))
        },
        "seconds": round(time.monotonic() - started, 1),
    }


def _aucs(labels: Floats, prior: Floats, adapted: Floats, task_R: Any, num_tasks: int) -> Iterator[tuple[str, float, float]]:
    """What is measured, and both values, in points."""
    yield "pooled", 100 * metrics.auc(labels, prior), 100 * metrics.auc(labels, adapted)
    before, after = (metrics.mean_per_user_auc(labels, scores, task_R, num_tasks) for scores in (prior, adapted))
    yield "within_task", 100 * before, 100 * after


def with_vector(cfg: Config) -> Config:
    declared = {"entity": "item", "name": "taste_vector", "type": "vector", "encoder": "generated-1", "licence": "none"}
    vector = FeatureConfig.model_validate(declared | {"width": cfg.source.synthetic_factors})
    return cfg.model_copy(update={"features": (*cfg.features, vector)})


def main(
    out: Annotated[Path, typer.Option(help="File of the results; worlds that are there already are kept.")],
    world: Annotated[list[str] | None, typer.Option(help="One of the worlds; all by default.")] = None,
    kuairand: Annotated[str, typer.Option(help="Folder with KuaiRand's tables; without it that world is not measured.")] = "",
    work: Annotated[str, typer.Option(help="Folder for ingested data, which is then kept.")] = "",
) -> None:
    """Measure worlds one after another, and write after each."""
    console, results = Console(), json.loads(out.read_text()) if out.exists() else {}
    known = worlds(kuairand)
    for name in world or known:
        with TemporaryDirectory() as folder:
            found = measure(known[name], f"{work}/{name}" if work else folder)
        results[name] = found
        out.write_text(json.dumps(results, indent=1, sort_keys=True) + "\n")
        console.print(name, found)


if __name__ == "__main__":
    typer.run(main)
