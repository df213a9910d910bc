"""Adjoint Matching: sample memoryless paths, sweep adjoints of the pre-trained model back, regress the control."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowrl import rng
from flowrl.objectives.differentiable import (
    adjoint_matching_loss,
    keep_below_quantile,
    lean_adjoints,
    terminal_adjoint,
)
from flowrl.rollout.chains import PolicyChain
from flowrl.training.learners.base import Draw
from flowrl.training.learners.direct import Chunk, DirectLearner, Seen

CONTROL = "direct/control_asked"
"""Mean of ``||std a||^2`` a step and element: the loss where the policy has not moved."""
QUIET = 0.01
"""Part of the largest std below which a step counts as one without noise."""
logger = logging.getLogger(__name__)


class AdjointLearner(DirectLearner):
    """T forwards for the path, T of the reference for the sweep (T - 1 with a backward), and the chosen steps of the update."""

    warned = False

    def accumulate(self, chunk: Chunk, draw: Draw) -> Seen:
        """Add the gradient of one chunk: a mean over the chosen steps of its samples."""
        chain, count = chunk.chain, self.steps - 1
        path = self._path(chain)
        graded = self.grade(path[-1], chunk)
        end = terminal_adjoint(-graded.gradient, self.settings.temperature)  # the loss is minus the reward
        adjoints, means = self._sweep(chain, path, end)
        steps, stds = self._chosen(draw), {}
        paid = torch.zeros(len(chunk), device=path[-1].device)
        left, asked = torch.zeros_like(paid), torch.zeros_like(paid)
        for k in steps:
            made = chain.transition(path[k], k)
            loss = adjoint_matching_loss(made.mean, means[k], made.std, adjoints[k])
            keep = graded.valid & keep_below_quantile(
                torch.where(graded.valid, loss.detach(), torch.nan), self.settings.quantile
            )
            with torch.no_grad():
                moved = ((made.mean - means[k]) / made.std).square().flatten(1).sum(1) / 2
                stds[k] = float(made.std.max())
                left += torch.where(keep, loss, 0.0) / len(steps)
                asked += torch.where(keep, (made.std * adjoints[k]).square().flatten(1).mean(1), 0.0) / len(steps)
                paid += torch.where(keep, moved, 0.0) * count / len(steps)
            (chunk.share / len(steps) * torch.where(keep, loss, 0.0).sum()).backward()  # type: ignore[no-untyped-call]
        self._check_noise(stds)
        return Seen(replace(graded, loss=-graded.score), paid, extra={"direct/control_left": left, CONTROL: asked})

    def _metrics(self, seen: Sequence[Seen], norms: Sequence[float]) -> dict[str, Any]:
        """As of all, and what is left of the regression: its loss over that of no control (0 at best, 1 for none)."""
        row = super()._metrics(seen, norms)
        left, asked = row.pop("direct/control_left"), row.get(CONTROL)
        return row | ({"direct/control_error": left / asked} if left is not None and asked else {})

    def _check_noise(self, stds: Mapping[int, float]) -> None:
        """Warn, once, of steps with hardly any noise: their loss, over std^2, holds the policy where it is on all steps."""
        quiet = {k: std for k, std in stds.items() if std < QUIET * max(stds.values())}
        if quiet and not self.warned:
            self.warned = True
            k, std = min(quiet.items(), key=lambda item: item[1])
            logger.warning(
                "rollout.kernel.name: step %d draws noise of std %.2g, and a control costs 1 / std^2 there, so the regression "
                "keeps the policy where it is; use rollout.kernel.name=flow_sde rollout.kernel.noise=1.4142135623730951, or "
                "a schedule that does not end so close to 0", k, std,
            )  # fmt: skip

    @torch.no_grad()
    def _path(self, chain: PolicyChain) -> list[Tensor]:
        """All latents of a path under the present weights: [x_0 .. x_T]."""
        path = [chain.start()]
        for k in range(self.steps):
            path.append(chain.draw(chain.transition(path[-1], k), k))
        return path

    def _sweep(self, chain: PolicyChain, path: list[Tensor], end: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """(a_(k+1) of every step k, mean of the reference at every step but the last)."""
        means: dict[int, Tensor] = {}
        if self.bench.reference is None:
            raise ValueError("adjoint_matching: this trainer was built without a reference policy")

        def pull(k: int, adjoint: Tensor) -> Tensor:
            with torch.enable_grad():
                x = path[k].detach().requires_grad_()
                mean = chain.transition(x, k).mean
                (back,) = torch.autograd.grad(mean, x, adjoint)
            means[k] = mean.detach()
            return back

        with self.bench.clock.phase("adjoint"), self.bench.reference():
            adjoints = lean_adjoints(pull, end, self.steps)
            with torch.no_grad():
                means[0] = chain.transition(path[0], 0).mean
        return adjoints, [means[k] for k in range(self.steps - 1)]

    def _chosen(self, draw: Draw) -> list[int]:
        """Steps that are trained: a keyed choice of the iteration, the last stochastic ones always among them."""
        d, count = self.settings, self.steps - 1
        wanted = min(d.trained or count, count)
        final = list(range(count - min(d.final, wanted), count))
        others = rng.permutation(rng.key(draw.visit.seed, draw.visit.iteration, stream="timestep"), count - len(final))
        return sorted([*final, *others[: wanted - len(final)]])
