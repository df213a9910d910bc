"""Losses of process rewards against worked numbers, plain loops and the models that they come from."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.credit import reward_model_losses as rml

GAPS = torch.linspace(-4, 4, 17, dtype=torch.float64)


def probability(loss, outcome: float, **options) -> torch.Tensor:
    return (-loss(GAPS, torch.full_like(GAPS, outcome), **options)).exp()


def test_bradley_terry_worked_numbers() -> None:
    gap = torch.tensor([0.0, 1.0, 2.0])
    outcome = torch.tensor([1.0, 1.0, 0.5])
    expected = torch.tensor([math.log(2), math.log1p(math.exp(-0.5)), 0.5 * (math.log1p(math.exp(-1)) * 2 + 1)])
    torch.testing.assert_close(rml.bradley_terry(gap, outcome, 2.0), expected)


def test_temperature_of_each_pair() -> None:
    heat = torch.tensor([0.5, 1.0, 4.0])
    gap = torch.tensor([1.0, 1.0, 1.0], requires_grad=True)
    rml.bradley_terry(gap, torch.ones(3), heat).sum().backward()
    torch.testing.assert_close(gap.grad, -torch.sigmoid(-1 / heat) / heat)
    with pytest.raises(ValueError, match="temperature: expected more than 0"):
        rml.bradley_terry(gap, torch.ones(3), torch.tensor([1.0, 0.0, 1.0]))


@pytest.mark.parametrize("form", ["rao_kupper", "davidson"])
@pytest.mark.parametrize("margin", [0.1, 0.5, 2.0])
def test_win_loss_and_tie_have_probability_one(form: str, margin: float) -> None:
    win = probability(rml.bradley_terry_ties, 1.0, margin=margin, form=form)
    lose = win.flip(0)
    tie = probability(rml.bradley_terry_ties, 0.5, margin=margin, form=form)
    torch.testing.assert_close(win + lose + tie, torch.ones_like(GAPS))
    assert bool((tie > 0).all()) and int(tie.argmax()) == 8  # ties are likeliest where the scores are equal


def test_ties_by_the_printed_formulas() -> None:
    """Rao-Kupper with theta = e^margin: P(win) = p_i / (p_i + theta p_j); Davidson: P(tie) = n sqrt(p_i p_j) / (p_i + p_j + n
    sqrt(p_i p_j))."""
    p_i, p_j, margin = 3.0, 2.0, 0.7
    gap = torch.tensor([math.log(p_i / p_j)], dtype=torch.float64)
    theta, n = math.exp(margin), math.expm1(margin)
    won, tied = torch.ones(1, dtype=torch.float64), torch.full((1,), 0.5, dtype=torch.float64)
    rao = [float((-rml.bradley_terry_ties(gap, y, margin=margin)).exp()) for y in (won, tied)]
    assert rao[0] == pytest.approx(p_i / (p_i + theta * p_j))
    assert rao[1] == pytest.approx((theta**2 - 1) * p_i * p_j / ((p_i + theta * p_j) * (p_j + theta * p_i)))
    total = p_i + p_j + n * math.sqrt(p_i * p_j)
    davidson = [float((-rml.bradley_terry_ties(gap, y, margin=margin, form="davidson")).exp()) for y in (won, tied)]
    assert davidson == pytest.approx([p_i / total, n * math.sqrt(p_i * p_j) / total])


@pytest.mark.parametrize("form", ["rao_kupper", "davidson"])
def test_without_ties_both_forms_are_bradley_terry(form: str) -> None:
    found = rml.bradley_terry_ties(GAPS, torch.ones_like(GAPS), margin=1e-9, form=form)
    torch.testing.assert_close(found, rml.bradley_terry(GAPS, torch.ones_like(GAPS)), atol=1e-6, rtol=1e-6)
    with pytest.raises(ValueError, match="margin: expected more than 0"):
        rml.bradley_terry_ties(GAPS, torch.ones_like(GAPS), margin=0.0)


def test_thurstone_worked_numbers_and_fidelity() -> None:
    """Phi(1) = 0.841345 where gap^2 = 2 variance."""
    gap, one = torch.tensor([1.0], dtype=torch.float64), torch.ones(1, dtype=torch.float64)
    assert float(rml.thurstone(gap, one, 0.5)) == pytest.approx(-math.log(0.8413447461), abs=1e-9)
    assert float(rml.thurstone(gap, one, 0.5, fidelity=True)) == pytest.approx(1 - math.sqrt(0.8413447461), abs=1e-9)
    tie = torch.full((1,), 0.5, dtype=torch.float64)
    assert float(rml.thurstone(0 * gap, tie, fidelity=True)) == pytest.approx(0, abs=1e-12)
    far = rml.thurstone(torch.tensor([-40.0], dtype=torch.float64), one)
    assert bool(far.isfinite()) and float(far) > 300  # log_ndtr, not the log of 0
    torch.testing.assert_close(rml.level_variance(torch.tensor([0.0, 0.5, 1.0])), torch.tensor([0.05, 0.3, 1.05]))


def test_regression_and_huber() -> None:
    score, reward = torch.tensor([0.0, 0.0]), torch.tensor([0.5, 3.0])
    assert rml.regression(score, reward).tolist() == [0.125, 4.5]
    assert rml.regression(score, reward, delta=1.0).tolist() == [0.125, 2.5]


def test_pairs_of_a_group_and_a_level() -> None:
    reward = torch.tensor([1.0, 3.0, 2.0, torch.nan, 3.0, 9.0])
    group = torch.tensor([0, 0, 0, 0, 0, 1])
    level = torch.tensor([0, 0, 1, 0, 0, 0])
    i, j, outcome = rml.group_pairs(reward, group, level)
    found = {(a, b): y for a, b, y in zip(i.tolist(), j.tolist(), outcome.tolist(), strict=True)}
    assert found == {(1, 0): 1.0, (4, 0): 1.0, (1, 4): 0.5}
    _, _, near = rml.group_pairs(reward, group, level, tie=2.0)
    assert set(near.tolist()) == {0.5}


def test_times_are_stratified() -> None:
    t = rml.stratified_times(7, 64)
    assert torch.equal((t * 64).floor().long().sort().values, torch.arange(64))
    assert not torch.equal(t, t.sort().values)
    assert torch.equal(t, rml.stratified_times(7, 64)) and not torch.equal(t, rml.stratified_times(8, 64))


def test_a_level_with_few_pairs_counts_as_much_as_one_with_many() -> None:
    loss = torch.tensor([1.0, 1.0, 1.0, 5.0])
    assert float(rml.by_level(loss, torch.tensor([0, 0, 0, 2]), 4)) == pytest.approx(3.0)
    assert float(rml.by_level(loss[:0], torch.zeros(0, dtype=torch.int64), 4)) == 0.0


@pytest.mark.parametrize("name", ["bradley_terry", "bradley_terry_ties", "thurstone"])
def test_every_pair_loss_recovers_the_scores_that_made_the_pairs(name: str) -> None:
    """Fit three scores to many drawn outcomes of the model: their order and distance come back."""
    loss = rml.PAIR_LOSSES[name]
    true = torch.tensor([0.0, 0.7, 1.5], dtype=torch.float64)
    i, j = torch.tensor([1, 2, 2]), torch.tensor([0, 0, 1])
    gap = true[i] - true[j]
    one, half = torch.ones(3, dtype=torch.float64), torch.full((3,), 0.5, dtype=torch.float64)
    win, lose = (-loss(gap, one)).exp(), (-loss(-gap, one)).exp()
    score = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([score], max_iter=200, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        found = score[i] - score[j]
        expected = win * loss(found, one) + lose * loss(-found, one)
        if name == "bradley_terry_ties":
            expected = expected + (1 - win - lose) * loss(found, half)
        expected.sum().backward()
        return expected.sum()

    optimizer.step(closure)
    torch.testing.assert_close((score - score[0]).detach(), true, atol=1e-4, rtol=1e-4)
