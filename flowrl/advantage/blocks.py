"""Work on blocks of rows, so that what is made on the way stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_ELEMENTS = 2**16  # in a block: half a megabyte of float64


def by_rows(call: Callable[..., tuple[Tensor, ...]], *inputs: Tensor) -> tuple[Tensor, ...]:
    """Run ``call`` on blocks of rows of the inputs ([B, ...] each) and join the results ([B, ...] each) in order.

    The first input's columns say how many rows a block has. One block on an accelerator, whose caches are managed
    otherwise.
    """
    rows = len(inputs[0])
    size = max(1, _ELEMENTS // max(1, inputs[0].shape[1]))
    if rows <= size or inputs[0].device.type != "cpu":
        return call(*inputs)
    joined: tuple[Tensor, ...] = ()
    for start in range(0, rows, size):
        part = slice(start, start + size)
        found = call(*(x[part] for x in inputs))
        if not joined:
            joined = tuple(torch.empty((rows, *x.shape[1:]), dtype=x.dtype, device=x.device) for x in found)
        for whole, piece in zip(joined, found, strict=True):
            whole[part] = piece
    return joined
