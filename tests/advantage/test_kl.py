"""KL estimators: values and slopes by hand, expectations and gradients by enumeration, masks, the off-policy weight."""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from flowrl.advantage.kl import (
    METHODS,
    abs_plus,
    gaussian_kl,
    k1,
    k1_plus,
    k2,
    k3,
    k3_plus,
    k_abs,
    kl_estimate,
)

NAMES = ("k1", "abs", "k2", "k3", "k1+", "abs+", "k3+")
PLUS = {"k1+": k1_plus, "abs+": abs_plus, "k3+": k3_plus}
REFERENCE = torch.tensor([0.2, 0.2, 0.5, 0.1], dtype=torch.float64)
OLD = torch.tensor([0.25, 0.35, 0.1, 0.3], dtype=torch.float64)
LOGITS = torch.tensor([0.4, -0.3, 0.1, 0.7], dtype=torch.float64)


def exact_kl(logits: Tensor) -> tuple[float, Tensor]:
    logits = logits.clone().requires_grad_()
    log_pi = logits.log_softmax(0)
    value = (log_pi.exp() * (log_pi - REFERENCE.log())).sum()
    return value.item(), torch.autograd.grad(value, logits)[0]


# x, k1, |x|, k2, k3 and the slopes of the first four in x, by hand.
TABLE = [
    (0.5, 0.5, 0.5, 0.125, 0.106531, (1.0, 1.0, 0.5, 0.393469)),
    (-0.5, -0.5, 0.5, 0.125, 0.148721, (1.0, -1.0, -0.5, -0.648721)),
    (2.0, 2.0, 2.0, 2.0, 1.135335, (1.0, 1.0, 2.0, 0.864665)),
    (0.0, 0.0, 0.0, 0.0, 0.0, (1.0, 0.0, 0.0, 0.0)),
]


@pytest.mark.parametrize(("x", "one", "absolute", "two", "three", "slopes"), TABLE)
def test_values_and_slopes(
    x: float, one: float, absolute: float, two: float, three: float, slopes: tuple[float, ...]
) -> None:
    for estimator, value, slope in zip((k1, k_abs, k2, k3), (one, absolute, two, three), slopes, strict=True):
        new, reference = torch.tensor([x - 1.0]).double().requires_grad_(), torch.tensor([-1.0]).double()
        reference.requires_grad_()
        result = estimator(new, reference)
        result.sum().backward()
        assert result.item() == pytest.approx(value, abs=1e-6)
        assert new.grad is not None and new.grad.item() == pytest.approx(slope, abs=1e-6)
        assert reference.grad is None


@pytest.mark.parametrize("name", sorted(PLUS))
def test_plus_forms_keep_the_value_and_take_the_slope_of_k2(name: str) -> None:
    x = torch.tensor([1.5, -0.7, 0.0, -9.0]).double().requires_grad_()
    plain = {"k1+": k1, "abs+": k_abs, "k3+": k3}[name]
    value = PLUS[name](x, torch.zeros(4).double())
    assert torch.equal(value, plain(x, torch.zeros(4).double()))
    value.sum().backward()
    assert x.grad is not None and torch.allclose(x.grad, x.detach(), atol=1e-12)


def test_k3_limits_are_options() -> None:
    x, zero = torch.tensor([-4.0]), torch.zeros(1)
    full = math.exp(4) - 5
    assert k3(x, zero).item() == 10.0 and k3_plus(x, zero).item() == 10.0
    for estimator in (k3, k3_plus):
        assert estimator(x, zero, limit=100.0).item() == pytest.approx(full, rel=1e-6)
    for name in ("k3", "k3+"):
        assert kl_estimate(x, zero, name=name).item() == 10.0  # type: ignore[arg-type]
        assert kl_estimate(x, zero, name=name, limit=0.5).item() == 0.5  # type: ignore[arg-type]


@pytest.mark.parametrize("name", ["k2", "k1+", "abs+", "k3+"])
def test_plus_forms_have_the_exact_kl_gradient(name: str) -> None:
    _, exact = exact_kl(LOGITS)
    logits = LOGITS.clone().requires_grad_()
    log_pi = logits.log_softmax(0)
    sampled = (log_pi.exp().detach() * kl_estimate(log_pi, REFERENCE.log(), name=name)).sum()  # type: ignore[arg-type]
    assert torch.allclose(torch.autograd.grad(sampled, logits)[0], exact, atol=1e-12)


def test_k1_in_the_loss_has_no_gradient_and_k3_that_of_the_reverse() -> None:
    for name in ("k1", "k3"):
        logits = LOGITS.clone().requires_grad_()
        log_pi = logits.log_softmax(0)
        weight = log_pi.exp().detach()
        sampled = (weight * kl_estimate(log_pi, REFERENCE.log(), name=name)).sum()  # type: ignore[arg-type]
        (gradient,) = torch.autograd.grad(sampled, logits, retain_graph=True)
        (reverse,) = torch.autograd.grad((REFERENCE * (REFERENCE.log() - log_pi)).sum(), logits)
        assert torch.allclose(gradient, torch.zeros(4).double() if name == "k1" else reverse, atol=1e-12)
    value = (weight * kl_estimate(log_pi, REFERENCE.log(), name="k3")).sum()
    assert value.item() == pytest.approx(exact_kl(LOGITS)[0], abs=1e-12)


