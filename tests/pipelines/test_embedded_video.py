"""The embedded Wan pipeline: stock classes, small files, clips that follow their captions, and RL on it that runs."""

from __future__ import annotations

import json
import re
from pathlib import Path

import numpy as np
import pytest
import torch
from flowrl.pipelines.base import EMBEDDED, locate
from flowrl.pipelines.wan import WanAdapter
from flowrl.pipelines.wan_image import WanImageAdapter
from PIL import Image

from flowrl import api
from flowrl.config import check, load
from flowrl.config.dialect import ConfigError
from flowrl.errors import UserError
from flowrl.plan import plan
from flowrl.records import Request
from flowrl.rollout.policy import Policy
from flowrl.rollout.sampling import sample
from flowrl.worlds.video1 import scenes, track
from flowrl.worlds.video1.render import render

FOLDER = Path(locate(EMBEDDED, WanAdapter.embedded_name))
REQUEST = Request("a red circle moving left fast", 0, scenes.SIZE, scenes.SIZE, frames=scenes.FRAMES)


@pytest.fixture(scope="module")
def adapter() -> WanAdapter:
    return WanAdapter.load(EMBEDDED, torch.float32, torch.device("cpu"))


def to_clips(films: torch.Tensor) -> np.ndarray:
    return (films * 255).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def test_files_are_small_safe_and_name_no_machine() -> None:
    files = [p for p in FOLDER.rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) < 8_000_000
    assert {p.suffix for p in files} == {".safetensors", ".json"}
    texts = [p.read_text(encoding="utf-8") for p in files if p.suffix == ".json"]
    assert not any("_name_or_path" in text or "is_local" in text or re.search(r'[" ]/\w', text) for text in texts)


def test_classes_are_those_of_diffusers(adapter: WanAdapter) -> None:
    import diffusers
    from transformers import UMT5EncoderModel

    pipe = adapter.pipe
    assert type(pipe) is diffusers.WanPipeline and type(pipe.vae) is diffusers.AutoencoderKLWan
    assert type(adapter.network) is diffusers.WanTransformer3DModel and type(pipe.text_encoder) is UMT5EncoderModel
    assert 0.5e6 < sum(p.numel() for p in adapter.network.parameters()) < 1.2e6
    assert adapter.latent_shape(REQUEST) == (4, 5, 6, 6)
    config = load("demo_video")
    assert plan(config).stored_bytes == plan(config, adapter.latent_shape(REQUEST)).stored_bytes


def test_autoencoder_keeps_what_the_checker_sees(adapter: WanAdapter) -> None:
    rng = np.random.default_rng(1)
    prompts = [scenes.draw_prompt(rng, "held_out") for _ in range(48)]
    clips = np.stack([render(scenes.place(prompt, rng)) for prompt in prompts])
    films = torch.from_numpy(clips).permute(0, 4, 1, 2, 3).float() / 255
    latents = adapter.encode_media(films, REQUEST)
    assert abs(float(latents.mean())) < 0.2 and 0.8 < float(latents.std()) < 1.2
    found = track.follow(to_clips(adapter.decode(latents, REQUEST)))
    assert np.mean([not track.strict_reason(t, p.metadata) for t, p in zip(found, prompts, strict=True)]) > 0.85


def test_clips_follow_their_captions(adapter: WanAdapter) -> None:
    """Strict accuracy on 48 clips of held-out sentences, far above that of a wrong caption."""
    pool = [p for side in scenes.prompts("held_out").values() for p in side]
    chosen = [pool[i] for i in torch.randperm(len(pool), generator=torch.Generator().manual_seed(0))[:48].tolist()]
    requests = [Request(p.text, i, scenes.SIZE, scenes.SIZE, frames=scenes.FRAMES) for i, p in enumerate(chosen)]
    policy = Policy(adapter, adapter.schedule(10, REQUEST), "ode", 0.0, 1.0)
    x = torch.randn(48, *adapter.latent_shape(REQUEST), generator=torch.Generator().manual_seed(5))
    found = track.follow(to_clips(adapter.decode(sample(policy, policy.encode(requests), x), REQUEST)))
    right = np.mean([not track.strict_reason(t, p.metadata) for t, p in zip(found, chosen, strict=True)])
    wrong = np.mean(
        [not track.strict_reason(t, p.metadata) for t, p in zip(found, chosen[1:] + chosen[:1], strict=True)]
    )
    assert 0.2 < right < 0.9 and wrong < right / 4


def test_image_to_video_has_no_embedded_model() -> None:
    with pytest.raises(UserError, match="ships no embedded model"):
        WanImageAdapter.folder(load("demo_video", ["model.adapter=wan_image"]).model)


def test_another_size_is_refused_before_loading() -> None:
    with pytest.raises(ConfigError, match="the embedded video model makes 5 frames of 24 x 24, not 9 of 24 x 24"):
        check(load("demo_video", ["model.frames=9"]))


def test_two_iterations_of_the_recipe(tmp_path: Path) -> None:
    """The recipe as it ships, on fewer clips: a gradient, clips and sheets beside the report, an export."""
    run = tmp_path / "run"
    config = load("demo_video", [
        f"run_dir={run}", "iterations=2", "batch={groups: 3, group_size: 4, micro_batch: 12}",
        "rollout.steps=6", "evaluation={count: 4, per_prompt: 1, steps: 2, every: 0, grid: 2}", "checkpoint.every=0",
        "evaluation.prompts=world/video1", "tracking={progress: false}",
    ])  # fmt: skip
    api.train(config)
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    rows = [row for row in rows if "policy/matching_error" in row]
    assert len(rows) == 2 and all(row["optimizer/grad_norm"] > 0 for row in rows)
    samples = [json.loads(line) for line in (run / "samples.jsonl").read_text(encoding="utf-8").splitlines()]
    assert samples and all(row["strict"] in (True, False) for row in samples)
    assert list((run / "pictures").glob("video-*.webp")) and list((run / "pictures").glob("video-*.png"))
    moving = Image.open(run / "grids" / "video.webp")
    assert getattr(moving, "n_frames", 1) == scenes.FRAMES and (run / "grids" / "video.png").is_file()
    assert (run / "report.html").is_file() and list((run / "export").glob("*.safetensors"))
