"""Rivals on the project's global block: without personalisation, and with an embedding for every user id."""

from collections.abc import Sequence
from itertools import product

import torch

from experiments.methods.fitted import Design, Fitted
from experiments.methods.support_size_bands import BANDS, Choice, band_tasks, by_band, choose_by_band
from experiments.origin_data import OriginData
from limaml.config import Config
from limaml.evaluation.rival_networks import GlobalMlp, WideDeep
from limaml.evaluation.scoring_method import Floats, MethodInput, MethodValidator
from limaml.evaluation.trained_baselines import fit_vectors, score_as_trained, score_with_vectors, train
from limaml.tasks.sampling import TaskRows, TaskSpec

RATES = (0.1, 0.3, 1.0, 3.0, 10.0)
STEPS = (0, 1, 3, 10, 30)
"""0 keeps the vector that training left, the unknown user's for a new one."""


def global_mlp(data: OriginData, design: Design, seed: int) -> Fitted:
    """The global block alone."""
    cfg = data.configured(design, seed)
    validator = MethodValidator(data.validation, cfg)
    score = score_as_trained(train(cfg, GlobalMlp(cfg, data.encoder.dims), data.training.rows, validator))
    return Fitted(score, validator.auc_of(score))


def user_id(data: OriginData, design: Design, seed: int) -> Fitted:
    """Wide and deep; a user's vector is fitted on its support, with what validates best for its band of support size."""
    cfg = data.configured(design, seed)
    validator = MethodValidator(data.validation, cfg)
    model = train(cfg, WideDeep(cfg, data.encoder.dims), data.training.rows, validator)
    chosen = _choose(cfg, model, data.validation)

    def score(inputs: MethodInput, specs: Sequence[TaskSpec]) -> Floats:
        return score_with_vectors(model, inputs, specs, _vectors(cfg, model, inputs.rows, specs, chosen))

    return Fitted(score, validator.auc_of(score), notes={"choices": [dict(choice) for choice in chosen]})


def _choose(cfg: Config, model: WideDeep, validation: MethodInput) -> list[Choice]:
    choices = [{"rate": rate, "steps": steps} for rate, steps in product(RATES, STEPS)]
    return choose_by_band(
        validation.rows,
        band_tasks(validation.rows, cfg),
        choices,
        lambda specs, choice: score_with_vectors(
            model, validation, specs, _vectors(cfg, model, validation.rows, specs, [choice] * len(BANDS))
        ),
    )


def _vectors(cfg: Config, model: WideDeep, rows: TaskRows, specs: Sequence[TaskSpec], chosen: Sequence[Choice]) -> torch.Tensor:
    """(T, V) each task's vector, fitted as its band chose."""
    with torch.no_grad():
        vector_TV = model.vectors(torch.from_numpy(rows.entity_index[[spec.entity for spec in specs]]))
    for band, positions in by_band(specs).items():
        if band < 0 or not chosen[band]["steps"]:
            continue
        rate, steps = chosen[band]["rate"], chosen[band]["steps"]
        vector_TV[positions] = fit_vectors(cfg, model, rows, [specs[at] for at in positions], rate, (steps,))[steps]
    return vector_TV
