"""Mistakes that show only once the parts are built: exact message on stderr, exit code 2, no traceback, nothing written over.

Mistakes in configs, prompts and words of the command line are in tests/cli.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from flowrl.cli import main
from flowrl.config.render import to_yaml
from tests.training.helpers import small_config


def returns_nan(images, prompts):
    return [float("nan")] * len(images)


def too_short(images, prompts):
    return [0.5] * (len(images) - 1)


def returns_text(images, prompts):
    return ["good"] * len(images)


def always_raises(images, prompts):
    raise RuntimeError("the judge is out")


def infinite(images, prompts):
    return np.full(len(images), np.inf)


def mine(name: str) -> list[dict[str, str]]:
    return [{"name": f"tests.training.test_bad_input:{name}"}]


CASES = {
    "reward raises": (
        {"rewards": mine("always_raises")},
        "8 of 8 samples could not be scored, more than failures.max_invalid_fraction (0.1) allows; first error: "
        "always_raises: RuntimeError: the judge is out (test_bad_input.py:31); mend the reward",
    ),
    "reward returns NaN": (
        {"rewards": mine("returns_nan")},
        "8 of 8 samples could not be scored, more than failures.max_invalid_fraction (0.1) allows; first error: "
        "returns_nan: returned no value (None or NaN); mend the reward",
    ),
    "reward of the wrong length": (
        {"rewards": mine("too_short")},
        "reward 'too_short': returned 3 scores for 4 pictures; return one float (or None) a picture, 4 in all",
    ),
    "picture size": (
        {"model.height": 37},
        "model.height: 37 is not a multiple of 12, which this model needs; use 36",
    ),
    "LoRA group": (
        {"model.lora.targets": ["attention", "norms"]},
        "model.lora.targets: unknown group 'norms'; use attention, feed_forward",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_message_and_exit_code(name: str, tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    changes, message = CASES[name]
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(small_config(tiny_sd3, run_dir=str(tmp_path / "run"), **changes)))
    assert main(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert said == f"error: {message}\n"


def test_a_folder_that_holds_a_run_is_not_written_over(
    tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text("seed: 5\n")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(small_config(tiny_sd3, run_dir=str(run))))
    assert main(["train", str(recipe)]) == 2
    assert capsys.readouterr().err == (
        f"error: run_dir: {run} already holds a run; choose another with run_dir=..., or continue it with "
        f"flowrl train --resume {run}\n"
    )
    assert [p.name for p in run.iterdir()] == ["config.yaml"]
    assert (run / "config.yaml").read_text() == "seed: 5\n"


def test_a_folder_without_a_model(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    empty = tmp_path / "model"
    empty.mkdir()
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(small_config(empty, run_dir=str(tmp_path / "run"))))
    assert main(["train", str(recipe)]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: model.path: {empty} holds no model_index.json")
    assert "Traceback" not in said
    assert not (tmp_path / "run").exists()


def test_resume_of_damaged_checkpoints_names_each(
    tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(to_yaml(small_config(tiny_sd3, run_dir=str(tmp_path / "run"), iterations=2)))
    assert main(["train", str(recipe)]) == 0
    for folder in (tmp_path / "run" / "checkpoints").glob("iteration-*"):
        (folder / "manifest.json").write_text("{")
    metrics = (tmp_path / "run" / "metrics.jsonl").read_bytes()
    capsys.readouterr()
    assert main(["train", "--resume", str(tmp_path / "run")]) == 2
    said = capsys.readouterr().err
    assert "iteration-00000001" in said and "iteration-00000002" in said and "manifest.json" in said
    assert (tmp_path / "run" / "metrics.jsonl").read_bytes() == metrics


def test_eval_of_a_run_without_checkpoints(tiny_sd3: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.yaml").write_text(to_yaml(small_config(tiny_sd3, run_dir=str(run))))
    assert main(["eval", str(run)]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and str(run / "checkpoints") in said and "Traceback" not in said
