"""Train a process reward on finished samples and their scores: noised anew, compared within groups, judged level by level."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl import rng
from flowrl.config.forward import Forward
from flowrl.credit.networks import noise_level, pooled_text, seeded
from flowrl.credit.process.learned import taps_of
from flowrl.credit.process.storage import Kind, make_network
from flowrl.credit.quality import LevelQuality, linear_fit, quality
from flowrl.credit.reward_model_losses import (
    PAIR_LOSSES,
    by_level,
    group_pairs,
    level_variance,
    regression,
    stratified_times,
)
from flowrl.data.sampler import draw_groups
from flowrl.dynamics.interpolants import interpolate
from flowrl.errors import UserError
from flowrl.performance.timers import Stopwatch
from flowrl.records import Conditioning, Schedule
from flowrl.training.batch import Visit
from flowrl.training.collection import Collector
from flowrl.training.learners.renoise import Renoiser
from flowrl.training.trainer import Trainer

Loss = Literal["bradley_terry", "bradley_terry_ties", "thurstone", "regression"]


@dataclass(frozen=True, kw_only=True)
class RewardModelSettings:
    """kind: latent or features (of the named modules). loss: see flowrl.credit.reward_model_losses; tie: scores that differ
    by at most this are tied; margin: of bradley_terry_ties; temperature: of each of ``levels`` noise levels, () for 1 (of
    thurstone: the variance is ``t^2 + 0.05``). width, blocks: of the network. steps, lr: of AdamW; groups: in a step.
    held_out: share of the groups that only judge. calibrate: scale each level's values to the score's by least squares on
    the training groups.
    """

    kind: Kind = "latent"
    features: tuple[str, ...] = ()
    loss: Loss = "bradley_terry"
    tie: float = 0.0
    margin: float = 0.5
    temperature: tuple[float, ...] = ()
    levels: int = 8
    width: int = 32
    blocks: int = 3
    steps: int = 500
    lr: float = 1e-3
    groups: int = 16
    held_out: float = 0.2
    calibrate: bool = True
    seed: int = 0


@dataclass(frozen=True)
class Samples:
    """x0: float32 [N, ...]; score: float64 [N], NaN for none; group: int64 [N]; conditioning: one row a sample."""

    x0: Tensor
    score: Tensor
    group: Tensor
    conditioning: Conditioning

    def __getitem__(self, rows: Tensor) -> Samples:
        return Samples(self.x0[rows], self.score[rows], self.group[rows], self.conditioning[rows])

    def state(self) -> dict[str, Any]:
        """As a checkpoint holds them."""
        return {
            "x0": self.x0, "score": self.score, "group": self.group, "conditioning": dict(self.conditioning.tensors),
        }  # fmt: skip

    @staticmethod
    def of(state: Mapping[str, Any]) -> Samples:
        """The samples of a `state`."""
        return Samples(state["x0"], state["score"], state["group"], Conditioning(state["conditioning"]))


def join(parts: Sequence[Samples]) -> Samples:
    """All batches' samples, in order."""
    names = parts[0].conditioning.tensors
    conditioning = Conditioning({name: torch.cat([p.conditioning.tensors[name] for p in parts]) for name in names})
    x0, score, group = (torch.cat([vars(p)[name] for p in parts]) for name in ("x0", "score", "group"))
    return Samples(x0, score, group, conditioning)


class Drawer:
    """Draws batch after batch of the config's groups by the trainer's present weights, without noise, and scores them.

    A batch depends on its number alone: all its draws are keyed by the run's seed and that number.
    """

    def __init__(self, trainer: Trainer) -> None:
        self.trainer = trainer
        config = replace(trainer.config, credit=replace(trainer.config.credit, values="none"))  # only outcomes count
        self.collector = Collector(
            config, trainer.policy, trainer.rewards, trainer.rows, trainer.backend, Stopwatch(), frozenset(),
            transitions=False,
        )  # fmt: skip

    def __call__(self, number: int) -> Samples:
        """Batch ``number``, from 0. Groups are numbered through over batches."""
        config, rows = self.trainer.config, self.trainer.rows
        drawn = draw_groups(config.seed, number, config.batch.groups, len(rows), self.trainer.row_weights)
        found = self.collector.collect(drawn, config.batch.group_size, Visit(config.seed, number, 0))
        score = torch.where(
            torch.from_numpy(found.scored.valid), torch.from_numpy(found.scored.scores).double(), torch.nan
        )
        group = found.trajectory.group_id + number * config.batch.groups
        return Samples(found.trajectory.x0.cpu(), score, group, found.prompted.positive[found.row].to("cpu"))


