"""The average of the weights, swaps that leave no trace, and the learning rate's schedule."""

from __future__ import annotations

import pytest
import torch

from flowrl.config import load
from flowrl.training.trainer import learning_rate
from flowrl.training.weights import Weights, snapshot_reference


def scalar_module() -> torch.nn.Module:
    module = torch.nn.Linear(1, 1, bias=False)
    module.weight.data.fill_(1.0)
    return module


def test_average_follows_its_definition() -> None:
    """decay .75, every second update: 1, then .75 + .25 * 5 = 2, then .75 * 2 + .25 * 10 = 4."""
    module = scalar_module()
    weights = Weights(module, decay=0.75, every=2)
    seen = []
    for update, value in enumerate([3.0, 5.0, 7.0, 10.0], start=1):
        module.weight.data.fill_(value)
        weights.average(update)
        seen.append(float(weights.shadow[0]))
    assert seen == [1.0, 2.0, 2.0, 4.0]


def test_swaps_copy_and_leave_no_trace() -> None:
    module = scalar_module()
    weights = Weights(module, decay=0.5)
    module.weight.data.fill_(3.0)
    weights.average(1)
    with weights.averaged():
        assert float(module.weight) == 2.0
        module.weight.data.fill_(9.0)  # must reach neither the average nor the live weights
    assert (float(module.weight), float(weights.shadow[0])) == (3.0, 2.0)
    with pytest.raises(KeyError), weights.averaged():
        raise KeyError
    assert float(module.weight) == 3.0


def test_the_snapshot_is_the_start() -> None:
    module = scalar_module()
    reference = snapshot_reference(Weights(module))
    module.weight.data.fill_(4.0)
    with reference():
        assert float(module.weight) == 1.0
    assert float(module.weight) == 4.0


def test_nothing_to_train_is_an_error() -> None:
    with pytest.raises(ValueError, match="no parameter of the network asks for a gradient"):
        Weights(scalar_module().requires_grad_(False))


def test_learning_rate() -> None:
    """Ten updates (5 iterations x 2): constant; linear from the whole rate to a tenth; warm-up over four."""
    base = {"rewards": [{"name": "jpeg"}], "iterations": 5, "objective": {"updates": 2}}

    def rates(**optimizer: object) -> list[float]:
        config = load(base | {"optimizer": {"lr": 1.0, **optimizer}})
        return [learning_rate(config, update) for update in range(10)]

    assert rates() == [1.0] * 10
    assert rates(schedule="linear") == pytest.approx([1 - i / 10 for i in range(10)])
    assert rates(warmup=4)[:5] == pytest.approx([0.25, 0.5, 0.75, 1.0, 1.0])
