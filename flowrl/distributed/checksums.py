"""Checksums of the bits of tensors, by which processes tell whether they hold the same weights."""

from __future__ import annotations

import torch
from torch import Tensor

from flowrl.errors import UserError

CHUNK = 1 << 20
_ODD = 0x1E3779B97F4A7C15
_BITS = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


class ReplicaMismatch(UserError):
    """A process holds other weights than the rest."""


@torch.no_grad()
def checksum(x: Tensor) -> Tensor:
    """``sum_i b_i (1 + 2 i c) mod 2^64`` over the bits b_i of the elements, c odd: int64 scalar on the device of ``x``.

    Whole numbers, so exact whatever the order of the sum and whatever the device. A single changed element always shows,
    since its factor is odd, and so do two of at most 4 bytes that change places. At most CHUNK elements are widened to 8
    bytes at a time.
    """
    bits = x.detach().contiguous().flatten().view(_BITS[x.element_size()])
    total = torch.zeros((), dtype=torch.int64, device=x.device)
    for start in range(0, len(bits), CHUNK):
        part = bits[start : start + CHUNK].to(torch.int64)
        place = torch.arange(start, start + len(part), device=x.device)
        total += (part * (place * (2 * _ODD) + 1)).sum()
    return total
