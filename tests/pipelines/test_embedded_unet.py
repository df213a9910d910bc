"""The embedded Stable Diffusion 1.x pipeline: stock classes and grids, small files, pictures that follow their captions."""

from __future__ import annotations

import json
import re
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
import torch
from flowrl.pipelines.base import EMBEDDED, locate
from flowrl.pipelines.sd3 import Sd3Adapter
from flowrl.pipelines.stable_diffusion import StableDiffusionAdapter
from flowrl.rewards.compositional import judge

from flowrl.config import load
from flowrl.distributed.backend import Backend
from flowrl.dynamics.kernels import StepPoint, transition
from flowrl.records import Request
from flowrl.rollout.policy import Policy
from flowrl.rollout.sampling import sample
from flowrl.training.build import build
from flowrl.worlds.v1 import detect, scenes

FOLDER = Path(locate(EMBEDDED, StableDiffusionAdapter.embedded_name))
REQUEST = Request("a photo of a red circle", 0, scenes.SIZE, scenes.SIZE)
SIMPLE = ("single_object", "colors")


@pytest.fixture(scope="module")
def adapter() -> StableDiffusionAdapter:
    return StableDiffusionAdapter.load(EMBEDDED, torch.float32, torch.device("cpu"))


def noise(count: int, seed: int) -> torch.Tensor:
    return torch.randn(count, 4, 9, 9, generator=torch.Generator().manual_seed(seed))


def test_all_embedded_models_are_small_and_safe() -> None:
    assets = Path(str(resources.files("flowrl.assets")))
    files = [p for p in assets.rglob("*") if p.is_file() and p.suffix not in (".py", ".pyc")]
    assert sum(p.stat().st_size for p in files) < 15_000_000
    assert {p.suffix for p in files if p.is_relative_to(FOLDER)} == {".safetensors", ".json"}


def test_configs_name_no_machine() -> None:
    texts = [path.read_text(encoding="utf-8") for path in FOLDER.rglob("*.json")]
    assert len(texts) == 8
    assert not any("_name_or_path" in text or "is_local" in text or re.search(r'[" ]/\w', text) for text in texts)


def test_from_pretrained_gives_stock_classes() -> None:
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextModel

    pipe = StableDiffusionPipeline.from_pretrained(FOLDER, use_safetensors=True)
    for part, expected in (
        (pipe.unet, UNet2DConditionModel), (pipe.vae, AutoencoderKL), (pipe.text_encoder, CLIPTextModel),
        (pipe.scheduler, DDIMScheduler),
    ):  # fmt: skip
        assert type(part) is expected
    assert 0.6e6 < sum(p.numel() for p in pipe.unet.parameters()) < 1.2e6
    assert pipe.scheduler.config.prediction_type == "epsilon"


def test_the_autoencoder_is_that_of_the_other_embedded_model(adapter: StableDiffusionAdapter) -> None:
    other = Sd3Adapter.load(EMBEDDED, torch.float32, torch.device("cpu")).pipe.vae
    mine = adapter.pipe.vae
    assert all(torch.equal(value, mine.state_dict()[name]) for name, value in other.state_dict().items())
    assert mine.config.scaling_factor == other.config.scaling_factor
    assert mine.config.shift_factor is None  # the stock pipeline would not apply one


@pytest.mark.parametrize("steps", [10, 20])
def test_grid_is_that_of_the_stock_scheduler(adapter: StableDiffusionAdapter, steps: int) -> None:
    from diffusers import DDIMScheduler

    stock = DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    stock.set_timesteps(steps)
    ours = adapter.schedule(steps, REQUEST)
    times = stock.timesteps.tolist()
    assert times[0] == 1000 - 1000 // steps + 1 and times[-1] == 1
    assert (ours.t[:-1] * 1000).round().long().tolist() == times
    # Betas whose square roots are linear, in double precision; the last step ends at the first noise level.
    bars = np.cumprod(1 - np.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2)
    np.testing.assert_allclose(stock.alphas_cumprod.numpy(), bars, rtol=1e-5)
    expected = np.array([*bars[times], bars[0]])
    np.testing.assert_allclose(ours.alpha.numpy() ** 2, expected, rtol=1e-5)
    np.testing.assert_allclose(ours.sigma.numpy() ** 2, 1 - expected, rtol=1e-4)


