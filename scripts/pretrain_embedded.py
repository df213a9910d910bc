"""Pre-train the embedded Stable Diffusion 3 pipeline on world v1 from nothing, and write it to assets/embedded_sd3.

    python scripts/pretrain_embedded.py --out first
    python scripts/pretrain_embedded.py --from first --seed 1 --steps 3334 --lr 3e-4 --out second
    python scripts/pretrain_embedded.py --from second --seed 2 --steps 4445 --lr 1e-4 --out assets/embedded_sd3

Three stages, all seeded: the autoencoder on renders, a pool of encoded scenes, then transformer and text encoders together
by rectified-flow matching. The later commands go on from the averaged weights of the one before with fresh scenes and a
fresh optimizer; the third is the last quarter of pre-training, and what it adds shows the plateau. Writes pretraining.json
beside the weights: settings, times, and the accuracy curve on held-out prompts.
"""

from __future__ import annotations

import argparse
import copy
import json
import math
import platform
import sys
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import StableDiffusion3Pipeline
from flowrl.pipelines.tiny import build_sd3
from flowrl.rewards.compositional import judge

from flowrl.worlds.v1 import detect, render, scenes

TEXT_LENGTH = 13


def vocabulary() -> set[str]:
    return {
        word
        for split in ("train", "held_out")
        for pool in scenes.prompts(split).values()
        for p in pool
        for word in p.text.split()
    }


def draw(count: int, rng: np.random.Generator) -> tuple[list[scenes.Prompt], torch.Tensor]:
    chosen = [scenes.draw_prompt(rng) for _ in range(count)]
    pixels = np.stack([render.render(scenes.place(p, rng)) for p in chosen])
    return chosen, torch.from_numpy(pixels)


def to_model(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.permute(0, 3, 1, 2).float() / 127.5 - 1.0


def to_pixels(images: torch.Tensor) -> np.ndarray:
    return ((images.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 1).numpy()


def train_vae(vae: torch.nn.Module, steps: int, rng: np.random.Generator) -> None:
    optimizer = torch.optim.AdamW(vae.parameters(), lr=2e-3, betas=(0.9, 0.98), weight_decay=1e-4)
    _, pool = draw(20_000, rng)
    vae.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = (
                2e-3 * min(1.0, (step + 1) / 50) * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * step / steps)))
            )
        images = to_model(pool[rng.integers(len(pool), size=32)])
        posterior = vae.encode(images).latent_dist
        output = vae.decode(posterior.sample()).sample
        # Squared error favours blur; the absolute term keeps edges sharp. The weak KL keeps the latents near N(0, 1).
        loss = (
            F.mse_loss(output, images)
            + 0.5 * F.l1_loss(output, images)
            + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"vae {step:5d}/{steps} loss {loss.item():.4f}", flush=True)
    vae.eval()


@torch.no_grad()
def encode_pool(vae: torch.nn.Module, count: int, rng: np.random.Generator) -> tuple[list[str], torch.Tensor]:
    texts: list[str] = []
    latents = []
    for _ in range(0, count, 500):
        chosen, pixels = draw(500, rng)
        texts += [p.text for p in chosen]
        latents.append(vae.encode(to_model(pixels)).latent_dist.mean)
    return texts, torch.cat(latents)


@torch.no_grad()
def checker_accuracy(vae: torch.nn.Module, rng: np.random.Generator, count: int = 1000) -> dict[str, float]:
    chosen, pixels = draw(count, rng)
    rebuilt = torch.cat([vae.decode(vae.encode(to_model(part)).latent_dist.mean).sample for part in pixels.split(250)])
    found = {"renders": detect.detect(pixels.numpy()), "reconstructions": detect.detect(to_pixels(rebuilt))}
    return {
        name: float(np.mean([judge(p.metadata, d).strict for p, d in zip(chosen, rows, strict=True)]))
        for name, rows in found.items()
    }


def embed(pipe, texts: list[str]) -> tuple[torch.Tensor, torch.Tensor]:
    hidden, _, pooled, _ = pipe.encode_prompt(
        texts,
        None,
        None,
        do_classifier_free_guidance=False,
        max_sequence_length=TEXT_LENGTH,
        device=torch.device("cpu"),
    )
    return hidden, pooled


@torch.no_grad()
def evaluate(pipe, pool: list[scenes.Prompt], *, guidance: float, steps: int = 10, seed: int = 7) -> dict[str, float]:
    """Strict accuracy by tag of Euler samples at fixed noise."""
    vae, model = pipe.vae, pipe.transformer
    generator = torch.Generator().manual_seed(seed)
    side = model.config.sample_size
    noise = torch.randn(len(pool), model.config.in_channels, side, side, generator=generator)
    empty = embed(pipe, [""])
    hits: dict[str, list[float]] = {}
    for start in range(0, len(pool), 100):
        part, x = pool[start : start + 100], noise[start : start + 100]
        hidden, pooled = embed(pipe, [p.text for p in part])
        for i in range(steps):
            t, s = 1 - i / steps, 1 - (i + 1) / steps
            at = torch.full((len(part),), t * 1000)
            v = model(x, hidden, pooled, at, return_dict=False)[0]
            if guidance != 1.0:
                u = model(x, empty[0].expand_as(hidden), empty[1].expand_as(pooled), at, return_dict=False)[0]
                v = u + guidance * (v - u)
            x = x + (s - t) * v
        images = vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample
        for p, found in zip(part, detect.detect(to_pixels(images)), strict=True):
            hits.setdefault(p.tag, []).append(float(judge(p.metadata, found).strict))
    scores = {tag: float(np.mean(values)) for tag, values in hits.items()}
    scores["all"] = float(np.mean([v for values in hits.values() for v in values]))
    return scores


