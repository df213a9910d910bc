"""One sample on its way from noise to picture: the clean estimate at each step, and the credit of each step under it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from flowrl.evaluation.drawing import (
    BETTER,
    INK,
    MARGIN,
    PAPER,
    QUIET,
    RULE,
    WORSE,
    Images,
    as_numbers,
    check_images,
    font_of,
    scaled,
    wrap,
)

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_GAP, _BAR = 10, 34  # pixels between pictures; the longest bar, up or down


def preview_strip(
    estimates: Images,
    t: Sequence[float],
    credit: Sequence[float | None],
    prompt: str,
    *,
    final: Images | None = None,
    score: float | None = None,
    scale: int | None = None,
    title: str = "One sample, step by step",
) -> Image.Image:
    """Draw the one-step clean estimates of one sample in the order of the schedule, a bar of step credit under each.

    estimates: uint8 [T, H, W, 3], ``x0_hat`` decoded before each of T steps. t: T times, 1 is noise. credit: the advantage
    of each step, None for a step that is not trained. final: uint8 [1, H, W, 3], the finished picture, drawn last with its
    score. Bars share one scale, whose end is the largest credit in size. Raises ValueError for shapes that do not match.
    """
    from PIL import Image as Pil
    from PIL import ImageDraw

    check_images(estimates, [len(t), len(credit)], "preview_strip")
    shown = [scaled(image, scale) for image in estimates]
    if final is not None:
        check_images(final, [1], "preview_strip")
        shown.append(scaled(final[0], scale))
    values = as_numbers(credit)
    side, height = max(picture.width for picture in shown), max(picture.height for picture in shown)
    width = max(460, 2 * MARGIN + len(shown) * (side + _GAP) - _GAP)
    heading = wrap(prompt, width - 2 * MARGIN, 15, 2)
    above = MARGIN + 36 + 20 * len(heading)
    middle = above + 20 + height + 12 + _BAR
    page = Pil.new("RGB", (width, middle + _BAR + 46 + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font_of(21))
    for line, text in enumerate(heading):
        draw.text((MARGIN, MARGIN + 32 + 20 * line), text, INK, font_of(15))
    end = MARGIN + len(estimates) * (side + _GAP) - _GAP
    draw.line([(MARGIN, middle), (end, middle)], RULE)
    largest = max((abs(value) for value in values if not math.isnan(value)), default=0.0)
    for index, picture in enumerate(shown):
        left = MARGIN + index * (side + _GAP)
        page.paste(picture, (left, above + 20))
        if index < len(estimates):
            draw.text((left, above), f"step {index}, t {t[index]:.2f}", QUIET, font_of(13))
            _bar(draw, left, side, middle, values[index], largest)
        else:
            draw.text((left, above), "finished", QUIET, font_of(13))
            text = "" if score is None or math.isnan(score) else f"reward {score:.2f}"
            draw.text((left, above + 20 + height + 8), text, INK, font_of(14))
    told = "Below each estimate: the advantage of the step that starts there. Steps without one are not trained."
    for line, text in enumerate(wrap(told, width - 2 * MARGIN, 13, 2)):
        draw.text((MARGIN, middle + _BAR + 26 + 17 * line), text, QUIET, font_of(13))
    return page


def _bar(draw: ImageDraw.ImageDraw, left: int, side: int, middle: int, value: float, largest: float) -> None:
    if math.isnan(value):
        draw.text((left + side / 2, middle + _BAR + 6), "-", QUIET, font_of(13), anchor="ma")
        return
    long = round(_BAR * abs(value) / largest) if largest else 0
    color = BETTER if value > 0 else WORSE if value < 0 else QUIET
    ends = (middle - long, middle) if value > 0 else (middle, middle + long)
    draw.rectangle([left + side * 0.3, ends[0], left + side * 0.7, ends[1]], color)
    draw.text((left + side / 2, middle + _BAR + 6), f"{value:+.2f}", color, font_of(13), anchor="ma")
