"""The packages behind the optional trackers, and the errors of theirs that a user can mend."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

from flowrl.errors import UserError

MODULES: Mapping[str, str] = MappingProxyType(
    {"tensorboard": "torch.utils.tensorboard", "wandb": "wandb", "swanlab": "swanlab", "trackio": "trackio"}
)
"""Tracker -> the module that it stands on; the extra that installs it is called like the tracker."""


def load(key: str) -> Any:
    """Import the package of a tracker. Raises UserError with the pip command where it is missing or broken."""
    off = f"tracking.{key}=false" if key == "tensorboard" else f"tracking.{key}.mode=off"
    try:
        return importlib.import_module(MODULES[key])
    except ImportError as error:
        raise UserError(
            f"tracking.{key} is on, but {key} is not installed: pip install 'flowrl[{key}]', or set {off} ({error})"
        ) from error


def start(key: str, call: Callable[[], Any]) -> Any:
    """Start a run with a service. Raises UserError for whatever it refuses (no login, no such project)."""
    try:
        return call()
    except Exception as error:
        first = next(iter(str(error).strip().splitlines()), "")
        raise UserError(
            f"tracking.{key}: the run cannot be started there: {type(error).__name__}: {first}; log in to {key}, or use "
            f"tracking.{key}.mode=offline"
        ) from error


def numbers(values: Mapping[str, Any]) -> dict[str, float]:
    """What can be plotted of a metrics row: numbers and truth values; None (not finite), texts and lists stay out."""
    return {name: value for name, value in values.items() if isinstance(value, (bool, int, float))}
