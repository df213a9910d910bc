"""What an import costs, and what it must leave alone. Each case is a new process."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .sources import ROOT

HEAVY = (
    "torch",
    "numpy",
    "scipy",
    "PIL",
    "diffusers",
    "transformers",
    "accelerate",
    "peft",
    "tensorboard",
    "wandb",
    "matplotlib",
)


def run_python(code: str, cwd: Path | None = None) -> str:
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded_by(statement: str) -> set[str]:
    return set(json.loads(run_python(f"import sys, json\n{statement}\nprint(json.dumps(sorted(sys.modules)))")))


def test_import_flowrl_is_light() -> None:
    assert loaded_by("import flowrl") & set(HEAVY) == set()


def test_import_flowrl_takes_less_than_a_fifth_of_a_second() -> None:
    # Processor time: other work on the machine does not count. The best of three: the first may read from a cold disk.
    code = "import time; start = time.process_time(); import flowrl; print(time.process_time() - start)"
    assert min(float(run_python(code)) for _ in range(3)) < 0.2


def test_help_takes_less_than_a_second_and_loads_no_torch() -> None:
    code = (
        "import sys, time\n"
        "from flowrl.cli import main\n"
        "sys.argv = ['flowrl', '--help']\n"
        "try:\n    main()\n"
        "except SystemExit as end:\n    assert not end.code, end.code\n"
        f"print('\\n', time.process_time(), *[name for name in {HEAVY!r} if name in sys.modules])\n"
    )
    results = [run_python(code).splitlines()[-1].split() for _ in range(3)]
    assert results[0][1:] == []
    assert min(float(result[0]) for result in results) < 1.0


@pytest.mark.parametrize(
    ("module", "left_alone"),
    [
        ("flowrl.config", ("torch", "diffusers", "transformers")),
        ("flowrl.advantage", ("diffusers", "transformers", "accelerate", "peft")),
        ("flowrl.dynamics", ("diffusers", "transformers", "accelerate", "peft")),
        ("flowrl.scoring", ("diffusers", "peft", "accelerate")),
        ("flowrl.training", ("diffusers", "peft", "wandb")),
    ],
)
def test_a_package_leaves_libraries_alone(module: str, left_alone: tuple[str, ...]) -> None:
    assert loaded_by(f"import {module}") & set(left_alone) == set()


def test_a_copy_of_the_engine_works_inside_another_project(tmp_path: Path) -> None:
    shutil.copytree(
        ROOT / "flowrl" / "advantage", tmp_path / "other" / "engine", ignore=shutil.ignore_patterns("__pycache__")
    )
    (tmp_path / "other" / "__init__.py").touch()
    code = (
        "import sys, pkgutil, importlib\n"
        "sys.modules['flowrl'] = None  # importing flowrl now raises ImportError\n"
        "import other.engine\n"
        "for module in pkgutil.walk_packages(other.engine.__path__, 'other.engine.'):\n"
        "    importlib.import_module(module.name)\n"
    )
    run_python(code, cwd=tmp_path)
