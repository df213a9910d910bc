"""The shell scripts: what a bare machine is told, how the demo names its runs. Nothing is installed here."""

from __future__ import annotations

import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from .sources import ROOT

SCRIPTS = ["scripts/setup_env.sh", "scripts/demo.sh", "scripts/test.sh", ".ci/run"]
BASH = shutil.which("bash") or "bash"


def run_script(script: Path, *arguments: str, cwd: Path, path: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHON", "PIP_FIND_LINKS")}
    environment.update(PIP_NO_INDEX="1", PIP_CONFIG_FILE=os.devnull)  # pip finds nothing, whatever happens
    if path is not None:
        environment["PATH"] = path
    command = [BASH, str(script), *arguments]
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def write_program(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!{BASH}\n{body}\n", encoding="utf-8")
    path.chmod(0o755)


# A Python that says, and believes, that it is 3.10.
PYTHON_3_10 = f"""
    [[ $1 == --version ]] && echo "Python 3.10.9" && exit
    exec {shlex.quote(sys.executable)} -c "import sys; sys.version_info = (3, 10, 9); exec(sys.argv[1])" "$3"
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the scripts in a folder with spaces in its name."""
    root = tmp_path / "a folder with spaces"
    for name in SCRIPTS[:3]:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(ROOT / name, root / name)
    (root / "constraints").mkdir()
    (root / "constraints" / "cpu.txt").write_text("torch==9.9.9\n", encoding="utf-8")
    (root / "pyproject.toml").write_text("", encoding="utf-8")
    return root


@pytest.mark.parametrize("name", SCRIPTS)
def test_the_script_parses_and_is_strict(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    assert "set -euo pipefail" in text
    assert "sudo" not in text
    assert subprocess.run([BASH, "-n", str(ROOT / name)], capture_output=True, check=False).stderr == b""


def test_ci_runs_the_test_command_of_the_readme() -> None:
    command = "bash scripts/test.sh"
    assert command in (ROOT / ".ci" / "run").read_text(encoding="utf-8").splitlines()
    assert command in (ROOT / "README.md").read_text(encoding="utf-8")
    assert os.access(ROOT / ".ci" / "run", os.X_OK)


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({}, "none of python3.13 python3.12 python3.11 python3"),
        ({"python3": PYTHON_3_10}, "python3 (Python 3.10.9: too old)"),
        ({"python3.12": "[[ $* != *ensurepip* ]]"}, "python3.12 (no venv module"),
    ],
)
def test_a_machine_without_a_fit_python_is_told_so(
    tree: Path, tmp_path: Path, programs: dict[str, str], said: str
) -> None:
    tools = tmp_path / "bin"
    for name in ("dirname", "sed", "grep", "cat", "find", "mkdir", "rm"):
        tools.mkdir(exist_ok=True)
        (tools / name).symlink_to(shutil.which(name) or name)
    for name, body in programs.items():
        write_program(tools / name, body)
    done = run_script(tree / "scripts" / "setup_env.sh", cwd=tmp_path, path=str(tools))
    assert done.returncode == 1
    assert "flowrl needs Python 3.11 or newer" in done.stderr
    assert said in done.stderr
    assert not (tree / ".venv").exists()


def test_an_environment_of_someone_else_that_does_not_work_is_left_alone(tree: Path, tmp_path: Path) -> None:
    (tree / ".venv").mkdir()
    (tree / ".venv" / "mine.txt").write_text("keep", encoding="utf-8")
    done = run_script(tree / "scripts" / "setup_env.sh", cwd=tmp_path)
    assert done.returncode == 1
    assert "was not made by this script" in done.stderr
    assert (tree / ".venv" / "mine.txt").read_text(encoding="utf-8") == "keep"


def test_a_machine_without_a_network_is_told_so(tree: Path, tmp_path: Path) -> None:
    (tree / ".venv").mkdir()
    fake = """
        case "$*" in
          *"pip install"*) echo "ERROR: no version satisfies torch==9.9.9 (from versions: none)"; exit 1 ;;
          "-I - "*) exit 1 ;;
          --version) echo "Python 3.12.1" ;;
        esac
    """
    write_program(tree / ".venv" / "bin" / "python", fake)
    done = run_script(tree / "scripts" / "setup_env.sh", cwd=tmp_path)
    assert done.returncode == 1
    assert "setup: installing torch==9.9.9 from pip's default index" in done.stdout
    assert "no package index could be reached, or it has nothing for Python 3.12.1" in done.stderr
    assert not (tree / ".venv" / ".flowrl-ready").exists()


@pytest.fixture
def demo(tree: Path) -> Path:
    """demo.sh with a set-up that does nothing and a flowrl that records its arguments and writes a report."""
    write_program(tree / "scripts" / "setup_env.sh", "exit 0")
    body = """
        printf '%s\\n' "$@" >>called.txt
        for a in "$@"; do
          case $a in run_dir=*) mkdir -p "${a#run_dir=}"; : >"${a#run_dir=}/report.html" ;; esac
        done
    """
    write_program(tree / ".venv" / "bin" / "flowrl", body)
    return tree / "scripts" / "demo.sh"


def test_each_demo_has_a_run_folder_of_its_own(demo: Path, tree: Path, tmp_path: Path) -> None:
    for expected in ("demo", "demo-2", "demo-3"):
        done = run_script(demo, "seed=3", cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        assert done.stdout.strip() == f"demo: open {tree}/runs/{expected}/report.html"
    called = (tree / "called.txt").read_text(encoding="utf-8").splitlines()
    assert called[:4] == ["train", "demo", "run_dir=runs/demo", "seed=3"]


def test_the_demo_takes_a_run_folder_that_is_named(demo: Path, tree: Path, tmp_path: Path) -> None:
    done = run_script(demo, "run_dir=runs/my run", cwd=tmp_path)
    assert done.stdout.strip() == f"demo: open {tree}/runs/my run/report.html"
    assert (tree / "called.txt").read_text(encoding="utf-8").splitlines() == ["train", "demo", "run_dir=runs/my run"]


def test_a_demo_that_failed_says_so(demo: Path, tree: Path, tmp_path: Path) -> None:
    write_program(tree / ".venv" / "bin" / "flowrl", "exit 0")
    done = run_script(demo, cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "demo: error: training ended without writing runs/demo/report.html\n")
    write_program(tree / ".venv" / "bin" / "flowrl", "exit 7")
    assert run_script(demo, cwd=tmp_path).returncode == 7
