"""How near the trainer runs to its own network calls: images a second, and the share of an iteration that is not network.

    python scripts/throughput.py [key=value ...]

Runs the recipe ``demo`` for some iterations, then replays its bare calls (forwards, backwards, decodes, with the shapes that the
hooks saw) with nothing around them. The replay shares no code with the trainer.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch


def replay(folder: str, calls: list[tuple[int, bool]], decodes: list[int], repeats: int) -> list[float]:
    """Seconds of the recorded transformer and decoder calls on random input of the same shapes."""
    from diffusers import StableDiffusion3Pipeline
    from peft import LoraConfig

    pipe = StableDiffusion3Pipeline.from_pretrained(folder, dtype=torch.float32)
    network, vae = pipe.transformer.eval().requires_grad_(False), pipe.vae.eval().requires_grad_(False)
    vae.to(memory_format=torch.channels_last)
    targets = ["attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
               "attn.to_add_out", "ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]  # fmt: skip
    network.add_adapter(LoraConfig(r=32, lora_alpha=64, target_modules=targets))
    side, channels, text = network.config.sample_size, network.config.in_channels, 2 * pipe.tokenizer.model_max_length
    width, pooled = network.config.joint_attention_dim, network.config.pooled_projection_dim

    def forward(rows: int) -> torch.Tensor:
        return network(
            hidden_states=torch.randn(rows, channels, side, side), timestep=torch.full((rows,), 500.0),
            encoder_hidden_states=torch.randn(rows, text, width), pooled_projections=torch.randn(rows, pooled),
            return_dict=False,
        )[0]  # fmt: skip

    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        for rows, grad in calls:
            with torch.set_grad_enabled(grad):
                out = forward(rows)
            if grad:
                out.sum().backward()
        with torch.no_grad():
            for rows in decodes:
                vae.decode(torch.randn(rows, channels, side, side))
        seconds.append(time.perf_counter() - start)
    return seconds[1:]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--iterations", type=int, default=8)
    parser.add_argument("overrides", nargs="*")
    args = parser.parse_args()
    from flowrl.config import load
    from flowrl.distributed.backend import Backend
    from flowrl.training.build import build

    with tempfile.TemporaryDirectory() as temporary:
        config = load("demo", ["threads=1", f"run_dir={temporary}/run", *args.overrides])
        trainer = build(config, Backend()).trainer
        network, vae = trainer.adapter.trainable(), trainer.adapter.pipe.vae
        calls: list[tuple[int, bool]] = []
        decodes: list[int] = []
        network.register_forward_pre_hook(
            lambda module, a, kw: calls.append((len(kw["hidden_states"]), torch.is_grad_enabled())), with_kwargs=True
        )
        vae.decoder.register_forward_pre_hook(lambda module, a: decodes.append(len(a[0])))
        trainer.iterate()  # warm-up, with the self-check
        rows, recorded = [], []
        for _ in range(args.iterations):
            calls.clear(), decodes.clear()
            rows.append(trainer.iterate())
            recorded.append((list(calls), list(decodes)))
        trainer.rewards.close()
        folder = str(Path(trainer.adapter.pipe._internal_dict["_name_or_path"] or ""))
    iteration = [r["time/iteration_s"] for r in rows]
    inner = [r["time/rollout_s"] + r["time/update_s"] + r["time/decode_s"] + r["time/reward_s"] for r in rows]
    bare = [statistics.median(replay(folder, c, d, 2)) for c, d in recorded[:3]]
    reward = statistics.median(r["time/reward_s"] for r in rows[:3])
    result = {
        "iterations": len(rows), "threads": torch.get_num_threads(), "samples": config.batch.samples,
        "images_per_second": round(config.batch.samples / statistics.median(iteration), 1),
        "iteration_s": [round(v, 3) for v in iteration],
        "outside_network_decode_reward": round(1 - sum(inner) / sum(iteration), 4),
        "bare_calls_s": [round(v, 3) for v in bare],
        "efficiency_against_bare_calls": [round((b + reward) / i, 3) for b, i in zip(bare, iteration, strict=False)],
        "phases_s": {k: round(statistics.median(r.get(k, 0.0) for r in rows), 4) for k in rows[0] if k.startswith("time/")},
        "torch": torch.__version__,
    }  # fmt: skip
    sys.stdout.write(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
