"""The Wan pipeline that the video world is pre-trained with: stock classes, clips of the world's size, reproducible."""

from __future__ import annotations

import diffusers
import pytest
import torch
from flowrl.pipelines.tiny_video import build_wan_embedded
from flowrl.pipelines.wan import WanAdapter

from flowrl.records import Request
from flowrl.rollout.policy import Policy
from flowrl.rollout.sampling import sample
from flowrl.worlds.video1 import scenes

WORDS = sorted({word for pool in scenes.prompts("train").values() for prompt in pool for word in prompt.text.split()})


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> WanAdapter:
    folder = tmp_path_factory.mktemp("wan_video")
    build_wan_embedded(WORDS).save_pretrained(folder)
    return WanAdapter.load(str(folder), torch.float32, torch.device("cpu"))


def test_it_draws_clips_of_the_worlds_size(adapter: WanAdapter) -> None:
    prompt = scenes.prompts("held_out")["fast"][0].text
    request = Request(prompt, 0, scenes.SIZE, scenes.SIZE, frames=scenes.FRAMES)
    assert adapter.latent_shape(request) == (4, scenes.FRAMES, 6, 6)
    policy = Policy(adapter, adapter.schedule(2, request), "ode", 0.0, 1.0)
    x1 = torch.randn(1, *adapter.latent_shape(request), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        clip = adapter.decode(sample(policy, policy.encode([request]), x1), request)
    assert clip.shape == (1, 3, scenes.FRAMES, scenes.SIZE, scenes.SIZE)
    assert bool(clip.isfinite().all()) and 0 <= float(clip.min()) <= float(clip.max()) <= 1


def test_classes_are_those_of_diffusers_and_weights_those_of_the_seed(adapter: WanAdapter) -> None:
    assert type(adapter.pipe) is diffusers.WanPipeline and type(adapter.pipe.vae) is diffusers.AutoencoderKLWan
    assert 0.5e6 < sum(p.numel() for p in adapter.network.parameters()) < 1.2e6
    same, other = (build_wan_embedded(WORDS, seed=seed).transformer.state_dict() for seed in (0, 1))
    loaded = adapter.network.state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in same.items())
    assert any(not torch.equal(loaded[name], value) for name, value in other.items())
