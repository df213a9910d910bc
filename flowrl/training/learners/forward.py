"""Learning from finished samples: they are noised anew, and the network's errors there are weighed by the rewards.

No transition is replayed and no log-prob taken: the rollout may use any solver. One optimizer step sees every live sample
of its minibatch at each of its draws; with B samples, M draws and a network call of at most ``micro_batch`` samples

    update       B M forwards and backwards a pass
    old          B M forwards an iteration where the loss (or its anchor) looks at the policy that drew the samples
    reference    B M forwards an iteration where it looks at the pre-trained model
    joint        B M further forwards a pass where a loss looks at whole groups and a group exceeds a call
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, fields
from functools import partial
from typing import Any

import torch
from torch import Tensor

from flowrl.config.schema import Objective
from flowrl.objectives.forward import FORWARD, ForwardForm, best_and_worst, matching_error, mean_square
from flowrl.objectives.surrogates import surrogate_loss
from flowrl.training.batch import TrainingBatch
from flowrl.training.learners.base import Bench, Learner
from flowrl.training.learners.old_policy import OldPolicy
from flowrl.training.learners.renoise import Renoiser
from flowrl.training.losses import CLIP_OPTION

Inputs = dict[str, Tensor]
Outputs = dict[tuple[int, int, int], Tensor]
"""Network outputs by (minibatch, part, draw)."""


@dataclass(frozen=True)
class Call:
    """One network call. value, target: [N, ...], the output and the one that leads back to the sample; t, scale: [N]."""

    value: Tensor
    target: Tensor
    t: Tensor
    scale: Tensor


@dataclass(frozen=True)
class ForwardTerms:
    """Sums over rows of one call, float64 scalars: the loss with its weights, kl, error, squared distance to the old policy,
    and the number of rows."""

    loss: Tensor
    kl: Tensor
    error: Tensor
    shift: Tensor
    count: Tensor


def bind(form: ForwardForm, objective: Objective) -> tuple[Callable[[Inputs], Tensor], frozenset[str]]:
    """The loss [N] of an objective as a function of its inputs by name, and which inputs it takes."""
    options = dict(objective.loss_options)
    if form.surrogate and objective.loss:
        own = CLIP_OPTION.get(objective.loss)
        options = ({own: objective.clip_range} if own else {}) | options

        def surrogate(given: Inputs) -> Tensor:
            now, before = -given["error"][:, None], -given["old_error"][:, None]
            advantage, mask = given["advantage"][:, None], torch.ones_like(now, dtype=torch.bool)
            inputs = {"log_prob": now, "old_log_prob": before, "advantage": advantage, "mask": mask}
            return surrogate_loss(objective.loss, inputs, options).loss[:, 0]

        return surrogate, form.inputs(objective.loss)
    names = form.inputs()

    def loss(given: Inputs) -> Tensor:
        return form.loss(**{name: given[name] for name in names}, **options)

    return loss, names


class ForwardLearner(Learner):
    """Objectives of ``flowrl.objectives.forward`` on the samples of a rollout."""

    needs_transitions = False

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        config, forward = self.config, self.config.forward
        self.form = FORWARD[config.objective.name]
        self.loss, self.names = bind(self.form, config.objective)
        self.weight = forward.weight or self.form.weight
        self.renoiser = Renoiser(forward, bench.policy.schedule, self.form.shared)
        self.old = OldPolicy(bench.weights, forward)
        self.updates = 0
        self.with_kl = config.objective.kl.form != "none"
        anchor = forward.anchor if self.with_kl else ""
        self.needs_old, self.needs_reference = self.form.needs(config.objective.loss, anchor)
        if self.needs_reference and bench.reference is None:
            raise ValueError(f"objective {config.objective.name}: this trainer was built without a reference policy")

    def behaviour(self) -> AbstractContextManager[None]:
        return self.old.swapped_in() if self.config.forward.sampler == "old" else nullcontext()

    def state(self) -> dict[str, Any]:
        return self.old.state()

    def load_state(self, state: dict[str, Any]) -> None:
        self.old.load(state)

    # -- an iteration ----------------------------------------------------------------------------------------------

    def learn(self, batch: TrainingBatch) -> dict[str, Any]:
        if batch.visit is None:
            raise ValueError("forward: this batch does not say which iteration it is of")
        bench, objective = self.bench, self.config.objective
        calls = _Calls(self, batch)
        if self.needs_old:
            with bench.clock.phase("old"), self.old.swapped_in():
                calls.olds = bench.micro.attempt("the old policy's calls", calls.outputs, calls.divide)
        if self.needs_reference and bench.reference is not None:
            with bench.clock.phase("reference"), bench.reference():
                calls.references = bench.micro.attempt("the reference policy's calls", calls.outputs, calls.divide)
        calls.divide()
        seen: list[ForwardTerms] = []
        norms: list[float] = []
        for _ in range(objective.passes):
            for m in range(objective.updates):
                rows = calls.parts[m]
                live = torch.cat(rows) if rows else torch.empty(0, dtype=torch.int64)
                count = int(bench.backend.total(torch.tensor(len(live))))
                signal = bench.backend.total((batch.advantage[live, 0] != 0).sum())
                if not count or (self.form.silent and not self.with_kl and not int(signal)):
                    continue  # nothing to learn from: an optimizer step would only spend momentum
                with bench.clock.phase("update"):
                    work = partial(self._gradients, calls, m, count)
                    seen += bench.micro.attempt("the update", work, calls.divide)
                with bench.clock.phase("optimizer"):
                    norms.append(bench.step())
        self.updates = batch.visit.policy_version + len(norms)
        self.old.follow(self.updates)
        return self._row(seen, norms)

    def _parts(self, batch: TrainingBatch, minibatch: int) -> list[Tensor]:
        """Rows of each call of one minibatch: those that have a gradient, a group in one call where it fits."""
        objective, size = self.config.objective, self.bench.micro.size
        live = batch.element[:, 0] & (batch.minibatch == minibatch)
        group = batch.trajectory.group_id
        if self.form.pairs:
            pair = torch.cat(best_and_worst(batch.advantage[:, 0], group, live))
            live = torch.zeros_like(live).index_fill_(0, pair, True)
        elif self.form.silent and objective.skip_silent and not self.with_kl:
            some = batch.advantage[:, 0] != 0
            if self.form.joint:  # a loss over a group needs all of it, or none
                some = torch.isin(group, group[live & some])
            live = live & some
        rows = live.nonzero().flatten()
        return pack(rows, group[rows], size) if self.form.joint else list(torch.split(rows, size)) if len(rows) else []

    @torch.no_grad()
    def _outputs(self, batch: TrainingBatch, parts: Sequence[Sequence[Tensor]]) -> Outputs:
        """Network outputs under the weights of the moment, of every part at every draw."""
        return {
            (m, number, draw): self._call(batch, rows, draw).value
            for m, minibatch in enumerate(parts)
            for number, rows in enumerate(minibatch)
            for draw in range(self.config.forward.draws)
        }

    def _call(self, batch: TrainingBatch, rows: Tensor, draw: int) -> Call:
        """One network call on ``rows`` at one of their draws, without guidance."""
        visit = batch.visit
        if visit is None:
            raise ValueError("forward: this batch does not say which iteration it is of")
        at = self.renoiser.draw(batch.trajectory, visit.seed, visit.iteration, rows, draw)
        prediction = self.bench.adapter.predict(at.x, at.t, batch.prompted.positive[batch.row[rows]])
        return Call(prediction.value, at.target(prediction.kind), at.t, at.scale(prediction.kind))

    # -- gradients -------------------------------------------------------------------------------------------------

    def _gradients(self, calls: _Calls, m: int, count: int) -> list[ForwardTerms]:
        """The gradients of minibatch ``m``, in place of any that an earlier try has left."""
        self.bench.optimizer.zero_grad(set_to_none=True)
        return list(self._accumulate(calls.batch, m, calls.parts[m], count, calls.olds, calls.references))

    def _accumulate(
        self, batch: TrainingBatch, m: int, parts: Sequence[Tensor], count: int, olds: Outputs, references: Outputs
    ) -> Iterator[ForwardTerms]:
        """Add the gradients of one minibatch; ``count``: its rows on all processes."""
        forward, kl_weight = self.config.forward, self.config.objective.kl.weight
        split = self.form.joint and not whole_groups(parts, batch.trajectory.group_id)
        for draw in range(forward.draws):
            slopes = self._slopes(batch, m, parts, draw, olds, references) if split else None
            for number, rows in enumerate(parts):
                call = self._call(batch, rows, draw)
                old, reference = olds.get((m, number, draw)), references.get((m, number, draw))
                given = self._inputs(batch, rows, call, old, reference)
                weight = batch.weight[rows, 0].to(call.value.device) / (count * forward.draws)
                anchor = old if forward.anchor == "old" else reference
                kl = (
                    mean_square(call.value - anchor)
                    if self.with_kl and anchor is not None
                    else torch.zeros_like(weight)
                )
                if slopes is None:
                    loss = self.loss(given)
                    total = loss * weight
                else:
                    loss, slope = slopes[number]
                    total = slope * weight * given["error"]
                self.bench.backend.backward((total + kl_weight * kl * weight).sum())
                yield _terms(loss, kl, weight, given["error"], call.value, old)

    def _inputs(
        self, batch: TrainingBatch, rows: Tensor, call: Call, old: Tensor | None, reference: Tensor | None
    ) -> Inputs:
        """Everything a loss may ask for, of one call."""
        device = call.value.device
        given = {
            "value": call.value, "target": call.target, "t": call.t, "x0_scale": call.scale,
            "advantage": batch.advantage[rows, 0].to(device), "group": batch.trajectory.group_id[rows].to(device),
        }  # fmt: skip
        for name, value, error in (
            ("", call.value, "error"), ("old", old, "old_error"), ("reference", reference, "reference_error"),
        ):  # fmt: skip
            if value is not None:
                given |= {name: value} if name else {}
                given[error] = matching_error(value - call.target, call.t, call.scale, self.weight)
        return given

    @torch.no_grad()
    def _slopes(
        self, batch: TrainingBatch, m: int, parts: Sequence[Tensor], draw: int, olds: Outputs, references: Outputs
    ) -> list[tuple[Tensor, Tensor]]:
        """(loss, its derivative by each error) of every part, for a loss over groups that no single call holds."""
        found: list[Inputs] = []
        for number, rows in enumerate(parts):
            key = (m, number, draw)
            made = self._inputs(batch, rows, self._call(batch, rows, draw), olds.get(key), references.get(key))
            found.append({name: made[name] for name in self.names})
        given = {name: torch.cat([part[name] for part in found]) for name in self.names}
        given["error"].requires_grad_()
        with torch.enable_grad():
            loss = self.loss(given)
            (slope,) = torch.autograd.grad(loss.sum(), given["error"])
        sizes = [len(rows) for rows in parts]
        return list(zip(torch.split(loss.detach(), sizes), torch.split(slope, sizes), strict=True))

    def _row(self, seen: Sequence[ForwardTerms], norms: Sequence[float]) -> dict[str, Any]:
        """Metrics of an iteration: sums over processes, means over rows; the loss is that of one update."""
        names = [f.name for f in fields(ForwardTerms)]
        sums = torch.zeros(len(names), dtype=torch.float64)
        for terms in seen:
            sums += torch.stack([vars(terms)[name].cpu() for name in names])
        loss, kl, error, shift, count = self.bench.backend.total(sums).tolist()
        row: dict[str, Any] = {"update/steps": len(norms), "optimizer/lr": self.bench.rate}
        if not count:
            return row
        row |= {"policy/loss": loss / len(norms), "policy/kl": kl / count, "policy/matching_error": error / count}
        row |= {"policy/shift": shift / count} if self.needs_old else {}
        row |= {"policy/old_decay": self.old.decay(self.updates)} if self.old else {}
        row["optimizer/grad_norm"] = float(torch.tensor(norms).mean())
        return {name: value if math.isfinite(value) else None for name, value in row.items()}


class _Calls:
    """Which samples go into which call of the updates, and the old and the reference policy's outputs for them."""

    def __init__(self, learner: ForwardLearner, batch: TrainingBatch) -> None:
        self.learner, self.batch = learner, batch
        self.size = 0
        self.parts: list[list[Tensor]] = []
        self.olds: Outputs = {}
        self.references: Outputs = {}

    def divide(self) -> None:
        """Divide the batch anew where the micro-batch has changed since, and what is known of it with it."""
        size, updates = self.learner.bench.micro.size, self.learner.config.objective.updates
        if self.size == size:
            return
        before, self.size = self.parts, size
        self.parts = [self.learner._parts(self.batch, m) for m in range(updates)]
        self.olds, self.references = (recut(known, before, self.parts) for known in (self.olds, self.references))

    def outputs(self) -> Outputs:
        return self.learner._outputs(self.batch, self.parts)


