"""The whole configuration, and how it is read."""

import hashlib
import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Self

from pydantic import ValidationError, model_validator

from limaml.config.data import SourceConfig, StorageConfig
from limaml.config.experiment import ExperimentConfig
from limaml.config.features import DEFAULT_FEATURES, SAID, FeatureConfig
from limaml.config.governance import GovernanceConfig
from limaml.config.model import MetaConfig, ModelConfig, TaskKindConfig
from limaml.config.section import Section
from limaml.config.services import LocalConfig, MonitoringConfig, ServingConfig
from limaml.config.stores import EmbeddingsConfig, FeastConfig, RegistryConfig
from limaml.config.training import EvaluationConfig, PromotionConfig, RayConfig, TrainingConfig
from limaml.config.transfer import TransferConfig, TuningConfig
from limaml.errors import ConfigError

_NOT_COMPUTED: Any = {"training": {"ray_start_timeout_s"}, "features": {"__all__": set(SAID)}}
"""How long is waited, and what data may be used for, changes nothing that is computed: not part of a fingerprint."""
_READ_NO_POOL = ("id_mlp", "row_mlp")
RESERVED = ("event_id", "user_id", "item_id", "timestamp", "event_timestamp", "label", "context", "entity", "at")


class Config(Section):
    """Everything."""

    storage: StorageConfig = StorageConfig()
    source: SourceConfig
    features: tuple[FeatureConfig, ...] = DEFAULT_FEATURES
    transfer: tuple[TransferConfig, ...] = ()
    tuning: TuningConfig = TuningConfig()
    task_kinds: tuple[TaskKindConfig, ...] = (TaskKindConfig(),)
    model: ModelConfig = ModelConfig()
    meta: MetaConfig = MetaConfig()
    training: TrainingConfig = TrainingConfig()
    ray: RayConfig = RayConfig()
    evaluation: EvaluationConfig = EvaluationConfig()
    promotion: PromotionConfig = PromotionConfig()
    governance: GovernanceConfig = GovernanceConfig()
    registry: RegistryConfig = RegistryConfig()
    feast: FeastConfig = FeastConfig()
    embeddings: EmbeddingsConfig = EmbeddingsConfig()
    serving: ServingConfig = ServingConfig()
    experiment: ExperimentConfig = ExperimentConfig()
    monitoring: MonitoringConfig = MonitoringConfig()
    local: LocalConfig = LocalConfig()

    @model_validator(mode="after")
    def _task_kinds_are_distinct(self) -> Self:
        names = [kind.name for kind in self.task_kinds]
        if not names or len(set(names)) != len(names):
            raise ValueError(f"task_kinds must hold at least one kind, each name once, got {names}")
        columns = [kind.entity_column for kind in self.task_kinds]
        categories = [feature.name for feature in self.features if feature.is_entity]
        said = {feature.name: f", a {feature.type} of the {feature.entity}" for feature in self.features}
        for kind in self.task_kinds:
            if kind.entity_column not in ("user_id", "item_id", *categories):
                raise ValueError(
                    f"task_kinds: entity_column of {kind.name} must be user_id, item_id or a declared category of items or "
                    f"the context, one of {categories}, got {kind.entity_column!r}{said.get(kind.entity_column, '')}; declare "
                    "it, or choose another"
                )
        if (len(columns) > 1 or columns[0] in categories) and (columns[0] != "user_id" or len(set(columns)) != len(columns)):
            raise ValueError(
                f"task_kinds must hold the kind of user_id first, and one kind a column, got {columns}; tasks are drawn from "
                "users, and their rows say what is adapted beside them"
            )
        return self

    @model_validator(mode="after")
    def _elastic_within_workers(self) -> Self:
        if self.ray.min_workers > self.training.num_workers:
            raise ValueError(
                f"ray.min_workers must be <= training.num_workers ({self.training.num_workers}), got {self.ray.min_workers}; "
                "lower it, or raise training.num_workers"
            )
        return self

    @model_validator(mode="after")
    def _arms_are_logged(self) -> Self:
        if self.experiment.arms and not self.serving.log_share:
            raise ValueError(
                "serving.log_share must be > 0 where experiment.arms are declared, got 0; arms are compared by the "
                "requests that are logged"
            )
        return self

    @model_validator(mode="after")
    def _features_are_distinct(self) -> Self:
        names = [feature.name for feature in self.features]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(
                f"features must be declared once each, got {', '.join(twice)} more than once; rename or remove one"
            )
        taken = sorted(set(names) & set(RESERVED))
        if taken:
            raise ValueError(f"features must not be named as the columns of events are, got {', '.join(taken)}; rename them")
        for feature in self.features:
            self._refers_to_declared(feature)
        return self

    @model_validator(mode="after")
    def _what_is_made_is_declared(self) -> Self:
        vectors = [feature.name for feature in self.features if feature.type == "vector"]
        made = [each.feature for each in self.transfer]
        for name in made:
            if name not in vectors or made.count(name) > 1:
                raise ValueError(
                    f"transfer must make declared vectors, one of {vectors} each, got {made}; declare {name} in [[features]] "
                    "as a vector of the item, and make it once"
                )
        return self

    @model_validator(mode="after")
    def _pools_have_vectors_and_readers(self) -> Self:
        if self.model.pool_half_life_days is None:
            return self
        if not any(feature.type == "vector" for feature in self.features):
            raise ValueError(
                f"model.pool_half_life_days must pool a declared vector, got {self.model.pool_half_life_days:g} and no feature "
                "of type vector; declare one of the item, or leave it out"
            )
        for kind in self.task_kinds:
            block = self.model_of(kind.name).meta_block
            if block in _READ_NO_POOL:
                raise ValueError(
                    f"model.pool_half_life_days needs a meta block that reads pools, got {block} of kind {kind.name}, which is "
                    f"one of {_READ_NO_POOL}; choose another block, or leave it out"
                )
        return self

    def _refers_to_declared(self, feature: FeatureConfig) -> None:
        """What an aggregate is `of` or `by` must be declared, and fit."""
        declared = {other.name: other for other in self.features}
        of, by = declared.get(feature.of), declared.get(feature.by)
        if feature.of and (of is None or not of.is_delivered or of.type != "number"):
            known = [other.name for other in self.features if other.is_delivered and other.type == "number"]
            raise ValueError(
                f"features: the mean {feature.name} must be of a number of the event or the context, one of {known}, got "
                f"{feature.of!r}{'' if of is None else f', a {of.type} of the {of.entity}'}; declare it, or name another"
            )
        if of is not None and of.retention_days and feature.window_days >= of.retention_days:
            raise ValueError(
                f"features: {of.name} must keep its values (retention_days) for more days than the mean {feature.name} looks "
                f"back ({feature.window_days}), got {of.retention_days}; raise it, or shorten window_days"
            )
        if not feature.by:
            return
        if feature.by != "item_id" and (by is None or not by.is_item_category):
            known = ["item_id", *(other.name for other in self.features if other.is_item_category)]
            raise ValueError(
                f"features: {feature.name} must be by item_id or a category of the item, one of {known}, got {feature.by!r}; "
                "declare it, or name another"
            )
        sizes = sorted({other.max_keys for other in self.features if other.by == feature.by})
        if len(sizes) > 1:
            raise ValueError(
                f"features by {feature.by} share one map and must have one max_keys, got {sizes}; set the same one on each"
            )

    @property
    def task_kind(self) -> TaskKindConfig:
        """The first kind; models with several kinds iterate `task_kinds`."""
        return self.task_kinds[0]

    def is_of_candidates(self, kind: TaskKindConfig) -> bool:
        """Whether candidates of one request differ in the kind's entity: an item, its category, or a context per candidate; a
        user, or what the request says once of its moment, is one for all of them.
        """
        once = [feature.name for feature in self.features if feature.entity == "context" and not feature.per_candidate]
        return kind.entity_column not in ("user_id", *once)

    def support_rows_of(self, kind: str) -> int:
        """N of a kind."""
        return self._kind(kind).support_rows or self.meta.support_rows

    def model_of(self, kind: str) -> ModelConfig:
        """The model's settings, with a kind's own meta block."""
        return self.model.model_copy(update={"meta_block": self._kind(kind).meta_block or self.model.meta_block})

    def meta_of(self, kind: str) -> MetaConfig:
        """The inner loop's settings, with what a kind has of its own."""
        return self.meta.model_copy(
            update={"support_rows": self.support_rows_of(kind), "prior_std": self._kind(kind).prior_std or self.meta.prior_std}
        )

    def _kind(self, name: str) -> TaskKindConfig:
        return next(kind for kind in self.task_kinds if kind.name == name)

    def fingerprint(self, *sections: str) -> str:
        """SHA-256 (hex) of the named sections' resolved values (all if none is named)."""
        resolved = self.model_dump(mode="json", include=set(sections) or None, exclude=_NOT_COMPUTED)
        return hashlib.sha256(json.dumps(resolved, sort_keys=True).encode()).hexdigest()


