"""What every adapter over a diffusers pipeline shares: loading, precision, and picture ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
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
    if not embedded:
        raise UserError(
            "model.path: this family ships no embedded model; give a folder or a hub id, or use the adapters sd3 or "
            "stable_diffusion"
        )
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


def source_pictures(requests: Sequence[Request]) -> torch.Tensor:
    """The pictures that requests start from (metadata "image"): float32 [B, 3, H, W] in [0, 1]."""
    from flowrl.data.pictures import source_picture

    pictures = [torch.from_numpy(source_picture(r.metadata, r.height, r.width)) for r in requests]
    return torch.stack(pictures).movedim(-1, 1).float() / 255


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
    feature_output: ClassVar[int] = -1
    pixel_multiple: ClassVar[int] = 1
    """Sides of a latent are multiples of it: the patch of the network, where the autoencoder does not see to it."""
    guidance_boundary: float | None = None
    """Time below which the second guidance scale holds; None where there is one scale."""
    pipeline_name: ClassVar[str]
    embedded_name: ClassVar[str] = ""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.device = torch.device(pipe.device)
        self.network: torch.nn.Module = getattr(pipe, self.network_name)
        self.autocast_dtype: torch.dtype | None = None
        self.has_lora = False
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
        flat = all(parameter.ndim <= 4 for parameter in pipe.vae.parameters())
        if self.device.type == "cpu" and flat:  # a third faster on two CPU cores; videos' weights have five dimensions
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

        add_lora(self.network, rank, alpha, self.endings(groups), seed)
        self.has_lora = True

    def endings(self, groups: Sequence[str]) -> list[str]:
        """Name endings of the linear layers in the named groups. Raises UserError for a group that the family lacks."""
        unknown = [name for name in groups if name not in self.target_groups]
        if unknown:
            raise UserError(f"model.lora.targets: unknown group {unknown[0]!r}; use {', '.join(self.target_groups)}")
        return [ending for name in groups for ending in self.target_groups[name]]

    def lora_off(self) -> AbstractContextManager[None]:
        from flowrl.pipelines.lora import lora_off

        return lora_off(self.network)

    def load_lora(self, folder: str) -> None:
        """Put an exported LoRA beside the frozen weights; ``lora_off`` leaves it out.

        Raises UserError where the file cannot be read, changes more than the network, or has no layer of it.
        """
        from flowrl.pipelines.lora import load_lora

        load_lora(self.pipe, folder)
        self.has_lora = True

    def export(self, folder: str) -> None:
        from flowrl.pipelines.lora import save_lora

        if self.has_lora:
            save_lora(type(self.pipe), self.network_name, self.network, folder)
        else:
            self.network.save_pretrained(f"{folder}/{self.network_name}", safe_serialization=True)  # type: ignore[operator]

    @contextmanager
    def tapped(self, names: Sequence[str]) -> Iterator[dict[str, torch.Tensor]]:
        """Collect what the named modules of the network put out, by name, in the calls made within the block.

        Of a block with several outputs it takes number ``feature_output`` (the picture's stream). Raises ValueError for a
        name that the network does not have, or an output that is no tensor.
        """
        found: dict[str, torch.Tensor] = {}

        def keep(name: str) -> Callable[[torch.nn.Module, Any, Any], None]:
            def hook(module: torch.nn.Module, inputs: Any, output: Any) -> None:
                value = output[self.feature_output] if isinstance(output, tuple | list) else output
                if not isinstance(value, torch.Tensor):
                    raise ValueError(
                        f"features: {name} puts out {type(value).__name__}, not a tensor; name another block"
                    )
                found[name] = value.float()

            return hook

        modules = {ending.removeprefix("base_model.model."): m for ending, m in self.network.named_modules()}
        unknown = [name for name in names if not name or name not in modules]
        if unknown:
            blocks = [name for name in modules if name.count(".") == 1 and name.rpartition(".")[2].isdecimal()]
            raise ValueError(f"features: the network has no module {unknown[0]!r}; its blocks are {', '.join(blocks)}")
        handles = [modules[name].register_forward_hook(keep(name)) for name in names]
        try:
            yield found
        finally:
            for handle in handles:
                handle.remove()

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
        return self.spatial_shape(request)

    def spatial_shape(self, request: Request) -> tuple[int, int, int]:
        """(channels, rows, columns) of one picture's latent. Raises UserError for a size that does not divide."""
        config = self.pipe.vae.config
        channels = config.latent_channels if "latent_channels" in config else config.z_dim
        return (channels, *self.sides(request, self.pipe.vae_scale_factor, self.pixel_multiple))

    @staticmethod
    def sides(request: Request, factor: int, patch: int) -> tuple[int, int]:
        """Rows and columns of the latent, each a whole number of patches of the network."""
        unit = factor * patch
        for name, value in (("height", request.height), ("width", request.width)):
            if value % unit:
                near = max(unit, round(value / unit) * unit)
                raise UserError(
                    f"model.{name}: {value} is not a multiple of {unit}, which this model needs; use {near}"
                )
        return request.height // factor, request.width // factor

    @staticmethod
    def check_lengths(texts: Sequence[str], tokenizer: Any, limit: int) -> None:
        """Raise UserError for the first prompt that the text encoder would cut off."""
        for text in texts:
            count = len(tokenizer(text).input_ids)
            if count > limit:
                raise UserError(
                    f"data.prompts: a prompt of {count} tokens is longer than the {limit} that the text encoder takes, and "
                    f"would lose its end; shorten it: {text[:80]!r}"
                )
