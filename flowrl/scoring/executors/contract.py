"""What every executor does with a reward's answer: check it, and make a mask of a failure."""

from __future__ import annotations

import dataclasses
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, runtime_checkable

import numpy as np

from flowrl.errors import UserError
from flowrl.protocols import Reward
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.redact import hide
from flowrl.scoring.wire import MAX_TEXT


class CallFailed(Exception):
    """One call of a reward gave no result.

    retry: another try may succeed (a network that failed, a process that died); fatal: the reward breaks its contract
    (wrong length, type or argument), which no retry mends.
    """

    def __init__(self, text: str, *, retry: bool = False, fatal: bool = False) -> None:
        super().__init__(hide(text)[:MAX_TEXT])
        self.retry = retry
        self.fatal = fatal


@dataclass(frozen=True)
class FailedCall(RewardResult):
    """The result of a call that failed: no sample is valid, each has ``reason`` as its error. fatal: see CallFailed."""

    reason: str = ""
    fatal: bool = False


def failed_call(count: int, reason: str, *, fatal: bool = False) -> FailedCall:
    """The result of ``count`` samples that a failed call leaves: NaN, False, ``reason`` for each."""
    scores = np.full(count, np.nan, np.float32)
    return FailedCall(scores, np.zeros(count, np.bool_), [reason] * count, reason=reason, fatal=fatal)


def score_checked(label: str, reward: Reward, batch: RewardBatch) -> RewardResult:
    """Score a copy of the batch and check the result. Raises CallFailed for whatever the reward raises but
    KeyboardInterrupt and SystemExit, which pass."""
    # A copy: a reward that writes into the pictures, now or after its deadline, must not change what others see.
    own = dataclasses.replace(batch, images=batch.images.copy())
    try:
        return checked(label, reward.score(own), len(batch))
    except UserError as error:
        raise CallFailed(str(error), fatal=True) from error
    except Exception as error:
        raise CallFailed(told(label, error)) from error


@runtime_checkable
class Movable(Protocol):
    """What can leave its device and come back."""

    def offload(self) -> None: ...

    def onload(self) -> None: ...


class Residence:
    """A reward that is on its device only while there is something to score, where that is wanted.

    wanted: call its ``offload`` now and after each call that is the last one for now, and its ``onload`` before the next.
    Raises UserError where it has no such methods, CallFailed where its ``offload`` raises.
    """

    def __init__(self, label: str, reward: Reward, wanted: bool) -> None:
        self._label, self._reward = label, reward
        self._movable: Movable | None = None
        self._away = False
        if wanted:
            if not isinstance(reward, Movable):
                raise UserError(f"reward {label!r}: it has no offload() and onload() to be called; remove offload")
            self._movable = reward
            self._leave(reward)

    @property
    def nbytes(self) -> int:
        """Bytes that the reward says it holds; 0 where it does not say."""
        return int(getattr(self._reward, "nbytes", 0))

    def score(self, batch: RewardBatch, last: bool) -> RewardResult:
        """``score_checked``; raises CallFailed for what moving the reward raises, too."""
        if self._movable is None:
            return score_checked(self._label, self._reward, batch)
        if self._away:
            self._moved(self._movable.onload)
            self._away = False
        try:
            return score_checked(self._label, self._reward, batch)
        finally:
            if last:
                self._leave(self._movable)

    def _leave(self, reward: Movable) -> None:
        self._away = True  # first: half moved is not ready either
        self._moved(reward.offload)

    def _moved(self, move: Callable[[], None]) -> None:
        try:
            move()
        except Exception as error:
            raise CallFailed(told(self._label, error)) from error


def told(label: str, error: Exception) -> str:
    """Say what a reward raised, and where."""
    frames = traceback.extract_tb(error.__traceback__)
    place = f" ({Path(frames[-1].filename).name}:{frames[-1].lineno})" if frames else ""
    return f"{label}: {type(error).__name__}: {error}{place}"


def checked(label: str, result: RewardResult, count: int) -> RewardResult:
    """A result that keeps its contract; scores that are not finite become invalid, and no text holds a secret.

    Raises UserError for a wrong type, dtype or length.
    """
    if not isinstance(result, RewardResult):
        raise UserError(f"reward {label!r}: score() returned {type(result).__name__}; return a RewardResult")
    for what, array, dtype in (("scores", result.scores, np.float32), ("valid", result.valid, np.bool_)):
        _check_array(label, what, array, np.dtype(dtype), count)
    for what, array in result.components.items():
        _check_array(label, f"components[{what!r}]", array, np.dtype(np.float32), count)
    for what, texts in (("errors", result.errors), ("details", result.details or [None] * count)):
        if len(texts) != count:
            raise UserError(f"reward {label!r}: {len(texts)} {what} for {count} pictures; return one a picture")
    errors = list(result.errors)
    valid = result.valid & np.isfinite(result.scores)
    for row in np.flatnonzero(~valid):
        if errors[row] is None:
            finite = f"score is {result.scores[row]}, which is not finite"
            errors[row] = f"{label}: {finite if result.valid[row] else 'no valid score'}"
    for row in np.flatnonzero(valid):
        errors[row] = None
    scores = np.where(valid, result.scores, np.float32(np.nan)).astype(np.float32)
    return dataclasses.replace(
        result,
        scores=scores,
        valid=valid,
        errors=[text and hide(text) for text in errors],
        details=[text and hide(text) for text in result.details],
    )


def _check_array(label: str, what: str, array: object, dtype: np.dtype[np.generic], count: int) -> None:
    if not isinstance(array, np.ndarray):
        raise UserError(f"reward {label!r}: {what} is {type(array).__name__}; return numpy {dtype} [{count}]")
    if array.dtype != dtype or array.shape != (count,):
        raise UserError(
            f"reward {label!r}: {what} is {array.dtype} {list(array.shape)} for {count} pictures; "
            f"return numpy {dtype} [{count}]"
        )
