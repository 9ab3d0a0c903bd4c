"""The version that serves, as the start of a training: its two networks and encoders, or the reason why it cannot be one.

The candidate's twin starts from the champion's twin and its refit from the champion's refit: a twin that started from a refit
would have seen the rows that judge it.
"""

import hashlib
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from limaml.config import Config, TrainingConfig
from limaml.config.features import SAID
from limaml.io.storage import Storage
from limaml.models import bundle as bundles
from limaml.models.network import Network
from limaml.registry import ModelVersion, Registry
from limaml.tasks.sampling import microseconds
from limaml.tasks.splits import Split

_MANIFEST = "manifest.json"
_SAID = (*SAID, "active_days", "max_lag_s", "when_stale")
"""What declarations of features and task kinds say that changes nothing of a training."""
_META = ("inner_step", "learn_inner_lr", "learn_damping")
"""Settings of [meta] that say which numbers a network has."""
_SPLIT = ("held_out", "held_out_users", "train_share_of_users", "validation_share_of_users")
"""Settings of [evaluation] that say who trains."""


@dataclass(frozen=True)
class Champion:
    """A bundle that a training starts from."""

    twin: bundles.Model
    refit: bundles.Model
    config: Config
    lineage: Mapping[str, Any]
    shrinkage: Mapping[str, float]
    """What its priors' widths were multiplied with after its training."""


def read_champion(location: str | Path) -> Champion:
    """Read a bundle's folder or URL. Raises BundleError if it is not whole."""
    storage = Storage(str(location))
    with tempfile.TemporaryDirectory(prefix="limaml-champion-") as folder:
        copy_files(storage, Path(folder))
        found = bundles.load(folder)
    assert found.twin is not None
    training = found.metrics.get("training", {})
    return Champion(found.twin, found.refit, found.config, found.lineage, training.get("shrinkage", {}))


def copy_files(storage: Storage, folder: Path) -> None:
    """Copy all files of a storage to a local folder."""
    for name in storage.walk(""):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(storage.read_bytes(name))


def start_of(cfg: Config, registry: Registry, serving: ModelVersion | None, folder: Path) -> dict[str, str]:
    """What a training starts from by `training.start_from`: version and digest of the champion, or nothing.

    Its bundle is copied to `folder`. The digest is the SHA-256 of its manifest, which has those of all its files.
    """
    if cfg.training.start_from == "scratch" or serving is None:
        return {}
    bundle = registry.download(serving.version, folder)
    return {"version": serving.version, "digest": hashlib.sha256((bundle / _MANIFEST).read_bytes()).hexdigest()}


def why_not(champion: Champion, cfg: Config, split: Split) -> str | None:
    """Why a training by `cfg` cannot start from `champion`; None if it can."""
    for section, names in (("model", None), ("task_kinds", None), ("features", None), ("meta", _META), ("evaluation", _SPLIT)):
        theirs, mine = (_settings(each, section, names) for each in (champion.config, cfg))
        if different := [key for key in sorted(theirs.keys() | mine.keys()) if theirs.get(key) != mine.get(key)]:
            key = different[0]
            more = f" and {len(different) - 1} more" if different[1:] else ""
            return f"{section}.{key} must be the champion's, {theirs.get(key)!r}, got {mine.get(key)!r}{more}"
    ends = (("train_end", split.train_end_us), ("validation_end", split.validation_end_us))
    for name, mine_us in ends:
        if microseconds(datetime.fromisoformat(champion.lineage[name])) > mine_us:
            return (
                f"the champion's twin must have seen nothing of what judges this one, but its {name} "
                f"({champion.lineage[name]}) is later than this split's"
            )
    return None


def champion_training(cfg: TrainingConfig) -> TrainingConfig:
    """The settings of a fit that starts from a champion."""
    return cfg.model_copy(update={"max_steps": cfg.champion_steps})


def pull(champion: Network, strength: float) -> Callable[[nn.Module], Tensor]:
    """strength / 2 * squared distance of the trained weights from the champion's, where it has them (L2-SP, Li et al. 2018)."""
    anchors = {name: value.detach() for name, value in champion.named_parameters()}

    def penalty(network: nn.Module) -> Tensor:
        squares = [
            (weight[: len(anchors[name])] if weight.ndim else weight).sub(anchors[name].to(weight)).square().sum()
            for name, weight in network.named_parameters()
            if weight.requires_grad
        ]
        return 0.5 * strength * sum(squares[1:], squares[0])

    return penalty


def _settings(cfg: Config, section: str, names: tuple[str, ...] | None) -> dict[str, Any]:
    """Plain values by name; of a list of declarations those of each, by its own name, without what changes nothing."""
    values = cfg.model_dump(mode="json", include={section})[section]
    if isinstance(values, list):
        return {one["name"]: {key: value for key, value in one.items() if key not in _SAID} for one in values}
    return {key: value for key, value in values.items() if names is None or key in names}
