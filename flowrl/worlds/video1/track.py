"""Checker of world video1: follows the object of a clip by the detector of world v1 and says whether the clip is as asked.

The largest object of each frame is followed. A straight line through its centres (least squares over the frames that
show one) gives its velocity; how far the centres lie off the line tells a jump or a wobble from a motion.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from flowrl.records import Detection
from flowrl.worlds.v1.detect import detect
from flowrl.worlds.v1.scenes import COLORS, SHAPES
from flowrl.worlds.video1.scenes import DIRECTIONS, SPEEDS

STILL = 0.4  # pixels a frame, below which nothing moves
LIMIT = 1.8  # pixels a frame: midway between the fastest slow and the slowest fast object
TOO_FAST = 4.8
MIN_COSINE = 0.9  # 26 degrees
MAX_WOBBLE = 0.8  # pixels: root mean square distance of the centres from their line

WORDS: dict[str, tuple[str, ...]] = {
    "color": tuple(COLORS),
    "shape": SHAPES,
    "direction": tuple(DIRECTIONS),
    "speed": tuple(SPEEDS),
}


@dataclass(frozen=True)
class Track:
    """What a clip shows: the followed object of each frame (None where there is none), and how many others there are.

    velocity: pixels a frame (x to the right, y down), (0, 0) with fewer than three frames that show an object. wobble: root
    mean square distance of the centres from the line, in pixels, infinite with fewer than three.
    """

    objects: tuple[Detection | None, ...]
    others: tuple[int, ...]
    velocity: tuple[float, float]
    wobble: float

    @property
    def speed(self) -> float:
        """Pixels a frame."""
        return math.hypot(*self.velocity)

    def cosine(self, direction: str) -> float:
        """Cosine of the angle between the motion and ``direction``; 0 where nothing moves."""
        if self.speed < STILL:
            return 0.0
        (dx, dy), (vx, vy) = DIRECTIONS[direction], self.velocity
        return (dx * vx + dy * vy) / self.speed

    def same(self, color: str, shape: str) -> float:
        """Share of the frames that show exactly one object, of this colour and shape."""
        right = [
            found is not None and not others and (found.color, found.label) == (color, shape)
            for found, others in zip(self.objects, self.others, strict=True)
        ]
        return sum(right) / len(right)

    def kept(self) -> float:
        """Largest share of frames that show exactly one object, the same in colour and shape, whichever that is."""
        kinds = {(found.color, found.label) for found in self.objects if found is not None}
        return max((self.same(color, label) for color, label in kinds), default=0.0)


def follow(clips: npt.NDArray[np.uint8]) -> list[Track]:
    """Follow the largest object of each clip. clips: uint8 [B, F, H, W, 3], F >= 3; raises ValueError for another shape."""
    if clips.ndim != 5 or clips.shape[1] < 3 or clips.shape[-1] != 3 or clips.dtype != np.uint8:
        raise ValueError(f"follow: expected uint8 [B, F, H, W, 3] of 3 frames or more, got {list(clips.shape)}")
    count = clips.shape[1]
    found = detect(clips.reshape(-1, *clips.shape[2:]))
    return [_track(found[row * count : (row + 1) * count]) for row in range(len(clips))]


def _track(frames: list[list[Detection]]) -> Track:
    objects = tuple(max(frame, key=_area, default=None) for frame in frames)
    others = tuple(max(0, len(frame) - 1) for frame in frames)
    seen = [(time, *_centre(found)) for time, found in enumerate(objects) if found is not None]
    if len(seen) < 3:
        return Track(objects, others, (0.0, 0.0), math.inf)
    time, centres = np.array(seen)[:, 0], np.array(seen)[:, 1:]
    late, away = time - time.mean(), centres - centres.mean(0)
    velocity = late @ away / (late @ late)
    off = away - late[:, None] * velocity
    return Track(objects, others, (float(velocity[0]), float(velocity[1])), float(np.sqrt((off**2).sum(1).mean())))


def _area(found: Detection) -> float:
    left, top, right, bottom = found.box
    return (right - left) * (bottom - top)


def _centre(found: Detection) -> tuple[float, float]:
    left, top, right, bottom = found.box
    return (left + right) / 2, (top + bottom) / 2


def fault(metadata: Mapping[str, Any]) -> str:
    """What is wrong with a prompt's metadata for this checker, or ""."""
    for key, words in WORDS.items():
        if metadata.get(key) not in words:
            return f"{key} is {metadata.get(key)!r}; the world's words are {', '.join(words)}"
    return ""


def speed_fit(track: Track, speed: str) -> float:
    """How near the object's speed is to what ``speed`` says, in [0, 1]: min(1, v / low, high / v); 1 within, 0 at rest."""
    low, high = (STILL, LIMIT) if speed == "slowly" else (LIMIT, TOO_FAST)
    return min(1.0, track.speed / low, high / track.speed) if track.speed >= STILL else 0.0


def direction_fits(track: Track, direction: str) -> bool:
    """Whether the object moves along ``direction``, within 26 degrees."""
    return track.cosine(direction) >= MIN_COSINE


def strict_reason(track: Track, metadata: Mapping[str, Any]) -> str:
    """The first thing in which a clip differs from its prompt, or "" where everything holds."""
    color, shape = metadata["color"], metadata["shape"]
    same = track.same(color, shape)
    if same < 1:
        return f"{round((1 - same) * len(track.objects))} frames without one {color} {shape}"
    if track.speed < STILL:
        return "nothing moves"
    if not direction_fits(track, metadata["direction"]):
        return f"moves ({track.velocity[0]:+.1f}, {track.velocity[1]:+.1f}) a frame, not {metadata['direction']}"
    if speed_fit(track, metadata["speed"]) < 1:
        return f"moves {track.speed:.1f} pixels a frame, not {metadata['speed']}"
    if track.wobble > MAX_WOBBLE:
        return f"strays {track.wobble:.1f} pixels from its line"
    return ""
