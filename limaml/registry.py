"""Runs, model versions and the champion: the only file that knows MLflow.

A model version is a bundle folder, logged as artifacts of a run and registered; no model flavour, so no pickles and no
code in it. What happens to a version afterwards (slot, state, how far it is published) is written in its tags, and the
alias `champion` is the only pointer to the version that serves (contract 4).
"""

import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from limaml.config import RegistryConfig
from limaml.config.secret import revealed_url
from limaml.errors import BundleError, StoreError

CHAMPION = "champion"
BUNDLE_PATH = "bundle"

# Tags of a model version. An absent tag means: not yet.
FINGERPRINT = "limaml.fingerprint"
DECISION = "limaml.decision"
SLOT = "limaml.slot"
STATE = "limaml.state"
COMPLETE_THROUGH = "limaml.complete_through"
"""Of the first task kind; it moves last, so every kind is complete through it (`complete_through_tags`)."""
CUT_OVER_AT = "limaml.cut_over_at"
FILLED_BY = "limaml.filled_by"
FILL_SEEN_AT = "limaml.fill_seen_at"
FILL_DAY = "limaml.fill_day"

# MLflow's limits of one log-batch call (mlflow/utils/validation.py).
_METRICS_PER_BATCH = 1000
_PARAMS_PER_BATCH = 100
_PARAM_LENGTH = 6000


def complete_through_tags(kinds: Sequence[str]) -> dict[str, str]:
    """Task kind -> the tag that says through when it is complete, in the order in which they move."""
    first, *others = kinds
    return {**{kind: f"{COMPLETE_THROUGH}.{kind}" for kind in others}, first: COMPLETE_THROUGH}


@dataclass(frozen=True)
class ModelVersion:
    """One registered bundle; `tags` as they were when it was read."""

    version: str
    run_id: str
    tags: Mapping[str, str]


