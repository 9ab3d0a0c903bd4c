"""A model version as a folder: weights as safetensors, everything else as JSON; loading one cannot run code (contract 2).

    manifest.json            format version, SHA-256 of every other file, lineage (data days and revisions, code revision)
    config.json              the resolved configuration
    metrics.json             what was measured on the twin
    card.json                data and encoders with their terms, features, evaluation by group, limits (limaml.governance.card)
    prior.safetensors        task kind -> embedding of an empty support, of the refit
    refit.safetensors        the network that serves, trained on all rows     refit.encoder.json   its encoder
    twin.safetensors         the network that was judged, trained on the split's rows     twin.encoder.json   its encoder

The same bundle gives the same bytes. A folder appears whole or not at all.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import load as load_tensors
from safetensors.torch import save as save_tensors
from torch import Tensor

from limaml.config import Config
from limaml.errors import BundleError
from limaml.features.encoder import Encoder
from limaml.io import atomic
from limaml.models import older_bundles
from limaml.models.network import Network, build_network

FORMAT_VERSION = 4
_READS = (2, 3, FORMAT_VERSION)
REFIT = "refit"
TWIN = "twin"
_REMEDY = "download the version again or train a new one"


@dataclass(frozen=True)
class Model:
    """A network and the encoder its rows go through."""

    network: Network
    encoder: Encoder


@dataclass(frozen=True)
class Bundle:
    """One model version."""

    config: Config
    refit: Model
    twin: Model | None = None
    """None if only the refit was loaded."""
    metrics: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    card: dict[str, Any] = field(default_factory=dict)
    """Empty of a bundle of format 2."""

    @property
    def network(self) -> Network:
        return self.refit.network

    @property
    def encoder(self) -> Encoder:
        return self.refit.encoder

    @property
    def prior(self) -> dict[str, Tensor]:
        """Task kind -> (D,) embedding of an empty support."""
        return _prior(self.refit.network)

    def with_items(self, items: pa.Table | None) -> "Bundle":
        """With the known items' vectors (`schema.Tables.item_vectors`), which are no part of a version: where a vector is
        declared, its encoders need them to encode rows.
        """
        refit, twin = (model and replace(model, encoder=model.encoder.with_items(items)) for model in (self.refit, self.twin))
        assert refit is not None
        return replace(self, refit=refit, twin=twin)

    def with_metrics(self, metrics: dict[str, Any]) -> "Bundle":
        return replace(self, metrics=metrics)


def save(bundle: Bundle, directory: str | Path) -> None:
    """Write the bundle's folder under a temporary name and rename it; a folder that is there already is replaced.

    Raises BundleError if the twin is not loaded or a weight is not finite.
    """
    directory = Path(directory)
    if bundle.twin is None:
        raise BundleError(
            f"bundle {directory} must be saved with its twin, got a refit alone; load it with parts=('refit', 'twin')"
        )
    files = _model_files(REFIT, bundle.refit) | _model_files(TWIN, bundle.twin)
    files["prior.safetensors"] = save_tensors({kind: value.detach().clone() for kind, value in bundle.prior.items()})
    files["config.json"] = _json(bundle.config.model_dump(mode="json"))
    files["metrics.json"] = _json(bundle.metrics)
    files["card.json"] = _json(bundle.card)
    hashes = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["manifest.json"] = _json({"format_version": FORMAT_VERSION, "sha256": hashes, "lineage": bundle.lineage})
    with atomic.replacing_folder(directory) as folder:
        for name, data in files.items():
            (folder / name).write_bytes(data)


def load(directory: str | Path, parts: Sequence[str] = (REFIT, TWIN)) -> Bundle:
    """Read and check a bundle; `parts=("refit",)` reads what a server needs.

    Raises BundleError for a missing or corrupt file, weights of another shape or not finite, and another format.
    """
    directory = Path(directory)
    manifest = _read_manifest(directory)
    files = _Files(directory, manifest["sha256"])
    written = manifest["format_version"]
    config = _read_config(files, written)
    refit = _read_model(files, REFIT, config, written)
    _check_prior(files, refit.network)
    return Bundle(
        config=config,
        refit=refit,
        twin=_read_model(files, TWIN, config, written) if TWIN in parts else None,
        metrics=files.json("metrics.json"),
        lineage=manifest.get("lineage", {}),
        card={} if written == older_bundles.FIRST else files.json("card.json"),
    )


class _Files:
    """Files of one folder, each checked against the manifest's checksum as it is read."""

    def __init__(self, directory: Path, hashes: dict[str, str] | None) -> None:
        self.directory = directory
        self._hashes = hashes

    def bytes(self, name: str) -> bytes:
        try:
            data = (self.directory / name).read_bytes()
        except FileNotFoundError:
            raise BundleError(f"bundle {self.directory} must hold {name}, which is missing; {_REMEDY}") from None
        if self._hashes is not None:
            expected, found = self._hashes.get(name), hashlib.sha256(data).hexdigest()
            if found != expected:
                raise BundleError(
                    f"bundle {self.directory}: {name} must have its manifest's SHA-256 {expected}, got {found}; {_REMEDY}"
                )
        return data

    def json(self, name: str) -> Any:
        try:
            return json.loads(self.bytes(name))
        except ValueError as error:
            raise BundleError(f"bundle {self.directory}: {name} must be JSON: {error}; {_REMEDY}") from None

    def tensors(self, name: str) -> dict[str, Tensor]:
        try:
            tensors: dict[str, Tensor] = load_tensors(self.bytes(name))
        except SafetensorError as error:
            raise BundleError(f"bundle {self.directory}: {name} must be a safetensors file: {error}; {_REMEDY}") from None
        return tensors


