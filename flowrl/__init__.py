"""flowrl: online reinforcement learning for diffusion and flow-matching generators.

Public names: ``train``, ``load_run``, ``UserError``. Importing this package imports nothing heavy.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from flowrl.errors import UserError

if TYPE_CHECKING:
    from flowrl.api import load_run, train

__version__ = "0.1.0"
__all__ = ["UserError", "__version__", "load_run", "train"]


def __getattr__(name: str) -> Any:
    """Import ``train`` and ``load_run`` when they are first asked for: they need torch and diffusers."""
    if name in ("load_run", "train"):
        from flowrl import api

        return vars(api)[name]
    raise AttributeError(f"module 'flowrl' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted(__all__)
