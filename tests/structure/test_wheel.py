"""The wheel in an empty folder, with another package's reward: it lists it and trains with it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from .sources import ROOT

MODULE = '''
"""How red a picture is."""

import numpy as np


def redness(images, prompts, gain: float = 1.0):
    rgb = images.astype("float32") / 255
    return gain * (rgb[..., 0] - rgb[..., 1:].max(-1)).clip(0, 1).mean((1, 2))


redness.deterministic = True
'''
METADATA = "Metadata-Version: 2.1\nName: redness-rewards\nVersion: 1.0\nRequires-Dist: flowrl\n"
ENTRY_POINTS = "[flowrl.rewards]\nredness = redness_rewards:redness\n"
KIND = "Wheel-Version: 1.0\nGenerator: by hand\nRoot-Is-Purelib: true\nTag: py3-none-any\n"


def third_party(folder: Path) -> Path:
    """A wheel of another project, which registers one reward."""
    info = "redness_rewards-1.0.dist-info"
    files = {
        "redness_rewards/__init__.py": MODULE, f"{info}/METADATA": METADATA, f"{info}/WHEEL": KIND,
        f"{info}/entry_points.txt": ENTRY_POINTS,
    }  # fmt: skip
    path = folder / "redness_rewards-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        for name, text in files.items():
            archive.writestr(name, text)
        archive.writestr(f"{info}/RECORD", "".join(f"{name},,\n" for name in (*files, f"{info}/RECORD")))
    return path


@pytest.fixture(scope="module")
def site(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both wheels as pip installs them; what they depend on comes from this environment."""
    folder = tmp_path_factory.mktemp("site")
    other = third_party(tmp_path_factory.mktemp("other"))
    options = ["--no-deps", "--no-index", "--no-compile", "--target", str(folder), str(wheel), str(other)]
    done = subprocess.run(
        [sys.executable, "-m", "pip", "install", *options], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return folder


@pytest.fixture
def flowrl(site: Path, tmp_path: Path):
    """Runs the installed command line in an empty folder, where nothing of this tree can be found."""
    environment = {**os.environ, "PYTHONPATH": str(site), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}

    def run(*arguments: str) -> str:
        command = [sys.executable, *arguments] if arguments[0] == "-c" else [sys.executable, "-m", "flowrl", *arguments]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-3000:]
        return done.stdout

    return run


def test_it_is_the_installed_one_that_runs(flowrl, site: Path) -> None:
    code = (
        "import flowrl, flowrl.rewards, flowrl.pipelines, flowrl.configs, flowrl.assets;"
        "print(*(m.__path__[0] for m in (flowrl, flowrl.rewards, flowrl.pipelines, flowrl.configs, flowrl.assets)))"
    )
    places = flowrl("-c", code).split()
    assert len(places) == 5 and all(place.startswith(str(site)) and str(ROOT) not in place for place in places)


def test_the_tables_know_the_other_package(flowrl) -> None:
    listed = flowrl("rewards", "list")
    assert "redness" in listed and "clipscore" in listed
    methods = json.loads(flowrl("methods", "--json"))
    assert len(methods) > 50


def test_it_trains_with_the_other_packages_reward(flowrl, tmp_path: Path) -> None:
    flowrl("train", "tiny_test", "run_dir=run", "rewards=[{name: redness, args: {gain: 2.0}}]")
    run = tmp_path / "run"
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    trained = [row for row in rows if row["iteration"]]  # row 0 is the evaluation of the base
    assert [row["iteration"] for row in trained] == [1, 2]
    assert all(0 < row["reward/redness/mean"] <= 2 for row in trained)
    assert (run / "report.html").is_file() and any((run / "export").glob("*.safetensors"))
    assert {path.name for path in tmp_path.iterdir()} == {"run"}
