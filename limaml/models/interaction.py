"""How a task's embedding meets a row: multiplied with a vector of the row, as an input of the MLP, or both.

F features, K = D - 1 factors, D embedding width
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from limaml.tasks.rows import Rows

Embeddings = Mapping[str, Tensor]
"""Kind -> (…, R, D), or (…, 1, D) where all rows of a task share it."""


class Product(nn.Module):
    """Sum over kinds of <e, [vector, 1]>: the last number of an embedding is the task's level.

    What all candidates share, a user's embedding or a city's, meets the item's vector. What they differ in, an item's or an
    advertiser's, meets the other side of the row: a learned map of its user's and its context's features.
    """

    def __init__(self, kinds: Mapping[str, bool], num_beside: int, num_factors: int) -> None:
        """`kinds`: kind -> whether candidates differ in its entity; `num_beside`: features of user and context."""
        super().__init__()
        self.kinds = tuple(kinds)
        others = {kind: nn.Linear(num_beside, num_factors) for kind, is_of_candidates in kinds.items() if is_of_candidates}
        self.others = nn.ModuleDict(others)

    def vectors(self, item: Tensor, rows: Rows) -> dict[str, Tensor]:
        """Kind -> (…, R, D) what its embedding is multiplied with, [vector, 1]; `item`: the vectors of the rows' items."""
        found = {kind: self.others[kind](rows.beside_item) if kind in self.others else item for kind in self.kinds}
        return {kind: torch.cat([vector, torch.ones_like(vector[..., :1])], dim=-1) for kind, vector in found.items()}

    def forward(self, vectors: Mapping[str, Tensor], embeddings: Embeddings) -> Tensor:
        """(…, R) logits. Multiplied and summed: a matrix product with one column sums in an order that batches change."""
        parts = [(vectors[kind] * e).sum(-1) for kind, e in embeddings.items()]
        return sum(parts[1:], parts[0])


def side_by_side(kinds: Sequence[str], embeddings: Embeddings) -> Tensor:
    """(…, E) embeddings of all kinds, in order, as inputs of the MLP."""
    found = [embeddings[kind] for kind in kinds]
    if len({e.shape[:-1] for e in found}) > 1:
        found = list(torch.broadcast_tensors(*found))  # type: ignore[no-untyped-call]
    return torch.cat(found, dim=-1)
