"""Whether a model fits its settings, its prompts and the accelerator, before weights are read; and the memory of a plan."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from flowrl import cost, registry
from flowrl.config.families import family_of
from flowrl.config.model import require
from flowrl.config.schema import Config
from flowrl.distributed.launch import require as require_deepspeed
from flowrl.distributed.launch import world_size
from flowrl.errors import UserError
from flowrl.performance.memory import Division, Memory, ModelSize, Settings, activations, memory_of_part
from flowrl.protocols import ModelFamily
from flowrl.records import PromptRow
from flowrl.rollout.requests import request_of

if TYPE_CHECKING:
    import torch

GIB = 2**30
HELD_BACK = 0.06
"""Part of an accelerator's memory that the driver, kernels and fragments take: a rule of thumb, not measured here."""


def check_model(config: Config, rows: Sequence[PromptRow], held: int | None) -> None:
    """Raise UserError for what is known to be wrong with the model, its prompts or its memory before weights are read.

    held: bytes of the accelerator, None for a CPU.
    """
    require(config.model)
    require_deepspeed(config.distributed.sharding)
    family = registry.resolve("pipeline", config.model.adapter)
    if not isinstance(family, ModelFamily):
        return
    requests = [request_of(config, row) for row in rows]
    family.check(config.model, list(dict.fromkeys(text for r in requests for text in (r.prompt, r.negative))))
    size = size_of(config) if held is not None and config.model.memory_check else None
    if held is not None and size is not None:
        problem = shortage(config, size, held)
        if problem:
            raise UserError(problem)


def settings_of(config: Config) -> Settings:
    model = config.model
    return Settings(
        lora_rank=model.lora.rank if model.train == "lora" else 0,
        dtype=model.dtype,
        ema=config.ema.decay > 0,
        micro_batch=min(config.batch.micro_batch, config.batch.samples),
        branches=cost.branches_of(config) if config.rollout.cfg_gradient == "full" else 1,
        activation_checkpointing=model.activation_checkpointing,
        free_text_encoders=model.free_text_encoders,
    )


def size_of(config: Config) -> ModelSize | None:
    """What the config's model holds; None where its files are not on this machine, or its adapter cannot tell."""
    family = registry.resolve("pipeline", config.model.adapter)
    size: ModelSize | None = family.size(config.model) if isinstance(family, ModelFamily) else None
    return size


def lines(config: Config, size: ModelSize | None, latents: int | None) -> list[str]:
    """The memory section of a plan. latents: bytes of the latents kept for the update, None where unknown."""
    if size is None:
        return [
            f"memory: known once the files of {config.model.path} are on this machine; this one has not downloaded them"
        ]
    settings, split = settings_of(config), split_of(config)
    made = memory_of_part(size, settings, split)
    parts = ", ".join(f"{name} {_amount(held)}" for name, held in sorted(made.parts.items(), key=lambda item: -item[1]))
    rows = [
        ("weights", f"{_amount(made.weights)}  ({parts})"),
        *([("LoRA", _amount(made.trained))] if made.trained else []),
        ("gradients", _amount(made.gradients)),
        ("optimizer", _amount(made.optimizer)),
        *([("average", _amount(made.average))] if made.average else []),
        *(
            [("reference", f"{_amount(made.reference)}  (a copy of the weights at the start)")]
            if made.reference
            else []
        ),
        *([("latents", _amount(latents))] if latents is not None else []),
        ("activations", _activations(made, settings)),
        (
            "together",
            _amount(made.total + (latents or 0)) + "  (rewards, decoding and the objective's own copies aside)",
        ),
    ]
    width = max(len(name) for name, _ in rows)
    return [f"memory of one process{_sharing(config, split)}", *(f"  {name:<{width}}  {text}" for name, text in rows)]


def split_of(config: Config) -> Division:
    """By ``distributed``, and the launcher's number of processes where it names none."""
    how = config.distributed
    return (
        Division()
        if how.sharding == "none"
        else Division(world=_launched(config), gather=how.gather, sharding=how.sharding)
    )


