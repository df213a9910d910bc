"""Groups are a pure function of (seed, iteration): every prompt once a pass, or by weight."""

from __future__ import annotations

import itertools
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from flowrl.data.sampler import Drawn, draw_groups


def ids(drawn: list[Drawn]) -> list[int]:
    return [d.prompt_id for d in drawn]


@pytest.mark.parametrize(("groups", "count"), [(4, 10), (3, 7), (5, 5), (8, 3), (1, 1), (7, 2)])
def test_every_prompt_comes_once_a_pass(groups: int, count: int) -> None:
    stream = [i for iteration in range(3 * count) for i in ids(draw_groups(1, iteration, groups, count))]
    passes = [stream[start : start + count] for start in range(0, len(stream), count)]
    assert all(sorted(p) == list(range(count)) for p in passes)


def test_passes_differ_and_so_do_seeds() -> None:
    orders = {tuple(ids(draw_groups(seed, iteration, 50, 50))) for seed in (0, 1) for iteration in range(4)}
    assert len(orders) == 8


def test_group_ids_are_unique_over_a_run_and_fit_int64() -> None:
    found = [d.group_id for iteration in range(20) for d in draw_groups(0, iteration, 6, 4)]
    assert found == list(range(120))
    far = draw_groups(0, 2**50, 24, 100)[-1].group_id
    assert far == 2**50 * 24 + 23 and torch.tensor([far]).dtype == torch.int64


@pytest.mark.parametrize("weights", [None, [1.0, 0.0, 5.0]])
def test_occurrence_counts_repeats_within_the_iteration(weights: list[float] | None) -> None:
    for iteration in range(5):
        drawn = draw_groups(3, iteration, 8, 3, weights)
        for place, d in enumerate(drawn):
            assert d.occurrence == ids(drawn[:place]).count(d.prompt_id)


def test_weighted_draws_follow_the_weights_and_are_independent() -> None:
    weights = [0.5, 0.0, 0.3, 0.2]
    stream = [i for iteration in range(200) for i in ids(draw_groups(7, iteration, 30, 4, weights))]
    counts = Counter(stream)
    assert counts[1] == 0
    for index, weight in enumerate(weights):
        # Four standard errors of a binomial share.
        assert counts[index] / len(stream) == pytest.approx(weight, abs=4 * (0.25 / len(stream)) ** 0.5)
    repeats = sum(a == b for a, b in itertools.pairwise(stream)) / len(stream)
    assert repeats == pytest.approx(sum(w * w for w in weights), abs=0.03)
    scaled = [i for iteration in range(20) for i in ids(draw_groups(7, iteration, 30, 4, [w * 1e3 for w in weights]))]
    assert scaled == stream[:600]


def test_no_generator_state_and_no_order_of_calls_matters() -> None:
    torch.manual_seed(0)
    before = torch.random.get_rng_state()
    here = draw_groups(3, 2, 6, 5), draw_groups(3, 2, 6, 3, [1.0, 2.0, 1.0])
    assert torch.equal(before, torch.random.get_rng_state())
    torch.manual_seed(99)
    with ThreadPoolExecutor(3) as pool:  # in any order, beside other draws
        others = [pool.submit(draw_groups, 8, iteration, 8, 8) for iteration in range(20)]
        again = pool.submit(draw_groups, 3, 2, 6, 5), pool.submit(draw_groups, 3, 2, 6, 3, [1.0, 2.0, 1.0])
        assert tuple(future.result() for future in again) == here
    assert all(future.result() for future in others)


def test_golden_draws() -> None:
    """Each process draws for itself, so these must be the same in every one; a change here changes every run."""
    assert draw_groups(3, 2, 6, 5) == [
        Drawn(2, 0, 12), Drawn(0, 0, 13), Drawn(3, 0, 14), Drawn(0, 1, 15), Drawn(1, 0, 16), Drawn(4, 0, 17),
    ]  # fmt: skip
    assert ids(draw_groups(3, 2, 6, 3, [1.0, 2.0, 1.0])) == [0, 1, 1, 1, 1, 1]


@pytest.mark.parametrize(
    ("groups", "count", "iteration", "weights", "message"),
    [
        (0, 3, 0, None, "groups 0 and count 3 must be at least 1"),
        (3, 0, 0, None, "count 0 must be at least 1"),
        (3, 3, -1, None, "iteration -1 at least 0"),
        (3, 3, 0, [1.0], "1 weights for 3 prompts"),
        (3, 2, 0, [0.0, 0.0], "not all 0"),
        (3, 2, 0, [1.0, -1.0], "at least 0"),
        (3, 2, 0, [1.0, float("nan")], "finite"),
    ],
)
def test_impossible_draws(groups: int, count: int, iteration: int, weights: list[float] | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        draw_groups(0, iteration, groups, count, weights)
