"""The factor model: it finds planted factors, leaves item rates alone, serves unknown items by genre, and repeats itself."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from limaml.config import Config
from limaml.features.encoder import EncodedRows, EncoderDims
from limaml.features.item_table import ItemTable
from limaml.models.network import build_network
from limaml.tasks.sampling import TaskRows
from limaml.training.item_vectors import _apart, _RowsOfItems, fit_item_vectors
from limaml.training.warm_start import warm_start

NUM_USERS, NUM_ITEMS, NUM_GENRES = 300, 40, 2
DIMS = EncoderDims(
    NUM_ITEMS, NUM_USERS, item_dense=NUM_GENRES, user_dense=1, context=3, item_static=NUM_GENRES, item_sets=NUM_GENRES
)


def _config(**model):
    return Config.model_validate({"source": {"kind": "synthetic"}, "model": {"embedding_dim": 3} | model})


def _rows(strength=2.0, seed=0):
    """Even items are of genre 0 and odd ones of genre 1; half of the users like the one, half the other."""
    rng = np.random.default_rng(seed)
    user, item = (index.ravel() for index in np.meshgrid(np.arange(NUM_USERS), np.arange(NUM_ITEMS), indexing="ij"))
    taste = np.where(user % 2 == item % 2, strength, -strength)
    label = (rng.random(len(user)) < 1 / (1 + np.exp(-taste))).astype(np.float32)
    genres = np.eye(NUM_GENRES, dtype=np.float32)[item % 2]
    plain = np.zeros((len(user), 3), np.float32)
    return TaskRows(
        encoded=EncodedRows((item + 1).astype(np.int64), genres, plain[:, :1], plain),
        label=label,
        timestamp_us=np.tile(np.arange(NUM_ITEMS), NUM_USERS),
        source_row=np.arange(len(user)),
        entities=tuple(f"u{number:03d}" for number in range(NUM_USERS)),
        offsets=np.arange(NUM_USERS + 1) * NUM_ITEMS,
        entity_index=np.arange(1, NUM_USERS + 1),
    )


def _fit(rows, dims=DIMS, num_factors=2, **settings):
    return fit_item_vectors(rows, num_factors, num_items=dims.num_items, num_content=dims.item_static, **settings)


def test_it_finds_the_planted_factor():
    found = _fit(_rows())
    direction = found.vectors_IK - found.vectors_IK.mean(dim=0)
    cosine = torch.nn.functional.cosine_similarity(direction[:, None], direction[None], dim=-1)
    same = torch.arange(NUM_ITEMS) % 2
    same_genre = same[:, None] == same[None]
    assert cosine[same_genre].min() > 0.9
    assert cosine[~same_genre].max() < -0.9


def test_vectors_are_on_the_scale_of_logits():
    """A user factor has unit variance, so half the distance between the two groups is the planted +-strength, shrunk."""
    found = _fit(_rows(strength=0.5))
    even, odd = found.vectors_IK[::2].mean(dim=0), found.vectors_IK[1::2].mean(dim=0)
    assert (even - odd).norm().item() / 2 == pytest.approx(0.5, rel=0.2)


def test_an_item_outside_the_vocabulary_gets_its_genres_vector():
    rows = _rows()
    found = _fit(rows)
    by_genre = found.content_weights_CK + found.bias_K
    for genre in range(NUM_GENRES):
        mean = found.vectors_IK[genre::2].mean(dim=0)
        assert torch.nn.functional.cosine_similarity(by_genre[genre], mean, dim=0) > 0.99


def test_without_factors_in_the_data_the_vectors_are_short():
    vectors = [_fit(_rows(strength)).vectors_IK for strength in (2.0, 0.0)]
    # What 300 users' coin tosses leave is an eighth of a factor that decides 88 % of the labels.
    assert vectors[1].norm() < 0.2 * vectors[0].norm()


def test_the_same_rows_give_the_same_vectors():
    first, second = (_fit(_rows()) for _ in range(2))
    assert torch.equal(first.vectors_IK, second.vectors_IK)
    assert torch.equal(first.bias_K, second.bias_K)


def test_warm_start_follows_the_configuration():
    rows = _rows()
    for item_vectors, changed in (("fitted", True), ("learned", False)):
        cfg = _config(item_vectors=item_vectors)
        network = build_network(cfg, DIMS)
        before = network.global_block.items.item.clone()
        warm_start(network, rows, cfg)
        assert torch.equal(network.global_block.items.item, before) != changed
    found = _fit(rows)
    network = build_network(_config(), DIMS)
    warm_start(network, rows, _config())
    assert torch.equal(network.global_block.items.item[1:], found.vectors_IK)
    assert torch.equal(network.global_block.items.content, found.content_weights_CK)
    assert torch.equal(network.global_block.items.unknown_item, found.bias_K)
    network, apart = build_network(_config(content_factors=1), DIMS), _fit(rows, content_factors=1)
    warm_start(network, rows, _config(content_factors=1))
    assert torch.equal(network.global_block.items.content, apart.content_weights_CK)
    assert not torch.equal(apart.content_weights_CK, found.content_weights_CK)
    network = build_network(_config(content_ridge=30.0), DIMS)
    warm_start(network, rows, _config(content_ridge=30.0))
    assert 0.0 < float(network.global_block.items.content.norm()) < float(found.content_weights_CK.norm())


def test_rows_of_unknown_items_and_no_rows_at_all_are_no_trouble():
    rows = _rows()
    rows.encoded.item_index[::7] = 0
    assert torch.isfinite(_fit(rows).vectors_IK).all()
    rows.encoded.item_index[:] = 0
    found = _fit(rows, replace(DIMS, num_items=0))
    assert found.vectors_IK.shape == (0, 2)
    assert torch.isfinite(found.bias_K).all()


def _with_vectors(rows, width=3):
    """The rows with a number that changes behind the genres, and a vector an item in a table whose order is another."""
    rng = np.random.default_rng(1)
    encoded = rows.encoded
    order = rng.permutation(NUM_ITEMS) + 1
    table = ItemTable(
        tuple(f"i{number}" for number in np.argsort(order)),
        np.concatenate([np.zeros((1, width)), rng.normal(size=(NUM_ITEMS, width))]).astype(np.float32),
        place=NUM_GENRES,
    )
    item_row = np.where(encoded.item_index > 0, np.append(0, order)[encoded.item_index], 0)
    changing = np.arange(len(encoded), dtype=np.float32)[:, None]
    dense = np.concatenate([encoded.item_dense, changing], axis=1)
    return replace(rows, encoded=replace(encoded, item_dense=dense, item_row=item_row, item_table=table))


def test_vectors_of_the_item_table_are_content_as_if_every_row_held_them():
    rows = _with_vectors(_rows())
    dims = replace(DIMS, item_dense=NUM_GENRES + 4, item_static=NUM_GENRES + 3)
    copied = replace(
        rows, encoded=replace(rows.encoded, item_dense=rows.encoded.item_features(), item_row=None, item_table=None)
    )
    found, expected = (_fit(each, dims) for each in (rows, copied))
    assert torch.equal(found.vectors_IK, expected.vectors_IK)
    assert torch.equal(found.content_weights_CK, expected.content_weights_CK)
    # The vectors are random, so they explain little, but they are not left out.
    assert found.content_weights_CK[NUM_GENRES:].abs().min() > 0


def test_a_planted_direction_of_the_vectors_serves_an_item_without_rows():
    """Taste is read off a vector's first number, so the weights of content point there, and the genres carry nothing."""
    rows = _with_vectors(_rows())
    table = rows.encoded.item_table
    taste = np.where(np.arange(NUM_ITEMS) % 2, -1.0, 1.0)
    item_row = rows.encoded.item_row[:NUM_ITEMS]
    table.encoded[item_row, 0] = 3 * taste
    rows.encoded.item_dense[:, :NUM_GENRES] = 0.0
    dims = replace(DIMS, item_dense=NUM_GENRES + 4, item_static=NUM_GENRES + 3)
    found = _fit(rows, dims)
    new = found.bias_K + found.content_weights_CK[NUM_GENRES] * 3
    assert torch.nn.functional.cosine_similarity(new, found.vectors_IK[::2].mean(dim=0), dim=0) > 0.95


