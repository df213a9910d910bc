"""What the rest of training asks of a network that several processes hold in parts, whoever splits it."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Any, Protocol

from torch import Tensor, nn


class Steps(Protocol):
    """The part of an optimizer's interface that training uses."""

    @property
    def param_groups(self) -> list[dict[str, Any]]: ...
    def step(self) -> Any: ...
    def zero_grad(self, set_to_none: bool = True) -> None: ...
    def state_dict(self) -> dict[str, Any]: ...
    def load_state_dict(self, state_dict: dict[str, Any]) -> None: ...


class Split(Protocol):
    """A split network; every process makes and uses one alike. See `sharding.Sharded` and `zero_base.Zero`."""

    @property
    def can_go_back(self) -> bool:
        """Whether a process may leave a network call halfway: not where a call is itself a meeting."""

    @property
    def optimizer(self) -> Steps | None:
        """The optimizer that it owns, or None where training makes its own."""

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, in the network's order: this process's shards, and what is whole."""

    def is_shard(self, name: str) -> bool:
        """Whether ``parameters()[name]`` is a part of the tensor of that name."""

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole of all processes' parts, on the CPU of the first process; the others get an empty tensor."""

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor of ``name``. ValueError for another shape."""

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether `add_gradients` adds up the gradient of ``parameter``; of others the caller does."""

    def add_gradients(self) -> int:
        """Sum gradients over processes, after which each process has those of its parts; returns how many meetings it took."""

    def gradients(self) -> list[Tensor]:
        """This process's parts of the summed gradients, to be scaled in place."""

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``; processes may call it in unequal numbers."""

    def meet(self) -> None:
        """Before a meeting of all processes: whoever still has calls to make is waited for."""

    def pause(self) -> None:
        """Before values are written into the parameters: wait for calls of others that need them as they are."""

    def changed(self) -> None:
        """Values were written into the parameters."""

    def check(self) -> None:
        """Compare what all processes compute with, where it is gathered from parts. Raises ReplicaMismatch."""

    def updating(self) -> AbstractContextManager[None]:
        """The part of an iteration that changes weights."""

    def exporting(self, lead: bool) -> AbstractContextManager[None]:
        """Within the block the ``lead`` process's trained weights are whole; all processes enter it."""

    def memory(self) -> dict[str, int]:
        """Bytes: what this process holds of what is split, and what it would hold alone."""
