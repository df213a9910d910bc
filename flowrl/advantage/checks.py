"""Checks of a method's options; those of its tensors are in ``inputs``."""

from __future__ import annotations

import math


def check_choice(name: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ValueError unless the option ``name`` is one of ``known``."""
    if value not in known:
        raise ValueError(f"{name}: expected one of {', '.join(known)}, got {value!r}")


def check_number(
    name: str, value: float, least: float = -math.inf, *, strict: bool = False, finite: bool = True
) -> None:
    """Raise ValueError unless ``value`` is a number >= ``least`` (> with ``strict``), and finite unless told otherwise."""
    high_enough = value > least if strict else value >= least
    if not high_enough or (finite and not math.isfinite(value)):
        bound = "" if least == -math.inf else f" {'>' if strict else '>='} {least:g}"
        raise ValueError(f"{name}: expected a {'finite ' if finite else ''}number{bound}, got {value}")


def check_share(name: str, value: float, *, strict: bool = False) -> None:
    """Raise ValueError unless ``value`` is a number in [0, 1] (in (0, 1] with ``strict``)."""
    if not (0 <= value <= 1 and (value > 0 or not strict)):
        raise ValueError(f"{name}: expected a number in {'(' if strict else '['}0, 1], got {value}")
