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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from flowrl.distributed.zero_flat import Flat
from flowrl.distributed.zero_parts import Parts

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
        return Parts(engine, network, trained, timeout_s, example)
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