def held_out_sample(count: int, seed: int) -> list[scenes.Prompt]:
    rng = np.random.default_rng(seed)
    return [scenes.draw_prompt(rng, "held_out") for _ in range(count)]


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up, constant to 35%, cosine to 5% of the peak at 75%, then flat."""
    at = step / steps
    if at < 0.35:
        return peak * min(1.0, (step + 1) / 200)
    return peak * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * min(1.0, (at - 0.35) / 0.4))))


def train_flow(pipe, texts: list[str], latents: torch.Tensor, args: argparse.Namespace) -> tuple[list[dict], dict]:
    modules = {
        name: getattr(pipe, name) for name in ("transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
    }
    averaged = {name: copy.deepcopy(module) for name, module in modules.items()}
    parameters = [p for module in modules.values() for p in module.parameters()]
    shadow = [p for module in averaged.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=1e-2)
    rng, generator = np.random.default_rng([args.seed, 4]), torch.Generator().manual_seed(args.seed + 4)
    test_prompts, curve, started = held_out_sample(300, 11), [], time.time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, args.lr)
        pick = rng.integers(len(texts), size=args.batch)
        drop = rng.random(args.batch) < 0.1
        hidden, pooled = embed(pipe, ["" if d else texts[i] for i, d in zip(pick, drop, strict=True)])
        x0 = latents[torch.from_numpy(pick)]
        x1 = torch.randn(x0.shape, generator=generator)
        t = torch.sigmoid(torch.randn(args.batch, generator=generator))
        x = torch.lerp(x0, x1, t[:, None, None, None])
        v = modules["transformer"](x, hidden, pooled, t * 1000, return_dict=False)[0]
        loss = F.mse_loss(v, x1 - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(args.ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(shadow, parameters, 1 - decay)
        if step % 200 == 0:
            print(f"flow {step:6d}/{args.steps} loss {loss.item():.4f} {time.time() - started:.0f}s", flush=True)
        if (step + 1) % max(1, args.steps // 8) == 0:
            view = with_modules(pipe, averaged)
            row = {"step": step + 1, "seconds": round(time.time() - started), "guidance": 3.0}
            row |= {k: round(v, 4) for k, v in evaluate(view, test_prompts, guidance=3.0).items()}
            curve.append(row)
            print(json.dumps(row), flush=True)
            if args.snapshots:
                save(view, Path(args.snapshots))
    return curve, averaged


def with_modules(pipe, modules: dict):
    return type(pipe)(**{**pipe.components, **modules})


def save(pipe, folder: Path) -> None:
    """Write the pipeline with half-precision weights; loading asks for float32."""
    view = with_modules(
        pipe, {k: copy.deepcopy(m).half() for k, m in pipe.components.items() if isinstance(m, torch.nn.Module)}
    )
    view.save_pretrained(folder, safe_serialization=True)
    for path in folder.glob("*/config.json"):  # loading leaves the folder's path in the configs
        config = json.loads(path.read_text())
        if config.pop("_name_or_path", None) is not None:
            path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def prepare_vae(pipe, args: argparse.Namespace) -> None:
    if args.vae_from:
        pipe.vae = type(pipe.vae).from_pretrained(args.vae_from, subfolder="vae", torch_dtype=torch.float32)
    else:
        train_vae(pipe.vae, args.vae_steps, np.random.default_rng([args.seed, 1]))
        pipe.vae.save_pretrained(Path(args.out) / "vae")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--snapshots", default="", help="also save the averaged weights here at every evaluation")
    parser.add_argument(
        "--vae-from", default="", help="take the autoencoder of this pipeline folder and skip its training"
    )
    parser.add_argument("--from", dest="start", default="", help="go on from the weights of this pipeline folder")
    parser.add_argument("--vae-steps", type=int, default=1500)
    parser.add_argument("--pool", type=int, default=100_000)
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--ema", type=float, default=0.999)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    clock = {"start": time.time()}
    if args.start:
        pipe = StableDiffusion3Pipeline.from_pretrained(args.start, torch_dtype=torch.float32)
    else:
        pipe = build_sd3(vocabulary(), size=scenes.SIZE, text_length=TEXT_LENGTH, seed=args.seed)
        prepare_vae(pipe, args)
    accuracy = checker_accuracy(pipe.vae, np.random.default_rng([args.seed, 2]))
    clock["vae"] = time.time()
    print("checker accuracy", accuracy, f"{clock['vae'] - clock['start']:.0f}s", flush=True)
    texts, latents = encode_pool(pipe.vae, args.pool, np.random.default_rng([args.seed, 3]))
    if not args.start:
        pipe.vae.register_to_config(shift_factor=latents.mean().item(), scaling_factor=1.0 / latents.std().item())
    latents = (latents - pipe.vae.config.shift_factor) * pipe.vae.config.scaling_factor
    clock["pool"] = time.time()
    print(f"pool {len(texts)} scenes {clock['pool'] - clock['vae']:.0f}s", flush=True)
    curve, averaged = train_flow(pipe, texts, latents, args)
    clock["flow"] = time.time()
    final = with_modules(pipe, averaged)
    save(final, Path(args.out))
    report = {
        "command": "python scripts/pretrain_embedded.py " + " ".join(sys.argv[1:]),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "snapshots", "start")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "seconds": {
            "vae": clock["vae"] - clock["start"],
            "pool": clock["pool"] - clock["vae"],
            "flow": clock["flow"] - clock["pool"],
        },
        "checker_accuracy": accuracy,
        "curve": curve,
        "by_guidance": {str(g): evaluate(final, held_out_sample(600, 12), guidance=g) for g in (1.0, 2.0, 3.0, 4.5)},
    }
    (Path(args.out) / "pretraining.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report["by_guidance"], indent=1))


if __name__ == "__main__":
    main()
