"""No file of the repository names a folder of the machine it was written on."""

from __future__ import annotations

import re

import pytest

from .sources import ROOT, repository_files

# A slash that starts a path (not one inside a URL or a relative path), then a folder of one machine or person.
MACHINE_PATH = re.compile(r"(?<![\w.:/\-\\])/(?:work|home|root|Users|mnt|scratch|workspace|media)/[\w.~-]")
MACHINE_PATH_WINDOWS = re.compile(r"\b[A-Z]:\\Users\\")
EXCEPTIONS: dict[str, str] = {}


def machine_paths(text: str) -> list[tuple[int, str]]:
    """(line number, line) of each line with a machine's path."""
    lines = enumerate(text.splitlines(), start=1)
    return [(number, line) for number, line in lines if MACHINE_PATH.search(line) or MACHINE_PATH_WINDOWS.search(line)]


def test_no_absolute_machine_paths() -> None:
    found = []
    for path in repository_files():
        data = path.read_bytes()
        name = path.relative_to(ROOT).as_posix()
        if b"\0" in data or name in EXCEPTIONS:
            continue
        found += [f"{name}:{number}: {line.strip()[:120]}" for number, line in machine_paths(data.decode("utf-8"))]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    "parts",
    [
        ("", "work", "main"),
        ("cd ", "home", "ann"),
        ('"', "Users", "ann"),
        ("path=", "root", ".cache"),
        ("(", "mnt", "disk"),
    ],
)
def test_the_pattern_sees_a_machine_path(parts: tuple[str, str, str]) -> None:
    assert machine_paths("first\n" + "/".join(parts))


@pytest.mark.parametrize(
    "text", ["https://site.org/home/page", "docs/work/a.md", "./root/x", "a/home/b", "/tmp/x", "/path/to/python3.12"]
)
def test_the_pattern_lets_other_text_pass(text: str) -> None:
    assert machine_paths(text) == []
