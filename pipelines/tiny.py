"""Builders of small pipelines of real diffusers classes, made offline: the embedded SD3 and random-weight test pipelines.

Nothing is downloaded: tokenizers are made from a word list, encoders from their configs.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch


def clip_tokenizer(words: Iterable[str], length: int) -> Any:
    """A CLIPTokenizer (byte pairs) that knows each of ``words`` as one token; other text falls apart into letters."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers
    from transformers import CLIPTokenizer

    bpe = Tokenizer(models.BPE(unk_token="<|endoftext|>", end_of_word_suffix="</w>"))  # noqa: S106
    bpe.pre_tokenizer = pre_tokenizers.Whitespace()
    specials = ["<|startoftext|>", "<|endoftext|>"]
    letters = list("abcdefghijklmnopqrstuvwxyz")
    trainer = trainers.BpeTrainer(
        vocab_size=4096,
        special_tokens=specials,
        initial_alphabet=letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(sorted(words), trainer)
    import json

    model = json.loads(bpe.to_str())["model"]
    merges = [tuple(m) if isinstance(m, list) else tuple(m.split(" ")) for m in model["merges"]]
    vocab = dict(model["vocab"])
    for letter in letters:
        vocab.setdefault(letter, len(vocab))
        vocab.setdefault(letter + "</w>", len(vocab))
    return CLIPTokenizer(vocab=vocab, merges=merges, model_max_length=length)


def t5_tokenizer(words: Iterable[str], length: int) -> Any:
    """A T5 Unigram tokenizer that knows each of ``words`` as one piece."""
    from transformers import T5TokenizerFast

    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -100.0), ("▁", -20.0)]
    pieces += [("▁" + word, -3.0) for word in sorted(words)]
    pieces += [(letter, -12.0) for letter in "abcdefghijklmnopqrstuvwxyz"]
    return T5TokenizerFast(vocab=pieces, extra_ids=0, model_max_length=length)


def clip_encoder(vocab: int, length: int, hidden: int, layers: int, eos: int, bos: int) -> Any:
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=vocab, hidden_size=hidden, intermediate_size=2 * hidden, projection_dim=hidden,
        num_hidden_layers=layers, num_attention_heads=max(1, hidden // 32), max_position_embeddings=length,
        bos_token_id=bos, eos_token_id=eos, pad_token_id=eos,
    )  # fmt: skip
    return CLIPTextModelWithProjection(config).eval()


def t5_encoder(vocab: int, width: int, layers: int) -> Any:
    from transformers import T5Config, T5EncoderModel

    config = T5Config(
        vocab_size=vocab, d_model=width, d_kv=32, d_ff=2 * width, num_layers=layers, num_heads=4, dropout_rate=0.0,
        feed_forward_proj="gated-gelu", is_encoder_decoder=False, use_cache=False,
    )  # fmt: skip
    return T5EncoderModel(config).eval()


def build_sd3(
    words: Iterable[str],
    *,
    size: int = 36,
    text_length: int = 12,
    clip_hidden: int = 64,
    clip_layers: int = 2,
    t5_layers: int = 1,
    heads: int = 2,
    head_dim: int = 64,
    layers: int = 4,
    patch: int = 3,
    vae_channels: tuple[int, ...] = (8, 32, 64),
    latent_channels: int = 4,
    seed: int = 0,
) -> Any:
    """A StableDiffusion3Pipeline with random weights, reproducible from ``seed``.

    The picture is ``size`` pixels, the latent ``size / 2**(len(vae_channels) - 1)``; ``text_length`` tokens from each of the
    CLIP pair (shared positions) and T5 reach the transformer.
    """
    from diffusers import (
        AutoencoderKL,
        FlowMatchEulerDiscreteScheduler,
        SD3Transformer2DModel,
        StableDiffusion3Pipeline,
    )

    words = list(words)
    joint = 2 * clip_hidden
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer, tokenizer_3 = clip_tokenizer(words, text_length), t5_tokenizer(words, text_length)
        encoders = [
            clip_encoder(
                len(tokenizer), text_length, clip_hidden, clip_layers, tokenizer.eos_token_id, tokenizer.bos_token_id
            )
            for _ in range(2)
        ]
        t5 = t5_encoder(len(tokenizer_3), joint, t5_layers)
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=latent_channels, sample_size=size,
            down_block_types=("DownEncoderBlock2D",) * len(vae_channels),
            up_block_types=("UpDecoderBlock2D",) * len(vae_channels),
            block_out_channels=vae_channels, layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
            use_quant_conv=False, use_post_quant_conv=False, scaling_factor=1.0, shift_factor=0.0,
        ).eval()  # fmt: skip
        latent = size // 2 ** (len(vae_channels) - 1)
        transformer = SD3Transformer2DModel(
            sample_size=latent, patch_size=patch, in_channels=latent_channels, out_channels=latent_channels,
            num_layers=layers, attention_head_dim=head_dim, num_attention_heads=heads, joint_attention_dim=joint,
            caption_projection_dim=heads * head_dim, pooled_projection_dim=joint, pos_embed_max_size=latent // patch,
        ).eval()  # fmt: skip
    return StableDiffusion3Pipeline(
        transformer=transformer, scheduler=FlowMatchEulerDiscreteScheduler(shift=1.0), vae=vae,
        text_encoder=encoders[0], tokenizer=tokenizer, text_encoder_2=encoders[1], tokenizer_2=tokenizer,
        text_encoder_3=t5, tokenizer_3=tokenizer_3,
    )  # fmt: skip


def build_sd15(words: Iterable[str], *, size: int = 16, text_length: int = 12, seed: int = 0) -> Any:
    """A random StableDiffusionPipeline of the SD1.5 type: UNet2DConditionModel, epsilon prediction, DDIM."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        tokenizer = clip_tokenizer(list(words), text_length)
        encoder = CLIPTextModel(
            CLIPTextConfig(
                vocab_size=len(tokenizer),
                hidden_size=32,
                intermediate_size=64,
                num_hidden_layers=1,
                num_attention_heads=2,
                max_position_embeddings=text_length,
                projection_dim=32,
                bos_token_id=tokenizer.bos_token_id,
                eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.eos_token_id,
            )
        ).eval()
        vae = AutoencoderKL(
            in_channels=3, out_channels=3, latent_channels=4, sample_size=size,
            down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, mid_block_add_attention=False,
        ).eval()  # fmt: skip
        unet = UNet2DConditionModel(
            sample_size=size // 2, in_channels=4, out_channels=4, layers_per_block=1, block_out_channels=(16, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=32, attention_head_dim=8, norm_num_groups=4,
        ).eval()  # fmt: skip
    scheduler = DDIMScheduler(
        num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
        clip_sample=False, set_alpha_to_one=False, steps_offset=1,
    )  # fmt: skip
    return StableDiffusionPipeline(
        vae=vae, text_encoder=encoder, tokenizer=tokenizer, unet=unet, scheduler=scheduler,
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
