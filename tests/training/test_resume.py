"""R1: a run that was cut and continued is the run that was not: every tensor, every metric row."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from flowrl import api
from flowrl.checkpoint import store
from flowrl.config.render import to_yaml
from tests.training.helpers import comparable, small_config, tensors

SETTINGS = {
    "rollout.window.kind": "sliding", "rollout.window.every": 2, "objective.kl.form": "paper", "objective.kl.weight": 0.1,
    "objective.updates": 2, "ema.decay": 0.5, "optimizer.schedule": "linear", "evaluation.every": 3, "evaluation.quick": 2,
    "checkpoint.keep": 10,
}  # fmt: skip


def straight_run(model: Path, folder: Path, **changes):
    config = small_config(model, run_dir=str(folder), **(SETTINGS | changes))
    api.train(config)
    return config


def rows_of(folder: Path) -> list[dict]:
    return [comparable(json.loads(line)) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def straight(tiny_sd3: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("straight") / "run"
    straight_run(tiny_sd3, folder)
    return folder


def cut_copy(straight: Path, folder: Path, at: int) -> Path:
    """The run as a kill after iteration ``at`` would leave it: later checkpoints gone, later rows still there."""
    import shutil

    shutil.copytree(straight, folder)
    text = (folder / "config.yaml").read_text().replace(str(straight), str(folder))
    (folder / "config.yaml").write_text(text)
    for path in (folder / "checkpoints").iterdir():
        if path.name.startswith("iteration-") and int(path.name.split("-")[1]) > at:
            shutil.rmtree(path)
    (folder / "checkpoints" / "LATEST").unlink()
    (folder / "evaluation.json").unlink()
    return folder


def assert_same(straight: Path, other: Path) -> None:
    first, second = store.load(straight / "checkpoints"), store.load(other / "checkpoints")
    assert first.iteration == second.iteration == 6
    a, b = tensors(first.state), tensors(second.state)
    assert a.keys() == b.keys() and len(a) > 20
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert different == []
    assert rows_of(straight) == rows_of(other)
    assert (straight / "samples.jsonl").read_bytes() == (other / "samples.jsonl").read_bytes()


@pytest.mark.parametrize("at", [1, 2, 3, 4, 5])
def test_resume_at_each_cut_is_bit_exact(straight: Path, tmp_path: Path, at: int) -> None:
    other = cut_copy(straight, tmp_path / "run", at)
    api.resume(other)
    assert_same(straight, other)


def test_resume_in_a_new_process_is_bit_exact(straight: Path, tmp_path: Path) -> None:
    other = cut_copy(straight, tmp_path / "run", 3)
    code = "import torch, sys; torch.set_num_threads(1); from flowrl.cli import main; sys.exit(main(sys.argv[1:]))"
    subprocess.run([sys.executable, "-c", code, "train", "--resume", str(other)], check=True, capture_output=True)
    assert_same(straight, other)


def test_full_fine_tuning_resumes_bit_exactly(tiny_sd3: Path, tmp_path: Path) -> None:
    settings = {"model.train": "full", "iterations": 3, "optimizer.lr": 1e-4}
    straight_run(tiny_sd3, tmp_path / "straight", **settings)
    other = cut_copy(tmp_path / "straight", tmp_path / "run", 1)
    api.resume(other)
    a, b = (tensors(store.load(f / "checkpoints").state) for f in (tmp_path / "straight", other))
    assert [n for n in a if not torch.equal(a[n], b[n])] == []


def test_a_changed_model_is_refused_before_anything_changes(straight: Path, tmp_path: Path) -> None:
    other = cut_copy(straight, tmp_path / "run", 3)
    before = (other / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match="policy weights do not fit this model; was model"):
        api.resume(other, ["model.lora.rank=2"])
    assert (other / "metrics.jsonl").read_bytes() == before


def test_an_altered_checkpoint_is_refused_and_the_one_before_it_used(
    straight: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = cut_copy(straight, tmp_path / "run", 4)
    target = next((other / "checkpoints" / "iteration-00000004").glob("*.safetensors"))
    data = bytearray(target.read_bytes())
    data[-1] ^= 1
    target.write_bytes(bytes(data))
    api.resume(other)
    said = capsys.readouterr().out
    assert "warning:" in said and "iteration-00000004" in said
    assert_same(straight, other)


def test_config_written_is_the_config_run(straight: Path) -> None:
    config = api.load_run(straight).config
    assert to_yaml(config) in (straight / "config.yaml").read_text()
