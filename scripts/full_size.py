"""Stable Diffusion 3.5 medium and Flux.1 dev at full size with random weights: what three iterations of a shipped recipe cost.

    python scripts/full_size.py sd35 --out docs/results/full_size_sd35.json [key=value ...]
    python scripts/full_size.py flux --out docs/results/full_size_flux.json [key=value ...]
    python scripts/full_size.py sd35 --tiny          # the same code on the tiny twin, on a CPU, in seconds

The network and the autoencoder have the sizes of the published models; the text encoders have one layer each, since a prompt
is encoded once. The reward is the mean of the red channel, so the time is the trainer's own. The first iteration warms up and is
left out of the medians. Needs no download.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from flowrl.pipelines.flux import FluxAdapter
from flowrl.pipelines.sd3 import Sd3Adapter

RECIPES = {"sd35": "sd35_pickscore_fast", "flux": "flux_pickscore"}
PEAK_TFLOPS = {"H200": 989.0, "H100": 989.0, "A100": 312.0, "L40S": 362.0}
"""Dense bf16 by the maker's data sheets, for the SXM cards; --peak-tflops takes another."""
PROMPTS = ("a photo of a red circle", "two blue squares", "a green circle above a red square", "a yellow square")
ITERATIONS = 3


def red(images: Any, prompts: Sequence[str]) -> Any:
    """A reward that costs nothing: the mean of the red channel, in [0, 1]."""
    return images[..., 0].mean((1, 2)) / 255.0


def words() -> list[str]:
    return sorted({word for prompt in PROMPTS for word in prompt.split()})


def autoencoder(scaling: float, shift: float) -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        in_channels=3, out_channels=3, latent_channels=16, sample_size=1024, down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4, block_out_channels=(128, 256, 512, 512), layers_per_block=2,
        use_quant_conv=False, use_post_quant_conv=False, scaling_factor=scaling, shift_factor=shift,
    )  # fmt: skip


def clip(width: int) -> tuple[Any, Any]:
    from flowrl.pipelines.tiny import clip_encoder, clip_tokenizer

    tokenizer = clip_tokenizer(words(), 77)
    return tokenizer, clip_encoder(len(tokenizer), 77, width, 1, tokenizer.eos_token_id, tokenizer.bos_token_id)


def t5(length: int) -> tuple[Any, Any]:
    from flowrl.pipelines.tiny import t5_encoder, t5_tokenizer

    tokenizer = t5_tokenizer(words(), length)
    return tokenizer, t5_encoder(len(tokenizer), 4096, 1)


def sd35_network() -> Any:
    """The network of Stable Diffusion 3.5 medium, after the settings in its published config."""
    import diffusers

    return diffusers.SD3Transformer2DModel(
        sample_size=128, patch_size=2, in_channels=16, out_channels=16, num_layers=24, attention_head_dim=64,
        num_attention_heads=24, joint_attention_dim=4096, caption_projection_dim=1536, pooled_projection_dim=2048,
        pos_embed_max_size=384, dual_attention_layers=tuple(range(13)), qk_norm="rms_norm",
    )  # fmt: skip


def sd35() -> Any:
    """A random StableDiffusion3Pipeline with the network of Stable Diffusion 3.5 medium."""
    import diffusers

    (tokenizer, first), (_, second), (third_tokenizer, third) = clip(768), clip(1280), t5(256)
    return diffusers.StableDiffusion3Pipeline(
        transformer=sd35_network(), scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
        vae=autoencoder(1.5305, 0.0609), text_encoder=first, tokenizer=tokenizer, text_encoder_2=second,
        tokenizer_2=tokenizer, text_encoder_3=third, tokenizer_3=third_tokenizer,
    )  # fmt: skip


def flux_network() -> Any:
    """The network of Flux.1 dev, after the settings in its published config."""
    import diffusers

    return diffusers.FluxTransformer2DModel(
        patch_size=1, in_channels=64, num_layers=19, num_single_layers=38, attention_head_dim=128, num_attention_heads=24,
        joint_attention_dim=4096, pooled_projection_dim=768, guidance_embeds=True,
    )  # fmt: skip


