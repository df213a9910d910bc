"""Rules at the level of the optimiser: lookahead and Hessian-corrected momentum, quadrature weights, batch scaling.

Parameters are one flat vector, and steps go up: the gradient is that of the expected reward.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_share
from .inputs import read_rewards
from .method import Method
from .state import State


@dataclass(frozen=True)
class MomentumState(State):
    """What N-PG-IGT and HARPG remember: float [D] each, the parameters, those before the last step, the direction."""

    parameters: Tensor
    previous: Tensor
    direction: Tensor

    @classmethod
    def start(cls, parameters: Tensor, gradient: Tensor) -> MomentumState:
        """Begin at ``parameters`` (float [D]) with the direction ``gradient`` (float [D]), no step taken yet."""
        _check_flat("parameters", parameters, None)
        _check_flat("gradient", gradient, parameters)
        return cls(parameters=parameters, previous=parameters, direction=gradient)


def _check_flat(name: str, x: Tensor, like: Tensor | None) -> None:
    wanted = "[D]" if like is None else str(list(like.shape))
    if x.ndim != 1 or not x.is_floating_point() or (like is not None and x.shape != like.shape):
        raise ValueError(f"{name}: expected floating {wanted}, got {x.dtype} {list(x.shape)}")


def _check_rates(eta: float, step_size: float = 1.0) -> None:
    if not (0 < eta <= 1 and math.isfinite(step_size) and step_size > 0):
        raise ValueError(f"eta, step_size: expected eta in (0, 1] and step_size > 0, got {eta} and {step_size}")


def _stepped(state: MomentumState, direction: Tensor, step_size: float, normalised: bool) -> MomentumState:
    length = direction.norm() if normalised else torch.ones_like(direction[:1]).sum()
    step = direction / torch.where(length > 0, length, 1.0)
    return MomentumState(parameters=state.parameters + step_size * step, previous=state.parameters, direction=direction)


def igt_point(state: MomentumState, *, eta: float = 0.1) -> Tensor:
    """Look ahead to where the next gradient is taken: theta + (1 - eta) / eta (theta - theta_prev), float [D]."""
    _check_rates(eta)
    return state.parameters + (1 - eta) / eta * (state.parameters - state.previous)


def igt_step(gradient: Tensor, state: MomentumState, *, eta: float = 0.1, step_size: float = 0.01) -> MomentumState:
    """Step along momentum of gradients taken ahead: d = (1 - eta) d + eta g, theta += step_size d / |d|.

    gradient: float [D], of the expected reward at ``igt_point(state)``, an estimate from fresh samples; state:
    ``MomentumState.start``. On a quadratic objective the lookahead makes d an average of old gradient noise about the
    exact gradient at theta, without lag. eta 1 is normalised gradient ascent; d = 0 takes no step.

    N-PG-IGT, 2302.01734; reconstructed: its rates are in the abstract (about eps^-2.5 samples), the rule is from
    memory. On denoising steps: as it is, whatever the gradient is of.
    """
    _check_rates(eta, step_size)
    _check_flat("gradient", gradient, state.parameters)
    return _stepped(state, (1 - eta) * state.direction + eta * gradient, step_size, normalised=True)


def harpg_point(state: MomentumState, uniform: float) -> Tensor:
    """Pick where the Hessian is taken: theta_prev + u (theta - theta_prev), float [D], u uniform in [0, 1]."""
    check_share("uniform", uniform)
    return state.previous + uniform * (state.parameters - state.previous)


def harpg_step(
    gradient: Tensor,
    hessian_product: Tensor,
    state: MomentumState,
    *,
    eta: float = 0.1,
    step_size: float = 0.01,
    normalised: bool = False,
) -> MomentumState:
    """Step along momentum that the Hessian carries along: d = (1 - eta) (d + H (theta - theta_prev)) + eta g.

    theta += step_size d, or step_size d / |d| with ``normalised`` (N-HARPG). gradient: float [D], of the expected
    reward at theta; hessian_product: float [D], H (theta - theta_prev) with H at ``harpg_point``; state:
    ``MomentumState.start``. On a quadratic objective the correction is exact: without noise d is the gradient at theta.
    eta 1 is gradient ascent.

    HARPG, 2302.01734; reconstructed as ``igt_step`` (about eps^-2 samples). On denoising steps: as it is.
    """
    _check_rates(eta, step_size)
    _check_flat("gradient", gradient, state.parameters)
    _check_flat("hessian_product", hessian_product, state.parameters)
    direction = (1 - eta) * (state.direction + hessian_product) + eta * gradient
    return _stepped(state, direction, step_size, normalised)


def score_kernel(scores: Tensor, fisher: Tensor | None = None) -> Tensor:
    """Build the Fisher kernel of rows: K = U G^-1 U^T, float64 [B, B].

    scores: float [B, D], gradient of each row's log-prob (or a random projection of it); fisher: float [D, D], G,
    positive definite, the identity by default.
    """
    u, g = _read_scores(scores, fisher)
    kernel: Tensor = u @ torch.linalg.solve(g, u.T)
    return kernel


def _read_scores(scores: Tensor, fisher: Tensor | None) -> tuple[Tensor, Tensor]:
    if scores.ndim != 2 or scores.numel() == 0 or not bool(scores.isfinite().all()):
        raise ValueError(f"scores: expected finite [B, D] with B, D >= 1, got {list(scores.shape)}")
    u = scores.detach().double()
    g = torch.eye(u.shape[1], dtype=torch.float64, device=u.device) if fisher is None else fisher.detach().double()
    if g.shape != (u.shape[1], u.shape[1]) or not bool(g.isfinite().all()):
        raise ValueError(f"fisher: expected finite {[u.shape[1]] * 2}, got {list(g.shape)}")
    return u, g


def _check_noise(noise: float) -> None:
    if not (math.isfinite(noise) and noise > 0):
        raise ValueError(f"noise: expected a finite variance > 0, got {noise}")


def bq_weights(kernel: Tensor, rewards: Tensor, valid: Tensor | None = None, *, noise: float = 1.0) -> Tensor:
    """Weigh each row's score by Bayesian quadrature: w = (K + s2 I)^-1 y, float32 [B].

    The posterior mean of the policy gradient is sum_i w_i u_i, so w stands where an advantage does; centre the rewards
    first if a baseline is wanted. kernel: float [B, B], positive semi-definite, ``score_kernel`` of the rows; rewards:
    float [B], NaN or not valid: the row takes no part and has 0; noise: s2, the variance of a reward about its model.
    Large noise: w tends to y / s2, plain Monte Carlo up to scale. Rows with the same score share their credit.

    Bayesian policy gradient, 2604.27563 (the model with the score known); reconstructed: the closed form is derived
    here. On denoising steps: a row's score is the sum of its steps', K from random projections.
    """
    _check_noise(noise)
    value, mask = read_rewards(rewards, torch.zeros_like(rewards, dtype=torch.int64), valid)
    rows = len(value)
    if kernel.shape != (rows, rows) or not bool(kernel.isfinite().all()):
        raise ValueError(f"kernel: expected finite {[rows, rows]}, got {list(kernel.shape)}")
    kept = torch.where(mask[:, None] & mask[None, :], kernel.detach().double(), 0.0)
    noisy = kept + noise * torch.eye(rows, dtype=torch.float64, device=kept.device)
    weights: Tensor = torch.linalg.solve(noisy, torch.where(mask, value, 0.0))
    return weights.float()


def bq_covariance(scores: Tensor, fisher: Tensor | None = None, *, noise: float = 1.0) -> Tensor:
    """Give the posterior covariance of that gradient: G - U^T (K + s2 I)^-1 U, float64 [D, D].

    Arguments as ``score_kernel`` and ``bq_weights``. No rows' worth of evidence (large noise): G itself.
    """
    _check_noise(noise)
    u, g = _read_scores(scores, fisher)
    noisy = score_kernel(u, g) + noise * torch.eye(len(u), dtype=torch.float64, device=u.device)
    covariance: Tensor = g - u.T @ torch.linalg.solve(noisy, u)
    return covariance


def scaled_minibatches(environments: int, reference_environments: int, reference_minibatches: int) -> int:
    """Say into how many minibatches to cut a larger batch, so that each stays as large as it was.

    ceil(reference_minibatches environments / reference_environments), at least 1. With more parallel samples keep the
    size of a minibatch and the learning rate, and take more minibatches: a plateau comes from an outer step that is
    too large for its noise. PPO at a million environments, 2603.06009; reconstructed from the abstract, and advice
    rather than a loss. On denoising steps: environments are images an iteration.
    """
    given = (environments, reference_environments, reference_minibatches)
    if min(given) < 1:
        raise ValueError(
            f"environments, reference_environments, reference_minibatches: expected at least 1, got {given}"
        )
    return -(-reference_minibatches * environments // reference_environments)


def stationary_variance(step_size: float, curvature: float, noise: float, samples: int) -> float:
    """Give the variance that noisy gradient steps settle at on a quadratic: eta s2 / (N L (2 - eta L)).

    x <- x - eta (L x + e), e of variance s2 / N: step_size eta, curvature L, noise s2, samples N; inf where eta L >= 2
    (no settling). The excess loss L Var / 2 is half of eta s2 / (N (2 - eta L)). The toy model behind
    ``scaled_minibatches``: N times the samples allow about N times the step for the same error.
    """
    if not (min(step_size, curvature) > 0 and noise >= 0 and samples >= 1):
        raise ValueError(
            f"step_size, curvature, noise, samples: expected > 0, > 0, >= 0, >= 1, got {step_size}, {curvature}, "
            f"{noise}, {samples}"
        )
    margin = 2 - step_size * curvature
    return step_size * noise / (samples * curvature * margin) if margin > 0 else math.inf


_OPTIMISERS = "tests/advantage/test_optimisers.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="n_pg_igt",
        kind="optimizer",
        paper_id="2302.01734",
        title="N-PG-IGT: normalised steps along momentum of gradients taken ahead",
        tier=3,
        evidence={
            "reconstructed": _OPTIMISERS + "test_igt_against_plain_recursion",
            "identity": _OPTIMISERS + "test_eta_one_is_normalised_ascent",
        },
        call=igt_step,
    ),
    Method(
        key="harpg",
        kind="optimizer",
        paper_id="2302.01734",
        title="HARPG: momentum corrected by a Hessian-vector product",
        tier=3,
        evidence={
            "reconstructed": _OPTIMISERS + "test_harpg_is_exact_on_a_quadratic",
            "identity": _OPTIMISERS + "test_eta_one_is_normalised_ascent",
        },
        call=harpg_step,
    ),
    Method(
        key="bayesian_pg",
        kind="optimizer",
        paper_id="2604.27563",
        title="Bayesian policy gradient: quadrature weights of the samples",
        tier=3,
        evidence={
            "reconstructed": _OPTIMISERS + "test_quadrature_worked_numbers",
            "formula": _OPTIMISERS + "test_quadrature_is_the_gaussian_posterior",
        },
        call=bq_weights,
    ),
    Method(
        key="scaled_minibatches",
        kind="optimizer",
        paper_id="2603.06009",
        title="PPO at a million environments: more minibatches, not larger ones",
        tier=3,
        evidence={
            "reconstructed": _OPTIMISERS + "test_scaled_minibatches",
            "formula": _OPTIMISERS + "test_stationary_variance_by_recursion",
        },
        call=scaled_minibatches,
    ),
)
