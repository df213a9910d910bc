"""Rows survive kills and full disks, and a resume cuts exactly what came after its checkpoint."""

from __future__ import annotations

import errno
import json
import math
import os
from pathlib import Path
from typing import Any

import pytest

from flowrl.errors import UserError
from flowrl.tracking.jsonl import JsonLines, cut_after, finite


def _rows(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def _fill(path: Path, count: int) -> None:
    with JsonLines(path) as rows:
        for iteration in range(1, count + 1):
            rows.write({"iteration": iteration, "reward/x/mean": iteration / 3})


@pytest.mark.parametrize("fsync", [False, True])
def test_one_object_a_line_and_floats_are_exact(tmp_path: Path, fsync: bool) -> None:
    path = tmp_path / "new" / "metrics.jsonl"
    row = {"iteration": 1, "a": 0.1 + 0.2, "b": -0.0, "c": None, "d": "zwei\nZeilen \u2028 \ud800", "e": [5e-324]}
    with JsonLines(path, fsync=fsync) as rows:
        rows.write(row)
        assert path.read_bytes().count(b"\n") == 1  # there before the file is closed
        rows.write({"iteration": 2})
    with JsonLines(path) as rows:
        rows.write({"iteration": 3})
    lines = path.read_bytes().split(b"\n")
    assert json.loads(lines[0]) == row
    assert math.copysign(1, json.loads(lines[0])["b"]) == -1
    assert [json.loads(line)["iteration"] for line in lines[:3]] == [1, 2, 3]
    assert lines[3:] == [b""]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_refused_by_name_or_written_as_null(tmp_path: Path, value: float) -> None:
    path = tmp_path / "metrics.jsonl"
    with JsonLines(path) as rows:
        with pytest.raises(ValueError, match=r"metrics.jsonl: not finite: loss, by_step\.1; use finite") as caught:
            rows.write({"iteration": 1, "loss": value, "by_step": [1.0, value], "fine": 2.0})
        assert "fine" not in str(caught.value)
        assert path.read_bytes() == b""
        rows.write({"iteration": 1, "loss": finite(value), "fine": finite(2.5)})
    assert _rows(path) == [{"iteration": 1, "loss": None, "fine": 2.5}]


def test_what_json_cannot_hold_is_refused_and_nothing_is_written(tmp_path: Path) -> None:
    with JsonLines(tmp_path / "m.jsonl") as rows:
        with pytest.raises(TypeError):
            rows.write({"iteration": 1, "x": {1, 2}})
    assert (tmp_path / "m.jsonl").read_bytes() == b""


def test_a_full_disk_leaves_no_half_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    write = os.write
    calls = []

    def full(descriptor: int, data: Any) -> int:
        calls.append(len(data))
        if len(calls) == 1:
            return write(descriptor, bytes(data)[:5])
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with JsonLines(path) as rows:
        rows.write({"iteration": 1})
        monkeypatch.setattr(os, "write", full)
        with pytest.raises(UserError, match=r"cannot append to .*metrics.jsonl: \[Errno 28\] No space left"):
            rows.write({"iteration": 2})
        monkeypatch.undo()
        assert _rows(path) == [{"iteration": 1}]
        rows.write({"iteration": 2})
    assert len(calls) == 2
    assert _rows(path) == [{"iteration": 1}, {"iteration": 2}]


def test_a_file_that_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cannot append to"):
        JsonLines(tmp_path)


def test_cutting_drops_later_rows_and_keeps_the_bytes_of_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    first = b'{"iteration":  0,  "odd spacing": 1e0}\n'
    path.write_bytes(first)
    _fill(path, 5)
    path.chmod(0o640)
    whole = path.read_bytes()
    assert cut_after(path, 5) == 0
    assert path.read_bytes() == whole
    assert cut_after(path, 3) == 2
    assert path.read_bytes().startswith(first)
    assert [row["iteration"] for row in _rows(path)] == [0, 1, 2, 3]
    assert path.stat().st_mode & 0o777 == 0o640
    assert whole.startswith(path.read_bytes())
    assert cut_after(path, -1) == 4
    assert path.read_bytes() == b""
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]
    assert cut_after(tmp_path / "missing.jsonl", 3) == 0


def test_rows_of_a_checkpoints_own_iteration_stay_wherever_they_stand(tmp_path: Path) -> None:
    path = tmp_path / "samples.jsonl"
    order = [3, 1, 4, 3, 2, 5, 3]
    path.write_text("".join(json.dumps({"iteration": number}) + "\n" for number in order))
    assert cut_after(path, 3) == 2
    assert [row["iteration"] for row in _rows(path)] == [3, 1, 3, 2, 3]


def test_a_row_torn_at_any_byte_is_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _fill(path, 3)
    whole = path.read_bytes()
    last = whole.rstrip(b"\n").rfind(b"\n") + 1
    for end in range(last, len(whole)):
        complete = end == len(whole) - 1  # only the line break is missing
        path.write_bytes(whole[:end])
        assert cut_after(path, 9) == (0 if complete or end == last else 1)
        assert path.read_bytes() == (whole if complete else whole[:last])
        path.write_bytes(whole[:end])
        with JsonLines(path) as rows:
            rows.write({"iteration": 4})
        assert [row["iteration"] for row in _rows(path)] == ([1, 2, 3, 4] if complete else [1, 2, 4])


def test_zeros_after_a_power_cut_are_dropped(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    _fill(path, 2)
    with path.open("ab") as handle:
        handle.write(b"\0" * 64)
    assert cut_after(path, 9) == 1
    assert [row["iteration"] for row in _rows(path)] == [1, 2]


@pytest.mark.parametrize("line", [b"{broken\n", b"[1]\n", b'{"a": 1}\n', b'{"iteration": true}\n', b"\n", b"\xff\n"])
def test_damage_in_the_middle_is_the_users_to_mend(tmp_path: Path, line: bytes) -> None:
    path = tmp_path / "metrics.jsonl"
    data = b'{"iteration": 1}\n' + line + b'{"iteration": 2}\n'
    path.write_bytes(data)
    with pytest.raises(UserError, match=r"metrics.jsonl:2: not a JSON object with a whole-number"):
        cut_after(path, 1)
    assert path.read_bytes() == data


def test_a_cut_that_fails_leaves_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "metrics.jsonl"
    _fill(path, 3)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match=r"cannot rewrite .*It is as it was"):
        cut_after(path, 1)
    assert path.read_bytes() == before
    assert [item.name for item in tmp_path.iterdir()] == ["metrics.jsonl"]
