"""The scoring service: what it answers, whom it refuses before it reads, and what it never takes."""

from __future__ import annotations

import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import pytest

from flowrl import __version__
from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring import wire
from flowrl.scoring.executors import ExecutorSettings, FailedCall, make_executor
from flowrl.scoring.service import RewardService, ServiceSettings, serve
from flowrl.scoring.wire import JSON_TYPE, SAFETENSORS_TYPE, Limits

from .executor_tools import batch, entry
from .test_executors import all_failed, same

SMALL = Limits(body_bytes=20_000, pixels=1000, samples=8)


@pytest.fixture(scope="module")
def service() -> Iterator[RewardService]:
    with RewardService(entry("faulty"), ServiceSettings(port=0, limits=SMALL, read_s=0.4)) as made:
        yield made


def ask(
    service: RewardService, method: str, path: str, body: bytes | None = None, **headers: str
) -> tuple[int, dict[str, Any]]:
    """Status and content of one plain request; an underscore in a header's name is a dash."""
    host, _, port = service.url.removeprefix("http://").rpartition(":")
    connection = http.client.HTTPConnection(host.strip("[]"), int(port), timeout=5)
    try:
        connection.request(method, path, body, {key.replace("_", "-"): value for key, value in headers.items()})
        response = connection.getresponse()
        assert response.getheader("Content-Type") == JSON_TYPE
        return response.status, json.loads(response.read())
    finally:
        connection.close()


def raw(service: RewardService, data: bytes) -> bytes:
    """What comes back for these bytes until the service hangs up."""
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as connection:
        connection.sendall(data)
        connection.settimeout(3)
        answer = b""
        while chunk := connection.recv(65536):
            answer += chunk
        return answer


def test_health_says_who_it_is(service: RewardService) -> None:
    status, said = ask(service, "GET", "/health")
    assert status == 200
    assert said == {
        "protocol": wire.PROTOCOL,
        "flowrl": __version__,
        "reward": "faulty",
        "timeout_s": 100.0,
        "body_bytes": 20_000,
    }


@pytest.mark.parametrize("encoding", ["png", "safetensors"])
def test_both_forms_are_scored(service: RewardService, encoding: str) -> None:
    content_type, body = wire.pack_http(batch(3, 250), encoding)
    status, said = ask(service, "POST", "/score", body, Content_Type=content_type)
    assert status == 200 and said["protocol"] == wire.PROTOCOL
    assert said["result"]["scores"] == [3.0, 250.0] and said["result"]["valid"] == [True, True]


def test_a_failed_call_is_said_and_is_no_result(service: RewardService) -> None:
    body = wire.pack_http(batch(3, prompt="raise"), "png")[1]
    status, said = ask(service, "POST", "/score", body, Content_Type=JSON_TYPE)
    assert status == 200 and "result" not in said and said["fatal"] is False
    assert "faulty: RuntimeError: the model fell over" in said["failed"]


def big(side: int) -> RewardBatch:
    return RewardBatch(np.zeros((1, side, side, 3), np.uint8), ["p"], [{}])


@pytest.mark.parametrize(
    ("method", "path", "body", "headers", "status", "words"),
    [
        ("GET", "/", None, {}, 404, "there is no GET /; use GET /health or POST /score"),
        ("GET", "/../../etc/passwd", None, {}, 404, "there is no GET"),
        ("GET", "/score", None, {}, 404, "there is no GET /score"),
        ("POST", "/health", b"{}", {}, 404, "there is no POST /health"),
        (
            "POST",
            "/score",
            b"{}",
            {"Content_Type": "text/plain"},
            400,
            "use application/json or application/x-safetensors",
        ),
        ("POST", "/score", b"\x80\x04K\x01.", {"Content_Type": "application/octet-stream"}, 400, "content type"),
        ("POST", "/score", b"{", {"Content_Type": JSON_TYPE}, 400, "malformed JSON"),
        ("POST", "/score", b"{}", {"Content_Type": JSON_TYPE}, 400, "speaks protocol None, this one 1"),
        ("POST", "/score", b" " * 20_001, {"Content_Type": JSON_TYPE}, 413, "20001 bytes, at most 20000 are taken"),
        ("POST", "/score", b"x", {"Content_Length": "9" * 30}, 411, "no Content-Length"),
        ("POST", "/score", b"x", {"Content_Length": "-1"}, 411, "no Content-Length"),
        ("POST", "/score", wire.pack_http(big(40), "png")[1], {"Content_Type": JSON_TYPE}, 400, "1600 pixels, at most"),
        ("GET", "/health", None, {"Host": "evil.example.com"}, 403, "the Host header names another machine"),
    ],
)
def test_what_does_not_fit_is_refused(
    service: RewardService, method: str, path: str, body: bytes | None, headers: dict[str, str], status: int, words: str
) -> None:
    found, said = ask(service, method, path, body, **headers)
    assert found == status and words in said["error"]


