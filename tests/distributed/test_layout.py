"""Shards are torch's ``Shard(0)``: whole tensors come apart and together again for any number of rows and processes."""

from __future__ import annotations

import pytest
import torch

from flowrl.distributed import layout
from flowrl.distributed.sharding import blocks_of, gradient_norm


@pytest.mark.parametrize("world", [1, 2, 3, 4])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8])
def test_parts_are_those_of_chunk(rows: int, world: int) -> None:
    whole = torch.randn(rows, 3, generator=torch.Generator().manual_seed(rows))
    wanted = [*torch.chunk(whole, world), *[whole[:0]] * world][:world]
    parts = [layout.part_of(whole, rank, world) for rank in range(world)]
    assert all(torch.equal(a, b) for a, b in zip(parts, wanted, strict=True))
    sent = [layout.padded(part, rows, world) for part in parts]
    assert len({part.shape for part in sent}) == 1
    assert torch.equal(layout.put_together(sent, rows), whole)


@pytest.mark.parametrize("world", [2, 3, 4])
def test_a_reduce_scatter_of_rows_gives_each_process_its_parts(world: int) -> None:
    generator = torch.Generator().manual_seed(world)
    shapes = [torch.Size(s) for s in ((5, 2), (1,), (7,), (4, 3, 2))]
    gradients = [[torch.randn(shape, generator=generator) for shape in shapes] for _ in range(world)]
    rows = torch.stack([layout.for_everyone(own, world) for own in gradients]).sum(0)
    total = [torch.stack(same).sum(0) for same in zip(*gradients, strict=True)]
    for rank in range(world):
        own = layout.own_parts(rows[rank], shapes, rank, world)
        for part, whole in zip(own, total, strict=True):
            assert torch.equal(part, layout.part_of(whole, rank, world))


def test_the_norm_counts_every_shard_once_and_what_is_whole_once() -> None:
    shards, whole = [torch.tensor([3.0]), torch.zeros(0)], [torch.tensor([2.0, 1.0])]
    other = 16.0 + 11.0
    assert float(gradient_norm(shards, whole, lambda own: own + other)) == pytest.approx((9 + 4 + 1 + other) ** 0.5)
    assert float(gradient_norm([], [], lambda own: own)) == 0


class Named(torch.nn.Module):
    _no_split_modules = ["Linear"]  # noqa: RUF012

    def __init__(self) -> None:
        super().__init__()
        self.layers = torch.nn.ModuleList([torch.nn.Linear(2, 2) for _ in range(2)])
        self.norms = torch.nn.ModuleList([torch.nn.LayerNorm(2) for _ in range(2)])


def test_blocks_are_those_that_a_network_names_or_its_lists_of_equals() -> None:
    network = Named()
    assert blocks_of(network) == list(network.layers)[::-1]
    plain = torch.nn.ModuleDict(
        {"list": torch.nn.ModuleList([torch.nn.ReLU(), torch.nn.ReLU()]), "one": torch.nn.GELU()}
    )
    assert blocks_of(plain) == list(plain["list"])[::-1]  # type: ignore[call-overload]
    assert blocks_of(torch.nn.Linear(2, 2)) == []
