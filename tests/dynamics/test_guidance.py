"""Guidance: the linear rule, the norm-preserving rule, and their limits."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from flowrl.dynamics import guide


def predictions() -> tuple[Tensor, Tensor]:
    conditional, unconditional = torch.randn(2, 3, 2, 4, 4, generator=torch.Generator().manual_seed(0))
    return conditional, unconditional


def test_linear_rule() -> None:
    conditional, unconditional = predictions()
    expected = 4.5 * conditional - 3.5 * unconditional
    torch.testing.assert_close(guide(conditional, unconditional, 4.5, "linear"), expected, atol=1e-5, rtol=1e-5)
    assert torch.equal(guide(conditional, unconditional, 0.0, "linear"), unconditional)


@pytest.mark.parametrize("rule", ["linear", "norm_preserving"])
def test_scale_one_is_the_conditional_prediction_exactly(rule: str) -> None:
    conditional, unconditional = predictions()
    assert torch.equal(guide(conditional, 1e6 * unconditional, 1.0, rule), conditional)


def test_norm_preserving_turns_each_token_without_lengthening() -> None:
    conditional, unconditional = (value.reshape(3, 8, 4) for value in predictions())
    conditional = conditional * torch.linspace(0.1, 7, 24).reshape(3, 8, 1)  # one norm a token, not a sample
    guided = guide(conditional, unconditional, 4.5, "norm_preserving")
    linear = guide(conditional, unconditional, 4.5, "linear")
    torch.testing.assert_close(guided.norm(dim=-1), conditional.norm(dim=-1), atol=1e-5, rtol=1e-5)
    cosine = (guided * linear).sum(-1) / (guided.norm(dim=-1) * linear.norm(dim=-1))
    torch.testing.assert_close(cosine, torch.ones(3, 8), atol=1e-5, rtol=0)


def test_norm_preserving_refuses_latents_that_are_not_tokens() -> None:
    with pytest.raises(ValueError, match="tokens"):
        guide(*predictions(), 4.5, "norm_preserving")


def test_a_scale_a_sample() -> None:
    conditional, unconditional = predictions()
    scale = torch.tensor([1.0, 4.5, 0.0])
    guided = guide(conditional, 1e6 * unconditional, scale, "linear")
    assert torch.equal(guided[0], conditional[0])  # exactly, whatever the other branch
    for k in (1, 2):
        assert torch.equal(guided[k], guide(conditional, 1e6 * unconditional, float(scale[k]), "linear")[k])


def test_a_zero_prediction_stays_finite() -> None:
    zero = torch.zeros(1, 2, 2)
    assert torch.equal(guide(zero, zero, 4.5, "norm_preserving"), zero)


def test_gradient_reaches_both_branches() -> None:
    conditional, unconditional = (value.requires_grad_() for value in predictions())
    guide(conditional, unconditional, 4.5, "linear").sum().backward()
    torch.testing.assert_close(conditional.grad, torch.full_like(conditional, 4.5))
    torch.testing.assert_close(unconditional.grad, torch.full_like(unconditional, -3.5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_gives_float32(dtype: torch.dtype) -> None:
    conditional, unconditional = (value.to(dtype).reshape(3, 8, 4) for value in predictions())
    for rule in ("linear", "norm_preserving"):
        guided = guide(conditional, unconditional, 4.5, rule)
        assert guided.dtype is torch.float32
        assert torch.equal(guided, guide(conditional.float(), unconditional.float(), 4.5, rule))


def test_embedded_guidance_has_nothing_to_combine() -> None:
    conditional, unconditional = predictions()
    with pytest.raises(ValueError, match="guidance rule 'embedded' combines no predictions; use linear"):
        guide(conditional, unconditional, 4.5, "embedded")
