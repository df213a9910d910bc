"""Tries a reward out on synthetic pictures before a run depends on it: renders of the embedded world, flat ones,
noise."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from flowrl.config.rewards import declared, parameters_of, scope_of
from flowrl.config.schema import Failures, RewardEntry
from flowrl.errors import UserError
from flowrl.records import RewardBatch
from flowrl.registry import resolve
from flowrl.scoring.rows import take
from flowrl.scoring.runtime import RewardRuntime, Scored

PICTURES = 8
MEMBERS = 4
FRAMES = 4
# By name: scoring and worlds stand on one rank, so neither imports the other.
_MEDIA = "flowrl.worlds.prompts:probe_batch"


def probe(name: str, args: Mapping[str, Any]) -> str:
    """Score synthetic pictures, or videos, with a reward and report what came out.

    The report has validity and range by kind of picture, whether a second call and single calls give the same scores,
    milliseconds a picture, what the reward says of itself, and what is wrong with advice. Raises UserError where the
    reward is unusable: it cannot be loaded, breaks its contract, or gives no picture a score.
    """
    entry = RewardEntry(name=name, args=dict(args))
    scope = scope_of(entry)
    with RewardRuntime((entry,), Failures(), remember=False) as runtime:
        media = _media(takes_videos(name), scope != "sample")
        scored = {kind: runtime.score(batch) for kind, batch in media.items()}
        if not any(result.valid.any() for result in scored.values()):
            errors = [error for result in scored.values() for error in result.errors if error]
            raise UserError(f"reward {name!r} gave none of {PICTURES * len(media)} test pictures a score: {errors[0]}")
        again = {kind: runtime.score(batch) for kind, batch in media.items()}
        parts = {kind: [runtime.score(part) for part in _parts(batch, scope)] for kind, batch in media.items()}
    apart = {kind: np.concatenate([result.scores for result in results]) for kind, results in parts.items()}
    twice = max(_difference(scored[kind].scores, again[kind].scores) for kind in media)
    single = max(_difference(scored[kind].scores, apart[kind]) for kind in media)
    lines = [f"reward {name}", *(_line(kind, result) for kind, result in scored.items())]
    lines.append(f"  same pictures again    {_told(twice)}")
    unit = "picture" if scope == "sample" else "group"
    lines.append(f"  {f'one {unit} a call':<22} {_told(single)}")
    milliseconds = 1000 * sum(result.seconds for result in again.values()) / (PICTURES * len(media))
    *_, height, width, _ = next(iter(media.values())).images.shape
    lines.append(f"  time                   {milliseconds:.3f} ms a picture of {width}x{height}, {PICTURES} a call")
    lines.append(f"  declares               {_declared(name, scope)}")
    problems = _problems(scored, twice, single)
    return "\n".join(lines + [f"problem: {text}" for text in problems] + ([] if problems else ["usable"]))


def takes_videos(name: str) -> bool:
    """Whether a reward scores videos and not pictures, by its attribute media or its parameter ``videos``."""
    media = declared(name, "media")
    if isinstance(media, frozenset):
        return "image" not in media
    parameters = parameters_of(name)
    return "videos" in parameters and "images" not in parameters


def _declared(name: str, scope: str) -> str:
    said = [f"scope {scope}"]
    for attribute in ("media", "backbone", "minimum", "deterministic", "licence", "presets"):
        value = declared(name, attribute)
        if value not in (None, "", False) and value != float("-inf"):
            shown = ", ".join(sorted(value)) if isinstance(value, frozenset | Mapping) else value
            said.append(f"{attribute} {shown}")
    return "; ".join(said)


def _media(videos: bool, grouped: bool) -> dict[str, RewardBatch]:
    """Renders, flat pictures and noise, with references; as videos where asked, in groups of four where asked."""
    make: Callable[[int], RewardBatch] = resolve("reward", _MEDIA)
    world = make(PICTURES)
    if grouped:
        first = [row - row % MEMBERS for row in range(PICTURES)]
        world = dataclasses.replace(
            world,
            prompts=[world.prompts[row] for row in first],
            metadata=[world.metadata[row] for row in first],
            group_ids=first,
        )
    grey = np.arange(PICTURES, dtype=np.uint8) * (255 // PICTURES)
    flat = np.broadcast_to(grey[:, None, None, None], world.images.shape).copy()
    noise = np.random.default_rng(0).integers(256, size=world.images.shape, dtype=np.uint8)
    found = {}
    for kind, images in (("world renders", world.images), ("flat", flat), ("noise", noise)):
        shown = np.stack([np.roll(images, frame, axis=2) for frame in range(FRAMES)], 1) if videos else images
        found[kind] = dataclasses.replace(world, images=shown, reference=np.roll(shown, 1, axis=-2))
    return found


def _parts(batch: RewardBatch, scope: str) -> list[RewardBatch]:
    """The batch in the smallest parts that the reward takes: pictures, or groups."""
    size = 1 if scope == "sample" else MEMBERS
    return [take(batch, range(start, start + size)) for start in range(0, len(batch), size)]


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
