"""Calls are counted by hooks: forwards by gradient mode, backwards when a gradient really reaches the output."""

from __future__ import annotations

import pytest
import torch

from flowrl.performance.counting import CallCounter


class Net(torch.nn.Module):
    def __init__(self, wrap: str = "plain") -> None:
        super().__init__()
        self.linear = torch.nn.Linear(3, 3)
        self.wrap = wrap

    def forward(self, hidden_states: torch.Tensor) -> object:
        out = self.linear(hidden_states)
        return {"plain": out, "tuple": (out,), "mapping": {"sample": out}, "none": None}[self.wrap]


def test_counts_calls_and_samples_by_gradient_mode() -> None:
    net = Net()
    with CallCounter(net) as counter:
        with torch.no_grad():
            net(torch.ones(5, 3))
            net(hidden_states=torch.ones(2, 3))
        net(torch.ones(4, 3)).sum().backward()
        net(torch.ones(6, 3))  # with gradients on, never differentiated
    assert counter.as_metrics() == {
        "calls/forward": 4,
        "calls/forward_samples": 17,
        "calls/forward_grad": 2,
        "calls/forward_grad_samples": 10,
        "calls/backward": 1,
        "calls/backward_samples": 4,
    }


@pytest.mark.parametrize("wrap", ["tuple", "mapping"])
def test_wrapped_outputs_count_alike(wrap: str) -> None:
    net = Net(wrap)
    counter = CallCounter(net)
    out = net(torch.ones(4, 3))
    (out[0] if wrap == "tuple" else out["sample"]).sum().backward()
    assert (counter.counts.forward_samples, counter.counts.backward_samples) == (4, 4)


def test_a_detached_branch_has_no_backward() -> None:
    net = Net()
    counter = CallCounter(net)
    a, b = net(torch.ones(2, 3)), net(torch.ones(2, 3))
    (a + b.detach()).sum().backward()
    assert (counter.counts.forward, counter.counts.backward) == (2, 1)


def test_two_backwards_through_one_forward_count_twice() -> None:
    net = Net()
    counter = CallCounter(net)
    out = net(torch.ones(2, 3))
    out.sum().backward(retain_graph=True)
    out.sum().backward()
    assert (counter.counts.forward, counter.counts.backward) == (1, 2)


def test_counting_leaves_values_and_gradients_alone() -> None:
    net, x = Net(), torch.randn(4, 3)
    net(x).pow(2).sum().backward()
    expected = net.linear.weight.grad
    net.zero_grad()
    with CallCounter(net):
        net(x).pow(2).sum().backward()
    assert torch.equal(net.linear.weight.grad, expected)


def test_reset_and_remove() -> None:
    net = Net()
    counter = CallCounter(net)
    net(torch.ones(1, 3))
    counter.reset()
    net(torch.ones(2, 3))
    counter.remove()
    counter.remove()
    net(torch.ones(4, 3))
    assert counter.counts.forward_samples == 2
    assert not net._forward_hooks


def test_an_output_without_a_batch_is_refused() -> None:
    net = Net("none")
    with CallCounter(net), pytest.raises(TypeError, match="Net returned no tensor"):
        net(torch.ones(1, 3))
