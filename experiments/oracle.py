"""The best that can be said of a synthetic user: posterior-predictive probabilities given the same rows, items known.

    z ~ N(0, I_L),    logit P(label = 1 | z) = bias_i + <z, loading_i>

The posterior of z given a user's support rows is a weighted set of nodes: a grid where L = 1 (exact to rounding), otherwise
draws from a multivariate t around the mode with the mode's Hessian, weighted by importance. Draws are quasi-random (Sobol) and
shared by all users. The posterior-predictive probability of a row is the weighted mean of its probability over the nodes: no
other function of the same rows has a lower expected log loss, and with no rows it is the best without personalisation.

    T users, S support rows, R query rows, L latent dimensions, M nodes
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.special import expit
from scipy.stats import chi2, norm, qmc

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

_GRID = np.linspace(-8.0, 8.0, 801)
"""Step 0.02: a fifth of the posterior's width after a thousand rows; the prior's tails beyond hold 1e-15."""
_FREEDOM = 7.0
"""Degrees of freedom of the proposal: heavier tails than any posterior under a normal prior."""
_NEWTON_STEPS = 30
_USERS_AT_ONCE = 16


@dataclass(frozen=True)
class Support:
    """Rows of T users, padded: a padded row has mask 0."""

    bias_TS: Floats
    loading_TSL: Floats
    label_TS: Floats
    mask_TS: Floats

    def __len__(self) -> int:
        return len(self.bias_TS)

    def part(self, users: slice) -> "Support":
        return Support(self.bias_TS[users], self.loading_TSL[users], self.label_TS[users], self.mask_TS[users])


@dataclass(frozen=True)
class Posterior:
    node_TML: Floats
    weight_TM: Floats
    """Sums to 1 over a user's nodes."""

    def effective_share(self) -> Floats:
        """(T,) effective number of draws, as a share of the draws: 1 / (M * sum of squared weights)."""
        share: Floats = 1.0 / (self.weight_TM.shape[1] * (self.weight_TM**2).sum(axis=1))
        return share

    def predict(self, user_R: Ints, bias_R: Floats, loading_RL: Floats) -> Floats:
        """(R,) posterior-predictive probability of each row, `user_R` being its user's number in 0 .. T - 1."""
        result = np.empty(len(user_R))
        for user in np.unique(user_R):
            rows = np.flatnonzero(user_R == user)
            probability_RM = expit(bias_R[rows, None] + loading_RL[rows] @ self.node_TML[user].T)
            result[rows] = probability_RM @ self.weight_TM[user]
        return result


def posterior(support: Support, draws: int, seed: int = 0) -> Posterior:
    """Nodes and weights of every user's posterior; `draws` (a power of 2) is not read where L = 1."""
    num_latent = support.loading_TSL.shape[2]
    if num_latent == 1:
        node_ML = _GRID[:, None]
        node_TML = np.broadcast_to(node_ML, (len(support), *node_ML.shape))
        return Posterior(node_TML, _normalised(_log_joint(support, node_TML)))
    mode_TL, precision_TLL = _mode(support)
    # Cholesky of the covariance at the mode.
    spread_TLL = np.linalg.cholesky(np.linalg.inv(precision_TLL))
    direction_ML = _t_draws(num_latent, draws, seed)
    node_TML = mode_TL[:, None] + direction_ML @ spread_TLL.transpose(0, 2, 1)
    # The proposal's determinant is a constant of each user, which the normalisation removes.
    log_proposal_M = -0.5 * (_FREEDOM + num_latent) * np.log1p((direction_ML**2).sum(axis=1) / _FREEDOM)
    return Posterior(node_TML, _normalised(_log_joint(support, node_TML) - log_proposal_M))


def _t_draws(num_latent: int, draws: int, seed: int) -> Floats:
    """(M, L) draws of a standard multivariate t."""
    uniform = qmc.Sobol(num_latent + 1, seed=seed).random(draws)
    normal_ML = norm.ppf(uniform[:, :-1])
    scale_M1 = np.sqrt(_FREEDOM / chi2.ppf(uniform[:, -1:], _FREEDOM))
    direction_ML: Floats = normal_ML * scale_M1
    return direction_ML


def _mode(support: Support) -> tuple[Floats, Floats]:
    """Mode (T, L) and Hessian (T, L, L) of the negative log posterior, by damped Newton steps: it is convex."""
    num_latent = support.loading_TSL.shape[2]
    mode_TL, eye_LL = np.zeros((len(support), num_latent)), np.eye(num_latent)
    for _ in range(_NEWTON_STEPS):
        p_TS = expit(support.bias_TS + np.einsum("tsl,tl->ts", support.loading_TSL, mode_TL))
        gradient_TL = np.einsum("ts,tsl->tl", (support.label_TS - p_TS) * support.mask_TS, support.loading_TSL) - mode_TL
        curved_TSL = (p_TS * (1.0 - p_TS) * support.mask_TS)[..., None] * support.loading_TSL
        hessian_TLL = curved_TSL.transpose(0, 2, 1) @ support.loading_TSL + eye_LL
        step_TL = np.linalg.solve(hessian_TLL, gradient_TL[..., None])[..., 0]
        # Far from the mode the logistic's curvature vanishes and a full step overshoots.
        length_T1 = np.linalg.norm(step_TL, axis=1, keepdims=True)
        mode_TL = mode_TL + step_TL / np.maximum(1.0, length_T1)
    return mode_TL, hessian_TLL


def _log_joint(support: Support, node_TML: Floats) -> Floats:
    """(T, M) log likelihood of each user's rows plus log prior, without the prior's constant."""
    result: Floats = -0.5 * (node_TML**2).sum(axis=2)
    for start in range(0, len(support), _USERS_AT_ONCE):
        users = slice(start, start + _USERS_AT_ONCE)
        part = support.part(users)
        logit_TMS = node_TML[users] @ part.loading_TSL.transpose(0, 2, 1) + part.bias_TS[:, None]
        sign_TS = 2.0 * part.label_TS - 1.0
        # log sigmoid(x) = -log(1 + exp(-x)), in the form that cannot overflow.
        log_TMS = -np.logaddexp(0.0, -sign_TS[:, None] * logit_TMS)
        result[users] += (log_TMS @ part.mask_TS[..., None])[..., 0]
    return result


def _normalised(log_weight_TM: Floats) -> Floats:
    weight_TM = np.exp(log_weight_TM - log_weight_TM.max(axis=1, keepdims=True))
    normalised: Floats = weight_TM / weight_TM.sum(axis=1, keepdims=True)
    return normalised
