"""Small networks that read a latent, its noise level and its text: process rewards and critics stand on them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowrl.records import Conditioning

TIME_FEATURES = 32


def noise_level(t: Tensor, levels: int) -> Tensor:
    """Sort times into ``levels`` equal parts of [0, 1], 0 the cleanest: int64 like t.

    Part l is [l / levels, (l + 1) / levels), the last one with t = 1. Raises ValueError for levels < 1 or a time outside
    [0, 1].
    """
    if levels < 1:
        raise ValueError(f"levels: expected a number >= 1, got {levels}")
    if t.numel() and not bool(((t >= 0) & (t <= 1)).all()):
        raise ValueError(f"t: expected times in [0, 1], got {float(t.min()):g} .. {float(t.max()):g}")
    return (t * levels).floor().long().clamp(max=levels - 1)


def pooled_text(conditioning: Conditioning) -> Tensor:
    """One vector a sample of what was asked: ``pooled`` where there is one, else the mean of ``hidden`` over its tokens.

    Returns float32 [B, D], detached, with D = 0 where the conditioning has neither.
    """
    tensors = conditioning.tensors
    if "pooled" in tensors:
        return tensors["pooled"].detach().float()
    if "hidden" in tensors:
        return tensors["hidden"].detach().float().mean(1)
    first = next(iter(tensors.values()))
    return torch.zeros(len(first), 0, device=first.device)


def time_features(t: Tensor) -> Tensor:
    """Sines and cosines of t in [0, 1] at 16 frequencies, pi to 64 pi, spaced geometrically: float32 [B, 32]."""
    half = TIME_FEATURES // 2
    frequency = math.pi * torch.exp(torch.linspace(0, math.log(64), half, device=t.device))
    angle = t.float()[:, None] * frequency
    return torch.cat([angle.sin(), angle.cos()], 1)


def module_bytes(module: nn.Module) -> int:
    """Bytes of a network's weights and buffers."""
    held = [*module.parameters(), *module.buffers()]
    return sum(tensor.numel() * tensor.element_size() for tensor in held)


@contextmanager
def seeded(seed: int) -> Iterator[None]:
    """Draw initial weights from ``seed``; the global CPU generator goes on afterwards as if nothing had been drawn."""
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        yield


def _reader(total: int, width: int, out: int) -> nn.Sequential:
    """The small MLP that a network ends in."""
    return nn.Sequential(
        nn.Linear(total, 2 * width), nn.LayerNorm(2 * width), nn.SiLU(), nn.Linear(2 * width, 2 * width),
        nn.LayerNorm(2 * width), nn.SiLU(), nn.Linear(2 * width, out),
    )  # fmt: skip


