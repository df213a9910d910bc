"""The YAML that recipes are written in: the 1.2 core types, unique keys, and a place for every value.

``true`` and ``false`` are the only booleans (``no`` and ``on`` are text), ``1e-4`` is a number, dates are text, and
no tag makes an object. What is dumped here is read back equal."""

from __future__ import annotations

import re
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

import yaml

from flowrl.errors import UserError

KeyPath = tuple[str, ...]

_TAG = "tag:yaml.org,2002:"
_ALLOWED = frozenset(_TAG + name for name in ("str", "int", "float", "bool", "null", "map", "seq", "merge"))
_PLAIN = (
    ("bool", r"true|True|TRUE|false|False|FALSE", "tTfF"),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", "-+0123456789"),
    ("float", r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?", "-+.0123456789"),
    ("float", r"[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)", "-+."),
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("merge", r"<<", "<"),
)


class ConfigError(UserError):
    """Every mistake found in a configuration, one a line. ``problems`` holds the lines."""

    def __init__(self, problems: list[str]) -> None:
        self.problems = tuple(problems)
        count = "1 error" if len(problems) == 1 else f"{len(problems)} errors"
        super().__init__("\n  ".join([f"{count} in the configuration:", *problems]))


def _resolvers() -> dict[str, list[tuple[str, re.Pattern[str]]]]:
    table: dict[str, list[tuple[str, re.Pattern[str]]]] = {}
    for tag, pattern, first in _PLAIN:
        for letter in first:
            table.setdefault(letter, []).append((_TAG + tag, re.compile(f"^(?:{pattern})$")))
    return table


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = _resolvers()


class Dumper(yaml.SafeDumper):
    """Quotes exactly the text that the loader would otherwise read as something else."""

    yaml_implicit_resolvers = _resolvers()

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _integer(loader: _Loader, node: yaml.ScalarNode) -> int:
    text = node.value
    return int(text, 0) if text[:2] in ("0o", "0x") else int(text)


_Loader.add_constructor(_TAG + "int", _integer)
_Loader.add_constructor(_TAG + "float", lambda loader, node: _real(node.value))


def _real(text: str) -> float:
    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))


@dataclass
class Document:
    """A parsed document: its value and, for each key path, where it was written."""

    value: Any
    places: dict[KeyPath, str] = field(default_factory=dict)


def parse(text: str, name: str, *, lines: bool = True) -> Document:
    """Read one YAML document. ``name`` stands in messages, with the line where ``lines`` is set.

    Raises UserError for text that is not YAML, a tag, or a value that contains itself, and ConfigError for duplicate
    keys.
    """
    reader = _Reader(name, lines)
    try:
        loader = _Loader(text)
        try:
            node = loader.get_single_node()
            document = Document(None if node is None else reader.read(loader, node, ()), reader.places)
        finally:
            loader.dispose()
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        what = error.problem or "cannot be read"
        if what.startswith("but ") and error.context:  # the other half of the sentence
            what = f"{error.context}, {what}"
        raise UserError(
            f"{reader.place(mark)}: not valid YAML: {what}; mend the line, or put the text in quotes"
        ) from error
    except RecursionError as error:
        raise UserError(f"{name}: not valid YAML: nested too deeply; write it flatter") from error
    except yaml.YAMLError as error:
        raise UserError(
            f"{name}: not valid YAML: {' '.join(str(error).split())}; save it as plain UTF-8 text"
        ) from error
    if reader.problems:
        raise ConfigError(reader.problems)
    return document


class _Reader:
    """Turns nodes into plain data, noting places and duplicate keys on the way."""

    def __init__(self, name: str, lines: bool) -> None:
        self.name, self.lines = name, lines
        self.places: dict[KeyPath, str] = {}
        self.problems: list[str] = []
        self._open: set[int] = set()

    def place(self, mark: Any) -> str:
        return f"{self.name}:{mark.line + 1}" if self.lines and mark is not None else self.name

    def read(self, loader: _Loader, node: yaml.Node, path: KeyPath) -> Any:
        if id(node) in self._open:
            raise yaml.constructor.ConstructorError(None, None, "an anchor contains itself", node.start_mark)
        if node.tag not in _ALLOWED:
            raise yaml.constructor.ConstructorError(None, None, f"the tag {node.tag!r} is not allowed", node.start_mark)
        self.places.setdefault(path, self.place(node.start_mark))
        self._open.add(id(node))
        try:
            if isinstance(node, yaml.MappingNode):
                return self._mapping(loader, node, path)
            if isinstance(node, yaml.SequenceNode):
                return [self.read(loader, item, (*path, str(index))) for index, item in enumerate(node.value)]
            return self._scalar(loader, node)
        finally:
            self._open.discard(id(node))

    def _scalar(self, loader: _Loader, node: yaml.Node) -> Any:
        try:
            return loader.construct_object(node)
        except ValueError as error:  # such as an explicit !!int before text, or a number of thousands of digits
            raise yaml.constructor.ConstructorError(None, None, str(error), node.start_mark) from error

    def _mapping(self, loader: _Loader, node: yaml.MappingNode, path: KeyPath) -> dict[Any, Any]:
        seen: dict[Hashable, Any] = {}
        for key_node, _ in node.value:
            key = self._key(loader, key_node)
            if key in seen:
                first = f"line {seen[key].line + 1}" if self.lines else "before"
                dotted = ".".join([*path, str(key)])
                self.problems.append(
                    f"{dotted} ({self.place(key_node.start_mark)}): given twice, first at {first}; keep one"
                )
            seen.setdefault(key, key_node.start_mark)
        loader.flatten_mapping(node)
        result = {}
        for key_node, value_node in node.value:
            key = self._key(loader, key_node)
            inner = (*path, str(key))
            self.places[inner] = self.place(key_node.start_mark)
            result[key] = self.read(loader, value_node, inner)
        return result

    def _key(self, loader: _Loader, node: yaml.Node) -> Hashable:
        if not isinstance(node, yaml.ScalarNode):
            raise yaml.constructor.ConstructorError(None, None, "a key must be plain text", node.start_mark)
        # A merge key is flattened away afterwards; until then it counts like any other.
        return "<<" if node.tag == _TAG + "merge" else self._scalar(loader, node)
