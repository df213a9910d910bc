"""Stable Diffusion 3 and 3.5 (and the embedded pipeline): a rectified-flow transformer with three text encoders."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flowrl.pipelines.base import DiffusersAdapter, Geometry
from flowrl.pipelines.texts import Encoded

from flowrl.records import Conditioning, Prediction, Request, Schedule

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
              "attn.to_add_out")  # fmt: skip
_FEED_FORWARD = ("ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2")


class Sd3Adapter(DiffusersAdapter):
    """Velocity prediction on [C, H / f, W / f] latents; t is the sigma of FlowMatchEulerDiscreteScheduler."""

    pipeline_name = "StableDiffusion3Pipeline"
    embedded_name = "embedded_sd3"
    network_name = "transformer"
    target_groups = {"attention": _ATTENTION, "feed_forward": _FEED_FORWARD}  # noqa: RUF012 - typed in the base class

    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    saved_buffers = ("pos_embed.pos_embed",)
    repeated_blocks = ("JointTransformerBlock",)

    @classmethod
    def geometry_of(cls, vae: Mapping[str, Any], network: Mapping[str, Any]) -> Geometry:
        return super().geometry_of(vae, network)._replace(patch=network.get("patch_size", 2))

    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        hidden, pooled = self.encoded(requests, negative)
        return Conditioning({"hidden": hidden, "pooled": pooled})

    @classmethod
    def text_limits(cls, tokenizers: Mapping[str, Any]) -> Mapping[str, int]:
        # The two CLIPs read the beginning of a long prompt where T5 reads it all.
        third = tokenizers.get("tokenizer_3")
        if third is None:
            return {"tokenizer": tokenizers["tokenizer"].model_max_length}
        return {"tokenizer_3": min(256, third.model_max_length)}

    @classmethod
    def text_tokens(cls, lengths: Mapping[str, int]) -> int:
        return lengths.get("tokenizer", 77) + min(256, lengths.get("tokenizer_3", 256))

    def encode_texts(self, texts: list[str]) -> Encoded:
        hidden, _, pooled, _ = self.pipe.encode_prompt(
            texts,
            None,
            None,
            do_classifier_free_guidance=False,
            device=self.device,
            max_sequence_length=self._text_length(),
        )
        return hidden, pooled

    def _text_length(self) -> int:
        # The stock pipeline attends to max_sequence_length T5 tokens even without a T5, so a short tokenizer keeps it short.
        return min(256, self.pipe.tokenizer_3.model_max_length) if self.pipe.tokenizer_3 is not None else 256

    def schedule(self, steps: int, request: Request) -> Schedule:
        from diffusers import FlowMatchEulerDiscreteScheduler
        from diffusers.pipelines.stable_diffusion_3.pipeline_stable_diffusion_3 import calculate_shift

        scheduler = FlowMatchEulerDiscreteScheduler.from_config(self.pipe.scheduler.config)
        config = scheduler.config
        mu = None
        if config.get("use_dynamic_shifting"):
            _, height, width = self.latent_shape(request)
            patch = self.geometry.patch
            mu = calculate_shift(
                (height // patch) * (width // patch),
                config.get("base_image_seq_len", 256), config.get("max_image_seq_len", 4096),
                config.get("base_shift", 0.5), config.get("max_shift", 1.16),
            )  # fmt: skip
        scheduler.set_timesteps(steps, device="cpu", mu=mu)
        sigma = scheduler.sigmas.float()
        return Schedule(t=sigma, alpha=1 - sigma, sigma=sigma)

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, features: Sequence[str] = ()
    ) -> Prediction:
        dtype = self.network.dtype
        with self.precision(), self.tapped(features) as found:
            value = self.network(
                hidden_states=x.to(dtype),
                timestep=t * self.pipe.scheduler.config.num_train_timesteps,
                encoder_hidden_states=conditioning.tensors["hidden"].to(dtype),
                pooled_projections=conditioning.tensors["pooled"].to(dtype),
                return_dict=False,
            )[0]
        return Prediction(value.float(), "velocity", found)
