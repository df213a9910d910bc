"""The engine needs torch alone, and a copy of its folder works inside another project."""

from __future__ import annotations

import ast
import json
import shutil
import subprocess
import sys
from pathlib import Path

import flowrl.advantage

FOLDER = Path(flowrl.advantage.__file__).parent

PROGRAM = """
import json, sys
import torch

class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "flowrl":
            raise ModuleNotFoundError(name)

sys.meta_path.insert(0, Refuse())
sys.path.insert(0, sys.argv[1])
before = set(sys.modules)
from project.vendored import engine
out = engine.estimate("grpo", {"rewards": torch.tensor([1.0, 0.0, 0.0, 1.0]), "group": torch.tensor([5] * 4)}, clip=5.0)
loss = engine.clipped(torch.ones(4), out.advantage, 0.2)
new = sorted(set(sys.modules) - before)
print(json.dumps({"advantage": out.advantage.tolist(), "loss": loss.tolist(), "new": new}))
"""


def test_a_copied_folder_works_under_another_name_with_torch_alone(tmp_path: Path) -> None:
    package = tmp_path / "project" / "vendored"
    package.mkdir(parents=True)
    (tmp_path / "project" / "__init__.py").touch()
    (package / "__init__.py").touch()
    shutil.copytree(FOLDER, package / "engine", ignore=shutil.ignore_patterns("__pycache__"))
    command = [sys.executable, "-c", PROGRAM, str(tmp_path)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert all(abs(abs(a) - 0.9998) < 1e-6 for a in result["advantage"])
    assert result["loss"] == [-a for a in result["advantage"]]
    new = {name.partition(".")[0] for name in result["new"]}
    assert "project" in new
    assert new - {"project", "torch"} <= sys.stdlib_module_names


def test_every_import_is_relative_torch_or_the_standard_library() -> None:
    files = sorted(FOLDER.rglob("*.py"))
    assert len(files) >= 8
    for file in files:
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                roots = {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                roots = {(node.module or "").partition(".")[0]}
            else:
                assert not isinstance(node, ast.ImportFrom) or node.level == 1, f"{file.name} leaves its folder"
                continue
            assert roots <= {"torch"} | sys.stdlib_module_names, f"{file.name} imports {roots}"