def test_a_path_or_an_address_in_a_request_is_refused(service: RewardService) -> None:
    request = json.loads(wire.pack_http(batch(1), "png")[1])
    for key in ("path", "url", "video_path"):
        changed = json.dumps(request | {key: "http://127.0.0.1/x"}).encode()
        status, said = ask(service, "POST", "/score", changed, Content_Type=JSON_TYPE)
        assert status == 400 and f"unknown or missing key {key!r}" in said["error"]


def test_chunks_are_refused(service: RewardService) -> None:
    request = b"POST /score HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\n\r\n"
    assert raw(service, request).startswith(b"HTTP/1.0 411 ")


@pytest.mark.wall_clock
@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"POST /score HTTP/1.1\r\nHost: localhost\r\n",
        b"POST /score HTTP/1.1\r\nHost: localhost\r\nContent-Length: 100\r\n\r\n{}",
    ],
)
def test_a_request_that_does_not_arrive_is_hung_up_on(service: RewardService, data: bytes) -> None:
    start = time.perf_counter()
    raw(service, data)
    assert 0.3 < time.perf_counter() - start < 1.2


@pytest.mark.wall_clock
def test_a_request_that_trickles_in_is_hung_up_on(service: RewardService) -> None:
    with socket.create_connection(("127.0.0.1", int(service.url.rpartition(":")[2]))) as connection:
        start = time.perf_counter()
        try:
            for _ in range(100):
                connection.sendall(b"G")
                time.sleep(0.03)
        except OSError:
            pass
        assert 0.3 < time.perf_counter() - start < 1.2


TOKEN = "canary-77a0b2"


@pytest.mark.parametrize(
    ("given", "status"),
    [
        (f"Bearer {TOKEN}", 200),
        (f"Bearer {TOKEN}x", 401),
        ("Bearer ", 401),
        (TOKEN, 401),
        ("Bearer caf\xe9", 401),
        ("", 401),
    ],
)
def test_a_token_is_asked_for_everything(given: str, status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_TOKEN", TOKEN)
    headers = {"Authorization": given.encode("latin-1").decode("latin-1")} if given else {}
    with RewardService(entry("faulty"), ServiceSettings(port=0, token_env="SERVE_TOKEN")) as service:
        assert ask(service, "GET", "/health", **headers)[0] == status
        body = wire.pack_http(batch(1), "png")[1]
        found, said = ask(service, "POST", "/score", body, Content_Type=JSON_TYPE, **headers)
        assert found == status and TOKEN not in json.dumps(said)


def test_client_and_service_with_a_token(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SERVE_TOKEN", TOKEN)
    with ExitStack() as stack:
        service = stack.enter_context(
            RewardService(entry("faulty"), ServiceSettings(port=0, token_env="SERVE_TOKEN", timeout_s=10.0))
        )
        settings = {"kind": "http", "url": service.url, "retries": 0}
        good = ExecutorSettings(**settings, token_env="SERVE_TOKEN")  # type: ignore[arg-type]
        executor = stack.enter_context(make_executor("faulty", entry("faulty"), good))
        same(executor.score(batch(1, 2)), 1.0, 2.0)
        with pytest.raises(UserError, match="refuses a call without token; set token_env"):
            make_executor("faulty", entry("faulty"), ExecutorSettings(**settings))  # type: ignore[arg-type]
        monkeypatch.setenv("WRONG_TOKEN", "x")
        with pytest.raises(UserError, match="refuses the token of WRONG_TOKEN"):
            make_executor("faulty", entry("faulty"), ExecutorSettings(**settings, token_env="WRONG_TOKEN"))  # type: ignore[arg-type]


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "", "example.com"])
def test_other_machines_need_a_token(host: str) -> None:
    with pytest.raises(UserError, match="is open to other machines; set a token"):
        RewardService(entry("faulty"), ServiceSettings(host=host, port=0))


