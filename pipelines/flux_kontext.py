"""Flux.1 Kontext: edits a picture, whose tokens stand behind those of the one that is made."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from flowrl.pipelines.base import source_pictures
from flowrl.pipelines.flux import FluxAdapter
from flowrl.pipelines.packing import image_ids, pack

from flowrl.records import Conditioning, Prediction, Request


class FluxKontextAdapter(FluxAdapter):
    """As Flux, with the source picture of each row (metadata "image") encoded into the conditioning, [B, C, H, W]."""

    pipeline_name = "FluxKontextPipeline"

    @torch.no_grad()
    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        text = super().encode(requests, negative)
        source = self.encode_media(source_pictures(requests).to(self.device), requests[0])
        return Conditioning({**text.tensors, "source": source})

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, features: Sequence[str] = ()
    ) -> Prediction:
        source = conditioning.tensors["source"]
        tokens = torch.cat([pack(x), pack(source).to(x)], 1)
        ids = torch.cat([image_ids(x), image_ids(source, image=1)])
        return self._call(tokens, ids, t, x.shape, conditioning, features)