def _read_manifest(directory: Path) -> dict[str, Any]:
    manifest: dict[str, Any] = _Files(directory, None).json("manifest.json")
    version = manifest.get("format_version") if isinstance(manifest, dict) else None
    if not isinstance(version, int) or not isinstance(manifest.get("sha256"), dict):
        raise BundleError(f"bundle {directory}: manifest.json must hold format_version and sha256; {_REMEDY}")
    if version not in _READS:
        remedy = "update limaml to read it" if version > FORMAT_VERSION else "train a new version with this limaml"
        raise BundleError(f"bundle {directory}: format_version must be one of {list(_READS)}, got {version}; {remedy}")
    return manifest


def _read_config(files: _Files, written: int) -> Config:
    values = files.json("config.json")
    try:
        return Config.model_validate(older_bundles.config_of_format_2(values) if written == older_bundles.FIRST else values)
    except ValidationError as error:
        raise BundleError(f"bundle {files.directory}: config.json is not a valid configuration: {error}; {_REMEDY}") from None


def _read_model(files: _Files, part: str, config: Config, written: int) -> Model:
    name = f"{part}.encoder.json"
    try:
        encoder = Encoder.from_dict(files.json(name))
    except (KeyError, TypeError, ValueError) as error:
        raise BundleError(f"bundle {files.directory}: {name} is not an encoder: {error!r}; {_REMEDY}") from None
    network = build_network(config, encoder.dims)
    weights = files.tensors(f"{part}.safetensors")
    if written < FORMAT_VERSION:
        weights = older_bundles.weights_of(written, weights, config)
    _check_weights(f"bundle {files.directory}: {part}.safetensors", weights, network)
    network.load_state_dict(weights)
    return Model(network.eval(), encoder)


def _check_weights(where: str, weights: dict[str, Tensor], network: Network) -> None:
    expected = network.state_dict()
    if weights.keys() != expected.keys():
        missing, extra = sorted(expected.keys() - weights.keys()), sorted(weights.keys() - expected.keys())
        raise BundleError(f"{where} must hold the network's tensors; missing {missing}, unexpected {extra}; {_REMEDY}")
    for name, tensor in weights.items():
        if tensor.shape != expected[name].shape:
            wanted, got = tuple(expected[name].shape), tuple(tensor.shape)
            raise BundleError(
                f"{where}: {name} must have shape {wanted} by its configuration and encoder, got {got}; {_REMEDY}"
            )
        _check_finite(where, name, tensor)


def _check_prior(files: _Files, network: Network) -> None:
    where = f"bundle {files.directory}: prior.safetensors"
    stored = files.tensors("prior.safetensors")
    for kind, value in _prior(network).items():
        if kind not in stored or stored[kind].shape != value.shape:
            got = tuple(stored[kind].shape) if kind in stored else None
            raise BundleError(f"{where}: {kind} must have shape {tuple(value.shape)}, got {got}; {_REMEDY}")
        _check_finite(where, kind, stored[kind])


def _check_finite(where: str, name: str, tensor: Tensor) -> None:
    bad = int((~torch.isfinite(tensor)).sum())
    # log_damping is -inf where the configured damping is 0: its exponential is what is used.
    if bad and not (".log_damping." in name and bool(tensor.exp().isfinite().all())):
        raise BundleError(f"{where}: {name} must be finite, got {bad} of {tensor.numel()} values that are not; {_REMEDY}")


def _prior(network: Network) -> dict[str, Tensor]:
    with torch.no_grad():
        return {kind: prior.clone() for kind, prior in network.priors().items()}


def _model_files(part: str, model: Model) -> dict[str, bytes]:
    weights = {name: value.detach().cpu().contiguous() for name, value in model.network.state_dict().items()}
    for name, value in weights.items():
        _check_finite(f"{part} to be saved", name, value)
    return {f"{part}.safetensors": save_tensors(weights), f"{part}.encoder.json": _json(model.encoder.to_dict())}


def _json(value: Any) -> bytes:
    return (json.dumps(value, indent=1, sort_keys=True) + "\n").encode()
