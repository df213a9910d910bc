"""Runs the rewards of a run on finished pictures: inline, or in a thread beside the rollout.

A failed reward is a mask, never a number: a sample that any weighted reward could not score has no score. A reward of
weight 0 is a monitor: it is logged, and nothing that it does stops a run or takes a sample away.
"""

from __future__ import annotations

import dataclasses
import time
import traceback
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from flowrl.config.schema import Failures, RewardEntry
from flowrl.errors import UserError
from flowrl.protocols import Reward
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.adapt import load_reward, short_name


class RewardFailure(UserError):
    """Too many samples of an iteration could not be scored."""


@dataclass(frozen=True)
class Scored:
    """Scores of one batch.

    scores: float32 [B], sum over rewards of weight * score, NaN where not valid; valid: bool [B]; errors: the first
    error of a weighted reward, or None, a sample; per_reward: by label, monitors too; seconds: spent in rewards.
    """

    scores: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    errors: Sequence[str | None]
    per_reward: Mapping[str, RewardResult]
    seconds: float


def join(parts: Sequence[Scored]) -> Scored:
    """Put the batches of one iteration together, in order; every part must have the same rewards and components."""

    def rows(results: Sequence[RewardResult]) -> RewardResult:
        return RewardResult(
            scores=np.concatenate([r.scores for r in results]),
            valid=np.concatenate([r.valid for r in results]),
            errors=[error for r in results for error in r.errors],
            components={
                name: np.concatenate(
                    [r.components.get(name, np.full(len(r.scores), np.nan, np.float32)) for r in results]
                )
                for name in dict.fromkeys(name for r in results for name in r.components)
            },
            details=[text for r in results for text in (r.details or [None] * len(r.scores))],
        )

    return Scored(
        scores=np.concatenate([part.scores for part in parts]),
        valid=np.concatenate([part.valid for part in parts]),
        errors=[error for part in parts for error in part.errors],
        per_reward={label: rows([part.per_reward[label] for part in parts]) for label in parts[0].per_reward},
        seconds=sum(part.seconds for part in parts),
    )


def labels(entries: Sequence[RewardEntry]) -> list[str]:
    """What each reward is called in metrics: its key, or the part behind the colon; a second one alike gets ``_2``."""
    found: list[str] = []
    for entry in entries:
        base = short_name(entry.name)
        label, number = base, 1
        while label in found:
            number += 1
            label = f"{base}_{number}"
        found.append(label)
    return found


