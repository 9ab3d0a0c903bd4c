"""Everything a training run needs to go on: tensors in safetensors, numbers in JSON, no pickles.

    state.json            phase, step, history, early stopping
    tensors.safetensors   network/…  average/…  optimizer/<parameter>/<moment>  best/…  twin/…

Random numbers need no place here: every draw is a function of (seed, step, rank).
"""

import json
import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from limaml.errors import TrainingError

Phase = Literal["twin", "refit", "done"]
Weights = dict[str, Tensor]


@dataclass
class Progress:
    """How far one fit is; plain values, as they stand in state.json."""

    step: int = 0
    """Outer steps done."""
    best_step: int = 0
    best_value: float | None = None
    stale: int = 0
    """Validations since the best one."""
    window: list[float] = field(default_factory=list)
    """Losses of the steps since the last history entry."""
    shrinkage: dict[str, float] = field(default_factory=dict)
    """What the priors' widths were multiplied with afterwards (`limaml.training.shrinkage`)."""
    prior_rows: dict[str, float] = field(default_factory=dict)
    """How many rows the prior counts as (the same)."""
    level: float = 0.0
    """What was added to all logits afterwards (`Validator.level`)."""
    history: list[dict[str, float]] = field(default_factory=list)

    def count_validation(self, value: float) -> bool:
        """Count a validation; whether it is the best so far. One without a value (one class only) is not, but the first."""
        value = -math.inf if math.isnan(value) else value
        better = self.best_value is None or value > self.best_value
        if better:
            self.best_step, self.best_value = self.step, value
        self.stale = 0 if better else self.stale + 1
        return better


@dataclass
class FitState:
    """One fit between two steps; without weights, one that is to begin."""

    progress: Progress = field(default_factory=Progress)
    network: Weights = field(default_factory=dict)
    average: Weights = field(default_factory=dict)
    """Moving average of `network`."""
    optimizer: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    best: Weights = field(default_factory=dict)
    """The average that validated best so far."""


@dataclass
class TrainState(FitState):
    """A run between two steps, or done: then `network` is the refit as it serves."""

    phase: Phase = "twin"
    twin: Weights = field(default_factory=dict)
    """Its best average, once the refit runs."""
    twin_progress: Progress | None = None


def copy_weights(network: nn.Module) -> Weights:
    """The network's weights on the CPU, untouched by later steps."""
    return {name: value.detach().cpu().clone() for name, value in network.state_dict().items()}


def save_state(state: TrainState, directory: str | Path) -> None:
    """Write the two files; Ray publishes the folder whole."""
    tensors: Weights = {}
    for part in ("network", "average", "best", "twin"):
        tensors |= {f"{part}/{name}": value.contiguous() for name, value in getattr(state, part).items()}
    for index, moments in state.optimizer.items():
        tensors |= {f"optimizer/{index}/{name}": value.detach().cpu().contiguous() for name, value in moments.items()}
    values = {
        "phase": state.phase,
        "progress": asdict(state.progress),
        "twin_progress": asdict(state.twin_progress) if state.twin_progress else None,
    }
    save_file(tensors, str(Path(directory) / "tensors.safetensors"))
    (Path(directory) / "state.json").write_text(json.dumps(values))


def load_state(directory: str | Path) -> TrainState:
    """Inverse of `save_state`. Raises TrainingError if the checkpoint cannot be read."""
    try:
        values = json.loads((Path(directory) / "state.json").read_text())
        tensors = load_file(str(Path(directory) / "tensors.safetensors"))
        state = TrainState(Progress(**values["progress"]), phase=values["phase"])
        state.twin_progress = Progress(**values["twin_progress"]) if values["twin_progress"] else None
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise TrainingError(
            f"checkpoint {directory} must hold state.json and tensors.safetensors as training wrote them: {error!r}; "
            "delete its run's folder under training.storage_path to start again"
        ) from error
    for key, value in tensors.items():
        part, _, name = key.partition("/")
        if part == "optimizer":
            index, _, moment = name.partition("/")
            state.optimizer.setdefault(int(index), {})[moment] = value
        else:
            getattr(state, part)[name] = value
    return state


def optimizer_state(optimizer: torch.optim.Optimizer) -> dict[int, dict[str, Tensor]]:
    """Moments and step counts by parameter number."""
    state: dict[int, dict[str, Tensor]] = optimizer.state_dict()["state"]
    return state


def restore_optimizer(optimizer: torch.optim.Optimizer, state: dict[int, dict[str, Tensor]]) -> None:
    """Put moments back; rates and decays stay those of the configuration."""
    groups: list[dict[str, Any]] = optimizer.state_dict()["param_groups"]
    optimizer.load_state_dict({"state": state, "param_groups": groups})
