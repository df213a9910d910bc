"""A client of chat endpoints in OpenAI's form (vLLM, SGLang, hosted ones): JSON over HTTP, pictures as PNG in the message.

Retried: connection errors, time-outs, 408, 429 and 5xx, with exponential back-off, at most until the deadline. Any other
status fails at once; redirects are not followed, proxies not used; a body above the limit is not read to its end. The
key comes from an environment variable and is shown nowhere.
"""

from __future__ import annotations

import base64
import http.client
import io
import json
import math
import os
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from flowrl.errors import UserError
from flowrl.scoring.redact import hide

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt

RETRIED = frozenset({408, 429, 500, 502, 503, 504})
MAX_BODY = 4 * 2**20
FIRST_PAUSE = 0.5  # seconds; doubles with each try
LONGEST_PAUSE = 8.0


class EndpointError(Exception):
    """The endpoint gave no usable answer; the sample is invalid."""


@dataclass(frozen=True)
class Reply:
    """The text of an answer, and for its first token the log-probabilities of the likeliest tokens."""

    text: str
    first_token: Mapping[str, float] = field(default_factory=dict)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, req: Any, fp: Any, code: int, msg: str, headers: Any, newurl: str) -> None:
        """Leave the redirect as an error."""


class Endpoint:
    """``chat`` posts to ``<url>/chat/completions``.

    url: http or https, up to and with ``/v1``; model: as the server calls it; key_variable: environment variable with the
    bearer token, "" for none; timeout: seconds a try; deadline: seconds for one answer, retries and pauses included.
    """

    def __init__(
        self, url: str, model: str, key_variable: str = "", timeout: float = 60.0, deadline: float = 180.0,
        retries: int = 3,
    ) -> None:  # fmt: skip
        parts = urllib.parse.urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"judge: url is {url!r}; use http(s)://host:port/v1 of an OpenAI-compatible server")
        if parts.username or parts.password:
            raise UserError(
                "judge: url holds a password; put the key in an environment variable and name it in key_variable"
            )
        if not model:
            raise UserError("judge: model is empty; name it as the server does")
        if not (timeout > 0 and deadline > 0 and retries >= 0):
            raise UserError(
                f"judge: timeout {timeout}, deadline {deadline}, retries {retries}; use seconds above 0, retries from 0"
            )
        if key_variable and key_variable not in os.environ:
            raise UserError(f"judge: the environment variable {key_variable} is not set; put the key there")
        self._url = url.rstrip("/") + "/chat/completions"
        self.model = model
        self._key = os.environ[key_variable] if key_variable else ""
        self.timeout, self.deadline, self.retries = timeout, deadline, retries
        self._opener = urllib.request.build_opener(_NoRedirect, urllib.request.ProxyHandler({}))

    def chat(
        self, text: str, pictures: Sequence[npt.NDArray[np.uint8]], max_tokens: int = 512, top_logprobs: int = 0
    ) -> Reply:
        """Ask one question about pictures (uint8 [H, W, 3], shown before the text) at temperature 0.

        Raises EndpointError where there is no usable answer.
        """
        content: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": data_url(p)}} for p in pictures]
        content.append({"type": "text", "text": text})
        body: dict[str, Any] = {
            "model": self.model,
            "messages": [{"role": "user", "content": content}],
            "max_tokens": max_tokens,
            "temperature": 0.0,
        }
        if top_logprobs:
            body |= {"logprobs": True, "top_logprobs": top_logprobs}
        try:
            reply = read_reply(self._post(json.dumps(body, allow_nan=False).encode(), time.monotonic() + self.deadline))
        except EndpointError as error:
            raise EndpointError(hide(str(error), self._key)) from error
        # What a judge says stands beside its pictures in reports: it may have said back what it was sent.
        return Reply(hide(reply.text, self._key), reply.first_token)

    def _post(self, body: bytes, until: float) -> bytes:
        headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {self._key}"} if self._key else {})
        problem = "no time left"
        for attempt in range(self.retries + 1):
            left = until - time.monotonic()
            if left <= 0:
                break
            request = urllib.request.Request(self._url, body, headers, method="POST")  # noqa: S310  http(s) only, checked
            try:
                with self._opener.open(request, timeout=min(self.timeout, left)) as answer:
                    return read_limited(answer, until)
            except urllib.error.HTTPError as error:
                problem = f"status {error.code}"
                error.close()
                if error.code not in RETRIED:
                    raise EndpointError(f"the endpoint answered {problem}") from error
            except (OSError, http.client.HTTPException) as error:
                problem = f"{type(error).__name__}: {error}"
            if attempt < self.retries:
                pause = min(FIRST_PAUSE * 2**attempt, LONGEST_PAUSE)
                time.sleep(max(0.0, min(pause, until - time.monotonic())))
        raise EndpointError(
            f"the endpoint gave no answer in {self.retries + 1} tries or {self.deadline:g} s: {problem}"
        )


def read_limited(answer: Any, until: float) -> bytes:
    """The body of an answer, at most MAX_BODY bytes and not beyond a time of ``time.monotonic``.

    Raises EndpointError for a larger one, TimeoutError for one that trickles in too slowly.
    """
    parts, size = [], 0
    while chunk := answer.read1(65536):
        parts.append(chunk)
        size += len(chunk)
        if size > MAX_BODY:
            raise EndpointError(f"the endpoint's answer is larger than {MAX_BODY} bytes")
        if time.monotonic() > until:
            raise TimeoutError("the answer came too slowly")
    return b"".join(parts)


def read_reply(body: bytes) -> Reply:
    """Text and first-token log-probabilities of a chat completion. Raises EndpointError where it is malformed."""
    try:
        choice = json.loads(body)["choices"][0]
        text = choice["message"]["content"]
        tokens = (choice.get("logprobs") or {}).get("content") or []
        listed = tokens[0]["top_logprobs"] if tokens else []
        first: dict[str, float] = {}
        for item in listed:
            value = float(item["logprob"])
            if not math.isnan(value):
                first[str(item["token"])] = max(value, first.get(str(item["token"]), -math.inf))
    except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise EndpointError(f"the endpoint's answer is no chat completion ({type(error).__name__}: {error})") from error
    if not isinstance(text, str):
        raise EndpointError("the endpoint's answer has no text")
    return Reply(text, first)


def data_url(picture: npt.NDArray[np.uint8]) -> str:
    """A picture, uint8 [H, W, 3], as a PNG data URL: JPEG would hide the grid texture that a judge should punish."""
    from PIL import Image

    png = io.BytesIO()
    Image.fromarray(picture).save(png, "PNG")
    return "data:image/png;base64," + base64.b64encode(png.getvalue()).decode()
