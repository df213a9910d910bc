"""Scenes of world video1: vocabulary, captions with their metadata, and the held-out split.

A prompt is a combination of colour, shape, direction and speed, "a red circle moving left fast". The HELD_OUT
combinations with the smallest hash are never seen in training; every word of theirs is.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flowrl.worlds.draws import draw_by_tag
from flowrl.worlds.v1.scenes import COLORS

WORLD = "video1"
SIZE = 24
FRAMES = 5
SHAPES = ("circle", "square", "triangle", "cross")
DIRECTIONS: dict[str, tuple[int, int]] = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}
SPEEDS: dict[str, tuple[float, float]] = {"slowly": (0.8, 1.2), "fast": (2.4, 3.0)}
"""Pixels a frame, lowest and highest."""
TAGS = ("slowly", "fast")
TAG_WEIGHT = {"slowly": 0.5, "fast": 0.5}
HELD_OUT = 64

Split = Literal["train", "held_out"]


@dataclass(frozen=True, order=True)
class Prompt:
    """One sentence with its metadata fields; its tag is its speed."""

    color: str
    shape: str
    direction: str
    speed: str

    @property
    def tag(self) -> str:
        return self.speed

    @property
    def text(self) -> str:
        return f"a {self.color} {self.shape} moving {self.direction} {self.speed}"

    @property
    def metadata(self) -> dict[str, Any]:
        """tag, color, shape, direction, speed and prompt."""
        words = {"color": self.color, "shape": self.shape, "direction": self.direction, "speed": self.speed}
        return {"tag": self.tag, **words, "prompt": self.text}


def _rank(prompt: Prompt) -> bytes:
    return hashlib.blake2b(f"flowrl/world/{WORLD}/{prompt.text}".encode(), digest_size=8).digest()


@functools.cache
def prompts(split: Split) -> dict[str, tuple[Prompt, ...]]:
    """Every sentence of a split, by tag, in a fixed order."""
    every = [Prompt(*parts) for parts in itertools.product(COLORS, SHAPES, DIRECTIONS, SPEEDS)]
    ranked = sorted(every, key=_rank)
    part = ranked[:HELD_OUT] if split == "held_out" else ranked[HELD_OUT:]
    return {tag: tuple(prompt for prompt in part if prompt.tag == tag) for tag in TAGS}


def draw_prompt(rng: np.random.Generator, split: Split = "train") -> Prompt:
    """Draw a tag by TAG_WEIGHT, then one of its sentences uniformly."""
    return draw_by_tag(prompts(split), TAG_WEIGHT, rng)


@dataclass(frozen=True)
class Moving:
    """One drawn object: centre in pixels on the first frame (x to the right, y down), pixels a frame, radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    dx: float
    dy: float
    radius: float


def place(prompt: Prompt, rng: np.random.Generator) -> Moving:
    """Draw a clip that satisfies ``prompt`` exactly; the object stays within the picture on every frame."""
    radius = rng.uniform(3.9, 4.5)
    speed = rng.uniform(*SPEEDS[prompt.speed])
    dx, dy = (speed * part for part in DIRECTIONS[prompt.direction])
    low, high = radius + 0.3, SIZE - 1.3 - radius
    x, y = (_start(rng, low, high, step * (FRAMES - 1)) for step in (dx, dy))
    return Moving(prompt.shape, prompt.color, x, y, dx, dy, radius)


def _start(rng: np.random.Generator, low: float, high: float, way: float) -> float:
    """A coordinate from which ``way`` pixels lead to nowhere outside [low, high]."""
    return rng.uniform(max(low, low - way), min(high, high - way))
