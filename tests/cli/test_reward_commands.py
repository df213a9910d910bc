"""``flowrl rewards serve`` and ``convert``, as a user calls them."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import urllib.request
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from flowrl.cli import main


def test_a_served_reward_answers_and_ends_with_ctrl_c() -> None:
    command = [sys.executable, "-u", "-m", "flowrl", "rewards", "serve", "jpeg", "quality=50", "--port", "0"]
    # A suite that a script started in the background has Ctrl-C ignored, and its children would inherit that.
    ours = signal.signal(signal.SIGINT, signal.default_int_handler)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=dict(os.environ))
    signal.signal(signal.SIGINT, ours)
    try:
        line = process.stdout.readline()  # type: ignore[union-attr]
        assert line.startswith("jpeg at http://127.0.0.1:") and "Ctrl-C" in line
        url = line.split(" at ")[1].split(";")[0]
        with urllib.request.urlopen(url + "/health", timeout=10) as answer:
            assert json.loads(answer.read())["reward"] == "jpeg"
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=20)
        assert process.returncode == 130 and "Traceback" not in errors
    finally:
        process.kill()


def test_serving_beyond_this_machine_needs_a_token(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "serve", "jpeg", "--host", "0.0.0.0", "--port", "0"]) == 2
    assert "token" in capsys.readouterr().err


def test_convert_writes_safetensors_and_overwrites_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    torch.save({"weight": torch.arange(4.0)}, tmp_path / "old.pt")
    arguments = ["rewards", "convert", "plain", str(tmp_path / "old.pt"), str(tmp_path / "new")]
    assert main(arguments) == 0
    written = capsys.readouterr().out.split()
    assert [Path(p).suffix for p in written] == [".safetensors"]
    assert torch.equal(load_file(written[0])["weight"], torch.arange(4.0))
    assert main(arguments) == 2
    assert "is there already" in capsys.readouterr().err


def test_probe_takes_a_preset(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "probe", "jpeg/2"]) == 0
    assert "jpeg" in capsys.readouterr().out
