"""Rewards of the embedded video world: does the object move as the caption says, stay itself, and move smoothly.

All read one track a clip (flowrl.worlds.video1.track): the largest object of each frame, a straight line through its
centres with velocity v in pixels a frame, and their root mean square distance from that line, the wobble. A frozen clip
earns 0 with each of them: where the object itself or its steadiness is paid for, the pay is multiplied by

    moving = min(1, |v| / FLOOR), and 0 below track.STILL

with FLOOR the speed of the slowest object of the world. Steps back and forth have no v, so jitter earns nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, Literal

from flowrl.rewards.media import VIDEO, scored, videos

from flowrl.errors import UserError
from flowrl.records import RewardBatch, RewardResult

if TYPE_CHECKING:
    from flowrl.worlds.video1.track import Track

FLOOR = 0.8  # pixels a frame


def moving(track: Track) -> float:
    """The floor under motion, in [0, 1]; see the module's text."""
    from flowrl.worlds.video1.track import STILL

    return min(1.0, track.speed / FLOOR) if track.speed >= STILL else 0.0


def smooth(track: Track) -> float:
    """min(1, MAX_WOBBLE / wobble): jumps about are no motion, even where they happen to lead somewhere."""
    from flowrl.worlds.video1.track import MAX_WOBBLE

    return 1.0 if track.wobble <= MAX_WOBBLE else MAX_WOBBLE / track.wobble


def direction(track: Track, metadata: Mapping[str, Any]) -> float:
    """max(0, cos(v, asked direction)) times how near |v| is to the asked speed (track.speed_fit), times ``smooth``."""
    from flowrl.worlds.video1.track import speed_fit

    return max(0.0, track.cosine(metadata["direction"])) * speed_fit(track, metadata["speed"]) * smooth(track)


def identity(track: Track, metadata: Mapping[str, Any]) -> float:
    """Share of the frames that show exactly the asked object, of its colour and shape, times ``moving``; in [0, 1]."""
    return track.same(metadata["color"], metadata["shape"]) * moving(track)


def consistency(track: Track) -> float:
    """Share of the frames that keep one object, times ``smooth``, times ``moving``; in [0, 1].

    Which object it is does not matter. Blinking, changing colour and a second object lose frames; jumps wobble.
    """
    return track.kept() * smooth(track) * moving(track)


@functools.lru_cache(maxsize=4)
def _followed(content: bytes, shape: tuple[int, ...]) -> list[Track]:
    """The tracks of clips given as bytes: several of these rewards read the same batch."""
    import numpy as np

    from flowrl.worlds.video1.track import follow

    return follow(np.frombuffer(content, np.uint8).reshape(shape))


class _Moving:
    """What the rewards of this world share: clips and metadata in, a track for each clip."""

    name = ""
    scope = "sample"
    media = VIDEO
    minimum = 0.0
    backbone = ""
    deterministic = True
    licence = "Apache-2.0 (flowrl)"

    def value(self, track: Track, metadata: Mapping[str, Any]) -> tuple[float, Mapping[str, float], str]:
        """Score of one clip, its components, and what is wrong ("" where nothing)."""
        raise NotImplementedError

    def score(self, batch: RewardBatch) -> RewardResult:
        """Score finished clips; a sample without the world's metadata is invalid, with the reason."""
        import numpy as np

        from flowrl.worlds.video1.track import fault

        films = videos(batch, self.name)
        if films.shape[1] < 3:
            raise UserError(f"{self.name}: a motion needs 3 frames or more, got {films.shape[1]}; raise model.frames")
        faults = [fault(metadata) for metadata in batch.metadata]
        scores = np.full(len(batch), np.nan, np.float32)
        parts: dict[str, np.ndarray[Any, np.dtype[np.float32]]] = {}
        details: list[str | None] = [None] * len(batch)
        for row, track in enumerate(_followed(films.tobytes(), films.shape)):
            if not faults[row]:
                scores[row], found, reason = self.value(track, batch.metadata[row])
                details[row] = reason or None
                for key, part in found.items():
                    parts.setdefault(key, np.full(len(batch), np.nan, np.float32))[row] = part
        errors = [
            f"{self.name}: metadata: {text}; it needs the prompts of world/video1" if text else None for text in faults
        ]
        return scored(scores, parts, details, errors)


class MovingDirection(_Moving):
    """Reward in [0, 1]: the object moves in the asked direction, at the asked speed, on a straight line."""

    name = "moving_direction"

    def value(self, track: Track, metadata: Mapping[str, Any]) -> tuple[float, Mapping[str, float], str]:
        return direction(track, metadata), {"speed": track.speed}, ""


class MovingIdentity(_Moving):
    """Reward in [0, 1]: share of the frames that show the asked object alone, behind the floor under motion."""

    name = "moving_identity"

    def value(self, track: Track, metadata: Mapping[str, Any]) -> tuple[float, Mapping[str, float], str]:
        return identity(track, metadata), {"same": track.same(metadata["color"], metadata["shape"])}, ""


class MovingConsistency(_Moving):
    """Reward in [0, 1]: one object, the same on all frames, on a straight path, behind the floor under motion."""

    name = "moving_consistency"

    def value(self, track: Track, metadata: Mapping[str, Any]) -> tuple[float, Mapping[str, float], str]:
        return consistency(track), {"kept": track.kept()}, ""


class MovingObject(_Moving):
    """Reward in [0, 1]: everything that the caption says, on every frame.

    mode: "strict" (0 or 1: object, direction, speed and a path without jumps, the judge of docs/results), "dense" (mean of
    the three rewards above), "mean" ((strict + dense) / 2: strict alone is sparse, dense alone pays for two thirds).
    """

    name = "moving_object"

    def __init__(self, mode: Literal["mean", "strict", "dense"] = "mean") -> None:
        if mode not in ("mean", "strict", "dense"):
            raise UserError(f"moving_object: mode is {mode!r}; use mean, strict or dense")
        self.mode = mode

    def value(self, track: Track, metadata: Mapping[str, Any]) -> tuple[float, Mapping[str, float], str]:
        from flowrl.worlds.video1.track import strict_reason

        reason = strict_reason(track, metadata)
        strict = float(not reason)
        dense = (direction(track, metadata) + identity(track, metadata) + consistency(track)) / 3
        value = {"strict": strict, "dense": dense, "mean": (strict + dense) / 2}[self.mode]
        return value, {"strict": strict, "dense": dense}, reason
