"""Runs the rewards of a run on finished pictures, beside the rollout, and makes one score of them.

A failed reward is a mask, never a number: a sample that any trained reward could not score has no score. A monitor (role
monitor, or weight 0) is logged, and nothing that it does stops a run or takes a sample away, unless another reward is
gated by it. A gold reward is scored at evaluations alone.
"""

from __future__ import annotations

import copy
import threading
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

from flowrl.config.rewards import Shape, declared, read_shaping, reads_latents, scope_of
from flowrl.config.rewards import labels as labels
from flowrl.config.schema import Failures, RewardEntry
from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult
from flowrl.scoring.cache import RewardCache
from flowrl.scoring.combine import in_float32, weighted_sum
from flowrl.scoring.deadlines import fulfil
from flowrl.scoring.executors import Executor, ExecutorSettings, make_executor
from flowrl.scoring.executors.contract import FailedCall
from flowrl.scoring.shaping import Values, shape

DEADLINES = ("timeout_s", "total_s", "breaker", "breaker_s")


class RewardFailure(UserError):
    """Too many samples of an iteration could not be scored."""


@dataclass(frozen=True)
class Scored:
    """Scores of one batch.

    scores: float32 [B], sum over trained rewards of weight * shaped score, NaN where not valid; valid: bool [B]; errors:
    the first error of a trained reward, or None, a sample; per_reward: by label, monitors too, on each reward's own scale;
    seconds: from submission to the last score; shaped: by label, float32 [B], what is made of the rewards that have shaping,
    NaN for none; weights: of the trained rewards, by label; gated: bool [B], without a score because a gate is
    closed, which is no failure.
    """

    scores: npt.NDArray[np.float32]
    valid: npt.NDArray[np.bool_]
    errors: Sequence[str | None]
    per_reward: Mapping[str, RewardResult]
    seconds: float
    shaped: Mapping[str, npt.NDArray[np.float32]] = field(default_factory=dict)
    weights: Mapping[str, float] = field(default_factory=dict)
    gated: npt.NDArray[np.bool_] | None = None

    def channel(self, label: str) -> npt.NDArray[np.float32]:
        """What is trained on of one reward, float32 [B], NaN for none."""
        return self.shaped[label] if label in self.shaped else self.per_reward[label].scores

    @property
    def sound(self) -> npt.NDArray[np.bool_]:
        """bool [B]: which samples no failure took away: those that have a score, and those that a gate left out."""
        return self.valid if self.gated is None else self.valid | self.gated


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
        shaped={label: np.concatenate([part.shaped[label] for part in parts]) for label in parts[0].shaped},
        weights=parts[0].weights,
        gated=np.concatenate([part.sound & ~part.valid for part in parts]),
    )


@dataclass(frozen=True)
class _Member:
    """One reward of a run. weight: 0 where it is not trained on; latents: it reads those of a batch."""

    label: str
    entry: RewardEntry
    executor: Executor
    shapes: Sequence[Shape]
    scope: str
    media: frozenset[str]
    latents: bool

    @property
    def weight(self) -> float:
        return self.entry.weight if self.entry.duty == "train" else 0.0


