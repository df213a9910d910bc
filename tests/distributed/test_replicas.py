"""Copies of the weights that come apart stop the run, which names the process and the parameter."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowrl.distributed import checksums, replicas
from flowrl.distributed.backend import Backend
from flowrl.distributed.checksums import ReplicaMismatch, checksum
from flowrl.distributed.replicas import check_models
from tests.distributed.processes import run
from tests.distributed.toys import config_of, trainer_of


def test_a_checksum_is_that_of_the_formula(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(3, 5, generator=torch.Generator().manual_seed(0))
    factor = 2 * checksums._ODD
    bits = x.view(torch.int32).flatten().tolist()
    expected = sum(b * (i * factor + 1) for i, b in enumerate(bits)) % 2**64
    assert int(checksum(x)) % 2**64 == expected
    monkeypatch.setattr(checksums, "CHUNK", 4)
    assert int(checksum(x)) % 2**64 == expected


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.bool])
def test_a_checksum_sees_every_bit_and_every_place(dtype: torch.dtype) -> None:
    x = (torch.arange(-8, 8) > 2).to(dtype) * 3
    for place in range(len(x)):
        other = x.clone()
        bits = other.view({1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[x.element_size()])
        bits[place] ^= 1
        assert int(checksum(other)) != int(checksum(x))
    swapped = x.clone()
    swapped[0], swapped[-1] = x[-1], x[0]
    assert int(checksum(swapped)) != int(checksum(x))
    assert int(checksum(x)) == int(checksum(x.clone()))
    assert int(checksum(torch.zeros(0, dtype=dtype))) == 0


def break_one(rank: int, average: bool) -> tuple[int, str, int]:
    """Train; after the first iteration one process's weight changes by its last bit. When it ended, and why."""
    trainer = trainer_of(config_of(**{"ema.decay": 0.5}))
    broken = trainer.weights.shadow if average else trainer.weights.parameters
    done = 0
    try:
        for _ in range(3):
            trainer.iterate()
            done += 1
            if trainer.backend.rank == rank:
                with torch.no_grad():
                    broken[0].view(torch.int32)[1] ^= 1
    except ReplicaMismatch as error:
        return done, str(error), trainer.iteration
    return done, "", trainer.iteration


@pytest.mark.parametrize(("world", "rank", "average"), [(2, 1, False), (2, 1, True), (4, 2, False)])
def test_a_copy_that_differs_in_one_bit_stops_all_processes(world: int, rank: int, average: bool) -> None:
    found = run(world, break_one, rank, average)
    name = "average of delta" if average else "delta"
    for done, error, iteration in found:
        assert (done, iteration) == (1, 1)  # the iteration that ended with torn copies does not count, nor is it saved
        assert f"process {rank} of {world} holds other values of {name} than the rest" in error


def different_models(kind: str) -> str:
    backend = Backend()
    named: dict[str, Any] = {"a": torch.ones(3), "b": torch.ones(2, 2)}
    if backend.rank == 1 and kind == "values":
        named["b"][1, 1] = 2
    if backend.rank == 1 and kind == "shapes":
        named["b"] = torch.ones(4)
    if backend.rank == 1 and kind == "names":
        named = {"a": named["a"]}
    try:
        check_models(named, backend)
    except ReplicaMismatch as error:
        return str(error)
    return ""


def all_kinds() -> list[str]:
    return [different_models(kind) for kind in ("values", "shapes", "names", "same")]


def test_processes_that_loaded_different_models_do_not_start() -> None:
    for values, shapes, names, same in run(2, all_kinds):
        assert "process 1 of 2 holds other values of b" in values
        assert "has loaded a model with other parameters" in shapes and shapes == names
        assert not same


def test_one_process_compares_nothing() -> None:
    backend = Backend()
    check_models({"a": torch.ones(1)}, backend)
    replicas.check_replicas({"a": torch.ones(1)}, backend)
    assert backend.collectives == 0
