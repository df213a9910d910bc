"""Differentiable pixel statistics: worked pictures, gradients, classes."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from flowrl.rewards.pixels import ColourClass, PixelStatistic

from flowrl.errors import UserError
from flowrl.records import Request, RewardBatch


def asked(*classes: int | None) -> list[Request]:
    return [
        Request("", i, 2, 2, metadata={} if y is None else {"condition": {"colour": y}}) for i, y in enumerate(classes)
    ]


def test_worked_pictures() -> None:
    x = torch.zeros(2, 3, 2, 2)
    x[0, 0] = 1  # red
    x[1, :, :, 0] = 0.5  # a grey stripe
    expected = {
        "redness": [1, 0],
        "brightness": [1 / 3, 0.25],
        "contrast": [0, 0.5 / math.sqrt(3)],
        "smoothness": [0, -0.25],
    }
    for name, values in expected.items():
        assert PixelStatistic(name).value(x, asked(None, None)).tolist() == pytest.approx(values, abs=1e-6), name
    assert PixelStatistic(preset="contrast").statistic == "contrast"
    with pytest.raises(UserError, match="statistic is 'hue'; use redness, brightness, contrast, smoothness"):
        PixelStatistic("hue")


def test_it_scores_finished_pictures() -> None:
    images = np.zeros((1, 2, 2, 3), np.uint8)
    images[..., 0] = 51
    result = PixelStatistic().score(RewardBatch(images, ["a"], [{}]))
    assert result.scores.tolist() == pytest.approx([0.2]) and result.valid.all() and result.errors == [None]


def test_classes() -> None:
    x = torch.zeros(4, 3, 2, 2)
    x[:, 1] = 0.3
    found = ColourClass(sharpness=10.0).value(x, asked(1, 0, None, 2))
    z = math.exp(3) + 2
    assert found.tolist() == pytest.approx([3 - math.log(z), -math.log(z), 0, -math.log(z)], abs=1e-6)
    with pytest.raises(UserError, match=r"condition\.colour must be 0, 1 or 2"):
        ColourClass().value(x, asked(1, 3, 0, 0))


def test_gradients() -> None:
    x = torch.rand(3, 3, 5, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64).requires_grad_()
    for reward in (*(PixelStatistic(name) for name in PixelStatistic.presets), ColourClass()):
        assert torch.autograd.gradcheck(lambda x, reward=reward: reward.value(x, asked(0, 1, 2)), (x,))
