"""What the verb `evaluate` does: judge a candidate against the registry's champion, log, register, say what was decided."""

import json
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from limaml.config import Config
from limaml.errors import NothingToDo
from limaml.evaluation.evaluate import CARD, ChampionBundle, evaluate_candidate
from limaml.governance import card
from limaml.io.storage import Storage
from limaml.registry import DECISION, FINGERPRINT, Registry
from limaml.training.candidate import BUNDLE, download_candidate, read_candidate

REASONS = "limaml.reasons"
_PAGES = ("evaluation.json", "report.html", CARD)


def evaluate_and_register(cfg: Config, location: str | Path) -> dict[str, Any]:
    """Evaluate, log to the candidate's MLflow run and register its bundle with the decision; returns the verb's result.

    `location` is the folder or URL that training left; evaluation.json, report.html and card.json are written there, too. The
    version's tags have the headline of its card. A refused
    candidate is registered as well, with its reasons, and then NothingToDo is raised with them: what follows is skipped and
    the champion stays. Judging the same candidate again updates its version.
    """
    with tempfile.TemporaryDirectory(prefix="limaml-") as temporary:
        return _evaluate(cfg, Storage(str(location)), Path(temporary))


def _evaluate(cfg: Config, candidates: Storage, place: Path) -> dict[str, Any]:
    folder = place / "candidate"
    download_candidate(candidates.root, folder)
    candidate = read_candidate(folder)
    registry = Registry(cfg.registry)
    serving = registry.champion()
    champion = ChampionBundle(serving.version, registry.download(serving.version, place / "champion")) if serving else None
    result = evaluate_candidate(cfg, folder, champion)
    registry.log_metrics(candidate.run_id, dict(flat_metrics(result)))
    pages = place / "pages"
    pages.mkdir()
    for name in _PAGES:
        data = (folder / name).read_bytes()
        (pages / name).write_bytes(data)
        candidates.write_bytes(name, data)
    registry.log_artifacts(candidate.run_id, pages)
    tags = {FINGERPRINT: candidate.fingerprint, DECISION: result["decision"], REASONS: "; ".join(result["reasons"])}
    tags |= card.headline(json.loads((folder / CARD).read_text()))
    version = _register(registry, folder, candidate.run_id, tags)
    if result["decision"] != "passed":
        raise NothingToDo(f"candidate version {version} was refused: {'; '.join(result['reasons'])}")
    paths = dict(zip(("evaluation", "report", "card"), map(candidates.path, _PAGES), strict=True))
    return {"version": version, "decision": result["decision"], "through": candidate.through, **paths}


def flat_metrics(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """Plain values under names for MLflow: `first_k.20.limaml.pooled_auc`, `agreement.items.cosine`, …"""
    for protocol in ("first_k", "as_served"):
        for group, table in result[protocol].items():
            for method, values in table["methods"].items():
                # MLflow's names may not hold a plus sign.
                prefix = f"{protocol}.{group}".replace("+", " and more")
                yield from ((f"{prefix}.{method}.{key}", value) for key, value in values.items() if isinstance(value, float))
    if result["refit_psi"] is not None:
        yield "refit_psi", result["refit_psi"]
    for what in ("embeddings", "items"):
        found = (result["agreement"] or {}).get(what) or {}
        yield from ((f"agreement.{what}.{key}", float(value)) for key, value in found.items())


def _register(registry: Registry, folder: Path, run_id: str, tags: dict[str, str]) -> str:
    for version in registry.find(FINGERPRINT, tags[FINGERPRINT]):
        if version.run_id == run_id:
            registry.set_tags(version.version, tags)
            return version.version
    return registry.register(folder / BUNDLE, run_id, tags)
