"""Credit by stage: rewards of stages, budgets or phases, a model's confidence at cut points, and the choices it made.

Shapes: B rows, T steps, S stages, Q answers, E choices. ``segment`` (int64 [B, T]) is the stage of a step, 0 .. S - 1,
-1 outside; ``group`` (int64 [B], any spacing) and ``valid`` (bool [B], None for all) as in ``estimators``, and so are
ddof, eps and singleton. A NaN reward is no value: it leaves the statistics, counts as 0 where rewards are added up, and
what has no value at all gets advantage 0 and loss_mask False. Differences below 1e-12 of the values compared are
rounding and count as 0. Statistics are float64; results are float32 and carry no gradient. Raises ValueError, naming
the argument, for a wrong shape, dtype or range.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Literal

import torch
from torch import Tensor

from .checks import check_choice, check_number, check_share
from .estimators import grpo
from .inputs import check_flags, check_mask, read_parts, read_rewards, read_segments, read_steps
from .method import Method
from .record import Advantage
from .segments import Groups, group_any
from .statistics import Singleton, check_policies, divide, drop_rounding, group_statistics, step_result
from .steps import known_steps


def _column_mean(x: Tensor, known: Tensor, group: Tensor) -> Tensor:
    """Mean of each column over the known values of the row's group, 0 where there is none: float64 [B, S]."""
    groups = Groups.of(group)
    total = torch.zeros(groups.number, x.shape[1], dtype=x.dtype, device=x.device)
    count = torch.zeros_like(total).index_add_(0, groups.index, known.double())
    total = total.index_add_(0, groups.index, torch.where(known, x, 0.0))
    return (total / count.clamp(min=1))[groups.index]


def _stage_matrix(given: Tensor | None, decay: float, stages: int, like: Tensor) -> Tensor:
    if given is None:
        gap = torch.arange(stages, device=like.device) - torch.arange(stages, device=like.device)[:, None]
        return torch.where(gap >= 0, decay ** gap.clamp(min=0).to(like.dtype), 0.0)
    if given.shape != (stages, stages) or not bool(given.isfinite().all()) or bool(given.tril(-1).any()):
        raise ValueError(
            f"stage_matrix: expected finite [{stages}, {stages}], zero below the diagonal, got {given.dtype} "
            f"{list(given.shape)}"
        )
    return given.detach().to(like)


def rubricem(
    stage_reward: Tensor,
    group: Tensor,
    segment: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    stage_matrix: Tensor | None = None,
    *,
    decay: float = 0.5,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
) -> Advantage:
    """Credit a stage with its own reward and, weighted, those of later stages, standardised per stage in the group.

    G_j = sum_{k >= j} Lambda_jk r_k; A_j = (G_j - mean_g) / (std_g + eps), given to every step of stage j.

    stage_reward: [B, S], NaN where a stage has none; segment: int64 [B, T]; mask: bool [B, T]; stage_matrix: Lambda,
    [S, S], zero below the diagonal; without it Lambda_jk = decay^(k - j), decay in [0, 1]. The paper has a unit
    diagonal; its weights off the diagonal are not published, so the default decay is ours (reconstructed).
    Identities: decay 0 is ``grpo`` on each stage; decay 1 is ``grpo`` on the return-to-go; a matrix of ones in the last
    column alone is ``grpo`` on the last reward, at every step. No code to disagree with. Source: RubricEM, 2605.10899.
    On denoising steps: stages are blocks of steps, rewards (layout, content, detail) judged on predicted clean images.
    """
    check_policies(ddof, eps, singleton)
    check_share("decay", decay)
    value, known = read_parts("stage_reward", stage_reward, "B, S", group, valid)
    rows, stages = value.shape
    check_mask(mask, rows)
    segment = read_segments(segment, mask, stages, ordered=False)
    matrix = _stage_matrix(stage_matrix, decay, stages, value)
    total = value @ matrix.T
    known = known.double() @ (matrix != 0).double().T > 0
    pair = Groups.of(group).index[:, None] * stages + torch.arange(stages, device=group.device)
    s = group_statistics(total.flatten(), pair.flatten(), known.flatten(), ddof, singleton)
    centred = drop_rounding(s.centred, s.groups.max(s.value.abs()))
    advantage = divide(centred, s.scale, eps).view(rows, stages)
    steps, kept, _ = known_steps(torch.where(known, advantage, torch.nan), segment)
    return step_result(steps, kept, group_any(centred.view(rows, stages).any(dim=1), group))


Budgets = Literal["uniform", "linear", "base"]
Baseline = Literal["mixed", "history", "group", "none"]


