"""The trained weights: which they are, their average, and the reference policy they started from."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor

from flowrl.config.schema import Optimizer
from flowrl.distributed.split import Split, Steps


class Weights:
    """Named trained parameters of a network, in a fixed order, with an optional exponential average.

    ``shadow <- decay * shadow + (1 - decay) * weight``, once every ``every`` updates; decay 0 keeps no average.
    sharded: the split network that ``module`` is; parameters and average are then this process's shards.
    """

    def __init__(
        self, module: torch.nn.Module, decay: float = 0.0, every: int = 1, sharded: Split | None = None
    ) -> None:
        self.sharded = sharded
        trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
        named = trained if sharded is None else sharded.parameters()
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
        with self.holding(self.shadow):
            yield

    @contextmanager
    def holding(self, values: Sequence[Tensor]) -> Iterator[None]:
        """Run with other values of the parameters; the live ones return afterwards, bit for bit.

        Where weights lie in shards every process must enter and leave.
        """
        self.pause()
        with swapped(self.parameters, list(values)):
            self.changed()
            yield
            self.pause()
        self.changed()

    def pause(self) -> None:
        """Wait for calls of other processes that still need the values as they are."""
        if self.sharded is not None:
            self.sharded.pause()

    def changed(self) -> None:
        """Say that values were written into the parameters from outside an optimizer step."""
        if self.sharded is not None:
            self.sharded.changed()

    def whole(self, values: Sequence[Tensor]) -> dict[str, Tensor]:
        """Tensors shaped like the parameters, by name, as they would be without shards.

        Every process takes part; what lies in shards is on the CPU of the first process, and empty in the others.
        """
        found = {}
        for name, value in zip(self.names, values, strict=True):
            shards = self._shards(name)
            found[name] = value.detach() if shards is None else shards.whole(name, value)
        return found

    def parts(self, found: dict[str, Tensor], message: str) -> list[Tensor]:
        """This process's values of what ``whole`` gave; ValueError with ``message`` where names or shapes differ."""
        if list(found) != self.names:
            raise ValueError(message)
        values = []
        for name, parameter in zip(self.names, self.parameters, strict=True):
            shards = self._shards(name)
            try:
                value = found[name] if shards is None else shards.part(name, found[name])
            except ValueError as error:
                raise ValueError(message) from error
            if value.shape != parameter.shape:
                raise ValueError(message)
            values.append(value)
        return values

    def optimizer_state(self, optimizer: Steps) -> dict[str, Any]:
        """The optimizer's state as it would be without shards; as ``whole``, every process takes part."""
        state = optimizer.state_dict()
        return (
            state
            if self.sharded is None
            else self._each(state, lambda sharded, name, value: sharded.whole(name, value))
        )

    def own_optimizer_state(self, state: dict[str, Any]) -> dict[str, Any]:
        """This process's part of what ``optimizer_state`` gave."""
        return (
            state if self.sharded is None else self._each(state, lambda sharded, name, value: sharded.part(name, value))
        )

    def _each(self, state: dict[str, Any], change: Callable[[Split, str, Tensor], Tensor]) -> dict[str, Any]:
        """An optimizer's state, with every tensor that is shaped like a sharded parameter changed."""
        found = {}
        for number, values in state["state"].items():
            name = self.names[number]
            shards = self._shards(name)
            found[number] = {
                key: change(shards, name, value)
                if shards is not None and isinstance(value, Tensor) and value.ndim
                else value
                for key, value in values.items()
            }
        return {**state, "state": found}

    def _shards(self, name: str) -> Split | None:
        """The split network where ``name`` lies in shards."""
        return self.sharded if self.sharded is not None and self.sharded.is_shard(name) else None

    def state(self) -> dict[str, dict[str, Tensor]]:
        state = {"policy": self.whole([p.detach() for p in self.parameters])}
        if self.shadow:
            state["ema"] = self.whole(self.shadow)
        return state

    def load(self, state: dict[str, dict[str, Tensor]]) -> None:
        """Copy weights in; ValueError names what is missing, too much, or of another shape, before anything changes."""
        wanted = {"policy": self.parameters} | ({"ema": self.shadow} if self.shadow else {})
        values = {
            part: self.parts(
                state.get(part, {}),
                f"checkpoint: {part} weights do not fit this model; was model.* changed since the run began?",
            )
            for part in wanted
        }
        self.pause()
        for part, tensors in wanted.items():
            with torch.no_grad():
                for tensor, value in zip(tensors, values[part], strict=True):
                    tensor.copy_(value)
        self.changed()


def adamw(settings: Optimizer, parameters: Sequence[torch.nn.Parameter]) -> torch.optim.AdamW:
    """The optimizer of the trained weights, as ``optimizer`` in a config says."""
    o = settings
    return torch.optim.AdamW(
        parameters, lr=o.lr, betas=o.betas, eps=o.eps, weight_decay=o.weight_decay, foreach=True
    )  # fmt: skip


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
    return lambda: weights.holding(start)