def require_features(trained: Config, now: Config, version: str) -> None:
    """Raises ConfigError where a model version was trained on other features than are declared now; what is said may differ."""
    before, after = ({f.name: f.model_dump(exclude=set(SAID)) for f in cfg.features} for cfg in (trained, now))
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise ConfigError(
            f"features must be declared as version {version} was trained with, but {', '.join(changed)} changed; restore the "
            "declaration, or train a new version in a storage.root of its own"
        )


def load(path: str | Path, overrides: Sequence[str] = ()) -> Config:
    """Read and check the configuration at `path` (TOML, or a resolved one as JSON).

    `overrides` are `section.key=value` strings, values in TOML syntax.
    Raises ConfigError naming the key, the rule, the value and the file.
    """
    path = Path(path)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        values = json.loads(text) if path.suffix == ".json" else tomllib.loads(text)
    except FileNotFoundError:
        raise ConfigError(f"configuration {path} does not exist; name one with --config, e.g. configs/movielens.toml") from None
    except UnicodeDecodeError as error:
        found = error.object[error.start]
        raise ConfigError(
            f"configuration {path} must be UTF-8, got byte 0x{found:02x} at position {error.start}; save it as UTF-8"
        ) from None
    except OSError as error:
        raise ConfigError(
            f"configuration {path} must be a file that can be read, but: {error.strerror}; name one with --config"
        ) from None
    except (tomllib.TOMLDecodeError, json.JSONDecodeError) as error:
        raise ConfigError(f"configuration {path} is not {path.suffix.lstrip('.').upper() or 'TOML'}: {error}") from None
    if not isinstance(values, dict):
        raise ConfigError(f"configuration {path} must hold sections, got a JSON {type(values).__name__}; see configs/")
    for override in overrides:
        _apply_override(values, override)
    try:
        return Config.model_validate(values)
    except ValidationError as error:
        raise ConfigError(f"configuration {path}: " + "; ".join(_explain(item) for item in error.errors())) from None


def _apply_override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    parts = key.strip().split(".")
    if not equals or len(parts) != 2 or not all(parts):
        raise ConfigError(f"override must be section.key=value, got {override!r}; e.g. --set meta.inner_steps=3")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text
    section = values.setdefault(parts[0], {})
    if not isinstance(section, dict):
        raise ConfigError(
            f"override must name a key of a section, got {override!r}, but {parts[0]} is a {type(section).__name__}; "
            "change it in the configuration file"
        )
    section[parts[1]] = value


def _explain(error: Any) -> str:
    key = ".".join(str(part) for part in error["loc"]) or "(whole)"
    if error["type"] == "extra_forbidden":
        return f"{key} is not a known key (value {error['input']!r}); remove it or correct its spelling"
    if error["type"] == "missing":
        return f"{key} is required; add it"
    message = error["msg"].removeprefix("Value error, ")
    return f"{key}: {message}" + ("" if isinstance(error["input"], dict) else f", got {error['input']!r}")
