"""Scenes of world v1: vocabulary, captions with GenEval-style metadata, and the held-out split.

A prompt is a *combination* (tag, objects, relation) in one of its phrasings. Combinations, not sentences, are held out, so
"a red circle and a blue square" and "a blue square and a red circle" are always on the same side of the split, and so are
"A left of B" and "B right of A".
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from flowrl.worlds.draws import draw_by_tag

WORLD = "v1"
SIZE = 36
CELLS = 3
SHAPES = ("circle", "square", "triangle", "cross", "ring")
PLURALS = {"circle": "circles", "square": "squares", "triangle": "triangles", "cross": "crosses", "ring": "rings"}
COLORS: dict[str, tuple[int, int, int]] = {
    "red": (228, 52, 52),
    "green": (52, 190, 84),
    "blue": (64, 104, 244),
    "yellow": (246, 216, 56),
    "purple": (184, 72, 220),
    "white": (242, 242, 242),
}
BACKGROUND = (34, 36, 42)
NUMBER_WORDS = {2: "two", 3: "three", 4: "four"}
INVERSE = {"left of": "right of", "right of": "left of", "above": "below", "below": "above"}
TAGS = ("single_object", "colors", "counting", "two_object", "color_attr", "position")

# How many combinations of each tag are held out, and how often each tag is drawn for pre-training and RL.
HELD_OUT = {"single_object": 2, "colors": 8, "counting": 30, "two_object": 32, "color_attr": 60, "position": 180}
TAG_WEIGHT = {
    "single_object": 0.04,
    "colors": 0.12,
    "counting": 0.24,
    "two_object": 0.16,
    "color_attr": 0.22,
    "position": 0.22,
}

Split = Literal["train", "held_out"]


@dataclass(frozen=True, order=True)
class Kind:
    """A shape with an optional colour, as a caption names it."""

    shape: str
    color: str = ""

    def words(self) -> str:
        return f"{self.color} {self.shape}".strip()

    def plural(self) -> str:
        return f"{self.color} {PLURALS[self.shape]}".strip()


@dataclass(frozen=True)
class Prompt:
    """One sentence with its GenEval-style metadata fields."""

    tag: str
    kinds: tuple[Kind, ...]
    count: int = 1
    relation: str = ""
    combination: str = ""

    @property
    def text(self) -> str:
        if self.count > 1:
            return f"a photo of {NUMBER_WORDS[self.count]} {self.kinds[0].plural()}"
        if self.relation:
            return f"a photo of a {self.kinds[0].words()} {self.relation} a {self.kinds[1].words()}"
        return "a photo of " + " and ".join(f"a {kind.words()}" for kind in self.kinds)

    @property
    def metadata(self) -> dict[str, Any]:
        """GenEval metadata: include clauses (class, count, color, position), exclude clauses, tag and prompt.

        A position clause reads as in GenEval: this object stands in that relation to clause number ``index``.
        """
        include = []
        for kind in self.kinds:
            clause: dict[str, Any] = {"class": kind.shape, "count": self.count}
            if kind.color:
                clause["color"] = kind.color
            include.append(clause)
        if self.relation:
            # The first object stands in `relation` to the second one.
            include = [include[1], {**include[0], "position": [self.relation, 0]}]
        row: dict[str, Any] = {"tag": self.tag, "include": include, "prompt": self.text}
        if self.tag == "counting":
            row["exclude"] = [{"class": self.kinds[0].shape, "count": self.count + 1}]
        return row


def _combinations() -> Iterator[tuple[str, str, tuple[Prompt, ...]]]:
    """Yield (tag, combination key, its phrasings) for every combination of the world."""
    plain = [Kind(shape) for shape in SHAPES]
    colored = [Kind(shape, color) for shape in SHAPES for color in COLORS]
    for kind in plain:
        yield "single_object", kind.words(), (Prompt("single_object", (kind,)),)
    for kind in colored:
        yield "colors", kind.words(), (Prompt("colors", (kind,)),)
    for kind, count in itertools.product(plain + colored, NUMBER_WORDS):
        yield "counting", f"{count} {kind.words()}", (Prompt("counting", (kind,), count),)
    for first, second in itertools.combinations(plain + colored, 2):
        if first.color and second.color:
            tag = "color_attr"
        elif first.shape != second.shape:
            tag = "two_object"
        else:
            continue  # "a circle and a red circle" says nothing a checker can tell apart
        yield tag, f"{first.words()} & {second.words()}", (Prompt(tag, (first, second)), Prompt(tag, (second, first)))
    for first, second in itertools.permutations(plain + colored, 2):
        if bool(first.color) != bool(second.color) or (not first.color and first.shape == second.shape):
            continue
        for relation in ("left of", "above"):
            same = Prompt("position", (first, second), relation=relation)
            turned = Prompt("position", (second, first), relation=INVERSE[relation])
            yield "position", f"{first.words()} {relation} {second.words()}", (same, turned)


def _rank(key: str) -> bytes:
    return hashlib.blake2b(f"flowrl/world/{WORLD}/{key}".encode(), digest_size=8).digest()


@functools.cache
def prompts(split: Split) -> dict[str, tuple[Prompt, ...]]:
    """Every sentence of a split, by tag, in a fixed order.

    The HELD_OUT[tag] combinations with the smallest hash are held out; the others are for training.
    """
    by_tag: dict[str, list[tuple[bytes, str, tuple[Prompt, ...]]]] = {tag: [] for tag in TAGS}
    for tag, key, phrasings in _combinations():
        by_tag[tag].append((_rank(f"{tag}/{key}"), key, phrasings))
    chosen: dict[str, tuple[Prompt, ...]] = {}
    for tag, rows in by_tag.items():
        rows.sort()
        part = rows[: HELD_OUT[tag]] if split == "held_out" else rows[HELD_OUT[tag] :]
        chosen[tag] = tuple(
            Prompt(p.tag, p.kinds, p.count, p.relation, key) for _, key, phrasings in part for p in phrasings
        )
    return chosen


def draw_prompt(rng: np.random.Generator, split: Split = "train") -> Prompt:
    """Draw a tag by TAG_WEIGHT, then one of its sentences uniformly."""
    return draw_by_tag(prompts(split), TAG_WEIGHT, rng)


@dataclass(frozen=True)
class Item:
    """One drawn object: centre in pixels (x to the right, y down), radius in pixels."""

    shape: str
    color: str
    x: float
    y: float
    radius: float


def place(prompt: Prompt, rng: np.random.Generator) -> tuple[Item, ...]:
    """Draw a scene that satisfies ``prompt`` exactly: its objects, no others, one a cell."""
    kinds = prompt.kinds * prompt.count if prompt.count > 1 else prompt.kinds
    cells = _cells(prompt.relation, len(kinds), rng)
    names = tuple(COLORS)
    items = []
    for kind, cell in zip(kinds, cells, strict=True):
        color = kind.color or names[rng.integers(len(names))]
        radius = rng.uniform(4.2, 4.9)
        x, y = ((axis + 0.5) * SIZE / CELLS - 0.5 + rng.uniform(-0.5, 0.5) for axis in (cell % CELLS, cell // CELLS))
        items.append(Item(kind.shape, color, x, y, radius))
    return tuple(items)


def _cells(relation: str, count: int, rng: np.random.Generator) -> list[int]:
    if not relation:
        return list(rng.choice(CELLS * CELLS, size=count, replace=False))
    while True:  # about one draw in four fits
        first, second = rng.choice(CELLS * CELLS, size=2, replace=False)
        dx, dy = second % CELLS - first % CELLS, second // CELLS - first // CELLS
        if {"left of": dx > 0 and abs(dy) <= dx, "right of": dx < 0 and abs(dy) <= -dx,
            "above": dy > 0 and abs(dx) <= dy, "below": dy < 0 and abs(dx) <= -dy}[relation]:  # fmt: skip
            return [first, second]
