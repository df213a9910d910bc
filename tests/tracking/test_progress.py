"""A bar on a terminal, lines elsewhere."""

from __future__ import annotations

import io

import pytest

from flowrl.tracking.progress import Progress, duration


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class _Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


def test_one_line_an_iteration_without_a_terminal() -> None:
    lines: list[str] = []
    clock, stream = _Clock(), io.StringIO()
    with Progress(13, start=10, write=lines.append, stream=stream, clock=clock) as progress:
        progress.phase("rollout")
        clock.now += 30
        progress.advance(0.51234)
        progress.message("saved")
        clock.now += 50
        progress.advance(None, "2 invalid")
        clock.now += 1
        progress.advance(1.0)
    assert lines == [
        "iteration 11/13  reward 0.5123  30.00 s/it  left 0:01:00",
        "saved",
        "iteration 12/13  reward -  40.00 s/it  left 0:00:40  2 invalid",
        "iteration 13/13  reward 1  27.00 s/it  left 0:00:00",
    ]
    assert stream.getvalue() == ""


def test_a_bar_on_a_terminal() -> None:
    lines: list[str] = []
    stream = _Terminal()
    with Progress(4, start=1, write=lines.append, stream=stream) as progress:
        progress.phase("rollout")
        progress.advance(0.25)
        progress.message("saved")
        progress.phase("update")
    shown = stream.getvalue()
    assert lines == []
    assert "rollout:" in shown
    assert "update:" in shown
    assert "reward 0.25" in shown
    assert "1/4" in shown
    assert "2/4" in shown
    assert "saved\n" in shown
    assert "<" in shown  # the time left


def test_switched_off_it_shows_messages_only() -> None:
    lines: list[str] = []
    stream = _Terminal()
    with Progress(4, write=lines.append, stream=stream, enabled=False) as progress:
        progress.phase("rollout")
        progress.advance(0.25)
        progress.message("saved")
    assert lines == ["saved"]
    assert stream.getvalue() == ""


@pytest.mark.parametrize(
    ("seconds", "text"), [(0, "0:00:00"), (59.6, "0:01:00"), (3661, "1:01:01"), (360000, "100:00:00")]
)
def test_duration(seconds: float, text: str) -> None:
    assert duration(seconds) == text
