"""A configuration as plain data, as YAML that reads back equal, and as a hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping
from typing import Any

import yaml

from flowrl.config.dialect import Dumper
from flowrl.config.schema import Config


def to_plain(value: Any) -> Any:
    """Turn nested dataclasses, mappings and tuples into dicts and lists; leave the rest as it is."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: to_plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    return value


def to_mapping(config: Config) -> dict[str, Any]:
    """Return every setting, defaults included, as nested dicts and lists."""
    plain: dict[str, Any] = to_plain(config)
    return plain


def to_yaml(config: object) -> str:
    """Write every setting of a Config or another schema as YAML, in its order; ``load`` reads it back to an equal one."""
    return yaml.dump(to_plain(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10_000)


def config_hash(config: Config) -> str:
    """Return 16 hex digits of the SHA-256 of all settings; equal exactly for equal configurations."""
    text = json.dumps(to_mapping(config), sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
