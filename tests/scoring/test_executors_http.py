"""A reward behind HTTP: endpoints that are slow, broken, hostile or gone mask their batch, in time, and nothing else."""

from __future__ import annotations

import json
import socket
import time
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from flowrl.errors import UserError
from flowrl.scoring.executors import Executor, ExecutorSettings, FailedCall, gather, make_executor

from .executor_tools import Answer, batch, entry, reply, scripted_server
from .test_executors import all_failed, same

HEALTH = {"protocol": 1, "flowrl": "0", "reward": "faulty", "timeout_s": 0.1, "body_bytes": 1 << 20}


def health(**changes: Any) -> Answer:
    return reply(200, json.dumps(HEALTH | changes).encode())


def scores(*values: Any, **changes: Any) -> Answer:
    count = len(values)
    result = {
        "scores": list(values),
        "valid": [True] * count,
        "errors": [None] * count,
        "components": {},
        "details": [],
    }
    return reply(200, json.dumps({"protocol": 1, "result": result | changes}).encode())


GOOD = scores(1.0, 2.0)


def drip(data: bytes, pause: float = 0.05) -> Answer:
    def send(connection: socket.socket) -> None:
        for value in data:
            connection.sendall(bytes([value]))
            time.sleep(pause)

    return send


def silent(connection: socket.socket) -> None:
    time.sleep(1.0)


def hang_up(connection: socket.socket) -> None:
    return


