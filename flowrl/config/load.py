"""Recipes to configurations, strictly: every unknown key, wrong type and duplicate is an error with its place.

Precedence, lowest first: the schema's defaults, the recipes named by ``base:`` (the outermost last), the recipe, the
overrides."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from importlib import resources
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Any, TypeVar

from flowrl.config.build import build, found, leaves, nearest
from flowrl.config.dialect import ConfigError, Document, KeyPath, parse
from flowrl.config.render import to_mapping, to_plain
from flowrl.config.schema import Config
from flowrl.errors import UserError

Schema = TypeVar("Schema")
# Recipes of a schema other than Config begin with its family.
FAMILIES = ("text_",)


def recipes(family: str = "") -> list[str]:
    """Name the shipped recipes of a family (one of FAMILIES, or "" for those of Config), sorted."""
    names = sorted(item.name.removesuffix(".yaml") for item in _shipped().iterdir() if item.name.endswith(".yaml"))
    return [name for name in names if (name.startswith(family) if family else not name.startswith(FAMILIES))]


def load(source: str | Path | Mapping[str, Any], overrides: Sequence[str] = ()) -> Config:
    """Build a Config from a YAML file, the name of a shipped recipe, or a mapping, with ``key.sub=value`` overrides
    on top.

    The name of a shipped recipe means that recipe; write ``./demo`` for a file that is called so. Override values are
    YAML, and ``rewards.0.weight=2`` reaches into a list. Raises UserError for a source that cannot be read, and
    ConfigError with all unknown keys, wrong types and bad overrides at once. Checks across fields are ``validate``'s.
    """
    return load_as(Config, source, overrides)


def load_as(
    schema: type[Schema], source: str | Path | Mapping[str, Any], overrides: Sequence[str] = (), family: str = ""
) -> Schema:
    """Build another schema, a frozen dataclass whose fields all have defaults, as ``load`` builds a Config.

    family: which shipped recipes are its own, see ``recipes``.
    """
    if isinstance(source, Mapping):
        merged, places = _inherit(Document(to_plain(source)), "the mapping", Path(), (), family)
    else:
        merged, places = _read(source, Path(), (), "", family)
    merged = _merge(to_plain(schema()), merged)
    problems: list[str] = []
    for text in overrides:
        problems += _override(merged, text, places)
    kind: type = schema
    config, more = build(kind, merged, places, leaves(kind))
    if problems or more:
        raise ConfigError([*problems, *more])
    return _as(schema, config)


def from_mapping(mapping: Mapping[str, Any]) -> Config:
    """Build a Config from nested mappings, as strictly as from a file."""
    return load(mapping)


def replace(config: Config, changes: Mapping[str, Any]) -> Config:
    """Return ``config`` with dotted keys changed, as in ``replace(config, {"rollout.steps": 4, "rewards.0.weight":
    2.0})``.

    Raises ConfigError as ``load`` does.
    """
    plain = to_mapping(config)
    places: dict[KeyPath, str] = {}
    problems = [
        p for key, value in changes.items() for p in _set(plain, tuple(key.split(".")), to_plain(value), "change")
    ]
    built, more = build(Config, plain, places, leaves(Config))
    if problems or more:
        raise ConfigError([*problems, *more])
    return _as(Config, built)


def parse_arguments(items: Sequence[str]) -> dict[str, Any]:
    """Read ``key=value`` words, values as YAML, into a flat dict. Raises ConfigError for words of another form."""
    arguments: dict[str, Any] = {}
    problems = [problem for text in items for problem in _override(arguments, text, {})]
    if problems:
        raise ConfigError(problems)
    return arguments


def _as(schema: type[Schema], value: Any) -> Schema:
    if not isinstance(value, schema):
        raise TypeError(f"build returned {type(value).__name__} and no problem")
    return value


def _shipped() -> Traversable:
    return resources.files("flowrl.configs")


def _find(source: str | Path, folder: Path, origin: str, family: str) -> tuple[Traversable | Path, str]:
    """The file that ``source`` names, and what to call it in messages. origin: who names it, "" for the user."""
    name = str(source)
    known = recipes(family)
    if isinstance(source, str) and name in known:
        return _shipped() / f"{name}.yaml", f"{name}.yaml"
    path = folder / Path(name).expanduser()
    if path.is_dir():
        inside = path / "config.yaml"
        advice = f"give {inside}" if inside.is_file() else "give a YAML file"
        raise UserError(f"{origin}{name}: is a folder, not a recipe; {advice}")
    if not path.is_file():
        near = nearest(Path(name).stem, known)
        advice = f"did you mean {near}? Shipped are" if near else "give a YAML file or one of"
        raise UserError(f"{origin}{name}: no such file or recipe; {advice} {', '.join(known)}")
    return path, name


def _read(
    source: str | Path, folder: Path, trail: tuple[str, ...], origin: str, family: str
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    file, name = _find(source, folder, origin, family)
    if str(file) in trail:
        chain = " -> ".join(Path(item).name for item in (*trail, str(file)))
        raise UserError(f"base: recipes inherit from each other in a circle ({chain}); remove one of the base lines")
    try:
        data = file.read_bytes()
    except OSError as error:
        raise UserError(f"{name}: cannot be read ({error.strerror}); check the file's permissions") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: not UTF-8 (byte 0x{data[error.start]:02x}); save the file as UTF-8") from error
    inner = file.parent if isinstance(file, Path) else Path()
    return _inherit(parse(text, name), name, inner, (*trail, str(file)), family)


def _inherit(
    document: Document, name: str, folder: Path, trail: tuple[str, ...], family: str
) -> tuple[dict[str, Any], dict[KeyPath, str]]:
    value, places = document.value, document.places
    if value is None:
        raise UserError(f"{name}: the recipe is empty; write settings such as 'iterations: 100', or 'base: demo'")
    if not isinstance(value, dict):
        raise UserError(f"{name}: expected a mapping of settings, found {found(value)}; write key: value lines")
    if "base" not in value:
        return value, places
    base = value.pop("base")
    where = f"base ({places[('base',)]})" if ("base",) in places else "base"
    if not isinstance(base, str):
        raise UserError(f"{where}: expected the name or path of a recipe, found {found(base)}")
    below, places_below = _read(base, folder, trail, f"{where}: ", family)
    kept = {path: place for path, place in places_below.items() if not _replaced(value, path)}
    return _merge(below, value), kept | places


def _replaced(value: Any, path: KeyPath) -> bool:
    """Whether a mapping laid over another one replaces what stood at ``path``."""
    for key in path:
        if not isinstance(value, dict):
            return True
        if key not in value:
            return False
        value = value[key]
    return True


def _merge(low: Mapping[str, Any], high: Mapping[str, Any]) -> dict[str, Any]:
    """``high`` over ``low``: mappings join key by key, anything else (a list too) replaces."""
    merged = dict(low)
    for key, value in high.items():
        below = merged.get(key)
        both = isinstance(value, Mapping) and isinstance(below, Mapping)
        merged[key] = _merge(below, value) if both and below is not None else value
    return merged


def _override(root: dict[str, Any], text: str, places: dict[KeyPath, str]) -> list[str]:
    """Apply one ``key.sub=value`` in place; returns what is wrong with it."""
    dotted, equals, value_text = text.partition("=")
    path = tuple(dotted.strip().split("."))
    if not equals or not all(path):
        return [f"override {text!r}: expected key.sub=value, as in rollout.steps=10"]
    try:
        document = parse(value_text, f"override {text!r}", lines=False)
    except ConfigError as error:
        return list(error.problems)
    except UserError as error:
        return [str(error)]
    for old in [old for old in places if old[: len(path)] == path]:
        del places[old]
    for inner in document.places:
        places[path + inner] = "override"
    return _set(root, path, document.value, "override")


def _set(root: dict[str, Any], path: KeyPath, value: Any, place: str) -> list[str]:
    """Put ``value`` at ``path``, making sections on the way; returns what is wrong with the path."""
    here: Any = root
    for depth, key in enumerate(path):
        last = depth == len(path) - 1
        if isinstance(here, list):
            if not key.isdecimal() or int(key) >= len(here):
                name = ".".join(path[:depth])
                span = f"{name}.0" + (f" to {name}.{len(here) - 1}" if len(here) > 1 else "")
                advice = f"use {span}" if here else f"it is empty, so give it whole, as in {name}='[...]'"
                return [f"{'.'.join(path)} ({place}): the list {name} has no {key!r}; {advice}"]
            index: Any = int(key)
        elif isinstance(here, dict):
            index = key
            if not last:
                here.setdefault(key, {})
        else:
            name = ".".join(path[:depth])
            return [f"{'.'.join(path)} ({place}): {name} is a single setting, {found(here)}, and has no {key!r} inside"]
        if last:
            here[index] = value
        else:
            here = here[index]
    return []
