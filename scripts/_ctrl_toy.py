"""A labelled mixture in the plane for scripts/ctrl_study.py: exact velocity, soft labels, a classifier, three samplers."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from flowrl.dynamics import StepPoint, endpoints, transition
from flowrl.records import Conditioning, Prediction, Request, Schedule
from flowrl.scoring.by_value import ScoredByValue

MODES, CLASSES, SPREAD, WIDTH, LABELLED, STEPS = 6, 3, 0.35, 16, 2000, 10
FEATURES = 3 + MODES
ANGLES = torch.arange(MODES) * 2 * torch.pi / MODES
CENTRES = 1.5 * torch.stack([ANGLES.cos(), ANGLES.sin()], 1)
# A component shows the label of its place on the ring, modulo the classes, four times in five.
LABELS = torch.full((MODES, CLASSES), 0.1)
LABELS[torch.arange(MODES), torch.arange(MODES) % CLASSES] = 0.8
GRID = torch.linspace(1, 0, STEPS + 1)


def shares(x: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
    """(probability of each component [B, modes], distance to its centre [B, modes, 2]) at latents x [B, 2] of times t [B]."""
    s = t[:, None]
    apart = x[:, None] - (1 - s)[..., None] * CENTRES
    variance = (1 - s) ** 2 * SPREAD**2 + s**2
    return torch.softmax(-apart.square().sum(2) / (2 * variance), 1), apart


def base_velocity(x: Tensor, t: Tensor) -> Tensor:
    """Exact velocity of the mixture: [B, 2]."""
    weight, apart = shares(x, t)
    s = t[:, None]
    slope = (s - (1 - s) * SPREAD**2) / ((1 - s) ** 2 * SPREAD**2 + s**2)
    return (weight[..., None] * (slope[..., None] * apart - CENTRES)).sum(1)


def features(x: Tensor, t: Tensor) -> Tensor:
    """What the pre-trained model knows of a latent: place, time, and the share of each component. [B, FEATURES]."""
    return torch.cat([x, t[:, None], shares(x, t)[0]], 1)


def likelihood(x0: Tensor) -> Tensor:
    """Exact p(y | x0): [B, classes]."""
    return shares(x0, torch.zeros(len(x0)))[0] @ LABELS


def labelled(seed: int) -> tuple[Tensor, Tensor]:
    """The offline data: points [N, 2] of the mixture and one drawn label each, int64 [N]."""
    generator = torch.Generator().manual_seed(1000 + seed)
    mode = torch.randint(MODES, (LABELLED,), generator=generator)
    x0 = CENTRES[mode] + SPREAD * torch.randn(LABELLED, 2, generator=generator)
    return x0, torch.multinomial(LABELS[mode], 1, generator=generator)[:, 0]


def network(inputs: int, outputs: int, seed: int, zero: bool = True) -> nn.Sequential:
    """A small network; with ``zero`` its outputs are 0 at first."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        made = nn.Sequential(nn.Linear(inputs, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs))
    if zero:
        nn.init.zeros_(made[4].weight)
        nn.init.zeros_(made[4].bias)
    return made


def fit(parameters: Sequence[Tensor], loss: Callable[[Tensor], Tensor], updates: int, seed: int) -> None:
    """AdamW on random rows of the labelled data. loss: (rows int64 [N]) -> scalar."""
    optimizer = torch.optim.AdamW(parameters, lr=5e-3, weight_decay=1e-3)
    generator = torch.Generator().manual_seed(seed)
    for update in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = 5e-3 * (1 - update / updates)
        optimizer.zero_grad()
        loss(torch.randint(LABELLED, (256,), generator=generator)).backward()
        optimizer.step()


@functools.cache
def classifier(seed: int) -> nn.Module:
    """p(y | x0) learned from the labelled data."""
    x0, y = labelled(seed)
    made = network(2, CLASSES, seed)
    fit(list(made.parameters()), lambda rows: nn.functional.cross_entropy(made(x0[rows]), y[rows]), 300, seed)
    return made.requires_grad_(False)


class OfflineLikelihood(ScoredByValue):
    """``log p(y | x0)`` of the learned classifier, for the label that a request asks for."""

    name, differentiable = "offline_likelihood", "latents"

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def value(self, x: Tensor, requests: Sequence[Request]) -> Tensor:
        asked = torch.tensor([request.metadata["condition"]["label"] for request in requests])
        return classifier(self.seed)(x).log_softmax(1).gather(1, asked[:, None])[:, 0]


