"""Baselines that remember: a value tracker for each prompt, and the cumulative statistics of its visits.

A prompt owns a place in the state, ``slot``: int64 [B] in 0 ... P - 1, P prompts. NaN rewards, ``valid``, ddof, eps and
errors: as in ``estimators``. States are float64 and never change in place: estimate first, then update, so that no
reward enters its own baseline before it is used. Ranks of a data-parallel run draw different prompts, so each updates
its own rows; exchange states, or rewards, to keep one state on all.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .checks import check_number
from .inputs import check_ids, check_mask, read_rewards, read_rows, read_steps
from .method import Method
from .moments import Reduce, batch_moments
from .normalisation import check_range, per_group
from .record import Advantage
from .segments import Groups
from .state import State
from .statistics import check_policies, divide, group_result

_LEAST_SPREAD = 1e-12  # of a standard deviation, relative to 1 + |mean|; below it there is rounding noise


def check_slots(slot: Tensor, places: int) -> None:
    """Raise ValueError unless ``slot`` is int64 [B], B >= 1, in 0 ... ``places`` - 1."""
    if slot.dtype != torch.int64 or slot.ndim != 1 or len(slot) == 0:
        raise ValueError(f"slot: expected int64 [B] with B >= 1, got {slot.dtype} {list(slot.shape)}")
    if bool(((slot < 0) | (slot >= places)).any()):
        raise ValueError(
            f"slot: expected 0 ... {places - 1}, places of the state, got {int(slot.min())} ... {int(slot.max())}"
        )


def add_by_slot(places: int, slot: Tensor, x: Tensor) -> Tensor:
    """Sum ``x`` (float64 [B]) by slot: float64 [places]."""
    return torch.zeros(places, dtype=torch.float64, device=slot.device).index_add_(0, slot, x)


def read_unit_rewards(rewards: Tensor, slot: Tensor, valid: Tensor | None, places: int) -> tuple[Tensor, Tensor]:
    """Check slots, and rewards in [0, 1]; return rewards [B] as float64 and the bool mask of those that count."""
    check_slots(slot, places)
    value, mask = read_rewards(rewards, slot, valid)
    check_range(value, mask)
    return value, mask


def check_counts(alpha: Tensor, beta: Tensor) -> None:
    """Raise ValueError unless ``alpha`` and ``beta`` are floating [P], P >= 1, positive and finite."""
    for name, x in (("alpha", alpha), ("beta", beta)):
        if x.ndim != 1 or x.shape != alpha.shape or len(x) == 0 or not x.is_floating_point():
            raise ValueError(f"{name}: expected floating [P], alike for both, got {x.dtype} {list(x.shape)}")
        if not bool((x.isfinite() & (x > 0)).all()):
            raise ValueError(f"{name}: expected finite counts > 0, got {x.min().item():g} ... {x.max().item():g}")


@dataclass(frozen=True)
class SPOState(State):
    """Beta counts of successes and failures of each prompt: alpha, beta, floating [P], > 0."""

    alpha: Tensor
    beta: Tensor

    def __post_init__(self) -> None:
        check_counts(self.alpha, self.beta)

    @property
    def value(self) -> Tensor:
        """float64 [P]: expected reward, alpha / (alpha + beta)."""
        return self.alpha.double() / (self.alpha.double() + self.beta.double())


def spo_init(total: Tensor, number: Tensor, *, rho_min: float = 0.875) -> SPOState:
    """Start the trackers from offline rollouts: alpha = N0 (s + 1/2) / (n + 1), beta = N0 (n - s + 1/2) / (n + 1).

    N0 = 1 / (1 - rho_min) is the greatest memory, 8 by default. total: real [P], summed rewards s in [0, 1] each;
    number: real [P], their number n (the paper takes 8); n = 0 starts from (1/2, 1/2). SPO, 2509.13232.
    On denoising steps: the same. Raises ValueError for another shape, or s outside [0, n].
    """
    check_number("rho_min", rho_min, 0.0)
    if rho_min >= 1:
        raise ValueError(f"rho_min: expected less than 1, got {rho_min}")
    everywhere = torch.ones(total.shape, dtype=torch.bool, device=total.device)
    s, n = read_rows("total", total, everywhere, 0.0), read_rows("number", number, everywhere, 0.0)
    if bool((s > n).any()):
        raise ValueError("total: expected sums of rewards in [0, 1], got one above its number of rollouts")
    scale = torch.where(n > 0, 1 / (1 - rho_min) / (n + 1), 1.0)
    return SPOState(alpha=scale * (s + 0.5), beta=scale * (n - s + 0.5))


def spo_single_stream(
    rewards: Tensor,
    slot: Tensor,
    state: SPOState,
    valid: Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float = 1e-8,
    reduce: Reduce | None = None,
) -> Advantage:
    """Compare each reward with its prompt's tracker, and standardise over the batch, without groups.

    A0 = r - alpha / (alpha + beta), with the counts from before this batch; A = (A0 - mean_B) / (std_B + eps).

    SPO (single stream), 2509.13232 (not SPO-chain or SPO-tree). rewards: [B] in [0, 1]; slot: int64 [B]. ddof 1 and
    eps 1e-8 are the public code's; the batch counts samples, over all ranks with ``reduce``. A batch whose A0 are all
    equal is 0 and not live. channels: "baseline" [B]. group_mean and group_std are None.
    On denoising steps: the same; squash scores to [0, 1]. It serves where one sample a prompt is all one can afford.
    """
    check_policies(ddof, eps)
    value, mask = read_unit_rewards(rewards, slot, valid, len(state.alpha))
    baseline = state.value[slot]
    raw = torch.where(mask, value - baseline, 0.0)
    centre, spread = batch_moments(raw, mask, ddof, reduce)
    live = torch.full_like(mask, bool(spread > _LEAST_SPREAD))
    return Advantage(
        advantage=torch.where(mask & live, divide(raw - centre, spread, eps), 0.0).float(),
        weight=mask.float(),
        loss_mask=mask,
        live=live,
        channels={"baseline": baseline.float()},
    )


def spo_shift(log_prob: Tensor, old_log_prob: Tensor, mask: Tensor) -> Tensor:
    """Measure how far the policy moved on each row: D = mean_t |log_prob - old_log_prob|, float64 [B].

    Both floating [B, T] of the prompt's previous response, now and when it was drawn; mask: bool [B, T]. A row without
    a step gives NaN, which ``spo_update`` reads as no earlier visit. SPO, 2509.13232.
    On denoising steps: D = mean_k |dmu_k|^2 / (2 sigma_k^2), the exact KL of each step, serves as well.
    """
    check_mask(mask)
    now, then = (
        read_steps(n, x, mask, torch.float64) for n, x in (("log_prob", log_prob), ("old_log_prob", old_log_prob))
    )
    return (now - then).abs().sum(1) / mask.sum(1)


def spo_update(
    state: SPOState,
    slot: Tensor,
    rewards: Tensor,
    shift: Tensor,
    valid: Tensor | None = None,
    *,
    half: float = 0.06,
    rho_min: float = 0.875,
    rho_max: float = 0.96,
) -> SPOState:
    """Forget by how far the policy moved, then count the reward: alpha <- rho alpha + r, beta <- rho beta + 1 - r.

    rho = clamp(2^(-D / half), rho_min, rho_max), D = ``shift``: floating [B] >= 0 (see ``spo_shift``), NaN on a first
    visit (D = 0). rewards: [B] in [0, 1]; NaN or invalid rows change nothing. A slot may come once among the rows that
    count. rho_min = rho_max = 1 is exact Beta-Bernoulli counting; at a fixed rho, alpha + beta tends to 1 / (1 - rho).
    SPO, 2509.13232. On denoising steps: the same. Raises ValueError as the module says, and for a repeated slot.
    """
    check_number("half", half, 0.0, strict=True)
    if not 0 < rho_min <= rho_max <= 1:
        raise ValueError(f"rho_min, rho_max: expected 0 < rho_min <= rho_max <= 1, got {rho_min}, {rho_max}")
    value, mask = read_unit_rewards(rewards, slot, valid, len(state.alpha))
    moved = read_rows("shift", shift, mask & ~shift.isnan() if shift.shape == mask.shape else mask, 0.0)
    at, reward = slot[mask], value[mask]
    if len(torch.unique(at)) < len(at):
        raise ValueError("slot: expected each prompt once a batch, got one twice among the rows that count")
    rho = torch.exp2(-moved[mask] / half).clamp(rho_min, rho_max)
    alpha, beta = state.alpha.double().clone(), state.beta.double().clone()
    alpha[at], beta[at] = rho * alpha[at] + reward, rho * beta[at] + 1 - reward
    return SPOState(alpha=alpha, beta=beta)


def spo_sampling_weight(state: SPOState, *, floor: float = 0.05) -> Tensor:
    """Weigh prompts for the next draw: sqrt(p (1 - p)) + floor, float32 [P], p the tracker's value.

    floor >= 0 keeps every prompt in play. SPO, 2509.13232. On denoising steps: the same.
    """
    check_number("floor", floor, 0.0)
    p = state.value
    return ((p * (1 - p)).sqrt() + floor).float()


@dataclass(frozen=True)
class SASState(State):
    """What each prompt's visits left: visits int64 [P], and float64 [P] count, mean and m2 = sum (r - mean)^2."""

    visits: Tensor
    count: Tensor
    mean: Tensor
    m2: Tensor

    def __post_init__(self) -> None:
        check_ids("visits", self.visits, (len(self.visits),))
        for name, x in (("count", self.count), ("mean", self.mean), ("m2", self.m2)):
            if x.dtype != torch.float64 or x.shape != self.visits.shape:
                raise ValueError(f"{name}: expected float64 {list(self.visits.shape)}, got {x.dtype} {list(x.shape)}")


