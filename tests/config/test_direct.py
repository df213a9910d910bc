"""Refusals of differentiable rewards and new conditions, before a model is loaded."""

from __future__ import annotations

import pytest

from flowrl.config import load
from flowrl.config.validate import validate

RED = {"name": "tests.training.graded:Red"}


def said(objective: str, *overrides: str, rewards=None) -> list[str]:
    tree = {"rewards": rewards or [RED], "objective": {"name": objective}}
    return validate(load(tree, list(overrides)))


@pytest.mark.parametrize("name", ["refl", "draft", "draft_lv", "alignprop"])
def test_a_plain_config_is_right(name: str) -> None:
    assert said(name, "batch.group_size=1", "direct.last=2") == []


def test_those_that_need_memoryless_noise() -> None:
    assert said("adjoint_matching", "rollout.kernel.name=memoryless") == []
    assert said("adjoint_matching", "rollout.kernel.name=flow_sde", "rollout.kernel.noise=1.41421") == []
    assert said("adjoint_matching", "rollout.kernel.name=ddim", "rollout.kernel.noise=1") == []
    (found,) = said("adjoint_matching")
    assert found == (
        "rollout.kernel: adjoint_matching reaches the reward-tilted model only where sampling forgets its start noise, and "
        "precise at noise 0.9 does not; use noise 1.4142, or the kernel memoryless"
    )
    (found,) = said("ctrl", "rollout.kernel.name=cps", "condition.attributes={hue: 2}")
    assert found.endswith("cps at noise 0.9 does not; use rollout.kernel.name=memoryless")


REFUSALS = {
    ("draft", "direct.last=99"): "direct.last: 99 is out of range; use 0 to 8 (rollout.steps)",
    ("alignprop", "direct.least=5"): "direct.least: 5 is above direct.last (1); use at most that",
    ("draft", "direct.checkpoint_every=0"): "direct.checkpoint_every: 0 is out of range; use at least 1",
    ("refl", "direct.scale=0.0"): "direct.scale: 0.0 is out of range; use more than 0",
    ("refl", "direct.quantile=0.0"): "direct.quantile: 0.0 is out of range; use more than 0 and at most 1",
    ("draft", "objective.passes=2"): "objective.passes: draft draws its samples anew for every update; use 1, and more "
    "objective.updates",
    ("draft", "objective.loss=gspo"): "objective.loss: draft has no loss; remove it",
    ("draft", "batch.selection.name=best_worst"): "batch.selection, batch.allocation: draft trains on every sample alike; use "
    "all and fixed",
    ("flow_grpo", "direct.last=3"): "direct: objective.name=flow_grpo differentiates no reward; remove the section, or use draft "
    "or refl",
}  # fmt: skip


@pytest.mark.parametrize(("objective", "override"), REFUSALS)
def test_refusals(objective: str, override: str) -> None:
    assert said(objective, override) == [REFUSALS[objective, override]]


def test_rewards_without_a_gradient() -> None:
    assert said("draft", rewards=[{"name": "compositional"}]) == [
        "rewards.0.name: compositional declares no gradient, which objective.name=draft needs; use a reward that does, such as "
        "tiny_clip, or objective.name=flow_grpo"
    ]
    assert said("draft", rewards=[RED, {"name": "compositional", "role": "monitor"}]) == []
    remote = {**RED, "executor": {"kind": "process"}}
    assert said("draft", rewards=[remote]) == [
        "rewards.0.executor.kind: process runs in another process, where no gradient reaches; objective.name=draft needs thread "
        "or inline"
    ]
    ranked = {**RED, "shaping": [{"affine": [2, 0]}, {"rank": {}}]}
    assert said("draft", rewards=[ranked]) == ["rewards.0.shaping.1: rank has no gradient; remove it for draft"]


def test_penalties() -> None:
    on = ("objective.kl.weight=0.1", "objective.kl.form=velocity")
    assert said("draft", *on) == []
    assert said("draft", *on, "model.train=full") == [
        "model.train: full, and draft with a penalty differentiates the pre-trained model beside the trained one; use lora, "
        "whose weights can be left out"
    ]
    assert said("draft", "objective.kl.weight=0.1", "objective.kl.form=paper") == [
        "objective.kl.form: paper needs steps with noise; set direct.stochastic=true, or use velocity"
    ]
    assert said("adjoint_matching", *on, "rollout.kernel.name=memoryless") == [
        "objective.kl.form: adjoint_matching has its divergence in direct.temperature; set it to none"
    ]
    assert said("adjoint_matching", "rollout.kernel.name=memoryless", "rollout.guidance=3.0") == [
        "rollout.guidance: adjoint_matching trains the velocity itself, and 3.0 would train a mixture of two; use 1 "
        "(evaluation.guidance may differ)"
    ]
    ctrl = ("rollout.kernel.name=memoryless", "condition.attributes={hue: 2}")
    assert said("ctrl", *ctrl, *on) == [
        "objective.kl.form: ctrl has its path divergence built in, in units of direct.strength; set it to none"
    ]
    assert (
        "model.train: full changes what the model makes without the condition as well; use lora with condition"
        in said("ctrl", *ctrl, "model.train=full")
    )


def test_conditions() -> None:
    assert said("ctrl", "rollout.kernel.name=memoryless") == [
        "condition.attributes: ctrl learns a new condition; name it, as in condition.attributes={colour: 6}"
    ]
    assert said("draft", "condition.attributes={hue: 1}") == [
        "condition.attributes.hue: 1 class is no choice; use at least 2"
    ]
