"""Time-step checkpointing: the gradient of plain back-propagation, 2T forward calls, memory of one step."""

from __future__ import annotations

import weakref

import pytest
import torch
from torch import Tensor, nn

from flowrl import rng
from flowrl.rollout.differentiable import checkpointed_chain, unrolled_chain

BATCH, WIDTH = 5, 6


class LoraLinear(nn.Module):
    """A frozen layer with a trained low-rank part beside it."""

    def __init__(self, width: int, rank: int = 2) -> None:
        super().__init__()
        self.base = nn.Linear(width, width)
        self.base.requires_grad_(False)
        self.a, self.b = nn.Parameter(torch.randn(rank, width)), nn.Parameter(0.3 * torch.randn(width, rank))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + x @ self.a.T @ self.b.T


class Network(nn.Module):
    def __init__(self, dropout: float = 0.3) -> None:
        super().__init__()
        self.layers = nn.Sequential(LoraLinear(WIDTH), nn.Tanh(), nn.Dropout(dropout), LoraLinear(WIDTH))
        self.unused = nn.Parameter(torch.zeros(3))
        self.calls = 0

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        self.calls += 1
        return self.layers(x + c)


class Sampler:
    """A stochastic guided chain: two network calls a step, keyed noise, a loss a step that also reads the new latent."""

    def __init__(self, dropout: float = 0.3) -> None:
        torch.manual_seed(3)
        self.network = Network(dropout).double()
        self.condition = nn.Parameter(torch.randn(WIDTH, dtype=torch.float64))
        self.parameters = [*self.network.parameters(), self.condition]

    def step(self, x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        conditional, other = self.network(x, self.condition), self.network(x, torch.zeros_like(self.condition))
        velocity = other + 2.5 * (conditional - other)
        noise = rng.normal([rng.key(0, 0, b, step=k, stream="step") for b in range(len(x))], (WIDTH,)).double()
        after = x - 0.1 * velocity + 0.2 * noise
        return after, (velocity**2).mean(1) + 0.1 * after.sum(1) * (k + 1)

    def gradients(self, chain, steps: int, start=0, **options) -> tuple[list[Tensor], Tensor, Tensor]:
        """(gradients, end, losses) of a loss that mixes the end and all per-step losses unevenly."""
        torch.manual_seed(11)  # dropout
        x = torch.linspace(-1, 1, BATCH * WIDTH, dtype=torch.float64).reshape(BATCH, WIDTH).requires_grad_()
        end, losses = chain(self.step, x, steps, *options.pop("more", ()), start=start, **options)
        weight = torch.arange(1.0, steps + 1, dtype=torch.float64)[:, None]
        total = (end**3).sum() + (weight * losses).sum()
        if not total.requires_grad:
            return [None] * (1 + len(self.trained)), end, losses
        return list(torch.autograd.grad(total, [x, *self.trained], allow_unused=True)), end, losses

    @property
    def trained(self) -> list[Tensor]:
        return [p for p in self.parameters if p.requires_grad]


def both(steps: int, start=0, every: int = 1):
    sampler = Sampler()
    plain = sampler.gradients(unrolled_chain, steps, start)
    kept = sampler.gradients(checkpointed_chain, steps, start, every=every, more=(sampler.parameters,))
    return plain, kept


def assert_equal(plain, kept) -> None:
    torch.testing.assert_close(kept[1], plain[1], rtol=0, atol=0)
    torch.testing.assert_close(kept[2], plain[2], rtol=0, atol=0)
    for index, (a, b) in enumerate(zip(plain[0], kept[0], strict=True)):
        a, b = (torch.zeros(1, dtype=torch.float64) if g is None else g for g in (a, b))
        assert float((a - b).abs().max()) < 1e-10, index


@pytest.mark.parametrize("every", [1, 3, 4, 50])
def test_gradients_equal_full_back_propagation(every: int) -> None:
    """Dropout, keyed noise, guidance, LoRA, per-step losses, a shared conditioning parameter: all of it, in float64."""
    plain, kept = both(10, every=every)
    assert_equal(plain, kept)
    live = [g for g in kept[0] if g is not None and float(g.abs().max()) > 1e-3]
    assert len(live) == 6  # x, two pairs of LoRA, the condition; what is unused has none


@pytest.mark.parametrize("start", [0, 4, 9, 10])
@pytest.mark.parametrize("every", [1, 3])
def test_truncation_equals_detached_reference(start: int, every: int) -> None:
    assert_equal(*both(10, start, every))


def test_each_sample_may_be_truncated_at_its_own_step() -> None:
    start = torch.tensor([2, 9, 10, 5, 3])
    plain, kept = both(10, start)
    assert_equal(plain, kept)
    parts = []
    for b, first in enumerate(start.tolist()):  # an independent oracle: each sample alone, with its loss alone
        sampler = Sampler(dropout=0.0)
        x = torch.linspace(-1, 1, BATCH * WIDTH, dtype=torch.float64).reshape(BATCH, WIDTH)
        end, losses = unrolled_chain(sampler.step, x, 10, first)
        weight = torch.arange(1.0, 11, dtype=torch.float64)[first:]
        total = (end[b] ** 3).sum() + (weight * losses[first:, b]).sum()
        if total.requires_grad:
            parts.append(torch.autograd.grad(total, sampler.condition)[0])
    sampler = Sampler(dropout=0.0)
    found = sampler.gradients(checkpointed_chain, 10, start, more=(sampler.parameters,))[0][-1]
    torch.testing.assert_close(found, torch.stack(parts).sum(0), rtol=0, atol=1e-10)


def test_samples_that_are_not_truncated_pass_their_gradient_to_the_start() -> None:
    plain, kept = both(6, torch.tensor([0, 3, 0, 6, 1]))
    for gradient in (plain[0][0], kept[0][0]):
        assert [bool((row != 0).any()) for row in gradient] == [True, False, True, False, False]


def test_forward_calls_are_two_a_step() -> None:
    sampler = Sampler()
    for steps, start, every, forwards in ((8, 0, 1, 16), (8, 5, 1, 11), (8, 0, 3, 21), (9, 0, 3, 24)):
        sampler.network.calls = 0
        sampler.gradients(checkpointed_chain, steps, start, every=every, more=(sampler.parameters,))
        assert sampler.network.calls == 2 * forwards, (steps, start, every)  # two guidance branches


class Live:
    """Counts the tensors, and their elements, that autograd holds at a time; ``latents`` are not counted."""

    def __init__(self) -> None:
        self.now = self.peak = self.elements = self.peak_elements = 0

    def pack(self, tensor: Tensor):
        box = [tensor]
        holder = type("Holder", (), {"box": box})()
        size = tensor.numel()
        self.now, self.elements = self.now + 1, self.elements + size
        self.peak, self.peak_elements = max(self.peak, self.now), max(self.peak_elements, self.elements)

        def gone() -> None:
            self.now, self.elements = self.now - 1, self.elements - size

        weakref.finalize(holder, gone)
        return holder

    def unpack(self, holder) -> Tensor:
        return holder.box[0]


def peak(chain, steps: int, **options) -> tuple[int, int]:
    sampler, live = Sampler(), Live()
    more = options.pop("more", False)
    with torch.autograd.graph.saved_tensors_hooks(live.pack, live.unpack):
        sampler.gradients(chain, steps, more=(sampler.parameters,) if more else (), **options)
    assert live.now == 0
    return live.peak, live.peak_elements


def test_saved_tensors_are_flat_in_the_number_of_steps() -> None:
    """Beyond one latent a step (here 30 numbers), the peak does not depend on T; plain back-propagation grows with it."""
    found = {steps: peak(checkpointed_chain, steps, more=True) for steps in (4, 16, 64)}
    activations = {steps: (count - steps, size - steps * BATCH * WIDTH) for steps, (count, size) in found.items()}
    assert len(set(activations.values())) == 1
    plain = {steps: peak(unrolled_chain, steps) for steps in (4, 16)}
    per_step = (plain[16][0] - plain[4][0]) / 12
    assert per_step > 10  # tensors that each further step keeps
    assert activations[4][0] < 2 * per_step + 5
    wide = peak(checkpointed_chain, 64, every=8, more=True)
    assert wide[1] < found[64][1] - 40 * BATCH * WIDTH  # 8 of 64 latents are saved


def test_a_second_backward_pass_is_refused() -> None:
    sampler = Sampler()
    x = torch.ones(2, WIDTH, dtype=torch.float64)
    end, _ = checkpointed_chain(sampler.step, x, 3, sampler.parameters)
    loss = end.sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="second time"):
        loss.backward()


