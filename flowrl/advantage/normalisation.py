"""Normalisations fitted to the batch: Beta density, outcome consistency, absolute deviation, group gates.

Shapes: B samples, R reward channels, P groups. ``rewards`` [B] (or [B, R] where it says so), ``group`` int64 [B] of any
spacing and order, ``valid`` bool [B], None for all. NaN rewards, ddof, eps and errors: as in ``estimators``; statistics
are float64, results float32 without a gradient. A reward of another kind ([B] costs, flags, outcomes) must be finite
where the reward counts, and may hold anything elsewhere.

reduce: a statistic over group means is summed over data-parallel ranks by it, and is local without it. Every group
must lie whole on one rank: a group split over two would count twice, each half with a mean of its own. All ranks must
call, also those without a live group.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_flags, check_ids, read_rewards, read_rows
from .method import Method
from .moments import Reduce, batch_moments, total
from .record import Advantage
from .segments import Groups
from .statistics import Singleton, check_policies, divide, group_result, group_statistics

_CLIP_RATE = 1e-6  # rates nearer to 0 or 1 are taken as this far
_LEAST_VARIANCE = 1e-12  # of group means; below it the Beta fit is rounding noise
_MOST_EXPONENT = 500.0  # exp stays finite, also summed over any batch


def per_group(groups: Groups, x: Tensor) -> Tensor:
    """Take one value of each group out of a gathered [B] statistic: float64 [P]."""
    return torch.full_like(groups.size, torch.nan).scatter_(0, groups.index, x.double())


def check_range(value: Tensor, counted: Tensor, low: float = 0.0, high: float = 1.0) -> None:
    """Raise ValueError unless the rewards of ``counted`` lie in [low, high]."""
    outside = counted & ((value < low) | (value > high))
    if bool(outside.any()):
        raise ValueError(
            f"rewards: expected values in [{low:g}, {high:g}], got {int(outside.sum())} outside, "
            f"for instance {value[outside][0].item():g}"
        )


def fit_beta(rate: Tensor, *, reduce: Reduce | None = None) -> tuple[Tensor, Tensor]:
    """Fit BNPO's Beta density to the success rates of groups: (alpha, beta), float64 scalars or [R].

    m = mean, v = variance (ddof 1) of the P rates; k = m (1 - m) / v - 1; alpha = max(1 + k m / 3, 1),
    beta = max(1 + k (1 - m) / 3, 1). rate: floating [P] or [P, R] in [0, 1], NaN for a group without a value. Fewer
    than two groups, or a variance of at most 1e-12: alpha = beta = 1, the flat density (the public code's fallback
    m = 0, v = 1 gives the same). A variance above m (1 - m) does so by the maximum. BNPO, 2506.02864.
    On denoising steps: the same, rates are means of rewards in [0, 1]. Raises ValueError for another shape or range.
    """
    if rate.ndim not in (1, 2) or not rate.is_floating_point():
        raise ValueError(f"rate: expected floating [P] or [P, R], got {rate.dtype} {list(rate.shape)}")
    known = ~rate.isnan()
    p = torch.where(known, rate.detach().double(), 0.0)
    if bool(((p < 0) | (p > 1)).any()):
        raise ValueError(f"rate: expected success rates in [0, 1], got {rate[known].tolist()[:8]}")
    first = total(torch.stack([known.double().sum(0), p.sum(0)]), reduce)
    mean = first[1] / first[0].clamp(min=1)
    square = total(torch.where(known, p - mean, 0.0).square().sum(0), reduce)
    variance = square / (first[0] - 1).clamp(min=1)
    spread = variance > _LEAST_VARIANCE
    k = torch.where(spread, mean * (1 - mean) / torch.where(spread, variance, 1.0) - 1, 0.0)
    return (1 + k * mean / 3).clamp(min=1), (1 + k * (1 - mean) / 3).clamp(min=1)


def bnpo(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    low: float = 0.0,
    high: float = 1.0,
    cap: float = 1e6,
    reduce: Reduce | None = None,
) -> Advantage:
    """Divide the centred reward by a Beta density fitted to the groups' success rates.

    A_i = (r_i - p_g) min(1 / f(p_g), cap), f the density Beta(alpha, beta) of ``fit_beta`` over the group means p.

    BNPO, 2506.02864 (not TRL's aggregation of that name). rewards: [B] or [B, R] in [low, high], mapped to [0, 1]
    first; with R channels each is done by itself and A is the mean over all R (a NaN channel adds 0). A density of 1
    (few groups, or rates spread to 0 and 1) is Dr.GRPO; alpha = beta = 3/2 is pi/8 times GRPO of ddof 0 without eps.
    Keeps the sign of r - p. cap > 0. reduce: see the module; group_mean and group_std (ddof 0) are those of the mean
    over channels, in the units of the reward.
    On denoising steps: the same; binarise or squash image scores to [0, 1] first, or take Lite PPO.
    """
    check_number("low", low)
    check_number("high", high, low, strict=True)
    check_number("cap", cap, 0.0, strict=True)
    value, mask = read_rewards(rewards, group, valid, channels=rewards.ndim == 2)
    check_range(value, mask, low, high)
    rows = len(value)
    counted = mask.view(rows, -1)
    unit = ((value - low) / (high - low)).view(rows, -1)
    channels = unit.shape[1]
    # Every (group, channel) pair is a group of its own, so the channels share one pass.
    pair = Groups.of(group).index[:, None] * channels + torch.arange(channels, device=group.device)
    s = group_statistics(unit.flatten(), pair.flatten(), counted.flatten(), 0, "zero")
    rate = per_group(s.groups, s.mean).view(-1, channels)
    alpha, beta = fit_beta(rate, reduce=reduce)
    p = s.mean.view(rows, channels).clamp(_CLIP_RATE, 1 - _CLIP_RATE)
    log_norm = alpha.lgamma() + beta.lgamma() - (alpha + beta).lgamma()
    log_density = (alpha - 1) * p.log() + (beta - 1) * (-p).log1p() - log_norm
    factor = torch.where(counted, (-log_density).exp().clamp(max=cap), 0.0)
    advantage = (s.centred.view(rows, channels) * factor).mean(1)
    kept = counted.any(dim=1)
    groups, average = Groups.of(group, kept), torch.where(mask, value, 0.0).view(rows, -1).mean(1)
    live = s.live.view(rows, channels).any(dim=1)
    return group_result(advantage, kept, live, groups.mean(average), groups.std(average))


def copo(
    rewards: Tensor,
    group: Tensor,
    outcome: Tensor,
    valid: Tensor | None = None,
    *,
    gamma: float = 20.0,
    rho: float = 0.837,
    rho_unit: Literal["ln_size", "nats"] = "ln_size",
    ddof: int = 0,
    eps: float = 1e-4,
    reduce: Reduce | None = None,
) -> Advantage:
    """Blend the group's own advantage with one between groups, by how much the group's outcomes differ.

    A = w A_loc + (1 - w) A_glob; A_loc is ``grpo``'s; A_glob = (mean_g - mean_P) / (std_P + eps) over the P group
    means, shared by the group; w = sigmoid(gamma (H - rho)); H = -sum_o q(o) ln q(o) over the outcomes of the group.

    COPO, 2508.04138; reconstructed: concordant notes with constants, the paper's code could not be had. outcome: int64
    [B], equal ids for equal final answers; renaming them changes nothing. rho: in units of ln(group size), which is
    the published 1.5 nats at 6 samples, or in "nats". channels: "local" A_loc, "global" A_glob, "blend" w, each [B]:
    a blend of two clipped losses, w L(A_loc) + (1 - w) L(A_glob), differs from the loss of A only where one of them
    is clipped. w = 1 is GRPO; one group alone has A_glob 0; a group with one value has no local part and w = 0. A
    group of equal rewards is live through A_glob. reduce: see the module.
    On denoising steps: outcome ids come from clusters of image embeddings.
    """
    check_policies(ddof, eps)
    check_number("gamma", gamma, 0.0)
    check_number("rho", rho)
    if rho_unit not in ("ln_size", "nats"):
        raise ValueError(f"rho_unit: expected 'ln_size' or 'nats', got {rho_unit!r}")
    value, mask = read_rewards(rewards, group, valid)
    check_ids("outcome", outcome, tuple(group.shape))
    s = group_statistics(value, group, mask, ddof, "zero")
    means = per_group(s.groups, s.mean)
    centre, spread = batch_moments(means, ~means.isnan(), ddof, reduce)
    apart = (s.groups.count() > 0) & (spread > 1e-12 * (1 + centre.abs()))
    between = torch.where(apart, divide(s.mean - centre, spread, eps), 0.0)
    size = s.groups.count().clamp(min=1).double()
    same = Groups.of(s.groups.index * len(group) + Groups.of(outcome).index, mask)
    entropy = s.groups.mean(-(same.count() / size).log())
    limit = rho * size.log() if rho_unit == "ln_size" else torch.full_like(size, rho)
    blend = torch.where(mask & (size > 1), torch.sigmoid(gamma * (entropy - limit)), 0.0)
    local = divide(s.centred, s.scale, eps)
    out = group_result(blend * local + (1 - blend) * between, mask, s.live | (between != 0), s.mean, s.std)
    parts = {"local": local, "global": torch.where(mask, between, 0.0), "blend": blend}
    return replace(out, channels={name: part.float() for name, part in parts.items()})


def question_weight(rate: Tensor, live: Tensor, *, temperature: float = 2.0, reduce: Reduce | None = None) -> Tensor:
    """Weigh hard groups up: lambda_s = P_live softmax_s(-p_s / temperature) over the live groups, 1 for the others.

    rate: floating [P], mean reward of each group; live: bool [P]. float64 [P], mean 1 over the live groups; a great
    temperature gives 1 everywhere. DGPO, 2601.20614. On denoising steps: the same. Raises ValueError for other shapes.
    """
    if rate.ndim != 1 or not rate.is_floating_point():
        raise ValueError(f"rate: expected floating [P], got {rate.dtype} {list(rate.shape)}")
    check_flags("live", live, tuple(rate.shape))
    check_number("temperature", temperature, 0.0, strict=True)
    p = read_rows("rate", rate, live)
    first = total(torch.stack([live.double().sum(), p.sum()]), reduce)
    centre = first[1] / first[0].clamp(min=1)  # a common shift of all ranks, so that exp stays in range
    share = torch.where(live, ((centre - p) / temperature).clamp(max=_MOST_EXPONENT).exp(), 0.0)
    return torch.where(live, divide(first[0] * share, total(share.sum(), reduce), 0.0), 1.0)


def dgpo_difficulty(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    main_reward: Tensor | None = None,
    length: Tensor | None = None,
    *,
    temperature: float = 2.0,
    eps: float = 1e-4,
    compensate: bool = True,
    reduce: Reduce | None = None,
) -> Advantage:
    """Divide by the mean absolute deviation, and weigh hard groups up.

    A_i = (r_i - mean_g) / (MAD_g + eps / n_g), MAD_g = mean |r - mean_g|: every live group has mean |A| = 1.
    weight = lambda_g C: lambda of ``question_weight`` over the live groups' mean main reward, and C = (sum of all
    lengths) / (sum of lengths in live groups), which undoes the share of dead groups in a mean over steps.

    DGPO (MathForge), 2601.20614. main_reward: [B], measures difficulty, ``rewards`` by default; a group whose main
    reward is 0 throughout counts as the easiest, p = 1. Rewards in [0, 1] are meant: lambda depends on their scale, A
    does not. length: [B] >= 0, ones by default. compensate: False leaves C at 1. At half successes of 0/1 rewards A is
    GRPO's of ddof 0. group_std has ddof 0. reduce: see the module.
    On denoising steps: the same; the length is the number of trained steps, equal for all rows and hence left out.
    """
    check_policies(eps=eps)
    value, mask = read_rewards(rewards, group, valid)
    main = torch.where(mask, value, 0.0) if main_reward is None else read_rows("main_reward", main_reward, mask)
    steps = mask.double() if length is None else read_rows("length", length, mask, 0.0)
    s = group_statistics(value, group, mask, 0, "zero")
    spread = s.groups.mean(s.centred.abs()) + eps / s.groups.count().clamp(min=1)
    unsolved = (s.groups.min(main) == 0) & (s.groups.max(main) == 0)
    rate = torch.where(unsolved, 1.0, s.groups.mean(main))
    live = per_group(s.groups, s.live) > 0
    weight = s.groups.gather(question_weight(per_group(s.groups, rate), live, temperature=temperature, reduce=reduce))
    if compensate:
        length_sum = total(torch.stack([steps.sum(), torch.where(s.live, steps, 0.0).sum()]), reduce)
        weight = weight * torch.where(length_sum[1] > 0, divide(length_sum[0], length_sum[1], 0.0), 1.0)
    out = group_result(divide(s.centred, spread, 0.0), mask, s.live, s.mean, s.std)
    return replace(out, weight=torch.where(mask, weight, 0.0).float())


def group_gate(
    advantage: Tensor, group: Tensor, passed: Tensor, *, scale: float = 0.1, how: Literal["any", "all"] = "any"
) -> Tensor:
    """Multiply by ``scale`` the advantages of every group that does not pass: float32 in the shape of ``advantage``.

    advantage: floating [B] or [B, T]; passed: bool [B]; a group passes where any (all) of its rows do. scale >= 0, so
    no sign changes; 1 changes nothing. On denoising steps: the same. Raises ValueError for other shapes.
    """
    check_number("scale", scale, 0.0)
    if how not in ("any", "all"):
        raise ValueError(f"how: expected 'any' or 'all', got {how!r}")
    if advantage.ndim not in (1, 2) or not advantage.is_floating_point():
        raise ValueError(f"advantage: expected floating [B] or [B, T], got {advantage.dtype} {list(advantage.shape)}")
    check_ids("group", group, tuple(advantage.shape[:1]))
    check_flags("passed", passed, tuple(advantage.shape[:1]))
    groups = Groups.of(group)
    share = groups.mean(passed.double())
    factor = torch.where(share > 0 if how == "any" else share == 1, 1.0, scale)
    return (advantage.detach().double() * (factor if advantage.ndim == 1 else factor[:, None])).float()


def adora(
    rewards: Tensor,
    group: Tensor,
    cost: Tensor,
    correct: Tensor,
    truncated: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    scale: float = 0.1,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
) -> Advantage:
    """Scale a whole group down unless spending more paid off in it.

    A = ``grpo``'s where max cost of the correct > mean cost of the wrong and not truncated; else ``scale`` times that.

    ADORA (repository ShadeCloak/ADORA; its length is ``cost`` here). cost: [B] floating, any unit; correct, truncated
    (default none): bool [B]. A group without a correct row is scaled down; one with a correct row and no wrong
    untruncated one is not (the mean is undefined: our choice). scale >= 0; 1 is GRPO. channels: "gate" [B], the factor.
    On denoising steps: the cost is network calls or seconds; with a constant cost the gate never passes, so leave it.
    """
    check_policies(ddof, eps, singleton)
    value, mask = read_rewards(rewards, group, valid)
    check_flags("correct", correct, tuple(group.shape))
    cut = torch.zeros_like(mask) if truncated is None else truncated
    check_flags("truncated", cut, tuple(group.shape))
    spent = read_rows("cost", cost, mask)
    s = group_statistics(value, group, mask, ddof, singleton)
    right, wrong = Groups.of(group, mask & correct), Groups.of(group, mask & ~correct & ~cut)
    paid = (wrong.count() == 0) | (right.max(spent) > wrong.mean(spent))
    passed = paid & (right.count() > 0)
    out = group_result(divide(s.centred, s.scale, eps), mask, s.live, s.mean, s.std)
    gated = group_gate(out.advantage, group, passed, scale=scale)
    return replace(out, advantage=gated, channels={"gate": torch.where(mask & ~passed, scale, mask.float())})


def gate_reward(rewards: Tensor, gated: Tensor | None = None, *, hard: int = 0, tau: float = 1.0) -> Tensor:
    """Let the easy rewards count only where the hard one is reached: r_k := r_k 1[r_hard >= tau], float32 [B, R].

    Conditioned reward of GDPO, 2601.05242: an easy channel is otherwise learned at the expense of the hard one.
    rewards: floating [B, R]; hard: index of the hard channel, which is never changed; gated: bool [R], the channels
    that depend on it, all others by default. A NaN stays; where the hard one is NaN, so are the gated ones (nobody
    knows). On denoising steps: the same, channels are scorers. Raises ValueError for other shapes or indices.
    """
    if rewards.ndim != 2 or rewards.numel() == 0 or not rewards.is_floating_point():
        raise ValueError(f"rewards: expected floating [B, R], not empty, got {rewards.dtype} {list(rewards.shape)}")
    channels = rewards.shape[1]
    if not 0 <= hard < channels:
        raise ValueError(f"hard: expected a channel 0 ... {channels - 1}, got {hard}")
    check_number("tau", tau)
    flags = torch.ones(channels, dtype=torch.bool, device=rewards.device) if gated is None else gated
    check_flags("gated", flags, (channels,))
    value = rewards.detach().double()
    key = value[:, hard : hard + 1]
    reached = torch.where(key.isnan(), torch.nan, (key >= tau).double())
    easy = flags & (torch.arange(channels, device=rewards.device) != hard)
    return torch.where(easy, value * reached, value).float()


_TESTS = "tests/advantage/test_normalisation.py::"
_GATES = "tests/advantage/test_group_gates.py::"
_BATCH = "the statistic is over all groups of the batch"

METHODS: tuple[Method, ...] = (
    Method(
        key="bnpo",
        kind="estimator",
        paper_id="2506.02864",
        title="BNPO: centred rewards divided by a Beta density fitted to the success rates",
        tier=2,
        evidence={
            "exact": _TESTS + "test_bnpo_worked_numbers",
            "formula": _TESTS + "test_bnpo_against_a_plain_loop",
            "identity": _TESTS + "test_bnpo_of_three_halves_is_grpo_times_pi_over_eight",
        },
        call=bnpo,
        exempt={
            "isolation": _BATCH,
            **dict.fromkeys(("shift", "scale"), "rewards are bound to [low, high]"),
        },
    ),
    Method(
        key="copo",
        kind="estimator",
        paper_id="2508.04138",
        title="COPO: group advantage blended with one between groups, by outcome entropy",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_copo_worked_weights",
            "formula": _TESTS + "test_copo_against_a_plain_loop",
            "identity": _TESTS + "test_copo_of_weight_one_is_grpo",
        },
        call=copo,
        exempt={"isolation": _BATCH, "constant": "equal rewards get the advantage between groups: the method's point"},
    ),
    Method(
        key="dgpo_difficulty",
        kind="estimator",
        paper_id="2601.20614",
        title="DGPO (MathForge): mean absolute deviation, harder groups weigh more",
        tier=2,
        evidence={
            "exact": _TESTS + "test_dgpo_worked_numbers",
            "formula": _TESTS + "test_dgpo_against_a_plain_loop",
            "identity": _TESTS + "test_dgpo_at_half_success_is_grpo",
        },
        call=dgpo_difficulty,
        exempt={"isolation": "weights are a softmax over all groups of the batch; advantages are isolated"},
    ),
    Method(
        key="adora",
        kind="estimator",
        paper_id="",
        title="ADORA: groups in which longer answers did not pay are scaled down",
        tier=2,
        evidence={
            "exact": _GATES + "test_adora_worked_numbers",
            "formula": _GATES + "test_adora_against_a_plain_loop",
            "identity": _GATES + "test_adora_of_scale_one_is_grpo",
        },
        call=adora,
    ),
    Method(
        key="gate_reward",
        kind="reward",
        paper_id="2601.05242",
        title="Conditioned reward: easy channels count where the hard one is reached",
        tier=2,
        evidence={"exact": _GATES + "test_gate_reward_table", "formula": _GATES + "test_gate_reward_against_a_loop"},
        call=gate_reward,
    ),
)
