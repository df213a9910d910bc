"""Losses over the members of a group: DPO, DGPO, centred reward distillation."""

from __future__ import annotations

import math

import pytest
import torch

from flowrl.objectives.forward import best_and_worst, crd, dgpo, dpo

GROUP = torch.tensor([7, 3, 7, 3, 7, 3, 3])
ADVANTAGE = torch.tensor([0.5, -1.0, -0.2, 1.5, -0.3, 0.0, -0.5])


def gradient(call, error: torch.Tensor) -> torch.Tensor:
    leaf = error.clone().requires_grad_()
    call(leaf).sum().backward()
    return leaf.grad


def test_dpo_at_the_reference_is_log_two_and_pulls_the_right_way() -> None:
    """F13 25: log 2 at theta = ref; the gradient lowers the winner's error and raises the loser's, beta / 4 each."""
    error = torch.rand(7)
    found = dpo(error, error, ADVANTAGE, GROUP, beta=8.0)
    torch.testing.assert_close(found, torch.tensor([1.0, 1, 0, 1, 1, 0, 0]) * math.log(2))
    expected = torch.tensor([1.0, -1, 0, 1, -1, 0, 0]) * 4.0  # two rows a pair carry its loss
    torch.testing.assert_close(gradient(lambda e: dpo(e, error, ADVANTAGE, GROUP, beta=8.0), error), expected)


def test_dpo_worked_number() -> None:
    """-log sigmoid(-(beta / 2)((e_w - e_w_ref) - (e_l - e_l_ref))), beta 10: argument 5 x (0.1 + 0.2) = 1.5."""
    error, reference = torch.tensor([0.4, 0.9]), torch.tensor([0.5, 0.7])
    found = dpo(error, reference, torch.tensor([1.0, -1.0]), torch.zeros(2, dtype=torch.int64), beta=10.0)
    assert found.tolist() == pytest.approx([math.log(1 + math.exp(-1.5))] * 2)


def test_best_and_worst() -> None:
    """First of equals; members that are out, groups of equals and groups of one give no pair."""
    live = torch.ones(7, dtype=torch.bool)
    best, worst = best_and_worst(ADVANTAGE, GROUP, live)
    assert (best.tolist(), worst.tolist()) == ([3, 0], [1, 4])
    live[3] = False
    best, worst = best_and_worst(ADVANTAGE, GROUP, live)
    assert (best.tolist(), worst.tolist()) == ([5, 0], [1, 4])
    same, alone = torch.tensor([1.0, 1.0, 2.0]), torch.tensor([0, 0, 1])
    assert [len(x) for x in best_and_worst(same, alone, torch.ones(3, dtype=torch.bool))] == [0, 0]
    assert [len(x) for x in best_and_worst(same, alone, torch.zeros(3, dtype=torch.bool))] == [0, 0]


def test_dgpo_by_a_plain_loop() -> None:
    torch.manual_seed(0)
    error, reference, beta = torch.rand(7), torch.rand(7), 6.0
    expected = torch.zeros(7)
    for i in range(7):
        members = [j for j in range(7) if GROUP[j] == GROUP[i]]
        total = sum(float(ADVANTAGE[j] * beta * (error[j] - reference[j])) / len(members) for j in members)
        expected[i] = ADVANTAGE[i] / (1 + math.exp(-total))
    torch.testing.assert_close(gradient(lambda e: dgpo(e, reference, ADVANTAGE, GROUP, beta=beta), error), expected)
    torch.testing.assert_close(dgpo(error, reference, ADVANTAGE, GROUP, beta=beta), expected * error)
    torch.testing.assert_close(dgpo(error, error, ADVANTAGE, GROUP), ADVANTAGE * error / 2)  # the reference: weight 1/2
    assert not dgpo(error, reference, torch.zeros(7), GROUP).any()


@pytest.mark.parametrize("form", ["mse", "bce"])
def test_crd_by_a_plain_loop(form: str) -> None:
    torch.manual_seed(1)
    error, old, beta = torch.rand(7), torch.rand(7), 2.0
    leaf = error.clone().requires_grad_()
    expected = torch.zeros(7)
    for i in range(7):
        members = [j for j in range(7) if GROUP[j] == GROUP[i]]
        mean_r = sum(float(old[j] - error[j]) for j in members) / len(members)
        mean_a = sum(float(ADVANTAGE[j]) for j in members) / len(members)
        implicit, given = beta * (float(old[i] - error[i]) - mean_r), float(ADVANTAGE[i]) - mean_a
        p, q = 1 / (1 + math.exp(-given)), 1 / (1 + math.exp(-implicit))
        expected[i] = (implicit - given) ** 2 if form == "mse" else -p * math.log(q) - (1 - p) * math.log(1 - q)
    found = crd(leaf, old, ADVANTAGE, GROUP, beta=beta, form=form)
    torch.testing.assert_close(found.detach(), expected)
    found.sum().backward()
    assert bool((leaf.grad != 0).all())


def test_crd_does_not_move_what_is_equal_and_ends_where_rewards_agree() -> None:
    """Equal rewards at the old policy: no gradient. Where the implicit reward is the given one up to a constant: loss 0."""
    error = torch.rand(7)
    assert float(gradient(lambda e: crd(e, error, torch.full((7,), 0.3), GROUP), error).abs().max()) < 1e-6
    solved = torch.rand(2)[(GROUP == 7).long()] - ADVANTAGE / 4
    assert float(crd(solved, torch.zeros(7), ADVANTAGE, GROUP, beta=4.0).max()) < 1e-10


@pytest.mark.parametrize("call", [dpo, crd])
def test_bad_options(call) -> None:
    with pytest.raises(ValueError, match="beta"):
        call(torch.rand(2), torch.rand(2), torch.rand(2), torch.zeros(2, dtype=torch.int64), beta=0.0)