class Conditional(nn.Module):
    """The exact velocity, and beside it what a condition vector changes in the output of a network, 0 for the vector 0."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.more, self.off = network(FEATURES + WIDTH, 2, seed, zero=False), False

    def forward(self, x: Tensor, t: Tensor, pooled: Tensor) -> Tensor:
        made = base_velocity(x, t)
        if self.off:
            return made
        place = features(x, t)
        none = torch.zeros_like(pooled)
        return made + (self.more(torch.cat([place, pooled], 1)) - self.more(torch.cat([place, none], 1)))


class PlaneAdapter:
    """A pipeline adapter of that network. Its pooled conditioning is 0; the network beside is what LoRA is elsewhere."""

    guidance_rule = "linear"
    guidance_boundary = None
    device = torch.device("cpu")

    def __init__(self, seed: int) -> None:
        self.network = Conditional(seed)

    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        return Conditioning({"pooled": torch.zeros(len(requests), WIDTH)})

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return (2,)

    def schedule(self, steps: int, request: Request | None = None) -> Schedule:
        return Schedule(GRID, 1 - GRID, GRID)

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, features: Sequence[str] = ()) -> Prediction:
        return Prediction(self.network(x, t, conditioning.tensors["pooled"]), "velocity")

    def decode(self, x0: Tensor, request: Request) -> Tensor:
        return torch.zeros(len(x0), 3, 2, 2)

    def encode_media(self, media: Tensor, request: Request) -> Tensor:
        raise NotImplementedError("a point of the plane has no picture")

    def add_lora(self, rank: int, alpha: float, groups: Sequence[str], seed: int) -> None:
        raise NotImplementedError("the network beside the exact velocity takes its place")

    def export(self, folder: str) -> None:
        raise NotImplementedError("a toy is not exported")

    def trainable(self) -> nn.Module:
        return self.network

    @contextmanager
    def lora_off(self) -> Iterator[None]:
        before, self.network.off = self.network.off, True
        try:
            yield
        finally:
            self.network.off = before


@functools.cache
def flow_matched(seed: int) -> nn.Module:
    """Classifier-free guidance's conditional model: flow matching on the labelled data, beside the exact velocity."""
    x0, y = labelled(seed)
    vectors = torch.eye(CLASSES)
    made = network(FEATURES + CLASSES, 2, seed)
    generator = torch.Generator().manual_seed(2000 + seed)

    def loss(rows: Tensor) -> Tensor:
        t, noise = torch.rand(len(rows), generator=generator), torch.randn(len(rows), 2, generator=generator)
        x = (1 - t)[:, None] * x0[rows] + t[:, None] * noise
        found = base_velocity(x, t) + made(torch.cat([features(x, t), vectors[y[rows]]], 1))
        return (found - (noise - x0[rows])).square().mean()

    fit(list(made.parameters()), loss, 1500, seed)
    return made.requires_grad_(False)


def classifier_free(seed: int, label: int, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``v + scale (v(label) - v)``."""
    made = flow_matched(seed)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        vector = torch.eye(CLASSES)[label].expand(len(x), -1)
        return base_velocity(x, t) + scale * made(torch.cat([features(x, t), vector], 1))

    return velocity


def classifier_guided(seed: int, label: int, scale: float) -> Callable[[Tensor, Tensor], Tensor]:
    """``v - scale t / (1 - t) grad_x log p(label | x0_hat(x))``: the offline classifier at the one-step estimate."""
    made = classifier(seed)

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        with torch.enable_grad():
            point = x.detach().requires_grad_()
            estimate = point - t[:, None] * base_velocity(point, t)
            (gradient,) = torch.autograd.grad(made(estimate).log_softmax(1)[:, label].sum(), point)
        # At t = 1 the gradient is of the order of 1 - t, so the quotient stays finite just below.
        below = t.clamp(max=0.98)[:, None]
        return base_velocity(x, t) - scale * below / (1 - below) * gradient

    return velocity


@torch.no_grad()
def draw(velocity: Callable[[Tensor, Tensor], Tensor], count: int, seed: int) -> Tensor:
    """Memoryless sampling: [count, 2]."""
    generator = torch.Generator().manual_seed(seed)
    schedule = Schedule(GRID, 1 - GRID, GRID)
    x = torch.randn(count, 2, generator=generator)
    for k in range(STEPS):
        point = StepPoint.of(schedule, torch.full((count,), k), 2)
        made = velocity(x, torch.full((count,), float(GRID[k])))
        mean, std = transition("memoryless", 1.0, x, *endpoints(x, made, "velocity", point.alpha, point.sigma), point)
        x = mean + std * torch.randn(x.shape, generator=generator)
    return x