def _budget_probability(given: Tensor | None, budgets: str, number: int, like: Tensor) -> Tensor:
    """Return the probability of each budget: float64 [S]."""
    if given is None:
        place = torch.arange(1, number + 1, dtype=like.dtype, device=like.device)
        chance = {"uniform": torch.ones_like(place), "linear": place, "base": (place == number).to(like.dtype)}[budgets]
        return chance / chance.sum()
    if given.shape != (number,) or not bool((given >= 0).all()) or not 0 < float(given.sum()) < math.inf:
        raise ValueError(f"budget_probability: expected [{number}] numbers >= 0, not all 0, got {given}")
    return given.detach().to(like)


def _from_here(x: Tensor) -> Tensor:
    """Sum over the own and all later columns."""
    return x.flip(1).cumsum(dim=1).flip(1)


def _thinking(score: Tensor, known: Tensor, chance: Tensor, group: Tensor, baseline: str) -> tuple[Tensor, Tensor]:
    """BRPO's advantage of each thinking segment, float64 [B, S], and where it has one."""
    number = score.shape[1]
    place = torch.arange(number, dtype=score.dtype, device=score.device)
    reward = _from_here(chance * score)
    has = _from_here((known & (chance > 0)).double()) > 0
    ahead = _from_here(chance[None])
    weight = torch.where(known, 2.0 ** (place - number), 0.0)  # halves with every step back, over what is known
    seen = weight.cumsum(dim=1) - weight
    past = divide((weight * score).cumsum(dim=1) - weight * score, seen, 0.0) * ahead
    mates = _column_mean(reward, has, group)
    share = {"mixed": place / number, "history": torch.ones_like(place), "group": torch.zeros_like(place)}
    if baseline == "none":
        return reward, has
    on_past = torch.where(seen > 0, share[baseline], 1.0 if baseline == "history" else 0.0)
    gain = reward - (on_past * past + (1 - on_past) * mates)
    scale = torch.maximum(reward.abs(), torch.maximum(past.abs(), mates.abs()))
    return drop_rounding(gain, scale), has


def brpo(
    answer_reward: Tensor,
    group: Tensor,
    segment: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    budget_probability: Tensor | None = None,
    *,
    budgets: Budgets = "uniform",
    baseline: Baseline = "mixed",
) -> Advantage:
    """Credit each thinking segment with the rewards at later budgets, against earlier ones and the group's.

    s_j = mean of Q answers at budget j; R_s = sum_{j >= s} p_j s_j; v2_s = group mean of R_s;
    v1_s = (sum_{j < s} 2^j s_j / sum_{j < s} 2^j) sum_{j >= s} p_j; A_s = R_s - (s v1_s + (S - s) v2_s) / S.

    answer_reward: [B, S, Q], NaN for none (a row that ended early repeats its last answers); segment: int64 [B, T], the
    thinking between budgets; mask: bool [B, T]; budget_probability: p, [S], else by ``budgets``: "uniform", "linear" (in
    proportion to 1 .. S), "base" (the last budget alone). baseline: "mixed" as above, "history" v1 alone (0 where there
    is none), "group" v2 alone, "none". Where no earlier budget has a value, "mixed" is v2 alone.

    channels: "thinking" [B, T], the advantage; "summary" [B, S, Q], of the answers: their reward minus the mean over the
    Q answers from the same prefix, over the group's at that budget with Q = 1.
    Identity: S = 1 is reward minus group mean. live: the group has an advantage that is not 0.
    Source: BRPO, 2505.13438; sail-sg/AnytimeReasoner.
    On denoising steps: budgets are step counts, answers the scores of predicted clean images there: one rollout trains
    a sampler for any number of steps. Without a policy for the answers, "summary" has no use.
    """
    check_choice("budgets", budgets, ("uniform", "linear", "base"))
    check_choice("baseline", baseline, ("mixed", "history", "group", "none"))
    value, known = read_parts("answer_reward", answer_reward, "B, S, Q", group, valid)
    check_mask(mask, len(value))
    segment = read_segments(segment, mask, value.shape[1], ordered=False)
    chance = _budget_probability(budget_probability, budgets, value.shape[1], value)
    score = value.sum(dim=2) / known.sum(dim=2).clamp(min=1)
    advantage, has = _thinking(score, known.any(dim=2), chance, group, baseline)
    mean = _column_mean(score, known.any(dim=2), group) if value.shape[2] == 1 else score
    summary = torch.where(known, value - mean[..., None], 0.0)
    summary = drop_rounding(summary, torch.maximum(value.abs(), mean.abs()[..., None]))
    live = group_any((has & (advantage != 0)).any(dim=1), group)
    steps, kept, _ = known_steps(torch.where(has, advantage, torch.nan), segment)
    out = step_result(steps, kept, live)
    return replace(out, channels={"thinking": out.advantage, "summary": summary.float()})


