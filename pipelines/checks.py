"""What is wrong with a model's settings, found before its weights are read: family, sizes, LoRA, prompts; and its size."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from flowrl.pipelines.folder import Folder

from flowrl import registry
from flowrl.config.model import Model
from flowrl.errors import UserError
from flowrl.performance.memory import ModelSize, Network
from flowrl.records import Request

if TYPE_CHECKING:
    from flowrl.pipelines.base import DiffusersAdapter, Geometry

Family = type["DiffusersAdapter"]


def check_family(family: Family, folder: Folder | None, path: str) -> None:
    """Raise UserError for a pipeline of another class than the family drives, naming the adapter that does."""
    if folder is None or folder.class_name == family.pipeline_name:
        return
    others = [key for key in registry.names("pipeline") if _drives(key, folder.class_name)]
    advice = f"use model.adapter={others[0]}" if others else "no adapter drives it; give another model"
    raise UserError(
        f"model.path: {path} holds a {folder.class_name or 'pipeline without a class'}, and this adapter drives "
        f"{family.pipeline_name}; {advice}"
    )


def _drives(key: str, class_name: str) -> bool:
    family: Any = registry.resolve("pipeline", key)
    return getattr(family, "pipeline_name", None) == class_name


def check_model(family: Family, folder: Folder | None, model: Model, texts: Sequence[str]) -> None:
    """Raise UserError for what ``folder`` shows to be wrong; a model that is not on this machine shows nothing yet."""
    if folder is None:
        return
    check_family(family, folder, model.path)
    family.latent_of(geometry_of(family, folder), request_for(model))
    if model.train == "lora":
        for name in family.network_names(folder.parts):
            check_targets(family, folder.shapes(name), model.lora.targets)
    if texts:
        tokenizers = read_tokenizers(folder)
        check_lengths(family.text_limits(tokenizers), tokenizers, texts)


def geometry_of(family: Family, folder: Folder) -> Geometry:
    return family.geometry_of(folder.settings("vae"), folder.settings(family.network_name))


def request_for(model: Model) -> Request:
    """A request of the model's picture size."""
    return Request("", 0, model.height, model.width, model.frames)


def check_targets(family: Family, shapes: Mapping[str, tuple[int, ...]], groups: Sequence[str]) -> None:
    """Raise UserError for a group of LoRA targets that the family lacks, or that names no layer of this network."""
    unknown = [name for name in groups if name not in family.target_groups]
    if unknown:
        raise UserError(f"model.lora.targets: unknown group {unknown[0]!r}; use {', '.join(family.target_groups)}")
    if not shapes:  # no safetensors at hand: loading says so
        return
    for group in groups:
        if not lora_layers(shapes, family.target_groups[group]):
            fit = [name for name, endings in family.target_groups.items() if lora_layers(shapes, endings)]
            raise UserError(
                f"model.lora.targets: {group} matches no layer of this {family.network_name} (layers that end in "
                f"{', '.join(family.target_groups[group])}); "
                + (f"use {', '.join(fit)}" if fit else "use model.train=full")
            )


def lora_layers(shapes: Mapping[str, tuple[int, ...]], endings: Sequence[str]) -> list[tuple[int, int]]:
    """(outputs, inputs) of the linear layers whose names end in one of ``endings``."""
    found = []
    for name, shape in shapes.items():
        layer, _, kind = name.rpartition(".")
        if kind == "weight" and len(shape) == 2 and any(layer == e or layer.endswith("." + e) for e in endings):
            found.append((shape[0], shape[1]))
    return found


def read_tokenizers(folder: Folder) -> dict[str, Any]:
    """The tokenizers of a pipeline by name, without its encoders."""
    import transformers

    found = {}
    for name in folder.parts:
        library, kind = folder.index[name]
        if library == "transformers" and "okenizer" in str(kind):
            found[name] = getattr(transformers, kind).from_pretrained(folder.path / name)
    return found


def check_lengths(limits: Mapping[str, int], tokenizers: Mapping[str, Any], texts: Sequence[str]) -> None:
    """Raise UserError for the first text that is longer than one of ``limits``, by tokenizer, allows."""
    for name, limit in limits.items() if texts else ():
        for text, ids in zip(texts, tokenizers[name](list(texts)).input_ids, strict=True):
            count = len(ids)
            if count > limit:
                raise UserError(
                    f"prompts (data or evaluation): one of {count} tokens is longer than the {limit} that the text encoder "
                    f"takes, and would lose its end; shorten it: {text[:80]!r}"
                )


def size_of(family: Family, folder: Folder, model: Model) -> ModelSize:
    """What a model holds: numbers of each part, and of the trained networks what LoRA and activations go by."""
    geometry, request = geometry_of(family, folder), request_for(model)
    networks = []
    for name in family.network_names(folder.parts):
        shapes, settings = folder.shapes(name), folder.settings(name)
        blocks, width = transformer_size(settings)
        endings = [e for group in model.lora.targets for e in family.target_groups.get(group, ())]
        trained = [math.prod(shape) for key, shape in shapes.items() if key not in family.saved_buffers]
        tokens = family.tokens_of(geometry, request, folder.text_lengths())
        networks.append(Network(sum(trained), len(trained), blocks, width, tokens, lora_layers(shapes, endings)))
    parts = {name: numbers for name in folder.parts if (numbers := folder.numbers(name))}
    return ModelSize(parts, networks, family.encoder_names, family.latent_of(geometry, request))


def transformer_size(settings: Mapping[str, Any]) -> tuple[int, int]:
    """(blocks, channels) of a transformer by its settings; (0, 0) where it is none."""
    if "num_attention_heads" not in settings or "num_layers" not in settings:
        return 0, 0
    heads, width = settings["num_attention_heads"], settings.get("attention_head_dim")
    if not isinstance(heads, int) or not isinstance(width, int):
        return 0, 0
    return settings["num_layers"] + settings.get("num_single_layers", 0), heads * width