def _launched(config: Config) -> int:
    return config.distributed.processes or world_size(os.environ)


def _sharing(config: Config, split: Division) -> str:
    sharding = config.distributed.sharding
    if sharding == "none":
        return ""
    if split.world == 1:
        return f", undivided: distributed.processes=N says between how many {sharding} divides it"
    how = f"distributed.gather={split.gather}" if sharding == "fsdp2" else f"distributed.sharding={sharding}"
    return f" of {split.world} at its fullest, {how}"


def _activations(made: Memory, settings: Settings) -> str:
    if made.activations is None:
        return "not estimated for this network"
    how = ", checkpointed" if settings.activation_checkpointing else ""
    return f"about {_amount(made.activations)}  (an estimate for {settings.micro_batch} samples a call{how})"


def _amount(held: int) -> str:
    return f"{held / GIB:,.2f} GiB" if held >= GIB / 10 else f"{held / 2**20:,.2f} MiB"


def device_bytes(device: torch.device | None = None) -> int | None:
    """Memory of an accelerator (None: the first of this machine); None for a CPU."""
    import torch

    if device is None:
        device = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")
    return torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else None


def shortage(config: Config, size: ModelSize, held: int) -> str:
    """Say what does not fit ``held`` bytes and what would, or "" where it fits."""
    settings, split = settings_of(config), split_of(config)
    made, room = memory_of_part(size, settings, split), int(held * (1 - HELD_BACK))
    if made.total <= room:
        return ""
    beside = "; model.memory_check=false goes on all the same"
    each = activations(size, replace(settings, micro_batch=1)) or 0
    fit = (room - made.certain) // each if each else 0
    if fit > 0 and memory_of_part(size, replace(settings, micro_batch=fit), split).total <= room:
        return (
            f"batch.micro_batch: {settings.micro_batch} samples a call take about {_amount(made.total)}, and the accelerator "
            f"has {_amount(held)}; use at most {fit}{_or_checkpoint(settings)}{beside}"
        )
    ways = _savings(config, size, settings, split, room)
    return (
        f"model: the plan takes about {_amount(made.certain + each)} with one sample a call, and the accelerator has "
        f"{_amount(held)}; " + (f"use {ways}" if ways else "use a larger one, or a smaller model") + beside
    )


def _or_checkpoint(settings: Settings) -> str:
    return "" if settings.activation_checkpointing else ", or model.activation_checkpointing=true"


def _savings(config: Config, size: ModelSize, settings: Settings, split: Division, room: int) -> str:
    """The first setting, or row of them, that makes one sample a call fit; "" where none does."""
    tried, words = replace(settings, micro_batch=1), ["batch.micro_batch=1"]
    steps: tuple[tuple[str, dict[str, Any], dict[str, Any]], ...] = (
        ("model.activation_checkpointing=true", {"activation_checkpointing": True}, {}),
        ("model.free_text_encoders=true", {"free_text_encoders": True}, {}),
        ("distributed.gather=block", {}, {"gather": "block"}),
        (
            "distributed.sharding=fsdp2 distributed.gather=block",
            {},
            {"sharding": "fsdp2", "gather": "block", "world": _launched(config)},
        ),
        ("model.train=lora", {"lora_rank": config.model.lora.rank}, {}),
        ("model.dtype=bf16", {"dtype": "bf16"}, {}),
    )
    direct = family_of(config.objective.name) == "direct"
    for word, change, cut in steps:
        changed, other = replace(tried, **change), replace(split, **cut)
        if (word == "model.train=lora" and split.sharding == "zero3") or (cut and direct):
            continue  # refused
        if memory_of_part(size, changed, other).total >= memory_of_part(size, tried, split).total:
            continue
        tried, split = changed, other
        words.append(word)
        if memory_of_part(size, tried, split).total <= room:
            return " ".join(words)
    return ""
