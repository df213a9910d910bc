"""The trained weights: which they are, their average, and the reference policy they started from."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager

import torch
from torch import Tensor


class Weights:
    """Named trained parameters of a network, in a fixed order, with an optional exponential average.

    ``shadow <- decay * shadow + (1 - decay) * weight``, once every ``every`` updates; decay 0 keeps no average.
    """

    def __init__(self, module: torch.nn.Module, decay: float = 0.0, every: int = 1) -> None:
        named = {name: p for name, p in module.named_parameters() if p.requires_grad}
        if not named:
            raise ValueError("Weights: no parameter of the network asks for a gradient; add LoRA or unfreeze it")
        self.names, self.parameters = list(named), list(named.values())
        self.decay, self.every = decay, every
        self.shadow = [p.detach().clone() for p in self.parameters] if decay > 0 else []

    def average(self, update: int) -> None:
        """Move the average after optimizer step number ``update`` (counted from 1)."""
        if self.shadow and update % self.every == 0:
            torch._foreach_lerp_(self.shadow, [p.detach() for p in self.parameters], 1 - self.decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Run with the averaged weights; the live ones return afterwards, bit for bit."""
        if not self.shadow:
            yield
            return
        with swapped(self.parameters, self.shadow):
            yield

    def state(self) -> dict[str, dict[str, Tensor]]:
        state = {"policy": dict(zip(self.names, [p.detach() for p in self.parameters], strict=True))}
        if self.shadow:
            state["ema"] = dict(zip(self.names, self.shadow, strict=True))
        return state

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy weights in; ValueError names what is missing, too much, or of another shape, before anything changes."""
        wanted = {"policy": self.parameters} | ({"ema": self.shadow} if self.shadow else {})
        for part, tensors in wanted.items():
            found = state.get(part, {})
            if list(found) != self.names or any(
                found[n].shape != t.shape for n, t in zip(self.names, tensors, strict=True)
            ):
                raise ValueError(
                    f"checkpoint: {part} weights do not fit this model; was model.* changed since the run began?"
                )
        for part, tensors in wanted.items():
            with torch.no_grad():
                for name, tensor in zip(self.names, tensors, strict=True):
                    tensor.copy_(state[part][name])


@contextmanager
def swapped(parameters: list[torch.nn.Parameter], values: list[Tensor]) -> Iterator[None]:
    """Put ``values`` into the parameters for the time of the block; copies, never aliases."""
    live = [p.detach() for p in parameters]  # share the parameters' memory
    saved = [tensor.clone() for tensor in live]
    torch._foreach_copy_(live, values)
    try:
        yield
    finally:
        torch._foreach_copy_(live, saved)


def snapshot_reference(weights: Weights) -> Callable[[], AbstractContextManager[None]]:
    """The reference of full fine-tuning: a frozen copy of the start weights, swapped in when asked for."""
    start = [p.detach().clone() for p in weights.parameters]
    return lambda: swapped(weights.parameters, start)
