"""Plain data to frozen dataclasses, from their annotations, collecting every mistake on the way."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import types
from collections.abc import Iterable, Mapping
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from flowrl.config.dialect import KeyPath

_KINDS = {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "nothing"}
_BAD = object()


def build(
    schema: type, value: Any, places: Mapping[KeyPath, str], aliases: Iterable[str] = ()
) -> tuple[Any, list[str]]:
    """Make a ``schema`` (a dataclass) from nested dicts and lists, missing keys taking their defaults.

    Annotations may be bool, int, float, str, Any, Literal, tuples, ``dict[str, ...]``, unions and dataclasses. An int
    is taken for a float; nothing else is converted. ``places`` says where each key path was written; ``aliases`` are
    dotted names that may be suggested wherever an unknown key stands. Returns (instance, []) or (None, all problems).
    """
    builder = _Builder(places, tuple(aliases))
    result = builder.make(schema, value, ())
    return (None if builder.problems else result), builder.problems


@functools.cache
def leaves(schema: type, prefix: str = "") -> tuple[str, ...]:
    """List the dotted names of every setting below a dataclass, sections included."""
    names: list[str] = []
    for name, annotation in fields_of(schema).items():
        names.append(prefix + name)
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            names += leaves(annotation, f"{prefix}{name}.")
    return tuple(names)


@functools.cache
def fields_of(schema: type) -> dict[str, Any]:
    """Map each field of a dataclass to its annotation, resolved."""
    hints = get_type_hints(schema)
    return {field.name: hints[field.name] for field in dataclasses.fields(schema)}


def found(value: Any) -> str:
    """Say what a value is, for a message."""
    if value is None:
        return "nothing (null)"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, dict):
        return "a mapping" if value else "an empty mapping"
    if isinstance(value, list | tuple):
        return f"a list of {len(value)}"
    text = repr(value) if len(repr(value)) <= 60 else repr(value)[:57] + "..."
    return f"{text} ({_KINDS.get(type(value), type(value).__name__)})"


def expected(annotation: Any) -> str:
    """Say what an annotation takes, for a message."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return "one of " + ", ".join(str(option) for option in arguments)
    if origin is tuple and arguments[-1] is Ellipsis:
        return f"a list, each {expected(arguments[0])}"
    if origin is tuple:
        return f"a list of {len(arguments)}, each {expected(arguments[0])}"
    if origin in (Union, types.UnionType):
        return " or ".join(expected(option) for option in arguments)
    if origin is dict or annotation is dict:
        return "a mapping"
    if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
        return f"a section with {', '.join(fields_of(annotation))}"
    return _KINDS.get(annotation, str(annotation))


def nearest(name: str, names: Iterable[str]) -> str | None:
    """Give the name most like ``name``, or None where none is near."""
    close = difflib.get_close_matches(name, list(names), n=1, cutoff=0.6)
    return close[0] if close else None


def _scalar_hint(annotation: Any, value: Any) -> str:
    if annotation is str and type(value) in (bool, int, float):
        return "put it in quotes"
    if annotation is int and type(value) is float and value.is_integer():
        return f"write {value:.0f}"
    if annotation in (int, float) and type(value) is str and value.replace(".", "", 1).isdecimal():
        return "write it without quotes"
    return ""


