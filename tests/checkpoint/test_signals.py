"""R5, the part of one process: real signals, real exit codes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from flowrl.checkpoint.signals import StopSignals

CHILD = """
    import sys, time
    from flowrl.checkpoint.signals import StopSignals
    with StopSignals() as stop:
        print("ready", flush=True)
        while stop.requested is None:
            time.sleep(0.01)
        print("asked", flush=True)
        if sys.argv[1] == "stuck":
            time.sleep(60)
    sys.exit(stop.exit_code)
"""


def _child(mode: str) -> subprocess.Popen[str]:
    code = textwrap.dedent(CHILD)
    process = subprocess.Popen([sys.executable, "-c", code, mode], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_one_signal_lets_the_work_finish(number: int, code: int) -> None:
    with _child("prompt") as process:
        os.kill(process.pid, number)
        output, _ = process.communicate(timeout=30)
    assert output == "asked\n"
    assert process.returncode == code


@pytest.mark.wall_clock
@pytest.mark.parametrize(
    ("first", "second", "code"),
    [(signal.SIGTERM, signal.SIGTERM, 143), (signal.SIGINT, signal.SIGINT, 130), (signal.SIGTERM, signal.SIGINT, 130)],
)
def test_a_second_signal_ends_at_once(first: int, second: int, code: int) -> None:
    with _child("stuck") as process:
        assert process.stdout is not None
        os.kill(process.pid, first)
        assert process.stdout.readline() == "asked\n"
        began = time.monotonic()
        os.kill(process.pid, second)
        assert process.wait(timeout=30) == code
        assert time.monotonic() - began < 5


def test_a_flag_only_and_the_former_handlers_come_back() -> None:
    caught: list[int] = []
    former = signal.signal(signal.SIGTERM, lambda number, frame: caught.append(number))
    interrupt = signal.getsignal(signal.SIGINT)
    try:
        with StopSignals() as stop:
            assert stop.active
            assert (stop.requested, stop.exit_code) == (None, 0)
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(0.01)
            assert (stop.requested, stop.exit_code) == (signal.SIGTERM, 143)
        assert caught == []
        assert signal.getsignal(signal.SIGINT) is interrupt
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        assert caught == [signal.SIGTERM]
        assert (stop.requested, stop.exit_code, stop.active) == (signal.SIGTERM, 143, False)
    finally:
        signal.signal(signal.SIGTERM, former)


def test_handlers_come_back_after_an_error() -> None:
    former = signal.getsignal(signal.SIGTERM)
    with pytest.raises(RuntimeError), StopSignals():
        raise RuntimeError
    assert signal.getsignal(signal.SIGTERM) is former


def test_outside_the_main_thread_it_does_nothing_and_says_so() -> None:
    former = signal.getsignal(signal.SIGTERM)
    seen: list[tuple[bool, int | None, bool]] = []

    def work() -> None:
        with StopSignals() as stop:
            seen.append((stop.active, stop.requested, signal.getsignal(signal.SIGTERM) is former))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(False, None, True)]
