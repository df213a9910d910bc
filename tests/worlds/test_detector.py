"""The connected-components detector of world v1: accurate on renders, robust to noise, unmoved by blobs and specks."""

from __future__ import annotations

import functools

import numpy as np
import numpy.typing as npt
import pytest
from flowrl.rewards.compositional import judge

from flowrl.records import Detection
from flowrl.worlds.v1 import scenes
from flowrl.worlds.v1.detect import detect
from flowrl.worlds.v1.render import render
from flowrl.worlds.v1.scenes import COLORS, SHAPES, Item, Kind, Prompt

Images = npt.NDArray[np.uint8]
COUNT = 500


@functools.cache
def renders() -> tuple[list[Prompt], Images, list[list[Detection]]]:
    generator = np.random.default_rng(11)
    drawn = [scenes.draw_prompt(generator, "held_out") for _ in range(COUNT)]
    images = np.stack([render(scenes.place(prompt, generator)) for prompt in drawn])
    return drawn, images, detect(images)


def strict(prompts: list[Prompt], found: list[list[Detection]]) -> float:
    return float(np.mean([judge(p.metadata, f).strict for p, f in zip(prompts, found, strict=True)]))


def one(items: list[Item]) -> list[tuple[str, str]]:
    return [(d.label, d.color) for d in detect(render(items)[None])[0]]


def test_accuracy_on_renders() -> None:
    prompts, _, found = renders()
    assert strict(prompts, found) >= 0.99


def test_accuracy_on_the_prompt_of_another_picture() -> None:
    prompts, _, found = renders()
    assert strict(prompts, found[1:] + found[:1]) <= 0.03


@pytest.mark.parametrize(("sigma", "least"), [(10, 0.94), (20, 0.86)])
def test_noise(sigma: float, least: float) -> None:
    prompts, images, _ = renders()
    part = images[:200]
    noisy = np.clip(part + np.random.default_rng(0).normal(0, sigma, part.shape), 0, 255).round().astype(np.uint8)
    assert strict(prompts[:200], detect(noisy)) >= least


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("color", COLORS)
def test_every_object_is_found_with_its_box(shape: str, color: str) -> None:
    (found,) = detect(render([Item(shape, color, 17.3, 17.6, 4.6)])[None])[0]
    assert (found.label, found.color) == (shape, color) and found.score > 0.72
    left, top, right, bottom = found.box
    assert (left + right) / 2 == pytest.approx(18, abs=1) and (top + bottom) / 2 == pytest.approx(18, abs=1.6)
    assert 6 <= right - left <= 10 and 6 <= bottom - top <= 10


def test_objects_come_in_reading_order() -> None:
    items = [Item("ring", "red", 29.3, 29.6, 4.6), Item("circle", "blue", 5.3, 5.6, 4.6)]
    assert one(items) == [("circle", "blue"), ("ring", "red")]


def test_fused_objects_do_not_count_as_several() -> None:
    two = Prompt("counting", (Kind("circle", "red"),), 2)
    for distance in (2, 3, 4, 5, 6, 7):
        fused = [Item("circle", "red", 15.8, 18.0, 4.6), Item("circle", "red", 15.8 + distance, 18.0, 4.6)]
        found = detect(render(fused)[None])[0]
        assert len(found) == 1 and not judge(two.metadata, found).strict


def test_scribbles_are_blobs_and_blobs_are_extra_objects() -> None:
    picture = render([Item("circle", "red", 5.3, 5.6, 4.6)])
    picture[20:22, 5:30] = COLORS["white"]
    picture[22:32, 5:7] = COLORS["white"]
    found = detect(picture[None])[0]
    assert [(d.label, d.color) for d in found] == [("circle", "red"), ("blob", "white")]
    verdict = judge(Prompt("colors", (Kind("circle", "red"),)).metadata, found)
    assert not verdict.strict and verdict.reason == "1 objects more than the 1 asked for"


def test_specks_neither_count_nor_hide_what_is_there() -> None:
    picture = render([Item("circle", "red", 5.3, 5.6, 4.6)])
    for x in (14, 20, 26, 32):
        picture[17:19, x : x + 2] = COLORS["red"]  # four pixels: a speck
    assert [(d.label, d.color) for d in detect(picture[None])[0]] == [("circle", "red")]
    picture[25:28, 25:28] = COLORS["red"]  # nine pixels: an object of no shape
    assert [d.label for d in detect(picture[None])[0]] == ["circle", "blob"]


def test_faint_paint_is_not_an_object() -> None:
    picture = render([Item("circle", "red", 17.3, 17.6, 4.6)]).astype(float)
    background = np.array(scenes.BACKGROUND)
    faint = (background + 0.4 * (picture - background)).round().astype(np.uint8)
    assert detect(faint[None]) == [[]]


@pytest.mark.parametrize("shape", [(36, 36, 3), (1, 36, 36, 4), (1, 3, 36, 36)])
def test_other_layouts_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[B, H, W, 3\]"):
        detect(np.zeros(shape, np.uint8))
    with pytest.raises(ValueError, match="got float32"):
        detect(np.zeros((1, 36, 36, 3), np.float32))  # type: ignore[arg-type]


def test_a_picture_filled_with_colour_is_no_square() -> None:
    """The cheapest hack of all: paint everything white for "a white square"."""
    from flowrl.worlds.v1.scenes import COLORS

    image = np.zeros((1, 36, 36, 3), np.uint8)
    image[:] = COLORS["white"]
    assert [d.label for d in detect(image)[0]] == ["blob"]
    image[:] = (34, 36, 42)
    image[0, 4:20, 4:20] = COLORS["white"]
    assert [d.label for d in detect(image)[0]] == ["blob"]
