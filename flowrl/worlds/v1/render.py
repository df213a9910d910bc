"""Renderer of world v1: anti-aliased shapes from signed distances, no picture library needed."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

from flowrl.worlds.v1.scenes import BACKGROUND, COLORS, SIZE, Item


def coverage(
    shape: str, dx: npt.NDArray[np.float64], dy: npt.NDArray[np.float64], radius: float
) -> npt.NDArray[np.float64]:
    """Share of each pixel that ``shape`` covers, in [0, 1], from the signed distance to its edge.

    dx, dy: offsets from the centre in pixels, any shape; radius in pixels.
    """
    if shape == "circle":
        distance = np.hypot(dx, dy) - radius
    elif shape == "square":
        distance = np.maximum(np.abs(dx), np.abs(dy)) - 0.88 * radius
    elif shape == "triangle":
        distance = np.maximum(dy - 0.75 * radius, (np.abs(dx) * 2.0 - dy - 1.0 * radius) / np.sqrt(5.0))
    elif shape == "cross":
        arm, half = radius, 0.34 * radius
        bar = np.maximum(np.abs(dx) - arm, np.abs(dy) - half)
        post = np.maximum(np.abs(dx) - half, np.abs(dy) - arm)
        distance = np.minimum(bar, post)
    elif shape == "ring":
        distance = np.abs(np.hypot(dx, dy) - 0.74 * radius) - 0.26 * radius
    else:
        raise ValueError(f"coverage: unknown shape {shape!r}; world v1 draws circle, square, triangle, cross, ring")
    return np.clip(0.5 - distance, 0.0, 1.0)


def render(items: Sequence[Item]) -> npt.NDArray[np.uint8]:
    """Draw a scene: uint8 [36, 36, 3]."""
    canvas = np.empty((SIZE, SIZE, 3))
    canvas[:] = BACKGROUND
    for item in items:
        x0, y0 = max(0, int(item.x - 7)), max(0, int(item.y - 7))
        x1, y1 = min(SIZE, x0 + 15), min(SIZE, y0 + 15)
        dy, dx = np.mgrid[y0:y1, x0:x1].astype(np.float64)
        alpha = coverage(item.shape, dx - item.x, dy - item.y, item.radius)[..., None]
        patch = canvas[y0:y1, x0:x1]
        canvas[y0:y1, x0:x1] = patch + alpha * (np.array(COLORS[item.color]) - patch)
    return (canvas + 0.5).astype(np.uint8)