class RewardRuntime:
    """The rewards of a run, loaded once. Use it as a context manager, or call ``close``.

    Loading raises UserError for every reward, monitors too: a misspelt name is found before a run starts.
    """

    def __init__(self, entries: Sequence[RewardEntry], failures: Failures) -> None:
        for entry in entries:
            if not np.isfinite(entry.weight):
                raise UserError(f"rewards: {entry.name}: weight is {entry.weight}; use a finite number")
        if not any(entry.weight for entry in entries):
            raise UserError("rewards: none has a weight other than 0, so nothing can be scored; give one a weight")
        self.failures = failures
        self.weights = {label: entry.weight for label, entry in zip(labels(entries), entries, strict=True)}
        self._rewards: dict[str, Reward] = {
            label: load_reward(entry) for label, entry in zip(self.weights, entries, strict=True)
        }
        self._executor: ThreadPoolExecutor | None = None
        self._first_error: str | None = None

    def score(self, batch: RewardBatch) -> Scored:
        """Score one batch here and now.

        Raises UserError where a weighted reward breaks its contract (wrong length, shape or dtype); an exception inside
        a reward makes its samples invalid. KeyboardInterrupt and SystemExit pass through.
        """
        _check_batch(batch)
        start = time.perf_counter()
        total = np.zeros(len(batch), np.float64)
        errors: list[str | None] = [None] * len(batch)
        valid = np.ones(len(batch), np.bool_)
        per_reward = {}
        for label, reward in self._rewards.items():
            weight = self.weights[label]
            result = per_reward[label] = _run(label, reward, batch, monitor=weight == 0)
            if weight == 0:
                continue
            total += weight * result.scores.astype(np.float64)
            valid &= result.valid
            errors = [old or new for old, new in zip(errors, result.errors, strict=True)]
        with np.errstate(over="ignore"):
            scores = np.where(valid, total, np.nan).astype(np.float32)
        for row in np.flatnonzero(valid & ~np.isfinite(scores)):
            errors[row] = f"the weighted sum {total[row]:g} is beyond float32; lower the weights"
            scores[row], valid[row] = np.nan, False
        self._first_error = self._first_error or next((error for error in errors if error), None)
        return Scored(scores, valid, errors, per_reward, time.perf_counter() - start)

    def submit(self, batch: RewardBatch) -> Future[Scored]:
        """Score a batch in the background. One worker: batches are scored one after another, in the order submitted.

        ``result()`` raises what ``score`` would. Do not change the batch before that.
        """
        if self._executor is None:
            self._executor = ThreadPoolExecutor(max_workers=1, thread_name_prefix="flowrl-reward")
        return self._executor.submit(self.score, batch)

    def check_failures(self, valid: npt.NDArray[np.bool_]) -> None:
        """Raise RewardFailure when more than ``max_invalid_fraction`` of an iteration's samples are invalid.

        valid: bool [B] of the whole iteration, all processes. The message has the first error since the last check.
        """
        first, self._first_error = self._first_error, None
        invalid = int(np.size(valid) - np.count_nonzero(valid))
        limit = self.failures.max_invalid_fraction
        if invalid <= limit * np.size(valid):
            return
        raise RewardFailure(
            f"{invalid} of {np.size(valid)} samples could not be scored, more than failures.max_invalid_fraction "
            f"({limit:g}) allows; first error: {first or 'in another process, see its log'}; mend the reward"
        )

    def close(self) -> None:
        """Drop what waits and end the worker when its batch is done."""
        if self._executor is not None:
            self._executor.shutdown(wait=True, cancel_futures=True)
            self._executor = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _run(label: str, reward: Reward, batch: RewardBatch, *, monitor: bool) -> RewardResult:
    # A copy: a reward that writes into the pictures must not change what the next one sees.
    own = dataclasses.replace(batch, images=batch.images.copy())
    try:
        return _checked(label, reward.score(own), len(batch))
    except Exception as error:
        # A reward is foreign code: whatever it raises masks its samples. A broken contract is the user's to mend.
        if isinstance(error, UserError) and not monitor:
            raise
        text = _told(label, error)
    count = len(batch)
    return RewardResult(np.full(count, np.nan, np.float32), np.zeros(count, np.bool_), [text] * count)


def _told(label: str, error: Exception) -> str:
    if isinstance(error, UserError):
        return str(error)
    last = traceback.extract_tb(error.__traceback__)[-1]
    return f"{label}: {type(error).__name__}: {error} ({Path(last.filename).name}:{last.lineno})"


def _checked(label: str, result: RewardResult, count: int) -> RewardResult:
    """A result that keeps its contract; scores that are not finite become invalid."""
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
    return dataclasses.replace(result, scores=scores, valid=valid, errors=errors)


def _check_array(label: str, what: str, array: object, dtype: np.dtype[np.generic], count: int) -> None:
    if not isinstance(array, np.ndarray):
        raise UserError(f"reward {label!r}: {what} is {type(array).__name__}; return numpy {dtype} [{count}]")
    if array.dtype != dtype or array.shape != (count,):
        raise UserError(
            f"reward {label!r}: {what} is {array.dtype} {list(array.shape)} for {count} pictures; "
            f"return numpy {dtype} [{count}]"
        )


def _check_batch(batch: RewardBatch) -> None:
    images = batch.images
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] != 3:
        raise ValueError(f"RewardBatch.images: expected uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}")
    counts = {len(images), len(batch.prompts), len(batch.metadata), len(batch.group_ids) or len(images)}
    if len(counts) > 1:
        raise ValueError(
            f"RewardBatch: {len(images)} images, {len(batch.prompts)} prompts, {len(batch.metadata)} metadata, "
            f"{len(batch.group_ids)} group ids; one of each a sample"
        )