class RewardRuntime:
    """The rewards of a run, loaded once. Use it as a context manager, or call ``close``.

    Loading raises UserError for every reward, monitors and gold too: a misspelt name is found before a run starts.
    remember: keep the scores of deterministic rewards, so that equal pictures are scored once.
    """

    def __init__(self, entries: Sequence[RewardEntry], failures: Failures, *, remember: bool = True) -> None:
        for entry in entries:
            if not np.isfinite(entry.weight):
                raise UserError(f"rewards: {entry.name}: weight is {entry.weight}; use a finite number")
        if not any(entry.duty == "train" for entry in entries):
            raise UserError("rewards: none has a weight other than 0, so nothing can be scored; give one a weight")
        self.failures = failures
        self._evaluating = False
        self._first_error: str | None = None
        self._members: list[_Member] = []
        try:
            for label, entry in zip(labels(entries), entries, strict=True):
                self._members.append(_member(label, entry, entries, failures, remember))
        except BaseException:
            self.close()
            raise

    @property
    def weights(self) -> dict[str, float]:
        """Label -> weight of the rewards that are scored while training, 0 for monitors."""
        return {member.label: member.weight for member in self._members if member.entry.duty != "gold"}

    @property
    def gold(self) -> dict[str, float]:
        """Label -> weight of the gold rewards."""
        return {member.label: member.entry.weight for member in self._members if member.entry.duty == "gold"}

    @property
    def nbytes(self) -> int:
        """Bytes that the rewards in this process say they hold, by a property ``nbytes``; most do not say."""
        return sum(member.executor.nbytes for member in self._members)

    @property
    def needs_groups(self) -> bool:
        """Whether a batch must hold whole groups: a reward compares the members of a group, or is shaped by rank."""
        return any(
            member.scope != "sample" or any(step.kind == "rank" for step in member.shapes) for member in self._active()
        )

    def for_evaluation(self) -> RewardRuntime:
        """The same rewards, gold ones too, as they judge an evaluation.

        There the score leaves out what is relative to the other pictures of a prompt, and so the same for good weights
        and bad ones: steps of rank, and win rates where another reward is trained on too.
        """
        judges = copy.copy(self)
        judges._evaluating = True
        return judges

    def score(self, batch: RewardBatch) -> Scored:
        """Score one batch here and now, with the deadlines of an iteration of its own.

        Raises UserError where a trained reward breaks its contract (wrong length, shape or dtype); an exception inside
        a reward makes its samples invalid. KeyboardInterrupt and SystemExit pass through.
        """
        self.begin_iteration()
        return self.submit(batch).result()

    def begin_iteration(self) -> None:
        """Start the total deadlines anew."""
        for member in self._members:
            member.executor.begin_iteration()

    def submit(self, batch: RewardBatch) -> Future[Scored]:
        """Score a batch in the background. Each reward scores its batches in the order submitted, one worker at a time.

        ``result()`` raises what ``score`` would. Do not change the batch before that.
        """
        _check_batch(batch)
        members = self._active()
        for member in members:
            _check_media(member, batch)
        start = time.perf_counter()
        whole: Future[Scored] = Future()
        # Pictures that were met before are known to the cache; latents never come twice.
        plain = batch if batch.latents is None else replace(batch, latents=None, text=None)
        parts = [member.executor.submit(batch if member.latents else plain) for member in members]
        left, lock = [len(parts)], threading.Lock()

        def finish() -> Scored:
            return self._combine(members, batch, [part.result() for part in parts], start)

        def done(_: Future[RewardResult]) -> None:
            with lock:
                left[0] -= 1
                if left[0]:
                    return
            if any(part.cancelled() for part in parts):
                whole.cancel()
            else:
                fulfil(whole, finish)

        for part in parts:
            part.add_done_callback(done)
        return whole

    def _active(self) -> list[_Member]:
        return [member for member in self._members if self._evaluating or member.entry.duty != "gold"]

    def _counted(self, members: Sequence[_Member]) -> list[_Member]:
        """Those that make the score."""
        trained = [member for member in members if member.weight]
        absolute = [member for member in trained if member.scope != "pair"] if self._evaluating else trained
        return absolute or trained

    def _combine(
        self, members: Sequence[_Member], batch: RewardBatch, results: Sequence[RewardResult], start: float
    ) -> Scored:
        for member, result in zip(members, results, strict=True):
            if member.weight and isinstance(result, FailedCall) and result.fatal:
                raise UserError(result.reason)
        per_reward = {member.label: result for member, result in zip(members, results, strict=True)}
        counted = self._counted(members)
        shaped, masked, reasons = self._shaped(members, batch, per_reward)
        errors: list[str | None] = [None] * len(batch)
        valid, sound = np.ones(len(batch), np.bool_), np.ones(len(batch), np.bool_)
        for member in counted:
            has = ~np.isnan(shaped[member.label])
            valid &= has
            sound &= has | masked[member.label]
            errors = [old or new for old, new in zip(errors, reasons[member.label], strict=True)]
        channels = np.stack([shaped[member.label] for member in counted], 1)
        total = weighted_sum(channels, [member.weight for member in counted])
        scores = in_float32(total, valid)
        for row in np.flatnonzero(valid & ~np.isfinite(scores)):
            errors[row] = f"the weighted sum {total[row]:g} is beyond float32; lower the weights"
            scores[row], valid[row], sound[row] = np.nan, False, False
        failed = [error for error, ok in zip(errors, sound, strict=True) if error and not ok]
        self._first_error = self._first_error or next(iter(failed), None)
        return Scored(
            scores, valid, errors, per_reward, time.perf_counter() - start,
            {m.label: in_float32(shaped[m.label], ~np.isnan(shaped[m.label])) for m in members if m.shapes},
            {member.label: member.weight for member in counted}, sound & ~valid,
        )  # fmt: skip

    def _shaped(
        self, members: Sequence[_Member], batch: RewardBatch, per_reward: Mapping[str, RewardResult]
    ) -> tuple[dict[str, Values], dict[str, npt.NDArray[np.bool_]], dict[str, list[str | None]]]:
        """By label: shaped values, which samples a gate left out, and why a sample has no value."""
        group = np.asarray(batch.group_ids or range(len(batch)), np.int64)
        native = {
            label: np.where(result.valid, result.scores, np.nan).astype(np.float64)
            for label, result in per_reward.items()
        }
        values, masked, reasons = {}, {}, {}
        for member in members:
            if not member.weight and not member.shapes:
                continue
            label = member.label
            steps = [step for step in member.shapes if step.kind != "rank" or not self._evaluating]
            values[label], masked[label] = shape(native[label], steps, group, native)
            reasons[label] = list(per_reward[label].errors)
            for row in np.flatnonzero(per_reward[label].valid & np.isnan(values[label])):
                reasons[label][row] = _gate_reason(label, steps, int(row), native, per_reward)
        return values, masked, reasons

    def check_failures(self, sound: npt.NDArray[np.bool_]) -> None:
        """Raise RewardFailure when more than ``max_invalid_fraction`` of an iteration's samples failed.

        sound: bool [B] of the whole iteration, all processes (see ``Scored.sound``). The message has the first error
        since the last check.
        """
        first, self._first_error = self._first_error, None
        invalid = int(np.size(sound) - np.count_nonzero(sound))
        limit = self.failures.max_invalid_fraction
        if invalid <= limit * np.size(sound):
            return
        raise RewardFailure(
            f"{invalid} of {np.size(sound)} samples could not be scored, more than failures.max_invalid_fraction "
            f"({limit:g}) allows; first error: {first or 'in another process, see its log'}; mend the reward"
        )

    def close(self) -> None:
        """Drop what waits and end the executors when their batch is done."""
        for member in self._members:
            member.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def _member(
    label: str, entry: RewardEntry, entries: Sequence[RewardEntry], failures: Failures, remember: bool
) -> _Member:
    shapes, problems = read_shaping(entry.shaping)
    known = labels(entries)
    problems += [f"gate: no reward is called {s.by!r}" for s in shapes if s.kind == "gate" and s.by not in known]
    if problems:
        raise UserError(f"rewards: {entry.name}: shaping: " + "; ".join(problems))
    scope = scope_of(entry)
    latents = reads_latents(entry)
    remembers = remember and scope == "sample" and not latents and declared(entry.name, "deterministic") is True
    cache = RewardCache(entry.name, entry.args) if remembers else None
    executor = make_executor(label, entry, settings_of(entry, failures), cache)
    return _Member(label, entry, executor, shapes, scope, declared(entry.name, "media") or frozenset(), latents)


