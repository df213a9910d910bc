"""A value network on latents, trained on the run's own samples, with a gate that says whether it may be used."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from flowrl import rng
from flowrl.config.process import Critic
from flowrl.credit.critic_losses import bin_edges, critic_loss, critic_value, explained_variance
from flowrl.credit.networks import LatentNetwork, SummaryNetwork, module_bytes, seeded

PATIENCE = 3
"""Iterations in a row that a critic may be worse than ``diverged`` before it is stopped."""
_CHUNK = 1024


@dataclass(frozen=True)
class CriticBatch:
    """States to learn from. x: [N, ...], what the critic reads of them; t, target: float32 [N]; text: float32 [N, D]."""

    x: Tensor
    t: Tensor
    text: Tensor
    target: Tensor

    def __getitem__(self, rows: slice) -> CriticBatch:
        return CriticBatch(*(value[rows] for value in vars(self).values()))


class Recent:
    """Rows of the last ``keep`` iterations: named tensors, equally long."""

    def __init__(self, keep: int) -> None:
        self.keep = keep
        self.parts: list[dict[str, Tensor]] = []

    def push(self, rows: Mapping[str, Tensor]) -> None:
        """Take in one iteration's rows; the oldest iteration beyond ``keep`` leaves."""
        self.parts = [*self.parts, {name: value.detach().clone() for name, value in rows.items()}][-self.keep :]

    def __len__(self) -> int:
        return sum(len(next(iter(part.values()))) for part in self.parts)

    def draw(self, seed: int, count: int) -> dict[str, Tensor]:
        """Choose ``count`` rows, with replacement, by ``seed``."""
        chosen = torch.randint(len(self), (count,), generator=torch.Generator().manual_seed(seed))
        found = {}
        for name in self.parts[0]:
            whole = torch.cat([part[name] for part in self.parts])
            found[name] = whole[chosen.to(whole.device)]
        return found

    @property
    def nbytes(self) -> int:
        return sum(v.numel() * v.element_size() for part in self.parts for v in part.values())


