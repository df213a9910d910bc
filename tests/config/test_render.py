"""The resolved configuration: YAML that reads back equal, and a hash of the settings."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl.config import Config, config_hash, from_mapping, load, recipes, to_mapping, to_yaml

ODD = [
    "1e-4", "no", "true", "null", "~", "", " padded ", "2024-01-31", "0x10", "a: b", "# c", "é ☃ \U0001f600",
    "two\nlines", "'", '"', "\\", "010", ".inf", "<<", "=", "-", "*a", "!tag", "x" * 300, "tab\there", "\x00",
    "\u2028", "1_0", "1.",
]  # fmt: skip


@pytest.mark.parametrize("name", recipes())
def test_shipped_recipes_read_back_equal(name: str, tmp_path: Path) -> None:
    config = load(name)
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    again = load(tmp_path / "config.yaml")
    assert again == config
    assert config_hash(again) == config_hash(config)
    assert from_mapping(to_mapping(config)) == config


def test_awkward_values_read_back_equal(tmp_path: Path) -> None:
    numbers = [1, 1.0, 1e-7, 1e22, 1e16, -0.0, 2**70, float("inf")]
    args = {"numbers": numbers, "flags": [True, None], **dict.fromkeys(ODD, 1)}
    entries = [{"name": text, "args": args} for text in ODD]
    config = from_mapping({"run_dir": "on", "optimizer": {"lr": 1e-5}, "rewards": entries})
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8", newline="")
    again = load(tmp_path / "config.yaml")
    assert again == config
    assert [entry.name for entry in again.rewards] == ODD
    assert [type(number) for number in again.rewards[0].args["numbers"]] == [type(number) for number in numbers]


def test_settings_are_all_there_in_the_order_of_the_schema() -> None:
    text = to_yaml(Config())
    keys = [line.split(":")[0] for line in text.splitlines() if line[0].isalpha()]
    assert keys == list(to_mapping(Config()))
    assert "\n  window:\n    kind: random\n" in text


def test_hash_changes_with_any_setting_and_not_with_key_order() -> None:
    base = config_hash(Config())
    assert len(base) == 16
    assert config_hash(from_mapping({"ema": {"every": 2}})) != base
    assert config_hash(from_mapping({"rewards": [{"name": "a"}]})) != base
    one = from_mapping({"rewards": [{"name": "a", "args": {"p": 1, "q": 2}}]})
    two = from_mapping({"rewards": [{"args": {"q": 2, "p": 1}, "name": "a"}]})
    assert config_hash(one) == config_hash(two)