def test_what_rows_say_lies_in_the_complement_of_what_content_can_say():
    """The genres say the one taste; a second one, by the third of the items, nothing says."""
    rows = _rows(strength=1.0)
    item, user = rows.encoded.item_index - 1, np.repeat(np.arange(NUM_USERS), NUM_ITEMS)
    likes = np.where((user // 2) % 2 == (item % 3 == 0), 1.0, -1.0) + np.where(user % 2 == item % 2, 1.0, -1.0)
    rng = np.random.default_rng(2)
    rows = replace(rows, label=(rng.random(len(item)) < 1 / (1 + np.exp(-1.5 * likes))).astype(np.float32))
    found = _fit(rows, num_factors=3, content_factors=1)
    content_IK = torch.eye(NUM_GENRES)[torch.arange(NUM_ITEMS) % 2] @ found.content_weights_CK + found.bias_K
    residual_IK = found.vectors_IK - content_IK
    # In float32, on which the fitted vectors are rounded.
    assert (residual_IK @ found.content_weights_CK.T).abs().max() < 1e-6
    assert not found.content_weights_CK[:, 1:].any()
    assert not found.bias_K[1:].any()
    by_genre, third = content_IK[:, 0], torch.arange(NUM_ITEMS) % 3 == 0
    assert (by_genre[::2] - by_genre[1::2]).abs().min() > 1
    apart = residual_IK[third].mean(dim=0) - residual_IK[~third].mean(dim=0)
    assert apart.norm() > 1
    # Free residuals share every factor with content.
    free = _fit(rows, num_factors=3)
    assert free.content_weights_CK.abs().amin() > 1e-3


def test_content_of_its_own_is_the_dense_closed_form():
    """W and residuals in turn end where the one linear system of both does, residuals with the prior P / PRECISION."""
    rng, num_items, num_content, num_factors, content_factors = np.random.default_rng(0), 6, 3, 4, 2
    x_IC = rng.normal(size=(num_items, num_content))
    root_IKK = rng.normal(size=(num_items, num_factors, num_factors)) * 20
    information_IKK, shift_IK = root_IKK @ root_IKK.transpose(0, 2, 1), rng.normal(size=(num_items, num_factors)) * 300
    rows = _RowsOfItems(torch.from_numpy(information_IKK), torch.from_numpy(shift_IK))
    mean_IK = torch.zeros(num_items, num_factors, dtype=torch.float64)
    weights_CK = torch.zeros(num_content, num_factors, dtype=torch.float64)
    _, _, first_CK = _apart(rows, torch.from_numpy(x_IC), mean_IK, weights_CK, content_factors, 3.0)
    a = slice(content_factors)
    system = np.einsum("ic,ikl,id->ckdl", x_IC, information_IKK[:, a, a], x_IC).reshape(num_content * content_factors, -1)
    alone = np.linalg.solve(system + 500.0 * 3.0 * np.eye(len(system)), (x_IC.T @ shift_IK[:, a]).ravel())
    np.testing.assert_allclose(first_CK[:, a].numpy().ravel(), alone, rtol=0, atol=1e-8 * np.abs(alone).max())
    for _ in range(300):
        mean_IK, cov_IKK, weights_CK = _apart(rows, torch.from_numpy(x_IC), mean_IK, weights_CK, content_factors, 3.0)
    # z = [W's numbers, residuals' numbers]; v_i = M_i z.
    num_weights, free = num_content * content_factors, num_factors - content_factors
    m_IKZ = np.zeros((num_items, num_factors, num_weights + num_items * free))
    for item in range(num_items):
        m_IKZ[item, :content_factors, :num_weights] = np.kron(x_IC[item], np.eye(content_factors))
        at = num_weights + item * free
        m_IKZ[item, content_factors:, at : at + free] = np.eye(free)
    prior_Z = np.repeat([500.0 * 3.0, 500.0], [num_weights, num_items * free])
    system = np.diag(prior_Z) + np.einsum("ikz,ikl,ily->zy", m_IKZ, information_IKK, m_IKZ)
    z = np.linalg.solve(system, np.einsum("ikz,ik->z", m_IKZ, shift_IK))
    # 300 turns leave less than this of where they began.
    np.testing.assert_allclose(mean_IK.numpy(), m_IKZ @ z, rtol=0, atol=1e-8 * np.abs(z).max())
    np.testing.assert_allclose(weights_CK[:, :content_factors].numpy().ravel(), z[:num_weights], rtol=0, atol=1e-8)
    # The Gaussian of a residual whose prior covariance is singular, S = P / PRECISION: S^1/2 (I + S^1/2 A S^1/2)^-1 S^1/2.
    root = np.diag([0.0] * content_factors + [500.0**-0.5] * free)
    expected = root @ np.linalg.inv(np.eye(num_factors) + root @ information_IKK @ root) @ root
    np.testing.assert_allclose(cov_IKK.numpy(), expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("model", [{"content_factors": 2}, {"item_vectors": "learned"}, {"interaction": "concat"}])
def test_content_must_leave_factors_to_the_rows(model):
    with pytest.raises(ValueError, match="content_factors must leave a factor to the items' own rows, at most embedding"):
        _config(**({"content_factors": 1} | model))
    assert _config(content_factors=1).model.content_factors == 1
