"""Secrets of the environment are in no file of a run, whatever rewards and services say of them."""

from __future__ import annotations

import json
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import pytest

from flowrl import api
from flowrl.config.schema import RewardEntry
from flowrl.scoring.service import RewardService, ServiceSettings
from tests.scoring.executor_tools import REWARDS, reply, scripted_server
from tests.scoring.test_executors_http import health
from tests.tracking.services import install
from tests.training.helpers import small_config

CANARIES = {"SCORER_TOKEN": "canary-scorer-1d8e", "WANDB_API_KEY": "canary-wandb-5b2f", "HF_TOKEN": "canary-hub-93aa"}


def echo(connection: Any) -> None:
    """An error with the headers of the request in it, as some proxies write it."""
    body = json.dumps({"error": f"unauthorised: Authorization: Bearer {CANARIES['SCORER_TOKEN']}"}).encode()
    reply(500, body)(connection)


def found_in(folder: Path) -> list[str]:
    """Files whose bytes hold a canary, or half of one, and the canary's name."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    assert len(files) > 10
    hits = []
    for path in files:
        data = path.read_bytes()
        for name, value in CANARIES.items():
            hits += [f"{path.relative_to(folder)}: {name}" for part in (value, value[:10]) if part.encode() in data]
    return hits


def test_no_file_of_a_run_holds_a_secret(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    for name, value in CANARIES.items():
        monkeypatch.setenv(name, value)
    calls = install(monkeypatch, "wandb", "swanlab", "trackio")
    served = RewardEntry(name="tests.training.helpers:brightness")
    folder = tmp_path / "run"
    with ExitStack() as stack:
        service = stack.enter_context(RewardService(served, ServiceSettings(port=0, token_env="SCORER_TOKEN")))
        url, seen = stack.enter_context(scripted_server([health(), echo]))
        http = {"kind": "http", "token_env": "SCORER_TOKEN", "retries": 0}
        rewards = [
            {"name": served.name, "executor": http | {"url": service.url}},
            {"name": f"{REWARDS}:faulty", "role": "monitor", "executor": http | {"url": url, "timeout_s": 5.0}},
            {"name": f"{REWARDS}:spills", "role": "monitor"},
            {"name": f"{REWARDS}:raises_its_key", "role": "monitor", "executor": {"kind": "process"}},
        ]
        changes = {f"tracking.{name}.mode": "offline" for name in calls} | {"tracking.tensorboard": True}
        config = small_config(tiny_sd3, run_dir=str(folder), rewards=rewards, iterations=2, **changes)
        api.train(config)
    assert len(seen) > 3 and all(CANARIES["SCORER_TOKEN"].encode() in request for request in seen)
    said = (folder / "samples.jsonl").read_text(encoding="utf-8")
    assert said.count("***") >= 8 and "unauthorised" in said  # the failures are told, without what they said
    assert found_in(folder) == []
    out, err = capfd.readouterr()
    assert not [name for name, value in CANARIES.items() if value in out + err + repr(calls)]