def test_a_port_that_is_taken_and_a_token_that_is_not_set_are_said(
    service: RewardService, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UserError, match="cannot be bound"):
        RewardService(entry("faulty"), ServiceSettings(port=int(service.url.rpartition(":")[2])))
    monkeypatch.delenv("SERVE_TOKEN", raising=False)
    with pytest.raises(UserError, match="SERVE_TOKEN, which is not set"):
        RewardService(entry("faulty"), ServiceSettings(port=0, token_env="SERVE_TOKEN"))
    with pytest.raises(UserError, match="has no 'nothing'"):
        RewardService(entry("nothing"), ServiceSettings(port=0))


@pytest.mark.wall_clock
def test_too_many_requests_are_told_to_come_back() -> None:
    release = threading.Event()

    class Waits:
        name = "waits"

        def score(self, batch: RewardBatch) -> RewardResult:
            release.wait(3)
            return RewardResult(np.zeros(1, np.float32), np.ones(1, np.bool_), [None])

    with RewardService(Waits, ServiceSettings(port=0, requests=1), name="waits") as service:
        body = wire.pack_http(batch(1), "png")[1]
        found: list[int] = []
        post = ("POST", "/score", body)
        thread = threading.Thread(target=lambda: found.append(ask(service, *post, Content_Type=JSON_TYPE)[0]))
        thread.start()
        time.sleep(0.1)
        assert raw(service, b"GET /health HTTP/1.0\r\nHost: localhost\r\n\r\n").startswith(b"HTTP/1.0 503 ")
        release.set()
        thread.join(3)
        assert found == [200]
        until = time.monotonic() + 2  # the place is free a moment after the answer has gone out
        while (status := ask(service, "GET", "/health")[0]) == 503 and time.monotonic() < until:
            time.sleep(0.02)
        assert status == 200


def test_a_service_that_dies_in_mid_run_masks_and_a_new_one_scores() -> None:
    service = RewardService(entry("faulty"), ServiceSettings(port=0, timeout_s=10.0))
    service.start()
    port = int(service.url.rpartition(":")[2])
    settings = ExecutorSettings(kind="http", url=service.url, retries=0, timeout_s=20.0)
    with make_executor("faulty", entry("faulty"), settings) as executor:
        same(executor.score(batch(3)), 3.0)
        service.close()
        result = executor.score(batch(1, 2))
        all_failed(result, 2, f"no connection to 127.0.0.1:{port}")
        assert isinstance(result, FailedCall) and not result.fatal
        with RewardService(entry("faulty"), ServiceSettings(port=port, timeout_s=10.0)):
            same(executor.score(batch(200, 7)), 200.0, 7.0)


def test_serve_announces_its_address_and_ends_on_ctrl_c(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []

    def interrupted(self: RewardService) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(RewardService, "serve_forever", interrupted)
    with pytest.raises(KeyboardInterrupt):
        serve(entry("faulty"), ServiceSettings(port=0), said.append)
    assert len(said) == 1 and said[0].startswith("faulty at http://127.0.0.1:")


def test_safetensors_is_the_content_type_of_tensors() -> None:
    assert wire.pack_http(batch(1), "safetensors")[0] == SAFETENSORS_TYPE
