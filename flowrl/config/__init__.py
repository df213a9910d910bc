"""Strict settings: one frozen Config, from YAML, names of shipped recipes, mappings and overrides.

>>> from flowrl.config import check, load
>>> config = check(load("demo", ["iterations=10"]))
"""

from flowrl.config.dialect import ConfigError
from flowrl.config.load import from_mapping, load, load_as, recipes, replace
from flowrl.config.render import config_hash, to_mapping, to_yaml
from flowrl.config.schema import Config
from flowrl.config.validate import check, validate

__all__ = [
    "Config",
    "ConfigError",
    "check",
    "config_hash",
    "from_mapping",
    "load",
    "load_as",
    "recipes",
    "replace",
    "to_mapping",
    "to_yaml",
    "validate",
]