def flux() -> Any:
    """A random FluxPipeline with the network of Flux.1 dev."""
    import diffusers

    (tokenizer, encoder), (second_tokenizer, second) = clip(768), t5(512)
    from transformers import CLIPTextModel

    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(
        shift=3.0, use_dynamic_shifting=True, base_shift=0.5, max_shift=1.15, base_image_seq_len=256,
        max_image_seq_len=4096,
    )  # fmt: skip
    return diffusers.FluxPipeline(
        transformer=flux_network(), scheduler=scheduler, vae=autoencoder(0.3611, 0.1159),
        text_encoder=CLIPTextModel(encoder.config), tokenizer=tokenizer, text_encoder_2=second,
        tokenizer_2=second_tokenizer,
    )  # fmt: skip


def on(device: torch.device, dtype: torch.dtype, make: Any) -> Any:
    """Build straight on the device in ``dtype``: the float32 weights of Flux alone would take 48 GB of main memory."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with device:
            pipe = make()
    finally:
        torch.set_default_dtype(before)
    pipe.set_progress_bar_config(disable=True)
    return pipe.to(device)


class FullSd3(Sd3Adapter):
    @classmethod
    def load(cls, path: str, dtype: torch.dtype, device: torch.device, revision: str = "") -> FullSd3:
        return cls(on(device, dtype, sd35))


class FullFlux(FluxAdapter):
    @classmethod
    def load(cls, path: str, dtype: torch.dtype, device: torch.device, revision: str = "") -> FullFlux:
        return cls(on(device, dtype, flux))


class TinySd3(Sd3Adapter):
    @classmethod
    def load(cls, path: str, dtype: torch.dtype, device: torch.device, revision: str = "") -> TinySd3:
        from flowrl.pipelines.tiny import build_sd3

        small = {"layers": 1, "heads": 1, "head_dim": 32, "clip_layers": 1, "clip_hidden": 32, "vae_channels": (8, 16)}
        return cls(build_sd3(words(), **small))


class TinyFlux(FluxAdapter):
    @classmethod
    def load(cls, path: str, dtype: torch.dtype, device: torch.device, revision: str = "") -> TinyFlux:
        from flowrl.pipelines.tiny_families import build_flux

        return cls(build_flux(words()))


ADAPTERS = {
    ("sd35", False): "FullSd3",
    ("flux", False): "FullFlux",
    ("sd35", True): "TinySd3",
    ("flux", True): "TinyFlux",
}
SMALL = ("model.dtype=fp32", "model.height=24", "model.width=24", "model.lora.rank=2", "rollout.steps=6",
         "batch={groups: 2, group_size: 2, micro_batch: 2}")  # fmt: skip


def config_of(model: str, tiny: bool, folder: Path, overrides: Sequence[str]) -> Any:
    """The recipe with this file's model and reward, four prompts and three iterations; nothing else is changed."""
    from flowrl.config import check, load

    prompts = folder / "prompts.txt"
    prompts.write_text("\n".join(PROMPTS) + "\n", encoding="utf-8")
    here = Path(__file__).resolve()
    return check(load(RECIPES[model], [
        f"model.adapter={here}:{ADAPTERS[model, tiny]}", "model.path=random/weights", f"run_dir={folder / 'run'}",
        f"iterations={ITERATIONS}", f"data={{prompts: {prompts}, format: lines}}",
        f"evaluation.prompts={prompts}", "evaluation.format=lines", f"rewards=[{{name: '{here}:red'}}]",
        "tracking.progress=false", *(SMALL if tiny else ()), *overrides,
    ]))  # fmt: skip


