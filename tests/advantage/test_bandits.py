"""Bandits over prompts and categories: worked numbers, closed-form expectations, frequencies, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.bandits import (
    BetaState,
    SECState,
    decay_update,
    mixed_batch,
    mmr1_vas,
    posterior_score,
    sec_probs,
    sec_update,
    thompson_scores,
    vade,
    vps,
)

from .test_normalisation import close, mean, over_ranks

NAN = math.nan


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def beliefs(*pairs: tuple[float, float]) -> BetaState:
    return BetaState(*(torch.tensor(column, dtype=torch.float64) for column in zip(*pairs, strict=True)))


# VADE


def test_posterior_worked_numbers() -> None:
    close(posterior_score(beliefs((1, 1), (2, 2), (10, 10), (9, 1))), [0.1667, 0.2, 0.2381, 0.0818])


def test_thompson_scores_average_to_the_posterior_score() -> None:
    pairs = [(1.0, 1.0), (2.0, 2.0), (10.0, 10.0), (9.0, 1.0), (0.3, 2.0)]
    state = beliefs(*[pair for pair in pairs for _ in range(20_000)])
    scores = thompson_scores(state, generator=seeded()).view(5, -1)
    assert (scores >= 0).all() and (scores <= 0.25).all() and scores.std(1).min() > 0.01
    # The deviation of one score is below .1, that of the mean of 20,000 below 7e-4.
    close(scores.mean(1), posterior_score(beliefs(*pairs)).tolist(), 3e-3)
    # For Beta(1, 1): E[theta^2 (1 - theta)^2] = 1 / 30.
    assert scores[0].double().square().mean().item() == pytest.approx(1 / 30, abs=1e-3)


def test_thompson_scores_follow_the_generator_and_survive_tiny_counts() -> None:
    state = beliefs((1, 2), (3, 1))
    first, again = (thompson_scores(state, generator=seeded(5)) for _ in range(2))
    assert torch.equal(first, again) and not torch.equal(first, thompson_scores(state, generator=seeded(6)))
    tiny = thompson_scores(beliefs(*[(1e-300, 1e-300)] * 50), generator=seeded())
    assert not tiny.any()


def test_vade_takes_the_prompts_of_greatest_drawn_variance() -> None:
    state = beliefs((500, 1), (400, 400), (1, 600), (300, 330), (900, 100))
    assert vade(state, number=2, generator=seeded()).sort().values.tolist() == [1, 3]
    assert vade(beliefs((1, 1)), number=1, generator=seeded()).tolist() == [0]
    scores = thompson_scores(state, generator=seeded(3))
    chosen = vade(state, number=5, generator=seeded(3))
    assert chosen.tolist() == scores.argsort(descending=True).tolist() and chosen.dtype == torch.int64


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("visited", "unvisited", "prior"), [(0.9, 0.99, 1.0), (0.5, 1.0, 0.25)])
def test_decay_update_against_a_plain_loop(seed: int, visited: float, unvisited: float, prior: float) -> None:
    draw = random.Random(seed)
    pairs = [(draw.uniform(0.5, 4), draw.uniform(0.5, 4)) for _ in range(6)]
    slot = [draw.choice([0, 2, 3, 5]) for _ in range(15)]
    rewards = [draw.choice([NAN, 0.0, 1.0, 0.25]) for _ in slot[1:]] + [1.0]
    valid = [draw.random() < 0.8 for _ in slot[1:]] + [True]
    options = {} if prior == 1.0 else {"visited": visited, "unvisited": unvisited, "prior": prior}
    state = beliefs(*pairs)
    after = decay_update(state, torch.tensor(slot), torch.tensor(rewards), torch.tensor(valid), **options)
    for p, (a, b) in enumerate(pairs):
        seen = [r for s, r, v in zip(slot, rewards, valid, strict=True) if s == p and v and not math.isnan(r)]
        d = visited if seen else unvisited
        assert after.alpha[p].item() == pytest.approx(prior + d * (a - prior) + sum(seen))
        assert after.beta[p].item() == pytest.approx(prior + d * (b - prior) + len(seen) - sum(seen))
    assert state.alpha.tolist() == [a for a, _ in pairs]


def test_decay_of_one_is_exact_bayes() -> None:
    slot, rewards = torch.tensor([1, 1, 0, 1]), torch.tensor([1.0, 0.0, 1.0, 1.0])
    after = decay_update(beliefs((1, 1), (2, 3), (4, 5)), slot, rewards, visited=1.0, unvisited=1.0)
    assert after.alpha.tolist() == [2, 4, 4] and after.beta.tolist() == [1, 4, 5]


# MMR1


def test_vps_worked_number() -> None:
    close(vps(torch.tensor([0.5, 1.0, 0.25]), torch.tensor([0.6, 0.0, 2.0])), [0.32, 0.0, 0.55], 1e-6)
    close(vps(torch.tensor([0.5]), torch.tensor([3.0]), outcome_weight=1.0, diversity_weight=0.0), [0.25], 0)


def test_mixed_batch_frequencies() -> None:
    scores = torch.tensor([0.1, 0.0, 0.3])
    drawn = mixed_batch(scores, number=40_000, fraction=0.25, generator=seeded())
    assert drawn.dtype == torch.int64 and len(drawn) == 40_000
    # Frequencies of 10,000 draws deviate by less than .005.
    close(drawn[:10_000].bincount(minlength=3) / 10_000, [0.25, 0.0, 0.75], 0.02)
    close(drawn[10_000:].bincount(minlength=3) / 30_000, [1 / 3] * 3, 0.02)


@pytest.mark.parametrize(("fraction", "number", "scored"), [(0.0, 50, 0), (1.0, 50, 50), (0.29, 100, 29), (0.5, 5, 2)])
def test_mixed_batch_floors_the_share_drawn_by_score(fraction: float, number: int, scored: int) -> None:
    # Only the last of 5,000 prompts has a score: a uniform draw of it is unlikely, and these seeds have none.
    scores = torch.zeros(5000)
    scores[-1] = 1.0
    drawn = mixed_batch(scores, number=number, fraction=fraction, generator=seeded(1))
    assert (drawn == 4999).tolist() == [True] * scored + [False] * (number - scored)


def test_mixed_batch_defaults_and_scores_of_zero() -> None:
    scores = torch.tensor([0.0, 1.0] + [0.0] * 4998)
    assert (mixed_batch(scores, number=10, generator=seeded()) == 1).tolist() == [True] * 5 + [False] * 5
    flat = mixed_batch(torch.zeros(3), number=9000, fraction=1.0, generator=seeded())
    close(flat.bincount(minlength=3) / 9000, [1 / 3] * 3, 0.03)
    assert torch.equal(flat, mixed_batch(torch.zeros(3), number=9000, fraction=1.0, generator=seeded()))
    assert mixed_batch(torch.ones(1), number=1, fraction=1.0, generator=seeded()).tolist() == [0]


def test_mmr1_vas_is_the_two_together() -> None:
    p, d = torch.rand(2, 40, generator=seeded(2)).unbind()
    weights = {"outcome_weight": 0.1, "diversity_weight": 5.0}
    ours = mmr1_vas(p, d, number=30, fraction=0.7, generator=seeded(), **weights)
    assert torch.equal(ours, mixed_batch(vps(p, d, **weights), number=30, fraction=0.7, generator=seeded()))
    plain = mmr1_vas(p, d, number=31, generator=seeded())
    assert torch.equal(plain, mixed_batch(vps(p, d), number=31, fraction=0.5, generator=seeded()))
    assert torch.equal(plain, mmr1_vas(p, d, number=31, outcome_weight=0.8, diversity_weight=0.2, generator=seeded()))


# SEC


def test_sec_worked_number() -> None:
    arm = torch.tensor([1, 1])
    after = sec_update(SECState(torch.zeros(3)), arm, torch.tensor([0.6, -1.0]))
    close(sec_probs(after), [0.2864, 0.4272, 0.2864])
    close(sec_probs(after, temperature=0.5)[1:2] / sec_probs(after, temperature=0.5)[:1], [math.exp(0.8)], 1e-5)
    assert sec_probs(SECState(torch.tensor([1e4, 0.0])), temperature=1e-3).tolist() == [1.0, 0.0]


def sec_case() -> tuple[Tensor, Tensor, Tensor, SECState]:
    draw = seeded(4)
    arm = torch.randint(0, 4, (25,), generator=draw) + (torch.arange(25) % 2) * 2  # never category 6
    valid = torch.rand(25, generator=draw) < 0.8
    advantage = torch.where(valid, torch.randn(25, generator=draw), NAN)
    valid &= arm != 2  # category 2 only has rows that do not count
    return arm, advantage, valid, SECState(torch.rand(7, generator=draw))


@pytest.mark.parametrize("rate", [0.0, 0.3, 1.0])
def test_sec_against_a_plain_loop(rate: float) -> None:
    arm, advantage, valid, state = sec_case()
    before = state.value.clone()
    after = sec_update(state, arm, advantage, valid, rate=rate)
    for c, old in enumerate(before.tolist()):
        sizes = [abs(float(a)) for i, a in enumerate(advantage) if arm[i] == c and valid[i]]
        expected = rate * mean(sizes) + (1 - rate) * old if sizes else old
        assert after.value[c].item() == pytest.approx(expected, abs=1e-7)
    assert torch.equal(state.value, before) and after.value.dtype == torch.float64


def test_sec_counts_the_rows_of_all_ranks() -> None:
    arm, advantage, valid, state = sec_case()
    calls = [
        lambda r, s=s: sec_update(state, arm[s], advantage[s], valid[s], reduce=r).value  # type: ignore[misc]
        for s in (slice(0, 6), slice(6, 25))
    ]
    whole = sec_update(state, arm, advantage, valid).value
    assert all(torch.allclose(value, whole) for value in over_ranks(calls))


S, R, BETA, SEC = torch.tensor([0, 1]), torch.tensor([0.0, 1.0]), beliefs((1, 1), (1, 2)), SECState(torch.zeros(2))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: BetaState(R, R + 1), "alpha: expected finite counts > 0, got 0 ... 1"),
        (lambda: vade(BETA, number=0, generator=seeded()), "number: expected 1 ... 2, got 0"),
        (lambda: vade(BETA, number=3, generator=seeded()), "number: expected 1 ... 2, got 3"),
        (lambda: decay_update(BETA, S + 1, R), "slot: expected 0 ... 1, places of the state, got 1 ... 2"),
        (lambda: decay_update(BETA, S, R * 2), "rewards: expected values in [0, 1]"),
        (lambda: decay_update(BETA, S, R, visited=0.0), "visited: expected a number in (0, 1], got 0.0"),
        (lambda: decay_update(BETA, S, R, unvisited=1.1), "unvisited: expected a number in (0, 1], got 1.1"),
        (lambda: decay_update(BETA, S, R, prior=0.0), "prior: expected a finite number > 0, got 0.0"),
        (lambda: vps(R * 2, R), "pass_rate: expected values in [0, 1], got 2"),
        (lambda: vps(R - 1, R), "pass_rate: expected finite values and >= 0"),
        (lambda: vps(R[None], R[None]), "pass_rate: expected floating [P] with P >= 1, got [1, 2]"),
        (lambda: vps(R[:0], R[:0]), "pass_rate: expected floating [P] with P >= 1, got [0]"),
        (lambda: vps(R, R[:1]), "diversity: expected real [2], got torch.float32 [1]"),
        (lambda: vps(R, -R), "diversity: expected finite values and >= 0"),
        (lambda: vps(R, R, outcome_weight=-1.0), "outcome_weight: expected a finite number >= 0"),
        (lambda: vps(R, R, diversity_weight=NAN), "diversity_weight: expected a finite number >= 0"),
        (lambda: mixed_batch(R, number=0, generator=seeded()), "number: expected at least 1, got 0"),
        (lambda: mixed_batch(R, number=2, fraction=1.5, generator=seeded()), "fraction: expected a number in [0, 1]"),
        (lambda: mixed_batch(R, number=2, fraction=-0.5, generator=seeded()), "fraction: expected a number in [0, 1]"),
        (lambda: mixed_batch(-R, number=2, generator=seeded()), "scores: expected finite values and >= 0"),
        (lambda: mixed_batch(R[:0], number=2, generator=seeded()), "scores: expected floating [P] with P >= 1"),
        (lambda: mixed_batch(R[None], number=2, generator=seeded()), "scores: expected floating [P] with P >= 1"),
        (lambda: SECState(S), "value: expected floating [C], got torch.int64 [2]"),
        (lambda: SECState(R[None]), "value: expected floating [C], got torch.float32 [1, 2]"),
        (lambda: SECState(R[:0]), "value: expected floating [C], got torch.float32 [0]"),
        (lambda: sec_update(SEC, S + 1, R), "arm: expected int64 [B] in 0 ... 1, got torch.int64 [2]"),
        (lambda: sec_update(SEC, S - 1, R), "arm: expected int64 [B] in 0 ... 1"),
        (lambda: sec_update(SEC, R, R), "arm: expected int64 [B] in 0 ... 1, got torch.float32 [2]"),
        (lambda: sec_update(SEC, S[None], R[None]), "arm: expected int64 [B] in 0 ... 1, got torch.int64 [1, 2]"),
        (lambda: sec_update(SEC, S, R * NAN), "advantage: expected finite values where they count"),
        (lambda: sec_update(SEC, S, R[:1]), "advantage: expected real [2], got torch.float32 [1]"),
        (lambda: sec_update(SEC, S, R, S), "valid: expected bool [2], got torch.int64 [2]"),
        (lambda: sec_update(SEC, S, R, rate=1.5), "rate: expected a number in [0, 1], got 1.5"),
        (lambda: sec_probs(SEC, temperature=0.0), "temperature: expected a finite number > 0, got 0.0"),
    ],
)
def test_bad_input_is_named(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        call()
    assert message in str(error.value)
