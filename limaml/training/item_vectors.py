"""Item vectors fitted before meta-training: a Bayesian factor model of what the items' rates leave unexplained.

The residual r of a row is its label less its item's smoothed rate, and with K factors

    r = <e_user, v_item> + level_user + noise,    e ~ N(0, I),    level ~ N(0, LEVEL_VARIANCE),
    v_item ~ N(content W + b, I / PRECISION),      noise variance = mean of rate * (1 - rate)

fitted by variational EM (Lim and Teh, KDD Cup Workshop 2007): the users' Gaussian posteriors, the items' Gaussian posteriors
and W by ridge, in turn. The posterior covariances matter: alternating ridge without them kept a third of the gain. The same
rows give the same vectors. A round costs rows * K^2; memory holds one (K, K) matrix for every user and item.

Content is what the encoder makes of an item's static features, vectors included.

With `content_factors` A, content alone gives the first A factors, and the residual lies in the others:

    v_item = [content W, r_item],    r_item ~ N(0, I / PRECISION),    W ~ N(0, 1 / (PRECISION * ridge))

Users' factors have the same prior in every direction, so this is any A-dimensional space that content may reach, and its
orthogonal complement, in coordinates along them (AlphaFuse: Hu et al. 2025, arXiv 2504.19218). W then is the most likely one
given the users' posteriors, by conjugate gradients, and r_item Gaussian given W.

    R rows, U users, I items, C content features, K factors, A of content alone, B = K - A
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from limaml.features.encoder import EncodedRows
from limaml.tasks.sampling import TaskRows

# Chosen on validation users of MovieLens.
_LEVEL_VARIANCE = 0.03
_PRECISION = 500.0
CONTENT_RIDGE = 3.0
ROUNDS = 15
_START_STD = 0.05
RATE_PRIOR = 0.5, 10.0
"""Of the items' rates where none is declared."""
_PIECE_ITEMS = 8192
_RELATIVE_ERROR, _MOST_ITERATIONS = 1e-9, 1000
"""Of the weights' system; a round begins where the one before ended."""


@dataclass(frozen=True)
class ItemVectors:
    """Vectors on the scale of logits, in units of a user factor's standard deviation."""

    vectors_IK: Tensor
    """Of the vocabulary's items, in its order (index 1 first)."""
    content_weights_CK: Tensor
    bias_K: Tensor
    """content W + b is the vector of an item outside the vocabulary."""


def fit_item_vectors(
    rows: TaskRows,
    num_factors: int,
    *,
    num_items: int,
    num_content: int,
    rate_prior: tuple[float, float] = RATE_PRIOR,
    content_factors: int | None = None,
    content_ridge: float = CONTENT_RIDGE,
    start: ItemVectors | None = None,
    rounds: int = ROUNDS,
) -> ItemVectors:
    """Fit the factor model to the rows whose item is in the vocabulary (indices 1 to `num_items`).

    Content is the first `num_content` of a row's item features. An item's rate starts at `rate_prior`: its value, and the rows
    that it is worth. `content_factors`: A, less than K. `content_ridge`: the decay of content's weights. With `start` the fit
    begins with these vectors, and so stays in their space.
    """
    item_R = torch.from_numpy(rows.encoded.item_index) - 1
    user_R = torch.repeat_interleave(torch.arange(rows.num_entities), torch.from_numpy(rows.offsets).diff())
    known_R = item_R >= 0
    item_R, user_R = item_R[known_R], user_R[known_R]
    label_R = torch.from_numpy(rows.label).double()[known_R]
    prior, prior_rows = rate_prior
    rows_I = torch.bincount(item_R, minlength=num_items)
    rate_I = (torch.bincount(item_R, label_R, minlength=num_items) + prior * prior_rows) / (rows_I + prior_rows)
    slope = float((rate_I * (1 - rate_I))[item_R].mean()) if len(item_R) else 0.25
    content_IC = torch.ones(num_items, num_content + 1, dtype=torch.float64)
    _fill_content(content_IC, rows.encoded, known_R)
    pairs = _Pairs(user_R, item_R, label_R - rate_I[item_R], rows.num_entities, num_items)
    begin = None
    if start is not None:
        weights_CK = torch.cat([start.content_weights_CK, start.bias_K.unsqueeze(0)])
        begin = start.vectors_IK.double() * slope, weights_CK.double() * slope
    vectors_IK, weights_CK = _fit(pairs, content_IC, num_factors, slope, rounds, begin, content_factors, content_ridge)
    # A small residual is a change of slope = rate * (1 - rate) a logit.
    vectors_IK, weights_CK = (vectors_IK / slope).float(), (weights_CK / slope).float()
    return ItemVectors(vectors_IK, weights_CK[:-1], weights_CK[-1])


