"""Methods by name: their inputs and options are checked, whitening and clipping follow."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from flowrl.advantage import Advantage, estimate, grpo, masked_whiten
from flowrl.advantage.pipeline import inputs_of, options_of

REWARDS = torch.tensor([1.0, 0.0, 0.0, 1.0, 5.0, 7.0])
GROUP = torch.tensor([3, 3, 3, 3, 9, 9])
MASK = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0], [1, 0, 1], [1, 1, 1], [0, 1, 0]]).bool()
GOOD: dict[str, Any] = {"rewards": REWARDS, "group": GROUP}


def test_a_function_tells_its_inputs_and_options() -> None:
    assert inputs_of(grpo) == {"rewards": True, "group": True, "valid": False}
    assert options_of(grpo) == {"ddof": 0, "eps": 1e-4, "singleton": "zero"}


def test_inputs_that_a_method_does_not_ask_for_are_left_aside() -> None:
    assert torch.equal(estimate("grpo", {**GOOD, "mask": MASK}).advantage, grpo(REWARDS, GROUP).advantage)


def test_whitening_by_samples_and_by_steps() -> None:
    plain = estimate("dr_grpo", GOOD)
    sample = estimate("dr_grpo", GOOD, whiten="sample")
    centred = plain.advantage.double()
    assert torch.allclose(sample.advantage.double(), centred / centred.std(), atol=1e-6)
    step = estimate("dr_grpo", {**GOOD, "mask": MASK}, whiten="step")
    flat = plain.advantage[:, None].expand_as(MASK)[MASK].double()
    assert torch.allclose(step.advantage[MASK].double(), (flat - flat.mean()) / flat.std(), atol=1e-6)
    assert not step.advantage[~MASK].any() and torch.equal(step.loss_mask, MASK)


def test_the_spec_example_of_step_and_sample_weighting() -> None:
    a, mask = torch.tensor([[0.5], [-0.5]]).expand(2, 3), torch.tensor([[True, False, False], [True, True, True]])
    whitened = masked_whiten(a, mask)
    assert whitened[0, 0] == pytest.approx(1.5, abs=1e-4) and whitened[1].tolist() == pytest.approx(
        [-0.5] * 3, abs=1e-4
    )
    assert masked_whiten(a[:, 0], mask[:, 0]).tolist() == pytest.approx([0.7071, -0.7071], abs=1e-4)


@pytest.mark.parametrize("whiten", ["sample", "step"])
def test_ranks_agree_through_the_reduction(whiten: Any) -> None:
    parts = [slice(0, 4), slice(4, 6)]
    whole = estimate("dr_grpo", {**GOOD, "mask": MASK}, whiten=whiten)
    inputs = [{"rewards": REWARDS[p], "group": GROUP[p], "mask": MASK[p]} for p in parts]
    sums: list[list[torch.Tensor]] = [[], []]

    def recorder(rank: int, totals: list[torch.Tensor]) -> Any:
        def reduce(x: torch.Tensor) -> torch.Tensor:
            sums[rank].append(x)
            return totals[len(sums[rank]) - 1] if len(sums[rank]) <= len(totals) else x

        return reduce

    totals: list[torch.Tensor] = []
    for _ in range(2):  # one more exact sum a round: first the means, then the squares
        sums[0].clear(), sums[1].clear()
        local = [estimate("dr_grpo", x, whiten=whiten, reduce=recorder(i, totals)) for i, x in enumerate(inputs)]
        totals = [a + b for a, b in zip(*sums, strict=True)]
    sums[0].clear(), sums[1].clear()
    local = [estimate("dr_grpo", x, whiten=whiten, reduce=recorder(i, totals)) for i, x in enumerate(inputs)]
    assert torch.allclose(torch.cat([r.advantage for r in local]), whole.advantage, atol=1e-6)


def test_spreading_over_steps_keeps_masked_rows_at_zero() -> None:
    rewards = REWARDS.clone()
    rewards[2] = math.nan
    result = grpo(rewards, GROUP).over_steps(MASK)
    assert result.advantage.shape == MASK.shape and not result.loss_mask[2].any() and not result.weight[2].any()
    assert torch.equal(result.loss_mask[[0, 1, 3, 4, 5]], MASK[[0, 1, 3, 4, 5]])
    assert result.advantage[0].tolist() == [float(grpo(rewards, GROUP).advantage[0])] * 3
    assert result.over_steps(MASK) is result


@pytest.mark.parametrize(
    ("name", "inputs", "keywords", "message"),
    [
        ("lite_pp", {}, {}, "name: unknown estimator 'lite_pp'; did you mean 'lite_ppo'?"),
        ("grpo", {"reward": REWARDS}, {}, "inputs: no input is called 'reward'; did you mean 'rewards'?"),
        ("grpo", {"rewards": REWARDS}, {}, "grpo: needs the input 'group' (rows of one prompt share an id"),
        ("grpo", {**GOOD, "group": None}, {}, "grpo: needs the input 'group'"),
        ("grpo", GOOD, {"options": {"dof": 1}}, "grpo: no option 'dof'; did you mean 'ddof'?"),
        ("grpo", GOOD, {"clip": -0.1}, "clip: expected a number >= 0 (0 is off), got -0.1"),
        ("grpo", GOOD, {"whiten": "all"}, "whiten: expected 'none', 'step' or 'sample', got 'all'"),
        ("grpo", GOOD, {"whiten": "step"}, "whiten: 'step' needs the input 'mask' [B, T]"),
    ],
)
def test_bad_calls_are_named(name: str, inputs: dict[str, Any], keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as error:
        estimate(name, inputs, **keywords)
    assert message in str(error.value)


@pytest.mark.parametrize("mask", [MASK.float(), MASK[:4], MASK[:, 0]])
def test_a_mask_that_does_not_match_is_refused(mask: torch.Tensor) -> None:
    result: Advantage = grpo(REWARDS, GROUP)
    with pytest.raises(ValueError, match="mask: expected bool"):
        result.over_steps(mask)
