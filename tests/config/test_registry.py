"""The registry: lazy built-in tables, entry points, plug-ins by address, and the check of their arguments."""

from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path
from typing import Any

import pytest

from flowrl import registry
from flowrl.config.families import family_of
from flowrl.errors import UserError

PLUGIN = """
from __future__ import annotations
import dataclasses
from typing import Literal, Optional


@dataclasses.dataclass
class Scorer:
    strength: float
    mode: Literal["a", "b"] = "a"
    limit: Optional[int] = None
    boxes: tuple[int, ...] = ()

    def score(self, batch):
        return None


class Open:
    def __init__(self, size: int, **options: object) -> None:
        self.size = size


def plain(images, prompts, metadata, target, strength: float = 1.0):
    return [strength] * len(images)


ready = Scorer(1.0)
"""


@pytest.fixture
def plugin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    (tmp_path / "plugin.py").write_text(PLUGIN)
    return str(tmp_path / "plugin.py")


def add_entry_points(monkeypatch: pytest.MonkeyPatch, *entries: tuple[str, str, str]) -> None:
    points = [importlib.metadata.EntryPoint(name, value, group) for group, name, value in entries]
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda group: [point for point in points if point.group == group]
    )


@pytest.mark.parametrize("kind", ["pipeline", "reward", "advantage", "policy_loss", "objective", "surrogate", "kernel"])
def test_every_built_in_name_resolves(kind: str) -> None:
    for name in registry.names(kind):
        found = registry.resolve(kind, name)
        assert name in found if kind == "objective" else callable(found), name


def test_tables_agree_with_the_catalogues() -> None:
    from flowrl.advantage.catalogue import METHODS
    from flowrl.dynamics.kernels import KERNELS
    from flowrl.objectives import FORMS
    from flowrl.objectives.surrogates import SURROGATES

    for name, kind in (("advantage", "estimator"), ("policy_loss", "policy_loss")):
        calls = {method.key: method.call for method in METHODS if method.kind == kind}
        assert {key: registry.resolve(name, key) for key in registry.names(name)} == calls
    assert registry.names("kernel") == sorted(KERNELS)
    assert [name for name in registry.names("objective") if family_of(name) == "trajectory"] == sorted(FORMS)
    assert {name: registry.resolve("surrogate", name) for name in registry.names("surrogate")} == SURROGATES
    assert {name: registry.resolve("kernel", name) for name in KERNELS} == KERNELS


def test_an_entry_point_is_a_name_like_any_other(plugin: str, monkeypatch: pytest.MonkeyPatch) -> None:
    add_entry_points(monkeypatch, ("flowrl.rewards", "sharp", f"{plugin}:Scorer"))
    assert "sharp" in registry.names("reward")
    assert registry.resolve("reward", "sharp").__name__ == "Scorer"
    with pytest.raises(UserError, match="unknown pipeline 'sharp'"):
        registry.resolve("pipeline", "sharp")


@pytest.mark.parametrize("names", [("jpeg",), ("sharp", "sharp")])
def test_a_name_claimed_twice_is_an_error(names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    add_entry_points(monkeypatch, *(("flowrl.rewards", name, "a:b") for name in names))
    with pytest.raises(UserError, match=f"the reward name '{names[0]}' is claimed by "):
        registry.targets("reward")


def test_listing_names_imports_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    add_entry_points(monkeypatch, ("flowrl.rewards", "broken", "no_such_module:x"))
    assert "broken" in registry.names("reward")
    with pytest.raises(UserError, match="broken: no module named 'no_such_module'"):
        registry.resolve("reward", "broken")


def test_a_file_is_imported_once(plugin: str) -> None:
    assert registry.resolve("reward", f"{plugin}:Scorer") is registry.resolve("reward", f"{plugin}:Scorer")
    assert registry.resolve("reward", f"{plugin}:Scorer.score").__name__ == "score"


def test_files_of_one_name_do_not_meet(tmp_path: Path) -> None:
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "mine.py").write_text(f"VALUE = {number}\n")
    assert [registry.resolve("reward", f"{tmp_path}/{n}/mine.py:VALUE") for n in (1, 2)] == [1, 2]


def test_a_file_that_fails_can_be_mended(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise RuntimeError('not yet')\n")
    with pytest.raises(UserError, match=r"mine\.py: fails to import: RuntimeError: not yet \(mine\.py:1\); mend it"):
        registry.resolve("reward", f"{file}:VALUE")
    file.write_text("VALUE = 33\n# longer, so that no stale bytecode fits\n")
    assert registry.resolve("reward", f"{file}:VALUE") == 33


@pytest.mark.parametrize(
    ("attribute", "args", "problems"),
    [
        ("Scorer", {"strength": 2}, []),
        ("Scorer", {"strength": 2.0, "mode": "b", "limit": 3, "boxes": [1, 2]}, []),
        ("Scorer", {"strength": 2.0, "limit": None}, []),
        ("Scorer", {}, ["strength: missing; {name} needs it"]),
        ("Scorer", {"strength": True}, ["strength: expected float, found True (bool)"]),
        ("Scorer", {"strength": 1.0, "mode": "c"}, ["mode: expected Literal['a', 'b'], found 'c' (str)"]),
        ("Scorer", {"strength": 1.0, "limit": 1.5}, ["limit: expected Optional[int], found 1.5 (float)"]),
        ("Scorer", {"strength": 1.0, "boxes": 3}, ["boxes: expected tuple[int, ...], found 3 (int)"]),
        (
            "Scorer",
            {"strenght": 1.0, "strength": 1.0},
            ["strenght: unknown argument of {name}; did you mean strength?"],
        ),
        ("Scorer", {"zz": 1, "strength": 1}, ["zz: unknown argument; {name} takes strength, mode, limit, boxes"]),
        ("Open", {"size": 1, "anything": "else"}, []),
        ("Open", {"size": "x"}, ["size: expected int, found 'x' (str)"]),
        ("plain", {}, []),
        ("plain", {"strength": 2.0, "target": 1}, []),
        ("plain", {"images": 1}, ["images: unknown argument; {name} takes target, strength"]),
        ("ready", {}, []),
        ("ready", {"strength": 1.0}, ["strength: unknown argument; {name} takes none"]),
    ],
)
def test_arguments_against_the_signature(
    plugin: str, attribute: str, args: dict[str, Any], problems: list[str]
) -> None:
    name = f"{plugin}:{attribute}"
    assert registry.check_arguments("reward", name, args) == [line.format(name=name) for line in problems]


def test_an_unknown_kind_is_a_programming_error() -> None:
    with pytest.raises(ValueError, match="unknown kind 'rewards'"):
        registry.names("rewards")