def sas_init(places: int) -> SASState:
    """Start with no visit of any of ``places`` prompts, on the default device."""
    check_number("places", places, 1.0)
    count, mean, m2 = torch.zeros(3, places, dtype=torch.float64).unbind()
    return SASState(visits=torch.zeros(places, dtype=torch.int64), count=count, mean=mean, m2=m2)


def _merge(state: SASState, value: Tensor, slot: Tensor, groups: Groups) -> SASState:
    """Merge this visit into the state by Chan's formula."""
    size = groups.size
    at = torch.zeros(groups.number, dtype=torch.int64, device=slot.device).scatter_(0, groups.index, slot)
    here = per_group(groups, groups.mean(value)).nan_to_num(nan=0.0)
    spread = per_group(groups, groups.std(value).square()).nan_to_num(nan=0.0) * size
    n, mean = state.count[at], state.mean[at]
    both = (n + size).clamp(min=1)
    apart = here - mean
    changes = {
        "visits": state.visits[at] + (size > 0),
        "count": n + size,
        "mean": mean + apart * size / both,
        "m2": state.m2[at] + spread + apart.square() * n * size / both,
    }
    return SASState(**{name: vars(state)[name].index_copy(0, at, x) for name, x in changes.items()})


def sas_update(state: SASState, slot: Tensor, rewards: Tensor, valid: Tensor | None = None) -> SASState:
    """Count this visit: the rows of a slot are one visit of its prompt, merged with the earlier ones.

    m' = m + (m_g - m) G / (n + G); M2' = M2 + M2_g + (m_g - m)^2 n G / (n + G), for n earlier and G present rewards:
    the statistics of all rewards ever seen. A slot without a reward that counts keeps what it had. DCPO, 2509.02333.
    On denoising steps: the same. Raises ValueError as the module says.
    """
    check_slots(slot, len(state.visits))
    value, mask = read_rewards(rewards, slot, valid)
    return _merge(state, value, slot, Groups.of(slot, mask))


