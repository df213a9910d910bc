"""The wheel owns one name, carries everything, and works in an empty folder."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from .conftest import FOLDERS
from .sources import ROOT


@pytest.fixture(scope="module")
def names(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return set(archive.namelist())


def test_the_wheel_owns_one_name(names: set[str]) -> None:
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"flowrl"}


def test_the_wheel_carries_every_module_recipe_and_asset(names: set[str], files: list[Path]) -> None:
    missing = []
    for path in files:
        folder, *rest = path.relative_to(ROOT).parts
        carried = path.suffix == ".py" or folder == "assets" or (folder == "configs" and path.suffix == ".yaml")
        installed = "/".join([FOLDERS.get(folder, "").replace(".", "/"), *rest])
        if folder in FOLDERS and carried and installed not in names:
            missing.append(path.relative_to(ROOT).as_posix())
    assert not missing, f"not in the wheel (pyproject.toml lists packages and package data): {', '.join(missing)}"
    assert {"flowrl/py.typed", "flowrl/pipelines/__init__.py", "flowrl/rewards/__init__.py"} <= names
    assert any(name.startswith("flowrl/configs/") and name.endswith(".yaml") for name in names), (
        "no recipe in the wheel"
    )
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)


def test_the_wheel_works_in_an_empty_folder(wheel: Path, tmp_path: Path) -> None:
    site, empty = tmp_path / "site", tmp_path / "empty"
    empty.mkdir()
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(site)
    code = (
        f"import sys; sys.path.insert(0, {str(site)!r})\n"
        "import importlib.resources as r, flowrl, flowrl.rewards, flowrl.pipelines\n"
        f"modules = (flowrl, flowrl.rewards, flowrl.pipelines)\n"
        f"assert all(m.__file__.startswith({str(site)!r}) for m in modules), flowrl.__file__\n"
        "assert r.files('flowrl.configs').joinpath('__init__.py').is_file()\n"
    )
    done = subprocess.run([sys.executable, "-I", "-c", code], cwd=empty, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("folder", ["pipelines", "rewards"])
def test_the_bare_folder_refuses_to_be_imported(folder: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", f"import {folder}"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 1
    assert f"ImportError: import flowrl.{folder}" in done.stderr


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints" / "cpu.txt").read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and not line.startswith("#")]
    return {_canonical(name): version for name, version in pairs}


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


def test_every_direct_dependency_is_pinned_within_its_range() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [Requirement(text) for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])]
    pinned = pins()
    loose = [str(r) for r in wanted if not r.url and _canonical(r.name) not in pinned]
    assert not loose, f"constraints/cpu.txt has no pin for {', '.join(loose)}"
    outside = [str(r) for r in wanted if not r.specifier.contains(pinned[_canonical(r.name)])]
    assert not outside, f"the pin in constraints/cpu.txt is outside {', '.join(outside)}"


def test_the_core_never_asks_for_torchvision() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    asked = {
        _canonical(Requirement(text).name)
        for text in (*project["dependencies"], *project["optional-dependencies"]["dev"])
    }
    assert "torchvision" not in asked | pins().keys()
