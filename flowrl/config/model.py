"""Settings of the model: which one, what of it is trained, and how it is run. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from importlib import metadata
from typing import Literal

from flowrl.errors import UserError


@dataclass(frozen=True, kw_only=True)
class Lora:
    """Low-rank adaptation of the trained network. alpha / rank is the scale of the update."""

    rank: int = 32
    alpha: float = 64.0
    targets: tuple[str, ...] = ("attention", "feed_forward")


@dataclass(frozen=True, kw_only=True)
class Model:
    """adapter: registry key of the family. path: a folder, a hub id, or "embedded" for the model in assets.

    revision: commit, tag or branch of a hub id; "" takes the newest. train: "lora" or "full". dtype: of the frozen weights
    and the forward pass; trained weights stay float32, and fp16 scales its gradients on the way through the network.

    activation_checkpointing: keep the input of each block alone and compute the rest again for the gradient.
    compile: regional compiles the blocks that a network repeats. attention: native is torch's own; the others are packages.
    free_text_encoders: encode every prompt once, then drop the text encoders. vae_tiling, vae_slicing: the autoencoder
    works on tiles of a picture, on one picture at a time. memory_check: stop where the plan does not fit the accelerator.
    """

    adapter: str = "sd3"
    path: str = "embedded"
    revision: str = ""
    train: Literal["lora", "full"] = "lora"
    dtype: Literal["fp32", "bf16", "fp16"] = "fp32"
    lora: Lora = field(default_factory=Lora)
    height: int = 36
    width: int = 36
    frames: int = 1
    activation_checkpointing: bool = False
    compile: Literal["none", "regional"] = "none"
    attention: Literal["native", "flash", "flash_varlen", "xformers"] = "native"
    free_text_encoders: bool = False
    vae_tiling: bool = False
    vae_slicing: bool = False
    memory_check: bool = True

    @property
    def optioned(self) -> bool:
        """Whether the model runs in any other way than as it was loaded."""
        return (
            self.activation_checkpointing or self.vae_tiling or self.vae_slicing
            or self.compile != "none" or self.attention != "native"
        )  # fmt: skip


_FLASH = ("flash_attn", "flash-attn", (2, 6, 3))
PACKAGES = {"flash": _FLASH, "flash_varlen": _FLASH, "xformers": ("xformers", "xformers", (0, 0, 29))}
"""Attention backend -> the module, the package that brings it, and its oldest version that diffusers takes."""


def problems(model: Model) -> Iterator[str]:
    """What is wrong within the model section, besides ranges."""
    if model.attention != "native" and model.dtype == "fp32":
        yield f"model.attention: {model.attention} computes in bf16 or fp16, and model.dtype is fp32; use one of those"
    if model.path == "embedded" and model.revision:
        yield "model.revision: the embedded model has none; remove it"


def require(model: Model) -> None:
    """Raise UserError where ``model.attention`` needs a package that is not installed here, or one that is too old."""
    if model.attention not in PACKAGES:
        return
    _, package, oldest = PACKAGES[model.attention]
    needed = f"{package} >= {'.'.join(map(str, oldest))}"
    found = _version(package)
    if found is None:
        raise UserError(
            f"model.attention: {model.attention} needs {needed}, which is not installed; pip install {package}, or use "
            "native"
        )
    if _numbers(found) < oldest:
        raise UserError(
            f"model.attention: {model.attention} needs {needed}, and {found} is installed; pip install -U {package}, or "
            "use native"
        )


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _numbers(text: str) -> tuple[int, ...]:
    """The leading numbers of a version: 2.8.0.post2+cu12 is (2, 8, 0)."""
    found = []
    for part in text.split("+")[0].split("."):
        if not part.isdecimal():
            break
        found.append(int(part))
    return tuple(found)