def dcpo_smoothed(
    rewards: Tensor,
    slot: Tensor,
    state: SASState,
    valid: Tensor | None = None,
    *,
    ddof: int = 1,
    eps: float = 0.0,
) -> Advantage:
    """Smooth the standardised reward between this visit of a prompt and all its visits.

    A_new = (r - mean) / (std + eps) of this visit, A_tot the same with the statistics of all visits, this one included;
    S1 = ((i - 1) A_new + A_tot) / i, S2 = (A_new + (i - 1) A_tot) / i at visit i; A is the one nearer to 0, S1 on a tie.

    DCPO (dynamic clipping), 2509.02333, smoothed advantage standardisation; not the DCPO of 2601.12730. The rows of
    one slot are this visit's group. state: from before this visit; call ``sas_update`` afterwards. ddof 1 and eps 0
    are the public code's. A deviation of 0 gives 0 for its part, so a group of equal rewards with a mixed history
    still has a signal, and one with an equal history has none. A first visit is ``grpo`` (ddof 1) without eps.
    channels: "new", "total" [B]; group_mean and group_std are of this visit.
    On denoising steps: the same, for prompts that recur.
    """
    check_policies(ddof, eps)
    check_slots(slot, len(state.visits))
    value, mask = read_rewards(rewards, slot, valid)
    groups = Groups.of(slot, mask)
    merged = _merge(state, value, slot, groups)
    mean, std = groups.mean(value), groups.std(value, ddof)
    mixed = groups.max(value) > groups.min(value)
    new = torch.where(mask & mixed, divide(value - mean, std, eps), 0.0)
    mean_all = merged.mean[slot]
    std_all = (merged.m2[slot] / (merged.count[slot] - ddof).clamp(min=1)).sqrt()
    spread = std_all > _LEAST_SPREAD * (1 + mean_all.abs())
    whole = torch.where(mask & spread, divide(value - mean_all, std_all, eps), 0.0)
    visit = merged.visits[slot].clamp(min=1)
    first, second = ((visit - 1) * new + whole) / visit, (new + (visit - 1) * whole) / visit
    smooth = torch.where(first.abs() <= second.abs(), first, second)
    out = group_result(smooth, mask, (mixed | spread) & (groups.count() > 0), mean, std)
    return replace(out, channels={"new": new.float(), "total": whole.float()})


