"""Clocks that count busy time, runners that leave late calls behind, the breaker's three states."""

from __future__ import annotations

import subprocess
import sys
import threading
import time
import weakref

import pytest

from flowrl.scoring.deadlines import Breaker, BusyClock, Late, Runner, Watchdog


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_busy_time_is_counted_once_however_many_are_busy() -> None:
    clock = Clock()
    busy = BusyClock(clock)
    with busy:
        clock.now += 1.0
        with busy:
            clock.now += 2.0
            assert busy.spent == 3.0
        clock.now += 0.5
    clock.now += 10.0
    assert busy.spent == 3.5
    with busy:
        clock.now += 0.5
        busy.reset()
        clock.now += 0.25
        assert busy.spent == 0.25
    assert busy.spent == 0.25


def test_the_breaker_opens_tries_and_closes() -> None:
    clock = Clock()
    breaker = Breaker(2, 10.0, clock)
    assert breaker.refusal() == ""
    breaker.failed("a")
    assert breaker.refusal() == ""
    breaker.succeeded()
    breaker.failed("b")
    assert breaker.refusal() == ""  # one in a row: a success came between
    breaker.failed("c")
    assert breaker.refusal() == "not called: 2 calls in a row failed, the next try is in 10 s; the last one: c"
    clock.now += 9.9
    assert "in 0.1 s" in breaker.refusal()
    clock.now += 0.1
    assert breaker.refusal() == ""
    assert "one call is trying now" in breaker.refusal()
    breaker.failed("d")
    assert "3 calls in a row failed, the next try is in 10 s; the last one: d" in breaker.refusal()
    clock.now += 10.0
    assert breaker.refusal() == ""
    breaker.succeeded()
    assert breaker.refusal() == "" == breaker.refusal()


def test_a_breaker_of_zero_never_opens() -> None:
    breaker = Breaker(0, 10.0, Clock())
    for _ in range(50):
        breaker.failed("x")
    assert breaker.refusal() == ""


@pytest.mark.wall_clock
def test_a_runner_keeps_its_thread_until_a_call_is_late() -> None:
    runner = Runner("test")
    idents = [runner.run(threading.get_ident, 5.0) for _ in range(2)]
    assert idents[0] == idents[1] != threading.get_ident()
    release = threading.Event()
    start = time.perf_counter()
    with pytest.raises(Late):
        runner.run(lambda: release.wait(5), 0.05)
    assert time.perf_counter() - start < 0.5
    assert runner.run(lambda: threading.current_thread().name, None) == "test"
    assert runner.run(threading.get_ident, 5.0) != idents[0]
    release.set()
    runner.close()
    until = time.perf_counter() + 2
    while any(thread.name == "test" for thread in threading.enumerate()):
        assert time.perf_counter() < until, "its threads have not ended"
        time.sleep(0.01)


@pytest.mark.parametrize("kind", [ValueError, KeyboardInterrupt, SystemExit, TimeoutError])
def test_a_runner_raises_what_its_work_raises(kind: type[BaseException]) -> None:
    def work() -> None:
        raise kind("mine")

    runner = Runner("test")
    with pytest.raises(kind, match="mine"):
        runner.run(work, 5.0)
    assert runner.run(lambda: 3, 5.0) == 3
    runner.close()


@pytest.mark.wall_clock
def test_nothing_here_keeps_a_program_from_ending() -> None:
    """A reward that hangs and a watchdog that waits: the program ends nevertheless, at once."""
    program = """
import threading
from flowrl.scoring.deadlines import Late, Runner, Watchdog
Watchdog(60, print).__enter__()
try:
    Runner("x").run(threading.Event().wait, 0.01)
except Late:
    print("late")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=5, check=True)
    assert done.stdout == "late\n"


@pytest.mark.wall_clock
def test_a_runner_lets_go_of_what_it_ran() -> None:
    class Thing:
        pass

    thing = Thing()
    gone = weakref.ref(thing)
    runner = Runner("test")
    runner.run(lambda held=thing: None, 5.0)  # type: ignore[misc]
    del thing
    until = time.perf_counter() + 1
    while gone() is not None:
        assert time.perf_counter() < until
        time.sleep(0.01)
    runner.close()


@pytest.mark.wall_clock
def test_a_watchdog_bites_once_and_only_late() -> None:
    bites: list[int] = []
    with Watchdog(0.02, lambda: bites.append(1)) as dog:
        time.sleep(0.1)
    assert dog.fired and bites == [1]
    for seconds in (0.1, None):
        with Watchdog(seconds, lambda: bites.append(2)) as dog:
            pass
        time.sleep(0.12)
        assert not dog.fired and bites == [1]


def test_a_close_between_calls_of_another_thread_loses_none() -> None:
    runner = Runner("test")
    stop = threading.Event()
    closing = threading.Thread(target=lambda: [runner.close() for _ in iter(stop.is_set, True)])
    old = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    closing.start()
    try:
        assert [runner.run(lambda number=number: number, 20.0) for number in range(500)] == list(range(500))
    finally:
        stop.set()
        closing.join()
        sys.setswitchinterval(old)
        runner.close()