def _fill_content(content_IC: Tensor, encoded: EncodedRows, known_R: Tensor) -> None:
    """Put every item's static features into its row; vectors, which are the last of them, from the item table."""
    item_R = torch.from_numpy(encoded.item_index)[known_R] - 1
    num_content, table = content_IC.shape[1] - 1, encoded.item_table
    num_logged = num_content - (0 if table is None else table.width)
    # Of each item the last of its rows.
    row_I = torch.full((len(content_IC),), -1)
    row_I[item_R] = torch.arange(len(known_R))[known_R]
    there_I = row_I >= 0
    content_IC[there_I, :num_logged] = torch.from_numpy(encoded.item_dense[row_I[there_I].numpy()][:, :num_logged]).double()
    if table is None or encoded.item_row is None:
        return
    row_I = torch.zeros(len(content_IC), dtype=torch.long)
    row_I[item_R] = torch.from_numpy(encoded.item_row)[known_R]
    for start in range(0, len(row_I), _PIECE_ITEMS):
        piece = slice(start, start + _PIECE_ITEMS)
        content_IC[piece, num_logged:num_content] = torch.from_numpy(table.encoded[row_I[piece].numpy()])


class _Pairs:
    """Sums over the rows of each user or item, as sparse products: sum of x_item over a user's rows = counts_UI @ x."""

    def __init__(self, user_R: Tensor, item_R: Tensor, residual_R: Tensor, num_users: int, num_items: int) -> None:
        shape, at_2R = (num_users, num_items), torch.stack([user_R, item_R])
        ones_R = torch.ones_like(residual_R)
        self.counts_UI = torch.sparse_coo_tensor(at_2R, ones_R, shape, check_invariants=True).coalesce()
        self.residuals_UI = torch.sparse_coo_tensor(at_2R, residual_R, shape, check_invariants=True).coalesce()
        self.counts_IU = self.counts_UI.t().coalesce()
        self.residuals_IU = self.residuals_UI.t().coalesce()


def _fit(
    pairs: _Pairs,
    content_IC: Tensor,
    num_factors: int,
    noise: float,
    rounds: int,
    start: tuple[Tensor, Tensor] | None,
    content_factors: int | None,
    ridge: float,
) -> tuple[Tensor, Tensor]:
    """Posterior means of the item vectors (I, K) and the content weights (C, K), on the scale of residuals."""
    generator = torch.Generator().manual_seed(0)
    num_items, eye_KK = len(content_IC), torch.eye(num_factors, dtype=torch.float64)
    mean_IK = torch.randn(num_items, num_factors, generator=generator, dtype=torch.float64) * _START_STD
    cov_IKK = eye_KK.expand(num_items, -1, -1) / _PRECISION
    weights_CK = torch.zeros(content_IC.shape[1], num_factors, dtype=torch.float64)
    if start is not None:
        mean_IK, weights_CK = start
    ridge_CC = content_IC.T @ content_IC + ridge * torch.eye(len(weights_CK), dtype=torch.float64)
    for _ in range(rounds):
        user_UL, user_cov_ULL = _users(pairs, mean_IK, cov_IKK, noise)
        factor_UK, level_U1 = user_UL[:, :-1], user_UL[:, -1:]
        second_UKK = _outer(factor_UK) + user_cov_ULL[:, :-1, :-1]
        cross_UK = level_U1 * factor_UK + user_cov_ULL[:, :-1, -1]
        information_IKK = _sum(pairs.counts_IU, second_UKK) / noise
        shift_IK = (pairs.residuals_IU @ factor_UK - pairs.counts_IU @ cross_UK) / noise
        if content_factors is not None:
            rows = _RowsOfItems(information_IKK, shift_IK)
            mean_IK, cov_IKK, weights_CK = _apart(rows, content_IC, mean_IK, weights_CK, content_factors, ridge)
            continue
        cov_IKK = torch.linalg.inv(information_IKK + _PRECISION * eye_KK)
        mean_IK = _product(cov_IKK, shift_IK + _PRECISION * content_IC @ weights_CK)
        weights_CK = torch.linalg.solve(ridge_CC, content_IC.T @ mean_IK)
    return mean_IK, weights_CK


class _RowsOfItems(NamedTuple):
    """What the rows say of item vectors, given the users' posteriors: log likelihood = <shift, v> - v information v / 2."""

    information_IKK: Tensor
    shift_IK: Tensor


