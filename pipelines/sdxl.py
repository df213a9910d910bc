"""Stable Diffusion XL: a UNet with two text encoders, told the size of the picture it is to make."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flowrl.pipelines.stable_diffusion import StableDiffusionAdapter
from flowrl.pipelines.texts import Encoded

from flowrl.records import Conditioning, Request


class StableDiffusionXLAdapter(StableDiffusionAdapter):
    """As Stable Diffusion 1.x, with pooled text and the size (original, no crop, target) as further conditioning."""

    pipeline_name = "StableDiffusionXLPipeline"
    encoder_names = ("text_encoder", "text_encoder_2")

    @torch.no_grad()
    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        hidden, pooled = self.encoded(requests, negative)
        if negative and self.pipe.config.force_zeros_for_empty_prompt:
            # The stock pipeline guides away from zeros, not from the encoding of an empty prompt.
            empty = torch.tensor([not r.negative for r in requests], device=hidden.device)
            hidden = torch.where(empty[:, None, None], 0.0, hidden)
            pooled = torch.where(empty[:, None], 0.0, pooled)
        sizes = [[r.height, r.width, 0, 0, r.height, r.width] for r in requests]
        return Conditioning({"hidden": hidden, "pooled": pooled, "sizes": torch.tensor(sizes, device=hidden.device)})

    @classmethod
    def text_limits(cls, tokenizers: Mapping[str, Any]) -> Mapping[str, int]:
        return {name: tokenizers[name].model_max_length for name in ("tokenizer", "tokenizer_2")}

    def encode_texts(self, texts: list[str]) -> Encoded:
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            texts, device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return hidden, pooled

    def extra_inputs(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, object]:
        given = conditioning.tensors
        return {"added_cond_kwargs": {"text_embeds": given["pooled"].to(dtype), "time_ids": given["sizes"].to(dtype)}}
