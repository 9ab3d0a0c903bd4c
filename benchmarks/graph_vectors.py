"""Vectors of a knowledge graph's films by SVD (`limaml.transfer.graph`) and by TransE (Bordes et al. 2013), beside each other.

Genres of two fifths of the films are taken out of the graph, in both directions. One fifth chooses what is chosen (width,
norm, epochs, penalty), the other is judged on: how its genres rank among all, by a ridge and by the ten nearest films, both
from the remaining films' vectors. In a second graph no film has a genre.

    OMP_NUM_THREADS=1 python -m benchmarks.graph_vectors PATH/ml-100k.kg --out experiments/results/graph_vectors.json

F films, G genres (kinds), E entities, T triples, W numbers of a vector
"""

import json
import tempfile
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import pandas as pd
import torch
import typer
from torch import nn
from torch.nn import functional as F

from limaml import metrics
from limaml.config import FeatureConfig
from limaml.metrics import Floats, Ints
from limaml.transfer.graph import GraphVectors

FORTH, BACK = "film.film.genre", "film_genre.films_in_this_genre"
WIDTHS, TRANSE, PENALTIES = (16, 32, 64, 128), ((64, 1), (64, 2), (128, 2)), np.logspace(-4, 2, 13)
EPOCHS, EVERY, BATCH, LR, MARGIN = 60, 15, 2048, 0.3, 1.0
NEIGHBOURS, HITS, DRAWS = 10, 10, 2000