class ValueCritic:
    """V(x_t, t, text), or V(features of x_t, t, text), with its optimizer, its average, which gives all values, and its gate.

    The gate opens once the critic has been trained for ``warmup`` iterations and explains at least ``min_explained`` of the
    targets' variance on samples it was not trained on; it closes again when it does not. A loss or gradient that is not
    finite, or three iterations in a row that explain less than ``-diverged``, stop it for good: ``stopped`` says why.

    reads: channels of the latent, or with ``settings.features`` numbers of their `summary`; text: of the text vector.
    """

    def __init__(self, settings: Critic, reads: int, text: int, seed: int, device: torch.device | str = "cpu") -> None:
        self.settings = settings
        histogram = settings.loss == "hl_gauss"
        self.edges = bin_edges(settings.low, settings.high, settings.bins) if histogram else None
        with seeded(seed):
            out = settings.bins if histogram else 1
            self.network: LatentNetwork | SummaryNetwork = (
                SummaryNetwork(reads, text, width=settings.width, out=out)
                if settings.features
                else LatentNetwork(reads, text, width=settings.width, blocks=settings.blocks, out=out)
            )
        self.network.to(device)
        self.average = copy.deepcopy(self.network).eval().requires_grad_(False)
        self.optimizer = torch.optim.AdamW(
            self.network.parameters(), lr=settings.lr, weight_decay=settings.weight_decay
        )
        self.trained = self.bad = 0
        self.explained: float | None = None
        self.stopped = ""

    # -- values and gate -------------------------------------------------------------------------------------------

    @torch.no_grad()
    def value(self, x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        """Values of states by the averaged weights: float32 [N]. x: what the critic reads of them."""
        parts = [
            critic_value(self.settings.loss, self.average(*rows), self.edges)
            for rows in zip(*(torch.split(v, _CHUNK) for v in (x, t, text)), strict=True)
        ]
        return torch.cat(parts)

    @property
    def open(self) -> bool:
        """Whether the actor may be given this critic's values."""
        s = self.settings
        good = self.explained is not None and self.explained >= s.min_explained
        return not self.stopped and self.trained >= s.warmup and good

    @property
    def gate(self) -> Literal["open", "closed", "stopped"]:
        return "stopped" if self.stopped else "open" if self.open else "closed"

    def judge(self, value: Tensor, target: Tensor, t: Tensor) -> None:
        """Look at values of samples not trained on, all processes': how much of the targets they explain.

        Only states with t below ``below`` count, or all where none is. value, target: float [N], NaN target: left out.
        """
        late = t < self.settings.below
        late = late if bool(late.any()) else torch.ones_like(late)
        found = explained_variance(value[late], target[late])
        if found is None:
            return
        self.explained = found
        self.bad = self.bad + 1 if found < -self.settings.diverged and self.trained >= self.settings.warmup else 0
        if found == -math.inf:
            self.stop("its values are not finite")
        elif self.bad >= PATIENCE:
            self.stop(f"it explained {found:.2g} of the variance, less than nothing, {PATIENCE} iterations in a row")

    def stop(self, reason: str) -> None:
        """Close the gate for good."""
        self.stopped = self.stopped or reason

    # -- training --------------------------------------------------------------------------------------------------

    def fit(
        self,
        draw: Callable[[int], CriticBatch],
        add_gradients: Callable[[Sequence[torch.nn.Parameter]], object],
        count: int | None = None,
    ) -> float | None:
        """Do ``steps`` optimizer steps; returns the mean loss, None where nothing was learnt.

        draw: number of the step -> states; add_gradients: adds up gradients over processes. count: states of a step in all
        processes together, None: those of ``draw``; the loss returned is then this process's part of the mean.
        """
        if self.stopped:
            return None
        parameters = list(self.network.parameters())
        losses = []
        for step in range(self.settings.steps):
            batch = draw(step)
            loss = torch.zeros(())
            if len(batch.target):
                output = self.network(batch.x, batch.t, batch.text)
                own = critic_loss(
                    self.settings.loss, output, batch.target, delta=self.settings.delta, edges=self.edges
                ).mean()
                loss = own * (len(batch.target) / (count or len(batch.target)))
                loss.backward()  # type: ignore[no-untyped-call]
            add_gradients(parameters)
            norm = float(torch.nn.utils.clip_grad_norm_(parameters, self.settings.max_grad_norm))
            if not math.isfinite(norm):
                self.optimizer.zero_grad(set_to_none=True)
                self.stop(f"its gradient is {norm} at step {step} of iteration {self.trained + 1}")
                return None
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                for mean, now in zip(self.average.parameters(), parameters, strict=True):
                    mean.lerp_(now, 1 - self.settings.ema)
            losses.append(float(loss.detach()))
        self.trained += 1
        return sum(losses) / len(losses)

    def as_metrics(self, name: str = "critic") -> dict[str, Any]:
        explained = self.explained if self.explained is not None and math.isfinite(self.explained) else None
        return {
            f"{name}/explained_variance": explained, f"{name}/open": int(self.open), f"{name}/stopped": int(bool(self.stopped))
        }  # fmt: skip

    @property
    def nbytes(self) -> int:
        """Weights, average, gradients and the optimizer's two moments."""
        return 5 * module_bytes(self.network)

    # -- state -----------------------------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        return {
            "network": dict(self.network.state_dict()), "average": dict(self.average.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "gate": {"trained": self.trained, "bad": self.bad, "explained": self.explained, "stopped": self.stopped},
        }  # fmt: skip

    def load(self, state: Mapping[str, Any]) -> None:
        """Go on from a state; ValueError where it is of a critic of another shape, before anything changes."""
        own = self.network.state_dict()
        for part in ("network", "average"):
            if {k: v.shape for k, v in state.get(part, {}).items()} != {k: v.shape for k, v in own.items()}:
                raise ValueError(
                    "checkpoint: its critic does not fit this run; was critic.* changed since the run began?"
                )
        self.network.load_state_dict(state["network"])
        self.average.load_state_dict(state["average"])
        self.optimizer.load_state_dict(state["optimizer"])
        gate = state["gate"]
        self.trained, self.bad = gate["trained"], gate["bad"]
        self.explained, self.stopped = gate["explained"], gate["stopped"]


class Standard:
    """Running mean and deviation of a number, each iteration weighing ``decay`` times the next."""

    def __init__(self, decay: float = 0.9) -> None:
        self.decay = decay
        self.sums = torch.zeros(3, dtype=torch.float64)

    def add(self, values: Tensor) -> None:
        """Take in one iteration's values, all processes' (NaN: left out)."""
        known = values[values.isfinite()].double()
        now = torch.stack([torch.tensor(float(len(known)), dtype=torch.float64), known.sum(), known.square().sum()])
        self.sums = self.decay * self.sums + now

    @property
    def mean(self) -> float:
        return float(self.sums[1] / self.sums[0]) if float(self.sums[0]) else 0.0

    @property
    def std(self) -> float:
        if not float(self.sums[0]):
            return 1.0
        spread = float(self.sums[2] / self.sums[0]) - self.mean**2
        return math.sqrt(spread) if spread > 1e-12 else 1.0

    def forward(self, values: Tensor) -> Tensor:
        return (values - self.mean) / self.std

    def back(self, values: Tensor) -> Tensor:
        return values * self.std + self.mean


def draw_key(seed: int, iteration: int, step: int) -> int:
    """Key of the rows that a critic's optimizer step ``step`` of an iteration draws."""
    return rng.key(seed, iteration, step=step, stream="perturb")
