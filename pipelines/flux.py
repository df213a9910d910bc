"""Flux.1: a rectified-flow transformer over 2 x 2 patches, with guidance embedded in the network (dev) or none (schnell)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flowrl.pipelines.base import DiffusersAdapter
from flowrl.pipelines.packing import image_ids, pack, shifted_schedule, unpack
from flowrl.pipelines.texts import Encoded

from flowrl.records import Conditioning, Prediction, Request, Schedule

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
              "attn.to_add_out")  # fmt: skip
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2", "proj_mlp")
TEXT_LENGTH = 512


class FluxAdapter(DiffusersAdapter):
    """Velocity prediction on [C, H / f, W / f] latents, packed for the network alone.

    A guidance-distilled network (dev) takes the scale as an input, the conditioning tensor "guidance"; one without
    (schnell) is guided by two calls, as any other.
    """

    guidance_rule = "embedded"
    pipeline_name = "FluxPipeline"
    network_name = "transformer"
    target_groups = {"attention": _ATTENTION, "feed_forward": _FEED_FORWARD}  # noqa: RUF012 - typed in the base class
    pixel_multiple = 2
    encoder_names = ("text_encoder", "text_encoder_2")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if not self.network.config.guidance_embeds:  # type: ignore[union-attr]
            self.guidance_rule = "linear"

    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        hidden, pooled = self.encoded(requests, negative)
        return Conditioning({"hidden": hidden, "pooled": pooled})

    @classmethod
    def text_limits(cls, tokenizers: Mapping[str, Any]) -> Mapping[str, int]:
        # CLIP, which gives one vector, reads the beginning of a long prompt where T5 reads it all.
        return {"tokenizer_2": min(TEXT_LENGTH, tokenizers["tokenizer_2"].model_max_length)}

    @classmethod
    def text_tokens(cls, lengths: Mapping[str, int]) -> int:
        return min(TEXT_LENGTH, lengths.get("tokenizer_2", TEXT_LENGTH))

    def encode_texts(self, texts: list[str]) -> Encoded:
        length = min(TEXT_LENGTH, self.pipe.tokenizer_2.model_max_length)
        hidden, pooled, _ = self.pipe.encode_prompt(texts, None, device=self.device, max_sequence_length=length)
        return hidden, pooled

    def schedule(self, steps: int, request: Request) -> Schedule:
        _, height, width = self.latent_shape(request)
        return shifted_schedule(self.pipe.scheduler, steps, (height // 2) * (width // 2))

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, features: Sequence[str] = ()
    ) -> Prediction:
        return self._call(pack(x), image_ids(x), t, x.shape, conditioning, features)

    def _call(
        self, tokens: torch.Tensor, ids: torch.Tensor, t: torch.Tensor, shape: torch.Size, conditioning: Conditioning,
        features: Sequence[str],
    ) -> Prediction:  # fmt: skip
        """One network call; the picture's tokens come first, others (a source picture's) after them."""
        dtype, hidden = self.network.dtype, conditioning.tensors["hidden"]
        guidance = conditioning.tensors.get("guidance")
        with self.precision(), self.tapped(features) as kept:
            value = self.network(
                hidden_states=tokens.to(dtype),
                timestep=t,
                guidance=guidance,
                pooled_projections=conditioning.tensors["pooled"].to(dtype),
                encoder_hidden_states=hidden.to(dtype),
                txt_ids=torch.zeros(hidden.shape[1], 3, device=tokens.device),
                img_ids=ids.to(tokens.device),
                return_dict=False,
            )[0]
        count = (shape[-2] // 2) * (shape[-1] // 2)
        return Prediction(unpack(value[:, :count].float(), shape), "velocity", kept)
