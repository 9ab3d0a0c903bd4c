"""A folder of an encoder of sentences as sentence-transformers keeps it (Reimers and Gurevych 2019): tokens and pooling.

N texts, L tokens of the longest one, H hidden width (the vector's)
"""

from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from limaml.errors import ConfigError
from limaml.transfer.encoders import Origin, Vectors
from limaml.transfer.folders import SETTINGS, TOKENS, open_tokenizer, origin_of, read_json, read_settings, require_files

_POOLED = ("pooling_mode_mean_tokens", "pooling_mode_cls_token")
_MODULES = ("Transformer", "Pooling", "Normalize")


class SentenceEncoder:
    """Mean or first token, normalised where the folder says so. What computes the tokens' states is the subclass's."""

    def __init__(self, folder: Path, weights: Sequence[str]) -> None:
        """`weights`: names of the files that hold the network. Raises ConfigError for a folder of another kind."""
        self.folder = folder
        self.files = require_files(folder, (*weights, TOKENS, SETTINGS))
        self._settings = read_settings(folder, SETTINGS)
        pooling = read_settings(folder, "1_Pooling/config.json") or {_POOLED[0]: True}
        modes = [name for name, chosen in pooling.items() if name.startswith("pooling_mode_") and chosen]
        modules = [str(module["type"]).rpartition(".")[2] for module in read_json(folder, "modules.json") or []]
        self._require_known(
            {
                "1_Pooling/config.json: mode": (modes[0] if len(modes) == 1 else modes, _POOLED),
                **{f"modules.json: module {number}": (name, _MODULES) for number, name in enumerate(modules)},
            }
        )
        self._first_token, self._normalised = modes == [_POOLED[1]], "Normalize" in modules
        parts = ("modules.json", "sentence_bert_config.json", "1_Pooling/config.json")
        self.files += [folder / name for name in parts if (folder / name).is_file()]
        self.origin: Origin = origin_of(folder, self.files, int(self._settings["hidden_size"]))

    def encode(self, texts: Sequence[str]) -> Vectors:
        return self.encode_tokens(self.tokens_of(texts))

    def tokens_of(self, texts: Sequence[str]) -> list[list[int]]:
        return [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]

    def encode_tokens(self, tokens: Sequence[Sequence[int]]) -> Vectors:
        """(N, H) of texts that are tokens already, with those that mark both ends."""
        raise NotImplementedError

    def each_token(self) -> list[list[int]]:
        """Every token of the vocabulary as a text of its own, in the order of their ids."""
        begin, end = self._tokenizer.encode("").ids
        return [[begin, token, end] for token in range(self._tokenizer.get_vocab_size())]

    def _padded(self, tokens: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
        """(N, L) tokens, and which of them are the texts' own."""
        ids_NL = torch.full((len(tokens), max(map(len, tokens))), int(self._settings.get("pad_token_id") or 0))
        mask_NL = torch.zeros(ids_NL.shape, dtype=torch.bool)
        for row, ids in enumerate(tokens):
            ids_NL[row, : len(ids)] = torch.tensor(ids)
            mask_NL[row, : len(ids)] = True
        return ids_NL, mask_NL

    def _pool(self, hidden_NLH: Tensor, mask_NL: Tensor) -> Tensor:
        if self._first_token:
            pooled_NH = hidden_NLH[:, 0]
        else:
            pooled_NH = (hidden_NLH * mask_NL[..., None]).sum(1) / mask_NL.sum(1, keepdim=True).clamp(min=1)
        return F.normalize(pooled_NH, dim=1) if self._normalised else pooled_NH

    def _require_known(self, what: Mapping[str, tuple[Any, Sequence[Any]]]) -> None:
        """Where it stands -> what it is, what it may be. Raises ConfigError for a network that is not computed here."""
        for where, (got, known) in what.items():
            if got not in known:
                raise ConfigError(
                    f"{self.folder} must be of an encoder that is computed here: {where} must be one of {list(known)}, got "
                    f'{got!r}; choose another model, or deliver its vectors (provider = "table")'
                )

    @cached_property
    def _tokenizer(self) -> Any:
        tokenizer = open_tokenizer(self.folder)
        longest = read_settings(self.folder, "sentence_bert_config.json").get("max_seq_length")
        tokenizer.enable_truncation(int(longest or self._settings["max_position_embeddings"]))
        return tokenizer
