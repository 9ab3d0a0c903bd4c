"""Vectors from a graph are those of a dense decomposition, and items that share neighbours lie together."""

import numpy as np
import pytest

from limaml.config import FeatureConfig
from limaml.errors import ConfigError, DataError
from limaml.transfer.graph import GraphVectors

PAIRS = [("f1", "ann"), ("f2", "ann"), ("f2", "bob"), ("f3", "bob"), ("f3", "cy"), ("f4", "cy"), ("f1", "war"), ("f3", "war")]
TURNED = [("dee", "f4"), ("dee", "f1")]
ALONE = ("f4", "known to one film alone")
FEATURE = FeatureConfig(entity="item", name="graph", type="vector", width=3, encoder="graph-svd 1", licence="CC-BY")


@pytest.fixture
def path(tmp_path):
    triples = [f"{head}\tfilm.made_by\t{tail}" for head, tail in (*PAIRS, *TURNED, ALONE)]
    (tmp_path / "films.kg").write_text("\n".join(["head_id:token\trelation_id:token\ttail_id:token", *triples, ""]))
    links = [f"{number}\tf{number}" for number in (1, 2, 3, 4, 9)]
    (tmp_path / "films.link").write_text("\n".join(["item_id:token\tentity_id:token", *links, ""]))
    return tmp_path / "films.kg"


def test_vectors_are_the_largest_of_a_dense_decomposition(path):
    """Items by neighbours; dee is one too, in the other direction."""
    films, names = ("f1", "f2", "f3", "f4"), ("ann", "bob", "cy", "dee", "war")
    beside = {*PAIRS, *((film, name) for name, film in TURNED)}
    adjacency = np.array([[float((film, name) in beside) for name in names] for film in films])
    scaled = adjacency / np.sqrt(np.outer(adjacency.sum(1), adjacency.sum(0)))
    left, strengths, _ = np.linalg.svd(scaled)
    found = np.array(GraphVectors(path, FEATURE).look_up(["1", "2", "3", "4"]))
    assert np.allclose(np.abs(found), np.abs(left[:, :3] * np.sqrt(strengths[:3])), atol=1e-5)
    assert np.allclose(found @ found.T, left[:, :3] * strengths[:3] @ left[:, :3].T, atol=1e-5)


def test_an_item_without_a_link_or_an_edge_has_none(path):
    assert GraphVectors(path, FEATURE).look_up(["9", "10"]) == [None, None]


def test_it_comes_again_and_another_graph_is_another_origin(path):
    first = GraphVectors(path, FEATURE)
    again = GraphVectors(path, FEATURE)
    assert np.array_equal(first.look_up(["1", "4"]), again.look_up(["1", "4"]))
    assert (first.origin.label, first.origin.licence) == ("graph-svd 1", "CC-BY")
    path.write_text(path.read_text() + "f4\tfilm.made_by\tann\n")
    assert GraphVectors(path, FEATURE).origin.digest != first.origin.digest


def test_what_cannot_be_is_refused(path):
    with pytest.raises(ConfigError, match=r"share a neighbour \(4\) and of these \(5\), got 4; declare a smaller one"):
        GraphVectors(path, FEATURE.model_copy(update={"width": 4})).look_up(["1"])
    with pytest.raises(ConfigError, match=r"NAME\.kg, beside NAME\.link, got .*films\.link"):
        GraphVectors(path.with_suffix(".link"), FEATURE)
    path.write_text("a\tb\n")
    with pytest.raises(DataError, match="must have columns head_id, relation_id, tail_id, got a, b"):
        GraphVectors(path, FEATURE).look_up(["1"])
