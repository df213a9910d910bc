"""What holds for every estimator and every policy loss of the registry; exemptions are part of the entries."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage import Advantage, PolicyLoss
from flowrl.advantage.catalogue import METHODS
from flowrl.advantage.method import Method
from flowrl.advantage.pipeline import inputs_of
from tests.advantage.registry_inputs import GROUP, ROWS, STEPS, halve, inputs_for, mask, pad, reorder, same

CALLABLE = [m for m in METHODS if m.call is not None]
ESTIMATORS = [m for m in CALLABLE if m.kind == "estimator"]
LOSSES = [m for m in CALLABLE if m.kind == "policy_loss" and m.key != "otr"]  # otr: logits in, tested on its own
PROPERTIES = frozenset(
    "padding permutation isolation shift scale masked constant singleton dtype gradient on_policy".split()
)


# What a method may earn by.
REWARDS = ("rewards", "step_reward", "stage_reward", "answer_reward", "segment_value", "step_value", "start_value")


def without(methods: list[Method], name: str) -> list[Any]:
    return [pytest.param(m, id=m.key) for m in methods if name not in m.exempt]


def run(method: Method, inputs: dict[str, Any]) -> Any:
    assert method.call is not None
    return method.call(**inputs)


def changed(inputs: dict[str, Any], **new: Any) -> dict[str, Any]:
    return {**inputs, **new}


def test_exemptions_name_a_property_and_give_a_reason() -> None:
    for method in METHODS:
        for name, reason in method.exempt.items():
            assert name in PROPERTIES and len(reason) > 10, f"{method.key}: {name}: {reason}"


def test_the_registry_is_as_large_as_it_claims() -> None:
    assert len(ESTIMATORS) >= 40 and len(LOSSES) >= 20


@pytest.mark.parametrize("method", without(ESTIMATORS, "permutation") + without(LOSSES, "permutation"))
def test_permutation(method: Method) -> None:
    inputs = inputs_for(method, 0)
    rows = torch.randperm(ROWS, generator=torch.Generator().manual_seed(1))
    if "state" in inputs and method.key == "spo_single_stream":
        same(run(method, inputs), run(method, reorder(inputs, rows)), rows, atol=1e-6)
        return
    same(run(method, inputs), run(method, reorder(inputs, rows)), rows, atol=1e-6)


@pytest.mark.parametrize("method", without(ESTIMATORS, "padding") + without(LOSSES, "padding"))
def test_padding(method: Method) -> None:
    inputs = inputs_for(method, 1)
    same(run(method, inputs), run(method, pad(inputs, 3)), columns=STEPS, atol=1e-6)


def moved(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """Other rewards and other step rewards in ``rows``."""
    found = dict(inputs)
    for name in REWARDS:
        if name in found:
            x = found[name].clone()
            x[rows] = x[rows] * 0.5 + torch.where(x[rows] != 0, 0.07, 0.0)
            found[name] = x
    return found


@pytest.mark.parametrize("method", without(ESTIMATORS, "isolation"))
def test_isolation(method: Method) -> None:
    inputs = inputs_for(method, 2)
    rows = GROUP == -3
    before, after = run(method, inputs), run(method, moved(inputs, rows))
    assert torch.equal(before.advantage[~rows], after.advantage[~rows])
    assert not torch.equal(before.advantage[rows], after.advantage[rows])


def rewards_named(inputs: dict[str, Any]) -> list[str]:
    return [n for n in REWARDS if n in inputs]


@pytest.mark.parametrize("method", without(ESTIMATORS, "shift"))
def test_shift(method: Method) -> None:
    inputs = inputs_for(method, 3)
    other = {n: torch.where(inputs[n] != 0, inputs[n] + 2.0, 0.0) for n in rewards_named(inputs)}
    a, b = run(method, inputs), run(method, changed(inputs, **other))
    single = torch.isin(GROUP, torch.tensor([900]))  # a lone sample has nothing to be compared with
    assert torch.allclose(a.advantage[~single], b.advantage[~single], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("method", without(ESTIMATORS, "scale"))
def test_scale(method: Method) -> None:
    inputs = inputs_for(method, 4)
    if "rewards" in inputs and method.key not in ("lite_ppo", "gdpo"):
        inputs["rewards"] = inputs["rewards"] * 100  # far above every eps
    other = {n: inputs[n] * 3.0 for n in rewards_named(inputs)}
    a, b = run(method, inputs), run(method, changed(inputs, **other))
    if method.key in UNITS:
        assert torch.allclose(3.0 * a.advantage, b.advantage, rtol=1e-4, atol=1e-5)
    else:
        assert torch.allclose(a.advantage, b.advantage, rtol=2e-3, atol=1e-3)


# In the units of the reward: three times the reward, three times the advantage.
UNITS = frozenset({"dr_grpo", "rloo"})


@pytest.mark.parametrize("method", without(ESTIMATORS, "masked"))
def test_masked(method: Method) -> None:
    inputs = inputs_for(method, 5)
    result: Advantage = run(method, inputs)
    if result.advantage.ndim == 2 and method.key != "graph_grpo":  # graph_grpo's columns are choices, not steps
        assert result.advantage.shape == mask().shape
        assert not result.advantage[~mask()].any() and not result.weight[~mask()].any()
        assert not result.loss_mask[~mask()].any()
    assert not result.advantage[~result.loss_mask].any() and not result.weight[~result.loss_mask].any()
    if "valid" in inputs_of(method.call):
        valid = torch.ones(ROWS, dtype=torch.bool)
        valid[[0, 9]] = False
        result = run(method, changed(inputs, valid=valid))
        assert not result.advantage[[0, 9]].any() and not result.loss_mask[[0, 9]].any()
        junk = dict(inputs)
        for name in rewards_named(inputs):
            if name == "rewards":
                junk[name] = inputs[name].clone()
                junk[name][[0, 9]] = float("nan")
        same(result, run(method, changed(junk, valid=valid)), atol=0.0)


@pytest.mark.parametrize("method", without(ESTIMATORS, "constant"))
def test_constant(method: Method) -> None:
    inputs = inputs_for(method, 6)
    result = run(method, changed(inputs, **{n: torch.where(inputs[n] != 0, 0.3, 0.0) for n in rewards_named(inputs)}))
    assert not result.advantage.any() and not result.live.any()
    assert torch.isfinite(result.weight).all()


@pytest.mark.parametrize("method", without(ESTIMATORS, "singleton"))
def test_singleton(method: Method) -> None:
    result = run(method, inputs_for(method, 7))
    assert torch.isfinite(result.advantage).all() and torch.isfinite(result.weight).all()


@pytest.mark.parametrize("method", without(ESTIMATORS, "dtype"))
def test_dtype(method: Method) -> None:
    result = run(method, halve(inputs_for(method, 8)))
    assert result.advantage.dtype == result.weight.dtype == torch.float32
    assert result.loss_mask.dtype == result.live.dtype == torch.bool and result.live.shape == (ROWS,)
    assert all(x is None or x.dtype == torch.float32 for x in (result.returns, result.clip_scale))


@pytest.mark.parametrize("method", without(ESTIMATORS, "gradient"))
def test_no_gradient_leaves_an_estimator(method: Method) -> None:
    inputs = {
        k: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in inputs_for(method, 9).items()
    }
    result = run(method, inputs)
    tensors = [result.advantage, result.weight, result.returns, result.clip_scale, *result.channels.values()]
    assert not any(t.requires_grad for t in tensors if t is not None)


@pytest.mark.parametrize("method", [pytest.param(m, id=m.key) for m in ESTIMATORS])
def test_an_empty_batch_is_refused(method: Method) -> None:
    inputs = inputs_for(method, 10)
    empty = {k: x[:0] if isinstance(x, Tensor) and x.ndim and len(x) == ROWS else x for k, x in inputs.items()}
    with pytest.raises(ValueError):
        run(method, empty)


# -- policy losses ------------------------------------------------------------------------------------------------------


def graded(inputs: dict[str, Any]) -> dict[str, Any]:
    return {
        k: x.clone().requires_grad_() if isinstance(x, Tensor) and x.is_floating_point() else x
        for k, x in inputs.items()
    }


@pytest.mark.parametrize("method", without(LOSSES, "gradient"))
def test_the_gradient_goes_into_log_prob_alone(method: Method) -> None:
    inputs = graded(inputs_for(method, 11))
    result: PolicyLoss = run(method, inputs)
    result.loss.sum().backward()
    gradient = inputs["log_prob"].grad
    assert gradient is not None and torch.isfinite(gradient).all() and gradient[mask()].any()
    assert not gradient[~mask()].any()
    for name, x in inputs.items():
        if name != "log_prob" and isinstance(x, Tensor) and x.is_floating_point():
            assert x.grad is None or not x.grad.any(), name


@pytest.mark.parametrize("method", without(LOSSES, "masked"))
def test_what_masked_steps_hold_is_never_read(method: Method) -> None:
    inputs = inputs_for(method, 12)
    junk = dict(inputs)
    for name in ("log_prob", "old_log_prob", "advantage", "reference_log_prob"):
        if name in inputs:
            junk[name] = torch.where(mask(), inputs[name], float("nan"))
    a, b = run(method, graded(inputs)), run(method, graded(junk))
    assert torch.equal(a.loss, b.loss) and not a.loss[~mask()].any()


@pytest.mark.parametrize("method", without(LOSSES, "dtype"))
def test_a_loss_is_float32_for_half_precision(method: Method) -> None:
    assert run(method, halve(inputs_for(method, 13))).loss.dtype == torch.float32


@pytest.mark.parametrize("method", without(LOSSES, "on_policy"))
def test_on_policy_every_loss_is_the_policy_gradient(method: Method) -> None:
    """dL/dlog_prob = -A, whatever the method does off policy."""
    inputs = inputs_for(method, 14)
    leaf = inputs["old_log_prob"].clone().requires_grad_()
    if method.key in ("gspo", "gmpo", "luspo", "vespo", "dhpo"):  # one advantage a row, as such methods are used
        inputs["advantage"] = inputs["advantage"][:, :1].expand(ROWS, STEPS).contiguous()
    loss = run(method, changed(inputs, log_prob=leaf)).loss
    expected = torch.where(mask(), -inputs["advantage"], 0.0)
    (gradient,) = torch.autograd.grad(loss.sum(), leaf)
    assert torch.allclose(gradient, expected, atol=1e-5)