class RewardModelTrainer:
    """Trains one network on samples. reference: a context manager within which the generator is as it was before training."""

    def __init__(self, trainer: Trainer, settings: RewardModelSettings, samples: Samples) -> None:
        self.settings, self.samples = settings, samples
        self.adapter, self.reference = trainer.adapter, trainer.reference
        schedule = Schedule(*(v.cpu() for v in vars(trainer.policy.schedule).values()))
        straight = bool(torch.allclose(schedule.alpha, 1 - schedule.t, atol=1e-6))
        self.renoiser = Renoiser(Forward(draws=1, times="uniform" if straight else "grid"), schedule, shared=False)
        text = pooled_text(samples.conditioning).shape[1]
        self.network_settings: dict[str, Any]
        if settings.kind == "latent":
            channels = samples.x0.shape[1]
            self.network_settings = {
                "channels": channels,
                "text": text,
                "width": settings.width,
                "blocks": settings.blocks,
            }
        else:
            if not settings.features:
                raise UserError("features: name the modules of the generator to read, such as transformer_blocks.2")
            taps = self._taps(samples[torch.arange(1)], samples.x0[:1].float(), torch.full((1,), 0.5))
            widths = [tap.shape[-1] if tap.ndim == 3 else tap.shape[1] for tap in taps]
            self.network_settings = {"widths": widths, "text": text, "width": settings.width}
        with seeded(rng.key(settings.seed, 0, stream="initial")):
            self.network = make_network(settings.kind, self.network_settings).to(self.adapter.device)
        self.optimizer = torch.optim.AdamW(self.network.parameters(), lr=settings.lr)
        self.losses: list[float] = []
        self.training_groups, self.held_out = self._split()

    def _split(self) -> tuple[list[int], list[int]]:
        """Groups that train and groups that judge."""
        groups = torch.unique(self.samples.group).tolist()
        order = rng.permutation(rng.key(self.settings.seed, 0, stream="sampler"), len(groups))
        held = max(1, round(self.settings.held_out * len(groups)))
        if held >= len(groups):
            raise UserError(f"{len(groups)} groups are too few to hold any out; draw more")
        return [groups[i] for i in order[held:]], [groups[i] for i in order[:held]]

    # -- the network -----------------------------------------------------------------------------------------------

    def _taps(self, samples: Samples, x: Tensor, t: Tensor) -> list[Tensor]:
        from contextlib import nullcontext

        device = self.adapter.device
        with torch.no_grad(), (self.reference or nullcontext)():
            return taps_of(
                self.adapter.predict,
                x.to(device),
                t.to(device),
                samples.conditioning.to(device),
                self.settings.features,
            )

    def output(self, samples: Samples, x: Tensor, t: Tensor) -> Tensor:
        """The network's number for latents x [N, ...] of samples at times t [N]: [N]."""
        device = self.adapter.device
        text = pooled_text(samples.conditioning).to(device)
        seen: Any = x.to(device) if self.settings.kind == "latent" else self._taps(samples, x, t)
        made: Tensor = self.network(seen, t.to(device), text)[:, 0]
        return made

    def noised(self, samples: Samples, uniforms: Tensor, seed: int) -> tuple[Tensor, Tensor]:
        """(latents, times) of samples at times named by numbers in [0, 1), with noise by ``seed``."""
        t, alpha, sigma = self.renoiser.path(uniforms.tolist(), 0)
        x1 = torch.randn(samples.x0.shape, generator=torch.Generator().manual_seed(seed))
        wide = (-1, *[1] * (samples.x0.ndim - 1))
        return interpolate(samples.x0, x1, alpha.reshape(wide), sigma.reshape(wide)), t

    # -- training --------------------------------------------------------------------------------------------------

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        return len(self.losses)

    def fit(self, write: Callable[[str], object], after: Callable[[], object] = lambda: None) -> float:
        """Train to the last step, from wherever the state is; returns the mean loss of the last tenth.

        after: called after each step; what it raises ends the training there.
        """
        s = self.settings
        self.network.train()
        while self.step < s.steps:
            loss = self._loss(self.step)
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            self.losses.append(float(loss.detach()))
            if self.step % max(1, s.steps // 5) == 0:
                write(f"step {self.step} of {s.steps}: loss {self.losses[-1]:.4f}")
            after()
        self.network.eval()
        last = self.losses[-max(1, s.steps // 10) :]
        return sum(last) / len(last)

    def state(self) -> dict[str, Any]:
        """Everything that training goes on from. No generator is in it: each draw is keyed by seed and step."""
        return {
            "network": dict(self.network.state_dict()), "optimizer": self.optimizer.state_dict(), "losses": self.losses,
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        self.network.load_state_dict(state["network"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.losses = list(state["losses"])

    def _loss(self, step: int) -> Tensor:
        s = self.settings
        seed = rng.key(s.seed, 1 + step, stream="perturb")
        chosen = [self.training_groups[i] for i in rng.permutation(seed, len(self.training_groups))[: s.groups]]
        rows = torch.isin(self.samples.group, torch.tensor(chosen)).nonzero().flatten()
        samples = self.samples[rows[self.samples.score[rows].isfinite()]]
        order, place = torch.unique(samples.group, return_inverse=True)
        times = stratified_times(seed, len(order))[place]  # a group shares its time, so its pairs share their level
        x, t = self.noised(samples, times, seed + 1)
        output, level = self.output(samples, x, t), noise_level(t, s.levels)
        if s.loss == "regression":
            target = samples.score.float().to(output.device)
            return by_level(regression(output, target), level.to(output.device), s.levels)
        i, j, outcome = group_pairs(samples.score, samples.group, level, s.tie)
        gap = output[i] - output[j]
        heat = torch.tensor(s.temperature or (1.0,) * s.levels)[level[i]].to(gap.device)
        options: dict[str, Any] = {"margin": s.margin} if s.loss == "bradley_terry_ties" else {}
        scale = level_variance(t[i].to(gap.device)) if s.loss == "thurstone" else heat
        loss = PAIR_LOSSES[s.loss](gap, outcome.to(gap.device), scale, **options)
        return by_level(loss, level[i].to(gap.device), s.levels)

    # -- judgement -------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def outputs(self, groups: Sequence[int], seed: int) -> tuple[Samples, Tensor, Tensor, list[float | None]]:
        """Every member of the groups once at every level: (samples, outputs, times, seconds of each level)."""
        rows = torch.isin(self.samples.group, torch.tensor(list(groups))).nonzero().flatten()
        own, parts, times, seconds = self.samples[rows], [], [], []
        for level in range(self.settings.levels):
            inside = torch.rand(len(rows), generator=torch.Generator().manual_seed(seed + level))
            x, t = self.noised(own, (level + 0.05 + 0.9 * inside) / self.settings.levels, seed + 1000 + level)
            begin = time.perf_counter()
            chunks = [self.output(own[part], x[part], t[part]).cpu() for part in torch.split(torch.arange(len(x)), 256)]
            seconds.append(time.perf_counter() - begin)
            parts.append(torch.cat(chunks))
            times.append(t)
        every = own[torch.arange(len(rows)).repeat(self.settings.levels)]
        return every, torch.cat(parts).double(), torch.cat(times), list(seconds)

    def calibration(self) -> tuple[list[float], list[float]]:
        """(temperature, offset) of each level: the score's least squares on the output, over the training groups."""
        levels = self.settings.levels
        temperature, offset = [1.0] * levels, [0.0] * levels
        if not self.settings.calibrate:
            return temperature, offset
        every, output, t, _ = self.outputs(
            self.training_groups, rng.key(self.settings.seed, 0, step=1, stream="perturb")
        )
        level = noise_level(t, levels)
        for number in range(levels):
            here = (level == number) & every.score.isfinite()
            slope, shift, _ = linear_fit(output[here], every.score[here])
            if slope is not None and shift is not None and slope > 1e-6:
                temperature[number], offset[number] = 1 / slope, shift
        return temperature, offset

    def judge(self, temperature: Sequence[float], offset: Sequence[float]) -> list[LevelQuality]:
        """The quality report on the groups held out, of values as they will be used."""
        levels = self.settings.levels
        every, output, t, seconds = self.outputs(
            self.held_out, rng.key(self.settings.seed, 0, step=2, stream="perturb")
        )
        level = noise_level(t, levels)
        heat, shift = (torch.tensor(list(v), dtype=torch.float64)[level] for v in (temperature, offset))
        value = output / heat + shift
        return quality(value, value.isfinite(), every.score, every.group, t, levels=levels, seconds=seconds)
