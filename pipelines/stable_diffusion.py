"""Stable Diffusion 1.x and 2.x: a UNet that predicts epsilon or v on a variance-preserving grid."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from flowrl.pipelines.base import DiffusersAdapter
from flowrl.pipelines.texts import Encoded

from flowrl.errors import UserError
from flowrl.records import Conditioning, Prediction, PredictionKind, Request, Schedule

_KINDS: dict[str, PredictionKind] = {"epsilon": "epsilon", "v_prediction": "v", "sample": "x0"}


class StableDiffusionAdapter(DiffusersAdapter):
    """t is the training timestep over the number of training timesteps; alpha and sigma come from the noise schedule."""

    pipeline_name = "StableDiffusionPipeline"
    embedded_name = "embedded_sd15"
    network_name = "unet"
    feature_output = 0  # a block puts out (hidden, what it hands to its opposite block)
    target_groups = {  # noqa: RUF012 - typed in the base class
        "attention": ("to_q", "to_k", "to_v", "to_out.0"),
        "feed_forward": ("ff.net.0.proj", "ff.net.2"),
    }

    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        (hidden,) = self.encoded(requests, negative)
        return Conditioning({"hidden": hidden})

    @classmethod
    def text_limits(cls, tokenizers: Mapping[str, Any]) -> Mapping[str, int]:
        return {"tokenizer": tokenizers["tokenizer"].model_max_length}

    def encode_texts(self, texts: list[str]) -> Encoded:
        hidden, _ = self.pipe.encode_prompt(texts, self.device, 1, False)
        return (hidden,)

    def schedule(self, steps: int, request: Request) -> Schedule:
        from diffusers import DDIMScheduler

        scheduler = DDIMScheduler.from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        total = scheduler.config.num_train_timesteps
        # Only these two end at the first training step's noise; Euler and the others end without noise.
        keeps_noise = type(self.pipe.scheduler).__name__ in ("DDIMScheduler", "PNDMScheduler")
        clean = scheduler.config.set_alpha_to_one or not keeps_noise
        final = 1.0 if clean else scheduler.alphas_cumprod[0].item()
        bars = torch.cat([scheduler.alphas_cumprod[scheduler.timesteps], torch.tensor([final])]).double()
        t = torch.cat([scheduler.timesteps.double() / total, torch.zeros(1, dtype=torch.float64)])
        return Schedule(t=t.float(), alpha=bars.sqrt().float(), sigma=(1 - bars).sqrt().float())

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, features: Sequence[str] = ()
    ) -> Prediction:
        config = self.pipe.scheduler.config
        if config.prediction_type not in _KINDS:
            raise UserError(f"model.path: prediction type {config.prediction_type!r} is not one of {', '.join(_KINDS)}")
        dtype = self.network.dtype
        with self.precision(), self.tapped(features) as found:
            value = self.network(
                x.to(dtype), (t * config.num_train_timesteps).round().long(), conditioning.tensors["hidden"].to(dtype),
                return_dict=False, **self.extra_inputs(conditioning, dtype),
            )[0]  # fmt: skip
        return Prediction(value.float(), _KINDS[config.prediction_type], found)

    def extra_inputs(self, conditioning: Conditioning, dtype: torch.dtype) -> dict[str, object]:
        """What the network takes beside picture, time and text."""
        return {}
