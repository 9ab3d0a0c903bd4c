"""How far two versions' embeddings of the same entities, or vectors of the same items, are one another's.

A roll-back and a switch of slots go from one to the other. Only its own network reads a version's embeddings (contract 4), so a
rotation of the space is harmless there; whoever reads them elsewhere meets it whole.

    N entities, D embedding width
"""

from typing import Any

import numpy as np
import numpy.typing as npt
from scipy.linalg import orthogonal_procrustes

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


def _unit(x_ND: Floats) -> npt.NDArray[np.float64]:
    x = x_ND.astype(np.float64)
    unit_ND: npt.NDArray[np.float64] = x / np.linalg.norm(x, axis=1, keepdims=True)
    return unit_ND
