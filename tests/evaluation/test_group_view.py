"""The group view shows every member once, the best first, with its numbers and the right frame; failures are marked."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import ImageColor

from flowrl.evaluation.drawing import BETTER, RULE, SAME, WORSE
from flowrl.evaluation.group_view import group_view, order_of
from tests.evaluation.test_grids import flat, has, order


def frame_of(page: np.ndarray, value: int) -> tuple[int, ...]:
    """Colour of the pixel left of the picture of ``value``, in its lowest row (no cross reaches the middle there)."""
    rows, columns = np.nonzero((page == (value, 0, 200)).all(-1))
    return tuple(int(v) for v in page[(rows.min() + rows.max()) // 2 + 9, columns.min() - 1])


def test_order_is_by_advantage_and_nothing_is_lost() -> None:
    assert order_of([0.0, 2.0, None, -1.0, float("nan"), 0.5]) == [1, 5, 0, 3, 2, 4]
    assert order_of([]) == []


def test_members_stand_in_the_order_of_their_advantage() -> None:
    page = group_view(flat([10, 20, 30, 40]), [0.1, 0.9, 0.5, 0.3], [-1.0, 1.5, 0.2, -0.7], "p", columns=2)
    assert order(page, [10, 20, 30, 40]) == [20, 30, 40, 10]


def test_frames_tell_the_sign() -> None:
    page = np.asarray(group_view(flat([10, 20, 30, 40]), [0.1, 0.9, 0.5, 0.2], [-1.0, 1.5, 0.0, None], "p"))
    expected = {10: WORSE, 20: BETTER, 30: SAME, 40: SAME}
    assert {value: frame_of(page, value) for value in expected} == {
        value: ImageColor.getrgb(color) for value, color in expected.items()
    }


def test_an_invalid_member_is_crossed_out_and_comes_last() -> None:
    """Without it, nothing is red; with it, the cross covers part of the picture, and its frame is that of no verdict."""
    plain = group_view(flat([10, 20]), [0.5, 0.5], [0.3, 0.1], "p")
    marked = group_view(flat([10, 20]), [None, 0.5], [None, 0.1], "p")
    assert not has(plain, WORSE) and has(marked, WORSE)
    assert order(marked, [10, 20]) == [20, 10]
    page = np.asarray(marked)
    assert (page == (10, 0, 200)).all(-1).sum() < 144 * 144 == (page == (20, 0, 200)).all(-1).sum()
    assert frame_of(page, 10) == ImageColor.getrgb(RULE)


def test_notes_make_room_and_mismatches_are_named() -> None:
    images = flat([1, 2])
    plain = group_view(images, [0.0, 1.0], [0.0, 1.0], "p")
    noted = group_view(images, [0.0, 1.0], [0.0, 1.0], "p", notes=[None, "two circles, three asked for " * 5])
    assert noted.height == plain.height + 30 and noted.width == plain.width
    with pytest.raises(ValueError, match=r"2 pictures, but the other columns have \[1, 2, 2\]"):
        group_view(images, [0.0], [0.0, 1.0], "p")
    with pytest.raises(ValueError, match="expected uint8"):
        group_view(images[0], [0.0], [0.0], "p")


def test_a_silent_group_says_so() -> None:
    from flowrl.evaluation.group_view import _summary

    assert _summary([0.5, 0.5], [0.0, 0.0]) == "2 members, mean reward 0.50; 0 with an advantage other than 0"
    nan = float("nan")
    assert _summary([nan, 1.0, 0.0], [nan, 2.0, nan]) == (
        "3 members, mean reward 0.50, 1 invalid; 1 with an advantage other than 0"
    )
