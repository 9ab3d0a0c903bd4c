"""Low-rank adapters (LoRA, Hu et al. 2022) of a frozen BERT encoder: W + up down, on a layer's query and value weights.

D width of the layer, Q rank
"""

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from limaml.errors import ConfigError
from limaml.io import atomic
from limaml.transfer.bert import BertEncoder
from limaml.transfer.encoders import Origin
from limaml.transfer.folders import ORIGIN, WEIGHTS

_ADAPTED = "encoder.layer.{}.attention.self.{}.weight"

Adapters = dict[str, tuple[Tensor, Tensor]]
"""Name of a weight -> down (Q, D) and up (D, Q)."""


def new_adapters(encoder: BertEncoder, layers: Sequence[int], rank: int, generator: torch.Generator) -> Adapters:
    """Up starts at zero: the encoder is what it was. Raises ConfigError for a rank as wide as a weight."""
    made: Adapters = {}
    for name in (_ADAPTED.format(layer, part) for layer in layers for part in ("query", "value")):
        out, width = encoder.weights[name].shape
        if rank >= min(out, width):
            raise ConfigError(f"tuning.rank must be less than the encoder's width, {min(out, width)}, got {rank}; lower it")
        down_QD = torch.randn(rank, width, generator=generator) / width**0.5
        made[name] = (down_QD.requires_grad_(), torch.zeros(out, rank, requires_grad=True))
    return made


def adapted(encoder: BertEncoder, adapters: Adapters) -> dict[str, Tensor]:
    """The encoder's weights with what the adapters add, differentiable in them."""
    return encoder.weights | {name: encoder.weights[name] + up @ down for name, (down, up) in adapters.items()}


def write_adapted(encoder: BertEncoder, adapters: Adapters, folder: Path, said: Mapping[str, Any]) -> Origin:
    """Leave the encoder with its adapters merged in `folder`, with all else that its own folder holds of it.

    Licence and attribution are its own; its version is the digest's first 12 digits. `said` is added to `encoder.json`.
    """
    from safetensors.torch import load_file, save_file

    stored = load_file(encoder.folder / WEIGHTS)
    merged = adapted(encoder, adapters)
    for name in stored:
        if (own := name.removeprefix("bert.")) in adapters:
            stored[name] = merged[own].detach().to(stored[name].dtype).contiguous()
    own_origin = encoder.origin
    origin = {
        "name": f"{own_origin.name}-tuned",
        "licence": own_origin.licence,
        "attribution": f"adapted from {own_origin.attribution or own_origin.label}",
    }
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic.replacing_folder(folder) as made:
        save_file(stored, made / WEIGHTS, {"format": "pt"})
        for file in encoder.files:
            if file.name != WEIGHTS:
                (made / file.relative_to(encoder.folder)).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(file, made / file.relative_to(encoder.folder))
        (made / ORIGIN).write_text(json.dumps({**origin, **said}, indent=1, sort_keys=True) + "\n")
    return BertEncoder(folder).origin
