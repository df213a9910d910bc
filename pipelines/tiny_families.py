"""Random-weight pipelines of the other families, made offline: small enough for a test, of the same classes as the real ones."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from flowrl.pipelines.tiny import clip_encoder, clip_tokenizer, t5_encoder, t5_tokenizer

LATENT = {"z_dim": 4, "latents_mean": [0.1, -0.2, 0.0, 0.3], "latents_std": [1.5, 0.8, 1.1, 0.9]}


def _picture_vae(shift: float | None = 0.1) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=4, down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4,
        mid_block_add_attention=False, use_quant_conv=False, use_post_quant_conv=False, scaling_factor=0.4,
        shift_factor=shift,
    ).eval()  # fmt: skip


def _clip(words: Iterable[str], length: int, hidden: int = 32) -> tuple[Any, Any]:
    """(tokenizer, text encoder with projection)."""
    tokenizer = clip_tokenizer(words, length)
    return tokenizer, clip_encoder(len(tokenizer), length, hidden, 1, tokenizer.eos_token_id, tokenizer.bos_token_id)


def _text_model(encoder: Any) -> Any:
    """A CLIPTextModel without projection, of the same config: what Flux and SDXL have first."""
    from transformers import CLIPTextModel

    return CLIPTextModel(encoder.config).eval()


def build_flux(
    words: Iterable[str], *, guidance: bool = True, text_length: int = 12, seed: int = 0, kind: str = "FluxPipeline"
) -> Any:
    """A FluxPipeline: [4, H / 2, W / 2] latents, 2 + 2 blocks. guidance: with the scale as an input, as dev has it.

    kind: FluxPipeline, or FluxKontextPipeline to edit pictures.
    """
    import diffusers

    words = list(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, encoder = _clip(words, text_length)
        tokenizer_2 = t5_tokenizer(words, text_length)
        transformer = diffusers.FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, pooled_projection_dim=32, guidance_embeds=guidance, axes_dims_rope=(4, 6, 6),
        ).eval()  # fmt: skip
        parts = {
            "vae": _picture_vae(), "text_encoder": _text_model(encoder), "tokenizer": tokenizer,
            "text_encoder_2": t5_encoder(len(tokenizer_2), 32, 1), "tokenizer_2": tokenizer_2, "transformer": transformer,
        }  # fmt: skip
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=4, max_image_seq_len=64
    )
    return getattr(diffusers, kind)(scheduler=scheduler, **parts)


def _bytes_tokenizer(length: int) -> Any:
    """A byte-level tokenizer with the chat marks of Qwen; every byte is a token, so any text has one encoding."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(marks) + 256, special_tokens=marks, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # fmt: skip
    core.train_from_iterator([], trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token=marks[0], eos_token=marks[0], model_max_length=length, padding_side="right"
    )


def _qwen_encoder(vocab: int) -> Any:
    from transformers import Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration

    config = Qwen2_5_VLConfig(
        text_config={
            "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2,
            "num_key_value_heads": 2, "vocab_size": vocab, "rope_theta": 1e6,
            "rope_scaling": {"type": "mrope", "rope_type": "default", "mrope_section": [2, 3, 3]},
            "bos_token_id": 0, "eos_token_id": 0,
        },
        vision_config={
            "depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
            "fullatt_block_indexes": [0], "patch_size": 14,
        },
        image_token_id=3, video_token_id=4, vision_start_token_id=5, vision_end_token_id=6,
    )  # fmt: skip
    return Qwen2_5_VLForConditionalGeneration(config).eval()