def vps_cuts(entropy: Tensor, mask: Tensor, *, quantile: float = 0.8, points: int = 4) -> Tensor:
    """Cut rows into segments with equal numbers of uncertain steps: int64 [B, T], -1 on masked steps.

    U = unmasked steps of a row with entropy at least its ``quantile`` (the order statistic at or above it); with u of
    them, max(1, u // points) segments take the same number of U each, up to one, and each but the first starts at its
    first one. entropy: [B, T]; quantile: [0, 1]; points: the paper has about 4. The percentile, and that it is taken by
    row, are ours (reconstructed). Source: GRPO-VPS, 2604.20659.
    On denoising steps: entropy is set by the schedule, so fixed blocks serve; or pass the group's spread of predictions.
    """
    check_mask(mask)
    if not 0 <= quantile <= 1 or points < 1:
        raise ValueError(f"quantile, points: expected a number in [0, 1] and one >= 1, got {quantile} and {points}")
    value = read_steps("entropy", entropy, mask)
    place = (quantile * (mask.sum(dim=1) - 1).clamp(min=0).double()).ceil().long()
    threshold = torch.where(mask, value, math.inf).sort(dim=1).values.gather(1, place[:, None])
    uncertain = mask & (value >= threshold)
    count = uncertain.sum(dim=1, keepdim=True)
    rank = (uncertain.long().cumsum(dim=1) - 1).clamp(min=0)
    return torch.where(mask, rank * (count // points).clamp(min=1) // count.clamp(min=1), -1)


def grpo_vps(
    rewards: Tensor,
    group: Tensor,
    confidence: Tensor,
    segment: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    alpha: float = 1.2,
    singleton: Singleton = "zero",
) -> Advantage:
    """Add to the group-centred reward the rise of the model's confidence in the right answer over each segment.

    A_t = (r - mean_g) + alpha (C_k - C_{k - 1}), k the segment of step t; nothing divides.

    rewards: [B]; confidence: [B, S + 1], column k the probability of the reference answer before segment k, column k + 1
    after it, NaN for not probed (its segments get the first term alone); segment: int64 [B, T], 0 .. S - 1 or -1, for
    instance of ``vps_cuts``; mask: bool [B, T]. live: rewards differ in the group or a confidence changes.
    Identities: alpha 0 or constant confidence is ``dr_grpo``; the added terms telescope to alpha (C_S - C_0). No code to
    disagree with. Source: GRPO-VPS, 2604.20659.
    On denoising steps: C is a reward of the predicted clean image at block borders (any real number).
    """
    check_policies(singleton=singleton)
    check_number("alpha", alpha)
    value, known = read_rewards(rewards, group, valid)
    check_mask(mask, len(value))
    if confidence.ndim != 2 or len(confidence) != len(value) or confidence.shape[1] < 2:
        raise ValueError(f"confidence: expected [{len(value)}, S + 1] with S >= 1, got {list(confidence.shape)}")
    segment = read_segments(segment, mask, confidence.shape[1] - 1, ordered=False)
    if bool((known[:, None] & confidence.isinf()).any()):
        raise ValueError("confidence: infinite values among the valid rows")
    s = group_statistics(value, group, known, 0, singleton)
    rise = alpha * confidence.detach().double().diff(dim=1).nan_to_num(nan=0.0)
    steps, kept, moved = known_steps(torch.where(known[:, None], rise, torch.nan), segment)
    steps = steps.add_(s.centred.float()[:, None])
    return step_result(steps, kept, s.live | group_any(moved, group), statistics=s)


def full_rollout(
    rewards: Tensor,
    group: Tensor,
    mask: Tensor,
    phase_mask: Tensor | None = None,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-4,
    singleton: Singleton = "zero",
) -> Advantage:
    """Give the reward of the final, edited result to every transition of a rollout: decisions, drafts and edits.

    A_bt = (r_b - mean_g) / (std_g + eps) on the steps of mask & phase_mask.

    rewards: [B]; mask: bool [B, T], the steps revealed or edited at each transition, all phases in a row; phase_mask:
    bool [B, T], the phases that are trained (drafts alone, edits alone), all by default. Identities: without phase_mask
    it is ``grpo`` spread over steps; phases that partition the steps add up to it.
    Source: ReflectDrive-2, 2605.04647; reconstructed: the abstract gives the idea, not the tensor form.
    On denoising steps: native; phases are the stretches of a sampler that drafts and then refines.
    """
    check_mask(mask)
    if phase_mask is not None:
        check_flags("phase_mask", phase_mask, tuple(mask.shape))
        mask = mask & phase_mask
    return grpo(rewards, group, valid, ddof=ddof, eps=eps, singleton=singleton).over_steps(mask)


def graph_grpo(
    rewards: Tensor,
    group: Tensor,
    choice: Tensor,
    valid: Tensor | None = None,
    *,
    ddof: int = 0,
    eps: float = 1e-6,
) -> Advantage:
    """Credit a choice with the mean reward of the rows that made it, standardised over the choices of the group.

    S_e = mean of r over rows with e; A_e = (S_e - mean_e S) / (std_e S + eps), over choices that a row of the group made;
    A_be = A_e where row b made choice e.

    rewards: [B]; group: int64 [B], rows of one task; choice: bool [B, E], edges of the row's graph. The result is
    [B, E], loss_mask where the choice was made. Rows that agree on S for every choice carry no signal. ddof: 0 in the
    code read. group_mean, group_std: of the rewards. Another Graph-GRPO trains generators of graphs: not this.
    Source: Graph-GRPO, 2603.02701 (edge advantage), as in a third party's code of its equations 4 and 5.
    On denoising steps: a choice is a step and an option taken there (SDE or ODE, branch, guidance level).
    """
    check_policies(ddof, eps)
    value, known = read_rewards(rewards, group, valid)
    if choice.ndim != 2 or choice.numel() == 0:
        raise ValueError(f"choice: expected bool [{len(value)}, E] with E >= 1, got {list(choice.shape)}")
    check_flags("choice", choice, (len(value), choice.shape[1]))
    s = group_statistics(value, group, known, ddof, "zero")
    made = choice & known[:, None]
    count = torch.zeros(s.groups.number, choice.shape[1], dtype=value.dtype, device=value.device)
    total = torch.zeros_like(count).index_add_(0, s.groups.index, torch.where(made, value[:, None], 0.0))
    count.index_add_(0, s.groups.index, made.double())
    success, present = total / count.clamp(min=1), count > 0
    number = present.sum(dim=1, keepdim=True)
    mean = success.sum(dim=1, keepdim=True) / number.clamp(min=1)
    scale = success.abs().amax(dim=1, keepdim=True)
    gain = drop_rounding(torch.where(present, success - mean, 0.0), scale)
    std = (gain.square().sum(dim=1, keepdim=True) / (number - ddof).clamp(min=1)).sqrt()
    advantage = divide(gain, std, eps)[s.groups.index]
    live = gain.any(dim=1)[s.groups.index]
    return step_result(advantage, made, live, statistics=s)


_TESTS = "tests/advantage/test_stages.py::"

_NO_STD = "in the units of the reward: no deviation divides"

METHODS: tuple[Method, ...] = (
    Method(
        key="rubricem",
        kind="estimator",
        paper_id="2605.10899",
        title="RubricEM: a stage earns its own and weighted later rewards, standardised per stage",
        tier=2,
        evidence={
            "exact": _TESTS + "test_rubricem_worked_numbers",
            "formula": _TESTS + "test_rubricem_against_a_loop",
            "identity": _TESTS + "test_rubricem_special_matrices_are_grpo",
        },
        call=rubricem,
    ),
    Method(
        key="brpo",
        kind="estimator",
        paper_id="2505.13438",
        title="BRPO: a thinking segment earns the rewards at later budgets",
        tier=2,
        evidence={
            "exact": _TESTS + "test_brpo_worked_numbers",
            "formula": _TESTS + "test_brpo_against_a_loop",
            "identity": _TESTS + "test_brpo_with_one_budget_is_dr_grpo",
        },
        call=brpo,
        exempt={
            "scale": _NO_STD,
            "constant": "rows that agree are still credited for a reward that changes from budget to budget",
        },
    ),
    Method(
        key="grpo_vps",
        kind="estimator",
        paper_id="2604.20659",
        title="GRPO-VPS: group-centred reward plus the rise of confidence over each segment",
        tier=2,
        evidence={
            "exact": _TESTS + "test_grpo_vps_worked_numbers",
            "formula": _TESTS + "test_grpo_vps_against_a_loop",
            "identity": _TESTS + "test_grpo_vps_telescopes_and_reduces_to_dr_grpo",
        },
        call=grpo_vps,
        exempt={"scale": _NO_STD, "constant": "confidence earns credit where rewards agree"},
    ),
    Method(
        key="full_rollout",
        kind="estimator",
        paper_id="2605.04647",
        title="Full-rollout credit: the edited result's reward for decisions, drafts and edits alike",
        tier=3,
        evidence={"reconstructed": _TESTS + "test_full_rollout_is_grpo_on_the_steps_of_its_phases"},
        call=full_rollout,
    ),
    Method(
        key="graph_grpo",
        kind="estimator",
        paper_id="2603.02701",
        title="Graph-GRPO: a choice earns the mean reward of the rows that made it",
        tier=2,
        evidence={
            "exact": _TESTS + "test_graph_grpo_worked_numbers",
            "formula": _TESTS + "test_graph_grpo_against_a_loop",
        },
        call=graph_grpo,
    ),
)