def _apart(
    rows: _RowsOfItems, content_IC: Tensor, mean_IK: Tensor, weights_CK: Tensor, num_content: int, ridge: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Means (I, K), covariances (I, K, K) and weights (C, K) where content alone gives the first factors: W given the
    residuals' means, then the residuals given W.
    """
    a, b = slice(num_content), slice(num_content, None)
    shift_IA = rows.shift_IK[:, a] - _product(rows.information_IKK[:, a, b], mean_IK[:, b])
    weights_CA = _most_likely_weights(content_IC, rows.information_IKK[:, a, a], shift_IA, weights_CK[:, a], ridge)
    by_content_IA = content_IC @ weights_CA
    shift_IB = rows.shift_IK[:, b] - _product(rows.information_IKK[:, b, a], by_content_IA)
    eye_BB = torch.eye(shift_IB.shape[1], dtype=torch.float64)
    cov_IBB = torch.linalg.inv(rows.information_IKK[:, b, b] + _PRECISION * eye_BB)
    cov_IKK, weights_CK = torch.zeros_like(rows.information_IKK), torch.zeros_like(weights_CK)
    cov_IKK[:, b, b], weights_CK[:, a] = cov_IBB, weights_CA
    return torch.cat([by_content_IA, _product(cov_IBB, shift_IB)], dim=1), cov_IKK, weights_CK


def _most_likely_weights(
    content_IC: Tensor, information_IAA: Tensor, shift_IA: Tensor, start_CA: Tensor, ridge: float
) -> Tensor:
    """(C, A) W of sum over items of x x^T W information + PRECISION * ridge W = sum of x shift^T, from `start_CA` on.

    By conjugate gradients: as a matrix that system has (C A)^2 numbers.
    """

    def apply(weights_CA: Tensor) -> Tensor:
        return content_IC.T @ _product(information_IAA, content_IC @ weights_CA) + _PRECISION * ridge * weights_CA

    right_CA, found_CA = content_IC.T @ shift_IA, start_CA
    rest_CA = right_CA - apply(found_CA)
    direction_CA, square = rest_CA, rest_CA.square().sum()
    enough = _RELATIVE_ERROR**2 * right_CA.square().sum()
    for _ in range(_MOST_ITERATIONS):
        if square <= enough:
            break
        applied_CA = apply(direction_CA)
        length = square / (direction_CA * applied_CA).sum()
        found_CA, rest_CA = found_CA + length * direction_CA, rest_CA - length * applied_CA
        before, square = square, rest_CA.square().sum()
        direction_CA = rest_CA + square / before * direction_CA
    return found_CA


def _product(x_NKL: Tensor, y_NL: Tensor) -> Tensor:
    """(N, K)"""
    return (x_NKL @ y_NL.unsqueeze(-1)).squeeze(-1)


def _users(pairs: _Pairs, mean_IK: Tensor, cov_IKK: Tensor, noise: float) -> tuple[Tensor, Tensor]:
    """Posterior mean (U, K + 1) and covariance (U, K + 1, K + 1) of every user's factors and, last, level."""
    num_users, num_factors = pairs.counts_UI.shape[0], mean_IK.shape[1]
    one_I1 = torch.ones(len(mean_IK), 1, dtype=torch.float64)
    precision_ULL = torch.zeros(num_users, num_factors + 1, num_factors + 1, dtype=torch.float64)
    precision_ULL[:, :-1, :-1] = _sum(pairs.counts_UI, _outer(mean_IK) + cov_IKK)
    precision_ULL[:, :-1, -1] = precision_ULL[:, -1, :-1] = pairs.counts_UI @ mean_IK
    precision_ULL[:, -1, -1] = (pairs.counts_UI @ one_I1)[:, 0]
    prior_L = torch.ones(num_factors + 1, dtype=torch.float64)
    prior_L[-1] = 1.0 / _LEVEL_VARIANCE
    cov_ULL = torch.linalg.inv(precision_ULL / noise + torch.diag(prior_L))
    weighted_UL = pairs.residuals_UI @ torch.cat([mean_IK, one_I1], dim=1) / noise
    return _product(cov_ULL, weighted_UL), cov_ULL


def _outer(x_NK: Tensor) -> Tensor:
    return x_NK.unsqueeze(2) * x_NK.unsqueeze(1)


def _sum(counts_MN: Tensor, x_NKK: Tensor) -> Tensor:
    return (counts_MN @ x_NKK.flatten(1)).view(-1, *x_NKK.shape[1:])
