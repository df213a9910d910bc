"""An upstream ``.pt``, read once with ``weights_only=True``, becomes safetensors that rewards load.

kinds: ``plain`` keeps the names (aesthetic and other heads); ``open_clip`` renames open_clip's CLIP to transformers'
(HPSv2.1); ``head`` splits a network with ``rm_head.*`` into model.safetensors and head.safetensors (HPSv3, VideoReward).
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from pickle import UnpicklingError
from types import MappingProxyType
from typing import Any

import torch

from flowrl.errors import UserError

Tensors = dict[str, torch.Tensor]
_BLOCK = MappingProxyType(
    {
        "ln_1": "layer_norm1",
        "ln_2": "layer_norm2",
        "mlp.c_fc": "mlp.fc1",
        "mlp.c_proj": "mlp.fc2",
        "attn.out_proj": "self_attn.out_proj",
    }
)
_OPEN_CLIP = MappingProxyType(
    {
        "logit_scale": "logit_scale",
        "visual.class_embedding": "vision_model.embeddings.class_embedding",
        "visual.conv1.weight": "vision_model.embeddings.patch_embedding.weight",
        "visual.positional_embedding": "vision_model.embeddings.position_embedding.weight",
        "visual.ln_pre.weight": "vision_model.pre_layrnorm.weight",
        "visual.ln_pre.bias": "vision_model.pre_layrnorm.bias",
        "visual.ln_post.weight": "vision_model.post_layernorm.weight",
        "visual.ln_post.bias": "vision_model.post_layernorm.bias",
        "token_embedding.weight": "text_model.embeddings.token_embedding.weight",
        "positional_embedding": "text_model.embeddings.position_embedding.weight",
        "ln_final.weight": "text_model.final_layer_norm.weight",
        "ln_final.bias": "text_model.final_layer_norm.bias",
    }
)
_PROJECTIONS = MappingProxyType(
    {"visual.proj": "visual_projection.weight", "text_projection": "text_projection.weight"}
)


def read_upstream(path: str) -> Tensors:
    """Tensors of a ``.pt`` or ``.pth`` state dict (``weights_only``: no code is run) or of a ``.safetensors`` file.

    A dict that holds the state dict under "state_dict" or "model" is opened, and a common "module." is taken off. Raises
    UserError for anything else.
    """
    file = Path(path)
    if not file.is_file():
        raise UserError(f"convert: no file {path!r}")
    if file.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(file)
    try:
        found: Any = torch.load(file, map_location="cpu", weights_only=True)
    except (UnpicklingError, RuntimeError, OSError, EOFError, ValueError) as error:
        first = str(error).strip().splitlines()[0]
        raise UserError(
            f"convert: {path!r} is no file of plain tensors ({first}); objects in it would run code when read, so ask its "
            "author for a state dict or safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    if not isinstance(found, Mapping) or not found or not all(isinstance(v, torch.Tensor) for v in found.values()):
        raise UserError(f"convert: {path!r} holds {type(found).__name__}, not a dict of named tensors")
    shared = all(str(name).startswith("module.") for name in found)
    return {str(name)[7 if shared else 0 :]: value.contiguous() for name, value in found.items()}


def open_clip_to_transformers(tensors: Mapping[str, torch.Tensor]) -> Tensors:
    """Rename open_clip's CLIP (ViT) to ``transformers.CLIPModel``: attention split into q, k, v, projections transposed.

    Raises UserError for a name that is not of such a network.
    """
    out: Tensors = {}
    for name, value in tensors.items():
        if name == "attn_mask":  # a constant that some files carry
            continue
        if name in _OPEN_CLIP:
            out[_OPEN_CLIP[name]] = value
        elif name in _PROJECTIONS:
            out[_PROJECTIONS[name]] = value.T.contiguous()
        else:
            out |= _block(name, value)
    return out


def _block(name: str, value: torch.Tensor) -> Tensors:
    side = "vision_model" if name.startswith("visual.") else "text_model"
    head, found, rest = name.removeprefix("visual.").partition("transformer.resblocks.")
    place, _, part = rest.partition(".")
    if head or not found or not place.isdigit():
        raise UserError(f"convert: {name!r} is no weight of open_clip's CLIP; use kind plain, or check the file")
    base = f"{side}.encoder.layers.{place}"
    module, _, leaf = part.rpartition(".")
    if part in ("attn.in_proj_weight", "attn.in_proj_bias"):
        kind = part.removeprefix("attn.in_proj_")
        pieces = value.chunk(3)
        return {f"{base}.self_attn.{p}_proj.{kind}": v.contiguous() for p, v in zip("qkv", pieces, strict=True)}
    if module not in _BLOCK:
        raise UserError(f"convert: {name!r} is no weight of open_clip's CLIP; use kind plain, or check the file")
    return {f"{base}.{_BLOCK[module]}.{leaf}": value}


def _plain(tensors: Tensors) -> dict[str, Tensors]:
    return {"head.safetensors": tensors}


def _open_clip(tensors: Tensors) -> dict[str, Tensors]:
    return {"model.safetensors": open_clip_to_transformers(tensors)}


def _head(tensors: Tensors) -> dict[str, Tensors]:
    head = {name: value for name, value in tensors.items() if name.startswith("rm_head.")}
    if not head:
        raise UserError("convert: the file has no rm_head.*; use kind plain")
    return {
        "model.safetensors": {name: value for name, value in tensors.items() if name not in head},
        "head.safetensors": head,
    }


KINDS: Mapping[str, Callable[[Tensors], dict[str, Tensors]]] = MappingProxyType(
    {"plain": _plain, "open_clip": _open_clip, "head": _head}
)


def convert(kind: str, source: str, folder: str, base: str = "") -> list[str]:
    """Write the safetensors of an upstream file to a folder; return the paths written, sorted.

    base: a local folder whose config, tokenizer and preprocessor files (.json, .txt, .model) are copied beside them.
    Raises UserError for an unknown kind, an unusable file, or files that are there already (nothing is overwritten).
    """
    from safetensors.torch import save_file

    if kind not in KINDS:
        raise UserError(f"convert: kind is {kind!r}; use {', '.join(KINDS)}")
    if base and not Path(base).is_dir():
        raise UserError(f"convert: no folder {base!r}; give a local copy of the base model")
    parts = KINDS[kind](read_upstream(source))
    target = Path(folder)
    copied = sorted(f for f in Path(base).iterdir() if f.suffix in (".json", ".txt", ".model")) if base else []
    copied = [f for f in copied if not f.name.endswith(".index.json")]
    there = [name for name in (*parts, *(f.name for f in copied)) if (target / name).exists()]
    if there:
        raise UserError(f"convert: {str(target / there[0])!r} is there already; give an empty folder")
    target.mkdir(parents=True, exist_ok=True)
    for name, tensors in parts.items():
        save_file({key: value.clone() for key, value in tensors.items()}, target / name, {"format": "pt"})
    for file in copied:
        shutil.copyfile(file, target / file.name)
    return sorted(str(target / name) for name in (*parts, *(f.name for f in copied)))
