"""Picture statistics on pictures whose numbers are known by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from flowrl.rewards.statistics import ImageStatistics

from flowrl.errors import UserError
from flowrl.scoring.picture_statistics import STATISTICS, measure

from .checkpoints import batch, pictures


def flat(*color: int, side: int = 16) -> np.ndarray:  # type: ignore[type-arg]
    return np.full((side, side, 3), color, np.uint8)


def halves() -> np.ndarray:  # type: ignore[type-arg]
    """Black on the left, white on the right."""
    image = flat(0)
    image[:, 8:] = 255
    return image


def checker() -> np.ndarray:  # type: ignore[type-arg]
    return ((np.indices((16, 16)).sum(0) % 2)[..., None] * np.full(3, 255)).astype(np.uint8)


def test_known_pictures() -> None:
    images = np.stack([flat(0), flat(255, 0, 0), flat(128, 128, 128), halves(), checker()])
    found = measure(images)
    expected = {
        "brightness": [0, 0.299, 128 / 255, 0.5, 0.5],
        "contrast": [0, 0, 0, 0.5, 0.5],
        "saturation": [0, 1, 0, 0, 0],
        "edge_density": [0, 0, 0, 1 / 16, 255 / 256],
        "dark_share": [1, 0, 0, 0.5, 0.5],
        "color_entropy": [0, 0, 0, 1, 1],
        "colorfulness": [0, 0.3 * math.hypot(255, 127.5), 0, 0, 0],
        # One step in 14 columns of the Laplacian: +1 left of it, -1 right of it. The checker: +-4 everywhere.
        "sharpness": [0, 0, 0, 2 / 14, 16],
    }
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, atol=1e-5, err_msg=name)
    assert found["high_frequency"][4] == pytest.approx(1) and (found["high_frequency"][:3] == 0).all()
    # A step of period 16: sin^-2 of the odd harmonics 1, 3, 5, 7; those above 0.25 cycles are 5 and 7.
    power = {k: 1 / math.sin(math.pi * k / 16) ** 2 for k in (1, 3, 5, 7)}
    assert found["high_frequency"][3] == pytest.approx((power[5] + power[7]) / sum(power.values()), abs=1e-5)
    assert set(found) == set(STATISTICS) == {*expected, "high_frequency"}


def test_entropy_counts_64_colours_at_most() -> None:
    grid = np.stack(np.meshgrid(*[np.arange(4) * 64] * 3, indexing="ij"), -1).reshape(1, 8, 8, 3).astype(np.uint8)
    assert measure(grid)["color_entropy"][0] == pytest.approx(6)
    assert measure(grid + np.uint8(63))["color_entropy"][0] == pytest.approx(6)


def test_the_reward_gives_one_and_shows_all() -> None:
    images = pictures()
    result = ImageStatistics("saturation").score(batch(images))
    np.testing.assert_array_equal(result.scores, measure(images)["saturation"])
    assert set(result.components) == set(STATISTICS) and result.valid.all()
    near = ImageStatistics("brightness", target=0.4).score(batch(images)).scores
    np.testing.assert_allclose(near, -np.abs(measure(images)["brightness"] - 0.4), atol=1e-6)
    film = ImageStatistics("contrast", stride=3).score(batch(images[None])).scores
    np.testing.assert_allclose(film, [measure(images)["contrast"][[0, 3]].mean()], atol=1e-6)


def test_wrong_input() -> None:
    with pytest.raises(ValueError, match=r"expected uint8 \[N, H, W, 3\], got float64 \[2, 4, 4, 3\]"):
        measure(np.zeros((2, 4, 4, 3)))  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"^statistics: statistic is 'hue'; use one of brightness, contrast"):
        ImageStatistics("hue")
    assert (measure(np.zeros((1, 2, 2, 3), np.uint8))["sharpness"] == 0).all()


def test_boundaries() -> None:
    """A nearly black red is still red; a picture of 3 x 3 has one inner pixel; a period of 4 pixels is not yet high."""
    assert measure(flat(1, 0, 0)[None])["saturation"][0] == 1
    cross = np.zeros((1, 4, 3, 3), np.uint8)
    cross[0, 1, 1] = 255
    # Two inner pixels: -4 at the white one, +1 at the one below it.
    assert measure(cross)["sharpness"][0] == pytest.approx(6.25)
    wave = flat(0)
    wave[:, [0, 1, 4, 5, 8, 9, 12, 13]] = 255
    assert measure(wave[None])["high_frequency"][0] == pytest.approx(0, abs=1e-6)
