"""An encoder of text is aligned with what rows say of items, by InfoNCE (van den Oord et al. 2018) through a linear head.

Stages unfreeze from the head downward (Howard and Ruder 2018): the head; the last layer's adapters with it; all adapters. Each
starts from what was kept, and is kept if it lowers the loss on held-out items, which are trained on in no stage.

I items, B items of a batch, H width of the encoder, K width of the head
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from limaml.config import TuningConfig
from limaml.errors import ConfigError, DataError
from limaml.features.columns import Indices
from limaml.progress import progress
from limaml.transfer.adapters import Adapters, adapted, new_adapters
from limaml.transfer.bert import BertEncoder

_HELD_OUT_BATCH = 256


@dataclass(frozen=True)
class Aligned:
    """Items with a text, and what it is aligned with."""

    ids: Sequence[str]
    texts: Sequence[str]
    held_out_I: Indices
    """Items that are judged on, others are trained on; each ascending."""
    trained_I: Indices
    vectors_IK: Tensor
    """Fitted item vectors; with pairs only their width counts."""
    partners: Sequence[Indices] | None = None
    """Of each item those it pairs with, as often as it does; None: it is aligned with its vector."""

    def side(self, items: Indices) -> "Aligned":
        """With those items as the only partners, so that no pair crosses from trained to held-out ones."""
        assert self.partners is not None
        inside = [found[np.isin(found, items)] for found in self.partners]
        return replace(self, partners=inside)


@dataclass(frozen=True)
class Tuned:
    """Adapters that were kept, none if none helped, and the held-out items' loss after each stage (nats)."""

    adapters: Adapters
    losses: dict[str, float] = field(default_factory=dict)
    kept: tuple[str, ...] = ()


@dataclass
class _State:
    head_KH: Tensor
    adapters: Adapters

    def copy(self) -> "_State":
        def own(value: Tensor) -> Tensor:
            return value.detach().clone().requires_grad_()

        return _State(own(self.head_KH), {name: (own(down), own(up)) for name, (down, up) in self.adapters.items()})

    def groups(self, cfg: TuningConfig, num_layers: int) -> list[dict[str, object]]:
        """Each tensor's learning rate, of its layer's place below the last."""
        found: list[dict[str, object]] = [{"params": [self.head_KH], "lr": cfg.lr, "weight_decay": cfg.weight_decay}]
        for name, pair in self.adapters.items():
            below = num_layers - 1 - int(name.split(".")[2])
            found.append({"params": list(pair), "lr": cfg.adapter_lr * cfg.layer_lr_decay**below, "weight_decay": 0.0})
        return found


def tune(encoder: BertEncoder, aligned: Aligned, cfg: TuningConfig) -> Tuned:
    """Adapters of `encoder`, deterministic in `tuning.seed` (to rounding, which the number of threads changes).

    Raises ConfigError if the adapters do not fit the encoder or the budget, DataError if a side has fewer than two items.
    """
    if cfg.layers > encoder.num_layers:
        raise ConfigError(f"tuning.layers must be <= the encoder's {encoder.num_layers}, got {cfg.layers}; lower it")
    generator, top = torch.Generator().manual_seed(cfg.seed), encoder.num_layers
    width = aligned.vectors_IK.shape[1]
    head_KH = (torch.randn(width, encoder.origin.width, generator=generator) / encoder.origin.width**0.5).requires_grad_()
    every = new_adapters(encoder, range(top - cfg.layers, top), cfg.rank, generator)
    num_parameters = head_KH.numel() + sum(part.numel() for pair in every.values() for part in pair)
    if num_parameters > cfg.max_parameters:
        raise ConfigError(
            f"tuning.max_parameters must hold the head's and the adapters' {num_parameters}, got {cfg.max_parameters}; lower "
            "tuning.rank or tuning.layers, or raise it"
        )
    run = _Run(encoder, aligned, cfg, generator)
    best, best_loss, losses, kept = _State(head_KH, {}), float("inf"), dict[str, float](), list[str]()
    last = {name: pair for name, pair in every.items() if name.startswith(f"encoder.layer.{top - 1}.")}
    for stage, added in (("head", {}), ("last layer", last), ("all layers", every)):
        started = best.copy()
        started.adapters = {**_State(head_KH, dict(added)).copy().adapters, **started.adapters}
        found, losses[stage] = run.stage(stage, started)
        if losses[stage] < best_loss:
            best, best_loss = found, losses[stage]
            kept.append(stage)
    return Tuned(best.adapters, losses, tuple(kept))


