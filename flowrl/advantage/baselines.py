"""Advantages against another baseline than the group's mean: a probe, a prompt value, a greedy rollout, the runner-up.

``rewards`` float [B], ``group`` int64 [B], ``valid`` bool [B] (None for all) and the options ddof, eps and singleton are
those of ``estimators``: a NaN reward is no value, statistics are float64, results float32 without a gradient.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import check_number
from .inputs import read_rewards, read_rows
from .method import Method
from .moments import Reduce, total
from .record import Advantage
from .segments import Groups
from .statistics import Singleton, check_policies, divide, group_result, group_statistics


def _other_mean(x: Tensor, groups: Groups) -> Tensor:
    """Average ``x`` (float64 [B]) over the other valid members of the group; 0 where there is none."""
    peak = groups.max(x)  # sums of differences to it, so that equal values give exactly that value
    below = x - peak
    count = groups.count()
    mean = peak + (groups.sum(below) - below) / (count - 1).clamp(min=1)
    return torch.where(groups.valid & (count > 1), mean, 0.0)


def poise(
    rewards: Tensor,
    group: Tensor,
    probe: Tensor,
    valid: Tensor | None = None,
    *,
    target: Literal["others", "group"] = "others",
    singleton: Singleton = "zero",
) -> Advantage:
    """Take off what a probe predicts from the other rollouts: A_i = r_i - mean_{j != i in group} g_j.

    probe: float [B], g_j, the reward that a cheap regressor predicts from rollout j's own features (hidden states,
    entropies); in the units of the reward, finite where the reward counts. No row's own features reach its baseline,
    so the gradient stays unbiased. ``returns`` [B] is what the probe is to be fitted to: the mean reward of the others
    ("others", the repository's other_rollout_correctness), or of the group ("group", its pair_average); ``critic_mask``
    says where there is one. Use this result before the probe is refitted. A group of one has no other rollout: 0, or
    its reward ("raw"). Equal rewards are signal here, since the baseline does not see them.

    Special cases: g = r is RLOO; g = c is r - c. POISE, 2605.07579, repository holi-lab/POISE (group mean and others
    as targets; it asks for groups of one size, at least 2). On denoising steps: the probe reads pooled features of the
    denoiser at one timestep; a row's own noisy latents must not reach its own baseline.
    """
    check_policies(singleton=singleton)
    if target not in ("others", "group"):
        raise ValueError(f"target: expected 'others' or 'group', got {target!r}")
    value, mask = read_rewards(rewards, group, valid)
    predicted = read_rows("probe", probe, mask)
    groups = Groups.of(group, mask)
    single = groups.count() == 1
    live = groups.count() > (0 if singleton == "raw" else 1)
    aim = _other_mean(value, groups) if target == "others" else groups.mean(value)
    fitted = mask if target == "group" else mask & ~single
    return Advantage(
        advantage=torch.where(mask & live, value - _other_mean(predicted, groups), 0.0).float(),
        weight=mask.float(),
        loss_mask=mask,
        live=live,
        group_mean=groups.mean(value).float(),
        group_std=groups.std(value).float(),
        returns=torch.where(fitted, aim, 0.0).float(),
        critic_mask=fitted,
    )


def _against(rewards: Tensor, baseline: Tensor, name: str, valid: Tensor | None) -> Advantage:
    """r - baseline for each row on its own; a NaN baseline is no value."""
    value, mask = read_rewards(rewards, None, valid)
    if baseline.shape != value.shape:
        raise ValueError(f"{name}: expected [{len(value)}], one value a row, got {list(baseline.shape)}")
    mask = mask & ~baseline.isnan()
    level = read_rows(name, baseline, mask)
    advantage = torch.where(mask, value - level, 0.0).float()
    return Advantage(advantage=advantage, weight=mask.float(), loss_mask=mask, live=mask)


def v0(rewards: Tensor, prompt_value: Tensor, valid: Tensor | None = None) -> Advantage:
    """Take off a value that was predicted for the prompt: A_i = r_i - v0_i.

    prompt_value: float [B], the reward that a model expects of the row's prompt without having seen the rollout (for
    V_0: from the policy's past successes on other prompts); NaN is no value. It needs no group, and one rollout a
    prompt is enough. Special case: prompt_value = the mean reward of the row's mates is RLOO. V_0, 2602.03584. On
    denoising steps: the same, the value belongs to the prompt.
    """
    return _against(rewards, prompt_value, "prompt_value", valid)


def remax(rewards: Tensor, greedy_reward: Tensor, valid: Tensor | None = None) -> Advantage:
    """Take off the reward of a greedy rollout of the same prompt: A_i = r_i - r_greedy.

    greedy_reward: float [B], NaN for no value. ReMax, 2310.10505; verl gives the same where the
    reward lies on the last token; otherwise its return from each token on: ``gae`` with lam 1 and the greedy reward as value.
    On denoising steps: the greedy rollout is the deterministic sampler's image of the prompt (noise scale 0, the same
    initial noise or a fixed one).
    """
    return _against(rewards, greedy_reward, "greedy_reward", valid)


def v0_budget(prompt_value: Tensor, budget: Tensor) -> Tensor:
    """Rate ``budget`` rollouts of a prompt: U(B, p) = B (1 - p) (1 - (1 - p)^(B - 1)).

    prompt_value: float in [0, 1], p, the predicted rate of success; budget: int64 >= 1, B; shapes that broadcast. The
    result, float32, is the expected number of failures in groups that also hold a success, so U(1, p) = U(B, 0) =
    U(B, 1) = 0. Reconstructed: the formula comes from a third party's notes on V_0 (2602.03584), not from the paper.
    On denoising steps: the same, where a reward can be read as success or failure.
    """
    if budget.dtype != torch.int64 or bool((budget < 1).any()):
        raise ValueError(f"budget: expected int64 >= 1, got {budget.dtype} {budget.tolist()}")
    p = prompt_value.detach().double()
    if not bool(((p >= 0) & (p <= 1)).all()):
        raise ValueError(f"prompt_value: expected rates in [0, 1], got {prompt_value.tolist()}")
    number = budget.double()
    return (number * (1 - p) * (1 - (1 - p) ** (number - 1))).float()


def pass_at_k(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    scale: Literal["none", "std"] = "none",
    ddof: int = 1,
    eps: float = 1e-6,
) -> Advantage:
    """Credit the best of each group with its lead: A_best = r_(1) - r_(2), 0 for the others.

    scale "std" divides by (deviation of the group + eps); verl does so unless told not to (ddof 1, eps 1e-6). Ties for
    the best and groups of one have no lead: exactly 0 and live False (verl refuses a group of one). The others keep
    weight 1: mask them by advantage 0 if they are not to count in an aggregation. Source: 2503.19595, verl's
    grpo_passk. On denoising steps: the same, spread over the steps.
    """
    check_policies(ddof, eps)
    if scale not in ("none", "std"):
        raise ValueError(f"scale: expected 'none' or 'std', got {scale!r}")
    value, mask = read_rewards(rewards, group, valid)
    s = group_statistics(value, group, mask, ddof, "zero")
    best = mask & (value == s.groups.max(value))
    second = Groups.of(group, mask & ~best).max(value)
    first = Groups.of(group, best)
    live = (first.count() == 1) & (s.groups.count() > 1)
    lead = torch.where(best & live, value - second, 0.0)
    return group_result(divide(lead, s.std, eps) if scale == "std" else lead, mask, live, s.mean, s.std)


def gpg(
    rewards: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    alpha: Literal["paper", "verl"] = "paper",
    f_norm: float = 1.0,
    singleton: Singleton = "zero",
    reduce: Reduce | None = None,
) -> Advantage:
    """Take the group mean off and make up for the groups without signal: A_i = alpha (r_i - mean_g) / F.

    alpha "paper": B / (B - M), with M of the B samples in groups whose rewards are all equal; "verl": B over the number
    of rewards other than 0 (of the rewards as they are, not of the centred ones), which is the paper's only for some
    batches, and not invariant to a shift. Both count over all ranks with ``reduce``; a divisor of 0 counts as 1.
    f_norm: F > 0, a constant. Special case: no dead group, "paper", F = 1 is Dr.GRPO. GPG, 2504.02546;
    verl's gpg (a group of one keeps its reward: singleton "raw"). On denoising steps: the same, spread over the steps.
    """
    check_policies(singleton=singleton)
    if alpha not in ("paper", "verl"):
        raise ValueError(f"alpha: expected 'paper' or 'verl', got {alpha!r}")
    check_number("f_norm", f_norm, 0.0, strict=True)
    value, mask = read_rewards(rewards, group, valid)
    s = group_statistics(value, group, mask, 0, singleton)
    counted = mask & (s.live if alpha == "paper" else value != 0)
    number = total(torch.stack([mask.sum(), counted.sum()]).double(), reduce)
    factor = number[0] / number[1].clamp(min=1) / f_norm
    return group_result(s.centred * factor, mask, s.live, s.mean, s.std)


_TESTS = "tests/advantage/test_baselines.py::"
_OWN_BASELINE = "the baseline does not depend on the rewards: equal rewards are signal"
_NO_SHIFT = "the baseline stays where it is while the rewards are shifted"
_NO_SCALE = "the baseline keeps its units while the rewards are scaled"

METHODS: tuple[Method, ...] = (
    Method(
        key="poise",
        kind="estimator",
        paper_id="2605.07579",
        title="POISE: baseline of a probe on the features of the other rollouts",
        tier=2,
        evidence={
            "exact": _TESTS + "test_poise_worked_numbers",
            "formula": _TESTS + "test_poise_against_a_plain_loop",
            "identity": _TESTS + "test_poise_on_rewards_as_probe_is_rloo",
        },
        call=poise,
        exempt={"constant": _OWN_BASELINE, "shift": _NO_SHIFT, "scale": _NO_SCALE},
    ),
    Method(
        key="v0",
        kind="estimator",
        paper_id="2602.03584",
        title="V_0: baseline predicted for the prompt",
        tier=2,
        evidence={
            "formula": _TESTS + "test_row_baselines_against_a_plain_loop",
            "identity": _TESTS + "test_v0_on_the_mates_mean_is_rloo",
        },
        call=v0,
        exempt={"constant": _OWN_BASELINE, "shift": _NO_SHIFT, "scale": _NO_SCALE},
    ),
    Method(
        key="v0_budget",
        kind="selection",
        paper_id="2602.03584",
        title="V_0: usefulness of a number of rollouts of a prompt (formula of a third party)",
        tier=3,
        evidence={"reconstructed": _TESTS + "test_v0_budget_counts_failures_beside_a_success"},
        call=v0_budget,
    ),
    Method(
        key="remax",
        kind="estimator",
        paper_id="2310.10505",
        title="ReMax: baseline of a greedy rollout",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "formula": _TESTS + "test_row_baselines_against_a_plain_loop",
        },
        call=remax,
        exempt={"constant": _OWN_BASELINE, "shift": _NO_SHIFT, "scale": _NO_SCALE},
    ),
    Method(
        key="pass_at_k",
        kind="estimator",
        paper_id="2503.19595",
        title="Pass@k: only the best of a group counts, by its lead",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "exact": _TESTS + "test_pass_at_k_worked_numbers",
            "formula": _TESTS + "test_pass_at_k_against_a_plain_loop",
        },
        call=pass_at_k,
        exempt={"scale": "without scale 'std' the advantage has the units of the reward"},
    ),
    Method(
        key="gpg",
        kind="estimator",
        paper_id="2504.02546",
        title="GPG: group mean, and a factor for the groups without signal",
        tier=2,
        evidence={
            "golden": "tests/advantage/test_verl_golden.py::test_estimators_agree",
            "exact": _TESTS + "test_gpg_worked_numbers",
            "formula": _TESTS + "test_gpg_against_a_plain_loop",
            "identity": _TESTS + "test_gpg_without_dead_groups_is_dr_grpo",
        },
        call=gpg,
        exempt={
            "isolation": "alpha counts the dead groups of the whole batch",
            "scale": "nothing is divided by a deviation: the advantage has the units of the reward",
        },
    ),
)
