"""The JPEG reward is the file size that Pillow writes, with sign, scale and header taken into account."""

from __future__ import annotations

import io
from typing import Any

import numpy as np
import pytest
from flowrl.rewards.jpeg import JpegSize
from PIL import Image

from flowrl.errors import UserError
from flowrl.records import RewardBatch


def pictures(size: int = 40) -> RewardBatch:
    generator = np.random.default_rng(0)
    flat = np.full((size, size, 3), 128, np.uint8)
    half = flat.copy()
    half[:, : size // 2] = 240
    noise = generator.integers(256, size=(size, size, 3), dtype=np.uint8)
    return RewardBatch(np.stack([flat, half, noise]), [""] * 3, [{}] * 3)


def file_bytes(batch: RewardBatch, quality: int) -> np.ndarray[Any, np.dtype[np.float64]]:
    sizes = []
    for picture in batch.images:
        stream = io.BytesIO()
        Image.fromarray(picture, "RGB").save(stream, "JPEG", quality=quality)
        sizes.append(stream.tell())
    return np.array(sizes, dtype=np.float64)


@pytest.mark.parametrize("quality", [50, 95])
@pytest.mark.parametrize("sign", [-1, 1])
def test_size_sign_and_scale(quality: int, sign: int) -> None:
    batch = pictures()
    sizes = file_bytes(batch, quality)
    raw = JpegSize(quality, scale=500.0, sign=sign, header=False).score(batch)  # type: ignore[arg-type]
    np.testing.assert_allclose(raw.scores, sign * sizes / 1000 / 500, rtol=1e-6)
    bare = JpegSize(quality, sign=sign).score(batch)  # type: ignore[arg-type]
    np.testing.assert_allclose(bare.scores, sign * (sizes - sizes[0]) / 1000, rtol=1e-6, atol=1e-9)
    np.testing.assert_allclose(bare.components["kilobytes"], np.abs(bare.scores), rtol=1e-6)
    assert bare.scores.dtype == np.float32 and bare.valid.all() and list(bare.errors) == [None] * 3


def test_flat_pictures_are_the_best_and_the_header_is_most_of_a_small_file() -> None:
    scores = JpegSize().score(pictures()).scores
    assert scores[0] == 0 > scores[1] > scores[2]
    assert JpegSize(header=False).score(pictures()).scores[0] < -0.5


def test_the_header_is_that_of_the_same_size_of_picture() -> None:
    for size in (16, 40, 200):
        assert JpegSize().score(pictures(size)).scores[0] == 0


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"quality": 0}, "jpeg: quality is 0; use 1 to 95"),
        ({"quality": 100}, "jpeg: quality is 100; use 1 to 95"),
        ({"scale": 0.0}, "jpeg: scale is 0.0; use a number of kB above 0"),
        ({"scale": float("nan")}, "jpeg: scale is nan; use a number of kB above 0"),
        ({"scale": float("inf")}, "jpeg: scale is inf; use a number of kB above 0"),
        ({"sign": 0}, "jpeg: sign is 0; use -1 (small files are good) or 1 (large files are good)"),
    ],
)
def test_wrong_arguments(args: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        JpegSize(**args)
    assert str(caught.value) == message
