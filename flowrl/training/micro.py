"""How many samples one network call takes, and what happens when they do not fit."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TypeVar

import torch

from flowrl.distributed.backend import Backend
from flowrl.errors import UserError

logger = logging.getLogger(__name__)
Result = TypeVar("Result")


class MicroBatch:
    """The micro-batch in force: ``batch.micro_batch``, halved each time that a process has run out of memory.

    Processes decide together, so that all have the same size. Noise is keyed and gradients are sums, so what is done again
    gives what the smaller size would have given at once.
    """

    def __init__(self, size: int, backend: Backend) -> None:
        self.size, self.backend = size, backend

    def attempt(self, what: str, work: Callable[[], Result], ready: Callable[[], object] = lambda: None) -> Result:
        """Do ``work`` at the size in force, again and again until no process runs out of memory in it.

        ready: called before each try, outside of what is guarded. ``work`` must not meet other processes. Raises UserError
        where a single sample does not fit.
        """
        while True:
            ready()
            made: list[Result] = []
            out = ""
            try:
                made.append(work())
            except torch.OutOfMemoryError as error:
                out = str(error)
            # Outside of the handler, which holds on to the tensors of the frames that failed.
            if not self.backend.can_go_back:
                if out:
                    raise UserError(
                        f"out of memory in {what}, at {self.size} samples a call; with blocks gathered one by one the other "
                        f"processes cannot go back. {self._advice()} ({out})"
                    )
                return made[0]
            if not self.backend.largest(int(bool(out))):
                return made[0]
            made.clear()
            self._halve(what, out)

    def _halve(self, what: str, out: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        reason = f" ({out})" if out else ", in another process"
        if self.size == 1:
            raise UserError(f"out of memory in {what}, with one sample a call{reason}. {self._advice()}")
        smaller = max(1, self.size // 2)
        if self.backend.leads:
            logger.warning(
                "out of memory in %s at %d samples a call%s; going on with %d. Set batch.micro_batch=%d to start there",
                what, self.size, reason, smaller, smaller,
            )  # fmt: skip
        self.size = smaller

    def _advice(self) -> str:
        smaller = [f"batch.micro_batch={self.size // 2}"] if self.size > 1 else []
        ways = [
            *smaller, "model.activation_checkpointing=true", "model.dtype=bf16", "model.train=lora",
            "a smaller picture", "distributed.sharding=fsdp2 on several GPUs",
        ]  # fmt: skip
        return "Use " + ", ".join(ways[:-1]) + f" or {ways[-1]}."
