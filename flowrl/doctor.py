"""What this machine has: versions, devices, optional packages, and what the missing ones disable. Never fails."""

from __future__ import annotations

import importlib
import os
import platform
import sys
from dataclasses import dataclass

from flowrl import __version__
from flowrl.performance.environment import CORE, version

_BROKEN = (ImportError, RuntimeError, OSError, AttributeError, TypeError, ValueError)


@dataclass(frozen=True)
class Extra:
    """An optional group of packages: the modules that must import, and what is off without them."""

    name: str
    modules: tuple[str, ...]
    disables: str


EXTRAS = (
    Extra(
        "clip",
        ("open_clip", "torchvision"),
        "rewards of your own that use open-clip or torchvision (converted checkpoints run over transformers without them)",
    ),
    Extra("xformers", ("xformers",), "diffusers' xformers attention backend; PyTorch's own attention is used"),
    Extra(
        "ocr",
        ("rapidocr", "onnxruntime"),
        "the rewards ocr and its kin on rapidocr (ocr_tesseract uses the tesseract program instead)",
    ),
    Extra("wan", ("ftfy",), "the adapter wan_image, whose diffusers pipeline cleans prompts with it"),
    Extra("deepspeed", ("deepspeed",), "distributed.sharding=zero1, zero2, zero3; fsdp2 needs no package"),
    Extra("wandb", ("wandb",), "tracking.wandb; metrics.jsonl is always written"),
    Extra("swanlab", ("swanlab",), "tracking.swanlab; metrics.jsonl is always written"),
    Extra("trackio", ("trackio",), "tracking.trackio; metrics.jsonl is always written"),
    Extra("trl", ("trl",), "flowrl.integrations.trl: the estimators inside TRL's trainer"),
    Extra("tensorboard", ("tensorboard",), "tracking.tensorboard; metrics.jsonl is always written"),
)


def doctor_text() -> str:
    """Describe the machine in a few lines of plain text, one fact a line."""
    lines = [
        f"flowrl {__version__}",
        f"python {platform.python_version()} ({sys.executable}), {platform.platform()}",
        "",
    ]
    lines += [f"  {name:<14}{version(name) or 'MISSING: run pip install flowrl again'}" for name in CORE]
    lines += ["", "devices", *(f"  {line}" for line in devices()), "", "extras"]
    for extra in EXTRAS:
        problems = [problem for module in extra.modules if (problem := import_problem(module))]
        if problems:
            lines.append(f"  {extra.name:<14}off: {'; '.join(problems)}")
            lines.append(f"  {'':<14}disables {extra.disables}; pip install 'flowrl[{extra.name}]'")
        else:
            lines.append(f"  {extra.name:<14}on")
    return "\n".join(lines)


def import_problem(module: str) -> str:
    """Import a module and return "", or why it cannot be used, in one line.

    A package may be installed and still fail: a torchvision built for CUDA raises RuntimeError beside a CPU torch.
    """
    try:
        importlib.import_module(module)
    except ModuleNotFoundError as error:
        return (
            f"{module} is not installed"
            if error.name == module
            else f"{module} needs {error.name}, which is not installed"
        )
    except _BROKEN as error:
        text = " ".join(str(error).split()) or type(error).__name__
        return f"{module} is installed and does not import ({type(error).__name__}: {text[:100]})"
    return ""


def devices() -> list[str]:
    """List processors and accelerators, one a line."""
    problem = import_problem("torch")
    lines = [f"cpu: {os.cpu_count()} cores"]
    if problem:
        return [*lines, f"accelerators unknown: {problem}"]
    import torch

    lines[0] += f", torch uses {torch.get_num_threads()} threads"
    try:
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            lines.append(f"cuda:{index}: {card.name}, {card.total_memory / 2**30:.1f} GiB")
        if torch.backends.mps.is_available():
            lines.append("mps: available")
    except _BROKEN as error:
        lines.append(f"accelerators cannot be listed ({type(error).__name__}: {error})")
    return lines if len(lines) > 1 else [*lines, "no accelerator: runs on the CPU"]