@pytest.mark.parametrize("old", [OLD, LOGITS.softmax(0)], ids=["off", "on"])
@pytest.mark.parametrize("name", NAMES)
def test_corrected_value_and_gradient_off_policy(name: str, old: Tensor) -> None:
    exact, gradient = exact_kl(LOGITS)
    logits = LOGITS.clone().requires_grad_()
    log_pi = logits.log_softmax(0)
    estimate = kl_estimate(log_pi, REFERENCE.log(), None, old.log(), name=name)  # type: ignore[arg-type]
    value = (old * estimate).sum()
    if name.rstrip("+") in ("k1", "k3"):
        assert value.item() == pytest.approx(exact, abs=1e-12)
    if name in ("k1", "k3", "k1+", "k3+", "abs+"):
        assert torch.allclose(torch.autograd.grad(value, logits)[0], gradient, atol=1e-12)


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", NAMES)
def test_against_a_plain_loop(name: str, seed: int) -> None:
    draw = random.Random(seed)
    new, reference, old = ([[draw.gauss(-2, 1) for _ in range(5)] for _ in range(4)] for _ in range(3))
    mask = [[draw.random() < 0.7 for _ in range(5)] for _ in range(4)]
    tensors = [torch.tensor(x, dtype=torch.float64) for x in (new, reference, old)]
    for x in tensors:
        x[~torch.tensor(mask)] = math.nan
    tensors[0].requires_grad_()
    plain = kl_estimate(tensors[0], tensors[1], torch.tensor(mask), name=name)  # type: ignore[arg-type]
    corrected = kl_estimate(*tensors[:2], torch.tensor(mask), tensors[2], name=name)  # type: ignore[arg-type]
    for i in range(4):
        for t in range(5):
            x = new[i][t] - reference[i][t]
            k = {"k1": x, "abs": abs(x), "k2": x * x / 2, "k3": min(math.exp(-x) + x - 1, 10.0)}[name.rstrip("+")]
            expected = k if mask[i][t] else 0.0
            assert plain[i, t].item() == pytest.approx(expected, abs=1e-9)
            assert corrected[i, t].item() == pytest.approx(expected * math.exp(new[i][t] - old[i][t]), abs=1e-9)
    (plain.sum() + corrected.sum()).backward()
    gradient = tensors[0].grad
    assert gradient is not None and gradient.isfinite().all() and not gradient[~torch.tensor(mask)].any()


def test_default_is_k3_and_half_is_widened() -> None:
    x = torch.tensor([0.5, -0.5]).bfloat16()
    value = kl_estimate(x, torch.zeros(2).bfloat16())
    assert value.dtype == torch.float32 and value.tolist() == pytest.approx([0.106531, 0.148721], abs=1e-6)
    assert gaussian_kl(torch.tensor([0.09]).bfloat16(), torch.ones(1)).dtype == torch.float32


def test_gaussian_kl_is_the_mean_of_k1() -> None:
    sigma, shift = 0.7, 0.5
    noise = torch.linspace(-12, 12, 4001, dtype=torch.float64)
    weight = (-noise.square() / 2).exp()
    weight = weight / weight.sum()
    step = shift + sigma * noise
    new, reference = -((step - shift) ** 2) / (2 * sigma**2), -(step**2) / (2 * sigma**2)
    exact = gaussian_kl(torch.tensor(shift**2, dtype=torch.float64), torch.tensor(sigma, dtype=torch.float64)).item()
    assert exact == pytest.approx(0.25 / 0.98, abs=1e-12)
    assert (weight * k1(new, reference)).sum().item() == pytest.approx(exact, abs=1e-9)
    assert (weight * k3(new, reference, limit=1e9)).sum().item() == pytest.approx(exact, abs=1e-9)
    assert gaussian_kl(torch.tensor(0.09), torch.tensor(1.0)).item() == pytest.approx(0.045, abs=1e-7)


def test_gaussian_kl_gradient_goes_to_the_means_only() -> None:
    distance, sigma = torch.tensor([0.5, 2.0]).requires_grad_(), torch.tensor([2.0, 0.5]).requires_grad_()
    gaussian_kl(distance, sigma).sum().backward()
    assert distance.grad is not None and distance.grad.tolist() == pytest.approx([0.125, 2.0])
    assert sigma.grad is None


BAD: list[tuple[Callable[[], Tensor], str]] = [
    (lambda: kl_estimate(torch.zeros(2), torch.zeros(2), name="k4"), "name: expected one of k1, abs, k2"),  # type: ignore[arg-type]
    (lambda: kl_estimate(torch.zeros(2), torch.zeros(2), limit=0.0), "limit: expected a number > 0, got 0"),
    (lambda: kl_estimate(torch.zeros(2), torch.zeros(1)), r"reference_log_prob: expected \[2\] like log_prob"),
    (lambda: kl_estimate(torch.zeros(2), torch.zeros(2), torch.ones(2)), r"mask: expected bool \[2\] like log_prob"),
    (
        lambda: kl_estimate(torch.zeros(2), torch.zeros(2), torch.ones(1, dtype=torch.bool)),
        r"mask: expected bool \[2\] like log_prob, got torch.bool \[1\]",
    ),
    (lambda: kl_estimate(torch.zeros(2), torch.zeros(2), None, torch.zeros(1)), r"old_log_prob: expected \[2\]"),
    (lambda: k3(torch.zeros(2), torch.zeros(1)), r"expected \[2\] like log_prob"),
    (
        lambda: gaussian_kl(torch.ones(2), torch.tensor([1.0, 0.0])),
        "sigma: expected values > 0, got a least value of 0",
    ),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], Tensor], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_entries_name_functions_and_tests() -> None:
    keys = [m.key for m in METHODS]
    assert keys == ["k1", "abs", "k2", "k3", "k1+", "abs+", "k3+", "kl_corrected", "gaussian_kl"]
    calls = {m.key: m.call for m in METHODS}
    assert [calls[k] for k in NAMES] == [k1, k_abs, k2, k3, k1_plus, abs_plus, k3_plus]
