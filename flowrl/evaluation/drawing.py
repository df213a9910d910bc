"""What all picture pages share: fonts, colours, scaling, captions.

Captions use Pillow's own scalable font, so nothing is installed or downloaded; it has Latin letters only, and others
show as boxes.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from PIL import Image, ImageFont

    Font = ImageFont.FreeTypeFont | ImageFont.ImageFont

Images = npt.NDArray[np.uint8]

PAPER, INK, QUIET, RULE = "#ffffff", "#1f2328", "#656d76", "#d0d7de"
BETTER, WORSE, SAME = "#1a7f37", "#cf222e", "#8c959f"

MARGIN, GUTTER, BORDER = 20, 18, 3
CAPTION_LINES = 3
MIN_SIDE, MAX_SIDE = 128, 256  # a picture's width on the page, in pixels


def score_text(value: float) -> str:
    """Write a score as pages show it; NaN is "no score"."""
    return "no score" if math.isnan(value) else f"{value:.2f}"


@functools.cache
def font_of(size: int) -> Font:
    """Pillow's own font at ``size`` pixels."""
    from PIL import ImageFont

    return ImageFont.load_default(size)


def wrap(text: str, width: float, size: int, lines: int = CAPTION_LINES) -> list[str]:
    """Break ``text`` into at most ``lines`` lines of ``width`` pixels at a font size; a cut shows as an ellipsis."""
    font = font_of(size)
    done: list[str] = []
    line = ""
    words = [part for word in text.split() for part in _pieces(word, width, font)]
    for index, word in enumerate(words):
        longer = f"{line} {word}".strip()
        if font.getlength(longer) <= width:
            line = longer
            continue
        if len(done) == lines - 1:
            line = shorten(" ".join([line, *words[index:]]), width, font)
            break
        done.append(line)
        line = word
    return [*done, line] if line else done


def _pieces(word: str, width: float, font: Font) -> list[str]:
    """Cut a word that is wider than a line."""
    pieces, piece = [], ""
    for letter in word:
        if piece and font.getlength(piece + letter) > width:
            pieces.append(piece)
            piece = ""
        piece += letter
    return [*pieces, piece]


def shorten(text: str, width: float, font: Font) -> str:
    """Cut letters off the end until the text and an ellipsis take at most ``width`` pixels."""
    text = text[:400]
    while text and font.getlength(text + "…") > width:
        text = text[:-1]
    return text.rstrip() + "…"


def scaled(image: Images, scale: int | None) -> Image.Image:
    """One picture on the page: enlarged by a whole factor without smoothing, or reduced to MAX_SIDE."""
    from PIL import Image as Pil

    width = image.shape[1]
    shown = Pil.fromarray(image)
    if scale is None:
        scale = max(1, math.ceil(MIN_SIDE / width))
        if width > MAX_SIDE:
            size = (MAX_SIDE, round(image.shape[0] * MAX_SIDE / width))
            return shown.resize(size, Pil.Resampling.LANCZOS)
    return shown.resize((width * scale, image.shape[0] * scale), Pil.Resampling.NEAREST)


def resized(image: Images, width: int) -> Images:
    """Reduce a picture uint8 [H, W, 3] to at most ``width`` pixels a row, at its own proportions."""
    from PIL import Image as Pil

    if image.shape[1] <= width:
        return image
    size = (width, max(1, round(image.shape[0] * width / image.shape[1])))
    return np.asarray(Pil.fromarray(image).resize(size, Pil.Resampling.LANCZOS))


def check_images(images: Images, others: Sequence[int], where: str) -> None:
    """Raise ValueError unless images are uint8 [N, H, W, 3], N > 0, and ``others`` (lengths of columns) equal N."""
    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8 or not len(images):
        raise ValueError(f"{where}: expected uint8 [N, H, W, 3] with N > 0, got {images.dtype} {list(images.shape)}")
    if any(length != len(images) for length in others):
        raise ValueError(f"{where}: {len(images)} pictures, but the other columns have {list(others)} entries")


def as_numbers(scores: Sequence[float | None]) -> list[float]:
    """Scores as floats, NaN for none."""
    return [math.nan if score is None else float(score) for score in scores]
