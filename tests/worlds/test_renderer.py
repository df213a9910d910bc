"""World v1 stays frozen: pictures, sentences and splits are what recorded results hang on."""

from __future__ import annotations

import hashlib

import numpy as np
import pytest

from flowrl.worlds.v1 import scenes
from flowrl.worlds.v1.render import coverage, render
from flowrl.worlds.v1.scenes import BACKGROUND, COLORS, SHAPES, SIZE, Item

SCENE = (
    Item("circle", "red", 6.2, 5.6, 4.4),
    Item("square", "green", 17.7, 6.1, 4.8),
    Item("triangle", "blue", 29.4, 29.1, 4.5),
    Item("cross", "yellow", 5.5, 29.8, 4.3),
    Item("ring", "purple", 17.5, 17.5, 4.9),
    Item("square", "white", 30.0, 5.5, 4.2),
)


def test_golden_picture() -> None:
    picture = render(SCENE)
    assert picture.shape == (SIZE, SIZE, 3) and picture.dtype == np.uint8
    digest = hashlib.sha256(picture.tobytes()).hexdigest()
    assert digest == "4349f8e17018b9a1917ff50fddfd4375aef64cf9d8bd405cd12eea93394bcc32"


def test_golden_placement() -> None:
    generator = np.random.default_rng(7)
    drawn = [scenes.draw_prompt(generator) for _ in range(3)]
    assert [prompt.text for prompt in drawn] == [
        "a photo of a white ring and a blue triangle",
        "a photo of a red circle and a green square",
        "a photo of three blue circles",
    ]
    first = scenes.place(drawn[0], generator)[0]
    assert (first.x, first.y, first.radius) == pytest.approx((29.821228418, 5.797069429, 4.203685713))


def test_an_empty_scene_is_background() -> None:
    assert (render(()) == BACKGROUND).all()


AREAS = {
    "circle": np.pi,
    "square": 4 * 0.88**2,
    # Half the base times the height: apex at y = -1, base at y = 0.75, sides |2 dx| = dy + 1.
    "triangle": 1.75 * 1.75 / 2,
    "cross": 2 * (2 * 2 * 0.34) - (2 * 0.34) ** 2,
    "ring": np.pi * (1 - 0.48**2),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_coverage_has_the_area_of_the_shape(shape: str) -> None:
    radius = 40.0
    dy, dx = np.mgrid[-60:61, -60:61].astype(float)
    assert coverage(shape, dx, dy, radius).sum() == pytest.approx(AREAS[shape] * radius**2, rel=0.01)


@pytest.mark.parametrize("color", COLORS)
def test_the_middle_of_a_square_has_its_colour(color: str) -> None:
    picture = render([Item("square", color, 18.0, 10.0, 4.5)])
    assert tuple(picture[10, 18]) == COLORS[color] and tuple(picture[18, 10]) == BACKGROUND


def test_an_unknown_shape_is_refused() -> None:
    with pytest.raises(ValueError, match="unknown shape 'star'"):
        render([Item("star", "red", 10.0, 10.0, 4.0)])


def test_place_satisfies_the_metadata_of_its_own_prompt() -> None:
    """Read the scene itself, not its picture: counts, colours, relation, one object a cell, all inside the picture."""
    generator = np.random.default_rng(5)
    for split in ("train", "held_out"):
        for pool in scenes.prompts(split).values():
            for prompt in pool[:: max(1, len(pool) // 60)]:
                items = scenes.place(prompt, generator)
                kinds = prompt.kinds * prompt.count
                assert len(items) == len(kinds)
                for item, kind in zip(items, kinds, strict=True):
                    assert item.shape == kind.shape and item.color == (kind.color or item.color)
                    assert item.radius <= min(item.x, item.y) + 1 and item.radius <= SIZE - max(item.x, item.y)
                cells = {(round((i.x - 5.5) / 12), round((i.y - 5.5) / 12)) for i in items}
                assert len(cells) == len(items)
                if prompt.relation:
                    dx, dy = items[1].x - items[0].x, items[1].y - items[0].y
                    ahead = {"left of": dx, "right of": -dx, "above": dy, "below": -dy}[prompt.relation]
                    assert ahead > 10.9
