"""Time-step gradient checkpointing: back-propagate through a whole sampling chain with the memory of one step.

A chain is ``x_(k+1), loss_k = step(x_k, k)`` for k = 0 .. T - 1. Plain back-propagation keeps the activations of T network
calls. Here the forward pass keeps the T latents alone, and the backward pass goes from the last step to the first,
computes each step again with gradient and pulls the gradient back through it,

    (dL/dx_k, dL/dtheta) += vjp(step_k; dL/dx_(k+1), dL/dloss_k),

so a chain costs 2T forward calls and T backward ones (EcoDiff, 2412.02852; AlignProp, 2310.03739, checkpoints by step
as well). It composes with checkpointing by layer, which acts inside a step.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

ChainStep = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""(x_k [B, ...], k) -> (x_(k+1) [B, ...], loss_k [B]). A step reads the random state of torch or keyed noise, nothing
else that changes between two calls."""


def unrolled_chain(step: ChainStep, x: Tensor, steps: int, start: int | Tensor = 0) -> tuple[Tensor, Tensor]:
    """Run the chain by plain automatic differentiation, which keeps the activations of every step with gradient.

    Arguments and results as of `checkpointed_chain`, whose gradient is the same.
    """
    first = _first(steps, start)
    with torch.no_grad():
        losses = [torch.empty(0) for _ in range(steps)]
        for k in range(first):
            x, losses[k] = step(x, k)
    for k in range(first, steps):
        after, loss = step(x, k)
        here = _here(start, k, after)
        x, losses[k] = (after, loss) if here is None else (_gate(after, here), _gate(loss, here))
    return x, torch.stack(losses)


def checkpointed_chain(
    step: ChainStep,
    x: Tensor,
    steps: int,
    parameters: Sequence[Tensor],
    start: int | Tensor = 0,
    every: int = 1,
) -> tuple[Tensor, Tensor]:
    """Run the chain and give its end and its losses a gradient at the memory of one step.

    step: see ChainStep. x: [B, ...]. parameters: the tensors that ``step`` reads and that shall get a gradient. start: the
    first step with gradient, one for all or int64 [B] for each sample; a sample's earlier steps and their losses carry
    none (truncation: DRaFT-K has start = T - K). every: keep each every-th latent alone; those between are computed again,
    which costs up to T more forward calls and leaves T / every + every latents at the peak.

    Returns (x_T [B, ...], losses [T, B]). Random states and autocast of the forward pass hold again in the replay.
    Latents are saved as autograd saves tensors, so ``torch.autograd.graph.save_on_cpu`` moves them off the device. Raises
    ValueError for no steps, and RuntimeError in a backward pass that comes a second time or after a parameter changed.
    """
    if every < 1:
        raise ValueError(f"checkpointed_chain: every is {every}; use at least 1")
    plan = _Plan(step, steps, start, _first(steps, start), every)
    wanted = [p for p in parameters if p.requires_grad]
    return cast("tuple[Tensor, Tensor]", _Replayed.apply(plan, x, *wanted))  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _Plan:
    step: ChainStep
    steps: int
    start: int | Tensor
    first: int
    every: int


@dataclass(frozen=True)
class _Ambient:
    """What a step may depend on beside its arguments: random states and autocast."""

    cpu: Tensor
    device: torch.device
    on_device: Tensor | None
    autocast: tuple[bool, torch.dtype, bool]

    @classmethod
    def now(cls, device: torch.device) -> _Ambient:
        kind = device.type
        autocast = (
            torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind), torch.is_autocast_cache_enabled(),
        )  # fmt: skip
        on_device = torch.cuda.get_rng_state(device) if kind == "cuda" else None
        return cls(torch.get_rng_state(), device, on_device, autocast)

    @contextmanager
    def restored(self) -> Iterator[None]:
        enabled, dtype, cache = self.autocast
        devices = [self.device] if self.on_device is not None else []
        with (
            torch.random.fork_rng(devices),
            torch.autocast(self.device.type, dtype, enabled, cache),
        ):
            torch.set_rng_state(self.cpu)
            if self.on_device is not None:
                torch.cuda.set_rng_state(self.on_device, self.device)
            yield


