"""What every adapter over a diffusers pipeline shares: loading, precision, and picture ranges."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from importlib import resources
from pathlib import Path
from typing import Any, ClassVar, NamedTuple, Self

import torch
from flowrl.pipelines import checks, execution
from flowrl.pipelines.folder import Folder, find
from flowrl.pipelines.texts import Encoded, TextCache

from flowrl.config.model import Model
from flowrl.errors import UserError
from flowrl.performance.memory import ModelSize
from flowrl.protocols import GuidanceRule
from flowrl.records import Request

EMBEDDED = "embedded"


def locate(path: str, embedded: str) -> str:
    """A folder or hub id as given; "embedded" is the model that ships in flowrl.assets."""
    if path != EMBEDDED:
        return path
    if not embedded:
        raise UserError(
            "model.path: this family ships no embedded model; give a folder or a hub id, or use the adapters sd3, "
            "stable_diffusion or wan"
        )
    folder = Path(str(resources.files("flowrl.assets"))) / embedded
    if not (folder / "model_index.json").is_file():
        raise UserError(
            f"model.path: the embedded model is missing at {folder}; scripts/pretrain_embedded.py makes pictures' "
            "models and scripts/pretrain_video.py the video's, and their first lines give the command"
        )
    return str(folder)


def load_pipeline(pipeline_class: Any, path: str, dtype: torch.dtype, device: torch.device, revision: str = "") -> Any:
    """``from_pretrained`` from safetensors only, quiet, in ``dtype``; UserError names the path when that fails."""
    try:
        pipe = pipeline_class.from_pretrained(path, dtype=dtype, use_safetensors=True, revision=revision or None)
    except (OSError, ValueError) as error:
        raise UserError(f"model.path: {path!r} could not be loaded as {pipeline_class.__name__}: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    if dtype == torch.float16 and pipe.vae.config.get("force_upcast"):
        pipe.vae.float()  # its activations exceed what fp16 holds
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


def _flat(vae: torch.nn.Module) -> bool:
    """Whether channels_last can be: not for videos, whose weights have five dimensions."""
    return all(parameter.ndim <= 4 for parameter in vae.parameters())


class Geometry(NamedTuple):
    """Of latents. factor: pixels a latent cell; patch: cells a token; per: frames a latent frame, 0 for pictures."""

    channels: int
    factor: int
    patch: int
    per: int = 0

    def sides(self, request: Request) -> tuple[int, int]:
        """Rows and columns of the latent, each a whole number of patches of the network. Raises UserError."""
        unit = self.factor * self.patch
        for name, value in (("height", request.height), ("width", request.width)):
            if value % unit:
                near = max(unit, round(value / unit) * unit)
                raise UserError(
                    f"model.{name}: {value} is not a multiple of {unit}, which this model needs; use {near}"
                )
        return request.height // self.factor, request.width // self.factor

    def latent_frames(self, request: Request) -> int:
        """Raises UserError for a number of frames that does not divide, or a video of a model that makes pictures."""
        if not self.per:
            if request.frames != 1:
                raise UserError(f"model.frames: {request.frames}, and this model makes pictures; use 1")
            return 1
        if (request.frames - 1) % self.per:
            near = request.frames // self.per * self.per + 1
            raise UserError(f"model.frames: {request.frames} is not a multiple of {self.per} plus 1; use {near}")
        return (request.frames - 1) // self.per + 1


class DiffusersAdapter:
    """Base of the adapters. A subclass sets ``network_name``, ``target_groups`` and the protocol's model-specific methods."""

    guidance_rule: GuidanceRule = "linear"
    network_name: ClassVar[str] = "transformer"
    target_groups: ClassVar[Mapping[str, Sequence[str]]] = {}
    feature_output: ClassVar[int] = -1
    pixel_multiple: ClassVar[int] = 1
    """Sides of a latent are multiples of it: the patch of the network."""
    guidance_boundary: float | None = None
    """Time below which the second guidance scale holds; None where there is one scale."""
    pipeline_name: ClassVar[str]
    embedded_name: ClassVar[str] = ""
    encoder_names: ClassVar[Sequence[str]] = ("text_encoder",)
    saved_buffers: ClassVar[Sequence[str]] = ()
    """Tensors in the network's files that are no parameters."""
    repeated_blocks: ClassVar[Sequence[str]] = ()
    """Classes of the blocks to compile, where the network does not say so itself."""

    def __init__(self, pipe: Any) -> None:
        self.pipe = pipe
        self.device = torch.device(pipe.device)
        self.network: torch.nn.Module = getattr(pipe, self.network_name)
        self.autocast_dtype: torch.dtype | None = None
        self.has_lora = False
        self.remembered: TextCache | None = None
        self.geometry = type(self).geometry_of(pipe.vae.config, self.network_config)
        for module in pipe.components.values():
            if isinstance(module, torch.nn.Module):
                module.eval().requires_grad_(False)
        if self.device.type == "cpu" and _flat(pipe.vae):  # a third faster on two CPU cores
            pipe.vae.to(memory_format=torch.channels_last)

    @classmethod
    def load(cls, path: str, dtype: torch.dtype, device: torch.device, revision: str = "") -> Self:
        """Load a pipeline from a folder, a hub id or the embedded assets. Raises UserError for one of another family."""
        _quiet()
        import diffusers

        place = locate(path, cls.embedded_name)
        checks.check_family(cls, find(place, revision), path)
        return cls(load_pipeline(getattr(diffusers, cls.pipeline_name), place, dtype, device, revision))

    @classmethod
    def folder(cls, model: Model) -> Folder | None:
        """Where the model lies on this machine; None for a hub id that was never downloaded."""
        return find(locate(model.path, cls.embedded_name), model.revision)

    @classmethod
    def check(cls, model: Model, texts: Sequence[str] = ()) -> None:
        """Raise UserError for what can be known to be wrong before weights are read: see ``checks``."""
        checks.check_model(cls, cls.folder(model), model, texts)

    @classmethod
    def size(cls, model: Model) -> ModelSize | None:
        """What the model holds, from the headers of its files; None where they are not on this machine."""
        folder = cls.folder(model)
        if folder is None:
            return None
        checks.check_family(cls, folder, model.path)
        return checks.size_of(cls, folder, model)

    @classmethod
    def licence(cls, model: Model) -> str:
        """The licence that the model's own card states, "" where there is none."""
        folder = cls.folder(model)
        return folder.licence if folder is not None else ""

    @classmethod
    def network_names(cls, parts: Sequence[str]) -> tuple[str, ...]:
        """Which of a pipeline's parts are trained."""
        return (cls.network_name,)

    @property
    def network_config(self) -> Mapping[str, Any]:
        return getattr(self.pipe, self.network_name).config  # type: ignore[no-any-return]

    @property
    def networks(self) -> list[Any]:
        """The diffusers networks that are trained."""
        return [self.network]

    def trainable(self) -> torch.nn.Module:
        return self.network

    def configure(self, model: Model) -> None:
        """Run the model as its settings say: checkpointed activations, compiled blocks, attention, tiles and slices."""
        for network in self.networks:
            if model.attention != "native":
                execution.choose_attention(network, model.attention, self.device)
            if model.activation_checkpointing:
                execution.checkpoint_activations(network)
            if model.compile == "regional":
                execution.compile_blocks(network, self.repeated_blocks or network._repeated_blocks or ())
        execution.divide_work(self.pipe.vae, model.vae_tiling, model.vae_slicing)

    def bring(self, device: torch.device) -> None:
        """Compute on ``device`` from now on, with every part there but the trained network, which follows in shards."""
        own = {id(network) for network in self.networks}
        for name, part in self.pipe.components.items():
            if isinstance(part, torch.nn.Module) and id(part) not in own:
                part.to(device)
                if name == "vae" and device.type != "cpu" and _flat(part):
                    part.to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
        self.device = device

    # -- text ------------------------------------------------------------------------------------------------------

    def text_of(self, request: Request, negative: bool) -> str:
        return request.negative if negative else request.prompt

    @classmethod
    def text_limits(cls, tokenizers: Mapping[str, Any]) -> Mapping[str, int]:
        """The most tokens of a prompt that are read, by the name of the tokenizer that counts them."""
        return {}

    def encode_texts(self, texts: list[str]) -> Encoded:
        """What the text encoders make of texts: tensors, all with the texts first."""
        raise NotImplementedError

    def join_texts(self, rows: Sequence[Encoded]) -> Encoded:
        """Encoded texts of one row each to a batch."""
        return tuple(torch.cat(tensors) for tensors in zip(*rows, strict=True))

    @staticmethod
    def split_texts(encoded: Encoded, number: int) -> Encoded:
        """Row ``number`` of a batch of encoded texts, as a batch of one."""
        return tuple(tensor[number : number + 1] for tensor in encoded)

    @torch.no_grad()
    def encoded(self, requests: Sequence[Request], negative: bool) -> Encoded:
        """The requests' texts encoded, or looked up where the encoders are gone. Raises UserError for one that is too long."""
        texts = [self.text_of(request, negative) for request in requests]
        self.check_lengths(texts)
        return self.encode_texts(texts) if self.remembered is None else self.remembered(texts, self.device)

    def check_lengths(self, texts: Sequence[str]) -> None:
        """Raise UserError for the first text that an encoder would cut off."""
        checks.check_lengths(self.text_limits(self.pipe.components), self.pipe.components, texts)

    @torch.no_grad()
    def free_text_encoders(self, requests: Sequence[Request], size: int) -> None:
        """Encode every request, and its negative, ``size`` a call; then drop the text encoders. Others are refused later."""
        cache = TextCache(self.split_texts, self.join_texts)
        texts = [self.text_of(request, negative) for request in requests for negative in (False, True)]
        self.check_lengths(list(dict.fromkeys(texts)))
        cache.fill(texts, self.encode_texts, size)
        self.remembered = cache
        execution.free_encoders(self.pipe, self.encoder_names)

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

    # -- sizes -----------------------------------------------------------------------------------------------------

    @classmethod
    def geometry_of(cls, vae: Mapping[str, Any], network: Mapping[str, Any]) -> Geometry:
        """The latent's geometry from the settings of the autoencoder and the network."""
        factor = 2 ** (len(vae.get("block_out_channels", (64,))) - 1)
        return Geometry(vae.get("latent_channels", 4), factor, cls.pixel_multiple)

    @classmethod
    def latent_of(cls, geometry: Geometry, request: Request) -> tuple[int, ...]:
        """Shape of one latent, without the batch. Raises UserError for a size that does not divide."""
        geometry.latent_frames(request)
        return (geometry.channels, *geometry.sides(request))

    @classmethod
    def text_tokens(cls, lengths: Mapping[str, int]) -> int:
        """Tokens of text in the network's stream beside the picture's. lengths: the most that each tokenizer takes."""
        return 0

    @classmethod
    def tokens_of(cls, geometry: Geometry, request: Request, lengths: Mapping[str, int]) -> int:
        """Tokens of one sample in the network: patches of the picture, and text where they share a stream."""
        rows, columns = geometry.sides(request)
        patches = geometry.latent_frames(request) * (rows // geometry.patch) * (columns // geometry.patch)
        return patches + cls.text_tokens(lengths)

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return self.latent_of(self.geometry, request)

    def spatial_shape(self, request: Request) -> tuple[int, int, int]:
        """(channels, rows, columns) of one picture's latent. Raises UserError for a size that does not divide."""
        return (self.geometry.channels, *self.geometry.sides(request))
