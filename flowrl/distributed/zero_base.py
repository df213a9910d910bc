"""What DeepSpeed's stages have in common: backward passes in turn, and sums of gradients."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.distributed.turns import Turns, plain_backward
from flowrl.errors import UserError


class Zero:
    """The part of `flowrl.distributed.split.Split` that every stage does alike.

    trained: parameters by name, in the network's order; calls_meet: whether a network call is a meeting.
    """

    def __init__(
        self,
        engine: Any,
        trained: Mapping[str, nn.Parameter],
        stage: int,
        timeout_s: float,
        example: Callable[[], Tensor],
    ) -> None:
        self.engine, self.trained, self.stage = engine, dict(trained), stage
        self.owner = engine.optimizer
        self.world, self.rank = torch.distributed.get_world_size(), torch.distributed.get_rank()
        self.turns = Turns(example, timeout_s, calls_meet=stage == 3, run=self._reduce)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``; from stage 2 on in the turn of backward passes, since each reduces gradients."""
        if self.stage == 1:
            plain_backward(loss)
        else:
            self.turns.backward(loss)

    def _reduce(self, loss: Tensor) -> None:
        """A backward pass after which each process has the gradients of its part."""
        self.engine.set_gradient_accumulation_boundary(False)
        self.owner.clear_backward_seen_flag()
        try:
            self.engine.backward(loss, scale_wrt_gas=False)
        except torch.OutOfMemoryError as error:
            raise UserError(
                f"out of memory in a backward pass; under distributed.sharding=zero{self.stage} the other processes cannot go "
                f"back. Use a smaller batch.micro_batch ({error})"
            ) from error

    def add_gradients(self) -> int:
        """Sum what has not been summed yet; a parameter without a gradient counts as 0."""
        if self.stage == 1:
            for p in self.trained.values():
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
        with self.engine.coalesce_grad_reduction():
            pass  # at its end DeepSpeed reduces what is there, and settles what an optimizer step takes
        torch._foreach_mul_(self.gradients(), self.world)  # a mean over processes until here
        return 1

    def gradients(self) -> list[Tensor]:
        """This process's part of the summed gradients."""
        return [gradient for group in self.owner.averaged_gradients.values() for gradient in group or ()]

    def meet(self) -> None:
        """Wait for what other processes do that needs this one."""
        if self.stage > 1:
            self.turns.meet()

    def updating(self) -> AbstractContextManager[None]:
        """Nothing is done otherwise within an update."""
        return nullcontext()

    def _everywhere(self, part: Tensor) -> list[Tensor]:
        """All processes' equal parts in rank order, on the CPU of the first process; [] in the others."""
        self.meet()
        parts = [torch.empty_like(part) for _ in range(self.world)] if self.rank == 0 else None
        torch.distributed.gather(part.contiguous(), parts, dst=0)
        return [] if parts is None else [p.cpu() for p in parts]
