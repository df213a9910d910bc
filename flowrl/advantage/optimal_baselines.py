"""Baselines of least variance: averages over the group, weighted by the size of each row's gradient.

The variance of A_i grad log pi_i is least for b = E[w r] / E[w] with w_i = |grad log pi_i|^2. The methods differ in what
stands for w: the row's length (OPO), an energy of the row (OBLR-PO), the energy up to each step (OTB). Arguments that
are not explained here, and what a NaN reward means: see ``estimators``.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .blocks import by_rows
from .checks import check_number
from .inputs import check_ids, check_mask, read_rewards, read_rows, read_step_reward, read_steps
from .method import Method
from .record import Advantage
from .segments import Groups, group_any
from .statistics import Singleton, check_policies, group_result, group_statistics, step_result
from .steps import reverse_scan


def _weighted(rewards: Tensor, group: Tensor, name: str, weight: Tensor, valid: Tensor | None, raw: str) -> Advantage:
    """r_i minus the mean of its group under ``weight`` (>= 0; equal weights where all of the group are 0)."""
    check_policies(singleton=raw)
    value, mask = read_rewards(rewards, group, valid)
    mass = read_rows(name, weight, mask, lowest=0.0)
    s = group_statistics(value, group, mask, 0, raw)
    groups = s.groups
    whole = groups.sum(mass)
    share = torch.where(whole > 0, mass, 1.0)
    below = value - groups.max(value)  # from the best, so that equal rewards give exactly 0
    advantage = below - groups.sum(share * below) / groups.sum(share)
    if raw == "raw":
        advantage = torch.where(groups.count() == 1, value, advantage)
    return group_result(advantage, mask, s.live, s.mean, s.std)


def opo(
    rewards: Tensor,
    group: Tensor,
    cost: Tensor,
    valid: Tensor | None = None,
    *,
    singleton: Singleton = "zero",
) -> Advantage:
    """Take off the group's mean weighted by length: A_i = r_i - sum_g(cost r) / sum_g(cost).

    cost: float [B] >= 0, the row's number of steps, or anything that its gradient's size grows with (network calls,
    seconds). OPO, 2505.23585: if the gradients of the steps are of one size and orthogonal, this baseline has the least
    variance. Equal costs, or a group whose costs are all 0: Dr.GRPO. verl leaves a group of one its reward (singleton
    "raw"). On denoising steps: all rows have as many steps, so it is Dr.GRPO unless the cost says otherwise.
    """
    return _weighted(rewards, group, "cost", cost, valid, singleton)


def optimal_baseline(
    rewards: Tensor,
    group: Tensor,
    energy: Tensor,
    valid: Tensor | None = None,
    *,
    singleton: Singleton = "zero",
) -> Advantage:
    """Take off the baseline of least variance: A_i = r_i - sum_g(w r) / sum_g(w).

    energy: float [B] >= 0, w_i = |grad log pi(y_i)|^2 of the whole row, or a proxy (``token_energy`` or
    ``gaussian_energy`` summed over the steps). The mean reward is optimal only where w and r are uncorrelated. Special
    cases: equal energies are Dr.GRPO, energy = length is OPO. OBLR-PO, 2511.23310; reconstructed: from the abstract and
    the standard result, the paper itself was not read. On denoising steps: w_i = sum_k |noise_k|^2 / sigma_k^2, free
    from the sampler.
    """
    return _weighted(rewards, group, "energy", energy, valid, singleton)


def snr_lr(gradient_mean_square: Tensor, gradient_variance: Tensor, *, smoothness: float = 1.0) -> Tensor:
    """Set the learning rate by the gradient's signal-to-noise ratio: eta = (1 / L) SNR / (1 + SNR).

    SNR = |E g|^2 / Var(g), hence eta = |E g|^2 / (L (|E g|^2 + Var g)). gradient_mean_square: float >= 0, |E g|^2 of the
    estimator that is stepped with (from n samples, |mean|^2 - Var / n is the unbiased estimate of it, and may be cut at
    0); gradient_variance: float >= 0, E|g - E g|^2; both of one shape, [] or a value a group of parameters. smoothness:
    L > 0, a bound of the objective's curvature; the result is in units of 1 / L, float32. No noise: 1 / L; SNR 1:
    1 / (2 L); no gradient at all: 0. OBLR-PO, 2511.23310; reconstructed: as ``optimal_baseline``. On denoising steps:
    the same, it sees the gradient alone.
    """
    check_number("smoothness", smoothness, 0.0, strict=True)
    every = torch.ones_like(gradient_mean_square, dtype=torch.bool)
    signal = read_rows("gradient_mean_square", gradient_mean_square, every, lowest=0.0)
    noise = read_rows("gradient_variance", gradient_variance, every, lowest=0.0)
    whole = signal + noise
    return torch.where(whole > 0, signal / whole / smoothness, 0.0).float()


def token_energy(old_log_prob: Tensor, sum_pi_squared: Tensor, mask: Tensor) -> Tensor:
    """Measure the score of a categorical step on its logits: |onehot - pi|^2 = 1 - 2 pi_a + sum_v pi_v^2.

    old_log_prob, sum_pi_squared: float [B, T], log of the probability of the action that was taken, and the sum of the
    squares of all of them; mask: bool [B, T]. float64 [B, T], 0 on masked steps and never negative. Raises ValueError
    for a log-prob above 0: a density has no such energy, see ``gaussian_energy``. As in verl's optimal token baseline.
    """
    check_mask(mask)
    log_prob = read_steps("old_log_prob", old_log_prob, mask, torch.float64)
    square = read_steps("sum_pi_squared", sum_pi_squared, mask, torch.float64)
    if bool((log_prob > 1e-3).any()):
        raise ValueError(
            f"old_log_prob: expected log-probabilities <= 0, got {float(log_prob.max()):g}; "
            "for densities give step_energy (gaussian_energy)"
        )
    return torch.where(mask, (1 - 2 * log_prob.exp() + square).clamp(min=0), 0.0)


def gaussian_energy(noise_square: Tensor, sigma: Tensor, mask: Tensor) -> Tensor:
    """Measure the score of a Gaussian step on its mean: |noise|^2 / sigma^2.

    noise_square: float [B, T] >= 0, squared norm of the standard noise that the step drew; sigma: float > 0, [B, T] or
    [T], its deviation; mask: bool [B, T]. float64 [B, T], 0 on masked steps (deterministic ones among them, whose sigma
    may be 0). In D dimensions its expectation is D / sigma^2.
    """
    check_mask(mask)
    noise = read_steps("noise_square", noise_square, mask, torch.float64)
    if sigma.shape not in (mask.shape, mask.shape[1:]):
        raise ValueError(f"sigma: expected {list(mask.shape)} or {list(mask.shape[1:])}, got {list(sigma.shape)}")
    scale = torch.where(mask, sigma.detach().double().expand_as(mask), 1.0)
    if bool((noise < 0).any()) or not bool((scale > 0).all()):
        raise ValueError("noise_square, sigma: expected >= 0 and > 0 on unmasked steps")
    return noise / scale.square()


def _read_energy(
    mask: Tensor, energy: Tensor | None, old_log_prob: Tensor | None, square: Tensor | None, importance: Tensor | None
) -> Tensor:
    """Energy of each step, [B, T], 0 on masked ones."""
    if energy is not None:
        mass = read_steps("step_energy", energy, mask)
        if bool(mass.amin() < 0):
            raise ValueError(f"step_energy: expected >= 0 on unmasked steps, got {float(mass.min()):g}")
    elif old_log_prob is not None and square is not None:
        mass = token_energy(old_log_prob, square, mask)
    else:
        raise ValueError("step_energy: expected it, or old_log_prob and sum_pi_squared to make it from; got neither")
    if importance is None:
        return mass
    return mass * read_steps("importance", importance, mask, torch.float64).square()


def _step_baseline(returns: Tensor, mass: Tensor, here: Tensor, groups: Groups, lone: Tensor) -> Tensor:
    """Returns less their group's mean under ``mass`` at the same column, float32 [B, T], 0 where a row is not there.

    lone: bool [number, 1], whether a step that only one row of that group has keeps its return.
    """
    count, whole, heavy, plain = (
        torch.zeros(groups.number, returns.shape[1], dtype=torch.float64, device=returns.device) for _ in range(4)
    )
    peak = torch.full_like(count, -torch.inf, dtype=returns.dtype)

    def look(returns: Tensor, here: Tensor, index: Tensor) -> tuple[()]:
        count.index_add_(0, index, here.double())
        peak.scatter_reduce_(0, index[:, None].expand_as(here), torch.where(here, returns, -torch.inf), "amax")
        return ()

    def add(returns: Tensor, mass: Tensor, here: Tensor, index: Tensor) -> tuple[()]:
        below = torch.where(here, returns - peak[index], 0.0).double()  # from the best: equal returns give exactly 0
        weight = torch.where(here, mass, 0.0).double()
        whole.index_add_(0, index, weight)
        heavy.index_add_(0, index, weight * below)
        plain.index_add_(0, index, below)
        return ()

    def subtract(returns: Tensor, here: Tensor, index: Tensor) -> tuple[Tensor]:
        return (torch.where(here, (returns - peak[index]) - base[index], 0.0).float(),)

    by_rows(look, returns, here, groups.index)
    single = lone & (count == 1)
    peak = torch.where(single, 0.0, peak)
    by_rows(add, returns, mass, here, groups.index)
    base = torch.where(whole > 0, heavy / whole, plain / count)
    base = torch.where(single, 0.0, base).to(returns.dtype)
    return by_rows(subtract, returns, here, groups.index)[0]


def otb(
    step_reward: Tensor,
    group: Tensor,
    mask: Tensor,
    step_energy: Tensor | None = None,
    old_log_prob: Tensor | None = None,
    sum_pi_squared: Tensor | None = None,
    importance: Tensor | None = None,
    *,
    align: Literal["column", "rank"] = "column",
    zero_tail: bool = False,
    singleton: Singleton = "zero",
) -> Advantage:
    """Give every step its own baseline of least variance: A_t = G_t - sum_g(G_t W_t) / sum_g(W_t).

    G_t: sum of ``step_reward`` from t on. W_t = sum_{s <= t} w_s, the energy of the row up to t; w is ``step_energy``
    (float [B, T] >= 0, preferred where given), or ``token_energy`` of old_log_prob and sum_pi_squared; with
    ``importance`` (float [B, T], ratio of the trained policy to the one that sampled) times its square. The sums run
    over the rows of the group that have step t: the same column, or the same rank among the row's unmasked steps
    (align "rank", for rows with holes; verl's tir_optimal_token_baseline). Where all W are 0 the baseline is the plain
    mean (verl adds 1e-8 to the divisor: baseline 0). A step that only one row of a group has is its own baseline, 0;
    zero_tail on leaves it its return, as verl's handle_zero_tail does (masks without holes). singleton: the same choice for a
    group with one row that has steps (verl: "raw"). ``returns`` is G. Special case: equal W at every step is G_t
    less the group's mean at t. live: some step of the group has an advantage.

    OTB, 2602.07078; verl's optimal_token_baseline. On denoising steps: step_energy is ``gaussian_energy``, in the order
    in which the sampler steps; columns are timesteps.
    """
    check_policies(singleton=singleton)
    check_mask(mask)
    check_ids("group", group, tuple(mask.shape[:1]))
    if align not in ("column", "rank"):
        raise ValueError(f"align: expected 'column' or 'rank', got {align!r}")
    returns = reverse_scan(read_step_reward(step_reward, mask), 1.0, mask)
    energy = _read_energy(mask, step_energy, old_log_prob, sum_pi_squared, importance)
    (mass,) = by_rows(lambda x: (x.cumsum(1, dtype=torch.float64).float(),), energy)
    groups = Groups.of(group, mask.any(dim=1))
    lone = torch.where(groups.size == 1, singleton == "raw", zero_tail)[:, None]
    if align == "column":
        advantage = _step_baseline(returns, mass, mask, groups, lone)
    else:
        steps = mask.shape[1]
        rank = torch.where(mask, mask.long().cumsum(1) - 1, steps)  # masked steps go to a column that is thrown away
        blank = returns.new_zeros(len(mask), steps + 1)
        packed, weight = (blank.scatter(1, rank, x)[:, :steps] for x in (returns, mass))
        here = torch.arange(steps, device=mask.device) < mask.sum(1, keepdim=True)
        advantage = _step_baseline(packed, weight, here, groups, lone).gather(1, rank.clamp(max=steps - 1))
        advantage = torch.where(mask, advantage, 0.0)
    least, most = torch.aminmax(advantage, dim=1)
    return step_result(advantage, mask, group_any((least != 0) | (most != 0), group), returns)


_TESTS = "tests/advantage/test_optimal_baselines.py::"
_UNITS = "nothing is divided by a deviation: the advantage has the units of the reward"

METHODS: tuple[Method, ...] = (
    Method(
        key="opo",
        kind="estimator",
        paper_id="2505.23585",
        title="OPO: group mean weighted by length or cost",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "exact": _TESTS + "test_weighted_baseline_worked_numbers",
            "formula": _TESTS + "test_weighted_baselines_against_a_plain_loop",
            "identity": _TESTS + "test_equal_weights_are_dr_grpo",
        },
        call=opo,
        exempt={"scale": _UNITS},
    ),
    Method(
        key="otb",
        kind="estimator",
        paper_id="2602.07078",
        title="OTB: a baseline for each step, weighted by the energy up to it",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "formula": _TESTS + "test_otb_against_a_plain_loop",
            "identity": _TESTS + "test_otb_of_equal_energies_is_the_mean_return",
        },
        call=otb,
        exempt={
            "scale": _UNITS,
            "shift": "a constant added to every step reward grows with the steps that are left, and rows are ragged",
            "constant": "rows of unequal length have unequal returns",
        },
    ),
    Method(
        key="oblr_po",
        kind="estimator",
        paper_id="2511.23310",
        title="OBLR-PO: group mean weighted by gradient energy",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_the_energy_weighted_baseline_has_the_least_variance",
            "exact": _TESTS + "test_weighted_baseline_worked_numbers",
            "formula": _TESTS + "test_weighted_baselines_against_a_plain_loop",
            "identity": _TESTS + "test_energy_as_length_is_opo",
        },
        call=optimal_baseline,
        exempt={"scale": _UNITS},
    ),
    Method(
        key="oblr_lr",
        kind="optimizer",
        paper_id="2511.23310",
        title="OBLR-PO: learning rate by the gradient's signal-to-noise ratio",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_snr_lr_minimises_the_bound_on_a_quadratic",
            "exact": _TESTS + "test_snr_lr_worked_numbers",
        },
        call=snr_lr,
    ),
)
