"""What training asks of other processes: who am I, gather rows, add up numbers and gradients.

A single process imports no distributed package. Under torchrun (WORLD_SIZE > 1) accelerate sets the processes up.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from datetime import timedelta

import torch
from torch import Tensor

from flowrl.distributed.launch import processes_of
from flowrl.errors import UserError

BUCKET = 1 << 24
"""Elements of gradients that one collective adds up, at least, where there are more: 64 MB in float32."""


class Backend:
    """This process among ``world`` ones; every method is the identity when it is alone.

    processes: how many there must be (``distributed.processes``), None: as many as the launcher started. timeout_s: how
    long to wait for the others. collectives: how often this process has met the others so far. Raises UserError where the
    launcher did not start what it was asked for.
    """

    def __init__(self, processes: int | None = None, timeout_s: float = 1800.0) -> None:
        self.world = processes_of(os.environ, processes)
        self.rank = self.collectives = 0
        on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if self.world == 1:
            self.device = torch.device("cpu" if on_cpu else "cuda")
            return
        here = os.environ.get("LOCAL_WORLD_SIZE", "")
        if not on_cpu and here.isdecimal() and int(here) > torch.cuda.device_count():
            raise UserError(
                f"{here} processes were started on a machine with {torch.cuda.device_count()} GPUs; start one for each GPU"
            )
        from accelerate import PartialState

        state = PartialState(cpu=on_cpu, timeout=timedelta(seconds=timeout_s))
        if state.num_processes != self.world:
            raise UserError(
                f"WORLD_SIZE is {self.world} in the environment, and {state.num_processes} processes found each other; start "
                "the run with torchrun"
            )
        self.rank, self.device = state.process_index, torch.device(state.device)

    @property
    def leads(self) -> bool:
        """Whether this process writes files and prints."""
        return self.rank == 0

    def describe(self) -> str:
        """How many processes there really are, in words."""
        if self.world == 1:
            return f"1 process on {self.device.type}"
        return f"{self.world} processes on {self.device.type} ({torch.distributed.get_backend()})"

    def share(self, count: int, updates: int = 1) -> range:
        """This process's part of ``count`` groups; ValueError where they do not divide evenly.

        A contiguous part for one update an iteration. For more, every ``world``-th group, so that each update (a contiguous
        part of all groups, whatever the number of processes) has a part of each process's.
        """
        if count % self.world:
            raise ValueError(f"batch.groups: {count} groups cannot be dealt evenly to {self.world} processes")
        if updates > 1:
            return range(self.rank, count, self.world)
        part = count // self.world
        return range(self.rank * part, (self.rank + 1) * part)

    def stack(self, row: Tensor) -> Tensor:
        """All processes' tensors of one shape, in rank order, in one collective: [world, ...]."""
        if self.world == 1:
            return row[None]
        own = row.to(self.device).contiguous()
        parts = [torch.empty_like(own) for _ in range(self.world)]
        self.collectives += 1
        torch.distributed.all_gather(parts, own)
        return torch.stack(parts).to(row.device)

    def parts(self, rows: Tensor) -> list[Tensor]:
        """Every process's rows, in rank order, however many each has, on the device of ``rows``."""
        if self.world == 1:
            return [rows]
        counts = self.counts(len(rows))
        padded = torch.zeros(max(counts), *rows.shape[1:], dtype=rows.dtype, device=self.device)
        padded[: len(rows)] = rows.to(self.device)
        return [part[:count].to(rows.device) for part, count in zip(self.stack(padded), counts, strict=True)]

    def gather(self, rows: Tensor) -> Tensor:
        """All processes' rows, in rank order, however many each has. Returns rows on their own device."""
        return rows if self.world == 1 else torch.cat(self.parts(rows))

    def counts(self, number: int) -> list[int]:
        """Every process's number, in rank order."""
        return [number] if self.world == 1 else self.stack(torch.tensor(number)).tolist()

    def mine(self, number: int) -> slice:
        """Where this process's ``number`` rows lie among gathered ones."""
        start = sum(self.counts(number)[: self.rank])
        return slice(start, start + number)

    def names(self, names: Iterable[str]) -> list[str]:
        """The names that any process has, in the order of the first process that has them."""
        own = list(dict.fromkeys(names))
        if self.world == 1:
            return own
        written = torch.tensor(list("\n".join(own).encode()), dtype=torch.uint8)
        found = [bytes(part.tolist()).decode().split("\n") for part in self.parts(written)]
        return list(dict.fromkeys(name for part in found for name in part if name))

    def total(self, values: Tensor) -> Tensor:
        """The sum over processes."""
        return values if self.world == 1 else self._reduced(values, torch.distributed.ReduceOp.SUM)

    def largest(self, number: int) -> int:
        """The largest of all processes' numbers."""
        return number if self.world == 1 else int(self._reduced(torch.tensor(number), torch.distributed.ReduceOp.MAX))

    def add_gradients(self, parameters: Sequence[torch.nn.Parameter]) -> None:
        """Sum the gradients over processes, in place; losses carry the global normalisation already.

        A parameter without a gradient counts as 0. Gradients travel together, in buckets of one dtype, so that an update
        costs one collective where there are not many.
        """
        if self.world == 1:
            return
        for bucket in _buckets(parameters):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            summed = torch.split(self._reduced(flat, torch.distributed.ReduceOp.SUM), [p.numel() for p in bucket])
            for parameter, part in zip(bucket, summed, strict=True):
                parameter.grad = part.reshape(parameter.shape).clone()

    def _reduced(self, values: Tensor, how: torch.distributed.ReduceOp.RedOpType) -> Tensor:
        made = values.to(self.device).clone()
        self.collectives += 1
        torch.distributed.all_reduce(made, op=how)
        return made.to(values.device)

    def close(self) -> None:
        if self.world > 1 and torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()


def _buckets(parameters: Sequence[torch.nn.Parameter]) -> Iterator[list[torch.nn.Parameter]]:
    """Parameters in their order, cut where the dtype changes and where there are BUCKET elements; the same on all processes."""
    held: list[torch.nn.Parameter] = []
    size = 0
    for parameter in parameters:
        if held and (size >= BUCKET or parameter.dtype != held[0].dtype):
            yield held
            held, size = [], 0
        held.append(parameter)
        size += parameter.numel()
    if held:
        yield held
