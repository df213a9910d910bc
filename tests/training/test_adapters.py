"""The adapters: stock grids, a second consumer of the protocol, exports that diffusers loads."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flowrl.pipelines.sd3 import Sd3Adapter
from flowrl.pipelines.stable_diffusion import StableDiffusionAdapter

from flowrl import api
from flowrl.records import Request
from tests.training.helpers import make, small_config

CPU = torch.device("cpu")


def stock_grid(pipe, steps: int, monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """The sigmas that the stock pipeline's own call uses."""
    pipe(
        "a photo of a red circle", num_inference_steps=steps, height=36, width=36, max_sequence_length=13,
        guidance_scale=1.0, output_type="latent",
    )  # fmt: skip
    return pipe.scheduler.sigmas.clone()


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [4, 10, 28])
def test_sd3_grid_equals_the_stock_pipeline(tiny_sd3: Path, shift: float, steps: int, monkeypatch) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    adapter = Sd3Adapter.load(str(tiny_sd3), torch.float32, CPU)
    adapter.pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=shift)
    ours = adapter.schedule(steps, Request("", 0, 36, 36))
    torch.testing.assert_close(ours.sigma, stock_grid(adapter.pipe, steps, monkeypatch), atol=0, rtol=0)
    assert ours.steps == steps and float(ours.t[-1]) == 0.0


def test_sd3_grid_with_dynamic_shifting(tiny_sd3: Path, monkeypatch) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    adapter = Sd3Adapter.load(str(tiny_sd3), torch.float32, CPU)
    adapter.pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15)
    ours = adapter.schedule(10, Request("", 0, 36, 36)).sigma
    torch.testing.assert_close(ours, stock_grid(adapter.pipe, 10, monkeypatch), atol=0, rtol=0)


def test_sd3_sampling_equals_the_stock_pipeline(tiny_sd3: Path) -> None:
    """Same start noise, prompt and guidance: our ODE sampler gives the stock pipeline's latents."""
    from flowrl.rollout.policy import Policy
    from flowrl.rollout.sampling import sample

    adapter = Sd3Adapter.load(str(tiny_sd3), torch.float32, CPU)
    request = Request("a photo of a red circle", 0, 36, 36)
    noise = torch.randn(1, 4, 9, 9, generator=torch.Generator().manual_seed(3))
    policy = Policy(adapter, adapter.schedule(5, request), "ode", 0.0, 2.5)
    ours = sample(policy, policy.encode([request]), noise)
    stock = adapter.pipe(
        request.prompt, num_inference_steps=5, height=36, width=36, max_sequence_length=13, guidance_scale=2.5,
        latents=noise, output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, stock, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("steps", [4, 10])
def test_stable_diffusion_sampling_equals_ddim(tiny_sd15: Path, steps: int) -> None:
    from flowrl.rollout.policy import Policy
    from flowrl.rollout.sampling import sample

    adapter = StableDiffusionAdapter.load(str(tiny_sd15), torch.float32, CPU)
    request = Request("a photo of a red circle", 0, 32, 32)
    noise = torch.randn(1, *adapter.latent_shape(request), generator=torch.Generator().manual_seed(3))
    policy = Policy(adapter, adapter.schedule(steps, request), "ode", 0.0, 1.0)
    ours = sample(policy, policy.encode([request]), noise)
    stock = adapter.pipe(
        request.prompt, num_inference_steps=steps, height=32, width=32, guidance_scale=1.0, latents=noise,
        output_type="latent",
    ).images  # fmt: skip
    torch.testing.assert_close(ours, stock, atol=1e-4, rtol=1e-3)


def test_stable_diffusion_trains_through_the_same_trainer(tiny_sd15: Path) -> None:
    config = small_config(tiny_sd15, **{
        "model.adapter": "stable_diffusion", "model.height": 32, "model.width": 32, "rollout.kernel.name": "ddim",
        "rollout.kernel.noise": 1.0, "objective.kl.form": "paper", "objective.kl.weight": 0.1,
    })  # fmt: skip
    trainer = make(config)
    before = [p.detach().clone() for p in trainer.weights.parameters]
    first, second = trainer.iterate(), trainer.iterate()
    assert first["policy/ratio_max_deviation"] == 0.0
    assert first["policy/kl"] == 0.0 < second["policy/kl"]
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))


def test_flow_kernels_refuse_the_diffusion_grid(tiny_sd15: Path) -> None:
    config = small_config(tiny_sd15, **{
        "model.adapter": "stable_diffusion", "model.height": 32, "model.width": 32, "rollout.kernel.name": "flow_sde",
    })  # fmt: skip
    with pytest.raises(ValueError, match="flow_sde is for flow models"):
        make(config)


def test_decode_of_encode_stays_in_range(tiny_sd3: Path) -> None:
    adapter = Sd3Adapter.load(str(tiny_sd3), torch.float32, CPU)
    request = Request("", 0, 36, 36)
    image = adapter.decode(adapter.encode_media(torch.rand(2, 3, 36, 36), request), request)
    assert image.shape == (2, 3, 36, 36) and 0 <= float(image.min()) and float(image.max()) <= 1


def test_exported_lora_is_what_load_lora_weights_takes(tiny_sd3: Path, tmp_path: Path) -> None:
    """A stock pipeline with the exported LoRA predicts what the averaged policy predicts; rank 4, alpha 8 is not 1."""
    from diffusers import StableDiffusion3Pipeline

    config = small_config(
        tiny_sd3, run_dir=str(tmp_path / "run"), iterations=2, **{"ema.decay": 0.5, "optimizer.lr": 0.05}
    )
    api.train(config)
    trainer = make(config)
    from flowrl.checkpoint import store

    trainer.load_state(store.load(tmp_path / "run" / "checkpoints").state)
    pipe = StableDiffusion3Pipeline.from_pretrained(tiny_sd3)
    x, hidden, pooled = torch.randn(2, 4, 9, 9), torch.randn(2, 26, 64), torch.randn(2, 64)
    inputs = {"hidden_states": x, "timestep": torch.tensor([500.0, 100.0]), "encoder_hidden_states": hidden,
              "pooled_projections": pooled, "return_dict": False}  # fmt: skip
    with torch.no_grad():
        plain = pipe.transformer(**inputs)[0]
        pipe.load_lora_weights(str(tmp_path / "run" / "export"))
        loaded = pipe.transformer(**inputs)[0]
        with trainer.weights.averaged():
            ours = trainer.adapter.network(**inputs)[0]
    assert float((plain - ours).abs().max()) > 1e-3
    torch.testing.assert_close(loaded, ours, atol=1e-5, rtol=1e-4)


def test_exported_full_network_loads(tiny_sd3: Path, tmp_path: Path) -> None:
    from diffusers import SD3Transformer2DModel

    config = small_config(tiny_sd3, run_dir=str(tmp_path / "run"), iterations=1, **{"model.train": "full"})
    api.train(config)
    assert SD3Transformer2DModel.from_pretrained(tmp_path / "run" / "export" / "transformer") is not None


@pytest.mark.parametrize("train", ["lora", "full"])
def test_bf16_trains(tiny_sd3: Path, train: str) -> None:
    """bf16 compute: finite, ratio near 1, and every trained weight stays float32."""
    trainer = make(small_config(tiny_sd3, **{"model.dtype": "bf16", "model.train": train, "optimizer.lr": 1e-3}))
    rows = [trainer.iterate() for _ in range(2)]
    assert all(r["update/skipped"] == 0 for r in rows)
    assert rows[0]["policy/ratio_max_deviation"] < 1e-3
    assert {p.dtype for p in trainer.weights.parameters} == {torch.float32}
