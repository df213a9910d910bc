"""The two families that scripts/pretrain_embedded.py trains: how each is built, conditioned, trained and sampled."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.nn.functional as F
from diffusers import DDIMScheduler, StableDiffusion3Pipeline, StableDiffusionPipeline, UNet2DConditionModel
from flowrl.pipelines.tiny import build_sd3

from flowrl.worlds.v1 import scenes

TEXT_LENGTH = 13
Condition = tuple[torch.Tensor, ...]


class Family(Protocol):
    """What the training loop asks of a family. ``network`` and ``modules`` name parts of the pipeline."""

    pipeline_class: Any
    network: str
    modules: tuple[str, ...]
    tag_weight: dict[str, float]

    def build(self, args: argparse.Namespace) -> Any: ...

    def embed(self, pipe: Any, texts: list[str]) -> Condition: ...

    def loss(self, pipe: Any, x0: torch.Tensor, condition: Condition, generator: torch.Generator) -> torch.Tensor: ...

    def sample(
        self, pipe: Any, x: torch.Tensor, condition: Condition, empty: Condition, guidance: float, steps: int
    ) -> torch.Tensor: ...


def vocabulary() -> set[str]:
    return {
        word
        for split in ("train", "held_out")
        for pool in scenes.prompts(split).values()
        for p in pool
        for word in p.text.split()
    }


def guided(predict: Any, condition: Condition, empty: Condition, guidance: float) -> torch.Tensor:
    value = predict(*condition)
    if guidance == 1.0:
        return value
    other = predict(*(part.expand_as(whole) for part, whole in zip(empty, condition, strict=True)))
    return other + guidance * (value - other)


class RectifiedFlow:
    """The Stable Diffusion 3 pipeline: transformer and three text encoders, from random weights."""

    pipeline_class = StableDiffusion3Pipeline
    network = "transformer"
    modules = ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    tag_weight = scenes.TAG_WEIGHT

    def build(self, args: argparse.Namespace) -> Any:
        return build_sd3(vocabulary(), size=scenes.SIZE, text_length=TEXT_LENGTH, seed=args.seed)

    def embed(self, pipe: Any, texts: list[str]) -> Condition:
        hidden, _, pooled, _ = pipe.encode_prompt(
            texts,
            None,
            None,
            do_classifier_free_guidance=False,
            max_sequence_length=TEXT_LENGTH,
            device=torch.device("cpu"),
        )
        return hidden, pooled

    def loss(self, pipe: Any, x0: torch.Tensor, condition: Condition, generator: torch.Generator) -> torch.Tensor:
        x1 = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(len(x0), generator=generator))
        x = torch.lerp(x0, x1, t[:, None, None, None])
        return F.mse_loss(pipe.transformer(x, *condition, t * 1000, return_dict=False)[0], x1 - x0)

    def sample(
        self, pipe: Any, x: torch.Tensor, condition: Condition, empty: Condition, guidance: float, steps: int
    ) -> torch.Tensor:
        for i in range(steps):
            t, s = 1 - i / steps, 1 - (i + 1) / steps
            at, now = torch.full((len(x),), t * 1000), x
            v = guided(
                lambda *c, now=now, at=at: pipe.transformer(now, *c, at, return_dict=False)[0],
                condition, empty, guidance,
            )  # fmt: skip
            x = x + (s - t) * v
        return x


class Epsilon:
    """The Stable Diffusion 1.x pipeline: a UNet that predicts the noise on the stock variance-preserving grid.

    Autoencoder, tokenizer and the first weights of the text encoder are those of another embedded pipeline.
    """

    pipeline_class = StableDiffusionPipeline
    network = "unet"
    modules = ("unet", "text_encoder")
    # More of the simple sentences than the world's own weights give: few samples fit into the time.
    tag_weight = {  # noqa: RUF012 - read only
        "single_object": 0.08,
        "colors": 0.27,
        "counting": 0.25,
        "two_object": 0.15,
        "color_attr": 0.15,
        "position": 0.10,
    }

    def build(self, args: argparse.Namespace) -> Any:
        from transformers import CLIPTextModel

        folder = Path(args.parts_from)
        parts = StableDiffusion3Pipeline.from_pretrained(folder, torch_dtype=torch.float32)
        text_encoder = CLIPTextModel.from_pretrained(folder, subfolder="text_encoder", dtype=torch.float32).eval()
        # The stock pipeline knows no shift; without it the latents' mean is about -0.1 of their deviation.
        parts.vae.register_to_config(shift_factor=None)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(args.seed)
            unet = UNet2DConditionModel(
                sample_size=scenes.SIZE // 4, in_channels=4, out_channels=4, layers_per_block=1,
                block_out_channels=(32, 64), down_block_types=("CrossAttnDownBlock2D",) * 2,
                up_block_types=("CrossAttnUpBlock2D",) * 2, norm_num_groups=8,
                cross_attention_dim=text_encoder.config.hidden_size, attention_head_dim=2,
            ).eval().to(memory_format=torch.channels_last)  # fmt: skip
        return StableDiffusionPipeline(
            vae=parts.vae, text_encoder=text_encoder, tokenizer=parts.tokenizer, unet=unet,
            scheduler=DDIMScheduler(
                num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                clip_sample=False, set_alpha_to_one=False, steps_offset=1,
            ),
            safety_checker=None, feature_extractor=None, requires_safety_checker=False,
        )  # fmt: skip

    def embed(self, pipe: Any, texts: list[str]) -> Condition:
        return (pipe.encode_prompt(texts, torch.device("cpu"), 1, False)[0],)

    def loss(self, pipe: Any, x0: torch.Tensor, condition: Condition, generator: torch.Generator) -> torch.Tensor:
        """Squared error of the noise at timesteps whose share of noise u = sigma / (alpha + sigma) is logit-normal.

        The weight 1 / (1 - u)^2 makes it the squared error of the velocity x1 - x0 of the same point; it is capped,
        since at the noisy end it would leave nothing to the rest. Layout is decided there, and plain weights learn it
        late.
        """
        alphas = pipe.scheduler.alphas_cumprod
        noise_share = (1 - alphas).sqrt() / (alphas.sqrt() + (1 - alphas).sqrt())
        x1 = torch.randn(x0.shape, generator=generator)
        wanted = torch.sigmoid(torch.randn(len(x0), generator=generator))
        t = torch.searchsorted(noise_share, wanted).clamp(max=len(alphas) - 1)
        weight = (1 / (1 - noise_share[t]) ** 2).clamp(max=25.0) / 8
        x = alphas[t].sqrt()[:, None, None, None] * x0 + (1 - alphas[t]).sqrt()[:, None, None, None] * x1
        x = x.contiguous(memory_format=torch.channels_last)
        error = (pipe.unet(x, t, *condition, return_dict=False)[0] - x1).square().mean((1, 2, 3))
        return (weight * error).mean()

    def sample(
        self, pipe: Any, x: torch.Tensor, condition: Condition, empty: Condition, guidance: float, steps: int
    ) -> torch.Tensor:
        scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        scheduler.set_timesteps(steps)
        for t in scheduler.timesteps:
            now = x
            noise = guided(
                lambda *c, now=now, t=t: pipe.unet(now, t, *c, return_dict=False)[0], condition, empty, guidance
            )
            x = scheduler.step(noise, t, x).prev_sample
        return x


FAMILIES: dict[str, Family] = {"sd3": RectifiedFlow(), "stable_diffusion": Epsilon()}
