"""Video scores on films whose motion, flicker and identity are known; a frozen film earns nothing."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flowrl.rewards.video import VideoFlicker, VideoIdentity, VideoMotion, identity, motion, steadiness

from flowrl.errors import UserError

from .checkpoints import batch, pictures, save_clip, save_dino


def film(*frames: Any) -> Any:
    return np.stack([np.asarray(f, np.uint8) for f in frames])[None]


def grey(value: int) -> Any:
    return np.full((10, 10, 3), value, np.uint8)


def dot(column: int) -> Any:
    """A white block of 5 pixels on black."""
    frame = grey(0)
    frame[:5, column] = 255
    return frame


def noise(seed: int = 0, count: int = 5) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (2, count, 12, 16, 3)).astype(np.uint8)


def slow_motion(one: Any) -> float:
    y = one.astype(float) @ np.array([0.299, 0.587, 0.114]) / 255
    tops = []
    for a, b in itertools.pairwise(y):
        change = np.sort(np.abs((b - b.mean()) - (a - a.mean())).ravel())[::-1]
        tops.append(change[: round(0.05 * change.size)].mean())
    return float(np.mean(tops))


def test_known_films() -> None:
    frozen, flash, moving = (
        film(*[dot(2)] * 4),
        film(grey(0), grey(255), grey(0), grey(255)),
        film(dot(1), dot(2), dot(3)),
    )
    assert motion(frozen) == 0 and steadiness(frozen) == 1
    assert motion(flash) == pytest.approx(0, abs=1e-6) and steadiness(flash) == pytest.approx(0, abs=1e-6)
    assert motion(moving) == pytest.approx(1)  # of 100 pixels 5 leave and 5 arrive; the top 5 change by 1
    # Columns 1, 2, 3: second differences 1, -2, 1 over 5 rows of 100 pixels.
    assert steadiness(moving) == pytest.approx(1 - 5 * 4 / 100 / 2)
    two = np.concatenate([film(dot(1), dot(2)), film(dot(3), dot(3))])
    assert steadiness(two).tolist() == [1, 1]  # two frames have no second difference
    fade = film(grey(0), grey(50), grey(100), grey(150))
    assert steadiness(fade) == pytest.approx(1) and motion(fade) == pytest.approx(0, abs=1e-6)
    np.testing.assert_allclose(motion(noise()), [slow_motion(one) for one in noise()], rtol=1e-5)


def test_identity_is_vbench_consistency() -> None:
    generator = np.random.default_rng(0)
    vectors = generator.normal(size=(2, 4, 3))
    vectors /= np.linalg.norm(vectors, axis=-1, keepdims=True)
    expected = []
    for u in vectors:
        terms = [(max(0, u[t] @ u[t - 1]) + max(0, u[t] @ u[0])) / 2 for t in range(1, 4)]
        expected.append(sum(terms) / 3)
    np.testing.assert_allclose(identity(torch.tensor(vectors)).numpy(), expected, atol=1e-9)


def test_a_frozen_film_earns_nothing(tmp_path: Path) -> None:
    save_dino(tmp_path)
    frozen = batch(np.repeat(noise(count=1), 3, 1))
    for reward in (VideoMotion(), VideoFlicker(), VideoIdentity(str(tmp_path), device="cpu")):
        result = reward.score(frozen)
        assert result.scores.tolist() == [0, 0] and result.components["motion"].tolist() == [0, 0]
    assert reward.score(frozen).components["identity"] == pytest.approx(1, abs=1e-5)


def test_the_floor_pays_in_proportion(tmp_path: Path) -> None:
    save_dino(tmp_path / "dino")
    save_clip(tmp_path / "clip")
    films = noise()
    films[1] = (128 + (films[1].astype(float) - 128) / 40).astype(np.uint8)
    own, moved = batch(films), motion(films)
    floor = float(moved[0]) / 2
    share = np.minimum(1, moved / floor)
    assert share[0] == 1 and 0 < share[1] < 0.2
    np.testing.assert_allclose(VideoMotion(floor).score(own).scores, share, rtol=1e-5)
    np.testing.assert_allclose(VideoFlicker(floor).score(own).scores, share * steadiness(films), rtol=1e-5)
    for kind in ("dino", "clip"):
        reward = VideoIdentity(str(tmp_path / kind), kind, floor, "cpu")  # type: ignore[arg-type]
        result = reward.score(own)
        frames = reward.encoder.images(films.reshape(-1, *films.shape[2:])).reshape(2, 5, -1)
        np.testing.assert_allclose(result.components["identity"], identity(frames).numpy(), atol=1e-5)
        np.testing.assert_allclose(result.scores, share * identity(frames).numpy(), atol=1e-5)
    assert reward.backbone == "clip-vit-l-14" and VideoIdentity.backbone == "dinov2"


def test_wrong_input() -> None:
    with pytest.raises(
        UserError, match=r"^video_motion: needs videos of at least 2 frames, got \[4, 24, 40, 3\]; use it"
    ):
        VideoMotion().score(batch(pictures()))
    with pytest.raises(UserError, match=r"^video_flicker: floor is 0; use a motion above 0"):
        VideoFlicker(0)
    with pytest.raises(UserError, match=r"^video_identity: encoder is 'vgg'; use dino or clip"):
        VideoIdentity(encoder="vgg")  # type: ignore[arg-type]
