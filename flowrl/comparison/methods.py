"""What ``--methods`` names: keys of the methods table, own overrides, or recipes laid over the task's."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from os.path import expanduser, isfile
from pathlib import Path
from typing import Any

from flowrl import registry
from flowrl.config import load, recipes
from flowrl.config.build import nearest
from flowrl.config.dialect import parse
from flowrl.errors import UserError
from flowrl.methods import entries

TASK = frozenset("run_dir seed iterations threads model data rewards failures evaluation checkpoint tracking".split())
"""Sections that a recipe used as a method leaves to the task; the rest is its algorithm."""
OWN = ("run_dir", "seed", "iterations", "threads")
"""Settings that the comparison chooses itself."""

_LABEL = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]*")
_KEYS = (("objective", "objective.name"), ("advantage", "advantage.name"), ("policy_loss", "objective.loss"))


@dataclass(frozen=True)
class Preset:
    """One method: overrides (``key=value`` words) or settings of a recipe, laid over the task. text: as users read it."""

    label: str
    text: str
    words: tuple[str, ...] = ()
    layer: Mapping[str, Any] | None = None


def read_methods(text: str, source: str) -> tuple[list[Preset], list[str]]:
    """Read ``a,b,label:key=value,key=value,file.yaml``; returns the methods and everything that is wrong with them.

    source: the task's CONFIG, whose own settings a recipe's do not repeat.
    """
    presets: list[Preset] = []
    problems: list[str] = []
    for piece in split(text):
        try:
            presets.append(_preset(piece, source))
        except UserError as error:
            problems.append(f"--methods: {error}")
    if not presets and not problems:
        problems.append("--methods: names no method; give some, as in --methods flow_grpo,grpo_guard")
    seen: set[str] = set()
    for preset in presets:
        if preset.label in seen:
            problems.append(
                f"--methods: {preset.label} is given twice; drop one, or name it otherwise, as in other:key=value"
            )
        seen.add(preset.label)
    return presets, problems


def split(text: str) -> list[str]:
    """Cut ``text`` at commas outside brackets and quotes; ``key=value`` joins the labelled method before it.

    >>> split("a,mine:x.y=[1, 2],z=3,b")
    ['a', 'mine:x.y=[1, 2],z=3', 'b']
    """
    joined: list[str] = []
    for part in _cut(text):
        if joined and _is_override(part) and ":" in joined[-1]:
            joined[-1] += f",{part}"
        else:
            joined.append(part)
    return joined


def _cut(text: str) -> list[str]:
    """The parts between commas that stand outside brackets and quotes, without blanks around them or empty ones."""
    pieces, piece, depth, quote = [], "", 0, ""
    for letter in text:
        if quote:
            quote = "" if letter == quote else quote
        elif letter in "'\"":
            quote = letter
        else:
            depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and not quote and depth <= 0:
            pieces.append(piece)
            piece = ""
        else:
            piece += letter
    return [part.strip() for part in (*pieces, piece) if part.strip()]


def _is_override(part: str) -> bool:
    """``key=value`` without a label."""
    head, equals, _ = part.partition("=")
    return bool(equals) and ":" not in head


def _preset(piece: str, source: str) -> Preset:
    label, colon, rest = piece.partition(":")
    if colon and not isfile(piece):  # of os.path: a name too long for a file is none, where pathlib raises
        return _labelled(label.strip(), rest)
    if _is_override(piece):
        raise UserError(f"{piece!r} has no name; write label:key=value, as in mine:{piece}")
    found = _of_table(piece)
    if found is not None:
        return Preset(piece, " ".join(found), tuple(found))
    if piece in recipes() or isfile(expanduser(piece)):
        return _recipe(piece, source)
    names = [name for kind, _ in (*_KEYS, ("kernel", "")) for name in registry.names(kind)]
    near = nearest(piece, dict.fromkeys([*names, *(entry.key for entry in entries()), *recipes()]))
    raise UserError(
        f"unknown method {piece!r}; "
        + (f"did you mean {near}? " if near else "")
        + "Use a key that flowrl methods gives a config for, a recipe or YAML file, or label:key=value"
    )


def _labelled(label: str, rest: str) -> Preset:
    if not _LABEL.fullmatch(label):
        raise UserError(f"{label!r} names a folder, so use letters, digits, _, - and . only")
    words = _cut(rest)
    wrong = [word for word in words if not _is_override(word)]
    if wrong or not words:
        raise UserError(f"{label}: expected key=value after the colon, found {(wrong or [''])[0]!r}")
    taken = [word for word in words if word.partition("=")[0].strip() in OWN]
    if taken:
        raise UserError(
            f"{label}: {taken[0].partition('=')[0]} is the comparison's own; give it for all methods "
            "(iterations=N, --seeds, --out)"
        )
    return Preset(label, " ".join(words), tuple(words))


def _of_table(key: str) -> list[str] | None:
    """The overrides that run a key of the methods table; None for an unknown one, UserError where none or several do."""
    rows = [entry for entry in entries() if entry.key == key]
    ways = sorted({entry.config for entry in rows if entry.config})
    if len(ways) > 1:
        raise UserError(f"{key} names several methods; choose one: " + " or ".join(f"{key}:{way}" for way in ways))
    if ways:
        return shlex.split(ways[0])
    named = [f"{setting}={key}" for kind, setting in _KEYS if key in registry.names(kind)]
    if named:
        return named[:1]
    if rows:
        reason = f" ({rows[0].refusal})" if rows[0].refusal else ""
        raise UserError(
            f"{key}: no config runs this {rows[0].kind} alone{reason}; write label:key=value with its settings"
        )
    return None


def _recipe(name: str, source: str) -> Preset:
    """A recipe's algorithm: its settings outside TASK, and those it inherits up to a recipe that the task inherits too."""
    load(name)  # says all that is wrong with it, such as a circle of bases
    shared = {file for file, _ in _chain(source)}
    layer: dict[str, Any] = {}
    for file, settings in _chain(name):
        if file in shared:
            break
        layer = _under(layer, {key: value for key, value in settings.items() if key not in TASK})
    label = name if name in recipes() else Path(name).stem
    if not _LABEL.fullmatch(label):
        raise UserError(f"{name}: the file's name names a folder, so use letters, digits, _, - and . only")
    if not layer:
        raise UserError(f"{name}: sets nothing but the task ({', '.join(sorted(TASK))}), so it is no method")
    return Preset(label, name, layer=layer)


