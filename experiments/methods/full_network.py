"""LiMAML without storing anything: trained with the full graph, and scored with each task's adapted network itself.

The outer loop, its meta-batches and its dropout are the project's, around another loss.
"""

from collections.abc import Sequence

import numpy as np
import torch

from experiments.evidence.fit_data import FitData
from experiments.methods.history import in_batches
from experiments.methods.rowwise import adapt_rowwise, full_loss, logits
from limaml.evaluation.scoring_method import Floats, MethodInput, ScoringMethod
from limaml.models.network import Network, build_network
from limaml.tasks.sampling import TaskRows, TaskSpec, build_batch
from limaml.training.checkpoint import Progress
from limaml.training.fit import fit
from limaml.training.step import OuterObjective, Workers, meta_batches
from limaml.training.validation import OBJECTIVE
from limaml.training.warm_start import warm_start


def full(data: FitData) -> tuple[ScoringMethod, Progress]:
    """The averaged network that validates best by its own scores, and how far it came."""
    cfg, rows, validator = data.cfg, data.training.rows, data.validator
    start = build_network(cfg, data.encoder.dims, cfg.training.seed)
    warm_start(start, rows, cfg)

    network, progress = fit(
        start,
        cfg.training,
        OuterObjective(meta_batches(rows, cfg, Workers(), next(start.parameters())), full_loss),
        validate=lambda average: {
            OBJECTIVE: validator.auc([full_scores(average, data.validation.rows, specs) for specs in validator.tasks])
        },
    )

    def score(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return full_scores(network, inputs.rows, specs)

    return score, progress


@torch.no_grad()
def full_scores(network: Network, rows: TaskRows, specs: Sequence[TaskSpec]) -> Floats:
    """(sum of queries,) probabilities of the specs' query rows by their tasks' adapted networks, one spec after another."""
    scores: Floats = np.empty(sum(len(spec.query) for spec in specs))
    for part, places in in_batches(specs):
        batch = build_batch(rows, part)
        block = adapt_rowwise(network, batch.support, batch.entity_index_T)
        scores[places] = torch.sigmoid(logits(network, block, batch.query)[batch.query.mask_TR > 0].double()).numpy()
    return scores
