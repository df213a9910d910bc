"""The preview shows each estimate in the order of the schedule, and a bar of the right length and side under each."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageColor

from flowrl.evaluation.drawing import BETTER, WORSE
from flowrl.evaluation.previews import _BAR, preview_strip
from tests.evaluation.test_grids import flat, order


def bars(page: np.ndarray, color: str) -> dict[int, tuple[int, int]]:
    """(first row, last row) of each full bar of one colour, by its column of pictures."""
    found = (page == ImageColor.getrgb(color)).all(-1)
    spans = {}
    for index in range(5):
        left = 20 + index * 154
        part = found[:, left + 50 : left + 90]
        inside = part.all(1).nonzero()[0] if part.shape[1] == 40 else []
        if len(inside):
            spans[index] = (int(inside[0]), int(inside[-1]))
    return spans


def test_estimates_follow_the_schedule_and_the_finished_picture_is_last() -> None:
    page = preview_strip(flat([40, 10, 30]), [1.0, 0.6, 0.2], [None, 0.5, -0.1], "p", final=flat([20]), score=0.7)
    assert order(page, [10, 20, 30, 40]) == [40, 10, 30, 20]


def test_bars_share_one_scale_and_stand_on_their_side() -> None:
    page = np.asarray(preview_strip(flat([1, 2, 3, 4]), [1.0, 0.7, 0.5, 0.2], [0.5, None, -1.0, 0.0], "p"))
    up, down = bars(page, BETTER), bars(page, WORSE)
    assert set(up) == {0} and set(down) == {2}
    middle = up[0][1]
    assert down[2][0] == middle  # both start at the line
    assert down[2][1] - down[2][0] == _BAR and up[0][1] - up[0][0] == _BAR // 2


def test_without_credit_there_is_no_bar() -> None:
    page = np.asarray(preview_strip(flat([1, 2]), [1.0, 0.5], [None, float("nan")], "p", title="t"))
    assert not bars(page, BETTER) and not bars(page, WORSE)


def test_mismatches_are_named() -> None:
    with pytest.raises(ValueError, match=r"preview_strip: 2 pictures, but the other columns have \[2, 1\]"):
        preview_strip(flat([1, 2]), [1.0, 0.5], [0.1], "p")
    with pytest.raises(ValueError, match=r"preview_strip: 2 pictures, but the other columns have \[1\]"):
        preview_strip(flat([1]), [1.0], [0.1], "p", final=flat([1, 2]))
