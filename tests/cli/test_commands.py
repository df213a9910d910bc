"""Commands end to end against stand-ins of the slow parts: what is called, what is printed, which exit code."""

from __future__ import annotations

import json
import runpy
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import flowrl
from flowrl.cli import main
from flowrl.config import Config

ROOT = Path(__file__).resolve().parents[2]


class Api:
    """Records calls in the place of flowrl.api."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, outcome: Callable[[], Any]) -> None:
        self.calls: list[tuple[Any, ...]] = []
        module = types.ModuleType("flowrl.api")

        def called(*values: Any) -> Any:
            self.calls.append(values)
            return outcome()

        vars(module).update(
            train=lambda config, command: called("train", config, command),
            resume=lambda folder, overrides: called("resume", folder, overrides),
            evaluate=lambda source, overrides, config, out: called("evaluate", source, overrides, config, out).text(),
        )
        monkeypatch.setitem(sys.modules, "flowrl.api", module)
        monkeypatch.setattr(flowrl, "api", module, raising=False)


@pytest.fixture
def run_folder(tmp_path: Path) -> Path:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "config.yaml").write_text("base: tiny_test\n")
    return folder


def done() -> types.SimpleNamespace:
    return types.SimpleNamespace(text=lambda: "figures")


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> Api:
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    return Api(monkeypatch, done)


def test_train_hands_over_the_config_and_the_command(api: Api, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", "tiny_test", "seed=3", "run_dir=my runs/a"]) == 0
    ((verb, config, command),) = api.calls
    assert (verb, command) == ("train", "flowrl train tiny_test seed=3 'run_dir=my runs/a'")
    assert isinstance(config, Config) and (config.seed, config.run_dir) == (3, "my runs/a")
    assert capsys.readouterr().out == "figures\n"


@pytest.mark.parametrize("before", [0, 1, 2])
def test_resume_takes_overrides_on_either_side(api: Api, run_folder: Path, before: int) -> None:
    overrides = ["iterations=9", "checkpoint.keep=3"]
    assert main(["train", *overrides[:before], "--resume", str(run_folder), *overrides[before:]]) == 0
    assert api.calls == [("resume", run_folder, overrides)]


def test_eval_takes_a_run_or_a_recipe(api: Api, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert main(["eval", str(run_folder), "evaluation.count=8"]) == 0
    assert main(["eval", "tiny_test"]) == 0
    assert main(["eval", str(run_folder), "--config", "demo", "--out", "there"]) == 0
    assert api.calls == [
        ("evaluate", str(run_folder), ["evaluation.count=8"], "", None),
        ("evaluate", "tiny_test", [], "", None),
        ("evaluate", str(run_folder), [], "demo", Path("there")),
    ]


def test_scripts_are_the_commands(api: Api, run_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for script, word, verb in (("train.py", "tiny_test", "train"), ("evaluate.py", str(run_folder), "evaluate")):
        monkeypatch.setattr(sys, "argv", [script, word])
        with pytest.raises(SystemExit) as caught:
            runpy.run_path(str(ROOT / "scripts" / script), run_name="__main__")
        assert caught.value.code == 0
        assert api.calls.pop()[0] == verb


def stop(error: BaseException) -> Callable[[], Any]:
    def raising() -> Any:
        raise error

    return raising


def test_exit_codes_of_stopped_runs(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    Api(monkeypatch, stop(KeyboardInterrupt()))
    assert main(["train", "tiny_test"]) == 130
    assert capsys.readouterr().err == "interrupted\n"
    Api(monkeypatch, stop(SystemExit(143)))
    with pytest.raises(SystemExit) as caught:
        main(["train", "tiny_test"])
    assert caught.value.code == 143


def test_a_mistake_of_ours_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    Api(monkeypatch, stop(ZeroDivisionError("ours")))
    with pytest.raises(ZeroDivisionError, match="ours"):
        main(["train", "tiny_test"])


def test_a_mistake_found_late_reads_like_an_early_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    Api(monkeypatch, stop(flowrl.UserError("run_dir: holds another run; choose another")))
    assert main(["train", "tiny_test"]) == 2
    assert capsys.readouterr().err == "error: run_dir: holds another run; choose another\n"


def test_rewards_list(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["rewards", "list"]) == 0
    listed = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["jpeg", "flowrl.rewards.jpeg:JpegSize"] in listed


def test_methods_json_is_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"key": "precise", "kind": "kernel"}.items() <= rows[4].items()
    keys = "key kind tier paper title evidence config refusal inputs options exempt".split()
    assert all(list(row) == keys for row in rows)
    gae = next(row for row in rows if row["key"] == "gae")
    assert gae["inputs"][:3] == ["step_reward", "value", "mask"] and gae["options"]["lam"]
    assert gae["config"] == "advantage.name=gae credit.values=critic" and gae["refusal"] == ""
    hae = next(row for row in rows if row["key"] == "hae")
    assert hae["config"] == "" and hae["refusal"].startswith("hae needs 'value_high'")


def test_no_command_prints_the_help(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert capsys.readouterr().err.startswith("usage: flowrl [-h]")


@pytest.mark.parametrize("words", [["--help"], ["--version"], ["train", "--help"], ["rewards", "probe", "--help"]])
def test_help_and_version_end_well(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as caught:
        main(words)
    assert caught.value.code == 0
    assert ("0.1.0" if words == ["--version"] else "usage: flowrl") in capsys.readouterr().out
