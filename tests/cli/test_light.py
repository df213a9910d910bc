"""Start-up is light: what the package, the help and a user's mistake import, and how long they take."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

HEAVY = ("torch", "numpy", "diffusers", "transformers", "scipy", "PIL", "matplotlib")
# Processor seconds, not wall time: other programs on the machine do not count. The margin is for slow processors.
MARGIN = 2.0


def start(code: str, folder: Path) -> tuple[float, str]:
    """Run code in a new Python; return its processor seconds and its output."""
    before = os.times()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=120, cwd=folder
    )
    after = os.times()
    seconds = after.children_user + after.children_system - before.children_user - before.children_system
    return seconds, done.stdout


def report(code: str) -> str:
    return f"{code}\nimport sys\nprint('HEAVY', [m for m in {HEAVY!r} if m in sys.modules])"


def test_importing_the_package_is_quick_and_light(tmp_path: Path) -> None:
    bare = min(start("pass", tmp_path)[0] for _ in range(3))
    runs = [start(report("import flowrl; flowrl.UserError"), tmp_path) for _ in range(3)]
    assert all("HEAVY []" in output for _, output in runs)
    assert min(seconds for seconds, _ in runs) - bare < 0.2 * MARGIN


CALL = """
from flowrl.cli import main
try:
    code = main({words!r})
except SystemExit as error:
    code = error.code
print("CODE", code)
"""


@pytest.mark.parametrize(
    ("words", "code", "allowed"),
    [
        (["--help"], 0, []),
        (["train", "--help"], 0, []),
        (["train", "demo", "rollout.stepz=3"], 2, []),
        (["train", "demo", "batch.group_size=1", "data.prompts=none.txt"], 2, []),
        (["rewards", "list"], 0, []),
    ],
    ids=["help", "train help", "unknown key", "conflict", "rewards list"],
)
def test_commands_that_need_no_model_import_none(
    words: list[str], code: int, allowed: list[str], tmp_path: Path
) -> None:
    seconds, output = start(report(CALL.format(words=words)), tmp_path)
    assert f"CODE {code}" in output
    assert f"HEAVY {allowed}" in output
    if words == ["--help"]:
        assert seconds < 1.0 * MARGIN


def test_the_public_face_loads_on_demand(tmp_path: Path) -> None:
    code = "import flowrl\nassert dir(flowrl) == sorted(flowrl.__all__)\n"
    code += "try:\n    flowrl.nope\nexcept AttributeError as error:\n    print(error)"
    assert start(code, tmp_path)[1] == "module 'flowrl' has no attribute 'nope'\n"