def recut(outputs: Outputs, before: Sequence[Sequence[Tensor]], after: Sequence[Sequence[Tensor]]) -> Outputs:
    """Network outputs of the parts ``before``, cut into the parts ``after``, which hold the same rows in the same order."""
    found: Outputs = {}
    for m, draw in sorted({(m, draw) for m, _, draw in outputs}):
        whole = torch.cat([outputs[m, number, draw] for number in range(len(before[m]))])
        for number, piece in enumerate(torch.split(whole, [len(rows) for rows in after[m]])):
            found[m, number, draw] = piece
    return found


def pack(rows: Tensor, group: Tensor, size: int) -> list[Tensor]:
    """Rows int64 [N], ordered by group, in calls of at most ``size`` that hold whole groups; where a group is larger than
    a call, in plain calls of ``size``.
    """
    if not len(rows):
        return []
    _, counts = torch.unique_consecutive(group, return_counts=True)
    if int(counts.max()) > size:
        return list(torch.split(rows, size))
    calls: list[list[Tensor]] = [[]]
    filled = 0
    for part in torch.split(rows, counts.tolist()):
        if filled + len(part) > size:
            calls.append([])
            filled = 0
        calls[-1].append(part)
        filled += len(part)
    return [torch.cat(call) for call in calls]


def whole_groups(parts: Sequence[Tensor], group: Tensor) -> bool:
    """Whether no group is spread over two parts; group: int64 [B]."""
    seen = [set(group[rows].tolist()) for rows in parts]
    return len(set().union(*seen)) == sum(len(ids) for ids in seen)


@torch.no_grad()
def _terms(loss: Tensor, kl: Tensor, weight: Tensor, error: Tensor, value: Tensor, old: Tensor | None) -> ForwardTerms:
    shift = torch.zeros_like(error) if old is None else mean_square(value - old)
    count = torch.tensor(len(error), dtype=torch.float64)
    return ForwardTerms(
        (loss * weight).double().sum(), kl.double().sum(), error.double().sum(), shift.double().sum(), count
    )
