"""A static encoder: one vector a token, their mean is a text's. Distilled from a BERT encoder as model2vec does it.

Tulkens and van Dongen, Model2Vec, 2024. V tokens of the vocabulary, H the teacher's width, W the student's, N texts
"""

import json
import shutil
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from limaml.errors import ConfigError
from limaml.io import atomic
from limaml.progress import progress
from limaml.transfer.bert import BertEncoder
from limaml.transfer.encoders import Origin, Vectors
from limaml.transfer.folders import ORIGIN, SETTINGS, TOKENS, WEIGHTS, open_tokenizer, origin_of, read_settings, require_files

WIDTH = 256
"""What model2vec takes: half the size of the teacher's 384 with what the last dimensions hold, mostly noise, left out."""
_SIF = 1e-4
"""Smooth inverse frequency (Arora et al. 2017), of ranks in the vocabulary, which is sorted by frequency (Zipf's law)."""
_BATCH_TOKENS = 1024
_TOKENS = "embeddings"


class StaticEncoder:
    """A folder that `distil` or model2vec left."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        files = require_files(folder, (WEIGHTS, TOKENS, SETTINGS))
        self._normalised = bool(read_settings(folder, SETTINGS).get("normalize", True))
        self.origin: Origin = origin_of(folder, files, self._shape(folder)[1])

    def encode(self, texts: Sequence[str]) -> Vectors:
        found = np.zeros((len(texts), self.origin.width), np.float32)
        vectors_VW = self._vectors
        for row, encoding in enumerate(self._tokenizer.encode_batch(list(texts), add_special_tokens=False)):
            ids = [token for token in encoding.ids if token != self._unknown]
            if ids:
                found[row] = vectors_VW[ids].mean(0)
        if self._normalised:
            found /= np.maximum(np.linalg.norm(found, axis=1, keepdims=True), np.float32(1e-12))
        return found

    @staticmethod
    def _shape(folder: Path) -> tuple[int, int]:
        """Raises ConfigError for a folder of another kind."""
        from safetensors import safe_open

        with safe_open(folder / WEIGHTS, "np") as file:
            names = set(file.keys())
            if names != {_TOKENS}:
                raise ConfigError(
                    f"{folder / WEIGHTS} must hold one tensor, {_TOKENS}, got {', '.join(sorted(names)[:5])}; make one with "
                    'limaml distil-encoder, or use provider = "folder" if it is a BERT encoder'
                )
            num_tokens, width = file.get_slice(_TOKENS).get_shape()
        return num_tokens, width

    @cached_property
    def _vectors(self) -> Vectors:
        from safetensors.numpy import load_file

        found: Vectors = load_file(self._folder / WEIGHTS)[_TOKENS].astype(np.float32)
        return found

    @cached_property
    def _tokenizer(self) -> Any:
        return open_tokenizer(self._folder)

    @cached_property
    def _unknown(self) -> int | None:
        """Id of the token that stands for whatever the vocabulary lacks, which says nothing."""
        name = read_settings(self._folder, TOKENS)["model"].get("unk_token")
        found: int | None = self._tokenizer.token_to_id(name) if name else None
        return found


def distil(teacher: BertEncoder, folder: Path) -> Origin:
    """Leave a static encoder in `folder`: the teacher's vector of every token alone, its principal components, weighed.

    Takes a minute of one core for a vocabulary of 30,000.
    """
    from safetensors.numpy import save

    vectors_VH = _of_each_token(teacher)
    weights_V = 1.0 / np.arange(2, len(vectors_VH) + 2)
    weights_V = _SIF / (_SIF + weights_V / weights_V.sum())
    vectors_VW = principal(vectors_VH, min(WIDTH, vectors_VH.shape[1])) * weights_V[:, None]
    own = teacher.origin
    said = {
        "name": f"{own.name}-static",
        "version": own.version,
        "licence": own.licence,
        "attribution": f"distilled from {own.attribution or own.label}",
    }
    settings = {"model_type": "model2vec", "normalize": True, "hidden_dim": vectors_VW.shape[1]}
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing_folder(folder) as made:
        (made / WEIGHTS).write_bytes(save({_TOKENS: vectors_VW.astype(np.float32)}))
        shutil.copyfile(teacher.folder / TOKENS, made / TOKENS)
        for name, value in ((SETTINGS, settings), (ORIGIN, said)):
            (made / name).write_text(json.dumps(value, indent=1, sort_keys=True) + "\n")
    return StaticEncoder(folder).origin


def principal(vectors_VH: Vectors, width: int) -> Vectors:
    """(V, W) the first principal components, each with the sign that makes its largest loading positive."""
    centred = vectors_VH.astype(np.float64)
    centred -= centred.mean(0)
    _, axes_HH = np.linalg.eigh(centred.T @ centred)
    axes_HW = axes_HH[:, ::-1][:, :width]
    axes_HW = axes_HW * np.sign(axes_HW[np.abs(axes_HW).argmax(0), np.arange(width)])
    components: Vectors = (centred @ axes_HW).astype(np.float32)
    return components


def _of_each_token(teacher: BertEncoder) -> Vectors:
    sequences, found = teacher.each_token(), list[Vectors]()
    with progress("distilling", "tokens", len(sequences)) as advance:
        for start in range(0, len(sequences), _BATCH_TOKENS):
            batch = sequences[start : start + _BATCH_TOKENS]
            found.append(teacher.encode_tokens(batch))
            advance(len(batch))
    return np.concatenate(found)
