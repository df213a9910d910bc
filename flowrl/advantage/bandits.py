"""Which prompts to draw next: bandits over prompts and over categories.

P prompts; a prompt owns a place in a state, ``slot``: int64 [B] in 0 ... P - 1. States are float64 and never change in
place. NaN rewards and ``valid``: as in ``estimators``. Random choices take a torch.Generator on the state's device.
Every rank of a data-parallel run must keep the same state: gather rewards over ranks before an update, or give a
``reduce`` where one is taken.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_number, check_share
from .inputs import check_flags, read_rows
from .method import Method
from .moments import Reduce, total
from .state import State
from .statistics import divide
from .streams import add_by_slot, check_counts, read_unit_rewards


@dataclass(frozen=True)
class BetaState(State):
    """Beta belief about each prompt's success rate: alpha, beta, floating [P], > 0; ones know nothing."""

    alpha: Tensor
    beta: Tensor

    def __post_init__(self) -> None:
        check_counts(self.alpha, self.beta)


def thompson_scores(state: BetaState, *, generator: torch.Generator) -> Tensor:
    """Draw a success rate for each prompt and score its variance: theta (1 - theta), float32 [P] in [0, 1/4].

    theta ~ Beta(alpha, beta), by two Gamma draws. VADE, 2511.18902. On denoising steps: the same.
    """
    wins = torch._standard_gamma(state.alpha.double(), generator=generator)
    losses = torch._standard_gamma(state.beta.double(), generator=generator)
    return divide(wins * losses, (wins + losses).square(), 0.0).float()


def posterior_score(state: BetaState) -> Tensor:
    """Expect ``thompson_scores``: alpha beta / ((alpha + beta) (alpha + beta + 1)), float32 [P]; without noise."""
    a, b = state.alpha.double(), state.beta.double()
    return (a * b / ((a + b) * (a + b + 1))).float()


def vade(state: BetaState, *, number: int, generator: torch.Generator) -> Tensor:
    """Choose the ``number`` prompts of greatest drawn variance: int64 [number] slots, best first, all different.

    VADE, 2511.18902; reconstructed from the abstract: ``thompson_scores`` ranks, ``decay_update`` learns.
    On denoising steps: the same, a success is a reward above a threshold, or a score in [0, 1].
    Raises ValueError unless 1 <= number <= P.
    """
    places = len(state.alpha)
    if not 1 <= number <= places:
        raise ValueError(f"number: expected 1 ... {places}, got {number}")
    return thompson_scores(state, generator=generator).topk(number).indices


def decay_update(
    state: BetaState,
    slot: Tensor,
    rewards: Tensor,
    valid: Tensor | None = None,
    *,
    visited: float = 0.9,
    unvisited: float = 0.99,
    prior: float = 1.0,
) -> BetaState:
    """Fade old evidence towards the prior and add the new: alpha <- prior + d (alpha - prior) + successes; beta alike.

    d is ``visited`` for prompts with a reward that counts and ``unvisited`` for the others, in (0, 1]; 1 and 1 is exact
    Bayes. prior > 0: where a forgotten prompt ends (fading to 0 would make it certain, not unknown). rewards: [B] in
    [0, 1], a share of a success each. VADE, 2511.18902; reconstructed: the abstract has two scales of decay, their
    values and the place they fade to are ours. On denoising steps: the same. Raises ValueError as the module says.
    """
    check_share("visited", visited, strict=True)
    check_share("unvisited", unvisited, strict=True)
    check_number("prior", prior, 0.0, strict=True)
    places = len(state.alpha)
    value, mask = read_unit_rewards(rewards, slot, valid, places)
    counted = add_by_slot(places, slot, mask.double())
    wins = add_by_slot(places, slot, torch.where(mask, value, 0.0))
    decay = torch.where(counted > 0, visited, unvisited)
    return BetaState(
        alpha=prior + decay * (state.alpha.double() - prior) + wins,
        beta=prior + decay * (state.beta.double() - prior) + counted - wins,
    )


def vps(pass_rate: Tensor, diversity: Tensor, *, outcome_weight: float = 0.8, diversity_weight: float = 0.2) -> Tensor:
    """Score how much a prompt's rewards can vary: outcome_weight p (1 - p) + diversity_weight d, float32 [P].

    pass_rate: floating [P] in [0, 1], p; diversity: floating [P] >= 0, d, how far its answers differ (for text one
    minus the overlap of pairs). MMR1, 2509.21268. On denoising steps: d is the mean distance between embeddings of a
    prompt's images. Raises ValueError for another shape or range, or a negative weight.
    """
    check_number("outcome_weight", outcome_weight, 0.0)
    check_number("diversity_weight", diversity_weight, 0.0)
    if pass_rate.ndim != 1 or len(pass_rate) == 0:
        raise ValueError(f"pass_rate: expected floating [P] with P >= 1, got {list(pass_rate.shape)}")
    everywhere = torch.ones_like(pass_rate, dtype=torch.bool)
    p = read_rows("pass_rate", pass_rate, everywhere, 0.0)
    if bool((p > 1).any()):
        raise ValueError(f"pass_rate: expected values in [0, 1], got {p.max().item():g}")
    spread = read_rows("diversity", diversity, everywhere, 0.0)
    return (outcome_weight * p * (1 - p) + diversity_weight * spread).float()


