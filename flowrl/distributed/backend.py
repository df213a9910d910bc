"""What training asks of other processes: who am I, gather rows, add up numbers and gradients.

A single process imports no distributed package. Under torchrun (WORLD_SIZE > 1) accelerate sets the processes up.
"""

from __future__ import annotations

import os
from collections.abc import Sequence

import torch
from torch import Tensor


class Backend:
    """This process among ``world`` ones; every method is the identity when it is alone."""

    def __init__(self) -> None:
        self.world = int(os.environ.get("WORLD_SIZE", "1"))
        self.rank = 0
        if self.world > 1:
            from accelerate import PartialState

            state = PartialState(cpu=not torch.cuda.is_available())
            self.rank, self.world = state.process_index, state.num_processes
            self.device = torch.device(state.device)
        else:
            self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def share(self, count: int) -> range:
        """This process's contiguous part of ``count`` groups; ValueError where they do not divide evenly."""
        if count % self.world:
            raise ValueError(f"batch.groups: {count} groups cannot be dealt evenly to {self.world} processes")
        part = count // self.world
        return range(self.rank * part, (self.rank + 1) * part)

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' rows, in rank order, however many each has. Returns rows on their own device."""
        if self.world == 1:
            return rows
        counts = self.counts(len(rows))
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        parts = [torch.empty_like(padded) for _ in range(self.world)]
        torch.distributed.all_gather(parts, padded)
        return torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]).to(rows.device)

    def counts(self, number: int) -> list[int]:
        """Every process's number, in rank order."""
        if self.world == 1:
            return [number]
        parts = [torch.zeros(1, dtype=torch.int64, device=self.device) for _ in range(self.world)]
        torch.distributed.all_gather(parts, torch.tensor([number], device=self.device))
        return [int(part) for part in parts]

    def mine(self, number: int) -> slice:
        """Where this process's ``number`` rows lie among gathered ones."""
        start = sum(self.counts(number)[: self.rank])
        return slice(start, start + number)

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        if self.world == 1:
            return values
        summed = values.to(self.device).clone()
        torch.distributed.all_reduce(summed)
        return summed.to(values.device)

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        if self.world == 1:
            return number
        found = torch.tensor(number, device=self.device)
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX)
        return int(found)

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over processes, in place; losses carry the global normalisation already."""
        if self.world == 1:
            return
        for parameter in parameters:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            torch.distributed.all_reduce(parameter.grad)

    def close(self) -> None:
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
