"""From logged rows to a candidate: a folder under `storage.root` that `evaluate` judges and the registry takes.

candidate.json   fingerprint, start, MLflow run, split; written last, so that a folder that has it is complete
history.json     training curves of both fits
bundle/          the model version (limaml.models.bundle), with twin and refit

`train` and `evaluate` may run on two machines: the folder is made on a local disk and copied to the storage, and back.
"""

import hashlib
import json
import tempfile
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, date, datetime
from pathlib import Path
from typing import Any

from limaml import schema, telemetry
from limaml.config import Config, require_permitted
from limaml.errors import DataError, LimamlError, NothingToDo
from limaml.events.catalogue import vectors_digest
from limaml.events.day_store import EventStore
from limaml.features.encoder import Encoder
from limaml.governance import card, leakage
from limaml.io.storage import Storage
from limaml.models import bundle as bundles
from limaml.models.network import build_network
from limaml.registry import FINGERPRINT, Registry
from limaml.tasks.splits import Split, split_events
from limaml.training.champion import read_champion, start_of, why_not
from limaml.training.checkpoint import TrainState, Weights
from limaml.training.prepare import fit_encoders, read_history
from limaml.training.ray_entry import train_on_ray
from limaml.training.ray_job import train_as_job
from limaml.training.revision import code_revision

BUNDLE = "bundle"
_CHAMPION = "champion"
_FOLDER = "candidates"
_KEPT = 5
"""So many candidates stay, the newest: one that was judged is in the registry, too, and needs no folder any more."""
_MARK, _HISTORY = "candidate.json", "history.json"
# Settings that shape the model or its judgement (the code: revision.py); a change elsewhere does not call for training again.
_SECTIONS = ("features", "task_kinds", "model", "meta", "training", "evaluation", "promotion")

_log = telemetry.get_logger(__name__)


@dataclass(frozen=True)
class Candidate:
    """What candidate.json says."""

    fingerprint: str
    run_id: str
    through: str
    best_step: int
    validation_auc: float
    seconds: float
    started_from: dict[str, str] = field(default_factory=dict)
    """Version and digest of the champion that it began with (`training.start_from`), or under `scratch` why not."""
    leakage: dict[str, Any] = field(default_factory=dict)
    """What the checks before training found; the card in the bundle has all of it."""


def fingerprint(cfg: Config, through: date) -> str:
    """SHA-256 (hex) of data, configuration and code: equal fingerprints would train the same model."""
    storage = Storage(cfg.storage.root)
    days = {m.day.isoformat(): m.content for m in EventStore(storage).manifests().values()}
    parts: dict[str, Any] = {
        "through": through.isoformat(),
        "days": {day: content for day, content in sorted(days.items()) if day <= through.isoformat()},
        "config": cfg.fingerprint(*_SECTIONS),
        "code": code_revision(),
    }
    if (vectors := vectors_digest(storage, schema.tables(cfg.features), through)) is not None:
        parts["vectors"] = vectors
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def fit_candidate(cfg: Config, through: date) -> dict[str, Any]:
    """Train twin and refit on the logged rows up to `through` and leave a candidate folder; returns the verb's result.

    A complete folder of the same fingerprint and start is returned as it is. Raises NothingToDo if the champion was trained on
    the same data, configuration and code; ConfigError if the data may not be used for what models are for; GateError if a
    feature tells the label too well alone; TrainingError as the loop does.
    """
    require_permitted(cfg)
    mark = fingerprint(cfg, through)
    registry = Registry(cfg.registry)
    champion = registry.champion()
    if champion is not None and champion.tags.get(FINGERPRINT) == mark:
        raise NothingToDo(f"champion version {champion.version} was trained on the same data, configuration and code")
    storage = Storage(cfg.storage.root)
    with tempfile.TemporaryDirectory(prefix="limaml-champion-") as temporary:
        start = start_of(cfg, registry, champion, Path(temporary))
        folder = f"{_FOLDER}/{through}-{_name(mark, start)[:12]}"
        location = storage.path(folder)
        if (found := _complete(location)) is not None and found.fingerprint == mark:
            return {"candidate": location, **asdict(found)}
        if cfg.ray.job_template:
            train_as_job(cfg, through, _name(mark, start))
            return {"candidate": location, **asdict(read_candidate(location))}
        if start:
            _upload_champion(Path(temporary), storage, folder)
    found = _train(cfg, through, mark, start, folder)
    _keep_newest(storage, folder)
    _log.info("candidate_trained", folder=location, **asdict(found))
    return {"candidate": location, **asdict(found)}