def settings_of(entry: RewardEntry, failures: Failures) -> ExecutorSettings:
    """How a reward is executed: its own settings, and those of ``failures`` where it leaves them open."""
    given = vars(entry.executor)
    shared = {name: vars(failures)[name] for name in DEADLINES if given[name] is None}
    return ExecutorSettings(**{**given, **shared})


def _gate_reason(
    label: str, steps: Sequence[Shape], row: int, native: Mapping[str, Values], per_reward: Mapping[str, RewardResult]
) -> str:
    for step in steps:
        if step.kind == "gate":
            score = native[step.by][row]
            if np.isnan(score):
                return f"{label}: its gate {step.by} has no score: {per_reward[step.by].errors[row]}"
            if step.otherwise is None and not step.at_least <= score <= step.at_most:
                return f"{label}: left out by its gate, where {step.by} is {score:.4g}"
    return f"{label}: shaping gave no number"


def _check_media(member: _Member, batch: RewardBatch) -> None:
    kind = "video" if batch.images.ndim == 5 else "image"
    if member.weight and member.media and kind not in member.media:
        raise UserError(
            f"reward {member.label!r}: scores {' and '.join(sorted(member.media))}s, and these are {kind}s "
            f"{list(batch.images.shape)}; choose another reward or another model"
        )


def _check_batch(batch: RewardBatch) -> None:
    images = batch.images
    if images.dtype != np.uint8 or images.ndim not in (4, 5) or images.shape[-1] != 3:
        raise ValueError(
            f"RewardBatch.images: expected uint8 [B, H, W, 3] or [B, F, H, W, 3], got {images.dtype} {list(images.shape)}"
        )
    references = len(images) if batch.reference is None else len(batch.reference)
    counts = {len(images), len(batch.prompts), len(batch.metadata), len(batch.group_ids) or len(images), references}
    if len(counts) > 1:
        raise ValueError(
            f"RewardBatch: {len(images)} images, {len(batch.prompts)} prompts, {len(batch.metadata)} metadata, "
            f"{len(batch.group_ids)} group ids; one of each a sample"
        )
