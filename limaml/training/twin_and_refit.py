"""The network's two fits: the twin until validation stops improving, then the refit for as many steps.

twin    fitted on the split's training rows, judged by evaluation
refit   fitted on all rows, same configuration, the twin's best number of steps; it is what serves

Both begin from scratch, or where the champion's twin and refit are. Tasks are drawn from all training rows, old days included,
so a start from the champion replays what it has learned.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from limaml import telemetry
from limaml.config import Config
from limaml.features.encoder import EncoderDims
from limaml.meta.engine import outer_loss
from limaml.models.network import Network, build_network
from limaml.tasks.sampling import TaskRows
from limaml.training import shrinkage
from limaml.training.champion import Champion, champion_training, pull
from limaml.training.checkpoint import Progress, TrainState, copy_weights
from limaml.training.fit import Say, fit
from limaml.training.step import OuterObjective, Workers, meta_batches
from limaml.training.validation import OBJECTIVE, Validator
from limaml.training.warm_start import start_from_champion, warm_start

_LEVEL_ROUNDS, _LEVEL_TOLERANCE = 20, 1e-4
"""Of the shift of all logits (`settle`), in logits."""

_log = telemetry.get_logger(__name__)


def log_how_far(how_far: dict[str, Any]) -> None:
    _log.info("training", **how_far)


@dataclass(frozen=True)
class TrainingData:
    """Rows of both fits, each with the widths of its own encoder."""

    twin_rows: TaskRows
    twin_dims: EncoderDims
    validator: Validator
    refit_rows: TaskRows
    refit_dims: EncoderDims


def train_twin_and_refit(
    cfg: Config,
    data: TrainingData,
    workers: Workers,
    device: torch.device,
    *,
    resume: TrainState | None,
    save: Callable[[TrainState], None],
    say: Say = log_how_far,
    champion: Champion | None = None,
) -> TrainState:
    """Run both fits, or what is left of them after `resume`; `save` and `say` as of `fit`, with the phase.

    With `champion` the encoders behind `data` are its own, grown (`fit_encoders`).

    Returns the state of phase "done": `twin` and `network` (the refit) are the two networks' weights.
    """
    state = resume or TrainState()
    training = cfg.training if champion is None else champion_training(cfg.training)

    def fitted(rows: TaskRows, dims: EncoderDims, start: Network | None, **how: Any) -> tuple[Network, Progress]:
        network, penalty = build_network(cfg, dims, cfg.training.seed), None
        if start is not None and cfg.training.champion_pull:
            penalty = pull(start, cfg.training.champion_pull)
        if not state.network and start is not None:
            start_from_champion(network, start, rows, cfg)
        elif not state.network:
            warm_start(network, rows, cfg)
        network.to(device)
        how |= {"save": lambda at: save(replace(state, **vars(at))), "say": lambda far: say({"phase": state.phase, **far})}
        objective = network_objective(network, rows, cfg, workers, penalty)
        return fit(network, training, objective, workers=workers, state=state, **how)

    if state.phase == "twin":
        start = None if champion is None else champion.twin.network
        twin, progress = fitted(
            data.twin_rows, data.twin_dims, start, validate=lambda average: data.validator(average, workers)
        )
        if champion is not None:
            shrinkage.undo(twin, champion.shrinkage)
        settle(cfg, twin, progress, data.validator, workers)
        state = TrainState(phase="refit", twin=copy_weights(twin), twin_progress=progress)
    if state.phase == "refit":
        assert state.twin_progress is not None
        start = None if champion is None else champion.refit.network
        refit, progress = fitted(data.refit_rows, data.refit_dims, start, num_steps=state.twin_progress.best_step)
        if champion is not None:
            shrinkage.undo(refit, champion.shrinkage)
        shrinkage.apply(refit, state.twin_progress.shrinkage)
        shrinkage.apply_prior_rows(refit, state.twin_progress.prior_rows)
        refit.global_block.shift(state.twin_progress.level)
        state = TrainState(progress, copy_weights(refit), phase="done", twin=state.twin, twin_progress=state.twin_progress)
        save(state)
    return state


def fit_twin(cfg: Config, rows: TaskRows, dims: EncoderDims, validator: Validator) -> tuple[Network, Progress]:
    """The twin alone, by this process, with no checkpoints: the network that validates best, and how its training went."""
    network, alone = build_network(cfg, dims, cfg.training.seed), Workers()
    warm_start(network, rows, cfg)
    objective = network_objective(network, rows, cfg, alone)
    twin, progress = fit(network, cfg.training, objective, validate=lambda average: validator(average, alone), say=log_how_far)
    settle(cfg, twin, progress, validator, alone)
    return twin, progress


def settle(cfg: Config, twin: Network, progress: Progress, validator: Validator, workers: Workers) -> None:
    """Choose on the rows that validate what training leaves open; the refit gets the same.

    How wide Newton's prior is, how many rows the prior counts as and, where pairs alone were trained on, the level of all
    logits.
    """
    progress.shrinkage = shrinkage.choose(twin, lambda: validator(twin, workers)[OBJECTIVE])
    progress.prior_rows = shrinkage.choose_prior_rows(twin, lambda: validator.of_few_rows(twin, workers))
    if cfg.meta.pairwise_share == 1.0:
        # Supports are adapted on shifted logits, too, and take back some of it: a few rounds until nothing is left.
        for _ in range(_LEVEL_ROUNDS):
            by = validator.level(twin, workers)
            twin.global_block.shift(by)
            progress.level += by
            if abs(by) < _LEVEL_TOLERANCE:
                break


def network_objective(
    network: Network, rows: TaskRows, cfg: Config, workers: Workers, penalty: Callable[[nn.Module], Tensor] | None = None
) -> OuterObjective:
    """Adapt on the supports, lose on the queries; `penalty` is of the weights."""
    return OuterObjective(meta_batches(rows, cfg, workers, next(network.parameters())), outer_loss, penalty=penalty)
