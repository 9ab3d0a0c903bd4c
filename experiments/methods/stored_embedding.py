"""LiMAML with stored embeddings: the network as the project trains and serves it."""

from collections.abc import Sequence

from experiments.methods.fitted import Design, Fitted
from experiments.origin_data import OriginData
from limaml.evaluation.scoring_method import Floats, MethodInput
from limaml.tasks.sampling import TaskSpec
from limaml.training.scoring import score_specs, score_with_embeddings
from limaml.training.twin_and_refit import fit_twin
from limaml.training.validation import Validator


def stored(data: OriginData, design: Design, seed: int) -> Fitted:
    cfg = data.configured(design, seed)
    network, progress = fit_twin(cfg, data.training.rows, data.encoder.dims, Validator(data.validation.rows, cfg))

    prior_D = network.priors()[network.kind].detach()

    def score(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return score_specs(network, inputs.rows, specs)

    def prior(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return score_with_embeddings(network, inputs.rows, specs, prior_D.expand(len(specs), -1))

    return Fitted(score, progress.best_value or 0.0, prior, {"best_step": progress.best_step})
