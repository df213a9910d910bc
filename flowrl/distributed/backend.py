"""What training asks of other processes: who am I, gather rows, add up numbers and gradients.

A single process imports no distributed package. Under torchrun (WORLD_SIZE > 1) accelerate sets the processes up.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl.distributed.launch import STAGES, processes_of, require
from flowrl.errors import UserError

if TYPE_CHECKING:
    from flowrl.distributed.sharding import Gather
    from flowrl.distributed.split import Split, Steps

BUCKET = 1 << 24
"""Elements of gradients that one collective adds up, at least, where there are more: 64 MB in float32."""

CHECK_EVERY = 10
"""Iterations between two checks of the weights that are gathered from shards; each gathers the whole network once."""


class Backend:
    """This process among ``world`` ones; every method is the identity when it is alone.

    processes: how many there must be (``distributed.processes``), None: as many as the launcher started. timeout_s: how
    long to wait for the others. sharding: ``distributed.sharding``, which a launcher may have been told too. collectives:
    how often this process has met the others so far. Raises UserError where the launcher did not start what it was asked
    for.
    """

    def __init__(self, processes: int | None = None, timeout_s: float = 1800.0, sharding: str = "none") -> None:
        self.world = processes_of(os.environ, processes, sharding)
        require(sharding)
        self.rank = self.collectives = 0
        self.timeout_s = timeout_s
        self.sharded: Split | None = None
        on_cpu = not torch.cuda.is_available() or os.environ.get("ACCELERATE_USE_CPU", "").lower() == "true"
        if self.world == 1:
            self.device = torch.device("cpu" if on_cpu else "cuda")
            return
        here = os.environ.get("LOCAL_WORLD_SIZE", "")
        if not on_cpu and here.isdecimal() and int(here) > torch.cuda.device_count():
            raise UserError(
                f"{here} processes were started on a machine with {torch.cuda.device_count()} GPUs; start one for each GPU"
            )
        if sharding in STAGES:
            from flowrl.distributed.zero import prepare

            prepare("cpu" if on_cpu else "cuda")
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
        """This process's part of ``count`` groups, of which some processes may have one more than others.

        A contiguous part for one update an iteration. For more, every ``world``-th group, so that each update (a contiguous
        part of all groups, whatever the number of processes) has a part of each process's. ValueError where there are fewer
        groups than processes.
        """
        if count < self.world:
            raise ValueError(f"batch.groups: {count} groups cannot be dealt to {self.world} processes")
        if updates > 1:
            return range(self.rank, count, self.world)
        return range(self.rank * count // self.world, (self.rank + 1) * count // self.world)

    def stack(self, row: Tensor) -> Tensor:
        """All processes' tensors of one shape, in rank order, in one collective: [world, ...]."""
        if self.world == 1:
            return row[None]
        self._meet()
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
        costs one collective where there are not many; those of shards, one collective a block.
        """
        if self.world == 1:
            return
        shards, whole = self._sorted(parameters)
        if self.sharded is not None and shards:
            self._meet()
            self.collectives += self.sharded.add_gradients()
        for bucket in _buckets(whole):
            gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in bucket]
            flat = torch.cat([gradient.flatten() for gradient in gradients])
            summed = torch.split(self._reduced(flat, torch.distributed.ReduceOp.SUM), [p.numel() for p in bucket])
            for parameter, part in zip(bucket, summed, strict=True):
                parameter.grad = part.reshape(parameter.shape).clone()

    def clip_gradients(self, parameters: Sequence[torch.nn.Parameter], limit: float) -> float:
        """Scale gradients down to a norm of at most ``limit`` over all parameters, shards included; returns the norm before."""
        if self.sharded is None:
            return float(torch.nn.utils.clip_grad_norm_(parameters, limit))
        from flowrl.distributed.sharding import gradient_norm

        shards = self.sharded.gradients()
        whole = [p.grad for p in self._sorted(parameters)[1] if p.grad is not None]
        norm = float(gradient_norm(shards, whole, self.total))
        if shards or whole:
            torch._foreach_mul_([*shards, *whole], min(1.0, limit / (norm + 1e-6)))
        return norm

    def _sorted(
        self, parameters: Sequence[torch.nn.Parameter]
    ) -> tuple[list[torch.nn.Parameter], list[torch.nn.Parameter]]:
        """(shards, what every process has a whole copy of)."""
        own = {id(p) for p in parameters if self.sharded is not None and self.sharded.owns(p)}
        return [p for p in parameters if id(p) in own], [p for p in parameters if id(p) not in own]

    # -- a network in shards ---------------------------------------------------------------------------------------

    def shard(
        self, network: torch.nn.Module, sharding: str, gather: Gather, example: Callable[[], Tensor],
        optimizer: Callable[[Sequence[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:  # fmt: skip
        """Split a network over the processes, where there are several.

        example: one call of it on one sample, with its output. optimizer: makes one, for those who want to own it. See
        `flowrl.distributed.sharding` and `flowrl.distributed.zero`.
        """
        if self.world == 1:
            return
        if sharding in STAGES:
            from flowrl.distributed.zero import split

            stage = STAGES.index(sharding) + 1
            self.sharded = split(network, stage, self.device, self.timeout_s, example, optimizer)
            return
        from flowrl.distributed.sharding import Sharded, check_torch

        check_torch()
        self.sharded = Sharded(network, self.rank, self.world, self.device, gather, self.timeout_s, example)

    def optimizer(self, make: Callable[[], Steps]) -> Steps:
        """The optimizer of the trained weights: the split network's own, or a new one."""
        own = None if self.sharded is None else self.sharded.optimizer
        return make() if own is None else own

    @property
    def can_go_back(self) -> bool:
        """Whether a process may leave a network call halfway: not where a call is itself a meeting."""
        return self.sharded is None or self.sharded.can_go_back

    def updating(self) -> AbstractContextManager[None]:
        """The part of an iteration that changes weights."""
        return nullcontext() if self.sharded is None else self.sharded.updating()

    def exporting(self) -> AbstractContextManager[None]:
        """Within the block the first process's trained weights are whole; all processes enter it."""
        return nullcontext() if self.sharded is None else self.sharded.exporting(self.leads)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()`` for a loss of the trained network; processes may call it in unequal numbers."""
        if self.sharded is None:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.sharded.backward(loss)

    def check_shards(self, iteration: int) -> None:
        """Every CHECK_EVERY iterations, compare the weights that the processes gather from their shards."""
        if self.sharded is not None and (iteration + 1) % CHECK_EVERY == 0:
            self.collectives += 1
            self.sharded.check()

    def _meet(self) -> None:
        if self.sharded is not None:
            self.sharded.meet()

    def _reduced(self, values: Tensor, how: torch.distributed.ReduceOp.RedOpType) -> Tensor:
        self._meet()
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
