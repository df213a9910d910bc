"""Rewards in this process: in a thread beside the rollout, or inline."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from typing import TypeVar

from flowrl.errors import UserError
from flowrl.protocols import Reward
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.deadlines import Late, Runner
from flowrl.scoring.executors.base import Executor
from flowrl.scoring.executors.contract import CallFailed, Residence, told

T = TypeVar("T")
MAX_LEFT_BEHIND = 8
"""Calls that hang at a time before no further one is made: each keeps a thread and a reward."""


class ThreadCaller:
    """A reward in a thread of its own.

    A thread cannot be stopped. One that is late is left behind together with its reward, and the next call gets a new
    thread and a new reward from ``factory``: two calls never run in one reward. offload: see ``Residence``.
    """

    def __init__(self, label: str, factory: Callable[[], Reward], offload: bool = False) -> None:
        self._label = label
        self._factory = factory
        self._offload = offload
        self._runner = Runner(f"flowrl-{label}-call")
        self._reward: Residence | None = None
        self._left_behind: list[Future[None]] = []
        self._opened = False

    def open(self, seconds: float | None) -> None:
        """Make the reward: the first time here and without limit, later in its thread."""
        if self._reward is not None:
            return
        if not self._opened:
            self._opened = True
            self._reward = self._made()
            return
        self._left_behind = [ended for ended in self._left_behind if not ended.done()]
        if len(self._left_behind) >= MAX_LEFT_BEHIND:
            raise CallFailed(f"{self._label}: not called: {len(self._left_behind)} of its calls hang")
        self._reward = self._run(self._made, seconds, "a new one was not ready")

    def call(self, batch: RewardBatch, seconds: float | None, last: bool = True) -> RewardResult:
        reward = self._reward
        if reward is None:
            raise ValueError("call open first")
        return self._run(lambda: reward.score(batch, last), seconds, "no result")

    @property
    def nbytes(self) -> int:
        return 0 if self._reward is None else self._reward.nbytes

    def close(self) -> None:
        self._runner.close()

    def _made(self) -> Residence:
        try:
            return Residence(self._label, self._factory(), self._offload)
        except UserError as error:
            raise CallFailed(str(error), fatal=True) from error
        except CallFailed:
            raise
        except Exception as error:
            raise CallFailed(told(self._label, error), fatal=True) from error

    def _run(self, work: Callable[[], T], seconds: float | None, what: str) -> T:
        ended: Future[None] = Future()

        def noted() -> T:
            try:
                return work()
            finally:
                ended.set_result(None)

        try:
            return self._runner.run(noted, seconds)
        except Late as error:
            self._left_behind.append(ended)
            self._reward = None
            raise CallFailed(f"{self._label}: {what} within {seconds:.3g} s") from error


class InlineCaller(ThreadCaller):
    """A reward in the caller's own thread where no limit is set, so that it can be stepped through in a debugger."""

    def _run(self, work: Callable[[], T], seconds: float | None, what: str) -> T:
        return work() if seconds is None else super()._run(work, seconds, what)


class InlineExecutor(Executor):
    """Scores in ``submit`` itself, which returns a future that is done. What is not a reward's fault passes through it."""

    def submit(self, batch: RewardBatch) -> Future[RewardResult]:
        """Score a batch now. KeyboardInterrupt and SystemExit pass. Raises ValueError after ``close``."""
        self._refuse_when_closed()
        future: Future[RewardResult] = Future()
        future.set_result(self._answer(self._callers[0], batch))
        return future
