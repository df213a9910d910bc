"""scripts/ctrl_study.py: exact velocity and labels of its mixture, the pre-trained model at the start, one iteration."""

from __future__ import annotations

import importlib
import sys
from types import ModuleType

import pytest
import torch

from tests.structure.sources import ROOT


@pytest.fixture(scope="module")
def study() -> ModuleType:
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        return importlib.import_module("ctrl_study")
    finally:
        sys.path.remove(str(ROOT / "scripts"))


def test_the_velocity_is_that_of_the_mixture(study: ModuleType) -> None:
    """v = -(x + t score) / (1 - t), the score by autograd of the density written out here."""
    toy = study.toy
    x = torch.randn(40, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0)).requires_grad_()
    t = torch.linspace(0.05, 0.9, 40, dtype=torch.float64)
    variance = (1 - t) ** 2 * toy.SPREAD**2 + t**2
    apart = x[:, None] - (1 - t)[:, None, None] * toy.CENTRES.double()
    density = (torch.exp(-apart.square().sum(2) / (2 * variance[:, None])) / variance[:, None]).sum(1)
    (score,) = torch.autograd.grad(density.log().sum(), x)
    expected = -(x + t[:, None] * score) / (1 - t)[:, None]
    torch.testing.assert_close(toy.base_velocity(x.detach(), t), expected.detach(), atol=1e-6, rtol=1e-6)


def test_labels_have_the_stated_odds(study: ModuleType) -> None:
    toy = study.toy
    found = toy.likelihood(toy.CENTRES)
    torch.testing.assert_close(found.sum(1), torch.ones(toy.MODES))
    assert found.argmax(1).tolist() == [0, 1, 2, 0, 1, 2] and float(found.max()) < 0.81
    x0, y = toy.labelled(0)
    odds = toy.likelihood(x0).gather(1, y[:, None]).mean()
    assert float(odds) == pytest.approx(float(toy.likelihood(x0).square().sum(1).mean()), abs=0.03)


def test_it_starts_at_the_pre_trained_model_and_leaves_it(study: ModuleType) -> None:
    toy = study.toy
    x, t = torch.randn(8, 2), torch.full((8,), 0.4)
    begun, _ = study.trained(0, 1.0, 0)
    assert torch.equal(study.conditioned(begun, 1)(x, t), toy.base_velocity(x, t))
    moved, samples = study.trained(0, 1.0, 2)
    assert not torch.equal(study.conditioned(moved, 1)(x, t), toy.base_velocity(x, t))
    assert samples == 2 * 144 * (9 + 10)  # policy 9 steps, reference 10


def test_cells_are_shares(study: ModuleType) -> None:
    found = study.cells(torch.tensor([[0.0, 0.0], [9.0, -9.0]]), torch.tensor([3.0, 1.0]))
    assert float(found.sum()) == 1 and sorted(found[found > 0].tolist()) == [0.25, 0.75]
