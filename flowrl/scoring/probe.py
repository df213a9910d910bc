"""Tries a reward out on synthetic pictures before a run depends on it: renders of the embedded world, flat ones,
noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flowrl.config.schema import Failures, RewardEntry
from flowrl.errors import UserError
from flowrl.records import RewardBatch
from flowrl.registry import resolve
from flowrl.scoring.runtime import RewardRuntime, Scored

PICTURES = 8
# By name: scoring and worlds stand on one rank, so neither imports the other.
_MEDIA = "flowrl.worlds.prompts:probe_batch"


def probe(name: str, args: Mapping[str, Any]) -> str:
    """Score synthetic pictures with a reward and report what came out.

    The report has validity and range by kind of picture, whether a second call and single calls give the same scores,
    milliseconds a picture, and what is wrong with advice. Raises UserError where the reward is unusable: it cannot be
    loaded, breaks its contract, or gives no picture a score.
    """
    with RewardRuntime((RewardEntry(name=name, args=dict(args)),), Failures()) as runtime:
        media = _media()
        scored = {kind: runtime.score(batch) for kind, batch in media.items()}
        if not any(result.valid.any() for result in scored.values()):
            errors = [error for result in scored.values() for error in result.errors if error]
            raise UserError(f"reward {name!r} gave none of {PICTURES * len(media)} test pictures a score: {errors[0]}")
        again = {kind: runtime.score(batch) for kind, batch in media.items()}
        alone = {kind: [runtime.score(single) for single in _singles(batch)] for kind, batch in media.items()}
    apart = {kind: np.concatenate([result.scores for result in results]) for kind, results in alone.items()}
    twice = max(_difference(scored[kind].scores, again[kind].scores) for kind in media)
    single = max(_difference(scored[kind].scores, apart[kind]) for kind in media)
    lines = [f"reward {name}", *(_line(kind, result) for kind, result in scored.items())]
    lines.append(f"  same pictures again    {_told(twice)}")
    lines.append(f"  one picture a call     {_told(single)}")
    milliseconds = 1000 * sum(result.seconds for result in again.values()) / (PICTURES * len(media))
    height, width = next(iter(media.values())).images.shape[1:3]
    lines.append(f"  time                   {milliseconds:.3f} ms a picture of {width}x{height}, {PICTURES} a call")
    problems = _problems(scored, twice, single)
    return "\n".join(lines + [f"problem: {text}" for text in problems] + ([] if problems else ["usable"]))


def _media() -> dict[str, RewardBatch]:
    make: Callable[[int], RewardBatch] = resolve("reward", _MEDIA)
    world = make(PICTURES)
    grey = np.arange(PICTURES, dtype=np.uint8) * (255 // PICTURES)
    flat = np.broadcast_to(grey[:, None, None, None], world.images.shape).copy()
    noise = np.random.default_rng(0).integers(256, size=world.images.shape, dtype=np.uint8)
    return {
        "world renders": world,
        "flat": dataclasses.replace(world, images=flat),
        "noise": dataclasses.replace(world, images=noise),
    }


def _singles(batch: RewardBatch) -> list[RewardBatch]:
    return [
        RewardBatch(
            batch.images[i : i + 1], batch.prompts[i : i + 1], batch.metadata[i : i + 1], batch.group_ids[i : i + 1]
        )
        for i in range(len(batch))
    ]


def _difference(a: np.ndarray[Any, np.dtype[np.float32]], b: np.ndarray[Any, np.dtype[np.float32]]) -> float:
    """Largest absolute difference; infinite where one has a score and the other has none."""
    if (np.isnan(a) != np.isnan(b)).any():
        return float("inf")
    return float(np.nanmax(np.abs(a - b))) if (~np.isnan(a)).any() else 0.0


def _told(difference: float) -> str:
    return "same scores" if difference == 0 else f"scores differ by up to {difference:.3g}"


def _line(kind: str, result: Scored) -> str:
    found = result.scores[result.valid]
    span = f"min {found.min():.4g}  mean {found.mean():.4g}  max {found.max():.4g}" if len(found) else "no score"
    return f"  {kind:<14} {len(found)}/{len(result.valid)} scored   {span}"


def _problems(scored: Mapping[str, Scored], twice: float, single: float) -> list[str]:
    found = []
    for kind, result in scored.items():
        if not result.valid.all():
            first = next(error for error in result.errors if error)
            count = np.count_nonzero(~result.valid)
            found.append(f"{count} of {len(result.valid)} {kind} pictures got no score: {first}")
    values = np.concatenate([result.scores[result.valid] for result in scored.values()])
    if np.ptp(values) == 0:
        found.append(
            "every picture got the same score: no group would carry a signal; check that it reads the pictures"
        )
    tolerance = 1e-4 * max(1.0, float(np.abs(values).max()))
    if twice > tolerance:
        found.append("a second call gave the same pictures other scores; seed it, or put its model in eval mode")
    elif single > tolerance:
        found.append(
            "a picture's score depends on the pictures beside it, so results would change with batch.micro_batch; "
            "score each picture by itself"
        )
    return found