class LatentNetwork(nn.Module):
    """Read (x_t, t, text) with strided convolutions, an average over places and a small MLP: [B, out].

    channels: of the latent; text: width of the text vector, 0 for none; width: channels of the first convolution,
    doubled at each of the ``blocks``; out: numbers a sample. Latents are [B, C, H, W], or [B, C, F, H, W], whose frames are
    averaged. The mean and the root mean square of each channel go to the MLP beside the convolutions' features, since
    their normalisation takes the size of a latent out.
    """

    def __init__(self, channels: int, text: int, *, width: int = 32, blocks: int = 3, out: int = 1) -> None:
        super().__init__()
        if min(channels, width, blocks, out) < 1 or text < 0:
            raise ValueError("LatentNetwork: channels, width, blocks and out must be at least 1, text at least 0")
        self.channels, self.text = channels, text
        layers: list[nn.Module] = []
        for block in range(blocks):
            inside = channels if block == 0 else width * 2 ** (block - 1)
            outside = width * 2**block
            groups = math.gcd(8, outside)
            layers += [nn.Conv2d(inside, outside, 3, 2 if block else 1, 1), nn.GroupNorm(groups, outside), nn.SiLU()]
        self.trunk = nn.Sequential(*layers)
        hidden = width * 2 ** (blocks - 1)
        total = hidden + 2 * channels + TIME_FEATURES + text
        self.head = _reader(total, width, out)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x: [B, C, H, W] or [B, C, F, H, W]; t: [B] in [0, 1]; text: [B, text]. Returns float32 [B, out]."""
        x = x.float()
        flat = x.flatten(2)
        moments = torch.cat([flat.mean(2), (flat.square().mean(2) + 1e-12).sqrt()], 1)
        if x.ndim == 5:
            folded = self.trunk(x.transpose(1, 2).flatten(0, 1)).mean((2, 3))
            features = folded.reshape(len(x), x.shape[2], -1).mean(1)
        else:
            features = self.trunk(x).mean((2, 3))
        made: Tensor = self.head(torch.cat([features, moments, time_features(t), text.float()], 1))
        return made


def _places(tap: Tensor) -> Tensor:
    """Hidden states [B, N, D], or [B, D, H, W], as float32 [B, places, D]."""
    return tap.float().flatten(2).transpose(1, 2) if tap.ndim == 4 else tap.float()


def summary(taps: Sequence[Tensor]) -> Tensor:
    """Mean and deviation over places of each channel of hidden states, each place normalised first: float32 [B, 2 sum D].

    taps: token taps [B, N, D] or convolutional ones [B, D, H, W].
    """
    found = []
    for tap in taps:
        tokens = _places(tap)
        tokens = nn.functional.layer_norm(tokens, tokens.shape[-1:])
        found += [tokens.mean(1), tokens.std(1, correction=0)]
    return torch.cat(found, 1)


class SummaryNetwork(nn.Module):
    """Read a `summary` of hidden states, its noise level and its text with a small MLP: [B, out].

    features: numbers of a summary; text: width of the text vector, 0 for none; width: half the MLP's.
    """

    def __init__(self, features: int, text: int, *, width: int = 32, out: int = 1) -> None:
        super().__init__()
        if min(features, width, out) < 1 or text < 0:
            raise ValueError("SummaryNetwork: features, width and out must be at least 1, text at least 0")
        self.features, self.text = features, text
        self.head = _reader(features + TIME_FEATURES + text, width, out)

    def forward(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """x: [B, features]; t: [B] in [0, 1]; text: [B, text]. Returns float32 [B, out]."""
        made: Tensor = self.head(torch.cat([x.float(), time_features(t), text.float()], 1))
        return made


class FeatureHead(nn.Module):
    """Read hidden states of a generator: each is normalised, modulated by t, and averaged over its places; then an MLP.

    widths: channels of each tap, in order; text: width of the text vector. Token taps are [B, N, D], convolutional ones
    [B, D, H, W]. Modulation is feature-wise, ``(1 + a(t)) h + b(t)``, as in DiNa-LRM and SPO's step-aware layers.
    """

    def __init__(self, widths: Sequence[int], text: int, *, width: int = 64, out: int = 1) -> None:
        super().__init__()
        if not widths or min(*widths, width, out) < 1 or text < 0:
            raise ValueError("FeatureHead: name at least one tap; every width must be at least 1")
        self.norms = nn.ModuleList(nn.LayerNorm(d) for d in widths)
        self.films = nn.ModuleList(nn.Linear(TIME_FEATURES, 2 * d) for d in widths)
        self.maps = nn.ModuleList(nn.Linear(d, width) for d in widths)
        self.head = nn.Sequential(
            nn.Linear(len(widths) * width + text + TIME_FEATURES, width), nn.LayerNorm(width), nn.SiLU(), nn.Linear(width, out)
        )  # fmt: skip

    def forward(self, taps: Sequence[Tensor], t: Tensor, text: Tensor) -> Tensor:
        """taps: [B, N, D] or [B, D, H, W] each; t: [B]; text: [B, text]. Returns float32 [B, out]."""
        time = time_features(t)
        pooled = []
        for tap, norm, film, project in zip(taps, self.norms, self.films, self.maps, strict=True):
            tokens = _places(tap)
            scale, shift = film(time)[:, None].chunk(2, -1)
            pooled.append(nn.functional.silu(project((1 + scale) * norm(tokens) + shift)).mean(1))
        made: Tensor = self.head(torch.cat([*pooled, text.float(), time], 1))
        return made
