"""Contact sheets hold the right frames at the right place; the animation holds them all, in time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image

from flowrl.evaluation.grids import contact_sheet, save_grids
from flowrl.evaluation.video_sheets import frame_numbers, save_animation, stills, video_sheet
from tests.evaluation.test_grids import flat, order


def film(values: list[list[int]], size: int = 16) -> npt.NDArray[np.uint8]:
    """One video a list, one grey frame a value."""
    return np.stack([flat(frames, size) for frames in values])


@pytest.mark.parametrize(
    ("frames", "shown", "expected"),
    [(9, 5, [0, 2, 4, 6, 8]), (4, 8, [0, 1, 2, 3]), (81, 3, [0, 40, 80]), (7, 1, [3]), (1, 8, [0]), (10, 2, [0, 9])],
)
def test_frames_at_even_distances(frames: int, shown: int, expected: list[int]) -> None:
    assert frame_numbers(frames, shown) == expected


def test_rows_are_videos_and_columns_frames() -> None:
    videos = film([[1, 2, 3, 4, 5], [11, 12, 13, 14, 15]])
    page = video_sheet(videos, ["a", "b"], frames=3)
    values = [v for row in ([1, 2, 3, 4, 5], [11, 12, 13, 14, 15]) for v in row]
    assert order(page, values) == [1, 3, 5, 11, 13, 15]


def test_stills_are_middle_frames_and_pictures_stay() -> None:
    videos = film([[1, 2, 3], [4, 5, 6]])
    assert stills(videos)[:, 0, 0, 0].tolist() == [2, 5]
    assert stills(videos[0]) is not videos and stills(videos[0]).shape == (3, 16, 16, 3)
    assert order(contact_sheet(videos, ["a", "b"]), [1, 2, 3, 4, 5, 6]) == [2, 5]


def test_the_animation_plays_every_frame_in_time(tmp_path: Path) -> None:
    save_animation(tmp_path / "a.webp", film([[0, 60, 120], [10, 70, 130]], 128), columns=2, fps=5)
    with Image.open(tmp_path / "a.webp") as movie:
        assert movie.n_frames == 3 and movie.info["loop"] == 0
        assert movie.size == (128 + 4 + 128, 128)
        for frame, (left, right) in enumerate([(0, 10), (60, 70), (120, 130)]):
            movie.seek(frame)
            movie.load()
            assert movie.info["duration"] == 200
            pixels = np.asarray(movie.convert("RGB")).astype(int)
            assert abs(pixels[64, 64, 0] - left) < 12 and abs(pixels[64, 196, 0] - right) < 12


def test_grids_of_videos_hold_stills_and_films(tmp_path: Path) -> None:
    base, tuned = film([[1, 2, 3], [4, 5, 6]]), film([[7, 8, 9], [10, 11, 12]])
    paths = save_grids(tmp_path, base, tuned, ["p", "q"], [0.5, 0.5], [0.6, 0.1])
    assert [path.name for path in paths] == ["change.png", "worst.png", "tuned.png", "video.png", "video.webp"]
    assert order(Image.open(paths[0]), list(range(1, 13))) == [2, 8, 5, 11]
    # The largest change first, base above tuned, all frames: the loss of q, then the gain of p.
    assert order(Image.open(paths[3]), list(range(1, 13))) == [4, 5, 6, 10, 11, 12, 1, 2, 3, 7, 8, 9]


def test_mistakes_are_named(tmp_path: Path) -> None:
    videos = film([[1, 2]])
    with pytest.raises(ValueError, match="1 videos, but 2 captions"):
        video_sheet(videos, ["a", "b"])
    with pytest.raises(ValueError, match=r"video_sheet: expected uint8 \[N, F, H, W, 3\]"):
        video_sheet(videos[0], ["a"])
    with pytest.raises(ValueError, match="0 frames a second"):
        save_animation(tmp_path / "a.webp", videos, fps=0)
