"""Test-time search on Gaussian data: order statistics, the tilted law, and what plain sampling it falls back to."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl import rng
from flowrl.records import Request
from flowrl.rollout.sampling import sample
from flowrl.rollout.search import Judge, Search, Searcher, judged_rows, network_rows, systematic
from tests.rollout.doubles import Linear, toy_policy


class Counting:
    """Counts the rows that go through a policy's network."""

    def __init__(self, policy) -> None:
        self.rows = 0
        policy.adapter.network.register_forward_hook(lambda module, given, out: self._add(len(out)))

    def _add(self, count: int) -> None:
        self.rows += count


def judge_of(policy, reward=None, of_estimate: bool = False, seen=None) -> Judge:
    reward = reward or Linear()

    def ask(x, k, prompted):
        if seen is not None:
            seen.append((len(x), k))
        return reward.score(x, policy.schedule.t[k].expand(len(x)), prompted).values

    return Judge(ask, of_estimate)


def run(policy, search: Search, judge: Judge, pictures: int = 3, seed: int = 0):
    """(x0 [B], what it cost, start noise of the first slot, prompts). Many pictures draw from one generator, which is
    faster than a key for each row."""
    slots = search.slots
    if pictures > 100:
        generator = torch.Generator().manual_seed(seed)
        shape = (pictures * slots, *policy.adapter.shape)
        searcher, uniforms = (
            Searcher(policy, search, judge),
            iter(torch.rand(pictures * 9, generator=generator).tolist()),
        )
        prompted = policy.encode([Request("p", 0, 8, 8)])[torch.zeros(pictures, dtype=torch.int64)]
        x0 = searcher.run(prompted, lambda k, s: torch.randn(shape, generator=generator), lambda b, k: next(uniforms))
        return x0, searcher.spent, None, prompted
    keys = [[rng.key(seed, 0, b, s, 0, 0, "evaluation") for s in range(slots)] for b in range(pictures)]
    prompted = policy.encode([Request("p", b, 8, 8) for b in range(pictures)])

    def noise(draw: int, stream: str) -> torch.Tensor:
        if stream == "initial":
            return rng.normal([key for row in keys for key in row], policy.adapter.shape)
        named = [rng.key(seed, 0, b, s, 0, draw, stream) for b in range(pictures) for s in range(slots)]
        return rng.normal(named, policy.adapter.shape)

    searcher = Searcher(policy, search, judge)
    x0 = searcher.run(prompted, noise, lambda b, k: rng.uniform(rng.key(seed, 1, b, step=k, stream="sampler")))
    return x0, searcher.spent, rng.normal([row[0] for row in keys], policy.adapter.shape), prompted


def test_best_of_one_is_plain_sampling_bit_for_bit() -> None:
    policy = toy_policy(6)
    for kind in ("best_of", "beam", "particles"):
        found, spent, start, prompted = run(policy, Search(kind, 1, children=1), judge_of(policy))
        assert torch.equal(found, sample(policy, prompted, start)), kind
    assert spent.network == 3 * 6


def test_best_of_n_takes_the_greatest_and_raises_the_mean_by_the_order_statistic() -> None:
    """E[max of n standard normals]: 1.0294 for 4, .5642 for 2 (times the spread of x0)."""
    policy = toy_policy(3)
    spread = float((1 - policy.adapter.network.slope(policy.adapter.grid[:-1]) / 3).prod())
    for width, expected in ((2, 1 / math.sqrt(math.pi)), (4, 1.02938)):
        found, *_ = run(policy, Search("best_of", width), judge_of(policy), pictures=1500)
        assert float(found.mean()) / spread == pytest.approx(expected, abs=0.06)
    wide, *_ = run(policy, Search("best_of", 4), judge_of(policy), pictures=5)
    narrow, *_ = run(policy, Search("best_of", 1), judge_of(policy), pictures=5)
    assert bool((wide >= narrow).all())


def test_a_beam_without_branching_is_best_of_n() -> None:
    policy = toy_policy(5)
    beam, cost, *_ = run(policy, Search("beam", 4, children=1), judge_of(policy))
    best, other, *_ = run(policy, Search("best_of", 4), judge_of(policy))
    assert torch.equal(beam, best)
    assert (cost.network, cost.scored) == (other.network, other.scored) == (60, 12)


def test_a_beam_keeps_the_best_children_at_every_step() -> None:
    """By hand: two beams of three children at step 1, values x itself, one picture."""
    policy = toy_policy(4, "dance_sde", 0.5)
    search = Search("beam", 2, 3, frozenset({1}))
    found, spent, *_ = run(policy, search, judge_of(policy, Linear(slope=lambda t: 0 * t + 1)), pictures=1)
    prompted = policy.encode([Request("p", 0, 8, 8)])
    start = rng.normal([rng.key(0, 0, 0, s, 0, 0, "evaluation") for s in range(6)], policy.adapter.shape)[:2]
    noise = rng.normal([rng.key(0, 0, 0, s, 0, 1, "step") for s in range(6)], policy.adapter.shape)
    x = policy.step(start, torch.zeros(2, dtype=torch.int64), prompted, kernel="ode").mean
    made = policy.step(x, torch.ones(2, dtype=torch.int64), prompted)
    x = torch.cat([made.mean[i] + made.std[i] * noise[3 * i + j] for i in range(2) for j in range(3)])
    x = x.flatten().sort(descending=True).values[:2].reshape(2, 1, 1, 1)
    for k in (2, 3):
        x = policy.step(x, torch.full((2,), k), prompted, kernel="ode").mean
    torch.testing.assert_close(found, x[:1])
    assert spent.scored == 6 + 2


