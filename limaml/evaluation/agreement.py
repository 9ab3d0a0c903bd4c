"""How far two versions' embeddings of the same entities, or vectors of the same items, are one another's.

A roll-back and a switch of slots go from one to the other. Only its own network reads a version's embeddings (contract 4), so a
rotation of the space is harmless there; whoever reads them elsewhere meets it whole.

    N entities, D embedding width
"""

from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
from scipy.linalg import orthogonal_procrustes

from limaml.config import Config
from limaml.models.bundle import Model
from limaml.tasks.sampling import TaskRows, support_spec
from limaml.training.scoring import embed_specs

MAX_ENTITIES = 2000
"""So many are adapted by both versions, evenly spaced by name."""
Floats = npt.NDArray[np.floating[Any]]


def agreement(before_ND: Floats, after_ND: Floats) -> dict[str, float]:
    """Mean cosine between rows as they are, and after the rotation (or reflection) that makes it largest.

    With unit rows that is the orthogonal Procrustes problem (Schoenemann 1966). `number` is that of the rows that are zero on
    neither side; both cosines are NaN where there is none.
    """
    norms_N = np.minimum(np.linalg.norm(before_ND, axis=1), np.linalg.norm(after_ND, axis=1))
    before_ND, after_ND = (_unit(each[norms_N > 0]) for each in (before_ND, after_ND))
    if not len(before_ND):
        return {"number": 0, "cosine": float("nan"), "rotated_cosine": float("nan")}
    rotation_DD, _ = orthogonal_procrustes(after_ND, before_ND)
    cosine, rotated = (float((before_ND * each).sum(axis=1).mean()) for each in (after_ND, after_ND @ rotation_DD))
    return {"number": len(before_ND), "cosine": cosine, "rotated_cosine": rotated}


def versions_agree(
    before: tuple[Config, Model], after: tuple[Config, Model], logged: pa.Table, as_of_us: int
) -> dict[str, dict[str, float] | None]:
    """`agreement` of `embeddings` of entities in `logged`, of the first kind, adapted by both versions on their rows before one
    instant, and of the vectors of `items` that both know.

    None where there is nothing to compare: another kind, another width, no item in common.
    """
    kinds = [cfg.task_kind for cfg, _ in (before, after)]
    embeddings = None
    if kinds[0].name == kinds[1].name and kinds[0].entity_column == kinds[1].entity_column:
        chosen = _sampled(logged, kinds[0].entity_column)
        embeddings = _compared(*(_embeddings(*version, chosen, as_of_us) for version in (before, after)))
    vectors = [_vectors(model) for _, model in (before, after)]
    shared = sorted(vectors[0].keys() & vectors[1].keys())
    return {
        "embeddings": embeddings,
        "items": _compared(*(np.array([each[item] for item in shared]) for each in vectors)) if shared else None,
    }


def _sampled(logged: pa.Table, column: str) -> pa.Table:
    names = np.array(sorted(pc.unique(logged[column]).to_pylist()), dtype=object)
    at = np.linspace(0, len(names) - 1, min(len(names), MAX_ENTITIES)).round().astype(np.int64)
    return logged.filter(pc.is_in(logged[column], value_set=pa.array(names[at], pa.string())))


def _embeddings(cfg: Config, model: Model, logged: pa.Table, as_of_us: int) -> Floats:
    rows = TaskRows.from_logged(logged, model.encoder, cfg.task_kind)
    num_rows = cfg.support_rows_of(cfg.task_kind.name)
    specs = [support_spec(rows, entity, as_of_us, num_rows) for entity in range(rows.num_entities)]
    found: Floats = embed_specs(model.network, rows, specs).detach().numpy()
    return found


def _vectors(model: Model) -> dict[str, Floats]:
    items = model.network.global_block.items
    return {} if items is None else dict(zip(model.encoder.items, items.item[1:].detach().cpu().numpy(), strict=True))


def _compared(before_ND: Floats, after_ND: Floats) -> dict[str, float] | None:
    found = agreement(before_ND, after_ND) if before_ND.shape == after_ND.shape else None
    return found if found and found["number"] else None


def _unit(x_ND: Floats) -> npt.NDArray[np.float64]:
    x = x_ND.astype(np.float64)
    unit_ND: npt.NDArray[np.float64] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit_ND
