"""The wheel, built once for the tests of this folder."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .sources import PACKAGED, ROOT, repository_files

FOLDERS = {**PACKAGED, "assets": "flowrl.assets"}


@pytest.fixture(scope="session")
def files() -> list[Path]:
    return repository_files()


@pytest.fixture(scope="session")
def wheel(tmp_path_factory: pytest.TempPathFactory, files: list[Path]) -> Path:
    """Built offline, from a copy: setuptools leaves files beside what it builds. setuptools comes with torch."""
    copy, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for path in files:
        name = path.relative_to(ROOT)
        if name.parts[0] in FOLDERS or len(name.parts) == 1:
            (copy / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, copy / name)
    options = ["--no-deps", "--no-build-isolation", "--no-index", "-w", str(out), str(copy)]
    command = [sys.executable, "-m", "pip", "wheel", *options]
    built = subprocess.run(command, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout[-3000:] + built.stderr[-3000:]
    (path,) = out.glob("*.whl")
    return path
