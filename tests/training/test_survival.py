"""What goes wrong on the way: numbers that are not finite, failing rewards, signals, full disks."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch

from flowrl import api
from flowrl.checkpoint import store
from flowrl.errors import UserError
from tests.training.helpers import make, small_config, tensors

REPOSITORY = Path(__file__).parents[2]


def weights_of(trainer) -> list[torch.Tensor]:
    return [p.detach().clone() for p in trainer.weights.parameters]


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_gradient_that_is_not_finite_changes_nothing(tiny_sd3: Path) -> None:
    trainer = make(small_config(tiny_sd3))
    trainer.iterate()
    before, optimizer = weights_of(trainer), tensors(trainer.optimizer.state_dict())
    trainer.weights.parameters[0].register_hook(lambda g: g * float("nan"))
    row = trainer.iterate()
    assert row["update/skipped"] == 1
    assert same(before, weights_of(trainer))
    after = tensors(trainer.optimizer.state_dict())
    assert all(torch.equal(optimizer[k], after[k]) for k in optimizer)


def test_bad_updates_roll_back_once_and_then_stop(tiny_sd3: Path, tmp_path: Path) -> None:
    """Three bad updates in a row: back to the checkpoint with fresh noise; three more: stop, checkpoint intact."""
    config = small_config(tiny_sd3, run_dir=str(tmp_path / "run"), iterations=12)
    run = api._open(config, tmp_path / "run", "test", (), api._backend(config))
    run.prepare()
    real, seen = run.trainer.iterate, []

    def iterate():
        if run.trainer.iteration == 2 and not seen:
            run.trainer.weights.parameters[0].register_hook(lambda g: g * float("nan"))
        seen.append((run.trainer.iteration, run.trainer.restarts))
        return real()

    run.trainer.iterate = iterate
    run.trainer.iteration = 0
    seen.append((-1, 0))
    seen.clear()
    run.trainer.weights.parameters[0].register_hook(lambda g: g * (float("nan") if run.trainer.iteration >= 2 else 1.0))
    with pytest.raises(UserError, match="3 updates in a row had a gradient that is not finite, at iteration"):
        run.go()
    assert 1 in {restarts for _, restarts in seen}
    loaded = store.load(tmp_path / "run" / "checkpoints")
    assert all(torch.isfinite(t).all() for t in tensors(loaded.state).values())


def test_latents_that_are_not_finite_are_masked(tiny_sd3: Path) -> None:
    """One sample's velocity is NaN at every step: it is invalid, the others' advantages are those of a group without it."""
    trainer = make(small_config(tiny_sd3, **{"failures.max_invalid_fraction": 0.5}))
    real = trainer.adapter.predict

    def predict(x, t, conditioning, features=()):
        made = real(x, t, conditioning, features)
        if not torch.is_grad_enabled() and len(x) == 4:
            made.value[1] = float("nan")
        return made

    trainer.adapter.predict = predict
    batches = []
    trainer._train = lambda batch: batches.append(batch) or {}
    row = trainer.iterate()
    assert row["score/invalid"] == 2
    assert batches[0].mask.tolist() == [True, False, True, True] * 2
    assert batches[0].advantage[1].tolist() == [0.0, 0.0] and not batches[0].weight[1].any()
    assert torch.isfinite(batches[0].advantage).all()


def third_fails(images, prompts):
    """None for every third picture."""
    return [None if i % 4 == 2 else float(image[..., 0].mean()) / 255 for i, image in enumerate(images)]


def test_a_failed_reward_is_a_mask(tiny_sd3: Path) -> None:
    changes = {"failures.max_invalid_fraction": 0.5, "rewards": [{"name": "tests.training.test_survival:third_fails"}]}
    trainer = make(small_config(tiny_sd3, **changes))
    batches, real = [], trainer._train
    trainer._train = lambda batch: batches.append(batch) or real(batch)
    row = trainer.iterate()
    assert row["score/invalid"] == 2
    assert batches[0].mask.tolist() == [True, True, False, True] * 2
    group = batches[0].advantage[[0, 1, 3], 0].double()
    assert float(group.sum()) == pytest.approx(0, abs=1e-5) and float(group.abs().sum()) > 0
    assert np.isfinite(row["policy/loss"])


def always_raises(images, prompts):
    raise RuntimeError("the judge is out")


def test_too_many_failures_stop_the_run_with_the_first_error(tiny_sd3: Path, tmp_path: Path) -> None:
    config = small_config(
        tiny_sd3, run_dir=str(tmp_path / "run"), rewards=[{"name": "tests.training.test_survival:always_raises"}]
    )
    with pytest.raises(UserError, match=r"8 of 8 samples could not be scored.*the judge is out"):
        api.train(config)


def test_a_full_disk_keeps_the_old_checkpoint_and_training_goes_on(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    real, calls = store.save, []

    def save(root, iteration, state, **kw):
        calls.append(iteration)
        if iteration in (2, 3):
            raise store.CheckpointWriteError("checkpoint of iteration 2: no space left on the device.") from OSError(
                errno.ENOSPC, "No space left on device"
            )
        return real(root, iteration, state, **kw)

    monkeypatch.setattr(store, "save", save)
    api.train(small_config(tiny_sd3, run_dir=str(tmp_path / "run"), iterations=4))
    assert calls == [1, 2, 3, 4]
    assert store.load(tmp_path / "run" / "checkpoints").iteration == 4
    assert capsys.readouterr().out.count("Training goes on") == 2


def test_a_disk_that_stays_full_stops_the_run(tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = store.save

    def save(root, iteration, state, **kw):
        if iteration >= 2:
            raise store.CheckpointWriteError("no space left on the device")
        return real(root, iteration, state, **kw)

    monkeypatch.setattr(store, "save", save)
    with pytest.raises(store.CheckpointWriteError):
        api.train(small_config(tiny_sd3, run_dir=str(tmp_path / "run"), iterations=20))
    assert store.load(tmp_path / "run" / "checkpoints").iteration == 1
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["iteration"] == 4


def start_cli(config, folder: Path, more: tuple[str, ...] = ()) -> subprocess.Popen:
    from flowrl.config.render import to_yaml

    recipe = folder / "recipe.yaml"
    recipe.write_text(to_yaml(config))
    code = "import torch, sys; torch.set_num_threads(1); from flowrl.cli import main; sys.exit(main(sys.argv[1:]))"
    return subprocess.Popen(
        [sys.executable, "-c", code, "train", str(recipe), *more], cwd=REPOSITORY, stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def wait_for_iteration(folder: Path, number: int, process: subprocess.Popen) -> None:
    deadline = time.time() + 120
    metrics = folder / "metrics.jsonl"
    while time.time() < deadline and process.poll() is None:
        if metrics.exists() and metrics.read_text().count("\n") >= number:
            return
        time.sleep(0.02)
    raise AssertionError(f"no iteration {number}: {process.stdout.read() if process.stdout else ''}")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_stop_signal_saves_and_the_run_continues_bit_exactly(
    tiny_sd3: Path, tmp_path: Path, number: int, code: int
) -> None:
    config = small_config(tiny_sd3, run_dir=str(tmp_path / "run"), iterations=400, **{"checkpoint.every": 0})
    process = start_cli(config, tmp_path)
    wait_for_iteration(tmp_path / "run", 3, process)
    os.kill(process.pid, number)
    out, _ = process.communicate(timeout=60)
    assert process.returncode == code, out
    loaded = store.load(tmp_path / "run" / "checkpoints")
    rows = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(rows[-1])["iteration"] == loaded.iteration >= 3
    assert f"go on with: flowrl train --resume {tmp_path / 'run'}" in out
    straight = make(small_config(tiny_sd3, iterations=400))
    for _ in range(loaded.iteration):
        straight.iterate()
    a, b = tensors(straight.state()), tensors(loaded.state)
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def test_two_kills_at_random_moments_lose_at_most_one_interval(tiny_sd3: Path, tmp_path: Path) -> None:
    """SIGKILL in mid-run, twice; the run then ends with the tensors of a run that was never killed."""
    config = small_config(tiny_sd3, run_dir=str(tmp_path / "run"), iterations=12)
    process = start_cli(config, tmp_path)
    for done in (2, 5):
        wait_for_iteration(tmp_path / "run", done, process)
        process.kill()
        process.communicate()
        code = "import torch, sys; torch.set_num_threads(1); from flowrl.cli import main; sys.exit(main(sys.argv[1:]))"
        process = subprocess.Popen(
            [sys.executable, "-c", code, "train", "--resume", str(tmp_path / "run")], cwd=REPOSITORY,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip
    out, _ = process.communicate(timeout=120)
    assert process.returncode == 0, out
    straight = make(small_config(tiny_sd3, iterations=12))
    for _ in range(12):
        straight.iterate()
    a, b = tensors(straight.state()), tensors(store.load(tmp_path / "run" / "checkpoints").state)
    assert [n for n in a if not torch.equal(a[n], b[n])] == []
    rows = [json.loads(line)["iteration"] for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows == list(range(1, 13))
