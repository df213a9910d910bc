"""Grids show the right picture at the right place, in the right colour, in the right order."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image, ImageColor, ImageFont

from flowrl.evaluation.checkpoint_grid import checkpoint_grid
from flowrl.evaluation.drawing import BETTER, CAPTION_LINES, SAME, WORSE, wrap
from flowrl.evaluation.grids import before_after_grid, contact_sheet, save_grids


def flat(values: list[int], size: int = 36) -> npt.NDArray[np.uint8]:
    """One grey picture a value; blue marks them apart from page and text."""
    images = np.zeros((len(values), size, size, 3), np.uint8)
    images[..., 0] = np.array(values)[:, None, None]
    images[..., 2] = 200
    return images


def order(page: Image.Image, values: list[int]) -> list[int]:
    """The picture values in reading order, by the first pixel of each (255 is none)."""
    pixels = np.asarray(page)
    drawn = np.where((pixels[..., 1] == 0) & (pixels[..., 2] == 200), pixels[..., 0], 255).ravel()
    found, first = np.unique(drawn, return_index=True)
    return [int(found[i]) for i in np.argsort(first) if found[i] in values]


def has(page: Image.Image, color: str) -> bool:
    return bool((np.asarray(page) == ImageColor.getrgb(color)).all(-1).any())


def test_largest_gain_first_and_base_left_of_tuned() -> None:
    base, tuned = [10, 20, 30], [11, 21, 31]
    page = before_after_grid(flat(base), flat(tuned), ["a", "b", "c"], [0.5, 0.5, 0.5], [0.4, 0.9, 0.6], columns=3)
    assert order(page, base + tuned) == [20, 21, 30, 31, 10, 11]


def test_missing_scores_come_last() -> None:
    page = before_after_grid(flat([1, 2, 3]), flat([4, 5, 6]), list("abc"), [None, 0.9, 0.0], [1.0, 0.1, float("nan")])
    assert order(page, [1, 2, 3])[0] == 2


@pytest.mark.parametrize(("after", "color"), [(0.9, BETTER), (0.1, WORSE), (0.5, SAME)])
def test_border_colour(after: float, color: str) -> None:
    """Besides the key, which draws all three, the frame of the tuned picture has the colour of its outcome."""
    page = np.asarray(before_after_grid(flat([10]), flat([11]), ["p"], [0.5], [after]))
    rows, columns = np.nonzero((page == (11, 0, 200)).all(-1))
    frame = page[rows.min() - 1, columns.min() : columns.max()]
    assert (frame == ImageColor.getrgb(color)).all()


@pytest.mark.parametrize(
    ("size", "scale", "shown"), [(36, None, 144), (36, 2, 72), (200, None, 200), (1024, None, 256)]
)
def test_pictures_are_enlarged_without_smoothing_or_reduced(size: int, scale: int | None, shown: int) -> None:
    page = np.asarray(before_after_grid(flat([10], size), flat([11], size), ["p"], [0.5], [0.6], scale=scale))
    assert (page == (10, 0, 200)).all(-1).sum() == shown * shown


def test_enlarged_pixels_stay_sharp() -> None:
    images = flat([10])
    images[0, ::2, :, 0] = 77  # stripes one pixel wide
    page = np.asarray(before_after_grid(images, flat([11]), ["p"], [0.5], [0.6]))
    for value in (10, 77):
        assert (page == (value, 0, 200)).all(-1).sum() == 144 * 144 / 2


def test_contact_sheet_keeps_the_order() -> None:
    page = contact_sheet(flat([9, 3, 6, 1]), ["a", "b", "c", "a long caption that needs some lines " * 9], columns=2)
    assert order(page, [1, 3, 6, 9]) == [9, 3, 6, 1]


def test_wrap_fits_and_marks_what_is_cut() -> None:
    font = ImageFont.load_default(14)
    for text in ("a photo of a red circle left of a blue square", "x" * 500, "word " * 100, "<b>&amp;</b>\n\tx"):
        lines = wrap(text, 150, 14)
        assert 1 <= len(lines) <= CAPTION_LINES
        assert all(font.getlength(line) <= 150 for line in lines)
        assert lines[-1].endswith("…") is (len(text) > 100)
    assert wrap("a photo of a red circle left of a blue square", 150, 14) == wrap(
        "a photo of a  red circle\nleft of a blue square", 150, 14
    )
    assert wrap("", 150, 14) == []


def test_three_pages_are_written(tmp_path: Path) -> None:
    count = 40
    base, tuned = list(range(count)), list(range(100, 100 + count))
    after = [0.5 + 0.01 * (i - 20) for i in range(count)]
    prompts = [f"prompt {i}" for i in range(count)]
    paths = save_grids(tmp_path / "grids", flat(base), flat(tuned), prompts, [0.5] * count, after, limit=9)
    assert [path.name for path in paths] == ["change.png", "worst.png", "tuned.png"]
    pages = [Image.open(path) for path in paths]
    # 19 gains, one unchanged, 20 losses: three of each, largest first.
    assert order(pages[0], base) == [39, 38, 37, 20, 0, 1, 2]
    assert order(pages[1], base) == list(range(9))
    assert len(order(pages[2], tuned)) == 9
    assert has(pages[0], BETTER) and has(pages[0], WORSE)


def test_different_prompts_come_first() -> None:
    """Six gains of the same prompt are the largest; a page of three shows three prompts."""
    from flowrl.evaluation.grids import _distinct, _pairs

    base = flat(list(range(8)))
    found = _pairs(base, base, ["p"] * 6 + ["q", "r"], [0.0] * 8, [0.9] * 6 + [0.5, 0.4])
    assert [pair.prompt for pair in _distinct(found, 3)] == ["p", "q", "r"]
    assert len(_distinct(found, 5)) == 5


@pytest.mark.parametrize(
    ("before", "after"), [([None, None], [1.0, 0.5]), ([0.5, 0.5], [0.5, 0.5]), ([0.0, 0.0], [1.0, 1.0])]
)
def test_pages_without_gains_losses_or_scores(tmp_path: Path, before: list[float], after: list[float]) -> None:
    for path in save_grids(tmp_path, flat([1, 2]), flat([3, 4]), ["a", "b"], before, after):
        assert order(Image.open(path), [3, 4]) != []


def test_pages_are_the_same_each_time(tmp_path: Path) -> None:
    arguments = (flat([1, 2]), flat([3, 4]), ["a", "b"], [0.1, 0.2], [0.3, 0.1])
    first = [path.read_bytes() for path in save_grids(tmp_path / "1", *arguments)]
    assert first == [path.read_bytes() for path in save_grids(tmp_path / "2", *arguments)]


def test_mismatches_are_named() -> None:
    with pytest.raises(ValueError, match=r"2 pictures, but the other columns have \[2, 1, 2, 2\]"):
        before_after_grid(flat([1, 2]), flat([1, 2]), ["a"], [0, 0], [0, 0])
    with pytest.raises(ValueError, match="expected uint8"):
        contact_sheet(flat([1]).astype(np.float32), ["a"])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="with N > 0"):
        contact_sheet(flat([]), [])


# --------------------------------------------------------------------------------------------------- several checkpoints


def test_checkpoints_stand_beside_the_base_worst_change_first() -> None:
    columns = [
        ("base", flat([10, 20, 30]), [0.5, 0.5, 0.5]),
        ("a", flat([11, 21, 31]), [0.1, 0.9, 0.9]),
        ("b", flat([12, 22, 32]), [0.6, 0.2, None]),
    ]
    page = checkpoint_grid(columns, ["p", "q", "r"])
    values = [10, 11, 12, 20, 21, 22, 30, 31, 32]
    assert order(page, values) == [20, 21, 22, 10, 11, 12, 30, 31, 32]
    assert order(checkpoint_grid(columns, ["p", "q", "r"], limit=1), values) == [20, 21, 22]


@pytest.mark.parametrize(("after", "color"), [(0.9, BETTER), (0.1, WORSE), (0.5, SAME), (None, SAME)])
def test_a_checkpoints_frame_tells_its_change(after: float | None, color: str) -> None:
    columns = [("base", flat([10]), [0.5]), ("a", flat([11]), [after])]
    page = np.asarray(checkpoint_grid(columns, ["p"]))
    rows, places = np.nonzero((page == (11, 0, 200)).all(-1))
    assert (page[rows.min() - 1, places.min() : places.max()] == ImageColor.getrgb(color)).all()


def test_checkpoint_grids_name_mistakes() -> None:
    with pytest.raises(ValueError, match="no columns"):
        checkpoint_grid([], [])
    with pytest.raises(ValueError, match=r"checkpoint_grid: a: 1 pictures, but the other columns have \[1, 2\]"):
        checkpoint_grid([("base", flat([1, 2]), [0, 0]), ("a", flat([1]), [0])], ["p", "q"])