def build_qwen_image(*, seed: int = 0) -> Any:
    """A QwenImagePipeline: latents of 4 channels at 1 / 4 of the picture's sides, two blocks, a byte-level tokenizer."""
    from diffusers import (
        AutoencoderKLQwenImage,
        FlowMatchEulerDiscreteScheduler,
        QwenImagePipeline,
        QwenImageTransformer2DModel,
    )

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = _bytes_tokenizer(1280)
        vae = AutoencoderKLQwenImage(
            base_dim=8, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[False, True], **LATENT
        ).eval()
        transformer = QwenImageTransformer2DModel(
            patch_size=2, in_channels=16, out_channels=4, num_layers=2, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=32, guidance_embeds=False, axes_dims_rope=(4, 6, 6),
        ).eval()  # fmt: skip
        encoder = _qwen_encoder(len(tokenizer))
    scheduler = FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_shift=0.5, max_shift=0.9, base_image_seq_len=4, max_image_seq_len=64,
        shift_terminal=0.02, time_shift_type="exponential",
    )  # fmt: skip
    return QwenImagePipeline(
        scheduler=scheduler, vae=vae, text_encoder=encoder, tokenizer=tokenizer, transformer=transformer
    )


def build_wan(
    words: Iterable[str],
    *,
    experts: int = 1,
    text_length: int = 12,
    heads: int = 2,
    layers: int = 2,
    base_dim: int = 4,
    pictures: bool = False,
    seed: int = 0,
) -> Any:
    """A WanPipeline: latents of 4 channels, 1 / 4 of the frames after the first and 1 / 4 of the sides.

    experts: 1, or 2 with a boundary at 0.875 as in Wan 2.2. pictures: a WanImageToVideoPipeline, which takes a first frame.
    """
    import diffusers
    from transformers import UMT5Config, UMT5EncoderModel

    words = list(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = t5_tokenizer(words, text_length)
        encoder = UMT5EncoderModel(
            UMT5Config(
                vocab_size=len(tokenizer), d_model=32, d_kv=16, d_ff=64, num_layers=1, num_heads=2, dropout_rate=0.0
            )
        ).eval()
        vae = diffusers.AutoencoderKLWan(
            base_dim=base_dim, dim_mult=[1, 1, 1], num_res_blocks=1, temperal_downsample=[True, True],
            scale_factor_temporal=4, scale_factor_spatial=4, **LATENT,
        ).eval()  # fmt: skip
        networks = [
            diffusers.WanTransformer3DModel(
                patch_size=(1, 2, 2), num_attention_heads=heads, attention_head_dim=12, in_channels=4 + 8 * pictures,
                out_channels=4, text_dim=32, freq_dim=32, ffn_dim=24 * heads, num_layers=layers, cross_attn_norm=True,
                rope_max_seq_len=32,
            ).eval()
            for _ in range(experts)
        ]  # fmt: skip
    two = {"transformer_2": networks[1], "boundary_ratio": 0.875} if experts == 2 else {}
    kind = diffusers.WanImageToVideoPipeline if pictures else diffusers.WanPipeline
    clip = {"image_processor": None, "image_encoder": None} if pictures else {}
    return kind(
        tokenizer=tokenizer, text_encoder=encoder, vae=vae, transformer=networks[0],
        scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0), **two, **clip,
    )  # fmt: skip


def build_sdxl(words: Iterable[str], *, text_length: int = 12, seed: int = 0) -> Any:
    """A StableDiffusionXLPipeline: epsilon prediction, Euler's grid, two text encoders of 32 channels each."""
    from diffusers import EulerDiscreteScheduler, StableDiffusionXLPipeline, UNet2DConditionModel

    words = list(words)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, encoder_2 = _clip(words, text_length)
        unet = UNet2DConditionModel(
            sample_size=8, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=64, attention_head_dim=8, norm_num_groups=4, use_linear_projection=True,
            addition_embed_type="text_time", addition_time_embed_dim=8, transformer_layers_per_block=1,
            projection_class_embeddings_input_dim=6 * 8 + 32,
        ).eval()  # fmt: skip
        first, vae = _text_model(encoder_2), _picture_vae(shift=None)
    scheduler = EulerDiscreteScheduler(
        beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", steps_offset=1, timestep_spacing="leading"
    )
    return StableDiffusionXLPipeline(
        vae=vae, text_encoder=first, text_encoder_2=encoder_2, tokenizer=tokenizer, tokenizer_2=tokenizer, unet=unet,
        scheduler=scheduler, force_zeros_for_empty_prompt=True, add_watermarker=False,
    )  # fmt: skip