class Split:
    """Films and what genres they have; those that are fitted on, chosen on, judged on."""

    def __init__(self, triples: pd.DataFrame, films: list[str]) -> None:
        pairs = {(h, t) for h, r, t in triples.values if r == FORTH} | {(t, h) for h, r, t in triples.values if r == BACK}
        self.films = sorted({film for film, _ in pairs} & set(films))
        self.kinds = sorted({kind for _, kind in pairs})
        place = {name: at for names in (self.films, self.kinds) for at, name in enumerate(names)}
        self.has_FG = np.zeros((len(self.films), len(self.kinds)))
        for film, kind in pairs:
            if film in place:
                self.has_FG[place[film], place[kind]] = 1.0
        order = np.random.default_rng(0).permutation(len(self.films))
        parts = np.split(order, [len(order) * 3 // 5, len(order) * 4 // 5])
        self.fitted, self.chosen, self.judged = (np.sort(part) for part in parts)

    def graph(self, triples: pd.DataFrame, *, kept: bool) -> pd.DataFrame:
        """Without genres of those that are not fitted, of nobody's unless they are `kept`; and without entities of one film."""
        known = {self.films[at] for at in self.fitted} if kept else set[str]()
        heads = triples["head"].isin(self.films)
        film, other = (triples["head"].where(each, triples["tail"]) for each in (heads, ~heads))
        left = ~triples.relation.isin((FORTH, BACK)) | film.isin(known)
        return triples[left & (film[left].groupby(other[left]).nunique().reindex(other).to_numpy() > 1)]

    def figures(self, score_FG: Floats, films: Ints) -> tuple[Floats, Floats]:
        """Of each film the AUC of its genres, and their share among the ten first."""
        rank_FG = (-score_FG[films]).argsort(1).argsort(1)
        has_FG = self.has_FG[films].astype(bool)
        aucs = np.array([metrics.auc(has, score) for has, score in zip(has_FG, score_FG[films], strict=True)])
        return aucs, ((rank_FG < HITS) & has_FG).sum(1) / has_FG.sum(1)

    def ridge(self, x_FW: Floats) -> tuple[float, Floats]:
        """The AUC on the films that choose, and scores of all; its penalty has the best."""
        mean_W, y_FG = x_FW[self.fitted].mean(0), self.has_FG[self.fitted]
        x, found = x_FW[self.fitted] - mean_W, list[tuple[float, Floats]]()
        gram = x.T @ x
        for penalty in PENALTIES:
            plus = gram + penalty * np.trace(gram) / len(gram) * np.eye(len(gram))
            score = (x_FW - mean_W) @ np.linalg.solve(plus, x.T @ (y_FG - y_FG.mean(0))) + y_FG.mean(0)
            found.append((float(self.figures(score, self.chosen)[0].mean()), score))
        return max(found, key=lambda pair: pair[0])

    def nearest(self, x_FW: Floats) -> Floats:
        unit_FW = x_FW / np.maximum(np.linalg.norm(x_FW, axis=1, keepdims=True), 1e-12)
        near = np.argsort(-unit_FW @ unit_FW[self.fitted].T, kind="stable")[:, :NEIGHBOURS]
        shares: Floats = self.has_FG[self.fitted][near].mean(1) + 1e-6 * self.has_FG[self.fitted].mean(0)
        return shares


def by_svd(split: Split, graph: pd.DataFrame, width: int) -> Floats:
    """An entity is its own item; zeros where it shares no neighbour."""
    feature = FeatureConfig(entity="item", name="graph", type="vector", width=width, encoder="graph-svd 1", licence="none")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "films.kg"
        graph.to_csv(path, sep="\t", index=False, header=["head_id:token", "relation_id:token", "tail_id:token"])
        links = pd.DataFrame({"item_id:token": split.films, "entity_id:token": split.films})
        links.to_csv(path.with_suffix(".link"), sep="\t", index=False)
        found = GraphVectors(path, feature).look_up(split.films)
    return np.stack([np.zeros(width) if vector is None else vector.astype(float) for vector in found])


def by_transe(split: Split, graph: pd.DataFrame, width: int, norm: int) -> tuple[float, int, Floats, Floats]:
    """h + r = t: AUC on the films that choose, epochs, vectors, and scores of its own for film + genre-of = genre."""
    torch.manual_seed(0)
    names = sorted({*graph["head"], *graph["tail"], *split.films, *split.kinds})
    entity, relation = ({name: at for at, name in enumerate(each)} for each in (names, sorted({*graph.relation, FORTH})))
    triples_T3 = torch.tensor([(entity[h], relation[r], entity[t]) for h, r, t in graph.values])
    entities, relations = nn.Embedding(len(names), width), nn.Embedding(len(relation), width)
    for each in (entities, relations):
        nn.init.uniform_(each.weight, -6 / width**0.5, 6 / width**0.5)
    with torch.no_grad():
        relations.weight.copy_(F.normalize(relations.weight, dim=1))
    optimizer = torch.optim.Adagrad([*entities.parameters(), *relations.parameters()], lr=LR)
    films, kinds = ([entity[name] for name in each] for each in (split.films, split.kinds))
    found: list[tuple[float, int, Floats, Floats]] = []
    for epoch in range(1, EPOCHS + 1):
        for batch in torch.split(torch.randperm(len(triples_T3)), BATCH):
            h, r, t = triples_T3[batch].T
            wrong, heads = torch.randint(len(names), (len(batch),)), torch.rand(len(batch)) < 0.5
            used = torch.cat([h, t, torch.where(heads, wrong, h), torch.where(heads, t, wrong)])
            right_h, right_t, wrong_h, wrong_t = F.normalize(entities(used), dim=1).chunk(4)
            near, far = ((a + relations(r) - b).norm(norm, 1) for a, b in ((right_h, right_t), (wrong_h, wrong_t)))
            optimizer.zero_grad()
            (MARGIN + near - far).clamp(min=0).mean().backward()
            optimizer.step()
        if epoch % EVERY == 0:
            with torch.no_grad():
                unit_EW = F.normalize(entities.weight, dim=1)
                own_FG = -torch.cdist(unit_EW[films] + relations.weight[relation[FORTH]], unit_EW[kinds], float(norm))
            vectors_FW = unit_EW[films].double().numpy()
            found.append((split.ridge(vectors_FW)[0], epoch, vectors_FW, own_FG.double().numpy()))
    return max(found, key=lambda one: one[0])


def measure(triples: pd.DataFrame, split: Split, *, kept: bool) -> dict[str, Any]:
    graph = split.graph(triples, kept=kept)
    svd = {width: by_svd(split, graph, width) for width in WIDTHS}
    width = max(svd, key=lambda each: split.ridge(svd[each])[0])
    transe = {(wide, norm): by_transe(split, graph, wide, norm) for wide, norm in TRANSE}
    chosen = max(transe, key=lambda each: transe[each][0])
    _, epoch, vectors_FW, own_FG = transe[chosen]
    scores = {"shares of the genres": np.tile(split.has_FG[split.fitted].mean(0), (len(split.films), 1))}
    for name, x_FW in (("SVD", svd[width]), ("TransE", vectors_FW)):
        scores |= {f"{name}, ridge": split.ridge(x_FW)[1], f"{name}, nearest": split.nearest(x_FW)}
    scores |= {"TransE, own score": own_FG} if kept else {}
    found = {name: split.figures(score, split.judged) for name, score in scores.items()}
    draws_BF = metrics.draw_users(len(split.judged), draws=DRAWS, seed=0) / len(split.judged)
    over = {}
    for name in (name for name in found if name.startswith("TransE")):
        rival = found.get(name.replace("TransE", "SVD"), found["SVD, ridge"])
        gains = [100 * (own - other) for own, other in zip(found[name], rival, strict=True)]
        over[name] = [metrics.interval(float(gain.mean()), draws_BF @ gain).as_dict() for gain in gains]
    values = {name: [float(100 * each.mean()) for each in pair] for name, pair in found.items()}
    choices = {"svd_width": width, "transe_width": chosen[0], "transe_norm": chosen[1], "transe_epochs": epoch}
    return {"films": len(split.judged), "auc_and_hits": values, "transe_over_svd": over, "chosen": choices}


def main(
    triples: Annotated[Path, typer.Argument(help="NAME.kg, beside NAME.link.")],
    out: Annotated[Path, typer.Option(help="File of the results.")],
) -> None:
    """Measure both graphs."""
    graph = pd.read_csv(triples, sep="\t", dtype=str, names=["head", "relation", "tail"], header=0)
    films = pd.read_csv(triples.with_suffix(".link"), sep="\t", dtype=str).iloc[:, 1].unique().tolist()
    graphs = {"genres of the rest in the graph": True, "no genre in the graph": False}
    found = {name: measure(graph, Split(graph, films), kept=kept) for name, kept in graphs.items()}
    out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    typer.run(main)