def endless(connection: socket.socket) -> None:
    connection.sendall(b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\n\r\n")
    while True:
        connection.sendall(b" " * 65536)


def opened(stack: ExitStack, *answers: Answer, **settings: Any) -> tuple[Executor, list[bytes]]:
    """An executor whose service gives ``answers``, after a healthy start; and the requests that it saw."""
    url, seen = stack.enter_context(scripted_server([health(), *answers]))
    given: dict[str, Any] = {"timeout_s": 0.4, "retries": 0, "backoff_s": 0.01, "body_bytes": 100_000, **settings}
    return stack.enter_context(
        make_executor("faulty", entry("faulty"), ExecutorSettings(kind="http", url=url, **given))
    ), seen


HEAD = b"HTTP/1.0 200 OK\r\nContent-Type: application/json\r\nContent-Length: 400\r\n\r\n"
FAULTS: dict[str, tuple[Answer, str]] = {
    "silence": (silent, "no complete answer within 0.4 s"),
    "slow headers": (drip(b"HTTP/1.0 200 OK\r\nX-A: 1\r\nX-B: 2\r\n"), "no complete answer within 0.4 s"),
    "slow bytes": (drip(HEAD + b" " * 99, 0.02), "no complete answer within 0.4 s"),
    "500": (reply(500, b'{"error": "GPU on fire"}'), "the service answers 500: GPU on fire"),
    "404": (reply(404, b"<html>nothing</html>"), "the service answers 404"),
    "not JSON": (reply(200, b"<html>fine</html>"), "malformed JSON"),
    "half of JSON": (reply(200, b'{"protocol": 1, "resu'), "malformed JSON"),
    "pickle": (reply(200, b"\x80\x04K\x01."), "malformed JSON"),
    "NaN": (reply(200, b'{"protocol": 1, "result": NaN}'), "NaN is not JSON"),
    "wrong count": (scores(1.0), "scores is 1 values, expected 2 numbers"),
    "null score": (scores(1.0, None), "a valid sample has no finite score"),
    "text score": (scores(1.0, "2.0"), "something other than numbers"),
    "other protocol": (reply(200, b'{"protocol": 9}'), "speaks protocol 9, this one 1"),
    "no result": (reply(200, b'{"protocol": 1}'), "malformed result"),
    "huge body": (endless, "the answer has more than 100000 bytes"),
    "huge header": (reply(200, b"{}", "X: " + "y" * 100_000), "LineTooLong"),
    "hangs up": (hang_up, "the connection failed: RemoteDisconnected"),
    "dies in mid-body": (reply(200, b'{"protocol":', length=400), "the connection failed: IncompleteRead"),
    "redirect": (reply(302, b"", "Location: http://169.254.169.254/latest"), "302, a redirect, which is not followed"),
    "says it failed": (reply(200, b'{"protocol": 1, "failed": "x: boom", "fatal": false}'), "the service: x: boom"),
}  # fmt: skip


@pytest.mark.wall_clock
@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_masks_its_batch_in_time_and_no_other(name: str) -> None:
    answer, words = FAULTS[name]
    with ExitStack() as stack:
        executor, _ = opened(stack, GOOD, answer, scores(3.5, 4.5))
        start = time.perf_counter()
        first, middle, last = gather([executor.submit(batch(1, 2)) for _ in range(3)])
        assert time.perf_counter() - start < 1.2
    same(first, 1.0, 2.0)
    all_failed(middle, 2, "faulty: ", words)
    assert isinstance(middle, FailedCall) and not middle.fatal
    same(last, 3.5, 4.5)


def test_single_samples_may_fail() -> None:
    with ExitStack() as stack:
        executor, _ = opened(stack, scores(None, 2.0, valid=[False, True], errors=["no face", None]))
        result = executor.score(batch(1, 2))
    assert np.isnan(result.scores[0]) and result.scores[1] == 2.0
    assert list(result.errors) == ["no face", None] and not isinstance(result, FailedCall)


@pytest.mark.parametrize(
    ("answer", "calls"),
    [(reply(500, b""), 3), (reply(503, b""), 3), (reply(429, b""), 3), (reply(408, b""), 3), (hang_up, 3),
     (reply(400, b""), 1), (reply(404, b""), 1), (reply(302, b""), 1), (reply(200, b"{"), 1)],
)  # fmt: skip
def test_only_what_may_pass_is_tried_again(answer: Answer, calls: int) -> None:
    with ExitStack() as stack:
        executor, seen = opened(stack, answer, retries=2)
        all_failed(executor.score(batch(1)), 1, "faulty")
        assert len(seen) == 1 + calls


def test_a_second_try_scores() -> None:
    with ExitStack() as stack:
        executor, seen = opened(stack, reply(503, b""), hang_up, GOOD, retries=2)
        same(executor.score(batch(1, 2)), 1.0, 2.0)
        assert len(seen) == 4


@pytest.mark.wall_clock
def test_the_total_limit_ends_an_iteration_of_hangs() -> None:
    """Six batches at a service that never answers: 0.5 s in all, not 6 x 0.2; then the next iteration calls again."""
    with ExitStack() as stack:
        executor, seen = opened(stack, silent, silent, silent, GOOD, timeout_s=0.2, total_s=0.5, breaker=0, queue=8)
        start = time.perf_counter()
        results = gather([executor.submit(batch(1, 2)) for _ in range(6)])
        assert 0.45 < time.perf_counter() - start < 0.9
        for result in results[:2]:
            all_failed(result, 2, "no complete answer within 0.2 s")
        for result in results[3:]:
            all_failed(result, 2, "the 0.5 s that an iteration may spend on it (total_s) are used up")
        assert len(seen) == 4
        executor.begin_iteration()
        same(executor.score(batch(1, 2)), 1.0, 2.0)


@pytest.mark.wall_clock
def test_time_between_calls_does_not_count() -> None:
    with ExitStack() as stack:
        executor, _ = opened(stack, GOOD, total_s=0.3)
        for _ in range(3):
            same(executor.score(batch(1, 2)), 1.0, 2.0)
            time.sleep(0.2)  # the rollout of the next batch


@pytest.mark.wall_clock
def test_the_breaker_spares_a_service_that_fails() -> None:
    with ExitStack() as stack:
        executor, seen = opened(stack, *[reply(500, b"")] * 2, GOOD, breaker=2, breaker_s=0.3)
        for _ in range(2):
            all_failed(executor.score(batch(1, 2)), 2, "answers 500")
        all_failed(executor.score(batch(1, 2)), 2, "not called: 2 calls in a row failed", "the last one: faulty: ")
        assert len(seen) == 3
        time.sleep(0.35)
        same(executor.score(batch(1, 2)), 1.0, 2.0)
        same(executor.score(batch(1, 2)), 1.0, 2.0)


def test_a_large_batch_is_not_sent() -> None:
    with ExitStack() as stack:
        url, seen = stack.enter_context(scripted_server([health(body_bytes=100), GOOD]))
        settings = ExecutorSettings(kind="http", url=url)
        executor = stack.enter_context(make_executor("faulty", entry("faulty"), settings))
        all_failed(executor.score(batch(1, 2)), 2, "and the service takes 100; send less at a time")
        assert len(seen) == 1


@pytest.mark.parametrize(
    ("first", "words"),
    [
        (health(protocol=2), "speaks protocol 2, this one 1"),
        (health(reward="pickscore"), "the service scores 'pickscore', not 'faulty'; mend name or url"),
        (health(timeout_s=0.4), "timeout_s is 0.4 and the service's own 0.4; make the first longer"),
        (reply(401, b"{}"), "the service refuses a call without token; set token_env"),
        (reply(200, b"hello"), "malformed JSON"),
        (silent, "no complete answer within 0.3 s"),
    ],
)
def test_a_service_that_does_not_fit_is_refused_at_once(first: Answer, words: str) -> None:
    with scripted_server([first]) as (url, _):
        settings = ExecutorSettings(kind="http", url=url, timeout_s=0.4, start_s=0.3)
        with pytest.raises(UserError) as caught:
            make_executor("faulty", entry("faulty"), settings)
    assert words in str(caught.value)


def test_a_service_that_is_not_there_is_said_at_once() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    with pytest.raises(UserError, match=f"no connection to 127.0.0.1:{port}"):
        make_executor("x", entry("faulty"), ExecutorSettings(kind="http", url=f"http://127.0.0.1:{port}"))


def test_args_belong_to_the_service() -> None:
    settings = ExecutorSettings(kind="http", url="http://127.0.0.1:1")
    with pytest.raises(UserError, match="seconds belongs to its service; give it there"):
        make_executor("x", entry("slow", seconds=1.0), settings)


TOKEN = "canary-3f9c1e"


def echo(connection: socket.socket) -> None:
    """Says back what it was sent: in an error, as a hostile or careless server may."""
    body = json.dumps({"error": f"bad header Authorization: Bearer {TOKEN}"}).encode()
    reply(500, body)(connection)


def in_texts(connection: socket.socket) -> None:
    texts = {"valid": [False, True], "errors": [f"got {TOKEN}", None], "details": [None, TOKEN]}
    scores(None, 1.0, **texts, components={TOKEN: [0.0, 0.0]})(connection)


@pytest.mark.parametrize("answer", [echo, in_texts])
def test_the_token_is_sent_and_never_said(answer: Answer, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", TOKEN)
    with ExitStack() as stack:
        executor, seen = opened(stack, answer, token_env="SCORER_TOKEN")
        result = executor.score(batch(1, 2))
    assert all(f"Authorization: Bearer {TOKEN}\r\n".encode() in request for request in seen) and len(seen) == 2
    assert TOKEN not in repr(result) and "***" in repr(result)


@pytest.mark.parametrize(("value", "words"), [("", "not set in the environment"), ("a\r\nX: y", "has spaces")])
def test_a_token_that_cannot_be_sent_is_refused(value: str, words: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCORER_TOKEN", value)
    with pytest.raises(UserError, match=words):
        opened(ExitStack(), token_env="SCORER_TOKEN")


@pytest.mark.wall_clock
def test_closing_ends_a_call() -> None:
    with ExitStack() as stack:
        executor, _ = opened(stack, silent, timeout_s=5.0)
        future = executor.submit(batch(1))
        time.sleep(0.1)
        start = time.perf_counter()
        executor.close()
        assert time.perf_counter() - start < 0.5
        all_failed(future.result(0), 1, "the connection failed")
