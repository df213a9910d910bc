"""Advantages from rewards of steps: backward scans with and without a critic.

The next step is the next unmasked one, so that holes of a mask carry no credit and cut none off. A NaN step reward
counts as 0; a row whose unmasked step rewards are all NaN has no value: advantage 0, loss_mask and live False; any
other row with an unmasked step is live. Advantages and critic's targets are 0 on masked steps. Scans run in float64;
results are float32 and carry no gradient.

Raises ValueError, naming the argument, for a wrong shape or dtype, a reward on a masked step, values that are not
finite on unmasked steps, and options out of range.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_number, check_share
from .inputs import check_flags, check_ids, check_mask, read_rewards, read_steps
from .method import Method
from .moments import Reduce, masked_whiten, weighted_moments
from .record import Advantage
from .scans import backward_scan, decayed_scan, gae_scan, last_step, read_path
from .statistics import Singleton, check_policies, group_statistics, step_result


def _check_whitening(ddof: int, eps: float) -> None:
    """Raise ValueError unless ``ddof`` is 0 or 1 and ``eps`` is finite and above 0."""
    check_policies(ddof, eps)
    if eps == 0:
        raise ValueError("eps: expected a number > 0, for a batch without spread")


def _after(value: Tensor, kept: Tensor, bootstrap: Tensor | None, truncated: Tensor | None) -> Tensor | None:
    """Value of the state after the last step, [B]: see ``gae``."""
    if bootstrap is not None and (
        bootstrap.shape != value.shape[:1] or bootstrap.is_complex() or not bool(bootstrap.isfinite().all())
    ):
        raise ValueError(
            f"bootstrap: expected [{len(value)}] finite numbers, got {bootstrap.dtype} {list(bootstrap.shape)}"
        )
    after = None if bootstrap is None else bootstrap.detach()
    if truncated is None:
        return after
    check_flags("truncated", truncated, tuple(value.shape[:1]))
    if after is None:
        after = value.gather(1, last_step(kept).clamp(min=0)[:, None])[:, 0]
    return torch.where(truncated, after, 0.0)


def gae(
    step_reward: Tensor,
    value: Tensor,
    mask: Tensor,
    bootstrap: Tensor | None = None,
    truncated: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    whiten: bool = False,
    ddof: int = 1,
    eps: float = 1e-8,
    reduce: Reduce | None = None,
) -> Advantage:
    """Estimate generalised advantages from a critic: A_t = delta_t + gamma lam A_next.

    delta_t = r_t + gamma V_next - V_t, where next is the next unmasked step. returns = A + V, before any whitening.

    step_reward, value: float [B, T]; mask: bool [B, T]. bootstrap: float [B], value of the state after the last step
    (0 by default). truncated: bool [B]; where it is given, only truncated rows are bootstrapped, from ``bootstrap`` or,
    without it, from the row's own last value. gamma, lam in [0, 1]. whiten: standardise over all unmasked steps of the
    batch, (A - mean) / sqrt(var + eps), var with ``ddof``; ``reduce`` sums over data-parallel ranks. verl whitens
    always, with ddof 1 and eps 1e-8, and uses lam 1 by default; TRL's PPO has lam 0.95.

    gamma = lam = 1: return-to-go minus V. lam = 0: the one-step temporal difference. V = 0 and lam = 1: the discounted
    return-to-go. Source: 1506.02438 equations 11 to 16; the skip over masked steps: verl core_algos. On denoising
    steps: direct, V(x_t, t, prompt) before each stochastic transition, gamma 1; deterministic steps are masked.
    """
    check_share("gamma", gamma)
    check_share("lam", lam)
    _check_whitening(ddof, eps)
    path = read_path(step_reward, mask)
    state = read_steps("value", value, path.kept)
    raw = gae_scan(path.reward, state, path.kept, gamma, lam, _after(state, path.kept, bootstrap, truncated))
    advantage = masked_whiten(raw, path.kept, ddof=ddof, eps=eps, reduce=reduce) if whiten else raw
    return step_result(advantage, path.kept, path.live, returns=raw + state, critic_mask=path.kept)


def open_reasoner_zero(
    step_reward: Tensor,
    value: Tensor,
    mask: Tensor,
    *,
    whiten: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
    reduce: Reduce | None = None,
) -> Advantage:
    """Run ``gae`` without discount and without decay: A_t = sum of the rewards from t on - V_t.

    lam = 1 keeps the policy gradient free of the critic's bias. whiten: standardise over the unmasked steps of the
    batch, as ``gae`` says; the released code takes the mean over padding as well, which is not done here. Other
    arguments, shapes, errors: see ``gae``. Source: 2503.24290 section 2 and Open-Reasoner-Zero. On denoising steps:
    direct, as ``gae``.
    """
    return gae(step_reward, value, mask, gamma=1.0, lam=1.0, whiten=whiten, ddof=ddof, eps=eps, reduce=reduce)


def t_ppo(
    step_reward: Tensor,
    value: Tensor,
    mask: Tensor,
    truncated: Tensor,
    window_start: Tensor | None = None,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    critic_target: Literal["mc", "gae"] = "mc",
) -> Advantage:
    """Estimate advantages of unfinished rows by taking the value as unchanged across the cut.

    ``gae`` with V(s_l) := V(s_{l-1}) where the row was cut at length l, hence delta_{l-1} = r_{l-1} + (gamma - 1)
    V_{l-1}, and V(s_l) = 0 where it is finished.

    truncated: bool [B], cut before its end. window_start: int64 [B], first step of the present window (0 by default);
    loss_mask holds from there on, while advantages are given on all unmasked steps. critic_mask: finished rows only.
    critic_target: "mc", the discounted return-to-go, or "gae", A + V. Other arguments, errors: see ``gae``. Finished
    rows: ``gae``. Source: 2506.15050, extended GAE (read through summaries). On denoising steps: partial trajectories
    kept across iterations, a window of timesteps each.
    """
    check_share("gamma", gamma)
    check_share("lam", lam)
    check_choice("critic_target", critic_target, ("mc", "gae"))
    path = read_path(step_reward, mask)
    state = read_steps("value", value, path.kept)
    after = _after(state, path.kept, None, truncated)
    advantage = gae_scan(path.reward, state, path.kept, gamma, lam, after)
    target = advantage if critic_target == "gae" else gae_scan(path.reward, state, path.kept, gamma, 1.0, after)
    inside = path.kept
    if window_start is not None:
        check_ids("window_start", window_start, tuple(mask.shape[:1]))
        inside = inside & (torch.arange(mask.shape[1], device=mask.device) >= window_start[:, None])
    critic = path.kept & ~truncated[:, None]
    result = step_result(advantage, path.kept, path.live, returns=target + state, critic_mask=critic)
    return replace(result, loss_mask=inside, weight=inside.float())


def pdppo(
    step_reward: Tensor,
    value: Tensor,
    value_post: Tensor,
    mask: Tensor,
    *,
    gamma: float = 1.0,
    lam: float = 0.95,
    combine: Literal["max", "mean"] = "max",
) -> Advantage:
    """Take the larger of two critics' advantages: A = max(gae(r, V), gae(r, V_post)).

    value: float [B, T] of the state before each step; value_post: float [B, T] of the post-decision state, after the
    chosen action and before the noise. The maximum is biased upwards: combine "mean" averages instead. channels:
    "pre", "post" and "returns_post", the target of the second critic; ``returns`` is that of the first. Equal critics:
    ``gae``. Other arguments, errors: see ``gae``. Source: 2504.05150, reconstructed: the two temporal differences were
    not seen in print, so both critics use the recursion of ``gae``. On denoising steps: the post-decision state is the
    mean of the transition, before noise is added; V_post is free of that noise.
    """
    check_share("gamma", gamma)
    check_share("lam", lam)
    check_choice("combine", combine, ("max", "mean"))
    path = read_path(step_reward, mask)
    state, decided = read_steps("value", value, path.kept), read_steps("value_post", value_post, path.kept)
    pre = gae_scan(path.reward, state, path.kept, gamma, lam)
    post = gae_scan(path.reward, decided, path.kept, gamma, lam)
    advantage = torch.maximum(pre, post) if combine == "max" else (pre + post) / 2
    channels = {"pre": pre, "post": post, "returns_post": post + decided}
    return step_result(advantage, path.kept, path.live, pre + state, path.kept, channels)


def reinforce_pp(
    step_reward: Tensor,
    mask: Tensor,
    old_log_prob: Tensor | None = None,
    reference_log_prob: Tensor | None = None,
    *,
    gamma: float = 1.0,
    kl_coef: float = 0.0,
    holes: Literal["skip", "reset"] = "skip",
    whiten: bool = True,
    ddof: int = 1,
    eps: float = 1e-8,
    reduce: Reduce | None = None,
) -> Advantage:
    """Whiten discounted returns-to-go over all steps of the batch, without a critic.

    G_t = sum_{s >= t} gamma^(s - t) (r_s - kl_coef (old_log_prob_s - reference_log_prob_s)), s over unmasked steps;
    A = (G - mean) / sqrt(var + eps).

    step_reward: float [B, T], usually the outcome on the last unmasked step. old_log_prob, reference_log_prob: float
    [B, T], needed where kl_coef >= 0 is not 0. holes: "skip" carries the return over masked steps, as verl 0.9.1;
    "reset" forgets it there, as older releases did (the same where a row's mask has no hole). Every step is one
    datum, so long rows weigh more.
    whiten, ddof, eps, reduce: see ``gae``. returns: G. Source: 2501.03262; verl core_algos. On denoising steps:
    direct; gamma < 1 gives later steps, which are closer to the image, more of the reward.
    """
    check_share("gamma", gamma)
    _check_whitening(ddof, eps)
    check_choice("holes", holes, ("skip", "reset"))
    check_number("kl_coef", kl_coef, 0.0)
    path = read_path(step_reward, mask)
    reward = path.reward
    if kl_coef > 0:
        if old_log_prob is None or reference_log_prob is None:
            raise ValueError("kl_coef: above 0 it needs old_log_prob and reference_log_prob")
        old = read_steps("old_log_prob", old_log_prob, path.kept)
        reward = reward - kl_coef * (old - read_steps("reference_log_prob", reference_log_prob, path.kept))
    if holes == "skip":
        raw = decayed_scan(reward, gamma, path.kept)
    else:
        raw = torch.where(path.kept, backward_scan(reward, gamma * path.kept.float()), 0.0)
    advantage = masked_whiten(raw, path.kept, ddof=ddof, eps=eps, reduce=reduce) if whiten else raw
    return step_result(advantage, path.kept, path.live, returns=raw)


def reinforce_pp_baseline(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    unit: Literal["step", "sample"] = "step",
    singleton: Singleton = "zero",
    dead: Literal["zero", "whiten"] = "zero",
    ddof: int = 1,
    eps: float = 1e-8,
    reduce: Reduce | None = None,
) -> Advantage:
    """Take the group mean off the outcome, spread it over the steps, and whiten over the batch.

    A0 = r - mean_g; A = (A0 - mean) / sqrt(var + eps).

    rewards: float [B], NaN for no value; group: int64 [B]; mask: bool [B, T]; valid: bool [B]. unit: every unmasked
    step is one datum of mean and var ("step": verl) or every row with a step is ("sample": TRL, ms-swift). singleton:
    a group with one value gets A0 = 0 ("zero") or A0 = r ("raw": verl). dead: a group without signal has A0 = 0 and
    counts in the statistics; it ends with exactly 0 ("zero") or shifted like all others ("whiten": verl). ddof, eps,
    reduce: see ``gae``. Result [B, T]; a group is on one rank.

    Equal lengths and groups with signal: ``lite_ppo`` with std_of "centred", up to the number of data in ddof. Source:
    2501.03262; verl core_algos. On denoising steps: direct; at a fixed number of steps both units agree up to ddof.
    """
    _check_whitening(ddof, eps)
    check_policies(singleton=singleton)
    check_choice("unit", unit, ("step", "sample"))
    check_choice("dead", dead, ("zero", "whiten"))
    reward, known = read_rewards(rewards, group, valid)
    check_mask(mask, len(rewards))
    s = group_statistics(reward, group, known, ddof, singleton)
    kept = mask if bool(known.all()) else mask & known[:, None]
    data = kept.sum(1, dtype=torch.int32) if unit == "step" else kept.any(1)  # of a row, whose steps have one value
    mean, std = weighted_moments(s.centred, data.double(), ddof=ddof, reduce=reduce)
    row = (s.centred - mean) * (std.square() + eps).rsqrt()
    if dead == "zero":
        row = torch.where(s.live, row, 0.0)
    return step_result(row.float()[:, None], kept, s.live, statistics=s)


_TESTS = "tests/advantage/test_returns.py::"
_NO_SHIFT = "a constant added to every reward is a gain over the critic: the advantages move"
_NO_SCALE = "the critic's values do not scale with the rewards"
_NO_GROUPS = "no group baseline: a constant reward is credit"
_BATCH = "whitening takes its statistics over the batch"
_CRITIC = {"shift": _NO_SHIFT, "scale": _NO_SCALE, "constant": _NO_GROUPS}

METHODS: tuple[Method, ...] = (
    Method(
        key="gae",
        kind="estimator",
        paper_id="1506.02438",
        title="GAE: decaying sum of temporal differences of a critic (PPO)",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "exact": _TESTS + "test_gae_worked_numbers",
            "formula": _TESTS + "test_gae_against_a_plain_loop",
            "identity": _TESTS + "test_gae_special_cases",
        },
        call=gae,
        exempt=_CRITIC,
    ),
    Method(
        key="open_reasoner_zero",
        kind="estimator",
        paper_id="2503.24290",
        title="Open-Reasoner-Zero: GAE with gamma = lam = 1, whitened",
        tier=2,
        evidence={
            "exact": _TESTS + "test_open_reasoner_zero_worked_numbers",
            "identity": _TESTS + "test_open_reasoner_zero_is_gae_whitened",
        },
        call=open_reasoner_zero,
        exempt={**_CRITIC, "isolation": _BATCH},
    ),
    Method(
        key="t_ppo",
        kind="estimator",
        paper_id="2506.15050",
        title="Truncated PPO: GAE on unfinished rows, the value unchanged across the cut",
        tier=2,
        evidence={
            "exact": _TESTS + "test_t_ppo_worked_numbers",
            "formula": _TESTS + "test_t_ppo_against_a_plain_loop",
            "identity": _TESTS + "test_t_ppo_on_finished_rows_is_gae",
        },
        call=t_ppo,
        exempt=_CRITIC,
    ),
    Method(
        key="pdppo",
        kind="estimator",
        paper_id="2504.05150",
        title="PDPPO: the larger of the advantages under a state and a post-decision critic",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_pdppo_combines_two_critics",
            "exact": _TESTS + "test_pdppo_worked_numbers",
            "identity": _TESTS + "test_pdppo_with_equal_critics_is_gae",
        },
        call=pdppo,
        exempt=_CRITIC,
    ),
    Method(
        key="reinforce_pp",
        kind="estimator",
        paper_id="2501.03262",
        title="REINFORCE++: returns-to-go whitened over all steps of the batch",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "formula": _TESTS + "test_reinforce_pp_against_a_plain_loop",
            "identity": _TESTS + "test_reinforce_pp_is_gae_without_a_critic",
        },
        call=reinforce_pp,
        exempt={
            "shift": "a constant added to every step reward grows with the steps that are left",
            "constant": "no group baseline: a step's credit depends on the steps that are left",
            "isolation": _BATCH,
        },
    ),
    Method(
        key="reinforce_pp_baseline",
        kind="estimator",
        paper_id="2501.03262",
        title="REINFORCE++ baseline: group mean taken off, whitened over the batch",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "exact": _TESTS + "test_reinforce_pp_baseline_worked_numbers",
            "formula": _TESTS + "test_reinforce_pp_baseline_against_a_plain_loop",
            "identity": _TESTS + "test_reinforce_pp_baseline_is_lite_ppo_at_equal_lengths",
        },
        call=reinforce_pp_baseline,
        exempt={"isolation": _BATCH},
    ),
)
