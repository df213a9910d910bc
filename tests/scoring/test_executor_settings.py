"""Settings of an executor are checked, all mistakes at once."""

from __future__ import annotations

from typing import Any

import pytest

from flowrl.errors import UserError
from flowrl.scoring.executors import ExecutorSettings


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"kind": "treads"}, "kind is 'treads'; use inline, thread, process, worker, http"),
        ({"encoding": "jpeg"}, "encoding is 'jpeg'; use safetensors, png"),
        ({"timeout_s": 0.0}, "timeout_s is 0.0; use seconds above 0"),
        ({"total_s": -1.0}, "total_s is -1.0; use seconds above 0"),
        ({"start_s": float("nan")}, "start_s is nan; use seconds above 0"),
        ({"timeout_s": float("inf")}, "timeout_s is inf; use seconds above 0"),
        ({"workers": 0}, "workers is 0; use 1 or more"),
        ({"queue": 0}, "queue is 0; use 1 or more"),
        ({"retries": -1}, "retries is -1; use 0 or more"),
        ({"breaker": -1}, "breaker is -1; use 0 or more"),
        ({"body_bytes": 0}, "body_bytes is 0; use 1 or more"),
        ({"backoff_s": -0.1}, "backoff_s is -0.1; use seconds, 0 or more"),
        ({"breaker_s": float("inf")}, "breaker_s is inf; use seconds, 0 or more"),
        ({"kind": "worker"}, "kind worker needs python"),
        ({"kind": "http"}, "kind http needs url"),
        ({"url": "http://a"}, "url belongs to kind http, and kind is thread; remove it"),
        ({"kind": "process", "python": "x"}, "python belongs to kind worker, and kind is process"),
        ({"token_env": "X"}, "token_env belongs to kind http"),
        ({"allow": ("a", "b")}, "allow belongs to kind http"),
        ({"kind": "inline", "workers": 2}, "kind inline has one worker; use kind thread"),
    ],
)
def test_a_mistake_is_said(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError) as caught:
        ExecutorSettings(**given)
    assert str(caught.value) == f"executor: {words}" or words in str(caught.value)


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"timeout_s": None, "total_s": None, "retries": 0, "breaker": 0, "backoff_s": 0.0, "breaker_s": 0.0},
        {"kind": "inline"},
        {"workers": 1, "queue": 1, "body_bytes": 1, "timeout_s": 1e-3},
        {"kind": "worker", "python": "x", "encoding": "png"},
        {"kind": "http", "url": "http://a", "token_env": "X", "allow": ("a",)},
    ],
)
def test_what_is_right_passes(given: dict[str, Any]) -> None:
    ExecutorSettings(**given)


def test_all_mistakes_come_at_once() -> None:
    with pytest.raises(UserError, match=r"^executor: timeout_s is 0.0; .*; workers is 0; .*; kind http needs url$"):
        ExecutorSettings(kind="http", timeout_s=0.0, workers=0)