_TESTS = "tests/advantage/test_streams.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="spo_single_stream",
        kind="estimator",
        paper_id="2509.13232",
        title="SPO, single stream: a Beta tracker a prompt instead of a group",
        tier=2,
        evidence={
            "exact": _TESTS + "test_spo_worked_numbers",
            "formula": _TESTS + "test_spo_against_a_plain_loop",
            "identity": _TESTS + "test_spo_without_forgetting_is_beta_bernoulli",
        },
        call=spo_single_stream,
        exempt={
            "isolation": "there are no groups; the batch is standardised as a whole",
            **dict.fromkeys(("shift", "scale"), "rewards are bound to [0, 1], and so is the tracker"),
            "constant": "equal rewards differ from different baselines",
        },
    ),
    Method(
        key="dcpo_smoothed",
        kind="estimator",
        paper_id="2509.02333",
        title="DCPO (dynamic clipping): smoothed advantage over the visits of a prompt",
        tier=2,
        evidence={
            "exact": _TESTS + "test_sas_worked_numbers",
            "formula": _TESTS + "test_sas_against_a_plain_loop",
            "identity": _TESTS + "test_sas_first_visit_is_grpo",
        },
        call=dcpo_smoothed,
        exempt={
            **dict.fromkeys(("shift", "scale"), "the remembered statistics are in the units of the rewards"),
            "constant": "equal rewards after a mixed history have a signal: the method's point",
        },
    ),
)
