"""LiMAML with stored embeddings: the network as the project trains and serves it."""

from collections.abc import Sequence

from experiments.cases import OriginData
from experiments.methods.fitted import Design, Fitted, configured
from limaml.evaluation.judged import Floats, JudgedRows
from limaml.tasks.sampling import TaskSpec
from limaml.training.loop import fit_twin
from limaml.training.scoring import score_specs, score_with_embeddings
from limaml.training.validation import Validator


def stored(data: OriginData, design: Design, seed: int) -> Fitted:
    cfg = configured(data, design, seed)
    network, progress = fit_twin(cfg, data.training.rows, data.encoder.dims, Validator(data.validation.rows, cfg))

    prior_D = network.prior().detach()

    def score(judged: JudgedRows, specs: Sequence[TaskSpec]) -> Floats:
        return score_specs(network, judged.rows, specs)

    def prior(judged: JudgedRows, specs: Sequence[TaskSpec]) -> Floats:
        return score_with_embeddings(network, judged.rows, specs, prior_D.expand(len(specs), -1))

    return Fitted(score, progress.best_value or 0.0, prior, {"best_step": progress.best_step})
