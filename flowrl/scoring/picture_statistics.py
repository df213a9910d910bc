"""What can be counted in a picture without a network: cheap signs that a policy has found a way around its reward.

Every function takes pictures uint8 [N, H, W, 3] and returns float32 [N]. luma = 0.299 R + 0.587 G + 0.114 B in [0, 1].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType

import numpy as np
import numpy.typing as npt

Pictures = npt.NDArray[np.uint8]
Numbers = npt.NDArray[np.float32]

EDGE = 0.1  # luma change a pixel, above which a pixel is an edge
DARK = 0.1  # luma below which a pixel is dark
HIGH = 0.25  # cycles a pixel above which a frequency is high: half of what the grid can carry
BINS = 4  # colour bins a channel


def luma(pictures: Pictures) -> npt.NDArray[np.float64]:
    """Brightness of each pixel, [N, H, W] in [0, 1] (ITU-R BT.601)."""
    weighted: npt.NDArray[np.float64] = pictures.astype(np.float64) @ np.array([0.299, 0.587, 0.114]) / 255
    return weighted


def _single(values: npt.NDArray[np.float64]) -> Numbers:
    single: Numbers = values.astype(np.float32)
    return single


def brightness(pictures: Pictures) -> Numbers:
    """Mean luma, in [0, 1]."""
    return _single(luma(pictures).mean((1, 2)))


def contrast(pictures: Pictures) -> Numbers:
    """Standard deviation of luma over the picture, in [0, 0.5]."""
    return _single(luma(pictures).std((1, 2)))


def saturation(pictures: Pictures) -> Numbers:
    """Mean of (max - min) / max over R, G, B, 0 for black: HSV's saturation, in [0, 1]."""
    values = pictures.astype(np.float64)
    high, low = values.max(-1), values.min(-1)
    return _single(((high - low) / np.maximum(high, 1)).mean((1, 2)))


def sharpness(pictures: Pictures) -> Numbers:
    """Variance of the Laplacian of luma (up + down + left + right - 4 centre) over inner pixels; 0 for a flat picture.

    Pictures of less than 3 pixels a side have no inner pixel and give 0.
    """
    y = luma(pictures)
    if min(y.shape[1:]) < 3:
        return np.zeros(len(y), np.float32)
    inner = y[:, 1:-1, 1:-1]
    laplacian = y[:, :-2, 1:-1] + y[:, 2:, 1:-1] + y[:, 1:-1, :-2] + y[:, 1:-1, 2:] - 4 * inner
    return _single(laplacian.var((1, 2)))


def edge_density(pictures: Pictures) -> Numbers:
    """Share of pixels where luma differs by more than 0.1 from the next pixel below or to the right, in [0, 1]."""
    y = luma(pictures)
    edges = np.zeros(y.shape, np.bool_)
    edges[:, :-1] |= np.abs(np.diff(y, axis=1)) > EDGE
    edges[:, :, :-1] |= np.abs(np.diff(y, axis=2)) > EDGE
    return _single(edges.mean((1, 2)))


def dark_share(pictures: Pictures) -> Numbers:
    """Share of pixels with luma below 0.1, in [0, 1]."""
    return _single((luma(pictures) < DARK).mean((1, 2)))


def color_entropy(pictures: Pictures) -> Numbers:
    """Entropy of the colour histogram, 4 bins a channel, in bits: 0 (one colour) to 6."""
    codes = pictures.astype(np.int64) // (256 // BINS) @ np.array([BINS * BINS, BINS, 1])
    found = np.zeros(len(pictures), np.float32)
    for index, code in enumerate(codes):
        share = np.bincount(code.ravel()) / code.size
        share = share[share > 0]
        found[index] = -(share * np.log2(share)).sum()
    return found


def colorfulness(pictures: Pictures) -> Numbers:
    """M of Hasler and Suesstrunk (2003): sqrt(var(rg) + var(yb)) + 0.3 sqrt(mean(rg)^2 + mean(yb)^2).

    rg = R - G, yb = (R + G) / 2 - B, in units of 0 to 255; 0 for grey, about 100 for very colourful pictures.
    """
    red, green, blue = np.moveaxis(pictures.astype(np.float64), -1, 0)
    rg, yb = red - green, (red + green) / 2 - blue
    spread = np.sqrt(rg.var((1, 2)) + yb.var((1, 2)))
    return _single(spread + 0.3 * np.hypot(rg.mean((1, 2)), yb.mean((1, 2))))


def high_frequency(pictures: Pictures) -> Numbers:
    """Share of luma's energy about its mean at more than 0.25 cycles a pixel, in [0, 1]; 0 for a flat picture.

    Grid texture, which learned rewards are known to drive up, shows here first.
    """
    y = luma(pictures)
    energy = np.abs(np.fft.fft2(y - y.mean((1, 2), keepdims=True))) ** 2
    fy, fx = np.fft.fftfreq(y.shape[1]), np.fft.fftfreq(y.shape[2])
    high = np.hypot(fy[:, None], fx[None]) > HIGH
    total = energy.sum((1, 2))
    share = np.where(total > 1e-9, (energy * high).sum((1, 2)) / np.maximum(total, 1e-9), 0.0)
    return _single(share)


STATISTICS: Mapping[str, Callable[[Pictures], Numbers]] = MappingProxyType(
    {
        "brightness": brightness,
        "contrast": contrast,
        "saturation": saturation,
        "sharpness": sharpness,
        "edge_density": edge_density,
        "dark_share": dark_share,
        "color_entropy": color_entropy,
        "colorfulness": colorfulness,
        "high_frequency": high_frequency,
    }
)


def measure(pictures: Pictures) -> dict[str, Numbers]:
    """Every statistic by name. pictures: uint8 [N, H, W, 3]. Raises ValueError for another shape or dtype."""
    if pictures.dtype != np.uint8 or pictures.ndim != 4 or pictures.shape[-1] != 3:
        raise ValueError(f"expected uint8 [N, H, W, 3], got {pictures.dtype} {list(pictures.shape)}")
    return {name: function(pictures) for name, function in STATISTICS.items()}