def _train(cfg: Config, through: date, mark: str, start: dict[str, str], folder: str) -> Candidate:
    """Train, from the bundle that lies below `folder` if `start` names one and it fits, and leave the candidate there."""
    storage, registry = Storage(cfg.storage.root), Registry(cfg.registry)
    started = time.monotonic()
    logged = read_history(cfg, through)
    split = split_events(logged, cfg.evaluation)
    champion, bundle, started_from = None, f"{storage.path(folder)}/{_CHAMPION}", start
    if start:
        champion = read_champion(bundle)
        if (reason := why_not(champion, cfg, split)) is not None:
            champion, started_from = None, {"scratch": reason}
            _log.warning("training_starts_from_scratch", champion=start["version"], reason=reason)
    encoders = fit_encoders(cfg, logged, split, champion)
    findings = leakage.check(cfg, logged, split, encoders[0])
    run_id = registry.start_run(f"train-{through}", _flat(cfg), {FINGERPRINT: mark, "limaml.through": through.isoformat()})
    try:
        begin = bundle if champion is not None else None
        state = train_on_ray(cfg, through, *encoders, name=f"train-{_name(mark, start)[:16]}", champion=begin)
        assert state.twin_progress is not None
        found = Candidate(
            fingerprint=mark,
            run_id=run_id,
            through=through.isoformat(),
            best_step=state.twin_progress.best_step,
            validation_auc=float(state.twin_progress.best_value or "nan"),
            seconds=round(time.monotonic() - started, 1),
            started_from=started_from,
            leakage=leakage.summary(findings),
        )
        with tempfile.TemporaryDirectory(prefix="limaml-") as temporary:
            lineage = lineage_of(cfg, through, mark, split) | {"started_from": started_from}
            save_candidate(cfg, Path(temporary), state, encoders, lineage, found, findings)
            _upload(Path(temporary), storage, folder)
    except LimamlError:
        registry.end_run(run_id, failed=True)
        raise
    registry.log_history(run_id, _mlflow_history(state))
    registry.end_run(run_id)
    if start:
        storage.delete_dir(f"{folder}/{_CHAMPION}")
    return found


def _name(mark: str, start: Mapping[str, str]) -> str:
    """SHA-256 (hex) of the fingerprint and of what it starts from: what a run and a folder are named by.

    The fingerprint itself is without the start, or a promoted candidate would call for training again from itself.
    """
    return hashlib.sha256(json.dumps([mark, dict(start)], sort_keys=True).encode()).hexdigest() if start else mark


def _upload_champion(source: Path, storage: Storage, folder: str) -> None:
    """Put the bundle that training starts from where workers on other machines read it, for the time of the training."""
    [manifest] = source.rglob("manifest.json")
    for path in sorted(manifest.parent.iterdir()):
        storage.write_bytes(f"{folder}/{_CHAMPION}/{path.name}", path.read_bytes())


def read_candidate(location: str | Path) -> Candidate:
    """`location` is a folder or URL. Raises DataError if it holds no complete candidate."""
    found = _complete(location)
    if found is None:
        raise DataError(f"candidate {location} must hold {_MARK}, which train writes last; run `limaml train` again")
    return found


def download_candidate(location: str | Path, folder: Path) -> None:
    """Copy what training left at a folder or URL to a local folder. Raises DataError if that is no complete candidate."""
    read_candidate(location)
    storage = Storage(str(location))
    for name in (*storage.walk(BUNDLE), _HISTORY, _MARK):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(storage.read_bytes(name))


def _upload(source: Path, storage: Storage, folder: str) -> None:
    """`candidate.json` comes last; what an earlier training left there, cut short, counts for nothing until then."""
    if storage.exists(f"{folder}/{_MARK}"):
        storage.delete(f"{folder}/{_MARK}")
    names = sorted(str(path.relative_to(source)) for path in source.rglob("*") if path.is_file())
    for name in [name for name in names if name != _MARK] + [_MARK]:
        storage.write_bytes(f"{folder}/{name}", (source / name).read_bytes())


