"""ZeRO by DeepSpeed, which is imported here and nowhere else: Adam's state in parts, gradients too (stage 2), weights too (3).

DeepSpeed keeps the parts, adds gradients up, steps and hands the new weights round. What it would decide by itself stays with
flowrl: gradients are summed and not averaged, the norm is taken, the limit applied and an update that is not finite left out
as without it, and checkpoints hold whole tensors. Every process must take part in a reduction, whatever its number of calls:
stage 1 reduces once an update, later ones in every backward pass, which is therefore done in turn (`flowrl.distributed.turns`).
"""

from __future__ import annotations

import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowrl.distributed.turns import Turns, plain_backward
from flowrl.errors import UserError

if TYPE_CHECKING:
    from flowrl.distributed.split import Split

BUCKET = 1 << 24
"""Elements that DeepSpeed reduces at once: 64 MB in float32."""
Make = Callable[[Sequence[nn.Parameter]], torch.optim.Optimizer]


def prepare(kind: str) -> None:
    """Have DeepSpeed use ``kind`` ("cpu" or "cuda") in this process, before it is imported."""
    os.environ.setdefault("DS_ACCELERATOR", kind)
    logging.getLogger("DeepSpeed").setLevel(logging.WARNING)
    # Said by newer torch at every call that DeepSpeed makes of them.
    warnings.filterwarnings("ignore", r".torch\.distributed\.\w+. is deprecated", FutureWarning)
    if kind == "cpu":
        import deepspeed.ops

        # Else it compiles a faster all-reduce through shared memory on first use, which takes a C++ compiler and a minute.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def split(
    network: nn.Module,
    stage: int,
    device: torch.device,
    timeout_s: float,
    example: Callable[[], Tensor],
    optimizer: Make,
) -> Split:
    """Give the trained parameters of ``network``, or at stage 3 all of it, to DeepSpeed. optimizer: makes the one that steps."""
    prepare(device.type)
    import deepspeed

    network.to(device)
    trained = {name: p for name, p in network.named_parameters() if p.requires_grad}
    # The earlier stages need the trained parameters alone: no hook on a call, no broadcast of frozen weights.
    model = network if stage == 3 else nn.ParameterList(trained.values())
    engine = deepspeed.initialize(
        model=model, optimizer=optimizer(list(trained.values())), config=settings(stage)
    )[0]  # fmt: skip
    if stage == 3:
        from flowrl.distributed.zero_parts import Parts

        return Parts(engine, network, trained, timeout_s, example)
    from flowrl.distributed.zero_flat import Flat

    return Flat(engine, trained, stage, timeout_s, example)


def settings(stage: int) -> dict[str, Any]:
    """DeepSpeed's config: it is to reduce gradients as they come, and to leave scaling and clipping alone."""
    return {
        "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True, "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": {
            "stage": stage, "overlap_comm": False, "reduce_bucket_size": BUCKET,
            # Stage 1 needs no buffer for gradients on their way: they are reduced where they are, once an update.
            "contiguous_gradients": stage > 1, "stage3_param_persistence_threshold": 0,  # none stays whole
        },
    }  # fmt: skip


class Zero:
    """What the stages have in common: backward passes, and sums of gradients.

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
