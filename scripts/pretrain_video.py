"""Pre-train a tiny Wan pipeline on world video1.

    export OMP_NUM_THREADS=1
    python scripts/pretrain_video.py --vae-steps 3000 --steps 28000 --pool 20000 --noisier 0.5 --out runs/embedded_wan

All seeded, three stages: the autoencoder on single frames (its taps into the past stay zero), a pool of encoded clips, then
transformer and text encoder together by rectified-flow matching. Weights are averaged. Writes pretraining.json beside the
weights: settings, times, and the strict accuracy on held-out sentences along the way.

The shipped weights came in stages, each from the one before (--from), which assets/embedded_wan/pretraining.json lists with
its command: 27,800 steps of the transformer and 3,700 of the autoencoder, 2,300 of them its decoder alone, about an hour of
processor time. The one command above was not run to its end.
"""

from __future__ import annotations

import argparse
import copy
import itertools
import json
import math
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from flowrl.pipelines.latent_statistics import standardise, unstandardise
from flowrl.pipelines.tiny_video import build_wan_embedded
from pretrain_embedded import rate, save, with_modules

from flowrl.worlds.v1.scenes import BACKGROUND
from flowrl.worlds.video1 import render, scenes, track

TRAINED = ("transformer", "text_encoder")


def draw(count: int, rng: np.random.Generator) -> tuple[list[scenes.Prompt], torch.Tensor]:
    """Draw training sentences and their clips, uint8 [count, F, H, W, 3]."""
    chosen = [scenes.draw_prompt(rng) for _ in range(count)]
    return chosen, torch.from_numpy(np.stack([render.render(scenes.place(prompt, rng)) for prompt in chosen]))


def to_model(clips: torch.Tensor) -> torch.Tensor:
    return clips.permute(0, 4, 1, 2, 3).float() / 127.5 - 1.0