@pytest.mark.parametrize("reward", [Linear(), Linear(slope=lambda t: 1 - t)])
def test_particles_with_exact_weights_reach_the_tilted_law(reward) -> None:
    """p(x0) exp(x0 / lambda) of the chain N(0, V): mean V / lambda, variance V. Whatever R says on the way, its end counts."""
    policy, scale = toy_policy(5, "precise", 0.9), 0.9
    plain, *_ = run(policy, Search("particles", 1, branch=frozenset(range(4))), judge_of(policy), pictures=1500)
    variance = float(plain.var())
    search = Search("particles", 24, branch=frozenset(range(4)), scale=scale, threshold=0.9)
    found, spent, *_ = run(policy, search, judge_of(policy, reward), pictures=700)
    assert float(found.mean()) == pytest.approx(scale * variance, abs=4 * math.sqrt(variance / 700) + 0.03)
    assert float(found.var()) == pytest.approx(variance, rel=0.2)
    assert spent.resampled > 0


def test_particles_without_resampling_and_the_best_of_them() -> None:
    policy = toy_policy(4)
    search = Search("particles", 6, branch=frozenset({0, 1}), threshold=0.0, pick="best")
    best, spent, *_ = run(policy, search, judge_of(policy))
    assert spent.resampled == 0
    draws, *_ = run(
        policy, Search("particles", 6, branch=frozenset({0, 1}), threshold=0.0, scale=0.0), judge_of(policy)
    )
    assert bool((best >= draws).all())


@pytest.mark.parametrize(
    "search",
    [
        Search("best_of", 1),
        Search("best_of", 5),
        Search("beam", 2, 3, frozenset({0, 2})),
        Search("beam", 1, 2, frozenset({1})),
        Search("particles", 4, branch=frozenset({0, 1, 2})),
    ],
)
@pytest.mark.parametrize("of_estimate", [False, True])
def test_cost_is_its_formula(search: Search, of_estimate: bool) -> None:
    policy, seen = toy_policy(5), []
    counting = Counting(policy)
    _, spent, *_ = run(policy, search, judge_of(policy, of_estimate=of_estimate, seen=seen))
    assert counting.rows == spent.network == 3 * network_rows(search, 5, of_estimate)
    assert sum(n for n, _ in seen) == spent.scored == 3 * judged_rows(search, 5)
    assert spent.pictures == 3


def test_an_outcome_judge_sees_the_one_step_estimate() -> None:
    """The value of x0_hat under the outcome b x is the value of x under its posterior mean: the same choice."""
    policy = toy_policy(4)
    search = Search("beam", 2, 3, frozenset({0, 1}))
    flat = Linear(slope=lambda t: 0 * t + 1)
    process, *_ = run(policy, search, judge_of(policy))
    outcome, *_ = run(policy, search, judge_of(policy, flat, of_estimate=True))
    assert torch.equal(process, outcome)


def test_candidates_without_a_value_lose_and_all_without_one_keep_the_first() -> None:
    policy = toy_policy(3)
    only_low = Judge(lambda x, k, p: torch.where(x.flatten() > 0, torch.nan, x.flatten()), False)
    for kind in ("best_of", "beam"):
        found, spent, *_ = run(policy, Search(kind, 12, children=1), only_low)
        assert float(found.max()) <= 0
        assert spent.failed > 0
    none = Judge(lambda x, k, p: torch.full((len(x),), torch.nan), False)
    for kind in ("best_of", "beam", "particles"):
        found, *_ = run(policy, Search(kind, 4, children=1), none)
        assert bool(torch.isfinite(found).all())
    first, _, start, prompted = run(policy, Search("best_of", 4), none)
    assert torch.equal(first, sample(policy, prompted, start))


def test_systematic_resampling_takes_each_index_by_its_share() -> None:
    """w = .5 .3 .2, four draws: at u = 0 places 0, .25, .5, .75 -> 0 0 1 1; at u = .9 .225 .475 .725 .975 -> 0 0 1 2."""
    w = torch.tensor([5.0, 3.0, 2.0])
    assert systematic(w, 0.0, 4).tolist() == [0, 0, 1, 1]
    assert systematic(w, 0.9, 4).tolist() == [0, 0, 1, 2]
    counts = torch.stack([systematic(w, u / 1000, 7).bincount(minlength=3) for u in range(0, 1000, 8)]).double()
    torch.testing.assert_close(counts.mean(0), 7 * w.double() / 10, atol=0.02, rtol=0)
    assert bool(((counts - 7 * w.double() / 10).abs() < 1).all())
    for bad in ([0.0, 0.0], [1.0, -1.0], [math.nan, 1.0]):
        with pytest.raises(ValueError, match="not all 0"):
            systematic(torch.tensor(bad), 0.5, 2)
