"""Stochastic windows: where they start, how they move, what is refused."""

from __future__ import annotations

from collections import Counter

import pytest

from flowrl import rng
from flowrl.dynamics import stochastic_steps


def test_full_is_every_step_but_the_last() -> None:
    assert stochastic_steps("full", 2, 0, 2, 5, 8, 3, 0) == [0, 1, 2, 3, 4, 5, 6]
    assert stochastic_steps("full", 99, 50, 0, 0, 2, 3, 0) == [0]  # the other settings play no part


def test_random_windows_cover_their_range_evenly_and_repeat() -> None:
    drawn = [stochastic_steps("random", 2, 1, 4, 5, 8, iteration, 7) for iteration in range(2000)]
    assert all(window == [window[0], window[0] + 1] for window in drawn)
    starts = Counter(window[0] for window in drawn)
    assert sorted(starts) == [1, 2, 3, 4]
    assert all(abs(count - 500) < 90 for count in starts.values())
    assert drawn == [stochastic_steps("random", 2, 1, 4, 5, 8, iteration, 7) for iteration in range(2000)]
    assert drawn != [stochastic_steps("random", 2, 1, 4, 5, 8, iteration, 8) for iteration in range(2000)]


def test_random_start_comes_from_the_window_stream() -> None:
    for iteration in range(20):
        start = 1 + int(4 * rng.uniform(rng.key(7, iteration, stream="window")))
        assert stochastic_steps("random", 2, 1, 4, 5, 8, iteration, 7)[0] == start


def test_sliding_windows_move_and_return() -> None:
    starts = [stochastic_steps("sliding", 2, 1, 3, 2, 8, iteration, 0)[0] for iteration in range(8)]
    assert starts == [1, 1, 2, 2, 3, 3, 1, 1]
    assert stochastic_steps("sliding", 3, 1, 3, 2, 8, 4, 0) == [3, 4, 5]


def test_the_last_fitting_window_ends_before_the_last_step() -> None:
    assert stochastic_steps("sliding", 2, 5, 5, 1, 8, 0, 0) == [5, 6]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ("random", 2, 0, 6, 5, 8),
            "rollout.window: 2 steps from last = 6 reach step 7, but with rollout.steps = 8 only steps 0 to 6 can be "
            "stochastic; lower window.last to 5 or less, or raise rollout.steps",
        ),
        (
            ("sliding", 9, 0, 0, 5, 8),
            "rollout.window: 9 steps from last = 0 reach step 8, but with rollout.steps = 8 only steps 0 to 6 can be "
            "stochastic; lower window.size, or raise rollout.steps",
        ),
        (("random", 0, 0, 2, 5, 8), "rollout.window.size: 0 leaves nothing to train; use at least 1"),
        (
            ("random", 2, 3, 2, 5, 8),
            "rollout.window: starts from first = 3 to last = 2 are no range; use 0 <= first <= last",
        ),
        (
            ("random", 2, -1, 2, 5, 8),
            "rollout.window: starts from first = -1 to last = 2 are no range; use 0 <= first <= last",
        ),
        (
            ("sliding", 2, 0, 2, 0, 8),
            "rollout.window.every: a sliding window cannot move every 0 iterations; use at least 1",
        ),
        (
            ("slide", 2, 0, 2, 5, 8),
            "rollout.window.kind: unknown kind 'slide'; use one of full, random, sliding, iso_temporal",
        ),
        (
            ("full", 2, 0, 2, 5, 1),
            "rollout.steps: 1 leaves no stochastic step, as the last one is deterministic; use at least 2",
        ),
    ],
)
def test_a_window_that_cannot_be_is_refused(arguments: tuple[str, int, int, int, int, int], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        stochastic_steps(*arguments, 0, 0)
    assert str(caught.value) == message
