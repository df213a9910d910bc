"""The group view: all members of one group, best advantage first, with what each was given and what it was credited."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowrl.evaluation.drawing import (
    BETTER,
    BORDER,
    GUTTER,
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

_LINE = 18


def order_of(advantages: Sequence[float | None]) -> list[int]:
    """Members by advantage, the largest first; those without one (None, NaN) last, in their own order."""
    values = as_numbers(advantages)
    return sorted(
        range(len(values)), key=lambda i: (math.isnan(values[i]), -values[i] if values[i] == values[i] else 0)
    )


def group_view(
    images: Images,
    scores: Sequence[float | None],
    advantages: Sequence[float | None],
    prompt: str,
    *,
    notes: Sequence[str | None] = (),
    columns: int = 8,
    scale: int | None = None,
    title: str = "One group, by advantage",
) -> Image.Image:
    """Draw the members of one group in the order of their advantage, reward and advantage under each.

    images: uint8 [N, H, W, 3]. scores: N; None or NaN marks a member that could not be scored: it is crossed out and says
    "invalid". advantages: N; None for a member that is not trained on. notes: N further texts (an error, what a reward
    saw), two lines each at most. The frame is green where the advantage is above 0, red below, grey at 0 or without one.
    Raises ValueError for shapes that do not match.
    """
    from PIL import Image as Pil
    from PIL import ImageDraw

    texts = list(notes) or [None] * len(images)
    check_images(images, [len(scores), len(advantages), len(texts)], "group_view")
    values, credit = as_numbers(scores), as_numbers(advantages)
    columns = max(1, min(columns, len(images)))
    shown = [scaled(image, scale) for image in images]
    side, height = shown[0].size
    cell = side + 2 * BORDER
    captions = {i: wrap(text, cell, 12, 2) for i, text in enumerate(texts) if text}
    lines = max((len(caption) for caption in captions.values()), default=0)
    step = height + 2 * BORDER + 6 + 2 * _LINE + 15 * lines + GUTTER
    width = max(460, 2 * MARGIN + columns * cell + (columns - 1) * GUTTER)
    heading = wrap(prompt, width - 2 * MARGIN, 15, 2)
    top = MARGIN + 34 + 20 * len(heading) + 24
    page = Pil.new("RGB", (width, top + math.ceil(len(images) / columns) * step - GUTTER + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font_of(21))
    for line, text in enumerate(heading):
        draw.text((MARGIN, MARGIN + 32 + 20 * line), text, INK, font_of(15))
    draw.text((MARGIN, top - 28), _summary(values, credit), QUIET, font_of(14))
    for place, member in enumerate(order_of(advantages)):
        corner = MARGIN + place % columns * (cell + GUTTER), top + place // columns * step
        _member(page, draw, corner, shown[member], values[member], credit[member])
        below = corner[1] + height + 2 * BORDER + 6 + 2 * _LINE
        for line, text in enumerate(captions.get(member, [])):
            draw.text((corner[0], below + 15 * line), text, QUIET, font_of(12))
    return page


def _summary(scores: Sequence[float], advantages: Sequence[float]) -> str:
    there = [score for score in scores if not math.isnan(score)]
    trained = sum(not math.isnan(value) and value != 0 for value in advantages)
    mean = f", mean reward {sum(there) / len(there):.2f}" if there else ""
    invalid = f", {len(scores) - len(there)} invalid" if len(there) < len(scores) else ""
    return f"{len(scores)} members{mean}{invalid}; {trained} with an advantage other than 0"


def _member(
    page: Image.Image,
    draw: ImageDraw.ImageDraw,
    corner: tuple[int, int],
    shown: Image.Image,
    score: float,
    advantage: float,
) -> None:
    left, top = corner
    invalid = math.isnan(score)
    frame = BETTER if advantage > 0 else WORSE if advantage < 0 else SAME
    right, bottom = left + shown.width + 2 * BORDER - 1, top + shown.height + 2 * BORDER - 1
    draw.rectangle([left, top, right, bottom], RULE if invalid else frame)
    page.paste(shown, (left + BORDER, top + BORDER))
    if invalid:
        draw.line([left, top, right, bottom], WORSE, 2)
        draw.line([left, bottom, right, top], WORSE, 2)
    words = "invalid" if invalid else f"reward {score_text(score)}"
    draw.text((left, bottom + 6), words, WORSE if invalid else INK, font_of(14))
    ink = QUIET if frame == SAME or invalid else frame
    told = "not trained" if invalid or math.isnan(advantage) else f"advantage {advantage:+.2f}"
    draw.text((left, bottom + 6 + _LINE), told, ink, font_of(14))
