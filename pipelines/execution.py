"""How a loaded network and its autoencoder are run: activation checkpointing, compiled blocks, attention, tiles and slices."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any

import torch

from flowrl.errors import UserError

COMPILER = "inductor"
"""Backend of torch.compile; tests take one that needs no C++ compiler."""


def checkpoint_activations(network: Any) -> None:
    """Keep the input of each block alone during a forward with gradient; the rest is computed again in the backward."""
    try:
        network.enable_gradient_checkpointing()
    except ValueError as error:
        raise UserError(
            f"model.activation_checkpointing: {type(network).__name__} has none ({error}); set it to false"
        ) from error


def compile_blocks(network: torch.nn.Module, names: Collection[str]) -> int:
    """Compile each module whose class is one of ``names``, in place (parameters keep their names); returns how many.

    One graph serves all blocks of a class, so this takes a fraction of the time of compiling the whole network. Switching
    LoRA off or on makes a graph of its own: torch guards the flag.
    """
    blocks = [module for module in network.modules() if type(module).__name__ in names]
    if not blocks:
        raise UserError(
            f"model.compile: {type(network).__name__} has no block that repeats; use none"
            + (f" (looked for {', '.join(names)})" if names else "")
        )
    for block in blocks:
        block.compile(backend=COMPILER)
    return len(blocks)


def choose_attention(network: Any, backend: str, device: torch.device) -> None:
    """Run the network's attention on ``backend``; other models in the process keep theirs.

    Networks that dispatch their attention take every backend; the older ones (SD3, UNets) call torch's own, and take
    xformers by processors of their own. Raises UserError where the backend would change nothing or cannot run.
    """
    if device.type != "cuda":
        raise UserError(f"model.attention: {backend} runs on a GPU alone, and this run is on {device.type}; use native")
    processors = [module.processor for module in network.modules() if hasattr(module, "processor")]
    try:
        if any(hasattr(processor, "_attention_backend") for processor in processors):
            from diffusers.models.attention_dispatch import attention_backend

            with attention_backend("native"):  # set_attention_backend changes that of the whole process as well
                network.set_attention_backend(backend)
        elif backend == "xformers":
            network.enable_xformers_memory_efficient_attention()
        else:
            raise UserError(
                f"model.attention: {type(network).__name__} calls torch's own attention, which chooses a flash kernel by "
                f"itself, so {backend} would change nothing; use native or xformers"
            )
    except (RuntimeError, ValueError, ImportError, NotImplementedError) as error:
        raise UserError(f"model.attention: {backend} cannot run here: {error}; use native") from error


def divide_work(vae: Any, tiling: bool, slicing: bool) -> None:
    """Let the autoencoder work tile by tile (large pictures) or picture by picture (large batches)."""
    for wanted, key, method in ((tiling, "vae_tiling", "enable_tiling"), (slicing, "vae_slicing", "enable_slicing")):
        if not wanted:
            continue
        if not hasattr(vae, method):
            raise UserError(f"model.{key}: {type(vae).__name__} has none; set it to false")
        getattr(vae, method)()


def free_encoders(pipe: Any, names: Sequence[str]) -> None:
    """Take the named encoders off a pipeline and give their memory back."""
    for name in names:
        setattr(pipe, name, None)
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
