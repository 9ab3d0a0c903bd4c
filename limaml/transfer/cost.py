"""What a text costs to encode."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from limaml.errors import ConfigError
from limaml.transfer.bert import BertEncoder

_TEXTS, _BATCH, _TURNS = 128, 64, 3


def ms_per_item(encoder: BertEncoder, weights: Mapping[str, Tensor], texts: Sequence[str]) -> float:
    """Milliseconds a text with tokens, on one thread, of `weights`: the least of three turns over texts of every length."""
    ordered = sorted(texts, key=len)
    texts = ordered[:: max(1, len(ordered) // _TEXTS)]
    batches = [texts[start : start + _BATCH] for start in range(0, len(texts), _BATCH)]
    num_threads, turns = torch.get_num_threads(), list[float]()
    torch.set_num_threads(1)
    try:
        with torch.inference_mode():
            encoder.vectors_by(weights, encoder.tokens_of(batches[0]))
            for _ in range(_TURNS):
                started = time.perf_counter()
                for batch in batches:
                    encoder.vectors_by(weights, encoder.tokens_of(batch))
                turns.append(time.perf_counter() - started)
    finally:
        torch.set_num_threads(num_threads)
    return 1000.0 * min(turns) / len(texts)


@dataclass
class TimeBudget:
    """`tuning.max_ms_per_item` over the catalogue's texts."""

    max_ms: float | None
    texts: Sequence[str]
    spent: dict[str, float] = field(default_factory=dict)
    """What was measured, by when."""

    def require(self, encoder: BertEncoder, weights: Mapping[str, Tensor], when: str) -> None:
        """Raises ConfigError if those weights take longer; measures nothing without a budget or a text."""
        if self.max_ms is None or not self.texts:
            return
        self.spent[when] = round(ms_per_item(encoder, weights, self.texts), 3)
        if self.spent[when] > self.max_ms:
            raise ConfigError(
                f"tuning.max_ms_per_item must hold what {encoder.origin.label} takes {when}, {self.spent[when]} ms an item on "
                f"one thread, got {self.max_ms:g}; name a smaller encoder, shorten tuning.template, raise it, or use a static "
                "one (limaml distil-encoder)"
            )