def mixed_batch(scores: Tensor, *, number: int, fraction: float = 0.5, generator: torch.Generator) -> Tensor:
    """Draw floor(fraction number) prompts by score and the others uniformly: int64 [number], the scored ones first.

    Both with replacement. scores: floating [P] >= 0; where all are 0, all draws are uniform. fraction 0 is uniform, 1
    all by score. MMR1, 2509.21268. On denoising steps: the same. Raises ValueError for another shape or range.
    """
    check_share("fraction", fraction)
    if number < 1:
        raise ValueError(f"number: expected at least 1, got {number}")
    if scores.ndim != 1 or len(scores) == 0:
        raise ValueError(f"scores: expected floating [P] with P >= 1, got {list(scores.shape)}")
    mass = read_rows("scores", scores, torch.ones_like(scores, dtype=torch.bool), 0.0)
    uniform = torch.ones_like(mass)
    scored = math.floor(fraction * number + 1e-9)  # .29 of 100 is 29, not 28.999...
    parts = [(mass if bool((mass > 0).any()) else uniform, scored), (uniform, number - scored)]
    drawn = [torch.multinomial(w, n, replacement=True, generator=generator) for w, n in parts if n > 0]
    return torch.cat(drawn)


def mmr1_vas(
    pass_rate: Tensor,
    diversity: Tensor,
    *,
    number: int,
    fraction: float = 0.5,
    outcome_weight: float = 0.8,
    diversity_weight: float = 0.2,
    generator: torch.Generator,
) -> Tensor:
    """Draw a batch that leans to prompts of varied rewards: ``mixed_batch`` over ``vps``, int64 [number].

    MMR1 variance-aware sampling, 2509.21268. The paper measures both inputs on 32 rollouts a prompt, anew every 35
    steps; its code also smooths and rescales the scores, which is left to the caller. Arguments: see the two.
    On denoising steps: the same.
    """
    scores = vps(pass_rate, diversity, outcome_weight=outcome_weight, diversity_weight=diversity_weight)
    return mixed_batch(scores, number=number, fraction=fraction, generator=generator)


@dataclass(frozen=True)
class SECState(State):
    """How much each category taught lately: value, floating [C]; zeros to start."""

    value: Tensor

    def __post_init__(self) -> None:
        if self.value.ndim != 1 or len(self.value) == 0 or not self.value.is_floating_point():
            raise ValueError(f"value: expected floating [C], got {self.value.dtype} {list(self.value.shape)}")


def sec_update(
    state: SECState,
    arm: Tensor,
    advantage: Tensor,
    valid: Tensor | None = None,
    *,
    rate: float = 0.5,
    reduce: Reduce | None = None,
) -> SECState:
    """Follow each category's mean |A|: Q_c <- rate R_c + (1 - rate) Q_c, only for categories of this batch.

    arm: int64 [B] in 0 ... C - 1, the category of each row; advantage: floating [B]; valid: bool [B], all by default.
    rate in [0, 1]; its published value could not be confirmed. Give advantages that are not rescaled to unit mass:
    after ``dgpo_difficulty`` every group has mean |A| = 1 and nothing is left to learn. reduce: sums over ranks.
    SEC, 2505.14970. On denoising steps: the same, categories are kinds of prompts. Raises ValueError for other shapes.
    """
    check_share("rate", rate)
    places = len(state.value)
    if arm.dtype != torch.int64 or arm.ndim != 1 or bool(((arm < 0) | (arm >= places)).any()):
        raise ValueError(f"arm: expected int64 [B] in 0 ... {places - 1}, got {arm.dtype} {list(arm.shape)}")
    counted = torch.ones_like(arm, dtype=torch.bool) if valid is None else valid
    check_flags("valid", counted, tuple(arm.shape))
    size = read_rows("advantage", advantage, counted).abs()
    sums = total(torch.stack([add_by_slot(places, arm, size), add_by_slot(places, arm, counted.double())]), reduce)
    old = state.value.double()
    return SECState(value=torch.where(sums[1] > 0, rate * divide(sums[0], sums[1], 0.0) + (1 - rate) * old, old))


def sec_probs(state: SECState, *, temperature: float = 1.0) -> Tensor:
    """Draw categories in proportion to exp(Q / temperature): float32 [C], sums to 1.

    SEC, 2505.14970; the published temperature could not be confirmed. On denoising steps: the same.
    """
    check_number("temperature", temperature, 0.0, strict=True)
    return torch.softmax(state.value.double() / temperature, 0).float()


_TESTS = "tests/advantage/test_bandits.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="vade",
        kind="selection",
        paper_id="2511.18902",
        title="VADE: Thompson sampling of the prompts whose rewards vary most",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_thompson_scores_average_to_the_posterior_score",
            "exact": _TESTS + "test_posterior_worked_numbers",
            "identity": _TESTS + "test_decay_of_one_is_exact_bayes",
            "learned": "docs/results/credit/rest.json",
        },
        call=vade,
    ),
    Method(
        key="mmr1_vas",
        kind="selection",
        paper_id="2509.21268",
        title="MMR1: variance-aware sampling of prompts, mixed with uniform draws",
        tier=2,
        evidence={
            "exact": _TESTS + "test_vps_worked_number",
            "formula": _TESTS + "test_mixed_batch_frequencies",
        },
        call=mmr1_vas,
    ),
    Method(
        key="sec",
        kind="curriculum",
        paper_id="2505.14970",
        title="SEC: a bandit over prompt categories, paid in mean absolute advantage",
        tier=2,
        evidence={"exact": _TESTS + "test_sec_worked_number", "formula": _TESTS + "test_sec_against_a_plain_loop"},
        call=sec_probs,
    ),
)
