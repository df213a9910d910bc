"""What a critic reads of a state: its latent, or hidden states of the generator as it was before training."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from flowrl.credit.networks import pooled_text, summary
from flowrl.credit.process.learned import taps_of
from flowrl.errors import UserError
from flowrl.protocols import PipelineAdapter
from flowrl.records import Conditioning, Request

Reference = Callable[[], AbstractContextManager[None]]


class View:
    """Turns states into what a critic reads.

    features: names of modules, () for the latent itself; chunk: states a call; request: any of the run's. reads, text: numbers
    (channels, without features) that it gives of a state, and of a text vector. Features are one network call a state, of
    the positive branch alone: no guidance, no decoding, no gradient. Raises UserError for a module that is not there.
    """

    def __init__(
        self,
        adapter: PipelineAdapter,
        features: Sequence[str],
        reference: Reference | None,
        chunk: int,
        request: Request,
    ) -> None:
        if features and reference is None:
            raise UserError("critic.features: reads the pre-trained network, and this trainer was built without it")
        self.adapter, self.features, self.reference, self.chunk = adapter, tuple(features), reference, chunk
        positive, shape = adapter.encode([request]), adapter.latent_shape(request)
        self.reads, self.text = shape[0], pooled_text(positive).shape[1]
        if self.features:
            x, t = (torch.full((1, *size), 0.5, device=adapter.device) for size in (shape, ()))
            try:
                self.reads = self(x, t, positive, torch.zeros(1, dtype=torch.long)).shape[1]
            except ValueError as error:
                raise UserError(f"critic.{error}") from error

    @torch.no_grad()
    def __call__(self, x: Tensor, t: Tensor, positive: Conditioning, row: Tensor) -> Tensor:
        """x: [N, ...]; t: [N]; row: int64 [N], of ``positive``. Returns x, or float32 [N, reads]."""
        if not self.features or self.reference is None:
            return x
        made = [torch.zeros(0, self.reads, device=x.device)] if not len(x) else []
        with self.reference():
            for part in torch.split(torch.arange(len(x)), self.chunk):
                if len(part):
                    latents, times = x[part.to(x.device)], t[part.to(t.device)]
                    taps = taps_of(self.adapter.predict, latents, times, positive[row[part]], self.features)
                    made.append(summary(taps))
        return torch.cat(made)
