"""Does what one world's texts say of its items help in another? Both are encoded by one encoder, so both share its space.

In each world a ridge takes texts to fitted item vectors, y = x B. Factors of two worlds are turned against each other, so
what can be carried over is which directions of the encoder's space count, and how much: of B = U S V', the map A = U S. In
the second world a ridge from n of its items shrinks B towards c A R, rotation R and scale c the best for these items
(Procrustes): A of the first world, of the second world's other items, of random orthogonal directions with the first one's
S, and A = 0. Items are judged as in `benchmarks.encoders`; of each n the items are drawn ten times.

    OMP_NUM_THREADS=1 python -m benchmarks.cross_domain --source movielens --target grocery --out OUT.json

    N items of a fit, I known items, J judged items, H width of the encoder, K factors
"""

import argparse
import json
import logging
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.encoders import TEMPLATES, Floats, Judged, in_batches, judged_items, world_rows
from limaml import metrics, telemetry
from limaml.transfer.bert import minilm
from limaml.transfer.tune_encoder import aligned_items

DRAWS, COUNTS = 10, (10, 30, 100, 300)
_PENALTIES = np.logspace(-3, 2, 11)


class World:
    """Texts' vectors and targets of items that are known, and the judged items."""

    def __init__(self, name: str, root: str) -> None:
        read = world_rows(name, root)
        aligned = aligned_items(read.cfg, read.known, read.items)
        vectors_IK = aligned.vectors_IK.double().numpy()
        self.judged: Judged = judged_items(read.cfg, read.logged, read.texts, list(aligned.ids), vectors_IK)
        encode = minilm().encode
        self.x_IH, self.x_JH = (in_batches(encode, [*each]).astype(float) for each in (aligned.texts, self.judged.texts))
        self.mean_H = self.x_IH.mean(0)
        self.x_IH, self.x_JH = self.x_IH - self.mean_H, self.x_JH - self.mean_H
        self.rate_I, self.vectors_IK = read.rates(aligned.ids), vectors_IK - vectors_IK.mean(0)
        self.mean_K = vectors_IK.mean(0)

    def aucs(self, vectors_JK: Floats, rate_J: Floats) -> tuple[float, float]:
        """Pooled and per user, of the judged items' rows."""
        judged = self.judged
        at_RK = (vectors_JK + self.mean_K)[judged.item_R]
        score_R = (judged.users_RL[:, :-1] * at_RK).sum(1) + judged.users_RL[:, -1] + rate_J[judged.item_R]
        per_user = metrics.mean_per_user_auc(judged.label_R, score_R, judged.user_R, judged.num_users)
        return 100 * metrics.auc(judged.label_R, score_R), 100 * per_user


def ridge(x_NH: Floats, y_NK: Floats, penalty: float) -> Floats:
    """(H, K), its penalty relative to the mean square of `x_NH`; by the dual, since there are few rows."""
    gram_NN = x_NH @ x_NH.T
    scale = np.trace(gram_NN) / len(gram_NN)
    solved: Floats = x_NH.T @ np.linalg.solve(gram_NN + penalty * scale * np.eye(len(gram_NN)), y_NK)
    return solved


def towards(x_NH: Floats, y_NK: Floats, map_HK: Floats, penalty: float) -> Floats:
    """(H, K): a ridge that shrinks to `map_HK`, turned and scaled as fits these rows best."""
    made_NK = x_NH @ map_HK
    left, strengths, right = np.linalg.svd(made_NK.T @ y_NK)
    size = float((made_NK**2).sum())
    start_HK = map_HK @ left @ right * (strengths.sum() / size if size else 0.0)
    return start_HK + ridge(x_NH, y_NK - x_NH @ start_HK, penalty)


def best_penalty(x_NH: Floats, y_NK: Floats, map_HK: Floats) -> float:
    """Of least error over five folds."""
    folds = np.arange(len(x_NH)) % 5

    def error(penalty: float) -> float:
        left = [
            y_NK[folds == k] - x_NH[folds == k] @ towards(x_NH[folds != k], y_NK[folds != k], map_HK, penalty) for k in range(5)
        ]
        return float(np.mean(np.concatenate(left) ** 2))

    return min(_PENALTIES, key=error)


def as_wide(map_HK: Floats, width: int) -> Floats:
    """Its leading directions with their strengths, as many as the other world has factors."""
    left, strengths, _ = np.linalg.svd(map_HK, full_matrices=False)
    found = left[:, :width] * strengths[:width]
    return np.pad(found, ((0, 0), (0, width - found.shape[1])))


def measure(source: World, target: World) -> dict[str, Any]:
    width, draw = target.vectors_IK.shape[1], np.random.default_rng(0)
    maps_HK, penalties = list[Floats](), list[float]()
    for world in (source, target):
        none_HK = np.zeros((world.x_IH.shape[1], world.vectors_IK.shape[1]))
        penalties.append(best_penalty(world.x_IH, world.vectors_IK, none_HK))
        maps_HK.append(as_wide(ridge(world.x_IH, world.vectors_IK, penalties[-1]), width))
    carried_HK, found = maps_HK[0], dict[str, Any]()
    for count in (each for each in COUNTS if each < len(target.x_IH)):
        rows: dict[str, list[tuple[float, float]]] = {}
        for _ in range(DRAWS):
            order = draw.permutation(len(target.x_IH))
            at, rest = order[:count], order[count:]
            maps = {
                "none": np.zeros_like(carried_HK),
                "of the first world": carried_HK,
                "of its own other items": as_wide(ridge(target.x_IH[rest], target.vectors_IK[rest], penalties[1]), width),
                "random": np.linalg.qr(draw.normal(size=carried_HK.shape))[0] * np.linalg.norm(carried_HK, axis=0),
            }
            x, y, rate = target.x_IH[at], target.vectors_IK[at], target.rate_I[at]
            rates = rate[:, None] - rate.mean()
            rate_J = (target.x_JH @ ridge(x, rates, best_penalty(x, rates, np.zeros((x.shape[1], 1)))))[:, 0] + rate.mean()
            for name, map_HK in maps.items():
                fitted_HK = towards(x, y, map_HK, best_penalty(x, y, map_HK))
                rows.setdefault(name, []).append(target.aucs(target.x_JH @ fitted_HK, rate_J))
            no_text_JK = np.zeros((len(target.x_JH), width))
            rows.setdefault("no text", []).append(target.aucs(no_text_JK, np.full(len(rate_J), rate.mean())))
        means = {name: np.mean(each, 0).tolist() for name, each in rows.items()}
        found[str(count)] = {name: {"mean": mean, "over_none": _over(rows[name], rows["none"])} for name, mean in means.items()}
        print(count, json.dumps(found[str(count)]), flush=True)
    return found


def _over(own: list[tuple[float, float]], other: list[tuple[float, float]]) -> dict[str, list[float]]:
    gain = np.array(own) - np.array(other)
    return {"mean": gain.mean(0).tolist(), "standard_error_of_draws": (gain.std(0, ddof=1) / len(gain) ** 0.5).tolist()}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--source", required=True, choices=sorted(TEMPLATES))
    parser.add_argument("--target", required=True, choices=sorted(TEMPLATES))
    parser.add_argument("--out", type=Path, required=True)
    given = parser.parse_args()
    telemetry.configure(level=logging.WARNING)
    with tempfile.TemporaryDirectory(prefix="limaml-cross-") as root:
        found = measure(World(given.source, root), World(given.target, root))
    given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
