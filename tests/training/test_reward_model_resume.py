"""A process reward whose training was cut is the one whose training was not: pool, weights, optimizer, report; refusals."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from flowrl import api
from flowrl.checkpoint import store
from flowrl.checkpoint.signals import StopSignals
from flowrl.config import load
from flowrl.config.render import to_yaml
from flowrl.errors import UserError
from flowrl.training.reward_model import Drawer, RewardModelSettings, RewardModelTrainer
from flowrl.training.reward_model_run import Asked, Journal, train_reward_model
from tests.training.helpers import brightness, make, small_config, tensors
from tests.training.test_reward_model import SMALL, trainer_of

REPOSITORY = Path(__file__).parents[2]
SETTINGS = RewardModelSettings(**(SMALL | {"steps": 40}))
BATCHES = 3


class Cut(Exception):
    """Stands for a kill: nothing catches it."""


def go(folder: Path, *, resume: bool = False, write=str, **changes: Any) -> list:
    """The training on Gaussian data, with a trainer made anew."""
    trainer = trainer_of()
    asked = {"config": trainer.config, "settings": SETTINGS, "iterations": BATCHES} | changes
    journal = Journal(folder, Asked(**asked), resume=resume, every=15)
    return train_reward_model(trainer, journal, write)


def cut_at(patch: pytest.MonkeyPatch, owner: type, name: str, when=lambda *_: True) -> None:
    """Let a method raise, before it does anything, where ``when(its arguments)``."""
    real = getattr(owner, name)

    def cut(self, *arguments):
        if when(*arguments):
            raise Cut
        return real(self, *arguments)

    patch.setattr(owner, name, cut)


def written(folder: Path) -> dict[str, Any]:
    """All that a training leaves, its clock times aside."""
    card = json.loads((folder / "model.json").read_text())
    for level in card["quality"]:
        assert level.pop("milliseconds") > 0
    numbers = sorted(entry.iteration for entry in store.list_checkpoints(folder / "samples"))
    return {
        "card": card, "weights": (folder / "model.safetensors").read_bytes(),
        "last": store.load(folder / "checkpoints").state, "numbers": numbers,
        "pool": [store.load(folder / "samples", number).state for number in numbers],
    }  # fmt: skip


def assert_same(first: Path, second: Path) -> None:
    a, b = written(first), written(second)
    for key in ("card", "weights", "numbers"):
        assert a[key] == b[key], key
    assert (
        a["last"]["losses"] == b["last"]["losses"]
        and len(a["last"]["losses"]) == a["card"]["facts"]["settings"]["steps"]
    )
    for key in ("last", "pool"):
        one, two = tensors(a[key]), tensors(b[key])
        assert one.keys() == two.keys() and [n for n in one if not torch.equal(one[n], two[n])] == [], key
    assert any("optimizer" in name and "exp_avg_sq" in name for name in tensors(a["last"]))


@pytest.fixture(scope="module")
def straight(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "model"
    go(folder)
    return folder


CUTS = {
    "before the first batch": (Drawer, "__call__", lambda number: number == 0),
    "in the last batch": (Drawer, "__call__", lambda number: number == 2),
    "before the first step": (RewardModelTrainer, "_loss", lambda step: step == 0),
    "right after a checkpoint": (RewardModelTrainer, "_loss", lambda step: step == 30),
    "between two checkpoints": (RewardModelTrainer, "_loss", lambda step: step == 37),
    "while judging": (RewardModelTrainer, "judge", lambda *_: True),
}


@pytest.mark.parametrize("cut", CUTS)
def test_a_cut_training_ends_as_the_straight_one(straight: Path, tmp_path: Path, cut: str) -> None:
    folder = tmp_path / "model"
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, *CUTS[cut])
        with pytest.raises(Cut):
            go(folder)
    assert not (folder / "model.json").exists()
    said: list[str] = []
    go(folder, resume=True, write=said.append)
    assert_same(straight, folder)
    drawn = [line for line in said if line.startswith("batch")]
    assert len(drawn) == {"before the first batch": 3, "in the last batch": 1}.get(cut, 0)
    at = {"right after a checkpoint": 30, "between two checkpoints": 30, "while judging": 40}.get(cut)
    assert [line for line in said if line.startswith("going on")] == ([f"going on at step {at} of 40"] if at else [])


def test_a_finished_training_resumed_is_itself_and_a_damaged_batch_is_drawn_again(
    straight: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "model"
    go(folder)
    file = folder / "samples" / "iteration-00000001" / "x0.safetensors"
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(bytes(data))
    said: list[str] = []
    go(folder, resume=True, write=said.append)
    assert_same(straight, folder)
    assert said[0].startswith("warning: batch 2 is drawn again") and said[1].startswith("batch 2 of 3")


@pytest.mark.parametrize(("line", "place"), [("batch 2 of 3: mean", "batch 2 of 3"), ("step 8 of 40", "step 8 of 40")])
def test_a_stop_signal_saves_and_says_how_to_go_on(straight: Path, tmp_path: Path, line: str, place: str) -> None:
    said: list[str] = []

    def write(text: str) -> None:
        said.append(text)
        if text.startswith(line):
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(SystemExit) as stopped:
        go(tmp_path / "model", write=write)
    assert stopped.value.code == 143 and signal.getsignal(signal.SIGTERM) is not StopSignals._handle
    assert said[-1] == f"stopped at {place}; go on with: the same command and --resume"
    go(tmp_path / "model", resume=True, write=said.append)
    assert_same(straight, tmp_path / "model")
    assert sum(text.startswith("batch") for text in said) == 3  # none is drawn twice
    if "step" in place:
        assert "going on at step 8 of 40" in said


def test_refusals(straight: Path, tmp_path: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    with pytest.raises(
        UserError, match=r"--out: .* already holds training.json; choose another folder, or go on .*--res"
    ):
        go(straight)
    with pytest.raises(UserError, match=r"--resume: .* no training.json.*leave --resume out"):
        go(tmp_path / "none", resume=True)
    for changes, told in (
        ({"iterations": 4}, "begun with iterations 3, and now it is 4"),
        ({"settings": RewardModelSettings(**SMALL)}, "begun with reward model.steps 40, and now it is 120"),
        ({"run": "runs/other"}, "begun with run '', and now it is 'runs/other'"),
        (
            {"config": load({"seed": 5, "rewards": [{"name": "compositional"}]})},
            "begun with config.[a-z_.]+ .*, and now",
        ),
    ):
        with pytest.raises(UserError, match=f"{told}.*; resume with the settings that it was begun with"):
            go(straight, resume=True, **changes)
    assert before == {path: path.stat().st_mtime_ns for path in straight.rglob("*")}
    broken = tmp_path / "broken"
    broken.mkdir()
    (broken / "training.json").write_text("{")
    with pytest.raises(UserError, match=r"training.json: cannot be read"):
        go(broken, resume=True)


def test_samples_of_a_run_come_from_the_checkpoint_that_drew_the_first(tiny_sd3: Path, tmp_path: Path) -> None:
    """The run has gone on meanwhile; where that checkpoint is another one now, the training is refused."""
    config = small_config(tiny_sd3, run_dir=str(tmp_path / "run"), iterations=3, **{"checkpoint.keep": 5})
    api.train(config)
    later = tmp_path / "later"
    checkpoints = tmp_path / "run" / "checkpoints"
    (checkpoints / "iteration-00000003").rename(later)
    settings = RewardModelSettings(**(SMALL | {"steps": 2}))
    asked = Asked(config=config, settings=settings, iterations=2, run=str(tmp_path / "run"))
    train_reward_model(make(config), Journal(tmp_path / "whole", asked), str)
    with pytest.MonkeyPatch.context() as patch:
        cut_at(patch, Drawer, "__call__", lambda number: number == 1)
        with pytest.raises(Cut):
            train_reward_model(make(config), Journal(tmp_path / "cut", asked), str)
    later.rename(checkpoints / "iteration-00000003")
    record = (tmp_path / "cut" / "training.json").read_text()
    assert json.loads(record)["drawn_by"]["iteration"] == 2
    train_reward_model(make(config), Journal(tmp_path / "cut", asked, resume=True), str)
    assert_same(tmp_path / "whole", tmp_path / "cut")
    base = train_pool(make(config), tmp_path / "base", Asked(config=config, settings=settings, iterations=2))
    assert not torch.equal(base, written(tmp_path / "cut")["pool"][0]["x0"])
    (tmp_path / "cut" / "training.json").write_text(record.replace('"digest": "', '"digest": "0'))
    (tmp_path / "cut" / "samples" / "iteration-00000001" / "manifest.json").unlink()
    with pytest.raises(UserError, match=r"checkpoint of iteration 2 in .* is not the one that drew the first samples"):
        train_reward_model(make(config), Journal(tmp_path / "cut", asked, resume=True), str)


def train_pool(trainer, folder: Path, asked: Asked) -> torch.Tensor:
    train_reward_model(trainer, Journal(folder, asked), str)
    return written(folder)["pool"][0]["x0"]


def slow(images, prompts):
    """A reward that leaves time for a signal."""
    time.sleep(0.15)
    return brightness(images, prompts)


def started(*arguments: str) -> subprocess.Popen:
    """The script in a process of its own."""
    return subprocess.Popen(
        [sys.executable, "scripts/train_reward_model.py", *arguments], cwd=REPOSITORY, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(REPOSITORY)},
    )  # fmt: skip


def told(process: subprocess.Popen, line: str) -> None:
    """Wait until the process says a line that begins so."""
    for text in process.stdout:
        if text.startswith(line):
            return
    raise AssertionError(process.stderr.read()[-3000:])


def test_new_processes_after_sigterm_and_sigkill_are_bit_exact(tiny_sd3: Path, tmp_path: Path) -> None:
    """The script stopped while it collects, resumed, killed while it trains, resumed again here."""
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(
        to_yaml(small_config(tiny_sd3, rewards=[{"name": "tests.training.test_reward_model_resume:slow"}], threads=1))
    )
    folder = tmp_path / "cut"
    options = f"--out {folder} --iterations 5 --steps 200 --every 10 --levels 4 --width 8".split()
    with started(str(recipe), *options) as process:
        told(process, "batch 1 of 5")
        process.terminate()
        said, _ = process.communicate()
    assert process.returncode == 143
    assert f"{' '.join(options)} --resume" in said.splitlines()[-1] and "go on with: python scripts/train" in said
    assert 1 <= len(store.list_checkpoints(folder / "samples")) < 5
    with started(str(recipe), *options, "--resume") as process:
        told(process, "step 40 of 200")
        process.kill()
    assert not (folder / "model.json").exists() and 30 <= store.load(folder / "checkpoints").iteration < 200
    config = load(recipe)
    asked = Asked(config=config, settings=RewardModelSettings(steps=200, levels=4, width=8), iterations=5)
    train_reward_model(make(config), Journal(folder, asked, resume=True), str)
    train_reward_model(make(config), Journal(tmp_path / "straight", asked), str)
    assert_same(tmp_path / "straight", folder)
