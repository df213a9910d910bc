"""Equal numbers of network calls where a call is itself a meeting: whoever has nothing to call keeps the others company.

A network whose weights are gathered block by block can only run in all processes at once, and processes have different
numbers of calls to make. Before every call, backward pass and meeting each process says what it is about to do. What comes
first in the order below is done by all: those that wanted it do their own, the others a call of one sample whose result is
thrown away. So any numbers and any order of calls fit together, and nobody waits for a call that does not come.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import timedelta

import torch
from torch import Tensor

FORWARD, FORWARD_GRAD, BACKWARD, MEETING = range(4)
"""What a process is about to do, in the order in which it is done."""


def plain_backward(loss: Tensor) -> None:
    loss.backward()  # type: ignore[no-untyped-call]


class Turns:
    """Announcements of this process, over a gloo group of its own. example: one network call of one sample, its output.

    calls_meet: whether network calls are meetings, or backward passes alone. run: does a backward pass. served: calls made
    for others; asked: announcements so far.
    """

    def __init__(
        self,
        example: Callable[[], Tensor],
        timeout_s: float,
        calls_meet: bool = True,
        run: Callable[[Tensor], None] = plain_backward,
    ) -> None:
        self.group = torch.distributed.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s))
        self.example, self.calls_meet, self.run = example, calls_meet, run
        self.pending: list[Tensor] = []
        self.serving = False
        self.served = self.asked = 0

    def before_call(self) -> None:
        """Wait until it is the turn of this process's network call; calls made for others announce nothing."""
        if not self.serving:
            self._take(FORWARD_GRAD if torch.is_grad_enabled() else FORWARD)

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()`` in the turn of backward passes, along with the calls that were made for others."""
        self._take(BACKWARD)
        self._pull(loss)

    def meet(self) -> None:
        """Return once no process has a call left before this meeting."""
        if not self.serving:
            self._take(MEETING)

    def _take(self, wanted: int) -> None:
        while (turn := self._agreed(wanted)) != wanted:
            self._serve(turn)

    def _agreed(self, wanted: int) -> int:
        self.asked += 1
        said = torch.tensor(wanted)
        torch.distributed.all_reduce(said, op=torch.distributed.ReduceOp.MIN, group=self.group)
        return int(said)

    def _serve(self, turn: int) -> None:
        self.serving = True
        try:
            if turn == BACKWARD and self.calls_meet:
                self._pull(None)
                return
            self.served += 1
            if turn == BACKWARD:
                with torch.enable_grad():
                    self.pending.append(self.example())
                self._pull(None)
                return
            with torch.set_grad_enabled(turn == FORWARD_GRAD):
                made = self.example()
            if turn == FORWARD_GRAD:
                self.pending.append(made)
        finally:
            self.serving = False

    def _pull(self, loss: Tensor | None) -> None:
        """Backward through ``loss`` and, with weight 0, through the calls made for others."""
        terms = [0.0 * made.sum() for made in self.pending]
        terms += [] if loss is None else [loss]
        self.pending = []
        if not terms:
            raise RuntimeError("a process asks for a backward pass without a network call before it")
        self.run(torch.stack([term.float() for term in terms]).sum())