def _chain(source: str) -> list[tuple[str, dict[str, Any]]]:
    """A readable recipe and those it inherits from, nearest first: where each lies and its own settings."""
    found: list[tuple[str, dict[str, Any]]] = []
    name: str | None = source
    folder = Path()
    while name is not None:
        if name in recipes():
            file: Any = resources.files("flowrl.configs") / f"{name}.yaml"
            inner = Path()
        else:
            file = (folder / Path(name).expanduser()).resolve()
            inner = file.parent
        settings = dict(parse(file.read_bytes().decode("utf-8-sig"), name).value)
        name = settings.pop("base", None)
        found.append((str(file), settings))
        folder = inner
    return found


def _under(high: Mapping[str, Any], low: Mapping[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``: mappings join key by key, anything else replaces."""
    both = {
        key: _under(high[key], value) if isinstance(value, Mapping) and isinstance(high[key], Mapping) else high[key]
        for key, value in low.items()
        if key in high
    }
    return {**low, **high, **both}


def clashes(preset: Preset, overrides: Sequence[str]) -> list[str]:
    """Say which settings of a method the overrides for all methods would change."""
    mine = [word.partition("=")[0].strip() for word in preset.words]
    return [
        f"{preset.label}: sets {key}, and {word!r} sets it for all methods; take one of them away"
        for key in mine
        for word in overrides
        if _overlap(key, word.partition("=")[0].strip())
    ]


def _overlap(one: str, other: str) -> bool:
    return one == other or one.startswith(f"{other}.") or other.startswith(f"{one}.")
