"""Grids of pictures: base beside tuned from the same noise, sorted by change, dark on light."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

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
from flowrl.evaluation.video_sheets import save_animation, stills, video_sheet

if TYPE_CHECKING:
    from PIL import Image, ImageDraw

_HEADING, _MIN_WIDTH = 40, 460
MAX_VIDEOS = 4


@dataclass(frozen=True)
class _Pair:
    base: Images
    tuned: Images
    prompt: str
    before: float
    after: float

    @property
    def change(self) -> float:
        """after - before; NaN where either score is missing."""
        return self.after - self.before

    @property
    def color(self) -> str:
        return BETTER if self.change > 0 else WORSE if self.change < 0 else SAME

    @property
    def verdict(self) -> str:
        """The tuned score with its change."""
        if math.isnan(self.change):
            return score_text(self.after)
        return f"{score_text(self.after)}   " + (f"{self.change:+.2f}" if self.change else "same")


def before_after_grid(
    base: Images,
    tuned: Images,
    prompts: Sequence[str],
    base_scores: Sequence[float | None],
    tuned_scores: Sequence[float | None],
    *,
    columns: int = 4,
    scale: int | None = None,
    title: str = "Base and tuned, same noise",
) -> Image.Image:
    """Draw base beside tuned, the largest gain first.

    base, tuned: uint8 [N, H, W, 3], row i of both from the same prompt and noise. Scores of length N; None or NaN for a
    failed one, sorted last. columns: pairs a row. scale: whole enlargement factor; by default one that makes small
    pictures 128 pixels wide or more. The border is green where the score rose, red where it fell, grey where it stayed.
    Raises ValueError for shapes that do not match.
    """
    pairs = _pairs(base, tuned, prompts, base_scores, tuned_scores)
    return _page([("", sorted(pairs, key=_by_gain))], columns, title, pairs, scale)


def _by_gain(pair: _Pair) -> tuple[bool, float]:
    return math.isnan(pair.change), -pair.change


def _pairs(
    base: Images,
    tuned: Images,
    prompts: Sequence[str],
    base_scores: Sequence[float | None],
    tuned_scores: Sequence[float | None],
) -> list[_Pair]:
    check_images(base, [len(tuned), len(prompts), len(base_scores), len(tuned_scores)], "before_after_grid")
    check_images(tuned, [], "before_after_grid")
    before, after = as_numbers(base_scores), as_numbers(tuned_scores)
    return [_Pair(base[i], tuned[i], prompts[i], before[i], after[i]) for i in range(len(base))]


def _page(
    sections: Sequence[tuple[str, Sequence[_Pair]]],
    columns: int,
    title: str,
    everything: Sequence[_Pair],
    scale: int | None = None,
) -> Image.Image:
    """Lay sections of pairs out under headings; the head line counts the outcomes of ``everything``."""
    from PIL import Image as Pil
    from PIL import ImageDraw

    sections = [(name, pairs) for name, pairs in sections if pairs]
    shown = [pair for _, pairs in sections for pair in pairs]
    columns = max(1, min(columns, max(len(pairs) for _, pairs in sections)))
    cell = _PairCell(shown, scale)
    rows = sum(math.ceil(len(pairs) / columns) for _, pairs in sections)
    headings = sum(bool(name) for name, _ in sections)
    width = max(_MIN_WIDTH, 2 * MARGIN + columns * cell.width + (columns - 1) * GUTTER)
    top = MARGIN + 62
    page = Pil.new("RGB", (width, top + rows * (cell.height + GUTTER) + headings * _HEADING + MARGIN - GUTTER), PAPER)
    draw = ImageDraw.Draw(page)
    draw.text((MARGIN, MARGIN), title, INK, font_of(21))
    _outcome_line(draw, MARGIN, MARGIN + 32, everything)
    for name, pairs in sections:
        if name:
            draw.line([(MARGIN, top + 2), (width - MARGIN, top + 2)], RULE)
            draw.text((MARGIN, top + 10), name, INK, font_of(17))
            top += _HEADING
        for start in range(0, len(pairs), columns):
            for column, pair in enumerate(pairs[start : start + columns]):
                cell.draw(page, draw, MARGIN + column * (cell.width + GUTTER), top, pair)
            top += cell.height + GUTTER
    return page


def _outcome_line(draw: ImageDraw.ImageDraw, left: float, top: float, pairs: Sequence[_Pair]) -> None:
    """Key of the colours, with how many pairs fell to each."""
    font = font_of(15)
    counts = [
        (BETTER, f"{sum(pair.change > 0 for pair in pairs)} better"),
        (SAME, f"{sum(pair.change == 0 for pair in pairs)} the same"),
        (WORSE, f"{sum(pair.change < 0 for pair in pairs)} worse"),
    ]
    failed = sum(math.isnan(pair.change) for pair in pairs)
    counts += [(RULE, f"{failed} without a score")] if failed else []
    head = f"{len(pairs)} pairs:"
    draw.text((left, top), head, QUIET, font)
    left += font.getlength(head) + 10
    for color, text in counts:
        draw.rectangle([left, top + 4, left + 9, top + 13], color)
        draw.text((left + 15, top), text, QUIET, font)
        left += font.getlength(text) + 33


class _PairCell:
    """One pair: the base in a thin grey frame, the tuned in a coloured one, a score under each, then the prompt."""

    LABEL, SCORE, TEXT, GAP = 18, 23, 18, 4

    def __init__(self, pairs: Sequence[_Pair], scale: int | None) -> None:
        self.scale = scale
        self.side, self.picture_height = scaled(pairs[0].base, scale).size
        self.width = 2 * self.side + self.GAP + 4 * BORDER
        self.texts = {pair.prompt: wrap(pair.prompt, self.width, 15) for pair in pairs}
        lines = max(len(text) for text in self.texts.values())
        self.height = self.LABEL + self.picture_height + 2 * BORDER + 6 + self.SCORE + lines * self.TEXT

    def draw(self, page: Image.Image, draw: ImageDraw.ImageDraw, left: int, top: int, pair: _Pair) -> None:
        second = left + self.side + 2 * BORDER + self.GAP
        self._one(page, draw, (left, top), pair.base, ("base", score_text(pair.before)), (RULE, QUIET))
        ink = pair.color if pair.change else QUIET
        self._one(page, draw, (second, top), pair.tuned, ("tuned", pair.verdict), (pair.color, ink))
        top += self.LABEL + self.picture_height + 2 * BORDER + 6 + self.SCORE
        for line, text in enumerate(self.texts[pair.prompt]):
            draw.text((left, top + line * self.TEXT), text, INK, font_of(15))

    def _one(
        self,
        page: Image.Image,
        draw: ImageDraw.ImageDraw,
        corner: tuple[int, int],
        picture: Images,
        words: tuple[str, str],
        colors: tuple[str, str],
    ) -> None:
        left, top = corner
        draw.text((left, top), words[0], QUIET, font_of(13))
        top += self.LABEL
        right, bottom = left + self.side + 2 * BORDER - 1, top + self.picture_height + 2 * BORDER - 1
        draw.rectangle([left, top, right, bottom], colors[0])
        page.paste(scaled(picture, self.scale), (left + BORDER, top + BORDER))
        draw.text((left, bottom + 7), words[1], colors[1], font_of(15))


def contact_sheet(
    images: Images, captions: Sequence[str], *, columns: int = 8, scale: int | None = None, title: str = ""
) -> Image.Image:
    """Draw pictures uint8 [N, H, W, 3] in rows, in the given order; of videos [N, F, H, W, 3] the middle frame.

    Each line of a caption is wrapped to at most three lines below its picture.
    """
    from PIL import Image as Pil
    from PIL import ImageDraw

    images = stills(images)
    check_images(images, [len(captions)], "contact_sheet")
    columns = max(1, min(columns, len(images)))
    shown = [scaled(image, scale) for image in images]
    side, height = shown[0].size
    texts = [[line for part in caption.split("\n") for line in wrap(part, side, 14)] for caption in captions]
    lines = max(len(text) for text in texts)
    step = height + 6 + lines * 17 + GUTTER
    top = MARGIN + (36 if title else 0)
    width = 2 * MARGIN + columns * side + (columns - 1) * GUTTER
    page = Pil.new("RGB", (width, top + math.ceil(len(images) / columns) * step - GUTTER + MARGIN), PAPER)
    draw = ImageDraw.Draw(page)
    if title:
        draw.text((MARGIN, MARGIN), title, INK, font_of(20))
    for index, (picture, text) in enumerate(zip(shown, texts, strict=True)):
        left, above = MARGIN + index % columns * (side + GUTTER), top + index // columns * step
        page.paste(picture, (left, above))
        for line, words in enumerate(text):
            draw.text((left, above + height + 6 + line * 17), words, INK, font_of(14))
    return page


def save_grids(
    folder: Path,
    base: Images,
    tuned: Images,
    prompts: Sequence[str],
    base_scores: Sequence[float | None],
    tuned_scores: Sequence[float | None],
    *,
    limit: int = 24,
    columns: int = 4,
) -> list[Path]:
    """Write change.png, worst.png and tuned.png into ``folder`` and return their paths.

    change.png: the largest gains, unchanged pairs and the largest losses, a third of ``limit`` each where there are
    that many, with how many of each there are in all. worst.png: the largest losses first, where reward hacking
    shows. tuned.png: tuned pictures spread evenly over the prompts, chosen by no score. Different prompts come before
    further pictures of the same prompt. Arguments as `before_after_grid`, and videos uint8 [N, F, H, W, 3] besides: the
    pages show their middle frames, and video.png and video.webp the frames of the largest changes, base above tuned.
    """
    videos = base, tuned
    base, tuned = stills(base), stills(tuned)
    pairs = _pairs(base, tuned, prompts, base_scores, tuned_scores)
    ordered = sorted(pairs, key=_by_gain)
    gains = [pair for pair in ordered if pair.change > 0]
    losses = [pair for pair in reversed(ordered) if pair.change < 0]
    same = [pair for pair in ordered if pair.change == 0]
    third = max(1, limit // 3)
    change = [
        (f"Largest gains, of {len(gains)}", _distinct(gains, third)),
        (f"Unchanged, of {len(same)}", _distinct(_spread(same, 4 * third), third)),
        (f"Largest losses, of {len(losses)}", _distinct(losses, third)),
    ]
    failed = [pair for pair in ordered if math.isnan(pair.change)]
    if len(failed) == len(pairs):
        change = [("No pair has both scores", failed[:limit])]
    worst = _distinct([*losses, *same, *reversed(gains), *failed], limit)
    pages = {
        "change.png": _page(change, columns, "Base and tuned, same noise", pairs),
        "worst.png": _page([("", worst)], columns, "Base and tuned, largest losses first", pairs),
        "tuned.png": _tuned_sheet(tuned, prompts, tuned_scores, limit),
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, page in pages.items():
        page.save(folder / name)
    paths = [folder / name for name in pages]
    return paths + _save_videos(folder, *videos, pairs) if videos[0].ndim == 5 else paths


def _save_videos(folder: Path, base: Images, tuned: Images, pairs: Sequence[_Pair]) -> list[Path]:
    """video.png and video.webp: base and tuned of the pairs that changed most, either way."""
    order = sorted(range(len(pairs)), key=lambda i: (math.isnan(pairs[i].change), -abs(pairs[i].change or 0)))
    rows = order[:MAX_VIDEOS]
    shown = np.stack([side[i] for i in rows for side in (base, tuned)])
    texts = [
        text
        for i in rows
        for text in (f"base {score_text(pairs[i].before)}: {pairs[i].prompt}", f"tuned {pairs[i].verdict}")
    ]
    video_sheet(shown, texts, title="Base and tuned, largest changes").save(folder / "video.png")
    save_animation(folder / "video.webp", shown, columns=2)
    return [folder / "video.png", folder / "video.webp"]


def _distinct(pairs: Sequence[_Pair], count: int) -> list[_Pair]:
    """The first ``count`` pairs in order, of different prompts as long as there are any."""
    seen: set[str] = set()
    first: list[int] = []
    again: list[int] = []
    for index, pair in enumerate(pairs):
        (again if pair.prompt in seen else first).append(index)
        seen.add(pair.prompt)
    return [pairs[index] for index in sorted((first + again)[:count])]


def _spread(pairs: Sequence[_Pair], count: int) -> list[_Pair]:
    """At most ``count`` pairs at even distances."""
    if len(pairs) <= count:
        return list(pairs)
    return [pairs[index * len(pairs) // count] for index in range(count)]


def _tuned_sheet(tuned: Images, prompts: Sequence[str], scores: Sequence[float | None], limit: int) -> Image.Image:
    first: dict[str, int] = {}
    for index, prompt in enumerate(prompts):
        first.setdefault(prompt, index)
    rows, count = list(first.values()), min(limit, len(first))
    picked = [rows[index * len(rows) // count] for index in range(count)]
    numbers = as_numbers(scores)
    captions = [f"{score_text(numbers[index])}\n{' '.join(prompts[index].split())}" for index in picked]
    return contact_sheet(tuned[picked], captions, title="Tuned, one picture a prompt")
