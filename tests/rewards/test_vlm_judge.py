"""Judges behind a chat endpoint: what they read, what they refuse, and what a bad server does to them."""

from __future__ import annotations

import base64
import io
import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
import pytest
from flowrl.rewards import endpoint as endpoint_module
from flowrl.rewards.judge import PrefGrpo, Rubric, UnifiedReward, YesNo
from flowrl.rewards.parsing import axis_scores, labelled_number, preferred, shortened, yes_probability
from PIL import Image

from flowrl.errors import UserError

from .checkpoints import batch, pictures

Answer = Callable[[dict[str, Any], int], tuple[int, bytes]]


def says(text: str, first: dict[str, float] | None = None) -> bytes:
    listed = [{"token": token, "logprob": value} for token, value in (first or {}).items()]
    content = {"message": {"content": text}, "logprobs": {"content": [{"top_logprobs": listed}]} if first else None}
    return json.dumps({"choices": [content]}).encode()


class Server(ThreadingHTTPServer):
    """Answers with what ``answer(request body, number of the request)`` gives."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.answer: Answer = lambda body, number: (200, says("?"))
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.lock = threading.Lock()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up before the answer is what some tests are about."""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/v1"


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            number = len(self.server.bodies)
            self.server.bodies.append(body | {"path": self.path})
            self.server.headers.append(dict(self.headers))
        status, answer = self.server.answer(body, number)
        self.send_response(status)
        if status == 302:
            self.send_header("Location", self.server.url + "/elsewhere")
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def do_GET(self) -> None:
        raise AssertionError("a redirect was followed")

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(endpoint_module, "FIRST_PAUSE", 0.01)
    made = Server()
    thread = threading.Thread(target=made.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    yield made
    made.shutdown()
    made.server_close()


def text_of(body: dict[str, Any]) -> str:
    return str(body["messages"][0]["content"][-1]["text"])


def test_yes_no_is_the_share_of_yes(server: Server) -> None:
    logs = {" Yes": math.log(0.3), "yes": math.log(0.1), "No": math.log(0.2), "maybe": math.log(0.4)}
    server.answer = lambda body, number: (200, says("Yes", logs if "cat" in text_of(body) else {"maybe": -0.1}))
    images = pictures(2)
    result = YesNo(server.url, "judge").score(batch(images, ["a {red} cat", "dog"]))
    assert result.scores[0] == pytest.approx(0.4 / 0.6, abs=1e-6) and result.valid.tolist() == [True, False]
    assert np.isnan(result.scores[1]) and "neither yes nor no among the first tokens ['maybe']" in (
        result.errors[1] or ""
    )
    body = next(b for b in server.bodies if "cat" in text_of(b))
    assert (body["max_tokens"], body["logprobs"], body["top_logprobs"], body["temperature"]) == (1, True, 20, 0)
    assert body["path"] == "/v1/chat/completions" and body["model"] == "judge" and "a {red} cat" in text_of(body)
    url = body["messages"][0]["content"][0]["image_url"]["url"]
    sent = Image.open(io.BytesIO(base64.b64decode(url.removeprefix("data:image/png;base64,"))))
    np.testing.assert_array_equal(np.asarray(sent), images[0])


@pytest.mark.wall_clock
def test_rubric_and_order_under_concurrency(server: Server) -> None:
    def answer(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        which = int(text_of(body).split("picture ")[1][0])
        time.sleep(0.05 * (4 - which))
        return 200, says(["Final Score: 5", "so-so.\n**Final Score:** 2.5/5", "Final Score: 9", "good"][which])

    server.answer = answer
    start = time.perf_counter()
    result = Rubric(server.url, "m", concurrency=4).score(batch(pictures(4), [f"picture {i}" for i in range(4)]))
    assert time.perf_counter() - start < 0.45
    assert result.scores[:2].tolist() == [1, 0.375] and result.components["raw"][:2].tolist() == [5, 2.5]
    assert result.valid.tolist() == [True, True, False, False] and np.isnan(result.scores[2:]).all()
    assert "outside 1 to 5" in (result.errors[2] or "") and "no 'Final Score' with a number" in (result.errors[3] or "")
    assert next(iter(result.details)) == "Final Score: 5" and "from 1 to 5" in text_of(server.bodies[0])


def test_unified_reward_both_versions(server: Server) -> None:
    server.answer = lambda body, number: (
        200, says("Alignment Score (1-5): 4\nCoherence Score (1-5): 3.5\n" + ("Style Score (1-5): 2" if number else ""))
    )  # fmt: skip
    first = UnifiedReward(server.url, "m").score(batch(pictures(1)))
    assert not first.valid[0] and "no 'Style Score' with a number" in (first.errors[0] or "")
    result = UnifiedReward(server.url, "m").score(batch(pictures(1)))
    assert result.scores[0] == pytest.approx((0.75 + 0.625 + 0.25) / 3)
    assert {k: float(v[0]) for k, v in result.components.items()} == {"alignment": 4, "coherence": 3.5, "style": 2}
    server.answer = lambda body, number: (200, says("Final Score: 3.5"))
    assert UnifiedReward(server.url, "m", "final").score(batch(pictures(1))).scores[0] == pytest.approx(0.7)


def test_pairs_and_their_win_rates(server: Server) -> None:
    """Through the runtime's pair scope: a judge that likes brightness, and one that likes the first place."""
    from flowrl.scoring.scopes import PairWise

    images = np.stack([np.full((4, 4, 3), value, np.uint8) for value in (10, 200, 90)])

    def brighter(body: dict[str, Any], number: int) -> tuple[int, bytes]:
        urls = [part["image_url"]["url"] for part in body["messages"][0]["content"][:2]]
        one, two = (Image.open(io.BytesIO(base64.b64decode(u.split(",")[1]))).getpixel((0, 0)) for u in urls)
        return 200, says(f"Reasons.\nImage {1 if one > two else 2} is better")  # type: ignore[operator]

    server.answer = brighter
    judge = PrefGrpo(server.url, "m")
    own = batch(images)
    group = type(own)(own.images, own.prompts, own.metadata, group_ids=[7, 7, 7])
    assert PairWise(judge, "pref_grpo").score(group).scores.tolist() == [0, 1, 0.5] and len(server.bodies) == 6
    server.answer = lambda body, number: (200, says("Image 1 is better"))
    assert PairWise(judge, "pref_grpo").score(group).scores.tolist() == [0.5, 0.5, 0.5]
    server.answer = lambda body, number: (200, says("Cannot say"))
    result = judge.compare(own, own)
    assert not result.valid.any() and "no verdict between image 1 and image 2" in (result.errors[0] or "")


def test_words_to_numbers() -> None:
    assert yes_probability({"Yes": 0.0, "yes": -800.0}) == 1 and yes_probability({"no.": -1.0}) == 0
    assert labelled_number("Final Score: 1\nno, Final Score: 4", "final score", 1, 5) == 4
    assert labelled_number("- **Style Score (1-5)**: 3", "Style Score", 1, 5) == 3
    assert axis_scores("A: 1\nB: 2", ["A", "B"], 0, 5) == {"A": 1, "B": 2}
    for text, value in (
        ("Image 2 is better", 0),
        ("image 1 is the better", 1),
        ("Better image: **Image 2**", 0),
        ("a tie", 0.5),
    ):
        assert preferred(text) == value
    assert preferred("Image 1 is better? No: Image 2 is better") == 0
    for text in ("", "Final Score: none", "Final Score 4", "Score: 4"):
        with pytest.raises(ValueError, match="no 'Final Score' with a number"):
            labelled_number(text, "Final Score", 1, 5)
    with pytest.raises(ValueError, match="neither yes nor no"):
        yes_probability({})
    assert yes_probability({"yes": 5.0, "no": 0.0}) == 0.5  # no probability is above 1
    assert (
        labelled_number("Final Score: 1", "Final Score", 1, 5) == 1
        and labelled_number("Final Score: 5", "Final Score", 1, 5) == 5
    )
    assert shortened("a \n b") == "a b" and shortened("x" * 80) == "x" * 80
    assert shortened("x" * 80 + "end") == "..." + "x" * 74 + "end"


def test_retries_what_may_pass_and_nothing_else(server: Server) -> None:
    good = says("Final Score: 3")
    for status, tries in ((500, 3), (429, 3), (408, 3), (400, 1), (401, 1), (302, 1)):
        server.bodies.clear()
        server.answer = lambda body, number, status=status: (200, good) if number == 2 else (status, b"")  # type: ignore[misc]
        result = Rubric(server.url, "m").score(batch(pictures(1)))
        assert result.valid[0] == (tries == 3) and len(server.bodies) == tries
        if tries == 1:
            assert result.errors[0] == f"vlm_rubric: the endpoint answered status {status}"
    server.bodies.clear()
    server.answer = lambda body, number: (503, b"")
    told = Rubric(server.url, "m", retries=1).score(batch(pictures(1))).errors[0] or ""
    assert "gave no answer in 2 tries or 180 s: status 503" in told and len(server.bodies) == 2


@pytest.mark.parametrize(
    ("body", "error"),
    [
        (b"<html>", "no chat completion"),
        (b"{}", "no chat completion"),
        (b'{"choices": []}', "no chat completion"),
        (b'{"choices": [{"message": {"content": null}}]}', "has no text"),
        (b'{"choices": [{"message": {"content": "Final', "no chat completion"),
        (b" " * (4 * 2**20 + 1), "larger than 4194304 bytes"),
    ],
)
def test_malformed_answers_are_invalid(server: Server, body: bytes, error: str) -> None:
    server.answer = lambda request, number: (200, body)
    result = Rubric(server.url, "m").score(batch(pictures(1)))
    assert not result.valid[0] and error in (result.errors[0] or "") and len(server.bodies) == 1


@pytest.mark.wall_clock
def test_a_hang_ends_at_the_deadline(server: Server) -> None:
    server.answer = lambda body, number: (time.sleep(1), (200, says("Final Score: 3")))[1]
    start = time.perf_counter()
    result = Rubric(server.url, "m", timeout=0.15, deadline=0.3, retries=9).score(batch(pictures(1)))
    assert not result.valid[0] and time.perf_counter() - start < 0.8
    assert "gave no answer in 10 tries or 0.3 s: TimeoutError" in (result.errors[0] or "")
    gone = Rubric("http://127.0.0.1:9/v1", "m", retries=1).score(batch(pictures(1)))
    assert "gave no answer in 2 tries" in (gone.errors[0] or "")


def test_the_key_travels_and_is_not_told(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "s3cret-canary")
    server.answer = lambda body, number: (401, b"")
    result = YesNo(server.url, "m", key_variable="JUDGE_KEY").score(batch(pictures(1)))
    assert server.headers[0]["Authorization"] == "Bearer s3cret-canary"
    assert "s3cret" not in repr(result) and "s3cret" not in json.dumps(server.bodies)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: YesNo("file:///etc/passwd", "m"), "judge: url is 'file:///etc/passwd'; use http"),
        (lambda: YesNo("http://u:p@h/v1", "m"), "judge: url holds a password"),
        (lambda: YesNo("http://h/v1", ""), "judge: model is empty"),
        (lambda: YesNo("http://h/v1", "m", key_variable="NOT_SET_HERE"), "variable NOT_SET_HERE is not set"),
        (lambda: YesNo("http://h/v1", "m", "good?"), "vlm_yes_no: question has no {prompt}"),
        (lambda: YesNo("http://h/v1", "m", concurrency=0), "vlm_yes_no: concurrency is 0; use 1 or more"),
        (lambda: YesNo("http://h/v1", "m", timeout=0), "judge: timeout 0"),
        (lambda: Rubric("http://h/v1", "m", low=5, high=5), "vlm_rubric: low is 5, high 5; use low < high"),
        (lambda: UnifiedReward("http://h/v1", "m", "3"), "version is '3'; use axes (2.0) or final (1.5)"),  # type: ignore[arg-type]
    ],
)
def test_wrong_arguments(make: Callable[[], object], message: str) -> None:
    with pytest.raises(UserError) as caught:
        make()
    assert message in str(caught.value)
