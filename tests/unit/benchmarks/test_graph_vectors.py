"""What is judged is taken out of the graph in both directions, and vectors find kinds that people give away."""

import numpy as np
import pandas as pd
import pytest

from benchmarks.graph_vectors import BACK, FORTH, Split, by_svd

FILMS = [f"f{at:02}" for at in range(40)]


@pytest.fixture(scope="module")
def triples():
    """A film's kind is its number's parity; four people make the even ones, four others the odd ones."""
    rows = []
    for at, film in enumerate(FILMS):
        kind = f"g{at % 2}"
        rows += [(film, FORTH, kind), (kind, BACK, film), (film, "made_by", f"alone{at}")]
        rows += [(film, "made_by", f"p{at % 2}{(at // 2 + step) % 4}") for step in range(2)]
    return pd.DataFrame(rows, columns=["head", "relation", "tail"])


def test_kinds_that_are_judged_are_in_no_graph(triples):
    split = Split(triples, FILMS)
    assert sorted([*split.fitted, *split.chosen, *split.judged]) == list(range(40))
    graph = split.graph(triples, kept=True)
    kinds = graph[graph.relation.isin((FORTH, BACK))]
    assert set(kinds["head"]) | set(kinds["tail"]) == {split.films[at] for at in split.fitted} | {"g0", "g1"}
    assert not graph["tail"].str.startswith("alone").any()
    assert set(split.graph(triples, kept=False).relation) == {"made_by"}


def test_a_ridge_and_the_nearest_films_find_what_people_give_away(triples):
    split = Split(triples, FILMS)
    x_FW = by_svd(split, split.graph(triples, kept=True), 4)
    for score in (split.ridge(x_FW)[1], split.nearest(x_FW)):
        aucs, hits = split.figures(score, split.judged)
        assert np.mean(aucs) > 0.9
        assert hits.tolist() == [1.0] * len(split.judged)