class _Builder:
    def __init__(self, places: Mapping[KeyPath, str], aliases: tuple[str, ...]) -> None:
        self.places, self.aliases = places, aliases
        self.problems: list[str] = []

    def fail(self, path: KeyPath, what: str) -> Any:
        place = next((self.places[path[:n]] for n in range(len(path), 0, -1) if path[:n] in self.places), "")
        self.problems.append(f"{'.'.join(path)}{f' ({place})' if place else ''}: {what}")
        return _BAD

    def make(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        origin = get_origin(annotation)
        if annotation is Any:
            return self._plain(value, path)
        if dataclasses.is_dataclass(annotation) and isinstance(annotation, type):
            return self._section(annotation, value, path)
        if origin is Literal:
            return self._literal(annotation, value, path)
        if origin is tuple:
            return self._tuple(annotation, value, path)
        if origin is dict:
            return self._dict(annotation, value, path)
        if origin in (Union, types.UnionType):
            return self._union(annotation, value, path)
        return self._scalar(annotation, value, path)

    def _wrong(self, annotation: Any, value: Any, path: KeyPath, hint: str = "") -> Any:
        return self.fail(path, f"expected {expected(annotation)}, found {found(value)}{hint and '; ' + hint}")

    def _scalar(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        if annotation is float and type(value) is int:
            value = float(value) if abs(value) < 1 << 1023 else math.inf
        if annotation is str and isinstance(value, os.PathLike):
            value = os.fspath(value)
        if type(value) is not annotation:
            return self._wrong(annotation, value, path, _scalar_hint(annotation, value))
        if annotation is float and not math.isfinite(value):
            return self._wrong(annotation, value, path, "give a finite number")
        return value

    def _literal(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        options = get_args(annotation)
        # A bool equals 0 or 1 in Python, so types are compared too.
        if any(type(value) is type(option) and value == option for option in options):
            return value
        near = (
            nearest(value, [option for option in options if isinstance(option, str)])
            if isinstance(value, str)
            else None
        )
        return self._wrong(annotation, value, path, f"did you mean {near}?" if near else "")

    def _tuple(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        arguments = get_args(annotation)
        endless = arguments[-1] is Ellipsis
        if not isinstance(value, list | tuple):
            hint = f"write [{value}]" if isinstance(value, str | int | float) and endless else ""
            return self._wrong(annotation, value, path, hint)
        if not endless and len(value) != len(arguments):
            return self._wrong(annotation, value, path)
        kinds = [arguments[0]] * len(value) if endless else arguments
        return tuple(
            self.make(kind, item, (*path, str(index)))
            for index, (kind, item) in enumerate(zip(kinds, value, strict=True))
        )

    def _dict(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        if not isinstance(value, Mapping):
            return self._wrong(annotation, value, path, "write key: value lines")
        result = {}
        for key, item in value.items():
            inner = (*path, str(key))
            if not isinstance(key, str):
                self.fail(inner, f"a key must be text, found {found(key)}; put it in quotes")
            result[key] = self.make(get_args(annotation)[1], item, inner)
        return result

    def _plain(self, value: Any, path: KeyPath) -> Any:
        if isinstance(value, Mapping):
            return self._dict(dict[str, Any], value, path)
        if isinstance(value, list | tuple):
            return [self._plain(item, (*path, str(index))) for index, item in enumerate(value)]
        if value is None or type(value) in (bool, int, str) or (type(value) is float and not math.isnan(value)):
            return value
        return self.fail(path, f"expected text, a number, true or false, a list or a mapping, found {found(value)}")

    def _union(self, annotation: Any, value: Any, path: KeyPath) -> Any:
        for option in get_args(annotation):
            trial = _Builder(self.places, self.aliases)
            result = trial.make(option, value, path)
            if not trial.problems:
                return result
        return self._wrong(annotation, value, path)

    def _section(self, schema: type, value: Any, path: KeyPath) -> Any:
        if not isinstance(value, Mapping):
            return self._wrong(schema, value, path)
        annotations = fields_of(schema)
        for key in value:
            if key not in annotations:
                self.fail((*path, str(key)), self._unknown(str(key), path, annotations))
        made: dict[str, Any] = {}
        for field in dataclasses.fields(schema):
            inner = (*path, field.name)
            if field.name in value:
                made[field.name] = self.make(annotations[field.name], value[field.name], inner)
            elif field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
                made[field.name] = self.fail(inner, f"missing; give {expected(annotations[field.name])}")
        return _BAD if self.problems else schema(**made)

    def _unknown(self, key: str, path: KeyPath, annotations: Mapping[str, Any]) -> str:
        sibling = nearest(key, annotations)
        if sibling:
            return f"unknown key; did you mean {'.'.join([*path, sibling])}?"
        last = {name.rpartition(".")[2] for name in self.aliases}
        elsewhere = nearest(key, last)
        homes = [name for name in self.aliases if name.rpartition(".")[2] == elsewhere]
        if homes:
            return f"unknown key; did you mean {' or '.join(homes[:3])}?"
        return f"unknown key; {'.'.join(path) or 'a recipe'} takes {', '.join(annotations)}"
