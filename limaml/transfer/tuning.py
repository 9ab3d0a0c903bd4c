"""An encoder of text is aligned with what rows say of items, by InfoNCE (van den Oord et al. 2018) through a linear head.

Stages unfreeze from the head downward (Howard and Ruder 2018): the head; the last layer's adapters with it; all adapters. Each
starts from what was kept, and is kept if it lowers the loss on held-out items, which are trained on in no stage. After the head
may come a stage on texts alone, by contrast under dropout (SimCSE, Gao et al. 2021): it trains the very vector that is used,
where predicting masked tokens would need an output layer that encoders of sentences no longer have.

I items, B items of a batch, H width of the encoder, K width of the head
"""

from collections.abc import Iterable, Sequence
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
_DOMAIN_DROPOUT, _DOMAIN_TEMPERATURE = 0.1, 0.05
"""As Gao et al. (2021) have them."""


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
    domain: Sequence[str] = ()
    """Texts of the catalogue, held-out items' left out, for the stage that needs no row."""

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
    stages: dict[str, Adapters] = field(default_factory=dict)
    """What each stage found, kept or not."""


@dataclass
class _State:
    head_KH: Tensor
    adapters: Adapters

    def copy(self) -> "_State":
        def own(value: Tensor) -> Tensor:
            return value.detach().clone().requires_grad_()

        return _State(own(self.head_KH), {name: (own(down), own(up)) for name, (down, up) in self.adapters.items()})

    def of_head(self, cfg: TuningConfig) -> dict[str, object]:
        return {"params": [self.head_KH], "lr": cfg.lr, "weight_decay": cfg.weight_decay}

    def of_adapters(self, cfg: TuningConfig, num_layers: int, names: Iterable[str]) -> list[dict[str, object]]:
        """Each one's learning rate, of its layer's place below the last."""
        rates = {name: cfg.adapter_lr * cfg.layer_lr_decay ** (num_layers - 1 - int(name.split(".")[2])) for name in names}
        return [{"params": list(self.adapters[name]), "lr": rate, "weight_decay": 0.0} for name, rate in rates.items()]


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
    every_stage = dict[str, Adapters]()
    last = {name: pair for name, pair in every.items() if name.startswith(f"encoder.layer.{top - 1}.")}
    domain = {"domain": every} if cfg.domain_epochs else {}
    stages: dict[str, Adapters] = {"head": {}, **domain, "last layer": last, "all layers": every}
    for stage, trained in stages.items():
        started = best.copy()
        started.adapters = {**_State(head_KH, dict(trained)).copy().adapters, **started.adapters}
        found, losses[stage] = run.domain(started) if stage == "domain" else run.stage(stage, started, list(trained))
        every_stage[stage] = found.adapters
        if losses[stage] < best_loss:
            best, best_loss = found, losses[stage]
            kept.append(stage)
    return Tuned(best.adapters, losses, tuple(kept), every_stage)


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
        self._domain = encoder.tokens_of(list(dict.fromkeys(aligned.domain)))
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
        if cfg.domain_epochs and len(self._domain) < 2:
            raise DataError(
                f"tuning.domain_epochs needs at least 2 texts that are not held out, got {len(self._domain)}; set it to 0, or "
                "change tuning.template"
            )
        self._frozen_IH: Tensor | None = None

    def domain(self, state: _State) -> tuple[_State, float]:
        """Adapters of the pass over texts alone after which a head has the lowest loss on held-out items, and that loss."""
        cfg = self._cfg
        optimizer = torch.optim.AdamW(state.of_adapters(cfg, self._encoder.num_layers, state.adapters))
        best, best_loss, worse = state, float("inf"), 0
        for _ in range(cfg.domain_epochs):
            with progress("tuning, domain", "texts", len(self._domain)) as advance:
                order = torch.randperm(len(self._domain), generator=self._generator).numpy()
                for texts in np.array_split(order, max(1, len(order) // cfg.batch_items)):
                    optimizer.zero_grad()
                    self._contrast(state, texts).backward()  # type: ignore[no-untyped-call]
                    optimizer.step()
                    advance(len(texts))
            found, loss = self.stage("domain's head", state.copy(), [])
            if loss < best_loss:
                best, best_loss, worse = found, loss, 0
            else:
                worse += 1
            if worse == cfg.patience:
                break
        return best, best_loss

    def _contrast(self, state: _State, texts: Indices) -> Tensor:
        """Mean loss of finding each text among the batch's, both under dropout (nats)."""
        weights, tokens = adapted(self._encoder, state.adapters), [self._domain[text] for text in texts]

        def drop(x: Tensor) -> Tensor:
            return x * (torch.rand(x.shape, generator=self._generator) >= _DOMAIN_DROPOUT) / (1.0 - _DOMAIN_DROPOUT)

        one_BH, other_BH = (self._encoder.vectors_by(weights, tokens, drop) for _ in range(2))
        own_B = torch.from_numpy(texts)
        return info_nce(one_BH, other_BH, own_B, own_B, _DOMAIN_TEMPERATURE)

    def stage(self, name: str, state: _State, trained: Sequence[str]) -> tuple[_State, float]:
        """Head and the adapters `trained` of the pass with the lowest loss on held-out items, and that loss."""
        cfg = self._cfg
        adapters = state.of_adapters(cfg, self._encoder.num_layers, trained)
        optimizer = torch.optim.AdamW([state.of_head(cfg), *adapters])
        self._frozen_IH = None if trained else self._vectors_of_all(state)
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
        """(B, H) vectors of texts."""
        if self._frozen_IH is not None:
            return self._frozen_IH[torch.from_numpy(items)]
        return self._encoder.vectors_by(adapted(self._encoder, state.adapters), [self._tokens[item] for item in items])

    @torch.no_grad()
    def _vectors_of_all(self, state: _State) -> Tensor:
        """(I, H) by adapters that the stage leaves as they are."""
        weights = adapted(self._encoder, state.adapters)
        pieces = range(0, len(self._tokens), _HELD_OUT_BATCH)
        found = [self._encoder.vectors_by(weights, self._tokens[start : start + _HELD_OUT_BATCH]) for start in pieces]
        return torch.cat(found)
