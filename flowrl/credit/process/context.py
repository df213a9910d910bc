"""What a process reward may use of the run that it serves."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from flowrl.protocols import PipelineAdapter
from flowrl.records import Prediction, Prompted, Request, Schedule

Outcome = Callable[[Tensor, Sequence[Request]], tuple[Tensor, Tensor]]
"""(x0 [N, ...], what each was asked for) -> (scores float32 [N], valid bool [N]): decodes and scores."""


@dataclass(frozen=True)
class ProcessContext:
    """adapter and its schedule (on the adapter's device); predict: the policy's guided prediction of each latent at its own
    step, (x, step int64 [B], prompted); reference: a context manager within which the network is as it was before
    training; outcome: (reward's name, its arguments) -> how it scores finished latents, "" for the run's own score.
    """

    adapter: PipelineAdapter
    schedule: Schedule
    predict: Callable[[Tensor, Tensor, Prompted], Prediction]
    reference: Callable[[], AbstractContextManager[None]]
    outcome: Callable[[str, Mapping[str, Any]], Outcome]


@runtime_checkable
class NeedsContext(Protocol):
    """A process reward that is told of the run before its first score."""

    def bind(self, context: ProcessContext) -> None: ...
