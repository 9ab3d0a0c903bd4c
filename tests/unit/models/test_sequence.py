"""The sequence block: what each of its states may see, what time and padding mean to it, and what the inner loop adapts."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from limaml.meta import engine
from limaml.models.blocks import Support, build_block
from limaml.models.blocks.block import MetaBlock
from tests.unit.models.test_blocks import DIMS, _config, _randomise, _rows

DAY_S = 86_400.0


def make_block(**model):
    return _randomise(build_block(_config(meta_block="sequence", sequence_width=8, **model).model, DIMS)).double()


def make_support(num_rows=6, padding=0):
    generator = torch.Generator().manual_seed(0)
    width = num_rows + padding

    def normal(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    return Support(
        dense_SF=normal(width, 8),
        vector_SK=normal(width, 2),
        mask_S=(torch.arange(width) < num_rows).double(),
        gap_s_S=(normal(width).exp() * DAY_S).sort(descending=True).values,
        label_S=(normal(width) > 0).double(),
        entity_index=torch.tensor(0),
    )


def embeddings(block, support):
    read = block.read(support)
    theta = block.start(read)
    return block.embed_rows(theta, read).detach(), block.embed(theta, read).detach()


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("adapts", ["all", "last", "bias"])
def test_no_row_is_scored_with_an_embedding_that_has_read_its_label(adapts, layers):
    """Flipping the label of row i changes no embedding of the rows up to i, and all after them."""
    block, support = make_block(sequence_adapts=adapts, sequence_layers=layers), make_support()
    rows_SD, whole_D = embeddings(block, support)
    assert rows_SD.shape == (6, 3)
    for row in range(6):
        flipped = support.label_S.clone()
        flipped[row] = 1 - flipped[row]
        other_SD, other_D = embeddings(block, support._replace(label_S=flipped))
        assert torch.equal(other_SD[: row + 1], rows_SD[: row + 1])
        assert ((other_SD[row + 1 :] - rows_SD[row + 1 :]).abs().amax(dim=1) > 1e-6).all()
        assert (other_D - whole_D).abs().max() > 1e-6


@pytest.mark.parametrize("part", ["dense_SF", "vector_SK"])
def test_a_row_changes_the_embeddings_after_it_alone(part):
    block, support = make_block(), make_support()
    rows_SD, whole_D = embeddings(block, support)
    changed = getattr(support, part).clone()
    changed[2] += 1.0
    other_SD, other_D = embeddings(block, support._replace(**{part: changed}))
    assert torch.equal(other_SD[:3], rows_SD[:3])
    assert ((other_SD[3:] - rows_SD[3:]).abs().amax(dim=1) > 1e-6).all()
    assert not torch.equal(other_D, whole_D)


def test_the_order_of_rows_counts():
    block, support = make_block(), make_support()
    turned = support._replace(**{name: getattr(support, name).flip(0) for name in ("dense_SF", "vector_SK", "label_S")})
    assert not torch.allclose(embeddings(block, turned)[1], embeddings(block, support)[1])


@pytest.mark.parametrize("adapts", ["all", "last", "bias"])
def test_the_prior_is_the_state_of_an_empty_support(adapts):
    block = make_block(sequence_adapts=adapts)
    rows_SD, whole_D = embeddings(block, make_support(num_rows=0, padding=4))
    torch.testing.assert_close(whole_D, block.prior().detach(), rtol=0, atol=1e-14)
    # It is what the first row is scored with as well.
    torch.testing.assert_close(rows_SD[0], block.prior().detach(), rtol=0, atol=1e-14)
    assert block.prior().abs().min() > 1e-3


def test_an_embedding_does_not_change_while_no_row_comes():
    """The as-of instant moves all gaps alike; days between rows are read."""
    block, support = make_block(), make_support()
    _, whole_D = embeddings(block, support)
    _, later_D = embeddings(block, support._replace(gap_s_S=support.gap_s_S + 30 * DAY_S))
    # A shift of 2.6 million seconds leaves 1e-10 of them.
    torch.testing.assert_close(later_D, whole_D, rtol=0, atol=1e-9)
    gaps_S = support.gap_s_S.clone()
    gaps_S[:3] += 5 * DAY_S
    _, apart_D = embeddings(block, support._replace(gap_s_S=gaps_S))
    assert (apart_D - whole_D).abs().max() > 1e-4


@pytest.mark.parametrize("adapts", ["all", "last", "bias"])
def test_padding_takes_no_part(adapts):
    block, support = make_block(sequence_adapts=adapts), make_support(num_rows=4, padding=3)
    cut = Support(*(part[:4] if part.ndim else part for part in support))
    (rows_SD, whole_D), (cut_SD, cut_D) = embeddings(block, support), embeddings(block, cut)
    torch.testing.assert_close(whole_D, cut_D, rtol=0, atol=1e-13)
    torch.testing.assert_close(rows_SD[:4], cut_SD, rtol=0, atol=1e-13)


@pytest.mark.parametrize(
    ("adapts", "expected"),
    [
        ("bias", {"bias"}),
        ("last", {"bias", "weight"}),
        ("all", {"bias", "weight", "first", "rows_weight", "layers_0_qkv_weight"}),
    ],
)
def test_it_adapts_what_it_is_told_to(adapts, expected):
    block, support = make_block(sequence_adapts=adapts), make_support()
    read = block.read(support)
    theta = block.start(read)
    assert expected <= set(theta)
    assert len(theta) == (len(list(block.parameters())) if adapts == "all" else len(expected))
    # Each of them moves the embedding; what is not adapted has a gradient from the outer loss alone.
    for name, value in theta.items():
        moved = theta | {name: value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1))}
        assert not torch.allclose(block.embed(moved, read), block.embed(theta, read)), name
    block.embed(theta, read).sum().backward()
    assert all(parameter.grad is not None for parameter in block.parameters())


@pytest.mark.parametrize("adapts", ["all", "last", "bias"])
def test_inner_steps_learn_from_labels_that_the_states_had_not_read(adapts):
    """With W = 0 the states say nothing: the inner loop alone moves the embedding, and the level towards the labels."""
    cfg = _config(meta_block="sequence", sequence_adapts=adapts, sequence_width=8, item_vectors="learned")
    network = _randomise(engine.Network(cfg, DIMS))
    with torch.no_grad():
        network.block("user").weight.zero_()
    rows = replace(_rows(), label_TR=torch.ones(2, 4))
    index = torch.zeros(2, dtype=torch.long)
    started = engine.embed_tasks(network, "user", rows, index, num_steps=0)
    torch.testing.assert_close(started, network.priors()["user"].detach().expand(2, -1))
    adapted = engine.embed_tasks(network, "user", rows, index, num_steps=1)
    assert not torch.isclose(adapted, started).any()
    if adapts == "bias":
        assert (adapted[:, -1] > started[:, -1]).all()


@pytest.mark.parametrize("dropped", ["width", "heads"])
def test_a_width_that_heads_do_not_divide_is_refused(dropped):
    model = {"width": {"sequence_width": 7}, "heads": {"sequence_heads": 5}}[dropped]
    with pytest.raises(
        ValueError, match=r"sequence_width must be divisible by sequence_heads \(\d\), got \d+; choose a multiple"
    ):
        _config(**model)


@pytest.mark.parametrize("adapts", ["all", "last", "bias"])
def test_gradients_of_rows_are_those_of_any_block(adapts):
    """The shortcut of a last layer against one pass a row."""
    block, support = make_block(sequence_adapts=adapts), make_support(padding=2)
    read = block.read(support)
    theta, by_rows_SD = block.start(read), torch.randn(8, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    found, expected = (pull(theta, read, by_rows_SD) for pull in (block.pull_rows, partial(MetaBlock.pull_rows, block)))
    assert found.keys() == theta.keys()
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
