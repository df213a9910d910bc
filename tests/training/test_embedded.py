"""The embedded pipeline in assets: real classes, small files, pictures that follow their captions."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from flowrl.pipelines.sd3 import Sd3Adapter
from flowrl.rewards.compositional import judge

from flowrl.config import load
from flowrl.distributed.backend import Backend
from flowrl.records import Request
from flowrl.training.build import build
from flowrl.worlds.v1 import detect, render, scenes

FOLDER = Path(str(resources.files("flowrl.assets"))) / "embedded_sd3"


@pytest.fixture(scope="module")
def adapter() -> Sd3Adapter:
    return Sd3Adapter.load("embedded", torch.float32, torch.device("cpu"))


def test_files_are_small_and_safe() -> None:
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= 12_000_000
    assert {p.suffix for p in files} <= {".safetensors", ".json", ".txt"}


def test_classes_are_those_of_diffusers(adapter: Sd3Adapter) -> None:
    import diffusers

    assert type(adapter.pipe) is diffusers.StableDiffusion3Pipeline
    assert type(adapter.network) is diffusers.SD3Transformer2DModel
    assert type(adapter.pipe.vae) is diffusers.AutoencoderKL


def test_held_out_sentences_are_not_trained_on() -> None:
    held = {p.text for pool in scenes.prompts("held_out").values() for p in pool}
    rows = build_rows()
    assert not held & {row.prompt for row in rows}
    assert len(held) > 500 and len(rows) > 4000


def build_rows():
    from flowrl.training.build import training_prompts

    return training_prompts(load("demo"))[0]


def test_autoencoder_keeps_what_the_checker_sees(adapter: Sd3Adapter) -> None:
    rng = np.random.default_rng(1)
    prompts = [scenes.draw_prompt(rng) for _ in range(150)]
    pixels = np.stack([render.render(scenes.place(p, rng)) for p in prompts])
    request = Request("", 0, scenes.SIZE, scenes.SIZE)
    media = torch.from_numpy(pixels).permute(0, 3, 1, 2).float() / 255
    rebuilt = adapter.decode(adapter.encode_media(media, request), request)
    assert float((rebuilt - media).abs().mean()) < 0.03
    found = detect.detect((rebuilt * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    assert np.mean([judge(p.metadata, d).strict for p, d in zip(prompts, found, strict=True)]) > 0.9


def test_pictures_follow_their_captions(adapter: Sd3Adapter) -> None:
    """Strict accuracy on 100 held-out prompts lies well above that of shuffled captions (0.6%), within the recorded range."""
    from flowrl.evaluation.paired import evaluate
    from flowrl.scoring.runtime import RewardRuntime
    from flowrl.training.build import held_out_prompts

    config = load("demo", ["evaluation.count=100", "evaluation.per_prompt=1"])
    found = evaluate(
        config, adapter, RewardRuntime(config.rewards, config.failures), held_out_prompts(config), "base", 0
    )
    strict = np.mean([row["strict"] for row in found.rows])
    recorded = json.loads((FOLDER / "pretraining.json").read_text())
    expected = recorded["stages"][-1]["by_guidance"][str(float(config.evaluation.guidance))]["all"]
    assert 0.3 <= expected <= 0.7
    assert abs(strict - expected) < 0.15  # three standard errors of 100 pictures


def test_the_recorded_plateau() -> None:
    """The last quarter of pre-training adds less than 3 points over 1,608 pictures, without guidance and at 3."""
    recorded = json.loads((FOLDER / "pretraining.json").read_text())
    steps = [stage["settings"]["steps"] for stage in recorded["stages"]]
    assert steps[-1] / sum(steps) == pytest.approx(0.25, abs=1e-3)
    many, few = recorded["plateau"]["pictures_1008"], recorded["plateau"]["pictures_600"]
    for guidance in ("1.0", "3.0"):
        assert few[guidance] == [round(s["by_guidance"][guidance]["all"], 4) for s in recorded["stages"][1:]]
        gain = [(1008 * m + 600 * f) / 1608 for m, f in zip(many[guidance], few[guidance], strict=True)]
        assert 0 <= gain[1] - gain[0] < 0.03


def test_one_iteration_of_the_recipe() -> None:
    config = load("demo", ["batch.groups=2", "batch.group_size=8", "threads=1", "iterations=1", "objective.updates=1"])
    row = build(config, Backend()).trainer.iterate()
    assert row["policy/ratio_max_deviation"] in (0.0, pytest.approx(0.0, abs=1e-5))
    assert 0 < row["score/mean"] < 1
