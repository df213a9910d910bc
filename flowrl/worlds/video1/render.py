"""Renderer of world video1: the anti-aliased shapes of world v1, drawn once a frame."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from flowrl.worlds.v1.render import coverage
from flowrl.worlds.v1.scenes import BACKGROUND, COLORS
from flowrl.worlds.video1.scenes import FRAMES, SIZE, Moving


def render(item: Moving) -> npt.NDArray[np.uint8]:
    """Draw a clip: uint8 [5, 24, 24, 3]."""
    time = np.arange(FRAMES, dtype=np.float64)[:, None, None]
    rows, columns = np.mgrid[0:SIZE, 0:SIZE].astype(np.float64)
    dx, dy = columns - (item.x + item.dx * time), rows - (item.y + item.dy * time)
    alpha = coverage(item.shape, dx, dy, item.radius)[..., None]
    ground = np.array(BACKGROUND, np.float64)
    return (ground + alpha * (np.array(COLORS[item.color]) - ground) + 0.5).astype(np.uint8)
