"""What every adapter over a diffusers pipeline shares: loading, precision, and picture ranges."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, Self

import torch

from flowrl.errors import UserError
from flowrl.protocols import GuidanceRule
from flowrl.records import Request

EMBEDDED = "embedded"


def locate(path: str, embedded: str) -> str:
    """A folder or hub id as given; "embedded" is the model that ships in flowrl.assets."""
    if path != EMBEDDED:
        return path
    folder = Path(str(resources.files("flowrl.assets"))) / embedded
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"model.path: the embedded model is missing at {folder}; scripts/pretrain_embedded.py makes it, and its first "
            "lines give the command"
        )
    return str(folder)


def load_pipeline(pipeline_class: Any, path: str, dtype: torch.dtype, device: torch.device) -> Any:
    """``from_pretrained`` from safetensors only, quiet, in ``dtype``; UserError names the path when that fails."""
    try:
        pipe = pipeline_class.from_pretrained(path, dtype=dtype, use_safetensors=True)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path!r} could not be loaded as {pipeline_class.__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


def _quiet() -> None:
    """No loading bars, and no advice to install torchvision, which the core does not need."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    transformers_logging.set_verbosity_error()
    from diffusers.utils import logging as diffusers_logging

    diffusers_logging.disable_progress_bar()


class DiffusersAdapter:
    """Base of the adapters. A subclass sets ``network_name``, ``target_groups`` and the protocol's model-specific methods."""

    guidance_rule: GuidanceRule = "linear"
    network_name: ClassVar[str] = "transformer"
    target_groups: ClassVar[Mapping[str, Sequence[str]]] = {}
    pipeline_name: ClassVar[str]
    embedded_name: ClassVar[str]

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.device = torch.device(pipe.device)
        self.network: torch.nn.Module = getattr(pipe, self.network_name)
        self.autocast_dtype: torch.dtype | None = None
        self.has_lora = False
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
        if self.device.type == "cpu":  # a third faster on two CPU cores
            pipe.vae.to(memory_format=torch.channels_last)

    @classmethod
    def load(cls, path: str, dtype: torch.dtype, device: torch.device) -> Self:
        """Load a pipeline from a folder, a hub id or the embedded assets."""
        _quiet()
        import diffusers

        return cls(load_pipeline(getattr(diffusers, cls.pipeline_name), locate(path, cls.embedded_name), dtype, device))

    def trainable(self) -> torch.nn.Module:
        return self.network

    def add_lora(self, rank: int, alpha: float, groups: Sequence[str], seed: int) -> None:
        from flowrl.pipelines.lora import add_lora

        unknown = [name for name in groups if name not in self.target_groups]
        if unknown:
            raise UserError(f"model.lora.targets: unknown group {unknown[0]!r}; use {', '.join(self.target_groups)}")
        add_lora(self.network, rank, alpha, [ending for name in groups for ending in self.target_groups[name]], seed)
        self.has_lora = True

    def lora_off(self) -> AbstractContextManager[None]:
        from flowrl.pipelines.lora import lora_off

        return lora_off(self.network)

    def export(self, folder: str) -> None:
        from flowrl.pipelines.lora import save_lora

        if self.has_lora:
            save_lora(type(self.pipe), self.network_name, self.network, folder)
        else:
            self.network.save_pretrained(f"{folder}/{self.network_name}", safe_serialization=True)  # type: ignore[operator]

    @contextmanager
    def precision(self) -> Iterator[None]:
        """Compute in ``autocast_dtype`` where one is set (full fine-tuning in bf16 keeps float32 weights).

        The cast cache stays off: it would keep serving casts of weights that an update has changed since.
        """
        with torch.autocast(
            self.device.type, dtype=self.autocast_dtype, enabled=self.autocast_dtype is not None, cache_enabled=False
        ):
            yield

    def decode(self, x0: torch.Tensor, request: Request) -> torch.Tensor:
        vae = self.pipe.vae
        latents = x0 / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
        with torch.set_grad_enabled(x0.requires_grad):
            image = vae.decode(latents.to(vae.dtype), return_dict=False)[0].float()
        return (image / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_media(self, media: torch.Tensor, request: Request) -> torch.Tensor:
        vae = self.pipe.vae
        latents: torch.Tensor = vae.encode((media * 2 - 1).to(vae.dtype)).latent_dist.mean.float()
        return (latents - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        factor = self.pipe.vae_scale_factor
        for name, value in (("height", request.height), ("width", request.width)):
            if value % factor:
                raise UserError(f"model.{name}: {value} is not a multiple of {factor}, the autoencoder's scale")
        return (self.pipe.vae.config.latent_channels, request.height // factor, request.width // factor)