@pytest.mark.parametrize("eta", [0.0, 0.5, 1.0])
def test_each_step_is_the_stock_schedulers(adapter: StableDiffusionAdapter, eta: float) -> None:
    """Mean and std of the ddim kernel on this grid, against the stock step with the same prediction and noise."""
    from diffusers import DDIMScheduler

    stock = DDIMScheduler.from_pretrained(FOLDER, subfolder="scheduler")
    stock.set_timesteps(10)
    grid = adapter.schedule(10, REQUEST)
    x, epsilon, fresh = noise(2, 1), noise(2, 2), noise(2, 3)
    for i, t in enumerate(stock.timesteps):
        point = StepPoint.of(grid, torch.full((2,), i), 4)
        x0 = (x - point.sigma * epsilon) / point.alpha
        mean, std = (
            transition("ddim", eta, x, x0, epsilon, point) if eta else transition("ode", 0, x, x0, epsilon, point)
        )
        expected = stock.step(epsilon, t, x, eta=eta, variance_noise=fresh).prev_sample
        torch.testing.assert_close(mean + std * fresh, expected, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("guidance", [1.0, 3.0])
def test_a_picture_is_the_stock_pipelines(adapter: StableDiffusionAdapter, guidance: float) -> None:
    """Same start noise: our deterministic rollout, decoded, and the stock call."""
    x = noise(1, 3)
    policy = Policy(adapter, adapter.schedule(10, REQUEST), "ode", 0.0, guidance)
    ours = adapter.decode(sample(policy, policy.encode([REQUEST]), x), REQUEST)
    # The stock call takes multiples of 8 pixels only; with latents given, their shape and not this size decides.
    stock = adapter.pipe(
        REQUEST.prompt, num_inference_steps=10, height=40, width=40, guidance_scale=guidance, latents=x, output_type="pt"
    ).images  # fmt: skip
    assert ours.shape == stock.shape == (1, 3, 36, 36)
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-3)


def test_pictures_follow_their_captions(adapter: StableDiffusionAdapter) -> None:
    """Strict accuracy on 40 pictures of held-out simple sentences, far above that of a wrong caption (about 3%)."""
    pool = [p for tag in SIMPLE for p in scenes.prompts("held_out")[tag]]
    chosen = [pool[i % len(pool)] for i in range(40)]
    requests = [Request(p.text, i, scenes.SIZE, scenes.SIZE) for i, p in enumerate(chosen)]
    policy = Policy(adapter, adapter.schedule(10, REQUEST), "ode", 0.0, 2.0)
    images = adapter.decode(sample(policy, policy.encode(requests), noise(40, 5)), REQUEST)
    found = detect.detect((images * 255).round().to(torch.uint8).permute(0, 2, 3, 1).numpy())
    right = np.mean([judge(p.metadata, d).strict for p, d in zip(chosen, found, strict=True)])
    wrong = np.mean([judge(p.metadata, d).strict for p, d in zip(chosen[1:] + chosen[:1], found, strict=True)])
    assert right > 0.3 and wrong < right / 2


def test_what_is_recorded() -> None:
    recorded = json.loads((FOLDER / "pretraining.json").read_text())
    assert recorded["settings"]["family"] == "stable_diffusion"
    assert min(recorded["by_guidance"]["2.0"][tag] for tag in SIMPLE) > 0.3


@pytest.mark.parametrize("recipe", ["sd15_ddpo", "sd15_dpok"])
def test_one_iteration_of_each_recipe(recipe: str) -> None:
    """The real trainer: on policy at first, so ratio 1 and no KL; the weights move, and only those of the adaptation."""
    settings = ["batch.groups=2", "batch.group_size=6", "batch.micro_batch=12", "objective.updates=1", "rollout.steps=4",
                "data.tags={counting: 1.0}"]  # fmt: skip
    config = load(recipe, settings)
    assert (config.rollout.kernel.name, config.rollout.kernel.noise) == ("ddim", 1.0)
    assert config.rollout.window.kind == "full"
    trainer = build(config, Backend()).trainer
    before = [p.detach().clone() for p in trainer.weights.parameters]
    row = trainer.iterate()
    assert row["policy/ratio_max_deviation"] == pytest.approx(0.0, abs=1e-5)
    assert row["policy/kl"] == 0.0
    assert np.isfinite(row["score/mean"])
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))
    second = trainer.iterate()
    assert second["policy/kl"] > 0.0 or config.objective.kl.form == "none"
