"""Tiny networks with random weights, saved by ``save_pretrained`` so that a reward loads them as it loads real ones."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from flowrl.records import RewardBatch

LETTERS = "abcdefghijklmnopqrstuvwxyz"
VISION = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
TEXT = VISION | {"vocab_size": 55, "max_position_embeddings": 32}


def randomise(network: torch.nn.Module, seed: int = 0, std: float = 0.3) -> Any:
    """Weights large enough for scores to differ between pictures."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in network.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, std, generator=generator)
    return network.eval()


def pictures(count: int = 4, height: int = 24, width: int = 40, seed: int = 0) -> npt.NDArray[np.uint8]:
    """Smooth random pictures, uint8 [B, H, W, 3]."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (count, 4, 4, 3))
    return coarse.repeat(-(-height // 4), 1).repeat(-(-width // 4), 2)[:, :height, :width].astype(np.uint8)


def batch(images: npt.NDArray[np.uint8], prompts: list[str] | None = None, metadata: Any = None) -> RewardBatch:
    count = len(images)
    return RewardBatch(images, prompts or ["a red cat"] * count, metadata or [{}] * count)


def clip_tokenizer() -> Any:
    from transformers import CLIPTokenizer

    words = ["!", "<|startoftext|>", "<|endoftext|>", *LETTERS, *(f"{letter}</w>" for letter in LETTERS)]
    return CLIPTokenizer(vocab={word: index for index, word in enumerate(words)}, merges=[])


def clip_processor(side: int = 32) -> Any:
    from transformers import CLIPImageProcessorPil

    return CLIPImageProcessorPil(size={"shortest_edge": side}, crop_size={"height": side, "width": side})


def clip_config(side: int = 32) -> Any:
    from transformers import CLIPConfig

    text = TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    return CLIPConfig(text_config=text, vision_config=VISION | {"image_size": side, "patch_size": 8}, projection_dim=8)


def save_clip(folder: Path, seed: int = 0, side: int = 32) -> Any:
    from transformers import CLIPModel

    network = randomise(CLIPModel(clip_config(side)), seed)
    network.save_pretrained(folder)
    clip_processor(side).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return network


def save_siglip(folder: Path) -> Any:
    from transformers import SiglipConfig, SiglipImageProcessorPil, SiglipModel

    text = TEXT | {"pad_token_id": 2, "bos_token_id": 1, "eos_token_id": 2, "projection_size": 16}
    network = randomise(
        SiglipModel(SiglipConfig(text_config=text, vision_config=VISION | {"image_size": 32, "patch_size": 8}))
    )
    with torch.no_grad():
        network.logit_scale.fill_(1.2)
        network.logit_bias.fill_(-0.7)
    network.save_pretrained(folder)
    SiglipImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return network


def save_dino(folder: Path) -> Any:
    from transformers import BitImageProcessorPil, Dinov2Config, Dinov2Model

    network = randomise(Dinov2Model(Dinov2Config(**VISION, mlp_ratio=1, image_size=28, patch_size=14)))
    network.save_pretrained(folder)
    BitImageProcessorPil(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}).save_pretrained(folder)
    return network


def save_classifier(folder: Path, labels: tuple[str, ...]) -> Any:
    from transformers import ViTConfig, ViTForImageClassification, ViTImageProcessorPil

    names = dict(enumerate(labels))
    config = ViTConfig(**VISION, image_size=32, patch_size=8, id2label=names, label2id={v: k for k, v in names.items()})
    network = randomise(ViTForImageClassification(config))
    network.save_pretrained(folder)
    ViTImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    return network


def _swin(*stages: str) -> Any:
    from transformers import SwinConfig

    sizes = {"image_size": 32, "patch_size": 4, "embed_dim": 8, "depths": [1] * 4, "num_heads": [1] * 4}
    return SwinConfig(**sizes, window_size=4, out_features=list(stages))


def _labels(names: tuple[str, ...]) -> dict[str, Any]:
    return {"id2label": dict(enumerate(names)), "label2id": {name: index for index, name in enumerate(names)}}


def save_mask2former(folder: Path, names: tuple[str, ...]) -> Any:
    from transformers import Mask2FormerConfig, Mask2FormerForUniversalSegmentation, Mask2FormerImageProcessorPil

    config = Mask2FormerConfig(
        backbone_config=_swin("stage1", "stage2", "stage3", "stage4"), hidden_dim=32, feature_size=32,
        mask_feature_size=32, num_queries=6, encoder_layers=1, decoder_layers=2, num_attention_heads=2,
        encoder_feedforward_dim=16, dim_feedforward=16, **_labels(names),
    )  # fmt: skip
    network = randomise(Mask2FormerForUniversalSegmentation(config))
    network.save_pretrained(folder)
    Mask2FormerImageProcessorPil(size={"height": 48, "width": 48}, size_divisor=32).save_pretrained(folder)
    return network


def save_rtdetr(folder: Path, names: tuple[str, ...]) -> Any:
    from transformers import RTDetrImageProcessorPil, RTDetrResNetConfig, RTDetrV2Config, RTDetrV2ForObjectDetection

    backbone = RTDetrResNetConfig(
        embedding_size=8, hidden_sizes=[8] * 4, depths=[1] * 4, layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = RTDetrV2Config(
        backbone_config=backbone, encoder_in_channels=[8] * 3, encoder_hidden_dim=16, d_model=16, num_queries=6,
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, decoder_in_channels=[16] * 3, num_denoising=0, **_labels(names),
    )  # fmt: skip
    network = randomise(RTDetrV2ForObjectDetection(config))
    network.save_pretrained(folder)
    RTDetrImageProcessorPil(size={"height": 64, "width": 64}).save_pretrained(folder)
    return network


def save_owlv2(folder: Path) -> Any:
    from transformers import Owlv2Config, Owlv2ForObjectDetection, Owlv2ImageProcessorPil

    text = TEXT | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2, "max_position_embeddings": 24}
    vision = VISION | {"image_size": 32, "patch_size": 8}
    network = randomise(
        Owlv2ForObjectDetection(Owlv2Config(text_config=text, vision_config=vision, projection_dim=16)), std=0.1
    )
    network.save_pretrained(folder)
    Owlv2ImageProcessorPil(size={"height": 32, "width": 32}).save_pretrained(folder)
    clip_tokenizer().save_pretrained(folder)
    return network


def save_grounding_dino(folder: Path) -> Any:
    from transformers import (
        BertConfig,
        BertTokenizer,
        GroundingDinoConfig,
        GroundingDinoForObjectDetection,
        GroundingDinoImageProcessorPil,
    )

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", ".", "cat", "red", "dog", "fire", "hydrant"]
    text = BertConfig(
        vocab_size=len(words), hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    config = GroundingDinoConfig(
        backbone_config=_swin("stage2", "stage3", "stage4"), text_config=text, d_model=32, num_queries=6,
        encoder_layers=1, decoder_layers=2, encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, max_text_len=16,
    )  # fmt: skip
    network = randomise(GroundingDinoForObjectDetection(config), std=0.1)
    network.save_pretrained(folder)
    GroundingDinoImageProcessorPil(size={"height": 48, "width": 48}).save_pretrained(folder)
    BertTokenizer(vocab={word: index for index, word in enumerate(words)}).save_pretrained(folder)
    return network


def save_qwen2vl(folder: Path, tokens: tuple[str, ...], instruction: str) -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen2VLConfig, Qwen2VLImageProcessorPil, Qwen2VLModel

    special = [
        "<|im_start|>",
        "<|im_end|>",
        "<|vision_start|>",
        "<|vision_end|>",
        "<|image_pad|>",
        "<|video_pad|>",
        *tokens,
    ]
    words = [
        "[UNK]",
        *special,
        "system",
        "user",
        "assistant",
        "You",
        "are",
        "a",
        "red",
        "cat",
        "dog",
        "rate",
        "it",
        ".",
    ]
    model = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    model.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=model,
        unk_token="[UNK]",
        additional_special_tokens=special,
        bos_token=None,
        eos_token="<|im_end|>",
    )
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    text = {
        "vocab_size": len(words), "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1,
        "num_attention_heads": 2, "num_key_value_heads": 1, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    vision = {"depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 1, "patch_size": 14}
    places = {f"{name}_token_id": words.index(f"<|{name.replace('image', 'image_pad').replace('video', 'video_pad')}|>")
              for name in ("image", "video", "vision_start", "vision_end")}  # fmt: skip
    network = randomise(Qwen2VLModel(Qwen2VLConfig(text_config=text, vision_config=vision, **places)))
    network.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    Qwen2VLImageProcessorPil(min_pixels=4 * 28 * 28, max_pixels=256 * 28 * 28).save_pretrained(folder)
    (folder / "instruction.txt").write_text(instruction, encoding="utf-8")
    return network
