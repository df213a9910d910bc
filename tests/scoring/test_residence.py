"""GPU rewards that are offloaded: away until there is something to score, back before the call, away after the last one."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from flowrl.config import check, load
from flowrl.config.dialect import ConfigError
from flowrl.config.schema import Failures
from flowrl.errors import UserError
from flowrl.scoring.executors import ExecutorSettings, gather, make_executor
from flowrl.scoring.runtime import RewardRuntime
from tests.scoring.executor_tools import REWARDS, batch, entry


def moves(log: Path) -> list[str]:
    return log.read_text(encoding="utf-8").split() if log.exists() else []


@pytest.mark.parametrize("kind", ["inline", "thread", "process"])
def test_a_reward_is_away_but_while_it_scores(kind: str, tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = replace(entry("Mover", log=str(log)), offload=True)
    with make_executor("mover", source, ExecutorSettings(kind=kind)) as executor:  # type: ignore[arg-type]
        assert moves(log) == ["offload"]  # it makes room before the model is loaded
        assert executor.score(batch(7)).scores.tolist() == [7.0]
        assert moves(log)[1:] == ["onload", "score", "offload"]
        assert executor.score(batch(8)).scores.tolist() == [8.0]
        assert moves(log)[4:] == ["onload", "score", "offload"]


def test_it_stays_while_others_wait(tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = replace(entry("Mover", log=str(log)), offload=True)
    with make_executor("mover", source, ExecutorSettings(kind="thread")) as executor:
        submitted = [executor.submit(batch(pixel, prompt="held")) for pixel in (1, 2, 3)]
        (tmp_path / "log.go").touch()
        results = gather(submitted)
    assert [float(result.scores[0]) for result in results] == [1.0, 2.0, 3.0]
    assert moves(log) == ["offload", "onload", "score", "score", "score", "offload"]


def test_it_does_not_move_without_the_switch(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with make_executor("mover", entry("Mover", log=str(log)), ExecutorSettings(kind="thread")) as executor:
        executor.score(batch(7))
    assert moves(log) == ["score"]


def test_a_move_that_fails_masks_the_batch(tmp_path: Path) -> None:
    log = tmp_path / "log"
    source = replace(entry("Mover", log=str(log), fail="onload"), offload=True)
    with make_executor("mover", source, ExecutorSettings(kind="thread", retries=0)) as executor:
        result = executor.score(batch(7, 8))
    assert not result.valid.any() and "no room to onload" in str(result.errors[0])
    with pytest.raises(UserError, match="no room to offload"):
        make_executor("mover", replace(source, args={"log": str(log), "fail": "offload"}), ExecutorSettings())


def test_a_run_moves_a_reward_by_its_entry(tmp_path: Path) -> None:
    log = tmp_path / "log"
    with RewardRuntime((replace(entry("Mover", log=str(log)), offload=True),), Failures()) as runtime:
        assert runtime.score(batch(7)).scores.tolist() == [7.0]
    assert moves(log) == ["offload", "onload", "score", "offload"]


@pytest.mark.parametrize(
    ("reward", "problem"),
    [
        ({"name": f"{REWARDS}:first_pixel"}, r"rewards\.0\.offload: .*first_pixel has no offload\(\) and onload\(\)"),
        (
            {"name": "clipscore", "executor": {"kind": "http", "url": "http://127.0.0.1:1"}},
            r"rewards\.0\.offload: where a service keeps its networks is set there",
        ),
    ],
)
def test_the_switch_is_refused_where_nothing_moves(reward: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(load({"rewards": [reward | {"offload": True}]}))
