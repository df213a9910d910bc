"""A reward behind HTTP."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flowrl.config.rewards import short_name
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.executors.contract import CallFailed

if TYPE_CHECKING:
    from flowrl.scoring.client import ScoreClient


def served_name(name: str) -> str:
    """What a service calls its reward: a registry key with its preset, which sets the scale, or what is behind a colon."""
    return name if ":" not in name else short_name(name)


class HttpCaller:
    """A service of ``flowrl rewards serve``, or one that speaks like it.

    Opening it checks the protocol, that the service has the reward ``expected`` ("" for any), and that it gives up
    before this side does (``timeout_s``): otherwise it would go on with calls that nobody waits for.
    """

    def __init__(self, label: str, client: ScoreClient, expected: str, timeout_s: float | None) -> None:
        self._label = label
        self._client = client
        self._expected = expected
        self._timeout_s = timeout_s
        self._opened = False

    def open(self, seconds: float | None) -> None:
        """Ask the service who it is, once."""
        if self._opened:
            return
        said = self._client.health(seconds)
        name, limit = said.get("reward"), said.get("timeout_s")
        if self._expected and name != self._expected:
            raise CallFailed(
                f"{self._label}: the service scores {str(name)[:80]!r}, not {self._expected!r}; mend name or url",
                fatal=True,
            )
        if self._timeout_s is not None and isinstance(limit, int | float) and limit >= self._timeout_s:
            raise CallFailed(
                f"{self._label}: timeout_s is {self._timeout_s:g} and the service's own {limit:g}; make the first longer",
                fatal=True,
            )
        self._opened = True

    def call(self, batch: RewardBatch, seconds: float | None, last: bool = True) -> RewardResult:
        return self._client.score(batch, seconds)

    def close(self) -> None:
        self._client.close()
