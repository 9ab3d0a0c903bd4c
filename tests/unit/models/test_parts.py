"""The parts of the global block, and the block with two kinds of task at once: embeddings of tasks and of rows."""

from dataclasses import replace

import pytest
import torch

from limaml.models.global_block import GlobalBlock
from limaml.models.interaction import Product, side_by_side
from limaml.models.item_table import ItemTable
from limaml.models.row_mlp import RowMlp
from tests.unit.models.test_blocks import DIMS, _config, _randomise, _rows

KINDS = {"user": False, "item": True}
INTERACTIONS = ("product", "concat", "both")


def make_block(interaction="product", kinds=KINDS, **model):
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return _randomise(GlobalBlock(_config(interaction=interaction, **model).model, DIMS, kinds))


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


class TestItemTable:
    def test_a_known_item_has_its_row_and_an_unknown_one_its_contents_vector(self):
        table = ItemTable(5, 2, 3, learned=True)
        with torch.no_grad():
            table.content.copy_(random(2, 3))
            table.unknown_item.copy_(random(3, seed=1))
        dense = random(2, 4, 6)
        index = torch.tensor([[0, 5, 1, 0], [2, 2, 0, 3]])
        found = table(index, dense)
        assert found.shape == (2, 4, 3)
        assert torch.equal(found[index > 0], table.item[index[index > 0]])
        # The first features of an item are its content; those that change are not.
        expected = dense[index == 0][:, :2] @ table.content + table.unknown_item
        torch.testing.assert_close(found[index == 0], expected)

    def test_a_provider_fills_all_rows_but_the_unknown_items(self):
        class Found:
            vectors_IK, content_weights_CK, bias_K = random(5, 3), random(2, 3, seed=1), random(3, seed=2)

        table = ItemTable(5, 2, 3, learned=False)
        table.put(Found())
        assert torch.equal(table.item[1:], Found.vectors_IK)
        assert torch.equal(table.content, Found.content_weights_CK)
        assert torch.equal(table.unknown_item, Found.bias_K)
        assert [name for name, p in table.named_parameters() if p.requires_grad] == ["unknown_item"]


class TestRowMlp:
    @pytest.mark.parametrize("hidden", [(), (4,), (5, 4)])
    def test_it_is_the_plain_network(self, hidden):
        mlp, x = _randomise(RowMlp(3, hidden)), random(2, 6, 3)
        expected = x
        for number, layer in enumerate(mlp.linears):
            expected = expected @ layer.weight.T + layer.bias
            expected = torch.nn.functional.silu(expected) if number < len(hidden) else expected
        torch.testing.assert_close(mlp.score(mlp.encode(x)), expected[..., 0])

    @pytest.mark.parametrize("hidden", [(4,), (5, 4)])
    def test_what_is_beside_the_features_is_as_if_it_were_among_them(self, hidden):
        mlp, x, beside = _randomise(RowMlp(3, hidden, 2)), random(2, 6, 3), random(2, 1, 2, seed=1)
        expected = torch.cat([x, beside.expand(2, 6, 2)], dim=-1)
        for number, layer in enumerate(mlp.linears):
            expected = expected @ layer.weight.T + layer.bias
            expected = torch.relu(expected) if number < len(hidden) else expected
        torch.testing.assert_close(mlp.score(mlp.encode(x), beside), expected[..., 0])

    @pytest.mark.parametrize("num_beside", [0, 2])
    def test_dropout_multiplies_every_hidden_layer(self, num_beside):
        mlp, x = _randomise(RowMlp(3, (5, 4), num_beside)), random(2, 6, 3)
        keep = [(random(2, 6, width, seed=width) > 0).float() * 2 for width in (5, 4)]
        beside = random(2, 1, 2) if num_beside else None
        inputs = x if beside is None else torch.cat([x, beside.expand(2, 6, 2)], dim=-1)
        first, second, last = mlp.linears
        hidden = second(mlp.activation(first(inputs)) * keep[0])
        expected = last(mlp.activation(hidden) * keep[1])[..., 0]
        torch.testing.assert_close(mlp.score(mlp.encode(x, keep), beside, keep), expected)


def test_a_product_is_written_out():
    """A user's embedding meets the item's vector; an item's a map of user and context; both have a level."""
    product, rows, item = _randomise(Product(KINDS, 5, 2)), _rows(), random(2, 4, 2)
    vectors = product.vectors(item, rows)
    assert torch.equal(vectors["user"][..., :-1], item)
    assert all(torch.equal(each[..., -1], torch.ones(2, 4)) for each in vectors.values())
    beside = torch.cat([rows.user_dense_TRF, rows.context_TRF], dim=-1)
    torch.testing.assert_close(vectors["item"][..., :-1], product.others["item"](beside))
    user, of_items = random(2, 1, 3, seed=1), random(2, 4, 3, seed=2)
    found = product(vectors, {"user": user, "item": of_items})
    for task in range(2):
        for row in range(4):
            e, f = user[task, 0], of_items[task, row]
            expected = e[:2] @ item[task, row] + e[2] + f[:2] @ vectors["item"][task, row, :2] + f[2]
            torch.testing.assert_close(found[task, row], expected)


