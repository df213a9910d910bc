"""How one reward is executed."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from flowrl.errors import UserError

Kind = Literal["inline", "thread", "process", "worker", "http"]
Encoding = Literal["safetensors", "png"]


@dataclass(frozen=True, kw_only=True)
class ExecutorSettings:
    """How one reward is executed. Raises UserError for a value out of range or one that its kind does not take.

    kind: ``inline`` (in the caller, one batch after another), ``thread`` (beside the rollout), ``process`` (a process of
    this interpreter), ``worker`` (a process of the interpreter ``python``), ``http`` (a service at ``url``).
    timeout_s: seconds a call may take, None without limit; total_s: seconds an iteration may spend in calls (time in
    which at least one runs, so a rollout between two of them does not count), None without limit; start_s: seconds
    until a process has loaded its reward, or a service answers ``/health``.
    workers: calls at a time, each with a reward of its own; queue: batches that wait before ``submit`` waits too.
    retries: further tries after a failure that may pass (no connection, 408, 429, 5xx, no answer over HTTP, a process
    that died), after ``backoff_s`` seconds, doubled each time. breaker: failed calls in a row after which the reward is
    not called for ``breaker_s`` seconds; 0 never.
    token_env: the environment variable that holds the service's bearer token, "" for none; allow: hosts, ``host:port``
    or networks (10.0.0.0/8) that the client may reach beside this machine (see ``flowrl.scoring.client``).
    encoding: how pictures travel to a process or a service; body_bytes: the largest answer taken from one.
    """

    kind: Kind = "thread"
    timeout_s: float | None = 120.0
    total_s: float | None = 600.0
    start_s: float = 300.0
    workers: int = 1
    queue: int = 64
    retries: int = 2
    backoff_s: float = 0.5
    breaker: int = 5
    breaker_s: float = 30.0
    python: str = ""
    url: str = ""
    token_env: str = ""
    allow: tuple[str, ...] = ()
    encoding: Encoding = "safetensors"
    body_bytes: int = 16 << 20

    def __post_init__(self) -> None:
        problems = [*self._numbers(), *self._choices(), *self._fields_of_kinds()]
        if problems:
            raise UserError("executor: " + "; ".join(problems))

    def _numbers(self) -> list[str]:
        seconds = {"timeout_s": self.timeout_s, "total_s": self.total_s, "start_s": self.start_s}
        found = [f"{key} is {value}; use seconds above 0" for key, value in seconds.items() if not _positive(value)]
        counts = (("workers", self.workers, 1), ("queue", self.queue, 1), ("retries", self.retries, 0))
        for key, value, least in (*counts, ("breaker", self.breaker, 0), ("body_bytes", self.body_bytes, 1)):
            if value < least:
                found.append(f"{key} is {value}; use {least} or more")
        for key, pause in (("backoff_s", self.backoff_s), ("breaker_s", self.breaker_s)):
            if not (math.isfinite(pause) and pause >= 0):
                found.append(f"{key} is {pause}; use seconds, 0 or more")
        return found

    def _choices(self) -> list[str]:
        choices = (("kind", self.kind, get_args(Kind)), ("encoding", self.encoding, get_args(Encoding)))
        return [f"{key} is {value!r}; use {', '.join(known)}" for key, value, known in choices if value not in known]

    def _fields_of_kinds(self) -> list[str]:
        found = []
        for kind, key, value in (("worker", "python", self.python), ("http", "url", self.url)):
            if kind == self.kind and not value:
                found.append(f"kind {kind} needs {key}")
        given = (("worker", "python", self.python), ("http", "url", self.url), ("http", "token_env", self.token_env))
        for kind, key, text in (*given, ("http", "allow", ", ".join(self.allow))):
            if kind != self.kind and text:
                found.append(f"{key} belongs to kind {kind}, and kind is {self.kind}; remove it")
        if self.kind == "inline" and self.workers > 1:
            found.append("kind inline has one worker; use kind thread")
        return found


def _positive(value: float | None) -> bool:
    return value is None or (math.isfinite(value) and value > 0)
