"""Tiny pipelines of every family, saved once a session, and how the stock pipeline is asked for the same thing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from flowrl.pipelines import tiny_families
from flowrl.pipelines.packing import pack
from PIL import Image

WORDS = "a photo of red blue green circle square moving to the left right".split()

PICTURE = np.random.default_rng(0).integers(0, 255, (32, 32, 3), dtype=np.uint8)


@dataclass(frozen=True)
class Family:
    """adapter: registry key. build: makes the pipeline. sizes: two (height, width). latents: of ours in stock layout.

    stock: keyword arguments of the stock call under a guidance scale.
    """

    adapter: str
    build: Callable[[], Any]
    sizes: tuple[tuple[int, int], tuple[int, int]]
    guidance: float
    stock: Callable[[float], dict[str, Any]]
    frames: int = 1
    guidance_low: float | None = None
    to_stock: Callable[[torch.Tensor], torch.Tensor] = field(default=lambda x: x)
    picture: bool = False
    """It starts from a picture."""

    @property
    def metadata(self) -> dict[str, Any]:
        return {"image": PICTURE} if self.picture else {}


def _wan(experts: int) -> Callable[[], Any]:
    return lambda: tiny_families.build_wan(WORDS, experts=experts, layers=1)


FAMILIES = {
    "flux_dev": Family(
        "flux", lambda: tiny_families.build_flux(WORDS), ((16, 24), (32, 16)), 3.5,
        lambda g: {"guidance_scale": g, "max_sequence_length": 12}, to_stock=pack,
    ),
    "flux_schnell": Family(
        "flux", lambda: tiny_families.build_flux(WORDS, guidance=False), ((16, 24), (32, 16)), 1.0,
        lambda g: {"max_sequence_length": 12}, to_stock=pack,
    ),
    "qwen_image": Family(
        "qwen_image", tiny_families.build_qwen_image, ((16, 24), (32, 16)), 4.0,
        lambda g: {"true_cfg_scale": g, "negative_prompt": " "},
    ),
    "wan": Family(
        "wan", _wan(1), ((16, 32), (32, 16)), 4.0,
        lambda g: {"guidance_scale": g, "max_sequence_length": 12, "num_frames": 5}, frames=5,
    ),
    "wan_two_experts": Family(
        "wan", _wan(2), ((16, 32), (32, 16)), 4.0,
        lambda g: {"guidance_scale": g, "guidance_scale_2": 3.0, "max_sequence_length": 12, "num_frames": 5}, frames=5,
        guidance_low=3.0,
    ),
    "flux_kontext": Family(
        "flux_kontext", lambda: tiny_families.build_flux(WORDS, kind="FluxKontextPipeline"), ((32, 32), (32, 32)), 3.5,
        lambda g: {"guidance_scale": g, "max_sequence_length": 12, "max_area": 1024, "_auto_resize": False,
                   "image": Image.fromarray(PICTURE)}, to_stock=pack, picture=True,
    ),
    "wan_image": Family(
        "wan_image", lambda: tiny_families.build_wan(WORDS, pictures=True, layers=1), ((32, 32), (32, 32)), 4.0,
        lambda g: {"guidance_scale": g, "max_sequence_length": 12, "num_frames": 5, "image": Image.fromarray(PICTURE)},
        frames=5, picture=True,
    ),
    "sdxl": Family(
        "sdxl", lambda: tiny_families.build_sdxl(WORDS), ((16, 24), (32, 16)), 5.0,
        lambda g: {"guidance_scale": g}
    ),
}  # fmt: skip
