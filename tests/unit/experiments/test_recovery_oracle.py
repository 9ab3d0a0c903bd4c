"""The oracle: its posterior-predictive probabilities against quadrature, and what its inputs must and must not change."""

import numpy as np
import pytest
from scipy.special import expit

from experiments import oracle
from experiments.oracle import Support, posterior


def drawn(num_latent, num_rows, users=20, seed=0):
    """Support rows of users drawn from the model."""
    rng = np.random.default_rng(seed)
    loading = rng.standard_normal((users, num_rows, num_latent)) * 2.0 / np.sqrt(num_latent)
    bias, z = rng.standard_normal((users, num_rows)), rng.standard_normal((users, num_latent))
    label = (rng.random((users, num_rows)) < expit(bias + np.einsum("tsl,tl->ts", loading, z))).astype(float)
    return Support(bias, loading, label, np.ones((users, num_rows)))


def queries(num_latent, users=20, each=5, seed=1):
    rng = np.random.default_rng(seed)
    rows = users * each
    return np.repeat(np.arange(users), each), rng.standard_normal(rows), rng.standard_normal((rows, num_latent))


def by_quadrature(support, user_R, bias_R, loading_RL, points=81):
    """Posterior-predictive probabilities on a product grid over [-6, 6]^L, written out one row at a time."""
    axes = [np.linspace(-6.0, 6.0, points)] * loading_RL.shape[1]
    node_ML = np.stack(np.meshgrid(*axes, indexing="ij"), axis=-1).reshape(-1, len(axes))
    result = []
    for user, bias, loading in zip(user_R, bias_R, loading_RL, strict=True):
        density = np.exp(-0.5 * (node_ML**2).sum(axis=1))
        for row in range(support.bias_TS.shape[1]):
            p = expit(support.bias_TS[user, row] + node_ML @ support.loading_TSL[user, row])
            density = density * (p if support.label_TS[user, row] else 1.0 - p)
        result.append((density * expit(bias + node_ML @ loading)).sum() / density.sum())
    return np.array(result)


def test_one_dimension_equals_quadrature():
    support, (user, bias, loading) = drawn(1, 12), queries(1)
    found = posterior(support, 0).predict(user, bias, loading)
    # Two grids of a smooth density: the sums agree far beyond 1e-8.
    assert found == pytest.approx(by_quadrature(support, user, bias, loading, points=1201), abs=1e-8)


@pytest.mark.parametrize(("num_latent", "num_rows"), [(2, 1), (2, 30), (3, 5)])
def test_importance_sampling_equals_quadrature(num_latent, num_rows):
    support, (user, bias, loading) = drawn(num_latent, num_rows, users=4), queries(num_latent, users=4)
    found = posterior(support, 4096)
    # 4,096 quasi-random draws: independent ones would err by 0.4 / sqrt(4096) = 0.006 at one standard deviation.
    exact = by_quadrature(support, user, bias, loading, points=51)
    assert found.predict(user, bias, loading) == pytest.approx(exact, abs=0.006)
    assert found.effective_share().min() > 0.3


def test_the_sampler_in_one_dimension_equals_the_grid():
    """A second latent dimension that no row loads on changes nothing, but is sampled instead of integrated."""
    support, (user, bias, loading) = drawn(1, 12), queries(1)
    exact = posterior(support, 0).predict(user, bias, loading)
    wider = Support(support.bias_TS, np.pad(support.loading_TSL, [(0, 0), (0, 0), (0, 1)]), support.label_TS, support.mask_TS)
    sampled = posterior(wider, 4096).predict(user, bias, np.pad(loading, [(0, 0), (0, 1)]))
    assert sampled == pytest.approx(exact, abs=0.006)


@pytest.mark.parametrize("num_rows", [1, 20, 200])
def test_ten_dimensions_agree_with_a_long_run_and_keep_their_draws(num_rows):
    support, (user, bias, loading) = drawn(10, num_rows, users=2), queries(10, users=2, each=10)
    found, long = posterior(support, 4096), posterior(support, 2**15, seed=1)
    # Fewer than a third of the draws effective would mean a proposal that misses the posterior.
    assert found.effective_share().min() > 0.3
    difference = found.predict(user, bias, loading) - long.predict(user, bias, loading)
    assert np.sqrt((difference**2).mean()) < 0.006


def test_no_rows_give_the_prior_and_padding_is_no_row():
    support, (user, bias, loading) = drawn(1, 6), queries(1)
    nothing = Support(support.bias_TS, support.loading_TSL, support.label_TS, np.zeros_like(support.mask_TS))
    prior = posterior(nothing, 0).predict(user, bias, loading)
    node, weight = np.polynomial.hermite_e.hermegauss(60)
    exact = (expit(bias[:, None] + loading * node) * weight).sum(axis=1) / weight.sum()
    assert prior == pytest.approx(exact, abs=1e-6)
    padded = Support(*(np.concatenate([each, part], axis=1) for each, part in _padding(support)))
    assert posterior(padded, 0).weight_TM == pytest.approx(posterior(support, 0).weight_TM, abs=1e-12)


def _padding(support):
    rows = support.bias_TS.shape[0], 3
    yield support.bias_TS, np.full(rows, 9.0)
    yield support.loading_TSL, np.full((*rows, 1), 9.0)
    yield support.label_TS, np.zeros(rows)
    yield support.mask_TS, np.zeros(rows)


def test_the_mode_is_where_the_gradient_vanishes():
    support = drawn(3, 40)
    mode_TL, precision_TLL = oracle._mode(support)
    probability = expit(support.bias_TS + np.einsum("tsl,tl->ts", support.loading_TSL, mode_TL))
    gradient = np.einsum("ts,tsl->tl", support.label_TS - probability, support.loading_TSL) - mode_TL
    assert np.abs(gradient).max() < 1e-9
    assert np.linalg.eigvalsh(precision_TLL).min() >= 1.0, "the prior alone has precision 1"


def test_a_posterior_is_calibrated():
    """Users and labels drawn from the model: the mean predicted probability is the mean true one, whatever was observed."""
    rng = np.random.default_rng(5)
    users, z = 4000, np.random.default_rng(6).standard_normal(4000)
    loading, bias = rng.standard_normal((users, 3, 1)) * 2, rng.standard_normal((users, 3))
    label = (rng.random((users, 3)) < expit(bias + loading[..., 0] * z[:, None])).astype(float)
    found = posterior(Support(bias, loading, label, np.ones_like(bias)), 0)
    predicted = found.predict(np.arange(users), np.zeros(users), np.ones((users, 1)))
    high = predicted > 0.5
    # Means of 2,000 true probabilities with standard deviation 0.2: four standard errors are 0.018.
    for group in (high, ~high):
        assert predicted[group].mean() == pytest.approx(expit(z[group]).mean(), abs=0.018)