class Registry:
    """Runs and model versions of one configured model name; connects on first use."""

    def __init__(self, cfg: RegistryConfig) -> None:
        self._cfg = cfg
        # Unless told not to, MLflow calls home, logs at level INFO while it creates its tables, and draws progress bars.
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        os.environ.setdefault("MLFLOW_LOGGING_LEVEL", "WARNING")
        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")

    # -- runs ---------------------------------------------------------------------------------------------------------

    def start_run(self, name: str, params: Mapping[str, object] | None = None, tags: Mapping[str, str] | None = None) -> str:
        """Open a run in the configured experiment and return its id; end it with `end_run`."""
        with self._answers():
            run = self._client.create_run(self._experiment_id(), run_name=name, tags=dict(tags or {}))
        self.log_params(run.info.run_id, params or {})
        return str(run.info.run_id)

    def log_params(self, run_id: str, params: Mapping[str, object]) -> None:
        """Log settings; a value longer than MLflow keeps is cut (the bundle holds the whole configuration)."""
        from mlflow.entities import Param

        entries = [Param(key, str(value)[:_PARAM_LENGTH]) for key, value in params.items()]
        with self._answers():
            for start in range(0, len(entries), _PARAMS_PER_BATCH):
                self._client.log_batch(run_id, params=entries[start : start + _PARAMS_PER_BATCH])

    def log_metrics(self, run_id: str, metrics: Mapping[str, float], step: int = 0) -> None:
        self.log_history(run_id, [(step, metrics)])

    def log_history(self, run_id: str, history: Iterable[tuple[int, Mapping[str, float]]]) -> None:
        """Log (step, metrics) pairs in few calls: a batch is 30 times faster than a loop of single metrics."""
        import time

        from mlflow.entities import Metric

        now_ms = int(time.time() * 1000)
        entries = [Metric(key, float(value), now_ms, step) for step, metrics in history for key, value in metrics.items()]
        with self._answers():
            for start in range(0, len(entries), _METRICS_PER_BATCH):
                self._client.log_batch(run_id, metrics=entries[start : start + _METRICS_PER_BATCH])

    def log_artifacts(self, run_id: str, folder: str | Path, path: str | None = None) -> None:
        """Copy a folder's files into the run's artifacts, under `path`."""
        with self._answers():
            self._client.log_artifacts(run_id, str(folder), path)

    def end_run(self, run_id: str, *, failed: bool = False) -> None:
        with self._answers():
            self._client.set_terminated(run_id, "FAILED" if failed else "FINISHED")

    # -- model versions -----------------------------------------------------------------------------------------------

    def register(self, bundle_dir: str | Path, run_id: str, tags: Mapping[str, str]) -> str:
        """Log the bundle folder with the run and register it; returns the new version's number as a string."""
        if not Path(bundle_dir).is_dir():
            raise BundleError(f"bundle folder {bundle_dir} does not exist; save the bundle before it is registered")
        self.log_artifacts(run_id, bundle_dir, BUNDLE_PATH)
        with self._answers():
            source = f"{self._client.get_run(run_id).info.artifact_uri}/{BUNDLE_PATH}"
            self._ensure_model()
            created = self._client.create_model_version(self._cfg.model_name, source, run_id, tags=dict(tags))
        return str(created.version)

    def champion(self) -> ModelVersion | None:
        """The version the alias points to, with its tags, or None; one cheap look-up (about 3 ms), made for polling."""
        from mlflow.exceptions import MlflowException

        try:
            return _model_version(self._client.get_model_version_by_alias(self._cfg.model_name, CHAMPION))
        except MlflowException as error:
            # MLflow answers INVALID_PARAMETER_VALUE for an alias that is not there.
            if error.error_code in ("RESOURCE_DOES_NOT_EXIST", "INVALID_PARAMETER_VALUE"):
                return None
            raise self._store_error(error) from error

    def get(self, version: str) -> ModelVersion:
        """Raises StoreError if there is no such version."""
        with self._answers(f"model {self._cfg.model_name} has no version {version!r}"):
            return _model_version(self._client.get_model_version(self._cfg.model_name, version))

    def find(self, tag: str, value: str) -> list[ModelVersion]:
        """Versions whose `tag` has this value (without quotes in it), newest first."""
        return self._search(f"name = '{self._cfg.model_name}' and tag.`{tag}` = '{value}'")

    def versions(self) -> list[ModelVersion]:
        """All versions, newest first."""
        return self._search(f"name = '{self._cfg.model_name}'")

    def set_tags(self, version: str, tags: Mapping[str, str | None]) -> None:
        """Write tags in the order given, one statement each; None removes a tag."""
        with self._answers():
            for key, value in tags.items():
                if value is not None:
                    self._client.set_model_version_tag(self._cfg.model_name, version, key, value)
                elif key in self._client.get_model_version(self._cfg.model_name, version).tags:
                    self._client.delete_model_version_tag(self._cfg.model_name, version, key)

    def set_champion(self, version: str) -> None:
        """Point the alias at `version`; what serves follows it."""
        with self._answers():
            self._client.set_registered_model_alias(self._cfg.model_name, CHAMPION, version)

    def download(self, version: str, folder: str | Path) -> Path:
        """Copy the version's bundle into `folder` and return the bundle's folder. Raises BundleError if it is gone."""
        import mlflow.artifacts

        with self._answers(f"model {self._cfg.model_name} has no version {version!r}"):
            source = self._client.get_model_version(self._cfg.model_name, version).source
        Path(folder).mkdir(parents=True, exist_ok=True)
        try:
            path = mlflow.artifacts.download_artifacts(
                artifact_uri=source, dst_path=str(folder), tracking_uri=self._tracking_uri
            )
        except (OSError, mlflow.exceptions.MlflowException) as error:
            raise BundleError(
                f"bundle of version {version} must be at {source}: {error}; train and register it again"
            ) from error
        return Path(path)

    # -- the connection -----------------------------------------------------------------------------------------------

    @cached_property
    def _tracking_uri(self) -> str:
        return revealed_url(self._cfg.tracking_uri, "registry.tracking_uri")

    @cached_property
    def _client(self) -> Any:
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from sqlalchemy.exc import SQLAlchemyError

        uri = self._tracking_uri
        if uri.startswith("sqlite:///"):
            Path(uri.removeprefix("sqlite:///")).parent.mkdir(parents=True, exist_ok=True)
        try:
            return MlflowClient(tracking_uri=uri, registry_uri=uri)
        except (MlflowException, SQLAlchemyError) as error:
            raise self._store_error(error) from error

    def _experiment_id(self) -> str:
        found = self._client.get_experiment_by_name(self._cfg.experiment)
        if found is not None:
            return str(found.experiment_id)
        root = self._cfg.artifact_root
        # `mlflow-artifacts:/folder`, which a server passes on, is a URL too.
        location = root if re.match(r"[a-z][a-z0-9+.-]*:/", root) else os.path.abspath(root)
        return str(self._client.create_experiment(self._cfg.experiment, location))

    def _ensure_model(self) -> None:
        from mlflow.exceptions import MlflowException

        try:
            self._client.create_registered_model(self._cfg.model_name)
        except MlflowException as error:
            if error.error_code != "RESOURCE_ALREADY_EXISTS":
                raise

    def _search(self, query: str) -> list[ModelVersion]:
        found: list[ModelVersion] = []
        with self._answers():
            token = None
            while True:
                page = self._client.search_model_versions(query, order_by=["version_number DESC"], page_token=token)
                found.extend(_model_version(entity) for entity in page)
                token = page.token
                if not token:
                    return found

    @contextmanager
    def _answers(self, missing: str = "") -> Iterator[None]:
        """Turn MLflow's errors into ours; `missing` is the message for 'does not exist'."""
        from mlflow.exceptions import MlflowException

        try:
            yield
        except MlflowException as error:
            if missing and error.error_code == "RESOURCE_DOES_NOT_EXIST":
                raise StoreError(f"{missing}; `limaml status` lists the versions there are") from error
            raise self._store_error(error) from error

    def _store_error(self, error: Exception) -> StoreError:
        return StoreError(
            f"model registry at {self._cfg.tracking_uri.split('@')[-1]} failed: {error}; is it running and reachable?"
        )


def _model_version(entity: Any) -> ModelVersion:
    return ModelVersion(str(entity.version), str(entity.run_id), dict(entity.tags))
