"""Which packages, in which versions, a process runs on."""

from __future__ import annotations

from importlib import metadata

CORE = (
    "torch",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "numpy",
    "scipy",
    "pillow",
    "pyyaml",
    "tqdm",
)
"""What flowrl needs in any case."""


def version(distribution: str) -> str | None:
    """Give the installed version of a package, or None."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None
