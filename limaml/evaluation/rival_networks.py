"""Rivals of LiMAML with the same global block: without personalisation, and with an embedding for every user id.

T tasks, R rows, D embedding width, V width of a user's vector
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from limaml.config import Config
from limaml.features.encoder import EncoderDims
from limaml.models.global_block import GlobalBlock
from limaml.tasks.rows import Rows


class GlobalMlp(nn.Module):
    """The global block alone: a row's score is a function of its features. A user's vector is empty (V = 0)."""

    def __init__(self, cfg: Config, dims: EncoderDims) -> None:
        super().__init__()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.training.seed)
            self.global_block = GlobalBlock(cfg.model, dims, {})

    def vectors(self, entity_index_T: Tensor) -> Tensor:
        return torch.zeros(len(entity_index_T), 0)

    def forward(self, rows: Rows, _vector_TV: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (T, R)."""
        logits_TR: Tensor = self.global_block(rows, {}, self.global_block.draw_dropout(rows, generator))
        return logits_TR


class WideDeep(nn.Module):
    """Wide and deep (Cheng et al. 2016): a linear part over ids plus the global block with a user-ID embedding.

    A user's vector (V = D + 1) is the deep part's embedding and, last, the wide part's weight of that user. Row 0 is the
    unknown user, trained by tasks whose entity is hidden; a new user's vector starts there.
    """

    def __init__(self, cfg: Config, dims: EncoderDims) -> None:
        super().__init__()
        self.kind = cfg.task_kind.name
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(cfg.training.seed)
            # Trained with the rest: nothing of LiMAML's own fit reaches the rival.
            learned = cfg.model.model_copy(update={"item_vectors": "learned"})
            self.global_block = GlobalBlock(learned, dims, {self.kind: cfg.is_of_candidates(cfg.task_kind)})
            self.users = nn.Embedding(dims.num_entities + 1, cfg.model.embedding_dim + 1)
            self.items = nn.Embedding(dims.num_items + 1, 1)
            nn.init.normal_(self.users.weight, std=0.1)
            nn.init.zeros_(self.items.weight)

    def vectors(self, entity_index_T: Tensor) -> Tensor:
        """(T, V) users' vectors; index 0 is the unknown user."""
        vector_TV: Tensor = self.users(entity_index_T)
        return vector_TV

    def forward(self, rows: Rows, vector_TV: Tensor, generator: torch.Generator | None = None) -> Tensor:
        """Logits (T, R) of rows scored with their tasks' vectors."""
        return self.score(self.encode(rows, generator), vector_TV)

    def encode(self, rows: Rows, generator: torch.Generator | None = None) -> Any:
        """What of rows does not depend on the vectors: `score`'s own."""
        keep = self.global_block.draw_dropout(rows, generator)
        return self.global_block.encode(rows, keep), self.items(rows.item_index_TR).squeeze(-1), keep

    def score(self, encoded: Any, vector_TV: Tensor) -> Tensor:
        """Logits (T, R) of encoded rows."""
        state, item_TR, keep = encoded
        deep_TR: Tensor = self.global_block.score(state, {self.kind: vector_TV[:, None, :-1]}, keep)
        wide_TR: Tensor = item_TR + vector_TV[:, -1:]
        return deep_TR + wide_TR

    def fit_vectors(
        self, support: Rows, entity_index_T: Tensor, *, rate: float, steps: tuple[int, ...], damping: float
    ) -> dict[int, Tensor]:
        """(T, V) vectors after each number of gradient steps in `steps` (each >= 1), the network frozen.

        A task's loss is the sum over its support rows / (rows + damping), as LiMAML's inner loss is; a task without support
        keeps the vector it starts from. Raises ValueError if the support has no labels.
        """
        if support.label_TR is None:
            raise ValueError("support rows must carry labels to fit a vector on, got none; build them with build_batch")
        damped_T = (support.mask_TR.sum(dim=1) + damping).clamp(min=torch.finfo(torch.float32).tiny)
        vector_TV, found = self.vectors(entity_index_T).detach(), {}
        with torch.no_grad():
            encoded = self.encode(support)
        for step in range(1, max(steps) + 1):
            at = vector_TV.requires_grad_()
            loss_TR = F.binary_cross_entropy_with_logits(self.score(encoded, at), support.label_TR, reduction="none")
            loss_T = (loss_TR * support.mask_TR).sum(dim=1) / damped_T
            (gradient_TV,) = torch.autograd.grad(loss_T.sum(), at)
            vector_TV = at.detach() - rate * gradient_TV
            if step in steps:
                found[step] = vector_TV
        return found