def info_nce(own_BK: Tensor, other_BK: Tensor, item_B: Tensor, partner_B: Tensor, temperature: float) -> Tensor:
    """Mean loss of finding each item's counterpart among the batch's, and of each counterpart its item (nats).

    A counterpart that is the same item, or the same counterpart, as another row's is not that row's negative.
    """
    logits_BB = F.normalize(own_BK, dim=1) @ F.normalize(other_BK, dim=1).T / temperature
    same_BB = (item_B[:, None] == item_B) | (partner_B[:, None] == partner_B) | (item_B[:, None] == partner_B)
    same_BB = same_BB & ~torch.eye(len(item_B), dtype=torch.bool)
    right_B = torch.arange(len(item_B))
    logits_BB = logits_BB.masked_fill(same_BB, -torch.inf)
    there, back = F.cross_entropy(logits_BB, right_B), F.cross_entropy(logits_BB.T, right_B)
    return 0.5 * (there + back)


class _Run:
    """What all stages share."""

    def __init__(self, encoder: BertEncoder, aligned: Aligned, cfg: TuningConfig, generator: torch.Generator) -> None:
        self._encoder, self._cfg, self._generator = encoder, cfg, generator
        self._tokens = encoder.tokens_of(aligned.texts)
        self._vectors_IK = aligned.vectors_IK - aligned.vectors_IK[torch.from_numpy(aligned.trained_I)].mean(0)
        self._sides = [aligned, aligned]
        if aligned.partners is not None:
            self._sides = [aligned.side(aligned.trained_I), aligned.side(aligned.held_out_I)]
        self._trained, self._held_out = (
            items if side.partners is None else np.array([item for item in items if len(side.partners[item])], np.int64)
            for items, side in zip((aligned.trained_I, aligned.held_out_I), self._sides, strict=True)
        )
        for what, items in (("held-out", self._held_out), ("other", self._trained)):
            if len(items) < 2:
                raise DataError(
                    f"tuning needs at least 2 {what} items with a text, {cfg.min_item_rows} rows and what it is aligned with, "
                    f"got {len(items)}; lower tuning.min_item_rows, change tuning.held_out_items, or train on more rows"
                )
        self._frozen_IH: Tensor | None = None

    def stage(self, name: str, state: _State) -> tuple[_State, float]:
        """The state of the pass with the lowest loss on held-out items, and that loss."""
        cfg = self._cfg
        optimizer = torch.optim.AdamW(state.groups(cfg, self._encoder.num_layers))
        best, best_loss, worse = state.copy(), self._judge(state), 0
        with progress(f"tuning, {name}", "items", cfg.max_epochs * len(self._trained)) as advance:
            for _ in range(cfg.max_epochs):
                order = self._trained[torch.randperm(len(self._trained), generator=self._generator).numpy()]
                for items in np.array_split(order, max(1, len(order) // cfg.batch_items)):
                    optimizer.zero_grad()
                    self._loss(state, items, self._sides[0], self._generator, cfg.dropout).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    advance(len(items))
                loss = self._judge(state)
                if loss < best_loss:
                    best, best_loss, worse = state.copy(), loss, 0
                else:
                    worse += 1
                if worse == cfg.patience:
                    break
        return best, best_loss

    @torch.no_grad()
    def _judge(self, state: _State) -> float:
        """Loss on all held-out items, without dropout, with partners drawn alike each time."""
        generator, total = torch.Generator().manual_seed(self._cfg.seed), 0.0
        order = self._held_out[torch.randperm(len(self._held_out), generator=generator).numpy()]
        for items in np.array_split(order, -(-len(order) // _HELD_OUT_BATCH)):
            total += len(items) * float(self._loss(state, items, self._sides[1], generator, 0.0))
        return total / len(order)

    def _loss(self, state: _State, items: Indices, side: Aligned, generator: torch.Generator, dropout: float) -> Tensor:
        partners, other_BK = items, None
        if side.partners is not None:
            draws = torch.rand(len(items), generator=generator).tolist()
            partners = np.array([side.partners[i][int(u * len(side.partners[i]))] for i, u in zip(items, draws, strict=True)])
        read_BH = self._read(state, np.concatenate([items, partners]) if side.partners is not None else items)
        if dropout:
            read_BH = read_BH * (torch.rand(read_BH.shape, generator=generator) >= dropout) / (1.0 - dropout)
        own_BK = read_BH @ state.head_KH.T
        if side.partners is not None:
            own_BK, other_BK = own_BK[: len(items)], own_BK[len(items) :]
        else:
            other_BK = self._vectors_IK[torch.from_numpy(items)]
        return info_nce(own_BK, other_BK, torch.from_numpy(items), torch.from_numpy(partners), self._cfg.temperature)

    def _read(self, state: _State, items: Indices) -> Tensor:
        """(B, H) vectors of texts; those of the frozen encoder are made once."""
        if state.adapters:
            return self._encoder.vectors_by(adapted(self._encoder, state.adapters), [self._tokens[item] for item in items])
        if self._frozen_IH is None:
            pieces = range(0, len(self._tokens), _HELD_OUT_BATCH)
            found = [self._encoder.encode_tokens(self._tokens[start : start + _HELD_OUT_BATCH]) for start in pieces]
            self._frozen_IH = torch.from_numpy(np.concatenate(found))
        return self._frozen_IH[torch.from_numpy(items)]