def flops_a_sample(trainer: Any) -> tuple[float, float]:
    """FLOPs of the network's forward and backward for one sample of the run's size, counted by torch, nothing recomputed."""
    from torch.utils.flop_counter import FlopCounterMode

    from flowrl.rollout.requests import request_of

    adapter, request = trainer.adapter, request_of(trainer.config, trainer.rows[0])
    checkpointed = trainer.config.model.activation_checkpointing
    for network in adapter.networks if checkpointed else ():
        network.disable_gradient_checkpointing()
    given = trainer.policy.encode([request]).positive
    x = torch.randn(1, *adapter.latent_shape(request), device=adapter.device)
    t = torch.full((1,), 0.5, device=adapter.device)
    with FlopCounterMode(display=False) as forward, torch.no_grad():
        adapter.predict(x, t, given)
    with FlopCounterMode(display=False) as both:
        adapter.predict(x, t, given).value.sum().backward()
    trainer.optimizer.zero_grad(set_to_none=True)
    for network in adapter.networks if checkpointed else ():
        network.enable_gradient_checkpointing()
    return float(forward.get_total_flops()), float(both.get_total_flops() - forward.get_total_flops())


def measure(model: str, tiny: bool, overrides: Sequence[str], peak: float | None) -> dict[str, Any]:
    from flowrl import __version__
    from flowrl.distributed.backend import Backend
    from flowrl.performance.environment import CORE, version
    from flowrl.training.build import build

    with tempfile.TemporaryDirectory() as temporary:
        config = config_of(model, tiny, Path(temporary), overrides)
        trainer = build(config, Backend()).trainer
        device = trainer.adapter.device
        forward, backward = flops_a_sample(trainer)
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        rows = [trainer.iterate() for _ in range(ITERATIONS)]
        trainer.rewards.close()
    steady = rows[1:]
    seconds = {key: statistics.median(row[key] for row in steady) for key in steady[0] if key.startswith("time/")}
    work = statistics.median(
        row["calls/forward_samples"] * forward + row["calls/backward_samples"] * backward for row in steady
    )
    whole = seconds["time/iteration_s"]
    parameters = sum(p.numel() for p in trainer.adapter.network.parameters() if not p.requires_grad)
    return {
        "model": model, "tiny": tiny, "recipe": RECIPES[model], "overrides": list(overrides), "flowrl": __version__,
        "hardware": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu", "device": device.type,
        "packages": {name: version(name) for name in CORE}, "network_parameters": parameters,
        "samples": config.batch.samples, "iterations": len(rows), "images_per_s": config.batch.samples / whole,
        "seconds": seconds, "forward_flops_a_sample": forward, "backward_flops_a_sample": backward,
        "tflops_per_s": work / whole / 1e12,
        "model_flop_utilisation": None if peak is None else work / whole / (peak * 1e12), "peak_tflops": peak,
        "peak_memory_bytes": torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None,
        "skipped_updates": rows[-1]["update/skipped"],
    }  # fmt: skip


def peak_of(name: str) -> float | None:
    return next((peak for card, peak in PEAK_TFLOPS.items() if card in name), None)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("model", choices=sorted(RECIPES))
    parser.add_argument("overrides", nargs="*", metavar="key=value")
    parser.add_argument("--tiny", action="store_true", help="the tiny twin, on a CPU")
    parser.add_argument("--out", type=Path, help="where to write the JSON; default: the terminal alone")
    parser.add_argument("--peak-tflops", type=float, help="of the accelerator in bf16, for the utilisation")
    args = parser.parse_args(argv)
    if not args.tiny and not torch.cuda.is_available():
        sys.stderr.write("full_size: no GPU here, so nothing is measured; --tiny runs the same code on the tiny twin\n")
        return 2
    peak = args.peak_tflops
    if peak is None and not args.tiny:
        peak = peak_of(torch.cuda.get_device_name())
    found: Mapping[str, Any] = measure(args.model, args.tiny, args.overrides, peak)
    text = json.dumps(found, indent=1)
    if args.out:
        args.out.write_text(text + "\n", encoding="utf-8")
    sys.stdout.write(text + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