def _keep_newest(storage: Storage, mine: str) -> None:
    """Delete the oldest complete candidates, by the time they were written, until `_KEPT` are left; never `mine`."""
    written = {
        name.removesuffix(f"/{_MARK}"): int(stamp.split()[1])
        for name, stamp in storage.stamps(_FOLDER).items()
        if name.endswith(f"/{_MARK}")
    }
    others = sorted(written.keys() - {mine}, key=lambda folder: (written[folder], folder), reverse=True)
    for folder in others[_KEPT - 1 :]:
        storage.delete_dir(folder)
        _log.info("candidate_deleted", folder=storage.path(folder), kept=_KEPT)


def read_training_history(folder: str | Path) -> dict[str, list[dict[str, float]]]:
    """Curves by phase: `twin` and `refit`."""
    history: dict[str, list[dict[str, float]]] = json.loads((Path(folder) / _HISTORY).read_text())
    return history


def _complete(location: str | Path) -> Candidate | None:
    try:
        return Candidate(**Storage(str(location)).read_json(_MARK))
    except (FileNotFoundError, ValueError, TypeError):
        return None


def lineage_of(cfg: Config, through: date, mark: str, split: Split) -> dict[str, Any]:
    """What the bundle's manifest says about where it comes from."""
    return {
        "through": through.isoformat(),
        "days": EventStore(Storage(cfg.storage.root)).lineage(through),
        "code_revision": code_revision(),
        "fingerprint": mark,
        # What the twin has seen ends here, fitted (train) and chosen on (validation).
        "held_out": split.held_out,
        "train_end": _iso(split.train_end_us),
        "validation_end": _iso(split.validation_end_us),
        "users": {
            "train": len(split.train_users),
            "validation": len(split.validation_users),
            "held_out": len(split.held_out_users),
        },
    }


def save_candidate(
    cfg: Config,
    folder: Path,
    state: TrainState,
    encoders: tuple[Encoder, Encoder],
    lineage: dict[str, Any],
    found: Candidate,
    findings: Mapping[str, Any],
) -> None:
    """Write the candidate into a local folder; `findings` are those of the leakage checks."""
    assert state.twin_progress is not None
    folder.mkdir(parents=True, exist_ok=True)
    twin, refit = (_model(cfg, w, e) for w, e in zip((state.twin, state.network), encoders, strict=True))
    training = {
        "best_step": found.best_step,
        "validation_auc": found.validation_auc,
        "shrinkage": state.twin_progress.shrinkage,
        "prior_rows": state.twin_progress.prior_rows,
    }
    said = card.of_training(cfg, date.fromisoformat(found.through), findings)
    bundles.save(bundles.Bundle(cfg, refit, twin, {"training": training}, lineage, said), folder / BUNDLE)
    history = {"twin": state.twin_progress.history, "refit": state.progress.history}
    (folder / _HISTORY).write_text(json.dumps(history, indent=1) + "\n")
    (folder / _MARK).write_text(json.dumps(asdict(found), indent=1, sort_keys=True) + "\n")


def _model(cfg: Config, weights: Weights, encoder: Encoder) -> bundles.Model:
    network = build_network(cfg, encoder.dims)
    network.load_state_dict(weights)
    return bundles.Model(network.eval(), encoder)


def _mlflow_history(state: TrainState) -> list[tuple[int, dict[str, float]]]:
    entries = []
    for phase, progress in (("twin", state.twin_progress), ("refit", state.progress)):
        for entry in progress.history if progress else []:
            entries.append((int(entry["step"]), {f"{phase}_{key}": value for key, value in entry.items() if key != "step"}))
    return entries


def _flat(cfg: Config) -> dict[str, object]:
    """Settings as MLflow parameters, `section.key`."""
    return {
        f"{section}.{key}": value
        for section, values in cfg.model_dump(mode="json", include=set(_SECTIONS)).items()
        for key, value in (values.items() if isinstance(values, dict) else enumerate(values))
    }


def _iso(instant_us: int) -> str:
    return datetime.fromtimestamp(instant_us / 1e6, UTC).isoformat()
