"""Count what a network is asked to do, by hooks: independent of whoever calls it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch


@dataclass
class Counts:
    """Calls of a network and the samples in them (the leading dimension of its output).

    ``forward*`` holds all forwards; ``forward_grad*`` those made with gradients enabled, so the difference ran without.
    """

    forward: int = 0
    forward_samples: int = 0
    forward_grad: int = 0
    forward_grad_samples: int = 0
    backward: int = 0
    backward_samples: int = 0


class CallCounter:
    """Count forwards and backwards through ``module`` until `remove`; usable as a context manager.

    A backward counts when a gradient reaches the module's output, once for each backward pass through one forward. The
    hooks read no tensor value, so they cost microseconds and never wait for a device.
    """

    def __init__(self, module: torch.nn.Module) -> None:
        self.counts = Counts()
        self._handle = module.register_forward_hook(self._after_forward)

    def reset(self) -> None:
        """Start again from zero; a backward of an earlier forward still counts."""
        self.counts = Counts()

    def remove(self) -> None:
        """Take the hook off the module. Counts stay readable; calling it twice does nothing more."""
        self._handle.remove()

    def as_metrics(self) -> dict[str, int]:
        """Return ``calls/forward``, ``calls/forward_samples``, ``calls/backward``, ... since the last reset."""
        return {f"calls/{name}": value for name, value in vars(self.counts).items()}

    def __enter__(self) -> CallCounter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _after_forward(self, module: torch.nn.Module, inputs: tuple[Any, ...], output: Any) -> None:
        tensor = _first_tensor(output)
        if tensor is None or tensor.ndim == 0:
            raise TypeError(f"CallCounter: {type(module).__name__} returned no tensor with a batch dimension")
        samples = len(tensor)
        self.counts.forward += 1
        self.counts.forward_samples += samples
        if torch.is_grad_enabled():
            self.counts.forward_grad += 1
            self.counts.forward_grad_samples += samples
        if tensor.requires_grad:
            tensor.register_hook(lambda gradient: self._after_backward(samples))  # type: ignore[no-untyped-call]

    def _after_backward(self, samples: int) -> None:
        self.counts.backward += 1
        self.counts.backward_samples += samples


def _first_tensor(output: Any) -> torch.Tensor | None:
    """The first tensor of a tensor, a sequence or a mapping (diffusers' outputs are mappings)."""
    if isinstance(output, torch.Tensor):
        return output
    if isinstance(output, Mapping):
        output = tuple(output.values())
    if isinstance(output, Sequence) and not isinstance(output, str):
        for item in output:
            found = _first_tensor(item)
            if found is not None:
                return found
    return None
