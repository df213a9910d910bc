"""wandb, swanlab and trackio: off by default, what is sent, one run there for a run here, a clear word where one is missing."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from flowrl import api, tracking
from flowrl.checkpoint import store
from flowrl.config import load
from flowrl.config.dialect import ConfigError
from flowrl.config.tracking import Service, Tracking, Trackio
from flowrl.errors import UserError
from flowrl.tracking.packages import numbers
from tests.tracking.services import MAKERS, install
from tests.training.helpers import small_config

ALL = tuple(MAKERS)
ROW = {"iteration": 3, "reward/x/mean": 0.5, "policy/kl": None, "note": "text", "list": [1.0], "calls": 7, "flag": True}


def choice(name: str, /, **fields: str) -> Tracking:
    kind = Trackio if name == "trackio" else Service
    return Tracking(**{name: kind(**({"mode": "offline"} | fields))})


def test_nothing_is_imported_or_opened_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ALL:
        monkeypatch.setitem(sys.modules, name, None)  # importing it would raise
    tracking.require(Tracking())
    trackers = tracking.open_trackers(tmp_path, Tracking())
    trackers.scalars(ROW, 1)
    trackers.close()
    assert trackers.run_ids == {} and not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ALL)
def test_the_package_is_named_where_it_is_missing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=rf"pip install 'flowrl\[{name}\]', or set tracking\.{name}\.mode=off"):
        tracking.require(choice(name))


def test_a_missing_package_is_found_before_the_model_is_loaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    built: list[object] = []
    monkeypatch.setattr("flowrl.training.build.build", lambda *a: built.append(a))
    config = load(
        {"run_dir": str(tmp_path / "run"), "rewards": [{"name": "jpeg"}], "tracking": {"wandb": {"mode": "offline"}}}
    )
    with pytest.raises(UserError, match=r"flowrl\[wandb\]"):
        api.train(config)
    assert not built and not (tmp_path / "run").exists()


def test_only_numbers_are_sent() -> None:
    assert numbers(ROW) == {"iteration": 3, "reward/x/mean": 0.5, "calls": 7, "flag": True}


def test_wandb_gets_the_run_folder_the_config_and_the_iterations(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(monkeypatch, "wandb")["wandb"]
    folder = tmp_path / "mine"
    with tracking.open_trackers(folder, choice("wandb", project="p"), config={"seed": 5}) as trackers:
        trackers.scalars(ROW, 3)
        assert trackers.run_ids == {"wandb": "wandb1"}
    (begun,) = calls.of("init")
    where = {"project": "p", "dir": str(folder), "name": "mine"}
    assert begun == where | {"config": {"seed": 5}, "mode": "offline", "reinit": "create_new"}
    assert calls.of("log") == [{"data": numbers(ROW), "step": 3}]
    assert calls.of("finish") == [{"exit_code": 0}]


def test_swanlab_keeps_its_files_in_the_run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, "swanlab")["swanlab"]
    with tracking.open_trackers(tmp_path / "mine", choice("swanlab", name="n"), config={"seed": 5}) as trackers:
        trackers.scalars(ROW, 3)
    (begun,) = calls.of("init")
    where = {"log_dir": str(tmp_path / "mine" / "swanlab"), "project": "flowrl"}
    assert begun == where | {"name": "n", "config": {"seed": 5}, "mode": "offline"}
    assert calls.of("log") == [{"data": numbers(ROW), "step": 3}]
    assert calls.of("finish") == [{"state": "success"}]


def test_trackio_has_a_name_of_its_own_for_each_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, "trackio")["trackio"]
    ids = []
    for _ in range(2):  # trackio finds a run by its name: equal names would be one run
        with tracking.open_trackers(tmp_path / "mine", choice("trackio")) as trackers:
            ids.append(trackers.run_ids["trackio"])
    assert ids[0] != ids[1] and all(name.startswith("mine-") for name in ids)
    assert [begun["name"] for begun in calls.of("init")] == ids
    assert all(begun["embed"] is False and "space_id" not in begun for begun in calls.of("init"))


def test_a_space_is_used_where_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, "trackio")["trackio"]
    monkeypatch.setenv("TRACKIO_SPACE_ID", "someone/else")
    with pytest.raises(UserError, match="TRACKIO_SPACE_ID is set, which would send the numbers away"):
        tracking.open_trackers(tmp_path, choice("trackio"))
    assert not calls
    tracking.open_trackers(tmp_path, choice("trackio", mode="online", space="me/runs")).close()
    assert calls.of("init")[0]["space_id"] == "me/runs"


@pytest.mark.parametrize("name", ALL)
def test_a_resumed_run_goes_on_with_its_run_there(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, name)[name]
    first = tracking.open_trackers(tmp_path, choice(name))
    ids = first.run_ids
    first.close()
    second = tracking.open_trackers(tmp_path, choice(name), run_ids=ids)
    assert second.run_ids == ids
    again = calls.of("init")[1]
    assert again["resume"] == "allow" and again["name" if name == "trackio" else "id"] == ids[name]


@pytest.mark.parametrize(("name", "ending"), [("wandb", {"exit_code": 1}), ("swanlab", {"state": "crashed"})])
def test_a_run_that_fails_is_marked(name: str, ending: dict, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = install(monkeypatch, name)[name]
    with pytest.raises(RuntimeError), tracking.open_trackers(tmp_path, choice(name)):
        raise RuntimeError("token=hunter2")
    (ended,) = calls.of("finish")
    assert ending.items() <= ended.items() and "hunter2" not in str(ended)


def test_a_service_that_refuses_is_a_users_error_and_closes_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(monkeypatch, "wandb", "swanlab")

    def refuses(**_: object) -> None:
        raise ConnectionError("no api key\nsecond line")

    monkeypatch.setattr(sys.modules["swanlab"], "init", refuses)
    both = Tracking(wandb=Service(mode="offline"), swanlab=Service(mode="online"))
    with pytest.raises(
        UserError, match=r"tracking\.swanlab: .* ConnectionError: no api key; log in to swanlab, or use"
    ):
        tracking.open_trackers(tmp_path, both)
    assert calls["wandb"].of("finish") == [{"exit_code": 1}]


def test_a_training_run_is_one_run_there_over_a_resume(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = install(monkeypatch, *ALL)
    folder = tmp_path / "run"
    modes = {f"tracking.{name}.mode": "offline" for name in ALL}
    api.train(small_config(tiny_sd3, run_dir=str(folder), iterations=1, **modes, **{"evaluation.every": 1}))
    state = store.load(folder / "checkpoints").state
    assert state["trackers"]["wandb"] == "wandb1" and set(state["trackers"]) == set(ALL)
    api.resume(folder, ["iterations=2"])
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [row["iteration"] for row in rows] == [0, 1, 2]
    for name in ALL:
        begun = calls[name].of("init")
        assert len(begun) == 2 and begun[1]["name" if name == "trackio" else "id"] == state["trackers"][name]
        assert begun[0]["config"]["batch"]["group_size"] == 4
        assert [sent["step"] for sent in calls[name].of("log")] == [0, 1, 2]
        assert [sent["data"] for sent in calls[name].of("log")] == [numbers(row) for row in rows]
        assert len(calls[name].of("finish")) == 2


@pytest.mark.parametrize(
    ("settings", "problem"),
    [
        ({"wandb": {"mode": "offline", "project": " "}}, "tracking.wandb.project: is empty"),
        ({"trackio": {"mode": "online"}}, "tracking.trackio.space: online needs a hub Space"),
        ({"trackio": {"mode": "offline", "space": "a/b"}}, "tracking.trackio.space: is for mode online"),
        ({"wandb": {"mode": "cloud"}}, "tracking.wandb.mode: expected one of off, offline, online"),
    ],
)
def test_settings_that_cannot_be_meant(settings: dict, problem: str) -> None:
    from flowrl.config import check

    with pytest.raises(ConfigError, match=problem):
        check(load({"rewards": [{"name": "jpeg"}], "tracking": settings}))
