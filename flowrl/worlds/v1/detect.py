"""Connected-components detector of world v1: finds shapes with colour, box and confidence, no learned weights.

Each pixel is explained as background + alpha * (palette colour - background); the colour with the smallest residual wins,
so anti-aliased edges keep the colour of their object. Components of one colour become objects; their shape is the template
with the largest soft intersection over union.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flowrl.records import Detection
from flowrl.worlds.v1.render import coverage
from flowrl.worlds.v1.scenes import BACKGROUND, COLORS, SHAPES

MIN_PIXELS = 6  # smaller components are specks (0.46% of the picture)
MAX_SIDE = 14  # the largest shape is 10 pixels across: a larger one is no shape of this world, however well it fits
MIN_OVERLAP = 0.66  # below this no template fits: the object is reported as a "blob"

_NAMES = tuple(COLORS)
_DIRECTIONS = np.array([np.subtract(COLORS[name], BACKGROUND) for name in _NAMES], dtype=np.float32)
_LENGTHS = (_DIRECTIONS**2).sum(1)


def _explain(images: npt.NDArray[np.uint8]) -> tuple[npt.NDArray[np.intp], npt.NDArray[np.float32]]:
    """Best palette colour [B, H, W] and its alpha in [0, 1] [B, H, W]."""
    offset = images.astype(np.float32) - np.array(BACKGROUND, np.float32)
    alpha = np.clip(offset @ _DIRECTIONS.T / _LENGTHS, 0.0, 1.0)  # [B, H, W, colours]
    square = (offset**2).sum(-1)[..., None]
    residual = square - 2 * alpha * (offset @ _DIRECTIONS.T) + alpha**2 * _LENGTHS
    best = residual.argmin(-1)
    return best, np.take_along_axis(alpha, best[..., None], -1)[..., 0]


@functools.lru_cache(maxsize=4096)
def _templates(height: int, width: int) -> npt.NDArray[np.float64]:
    """The five shapes stretched to a box of this many pixels: [5, height, width]."""
    dy, dx = np.mgrid[0:height, 0:width].astype(np.float64)
    found = []
    for shape in SHAPES:
        top, bottom, side = {"circle": (1, 1, 1), "square": (0.88, 0.88, 0.88), "triangle": (1, 0.75, 0.875),
                             "cross": (1, 1, 1), "ring": (1, 1, 1)}[shape]  # fmt: skip
        radius = 4.5
        x = (dx + 0.5 - width / 2) / (width / 2) * side * radius
        y = (dy + 0.5) / height * (top + bottom) * radius - top * radius
        found.append(coverage(shape, x, y, radius))
    return np.stack(found)


def detect(images: npt.NDArray[np.uint8]) -> list[list[Detection]]:
    """Find the objects of each picture.

    images: uint8 [B, H, W, 3]. Returns one list a picture, in reading order; a component that fits no template has label
    "blob", so that a checker can count what a caption does not explain.
    """
    from scipy import ndimage

    if images.ndim != 4 or images.shape[-1] != 3 or images.dtype != np.uint8:
        raise ValueError(f"detect: expected uint8 [B, H, W, 3], got {images.dtype} {list(images.shape)}")
    best, alpha = _explain(images)
    found: list[list[Detection]] = []
    for labels, strength in zip(best, alpha, strict=True):
        solid = strength > 0.5
        objects = []
        for index in np.unique(labels[solid]):
            components, count = ndimage.label(solid & (labels == index))
            sizes = np.bincount(components.ravel(), minlength=count + 1)
            for number, box in enumerate(ndimage.find_objects(components), start=1):
                if sizes[number] >= MIN_PIXELS:
                    objects.append(_describe(components[box] == number, strength[box], _NAMES[index], box))
        found.append(sorted(objects, key=lambda d: (d.box[1], d.box[0])))
    return found


def _describe(
    mask: npt.NDArray[np.bool_], strength: npt.NDArray[np.float32], color: str, box: Sequence[slice]
) -> Detection:
    rows, columns = box
    soft = mask * strength
    templates = _templates(*mask.shape)
    overlap = np.minimum(templates, soft).sum((1, 2)) / np.maximum(templates, soft).sum((1, 2))
    best = int(overlap.argmax())
    score = float(overlap[best])
    fits = score >= MIN_OVERLAP and 5 <= max(mask.shape) <= MAX_SIDE
    label = SHAPES[best] if fits else "blob"
    return Detection(label, score, (columns.start, rows.start, columns.stop, rows.stop), color)
