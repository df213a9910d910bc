"""Videos as people can look at them: a contact sheet with frames as columns, an animated WebP, one still."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from flowrl.evaluation.drawing import INK, MARGIN, PAPER, QUIET, Images, font_of, scaled, wrap

if TYPE_CHECKING:
    from PIL import Image

_GAP, _ROW_GAP = 4, 14


def _check(videos: Images, where: str) -> None:
    if videos.ndim != 5 or videos.shape[-1] != 3 or videos.dtype != np.uint8 or not videos.size:
        raise ValueError(
            f"{where}: expected uint8 [N, F, H, W, 3], none of them 0, got {videos.dtype} {list(videos.shape)}"
        )


def stills(pictures: Images) -> Images:
    """Return the middle frame of each video, uint8 [N, H, W, 3]; pictures [N, H, W, 3] stay as they are."""
    return pictures if pictures.ndim == 4 else pictures[:, pictures.shape[1] // 2]


def frame_numbers(frames: int, shown: int) -> list[int]:
    """Choose ``shown`` of ``frames`` frames at even distances, the first and the last among them."""
    if shown >= frames:
        return list(range(frames))
    if shown < 2:
        return [frames // 2]
    return [round(index * (frames - 1) / (shown - 1)) for index in range(shown)]


def video_sheet(
    videos: Images, captions: Sequence[str], *, frames: int = 8, scale: int | None = None, title: str = ""
) -> Image.Image:
    """Draw videos uint8 [N, F, H, W, 3] as rows and ``frames`` of their frames as columns, its caption above each row.

    Raises ValueError for another shape or number of captions.
    """
    from PIL import Image as Pil
    from PIL import ImageDraw

    _check(videos, "video_sheet")
    if len(captions) != len(videos):
        raise ValueError(f"video_sheet: {len(videos)} videos, but {len(captions)} captions")
    chosen = frame_numbers(videos.shape[1], frames)
    rows = [[scaled(video[index], scale) for index in chosen] for video in videos]
    side, height = rows[0][0].size
    width = max(460, 2 * MARGIN + len(chosen) * (side + _GAP) - _GAP)
    texts = [[line for part in text.split("\n") for line in wrap(part, width - 2 * MARGIN, 14, 2)] for text in captions]
    lines = max(1, *(len(text) for text in texts))
    step = 18 * lines + 4 + height + _ROW_GAP
    top = MARGIN + (34 if title else 0) + 18
    page = Pil.new("RGB", (width, top + len(rows) * step - _ROW_GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, font_of(20))
    for column, index in enumerate(chosen):
        draw.text((MARGIN + column * (side + _GAP), top - 18), f"frame {index}", QUIET, font_of(12))
    for row, (pictures, text) in enumerate(zip(rows, texts, strict=True)):
        above = top + row * step
        for line, words in enumerate(text):
            draw.text((MARGIN, above + 18 * line), words, INK, font_of(14))
        for column, picture in enumerate(pictures):
            page.paste(picture, (MARGIN + column * (side + _GAP), above + 18 * lines + 4))
    return page


def save_animation(path: Path, videos: Images, *, columns: int = 4, fps: float = 8.0, scale: int | None = None) -> None:
    """Write videos uint8 [N, F, H, W, 3] side by side as one animated WebP that repeats without end.

    columns: videos a row. fps: frames a second, at most 1000. Raises ValueError for another shape, or fps out of range.
    """
    from PIL import Image as Pil

    _check(videos, "save_animation")
    if not 0 < fps <= 1000:
        raise ValueError(f"save_animation: {fps} frames a second; use more than 0 and at most 1000")
    columns = max(1, min(columns, len(videos)))
    side, height = scaled(videos[0, 0], scale).size
    size = columns * (side + _GAP) - _GAP, math.ceil(len(videos) / columns) * (height + _GAP) - _GAP
    pages = []
    for frame in range(videos.shape[1]):
        page = Pil.new("RGB", size, PAPER)
        for place, video in enumerate(videos):
            corner = place % columns * (side + _GAP), place // columns * (height + _GAP)
            page.paste(scaled(video[frame], scale), corner)
        pages.append(page)
    pages[0].save(
        path, "WEBP", save_all=True, append_images=pages[1:], duration=round(1000 / fps), loop=0, quality=90, method=4
    )