def test_embeddings_stand_side_by_side_in_the_kinds_order_whatever_their_shape():
    of_tasks, of_rows = random(2, 1, 3), random(2, 4, 3, seed=1)
    shared = side_by_side(("user", "item"), {"item": of_tasks, "user": of_tasks + 1})
    assert torch.equal(shared, torch.cat([of_tasks + 1, of_tasks], dim=-1))
    found = side_by_side(("user", "item"), {"user": of_tasks, "item": of_rows})
    assert torch.equal(found, torch.cat([of_tasks.expand(2, 4, 3), of_rows], dim=-1))


@pytest.mark.parametrize("interaction", INTERACTIONS)
@pytest.mark.parametrize("per_row", [("item",), ("user",), ("user", "item")], ids="+".join)
def test_an_embedding_of_every_row_scores_as_that_rows_task_alone(interaction, per_row):
    block, rows = make_block(interaction), _rows()
    embeddings = {kind: random(2, 4 if kind in per_row else 1, 3, seed=number) for number, kind in enumerate(("user", "item"))}
    found = block(rows, embeddings)
    assert found.shape == (2, 4)
    for row in range(4):
        at = {kind: e[:, row : row + 1] if kind in per_row else e for kind, e in embeddings.items()}
        torch.testing.assert_close(block(rows, at)[:, row], found[:, row])
    for kind in KINDS:
        other = embeddings | {kind: embeddings[kind] + 1.0}
        assert ((block(rows, other) - found).abs() > 1e-4).any(), kind


def test_vectors_that_the_mlp_does_not_read_reach_the_score_of_an_unknown_item_only():
    """The second feature of an item is its vector; the items of the first two rows are known, those of the others are not."""
    dims = replace(DIMS, item_sets=1, vectors=1)
    block = _randomise(GlobalBlock(_config(mlp_reads_vectors=False).model, dims, KINDS))
    assert block.mlp.num_features == DIMS.num_features - 1
    rows = replace(_rows(), item_index_TR=torch.tensor([[3, 5, 0, 0]] * 2))
    embeddings = {kind: random(2, 1, 3, seed=number) for number, kind in enumerate(KINDS)}
    other_TRF = rows.item_dense_TRF.clone()
    other_TRF[..., 1] += 1.0
    moved = (block(replace(rows, item_dense_TRF=other_TRF), embeddings) - block(rows, embeddings)).abs() > 1e-4
    assert moved.tolist() == [[False, False, True, True]] * 2
    for feature in (0, 2):
        other_TRF = rows.item_dense_TRF.clone()
        other_TRF[..., feature] += 1.0
        assert ((block(replace(rows, item_dense_TRF=other_TRF), embeddings) - block(rows, embeddings)).abs() > 1e-4).all()


def test_vectors_that_nothing_would_read_are_refused():
    with pytest.raises(ValueError, match='got interaction = "concat", where nothing else reads them'):
        _config(interaction="concat", mlp_reads_vectors=False)


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_of_one_kind_there_is_no_map_of_the_other_side(interaction):
    for kinds, names in (({"user": False}, set()), (KINDS, {"item"}), ({"thing": True}, {"thing"})):
        block = make_block(interaction, kinds)
        assert (set() if block.product is None else set(block.product.others)) == (names if interaction != "concat" else set())
        assert block.mlp.num_beside == (0 if interaction == "product" else 3 * len(kinds))


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_without_a_kind_the_block_scores_features_alone(interaction):
    block, rows = make_block(interaction, {}), _rows()
    assert block.product is None
    torch.testing.assert_close(block(rows, {}), block.mlp.score(block.mlp.encode(rows.dense)))


@pytest.mark.parametrize("interaction", INTERACTIONS)
def test_an_item_is_known_by_its_vector_in_a_product_alone(interaction):
    """With two kinds as with one."""
    block, rows = make_block(interaction), _rows()
    embeddings = {kind: random(2, 1, 3, seed=number) for number, kind in enumerate(KINDS)}
    moved = replace(rows, item_index_TR=rows.item_index_TR % 5 + 1)
    assert torch.equal(block(rows, embeddings), block(moved, embeddings)) == (interaction == "concat")