class _Replayed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, plan: _Plan, x: Tensor, *parameters: Tensor) -> tuple[Tensor, Tensor]:
        kept, ambient, losses = [], [], []
        for k in range(plan.steps):
            if k >= plan.first:
                ambient.append(_Ambient.now(x.device))
                if (k - plan.first) % plan.every == 0:
                    kept.append(x)
            x, loss = plan.step(x, k)
            losses.append(loss)
        ctx.plan, ctx.ambient, ctx.parameters = plan, ambient, parameters
        ctx.versions = [p._version for p in parameters]
        ctx.save_for_backward(*kept)
        return x, torch.stack(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, pull: Tensor, pull_losses: Tensor) -> tuple[Tensor | None, ...]:
        plan, parameters = ctx.plan, ctx.parameters
        if ctx.versions != [p._version for p in parameters]:
            raise RuntimeError(
                "checkpointed_chain: a parameter was changed between the forward and the backward pass, so the steps cannot "
                "be computed again; call backward before the optimizer step"
            )
        latents = _latents(plan, ctx.saved_tensors, ctx.ambient)
        total = _Sum(len(parameters))
        for k in reversed(range(plan.first, plan.steps)):
            pulls = [pull, pull_losses[k]]
            here = _here(plan.start, k, pull)
            if here is not None:
                pulls = [torch.where(_like(here, g), g, torch.zeros_like(g)) for g in pulls]
            with ctx.ambient[k - plan.first].restored(), torch.enable_grad():
                x = next(latents).detach().requires_grad_()
                back, *found = _pulled_back(plan.step(x, k), pulls, (x, *parameters))
            pull = torch.zeros_like(x) if back is None else back
            total.add(found)
        whole = _here(plan.start, 0, pull)
        if whole is not None:
            pull = torch.where(_like(whole, pull), pull, torch.zeros_like(pull))
        return None, pull if plan.first == 0 else None, *total.parts


def _pulled_back(ends: Sequence[Tensor], pulls: Sequence[Tensor], sources: Sequence[Tensor]) -> Sequence[Tensor | None]:
    pairs = [(end, pull) for end, pull in zip(ends, pulls, strict=True) if end.requires_grad]
    if not pairs:
        return [None] * len(sources)
    made, gradients = zip(*pairs, strict=True)
    return torch.autograd.grad(made, sources, gradients, allow_unused=True)


def _latents(plan: _Plan, kept: Sequence[Tensor], ambient: Sequence[_Ambient]) -> Iterator[Tensor]:
    """The latent before each step with gradient, from the last to the first; what was not kept is computed again."""
    for number in reversed(range(len(kept))):
        begin = plan.first + number * plan.every
        part = [kept[number]]
        for k in range(begin, min(begin + plan.every, plan.steps) - 1):
            with ambient[k - plan.first].restored(), torch.no_grad():
                part.append(plan.step(part[-1], k)[0])
        while part:
            yield part.pop()


class _Sum:
    """Running sums of gradients; the first of each may alias another tensor, so it is never written to."""

    def __init__(self, count: int) -> None:
        self.parts: list[Tensor | None] = [None] * count
        self._owned = [False] * count

    def add(self, found: Sequence[Tensor | None]) -> None:
        for index, new in enumerate(found):
            held = self.parts[index]
            if new is None:
                continue
            if held is None:
                self.parts[index] = new
            elif self._owned[index]:
                held.add_(new)
            else:
                self.parts[index], self._owned[index] = held + new, True


def _first(steps: int, start: int | Tensor) -> int:
    if steps < 1:
        raise ValueError(f"chain: {steps} steps; use at least 1")
    first = int(start.min()) if isinstance(start, Tensor) else start
    if first < 0:
        raise ValueError(f"chain: start is {first}; steps count from 0")
    return min(first, steps)


def _here(start: int | Tensor, k: int, like: Tensor) -> Tensor | None:
    """bool [B], the samples whose step k has a gradient; None for all of them."""
    return (start <= k).to(like.device) if isinstance(start, Tensor) else None


def _like(mask: Tensor, x: Tensor) -> Tensor:
    return mask.reshape(-1, *[1] * (x.ndim - 1))


def _gate(x: Tensor, here: Tensor) -> Tensor:
    return torch.where(_like(here, x), x, x.detach())
