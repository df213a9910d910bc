"""What steers a regulariser from outside the loss: coefficients that adapt, rows that are dropped, signs of trouble.

Controllers keep one scalar in a state; ``..._update`` is pure and takes an observation (a real scalar tensor, averaged
over all data-parallel ranks by the caller). Everything raises ValueError, naming the argument, for a wrong shape or
dtype or an option out of range.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_ids, check_mask, read_steps
from .method import Method
from .segments import Groups
from .state import State


def _read_scalar(name: str, x: Tensor) -> Tensor:
    if x.ndim != 0 or x.is_complex() or not bool(x.isfinite()):
        raise ValueError(f"{name}: expected a finite real scalar, got {x.tolist()}")
    return x.detach().double()


@dataclass(frozen=True)
class KLControlState(State):
    """The coefficient of a KL penalty. coef: float64 scalar >= 0."""

    coef: Tensor

    @classmethod
    def start(cls, coef: float = 0.001) -> KLControlState:
        """Build the state; raises ValueError for a negative coefficient. verl starts at 0.001, older TRL at 0.2."""
        check_number("coef", coef, 0.0, finite=False)
        return cls(torch.tensor(coef, dtype=torch.float64))


def adaptive_kl(
    state: KLControlState, kl: Tensor, *, target: float = 0.1, horizon: float = 10_000.0, samples: int = 1
) -> KLControlState:
    """Steer a KL towards its target: coef <- coef (1 + clip(kl / target - 1, -0.2, 0.2) samples / horizon).

    kl: the mean KL that was observed; target: > 0 (verl 0.1, older TRL 6); horizon: > 0, samples over which the
    coefficient may change; samples: >= 1, those of this observation (a batch, or a number of steps). 1909.08593,
    section 2.2. At kl = target nothing changes.

    On denoising steps: the same, with the exact KL of Gaussian steps.
    """
    if not (target > 0 and horizon > 0 and samples >= 1):
        raise ValueError(f"target, horizon, samples: expected > 0, > 0 and >= 1, got {target}, {horizon} and {samples}")
    error = (_read_scalar("kl", kl) / target - 1).clamp(-0.2, 0.2)
    return KLControlState(state.coef * (1 + error * (samples / horizon)))


@dataclass(frozen=True)
class EntropyControlState(State):
    """An entropy bonus that is switched on when needed. coef: float64 scalar; active: bool scalar."""

    coef: Tensor
    active: Tensor

    @classmethod
    def start(cls, coef: float = 0.0) -> EntropyControlState:
        """Build the state, active until the first observation (TRL); raises ValueError for a negative coefficient."""
        check_number("coef", coef, 0.0, finite=False)
        return cls(torch.tensor(coef, dtype=torch.float64), torch.tensor(True))

    def applied(self) -> Tensor:
        """Return the coefficient to use now, a float64 scalar: 0 while the entropy is above its target."""
        return torch.where(self.active, self.coef, 0.0)


def adaptive_entropy(
    state: EntropyControlState,
    observed: Tensor,
    *,
    target: float = 0.2,
    step: float = 0.005,
    least: float = 0.0,
    most: float = 1.0,
) -> EntropyControlState:
    """Raise the coefficient of an entropy bonus while H <= target, lower it otherwise: clamp(coef +- step, least, most).

    The bonus is applied only while the last observed H <= target (``EntropyControlState.applied``). observed: mean
    entropy per step, nats; target: any number; step: > 0; 0 <= least <= most. Skywork-OR1, 2505.22312, in TRL's form,
    which counts H = target as low.

    On denoising steps: the entropy of a Gaussian step is fixed by the schedule; observe the spread of a group's x0
    predictions instead (``x0_hat_spread``) with a target of its own.
    """
    if not (step > 0 and 0 <= least <= most):
        raise ValueError(f"step, least, most: expected step > 0 and 0 <= least <= most, got {step}, {least}, {most}")
    low = _read_scalar("observed", observed) <= target
    moved = state.coef + torch.where(low, step, -step)
    return EntropyControlState(coef=moved.clamp(least, most), active=low)


def offpolicy_mask(
    log_prob: Tensor, old_log_prob: Tensor, advantage: Tensor, mask: Tensor, *, limit: float = 0.5
) -> Tensor:
    """Drop sequences of negative advantage that the policy has left behind; bool [B, T], False outside ``mask``.

    A row is kept where the mean over its unmasked steps of (old_log_prob - log_prob) is at most limit; of the other
    rows, the steps with A >= 0 are. log_prob, old_log_prob: [B, T]; advantage: [B] or [B, T]; limit: any number (0.5 is
    TRL's suggestion; infinity keeps everything). For the log-probs of a separate sampling engine, pass them as
    old_log_prob. DeepSeek-V3.2, 2512.02556 equation 9; TRL's off_policy_mask_threshold.

    On denoising steps: as is; the mean grows with the number of latent elements where log-probs are sums over them.
    """
    check_mask(mask)
    if limit != limit:
        raise ValueError("limit: expected a number, got nan")
    new, old = read_steps("log_prob", log_prob, mask), read_steps("old_log_prob", old_log_prob, mask)
    wide = advantage[:, None].expand(mask.shape) if advantage.shape == mask.shape[:1] else advantage
    near = (old - new).sum(1) / mask.sum(1).clamp(min=1) <= limit
    return mask & (near[:, None] | (read_steps("advantage", wide, mask) >= 0))


@dataclass(frozen=True)
class LikelihoodIndicators:
    """Signs of likelihood over-optimisation. entropy, mass: float32 [B, T], 0 on masked steps.

    mean_entropy, mean_mass: float32 scalars, over unmasked steps, 0 without one.
    """

    entropy: Tensor
    mass: Tensor
    mean_entropy: Tensor
    mean_mass: Tensor


def likelihood_indicators(
    logits: Tensor, mask: Tensor, *, k: int = 10, renormalise: bool = False
) -> LikelihoodIndicators:
    """Watch the k likeliest tokens of each step: their entropy -sum p log p and their mass sum p.

    A falling entropy over the top k, and a falling top-k mass, are the two signs that a preference loss pushes
    likelihoods too far and diversity is about to hurt. logits: floating [B, T, V], of any offset; mask: bool [B, T];
    k: 1 .. V. renormalise: take the entropy of p / mass instead. No gradient. At k = V the entropy is that of the
    policy and the mass 1. 2410.11677. Reconstructed: the abstract names both indicators; k and the normalisation are
    our choice.

    On denoising steps: there is no vocabulary; ``x0_hat_spread`` is the substitute.
    """
    check_mask(mask)
    if logits.ndim != 3 or logits.shape[:2] != mask.shape or not logits.is_floating_point():
        raise ValueError(f"logits: expected floating {[*mask.shape, 'V']}, got {logits.dtype} {list(logits.shape)}")
    if not 1 <= k <= logits.shape[2]:
        raise ValueError(f"k: expected 1 to {logits.shape[2]}, got {k}")
    kept = torch.where(mask[..., None], logits.detach(), 0.0).float()
    top = kept.topk(k, dim=-1).values - kept.logsumexp(-1, keepdim=True)
    mass = top.exp().sum(-1)
    entropy = -(top.exp() * top).sum(-1)
    if renormalise:
        entropy = entropy / mass + mass.log()
    entropy, mass = torch.where(mask, entropy, 0.0), torch.where(mask, mass, 0.0)
    steps = mask.sum().clamp(min=1)
    return LikelihoodIndicators(entropy, mass, entropy.sum() / steps, mass.sum() / steps)


def x0_hat_spread(x0_hat: Tensor, group: Tensor, mask: Tensor) -> Tensor:
    """Take the spread of a group's clean predictions at each step: sqrt(mean over rows and elements of (x - mean)^2).

    x0_hat: floating [B, T, ...], the one-step clean prediction at each denoising step; group: int64 [B]; mask: bool
    [B, T]; only unmasked rows of a step count. float32 [B, T], each row has its group's value; 0 on masked steps and
    where a group has one row at a step. What stands in for the entropy of a step, which the schedule fixes: it falls to
    0 as the samples of a prompt become alike. The two passes run in float64. No gradient.
    """
    check_mask(mask)
    if x0_hat.shape[:2] != mask.shape or x0_hat.ndim < 3 or not x0_hat.is_floating_point():
        raise ValueError(f"x0_hat: expected floating {[*mask.shape, '...']}, got {x0_hat.dtype} {list(x0_hat.shape)}")
    check_ids("group", group, tuple(mask.shape[:1]))
    groups = Groups.of(group)
    flat = torch.where(mask[..., None], x0_hat.detach().double().flatten(2), 0.0)

    def over_group(x: Tensor) -> Tensor:
        return x.new_zeros(groups.number, *x.shape[1:]).index_add_(0, groups.index, x)[groups.index]

    count = over_group(mask.double()).clamp(min=1)
    centred = torch.where(mask[..., None], flat - over_group(flat) / count[..., None], 0.0)
    square = over_group(centred.square().mean(-1)) / count
    return torch.where(mask, square.sqrt(), 0.0).float()


_TESTS = "tests/advantage/test_controllers.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="adaptive_kl",
        kind="controller",
        paper_id="1909.08593",
        title="KL coefficient that steers towards a target",
        tier=2,
        evidence={"exact": _TESTS + "test_adaptive_kl_values", "identity": _TESTS + "test_adaptive_kl_rests_on_target"},
        call=adaptive_kl,
    ),
    Method(
        key="adaptive_entropy",
        kind="controller",
        paper_id="2505.22312",
        title="entropy bonus that is switched on below a target",
        tier=2,
        evidence={"exact": _TESTS + "test_adaptive_entropy_walk"},
        call=adaptive_entropy,
    ),
    Method(
        key="offpolicy_mask",
        kind="weight",
        paper_id="2512.02556",
        title="drop sequences of negative advantage that the policy has left behind",
        tier=2,
        evidence={
            "formula": _TESTS + "test_offpolicy_mask_against_a_plain_loop",
            "identity": _TESTS + "test_offpolicy_mask_edges",
        },
        call=offpolicy_mask,
    ),
    Method(
        key="likelihood_indicators",
        kind="monitor",
        paper_id="2410.11677",
        title="entropy and mass of the top-k tokens: signs of likelihood over-optimisation",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_indicators_worked_numbers",
            "identity": _TESTS + "test_indicators_of_the_whole_vocabulary",
        },
        call=likelihood_indicators,
        tokens_only="needs a vocabulary; use x0_hat_spread, the spread of a group's clean predictions",
    ),
    Method(
        key="x0_hat_spread",
        kind="monitor",
        paper_id="2410.11677",
        title="spread of a group's clean predictions at each denoising step",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_spread_worked_numbers",
            "formula": _TESTS + "test_spread_against_a_plain_loop",
        },
        call=x0_hat_spread,
    ),
)
