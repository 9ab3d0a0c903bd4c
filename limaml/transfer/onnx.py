"""An encoder of sentences in an ONNX file, computed by onnxruntime on one thread of the processor.

N texts, L tokens of the longest one, H hidden width (the vector's)
"""

from collections.abc import Callable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limaml.errors import ConfigError
from limaml.transfer.encoders import Vectors
from limaml.transfer.sentences import SentenceEncoder

_MODEL = "model.onnx"
_FOLDERS = ("", "onnx")
"""Where it lies: in the folder itself, as optimum leaves it, or where sentence-transformers keeps it."""
_STATES = ("last_hidden_state", "token_embeddings")
"""What optimum and sentence-transformers call the tokens' states."""
_INPUTS = (["attention_mask", "input_ids"], ["attention_mask", "input_ids", "token_type_ids"])
_TYPES = {"tensor(int64)": np.int64, "tensor(int32)": np.int32}


class OnnxEncoder(SentenceEncoder):
    """Of any architecture: the file is the network. Tokens, pooling and origin are the folder's, as of `BertEncoder`."""

    def __init__(self, folder: Path) -> None:
        where = next((folder / name for name in _FOLDERS if (folder / name / _MODEL).is_file()), None)
        if where is None:
            raise ConfigError(
                f"transfer.path must be a folder with {_MODEL} or onnx/{_MODEL}, got {folder} without; copy the model's whole "
                'folder, or use provider = "folder" if its weights are safetensors'
            )
        self._model = where / _MODEL
        # Weights of a large one lie in files beside it: model.onnx_data.
        super().__init__(folder, sorted(str(file.relative_to(folder)) for file in where.glob(f"{_MODEL}*")))

    def encode_tokens(self, tokens: Sequence[Sequence[int]]) -> Vectors:
        if not tokens:
            return np.zeros((0, self.origin.width), np.float32)
        ids_NL, mask_NL = self._padded(tokens)
        given = {"input_ids": ids_NL, "attention_mask": mask_NL, "token_type_ids": torch.zeros_like(ids_NL)}
        inputs, output = self._names
        fed = {name: given[name].numpy().astype(_TYPES[kind]) for name, kind in inputs.items()}
        hidden_NLH = torch.from_numpy(self._call(self._session.run, [output], fed)[0]).float()
        self._require_known({f"{_MODEL}: shape of {output}": (tuple(hidden_NLH.shape), ((*ids_NL.shape, self.origin.width),))})
        vectors: Vectors = self._pool(hidden_NLH, mask_NL).numpy()
        return vectors

    @cached_property
    def _session(self) -> Any:
        try:
            import onnxruntime
        except ImportError as error:
            raise ConfigError(
                "provider onnx needs the package onnxruntime, which is not installed; pip install 'limaml[text]'"
            ) from error
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.use_deterministic_compute = True
        options.log_severity_level = 4  # What fails is raised.
        return self._call(onnxruntime.InferenceSession, str(self._model), options, providers=["CPUExecutionProvider"])

    @cached_property
    def _names(self) -> tuple[dict[str, str], str]:
        """Inputs with their types, and the output that is the tokens' states: of a known name, or the only one.

        Raises ConfigError for a model that is not of texts.
        """
        inputs = {found.name: found.type for found in self._session.get_inputs()}
        outputs = [found.name for found in self._session.get_outputs()]
        states = [name for name in outputs if name in _STATES] or outputs
        self._require_known(
            {
                f"{_MODEL}: inputs": (sorted(inputs), _INPUTS),
                **{f"{_MODEL}: type of {name}": (kind, tuple(_TYPES)) for name, kind in inputs.items()},
                f"{_MODEL}: outputs": (outputs if len(states) > 1 else states[0], (states[0], *_STATES)),
            }
        )
        return inputs, states[0]

    def _call(self, what: Callable[..., Any], *given: Any, **named: Any) -> Any:
        """Raises ConfigError with what onnxruntime says."""
        from onnxruntime.capi import onnxruntime_pybind11_state as said

        try:
            return what(*given, **named)
        except tuple(each for each in vars(said).values() if isinstance(each, type) and issubclass(each, Exception)) as error:
            raise ConfigError(
                f"{self._model} must be a model that onnxruntime computes: {str(error).strip()}; copy its folder again, "
                "or write how many tokens it takes into sentence_bert_config.json (max_seq_length)"
            ) from error
