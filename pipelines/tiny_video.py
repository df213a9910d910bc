"""The embedded Wan pipeline before training: real diffusers classes, sized for clips of 5 frames and 24x24 pixels."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from flowrl.pipelines.tiny import t5_tokenizer


def build_wan_embedded(
    words: Iterable[str],
    *,
    text_length: int = 10,
    channels: int = 4,
    text_width: int = 64,
    layers: int = 3,
    seed: int = 0,
) -> Any:
    """A WanPipeline with random weights, reproducible from ``seed``: [channels, F, H / 4, W / 4] latents.

    The autoencoder folds 2x2 pixels into channels first (as Wan 2.2's does), which makes it faster, and leaves time as it is.
    """
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer(list(words), text_length)
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer), d_model=text_width, d_kv=32, d_ff=2 * text_width, num_layers=1, num_heads=2,
                dropout_rate=0.0,
            )
        ).eval()  # fmt: skip
        vae = diffusers.AutoencoderKLWan(
            base_dim=16, z_dim=channels, dim_mult=[1, 3], num_res_blocks=1, temperal_downsample=[False],
            scale_factor_temporal=1, scale_factor_spatial=4, patch_size=2, in_channels=12, out_channels=12,
            latents_mean=[0.0] * channels, latents_std=[1.0] * channels,
        ).eval()  # fmt: skip
        transformer = diffusers.WanTransformer3DModel(
            patch_size=(1, 3, 3), num_attention_heads=2, attention_head_dim=64, in_channels=channels,
            out_channels=channels, text_dim=text_width, freq_dim=64, ffn_dim=256, num_layers=layers,
            cross_attn_norm=True, rope_max_seq_len=32,
        ).eval()  # fmt: skip
    return diffusers.WanPipeline(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=transformer,
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=1.0),
    )  # fmt: skip