def to_clips(videos: torch.Tensor) -> np.ndarray:
    return ((videos.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8).permute(0, 2, 3, 4, 1).numpy()


def slim(vae: Any) -> None:
    """Leave the convolutions their tap of the present frame alone: a clip is then its frames, one by one."""
    for module in vae.modules():
        if isinstance(module, torch.nn.Conv3d) and module.weight.shape[2] == 3:
            module.weight = torch.nn.Parameter(module.weight.detach()[:, :, 2:].clone())
            module._padding = (*module._padding[:4], 0, 0)


def widened(vae: Any) -> Any:
    """The autoencoder of diffusers' own shape: the taps of the two past frames are there, and zero."""
    whole = type(vae).from_config(vae.config)
    state = whole.state_dict()
    for name, value in vae.state_dict().items():
        if value.shape == state[name].shape:
            state[name].copy_(value)
        else:
            state[name].zero_()[:, :, 2:].copy_(value)
    whole.load_state_dict(state)
    return whole.eval()


def train_vae(vae: Any, args: argparse.Namespace) -> None:
    """Train on single frames; ``slim`` first. --decoder-only keeps the latents as they are."""
    parts = [vae.post_quant_conv, vae.decoder] if args.decoder_only else [vae]
    parameters = [p for part in parts for p in part.parameters()]
    rng, generator = np.random.default_rng([args.seed, 1]), torch.Generator().manual_seed(args.seed + 1)
    optimizer = torch.optim.AdamW(parameters, lr=args.vae_lr, betas=(0.9, 0.98), weight_decay=1e-4)
    ground = torch.tensor(BACKGROUND).view(1, 3, 1, 1, 1) / 127.5 - 1
    started = time.process_time()
    for step in range(args.vae_steps):
        for group in optimizer.param_groups:
            cosine = 0.02 + 0.49 * (1 + math.cos(math.pi * step / args.vae_steps))
            group["lr"] = args.vae_lr * min(1.0, (step + 1) / 30) * cosine
        clips = draw(args.vae_batch, rng)[1]
        frame = torch.from_numpy(rng.integers(scenes.FRAMES, size=len(clips)))
        pictures = to_model(clips[torch.arange(len(clips)), frame][:, None])
        with torch.set_grad_enabled(not args.decoder_only):
            posterior = vae.encode(pictures).latent_dist
        output = vae.decode(posterior.sample(generator)).sample
        # Squared error favours blur; the absolute term keeps edges sharp. The weak KL keeps the latents near N(0, 1).
        # The object and two pixels around it count eight times: its corners tell the shapes apart.
        shown = ((pictures - ground).abs().amax(1, keepdim=True) > 0.1).float()
        weight = 1 + 7 * F.max_pool3d(shown, (1, 5, 5), stride=1, padding=(0, 2, 2))
        off = (output - pictures) * weight.sqrt()
        loss = off.square().mean() + 0.5 * off.abs().mean() + 2e-4 * posterior.kl().mean() / posterior.mean[0].numel()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        if step % 50 == 0 or step == args.vae_steps - 1:
            print(f"vae {step:5d} loss {loss.item():.4f} {time.process_time() - started:.0f}s", flush=True)


def strict(prompts: Sequence[scenes.Prompt], clips: np.ndarray) -> list[bool]:
    tracks = track.follow(clips)
    return [not track.strict_reason(found, p.metadata) for p, found in zip(prompts, tracks, strict=True)]


@torch.no_grad()
def checker_accuracy(vae: Any, seed: int, count: int = 256) -> dict[str, float]:
    chosen, clips = draw(count, np.random.default_rng([seed, 2]))
    rebuilt = [vae.decode(vae.encode(to_model(part)).latent_dist.mode()).sample for part in clips.split(32)]
    return {
        "renders": float(np.mean(strict(chosen, clips.numpy()))),
        "reconstructions": float(np.mean(strict(chosen, to_clips(torch.cat(rebuilt))))),
    }


@torch.no_grad()
def encode_pool(vae: Any, count: int, seed: int) -> tuple[list[str], torch.Tensor]:
    rng, texts, latents = np.random.default_rng([seed, 3]), [], []
    for _ in range(0, count, 50):
        chosen, clips = draw(50, rng)
        texts += [prompt.text for prompt in chosen]
        latents.append(vae.encode(to_model(clips)).latent_dist.mode())
    return texts, torch.cat(latents)


def embed(pipe: Any, texts: list[str]) -> torch.Tensor:
    length = pipe.tokenizer.model_max_length
    hidden, _ = pipe.encode_prompt(
        texts, do_classifier_free_guidance=False, device=torch.device("cpu"), max_sequence_length=length
    )
    return hidden


@torch.no_grad()
def evaluate(pipe: Any, prompts: list[scenes.Prompt], *, guidance: float, steps: int = 10, seed: int = 7) -> dict:
    """Strict accuracy of deterministic samples at fixed noise, over all and by attribute of the track."""
    vae, network = pipe.vae, pipe.transformer
    generator = torch.Generator().manual_seed(seed)
    side = scenes.SIZE // vae.config.scale_factor_spatial
    noise = torch.randn(len(prompts), vae.config.z_dim, scenes.FRAMES, side, side, generator=generator)
    hits: dict[str, list[float]] = {"all": []}
    empty = embed(pipe, [""])
    for start in range(0, len(prompts), 64):
        part, x = prompts[start : start + 64], noise[start : start + 64]
        condition = embed(pipe, [p.text for p in part])
        for i in range(steps):
            t = torch.full((len(x),), 1000 * (1 - i / steps))
            value = network(x, t, condition, return_dict=False)[0]
            if guidance != 1:
                other = network(x, t, empty.expand_as(condition), return_dict=False)[0]
                value = other + guidance * (value - other)
            x = x - value / steps
        found = track.follow(to_clips(vae.decode(unstandardise(vae, x)).sample))
        for p, one in zip(part, found, strict=True):
            hit = float(not track.strict_reason(one, p.metadata))
            hits["all"].append(hit)
            hits.setdefault(p.tag, []).append(hit)
            hits.setdefault("object", []).append(float(one.same(p.color, p.shape) == 1))
            hits.setdefault("direction", []).append(float(track.direction_fits(one, p.direction)))
            hits.setdefault("speed", []).append(float(track.speed_fit(one, p.speed) == 1))
    return {key: round(float(np.mean(values)), 4) for key, values in hits.items()}


def held_out(count: int, seed: int) -> list[scenes.Prompt]:
    rng = np.random.default_rng(seed)
    return [scenes.draw_prompt(rng, "held_out") for _ in range(count)]


def train_network(pipe: Any, texts: list[str], latents: torch.Tensor, args: argparse.Namespace) -> tuple[list, dict]:
    modules = {name: getattr(pipe, name) for name in TRAINED}
    averaged = {name: copy.deepcopy(module) for name, module in modules.items()}
    parameters = [p for module in modules.values() for p in module.parameters()]
    shadow = [p for module in averaged.values() for p in module.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=args.lr, betas=(0.9, 0.95), weight_decay=1e-2, fused=True)
    rng, generator = np.random.default_rng([args.seed, 4]), torch.Generator().manual_seed(args.seed + 4)
    test_prompts, curve, started = held_out(128, 11), [], time.process_time()
    for step in range(args.steps):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, args.lr)
        pick = rng.integers(len(texts), size=args.batch)
        drop = rng.random(args.batch) < 0.1
        condition = embed(pipe, ["" if d else texts[i] for i, d in zip(pick, drop, strict=True)])
        x0 = latents[torch.from_numpy(pick)]
        x1, t = (
            torch.randn(x0.shape, generator=generator),
            (torch.randn(len(x0), generator=generator) + args.noisier).sigmoid(),
        )
        x = torch.lerp(x0, x1, t[:, None, None, None, None])
        loss = F.mse_loss(pipe.transformer(x, t * 1000, condition, return_dict=False)[0], x1 - x0)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        with torch.no_grad():
            torch._foreach_lerp_(shadow, parameters, 1 - min(args.ema, (step + 1) / (step + 10)))
        if step % 100 == 0:
            print(f"step {step:6d} loss {loss.item():.4f} {time.process_time() - started:.0f}s", flush=True)
        if (step + 1) % args.every == 0:
            view = with_modules(pipe, averaged)
            row = {"step": step + 1, "processor_seconds": round(time.process_time() - started), "guidance": 1.0}
            curve.append(row | evaluate(view, test_prompts, guidance=1.0))
            print(json.dumps(curve[-1]), flush=True)
            if args.snapshots:
                save(view, Path(args.snapshots) / f"{step + 1:06d}")
    return curve, averaged


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", required=True)
    parser.add_argument("--snapshots", default="", help="also save the averaged weights here at every evaluation")
    parser.add_argument("--vae-from", default="", help="start from the autoencoder of this pipeline folder")
    parser.add_argument("--from", dest="start", default="", help="go on from the weights of this pipeline folder")
    parser.add_argument("--decoder-only", action="store_true", help="train the autoencoder's decoder alone")
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--vae-batch", type=int, default=32)
    parser.add_argument("--vae-lr", type=float, default=3e-3)
    parser.add_argument("--pool", type=int, default=5000)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--noisier", type=float, default=0.0, help="mean of the logit of the times trained on")
    parser.add_argument("--ema", type=float, default=0.998)
    parser.add_argument("--every", type=int, default=400)
    parser.add_argument("--seed", type=int, default=0)
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.manual_seed(args.seed)
    words = {word for split in ("train", "held_out") for pool in scenes.prompts(split).values() for p in pool
             for word in p.text.split()}  # fmt: skip
    pipe, clock = build_wan_embedded(words, seed=args.seed), {"start": time.process_time()}
    if args.start:
        pipe = type(pipe).from_pretrained(args.start, torch_dtype=torch.float32)
    elif args.vae_from:
        pipe.vae = type(pipe.vae).from_pretrained(args.vae_from, subfolder="vae", torch_dtype=torch.float32)
    if args.vae_steps:
        slim(pipe.vae)
        train_vae(pipe.vae, args)
        pipe.vae = widened(pipe.vae)
        pipe.vae.save_pretrained(Path(args.out) / "vae")
    accuracy = checker_accuracy(pipe.vae, args.seed)
    clock["vae"] = time.process_time()
    print("checker accuracy", accuracy, f"{clock['vae'] - clock['start']:.0f}s", flush=True)
    texts, latents = encode_pool(pipe.vae, args.pool, args.seed)
    if not args.start:
        axes = (0, 2, 3, 4)
        pipe.vae.register_to_config(latents_mean=latents.mean(axes).tolist(), latents_std=latents.std(axes).tolist())
    clock["pool"] = time.process_time()
    curve, averaged = train_network(pipe, texts, standardise(pipe.vae, latents), args)
    clock["flow"] = time.process_time()
    final = with_modules(pipe, averaged)
    save(final, Path(args.out))
    prompts, marks = held_out(512, 12), list(clock.items())
    report = {
        "command": "python scripts/pretrain_video.py " + " ".join(sys.argv[1:]),
        "settings": {k: v for k, v in vars(args).items() if k not in ("out", "snapshots", "vae_from", "start")},
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}",
        "processor_seconds": {b: round(y - x) for (_, x), (b, y) in itertools.pairwise(marks)},
        "checker_accuracy": accuracy,
        "curve": curve,
        "by_guidance": {str(g): evaluate(final, prompts, guidance=g) for g in (1.0, 2.0, 3.0)},
    }
    (Path(args.out) / "pretraining.json").write_text(json.dumps(report, indent=1))
    print(json.dumps(report["by_guidance"], indent=1))


if __name__ == "__main__":
    main()
