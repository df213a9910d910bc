"""The base beside several checkpoints: a row a prompt, a column a set of weights, the same noise along a row."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowrl.evaluation.drawing import (
    BETTER,
    BORDER,
    INK,
    MARGIN,
    PAPER,
    QUIET,
    RULE,
    SAME,
    WORSE,
    Images,
    as_numbers,
    check_images,
    font_of,
    scaled,
    score_text,
    wrap,
)

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

Column = tuple[str, Images, Sequence[float | None]]
_GAP, _MIN_WIDTH = 12, 520  # pixels between columns; of the page


def worst_first(first: Sequence[float | None], last: Sequence[float | None]) -> list[int]:
    """Rows by ``last - first``, the largest loss first; rows without both scores last."""
    changes = [b - a for a, b in zip(as_numbers(first), as_numbers(last), strict=True)]
    return sorted(
        range(len(changes)), key=lambda i: (math.isnan(changes[i]), 0 if changes[i] != changes[i] else changes[i])
    )


def checkpoint_grid(
    columns: Sequence[Column],
    prompts: Sequence[str],
    *,
    limit: int = 12,
    scale: int | None = None,
    title: str = "The same prompts and noise, largest losses first",
) -> Image.Image:
    """Draw a row a prompt and a column a checkpoint, reward and change from the first column under each picture.

    columns: (label, uint8 [N, H, W, 3], N scores), the base first; row i is everywhere the same prompt and noise. limit:
    rows drawn, those whose last column lost most. A frame is green where the reward rose against the base, red where it
    fell. Raises ValueError where there are no columns, or their shapes do not match.
    """
    from PIL import Image as Pil
    from PIL import ImageDraw

    if not columns:
        raise ValueError("checkpoint_grid: no columns; give the base and at least one checkpoint")
    for label, images, scores in columns:
        check_images(images, [len(scores), len(prompts)], f"checkpoint_grid: {label}")
    values = [as_numbers(scores) for _, _, scores in columns]
    rows = worst_first(values[0], values[-1])[:limit]
    side, height = scaled(columns[0][1][0], scale).size
    cell = side + 2 * BORDER
    step = 22 + height + 2 * BORDER + 28 + _GAP
    labels = [wrap(label, cell, 14, 2) for label, _, _ in columns]
    width = max(_MIN_WIDTH, 2 * MARGIN + len(columns) * (cell + _GAP) - _GAP)
    top = MARGIN + 40 + 18 * max(len(label) for label in labels)
    page = Pil.new("RGB", (width, top + len(rows) * step - _GAP + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font_of(20))
    for column, lines in enumerate(labels):
        for line, text in enumerate(lines):
            draw.text((MARGIN + column * (cell + _GAP), MARGIN + 34 + 18 * line), text, QUIET, font_of(14))
    for place, row in enumerate(rows):
        above = top + place * step
        draw.text((MARGIN, above), wrap(prompts[row] or "-", width - 2 * MARGIN, 14, 1)[0], INK, font_of(14))
        for column, (_, images, _) in enumerate(columns):
            corner = MARGIN + column * (cell + _GAP), above + 22
            _cell(page, draw, corner, scaled(images[row], scale), values[column][row], values[0][row], column == 0)
    return page


def _cell(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    shown: Image.Image,
    score: float,
    before: float,
    first: bool,
) -> None:
    left, top = corner
    change = 0.0 if first else score - before
    color = RULE if first else BETTER if change > 0 else WORSE if change < 0 else SAME
    bottom = top + shown.height + 2 * BORDER - 1
    draw.rectangle([left, top, left + shown.width + 2 * BORDER - 1, bottom], color)
    page.paste(shown, (left + BORDER, top + BORDER))
    told = "" if first or math.isnan(change) else f"   {change:+.2f}" if change else "   same"
    draw.text((left, bottom + 6), score_text(score) + told, color if change > 0 or change < 0 else QUIET, font_of(14))