def test_a_changed_parameter_is_refused() -> None:
    sampler = Sampler()
    end, _ = checkpointed_chain(sampler.step, torch.ones(2, WIDTH, dtype=torch.float64), 3, sampler.parameters)
    with torch.no_grad():
        sampler.condition.add_(1)
    with pytest.raises(RuntimeError, match="a parameter was changed between the forward and the backward pass"):
        end.sum().backward()


def test_bad_input() -> None:
    x = torch.ones(2, WIDTH)
    for steps, options, said in (
        (0, {}, "0 steps"),
        (3, {"start": -1}, "start is -1"),
        (3, {"every": 0}, "every is 0"),
    ):
        with pytest.raises(ValueError, match=said):
            checkpointed_chain(lambda x, k: (x, x.sum(1)), x, steps, [], **options)


def test_replay_leaves_the_random_state_as_it_was() -> None:
    sampler = Sampler()
    end, losses = checkpointed_chain(sampler.step, torch.ones(2, WIDTH, dtype=torch.float64), 4, sampler.parameters)
    before = torch.get_rng_state()
    (end.sum() + losses.sum()).backward()
    assert torch.equal(before, torch.get_rng_state())


def test_autocast_holds_in_the_replay() -> None:
    """The loss is taken outside the autocast block, so the replay must turn it on again."""
    layer, seen = nn.Linear(WIDTH, WIDTH), []

    def step(x: Tensor, k: int) -> tuple[Tensor, Tensor]:
        made = layer(x)
        seen.append(made.dtype)
        return x + 0.1 * made.float(), made.float().sum(1)

    with torch.autocast("cpu", torch.bfloat16):
        end, losses = checkpointed_chain(step, torch.randn(3, WIDTH), 3, list(layer.parameters()))
    (end.sum() + losses.sum()).backward()
    assert seen == [torch.bfloat16] * 6


def test_a_step_without_gradient_ends_the_chain() -> None:
    weight = nn.Parameter(torch.ones(WIDTH))
    steps = [lambda x: x * weight, lambda x: torch.ones_like(x), lambda x: x * weight]
    end, _ = checkpointed_chain(
        lambda x, k: (steps[k](x), torch.zeros(len(x))), torch.full((1, WIDTH), 3.0), 3, [weight]
    )
    end.sum().backward()
    assert weight.grad is not None and torch.equal(weight.grad, torch.ones(WIDTH))


def test_a_gradient_that_is_the_pull_itself_is_not_written_to() -> None:
    """d(x + bias)/d bias is the incoming gradient, the same tensor as that of x; sums over steps must not change it."""
    bias = nn.Parameter(torch.zeros(2, WIDTH))
    end, _ = checkpointed_chain(lambda x, k: (x + bias, torch.zeros(len(x))), torch.zeros(2, WIDTH), 5, [bias])
    end.sum().backward()
    assert torch.equal(bias.grad, torch.full((2, WIDTH), 5.0))
