"""The stopwatch counts each second once, whatever is nested, and says what is left over."""

from __future__ import annotations

import contextlib

import pytest

from flowrl.performance.timers import Stopwatch


class FakeClock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_phases_are_exclusive_and_sum_to_the_total() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock)
    clock.now += 1  # before any phase: other
    with watch.phase("rollout"):
        clock.now += 2
        with watch.phase("decode"):
            clock.now += 4
            with watch.phase("reward"):
                clock.now += 8
            clock.now += 16
        clock.now += 32
    with watch.phase("rollout"):
        clock.now += 64
    clock.now += 128
    assert watch.as_metrics() == {
        "time/rollout_s": 98.0,
        "time/decode_s": 20.0,
        "time/reward_s": 8.0,
        "time/iteration_s": 255.0,
        "time/other_s": 129.0,
    }


def test_a_phase_within_itself_counts_once() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock)
    with watch.phase("update"), watch.phase("update"):
        clock.now += 3
    assert watch.seconds == {"update": 3.0}


def test_an_error_inside_a_phase_still_closes_it() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock)
    with contextlib.suppress(KeyError), watch.phase("reward"):
        clock.now += 5
        raise KeyError("x")
    clock.now += 7
    assert watch.as_metrics()["time/reward_s"] == 5.0
    assert watch.as_metrics()["time/other_s"] == 7.0


def test_a_given_total_sets_what_is_left_over() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock)
    with watch.phase("rollout"):
        clock.now += 2
    assert watch.as_metrics(total=10.0)["time/other_s"] == 8.0


def test_reset_starts_the_total_anew_and_refuses_inside_a_phase() -> None:
    clock = FakeClock()
    watch = Stopwatch(clock)
    with watch.phase("rollout"):
        clock.now += 2
        with pytest.raises(RuntimeError, match="'rollout' is still running"):
            watch.reset()
    watch.reset()
    clock.now += 1
    assert watch.as_metrics() == {"time/iteration_s": 1.0, "time/other_s": 1.0}


def test_computed_names_are_refused() -> None:
    with pytest.raises(ValueError, match="'other' is computed"), Stopwatch().phase("other"):
        pass


def test_the_device_is_waited_for_at_each_reading() -> None:
    calls: list[int] = []
    watch = Stopwatch(FakeClock(), synchronize=lambda: calls.append(1))
    calls.clear()
    with watch.phase("rollout"):
        pass
    assert len(calls) == 2
