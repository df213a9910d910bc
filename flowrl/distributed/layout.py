"""How a tensor is cut into the processes' shards: rows of its first dimension, as torch's ``Shard(0)`` deals them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def rows_of(rows: int, rank: int, world: int) -> slice:
    """Process ``rank``'s rows of ``rows`` ones: ``ceil(rows / world)`` each, less (or none) for the last processes."""
    each = -(-rows // world)
    return slice(min(rank * each, rows), min((rank + 1) * each, rows))


def part_of(whole: Tensor, rank: int, world: int) -> Tensor:
    """The shard of process ``rank``: a view of ``whole`` [N, ...]; it may have no rows."""
    return whole[rows_of(len(whole), rank, world)]


def padded(part: Tensor, rows: int, world: int) -> Tensor:
    """``part`` [M, ...] with zeros below it, up to the ``ceil(rows / world)`` rows that every process sends."""
    each = -(-rows // world)
    if len(part) == each:
        return part.contiguous()
    return torch.cat([part, part.new_zeros(each - len(part), *part.shape[1:])])


def put_together(parts: Sequence[Tensor], rows: int) -> Tensor:
    """The whole tensor [rows, ...] of all processes' padded shards, in rank order."""
    return torch.cat(list(parts))[:rows]


def for_everyone(gradients: Sequence[Tensor], world: int) -> Tensor:
    """Lay out whole gradients for one reduce-scatter: [world, L], row r being what process r owns of each, padded and flat."""
    rows = []
    for rank in range(world):
        mine = [padded(part_of(g, rank, world), len(g), world).flatten() for g in gradients]
        rows.append(torch.cat(mine))
    return torch.stack(rows)


def own_parts(flat: Tensor, shapes: Sequence[torch.Size], rank: int, world: int) -> list[Tensor]:
    """Process ``rank``'s shards, cut from its row [L] of `for_everyone`. shapes: of the whole tensors."""
    found, place = [], 0
    for shape in shapes:
        each = -(-shape[0] // world)
        inner = shape[1:].numel()
        here = rows_of(shape[0], rank, world)
        own = flat[place : place + (here.stop - here.start) * inner]
        found.append(own.reshape(here.stop - here.start, *shape[1:]))
        place += each * inner
    return found
