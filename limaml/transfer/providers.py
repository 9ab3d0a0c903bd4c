"""Which providers there are, and how `[[transfer]]` names another one."""

from collections.abc import Callable

from limaml.config import FeatureConfig, TransferConfig
from limaml.config.names import TRANSFER_PROVIDERS
from limaml.transfer.encoders import ItemVectors, TextEncoder, require_there

Open = Callable[[TransferConfig, FeatureConfig], TextEncoder | ItemVectors]
"""Opens what makes a declared vector; raises ConfigError or DataError where it cannot."""


def open_provider(cfg: TransferConfig, feature: FeatureConfig) -> TextEncoder | ItemVectors:
    return PROVIDERS[cfg.provider](cfg, feature)


def register(name: str, open_it: Open) -> None:
    """Let `transfer.provider` name another provider, in this process. Raises ConfigError if there is one of that name."""
    TRANSFER_PROVIDERS.add(name)
    PROVIDERS[name] = open_it


def _minilm(cfg: TransferConfig, feature: FeatureConfig) -> TextEncoder:  # noqa: ARG001
    from limaml.transfer.bert import minilm

    return minilm()


def _folder(cfg: TransferConfig, feature: FeatureConfig) -> TextEncoder:  # noqa: ARG001
    from limaml.transfer.bert import BertEncoder

    return BertEncoder(require_there(cfg.path, "the folder of an encoder"))


def _onnx(cfg: TransferConfig, feature: FeatureConfig) -> TextEncoder:  # noqa: ARG001
    from limaml.transfer.onnx import OnnxEncoder

    return OnnxEncoder(require_there(cfg.path, "the folder of an ONNX encoder"))


def _static(cfg: TransferConfig, feature: FeatureConfig) -> TextEncoder:  # noqa: ARG001
    from limaml.transfer.static import StaticEncoder

    return StaticEncoder(require_there(cfg.path, "the folder of a static encoder"))


def _table(cfg: TransferConfig, feature: FeatureConfig) -> ItemVectors:
    from limaml.transfer.tables import VectorTable

    return VectorTable(cfg.path, feature)


def _graph(cfg: TransferConfig, feature: FeatureConfig) -> ItemVectors:
    from limaml.transfer.graph import GraphVectors

    return GraphVectors(require_there(cfg.path, "a file of triples"), feature)


PROVIDERS: dict[str, Open] = {
    "minilm": _minilm,
    "static": _static,
    "folder": _folder,
    "onnx": _onnx,
    "table": _table,
    "graph": _graph,
}
"""Another provider is one more line here, and its name in `limaml.config.names.TRANSFER_PROVIDERS` (docs/extend.md)."""
