"""The only settings: one TOML file, frozen, unknown keys rejected, every value checked where it is declared.

A model a section, in the order of `Config`. Read by `load`; single values are overridden with `section.key=value` strings (the
command line's `--set`). Relative paths are taken from the working directory. Secrets are never here: they come by environment
variable or file.
"""

from limaml.config.data import NegativesConfig, SourceConfig, StorageConfig
from limaml.config.experiment import ArmConfig, ExperimentConfig
from limaml.config.features import DEFAULT_FEATURES, FeatureConfig
from limaml.config.governance import GovernanceConfig, not_permitted, require_permitted, require_permitted_version
from limaml.config.model import MetaConfig, ModelConfig, TaskKindConfig
from limaml.config.services import LocalConfig, MonitoringConfig, ServingConfig
from limaml.config.stores import EmbeddingsConfig, FeastConfig, RegistryConfig
from limaml.config.training import EvaluationConfig, PromotionConfig, RayConfig, TrainingConfig
from limaml.config.transfer import TransferConfig, TuningConfig
from limaml.config.whole import Config, load, require_features

__all__ = [
    "DEFAULT_FEATURES",
    "ArmConfig",
    "Config",
    "EmbeddingsConfig",
    "EvaluationConfig",
    "ExperimentConfig",
    "FeastConfig",
    "FeatureConfig",
    "GovernanceConfig",
    "LocalConfig",
    "MetaConfig",
    "ModelConfig",
    "MonitoringConfig",
    "NegativesConfig",
    "PromotionConfig",
    "RayConfig",
    "RegistryConfig",
    "ServingConfig",
    "SourceConfig",
    "StorageConfig",
    "TaskKindConfig",
    "TrainingConfig",
    "TransferConfig",
    "TuningConfig",
    "load",
    "not_permitted",
    "require_features",
    "require_permitted",
    "require_permitted_version",
]
