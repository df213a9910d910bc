"""Keyed noise: every draw is named by what it is for, so no generator state needs saving.

A key is the blake2b hash of (seed, iteration, prompt id, occurrence, member, step, stream); it seeds a CPU generator that
draws float32. Noise is therefore the same whatever the process count, micro-batch, retry or resume.
"""

from __future__ import annotations

import hashlib
import struct
from collections.abc import Sequence

import torch

STREAMS = ("initial", "step", "window", "sampler", "evaluation", "timestep", "perturb", "renoise")


def key(
    seed: int,
    iteration: int,
    prompt_id: int = 0,
    occurrence: int = 0,
    member: int = 0,
    step: int = 0,
    stream: str = "initial",
) -> int:
    """63-bit seed for one draw. Raises ValueError for an unknown stream or a number outside int64."""
    if stream not in STREAMS:
        raise ValueError(f"rng.key: unknown stream {stream!r}; use one of {', '.join(STREAMS)}")
    try:
        packed = struct.pack("<6q", seed, iteration, prompt_id, occurrence, member, step)
    except struct.error as error:
        raise ValueError(f"rng.key: every part must be an integer within 64 bits ({error})") from error
    digest = hashlib.blake2b(packed + stream.encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def normal(keys: Sequence[int], shape: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """Standard normal float32 [len(keys), *shape], row i drawn from a CPU generator seeded by keys[i]."""
    out = torch.empty(len(keys), *shape)
    generator = torch.Generator()
    for row, seed in zip(out, keys, strict=True):
        row.normal_(generator=generator.manual_seed(seed))
    return out.to(device)


def uniform(seed: int) -> float:
    """One float in [0, 1) from a key."""
    return torch.rand((), generator=torch.Generator().manual_seed(seed), dtype=torch.float64).item()


def permutation(seed: int, count: int) -> list[int]:
    """A permutation of range(count) from a key."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
