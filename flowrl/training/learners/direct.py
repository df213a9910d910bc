"""Differentiable rewards: ReFL, DRaFT, AlignProp, CTRL. The learner makes its own samples and walks their chains.

A reward is differentiated first, down to x0, on finished samples; that gradient is what the chain pulls back. So the
decoder's activations and the network's are never held together, and a sample whose reward or gradient is not finite is
masked before anything reaches the weights.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from flowrl import rng
from flowrl.config.forward import Forward
from flowrl.credit.networks import pooled_text
from flowrl.dynamics.interpolants import interpolate, prediction_from_endpoints
from flowrl.dynamics.log_prob import reference_kl
from flowrl.objectives.differentiable import DIRECT, alignprop_loss, refl_loss, step_kl
from flowrl.objectives.forward import mean_square
from flowrl.records import Prompted, Request
from flowrl.rollout.chains import Members, PolicyChain
from flowrl.rollout.differentiable import checkpointed_chain, unrolled_chain
from flowrl.rollout.policy import Step
from flowrl.rollout.requests import request_of
from flowrl.rollout.sampling import first_of_each
from flowrl.scoring.graded import Graded, GradedRewards
from flowrl.scoring.runtime import RewardFailure
from flowrl.training.batch import update_of
from flowrl.training.learners.base import Bench, Draw, Learner
from flowrl.training.learners.renoise import Renoiser


@dataclass(frozen=True)
class Chunk:
    """Samples that go through the network together. share: what one of them weighs in the update's mean loss."""

    chain: PolicyChain
    requests: Sequence[Request]
    share: float

    def __len__(self) -> int:
        return len(self.requests)


@dataclass(frozen=True)
class Seen:
    """What one chunk did. penalty: [N], nats or whatever the penalty measures, added up over steps, with its weight;
    pretrain: [N], refl's denoising error on the pre-trained model's samples, without its weight. extra: [N] each, of
    which the mean is recorded under its name.
    """

    graded: Graded
    penalty: Tensor
    pretrain: Tensor | None = None
    extra: Mapping[str, Tensor] = field(default_factory=dict)


class DirectLearner(Learner):
    """One gradient step an update, on fresh samples, along the gradient of their reward."""

    needs_rollout: ClassVar[bool] = False
    needs_transitions: ClassVar[bool] = False

    def __init__(self, bench: Bench) -> None:
        super().__init__(bench)
        config = bench.config
        self.form = DIRECT[config.objective.name]
        self.settings = config.direct
        self.rewards = GradedRewards(config.rewards)
        self.steps = config.rollout.steps
        noisy = self.form.noisy or self.settings.stochastic
        self.stochastic = [noisy and k < self.steps - 1 for k in range(self.steps)]
        schedule = bench.policy.schedule
        straight = bool(torch.allclose(schedule.alpha, 1 - schedule.t, atol=1e-6))
        self.renoiser = Renoiser(Forward(draws=1, times="uniform" if straight else "grid"), schedule, shared=False)

    def learn_from(self, draw: Draw) -> dict[str, Any]:
        bench, updates = self.bench, self.config.objective.updates
        norms: list[float] = []
        seen: list[Seen] = []
        for update in range(updates):
            for chunk in self._chunks(draw, update):
                with bench.clock.phase("update"):
                    seen.append(self.accumulate(chunk, draw))
            self._check_failures(seen)
            if int(bench.backend.total(torch.tensor(sum(int(s.graded.valid.sum()) for s in seen)))):
                with bench.clock.phase("optimizer"):
                    norms.append(bench.step())
        return self._metrics(seen, norms)

    # -- samples ---------------------------------------------------------------------------------------------------

    def _chunks(self, draw: Draw, update: int) -> Iterator[Chunk]:
        """The samples of one update, in calls of ``micro_batch``."""
        bench, config = self.bench, self.config
        number = update_of(torch.tensor([d.group_id for d in draw.groups]), config.batch, config.objective.updates)
        mine = (number == update).nonzero().flatten().tolist()
        requests = [request_of(config, bench.rows[draw.groups[i].prompt_id]) for i in mine]
        first, place = first_of_each(torch.tensor([draw.groups[i].prompt_id for i in mine]))
        with bench.clock.phase("encode"):
            prompted = bench.policy.encode([requests[i] for i in first.tolist()])[place]
        sizes = draw.sizes[mine]
        row = torch.arange(len(mine)).repeat_interleave(sizes)
        member = torch.arange(len(row)) - (sizes.cumsum(0) - sizes)[row]
        share = 1 / int(bench.backend.total(torch.tensor(len(row))))
        for part in torch.split(torch.arange(len(row)), config.batch.micro_batch):
            rows = row[part].tolist()
            groups = [draw.groups[mine[i]] for i in rows]
            members = Members(
                draw.visit.seed, draw.visit.iteration, [g.prompt_id for g in groups], [g.occurrence for g in groups],
                member[part].tolist(),
            )  # fmt: skip
            asked = [requests[i] for i in rows]
            yield Chunk(self._chain(prompted[row[part]], members, asked[0]), asked, share)

    def _chain(self, prompted: Prompted, members: Members, request: Request) -> PolicyChain:
        bench = self.bench
        chain = PolicyChain(
            bench.policy, prompted, members, bench.adapter.latent_shape(request), self.stochastic
        )  # fmt: skip
        kl = self.config.objective.kl
        if not self.form.penalty and kl.form == "none":
            return chain
        if bench.reference is None:
            raise ValueError("objective.kl: this trainer was built without a reference policy")
        everywhere = kl.form == "velocity"
        return replace(
            chain, penalty=self._penalty, reference=bench.reference, closes=self.form.penalty,
            charged=[everywhere or s for s in self.stochastic],
        )  # fmt: skip

    def _penalty(self, made: Step, ref: Step) -> Tensor:
        if self.form.penalty:
            return step_kl(made.mean, ref.mean, made.std)
        kl = self.config.objective.kl
        if kl.form == "none":
            raise ValueError("objective.kl.form: none has no penalty")
        return kl.weight * reference_kl(kl.form, made.mean, ref.mean, made.std, made.point, made.value, ref.value)

    # -- gradients -------------------------------------------------------------------------------------------------

    def accumulate(self, chunk: Chunk, draw: Draw) -> Seen:
        """Add the gradient of one chunk to the parameters."""
        if self.form.chain:
            return self._along_the_chain(chunk, self._begin(chunk, draw))
        return self._one_step(chunk, draw)

    def _begin(self, chunk: Chunk, draw: Draw) -> int | Tensor:
        """The first step with gradient: one number, or int64 [N]."""
        d, steps = self.settings, self.steps
        most = d.last or steps
        name = self.config.objective.name
        if name == "draft_lv":
            return steps - 1
        if name == "draft" or d.least in (0, most):
            return steps - most
        span = most - d.least + 1

        def kept(prompt: int, occurrence: int, member: int) -> int:
            key = rng.key(draw.visit.seed, draw.visit.iteration, prompt, occurrence, member, 0, "timestep")
            return d.least + int(rng.uniform(key) * span)

        if not d.per_sample:
            return steps - kept(0, 0, 0)
        m = chunk.chain.members
        drawn = [kept(*who) for who in zip(m.prompt_id, m.occurrence, m.member, strict=True)]
        return steps - torch.tensor(drawn)

    def _along_the_chain(self, chunk: Chunk, start: int | Tensor) -> Seen:
        chain, parameters = chunk.chain, self.bench.weights.parameters
        if self.settings.checkpoint:
            x0, penalty = checkpointed_chain(
                chain.step, chain.start(), self.steps, parameters, start, self.settings.checkpoint_every
            )
        else:
            x0, penalty = unrolled_chain(chain.step, chain.start(), self.steps, start)
        graded = self.grade(x0, chunk)
        paid = torch.where(graded.valid, penalty.sum(0), 0.0)
        pictures = 1 + (self.settings.repeats if self.config.objective.name == "draft_lv" else 0)
        self._pull(x0, graded.gradient / pictures, paid, chunk.share)
        for repeat in range(1, pictures):
            self._again(chunk, x0.detach(), graded, repeat, chunk.share / pictures)
        return Seen(graded, paid.detach())

    def _again(self, chunk: Chunk, x0: Tensor, graded: Graded, repeat: int, share: float) -> None:
        """DRaFT-LV: noise the finished sample to the last step once more, denoise it, follow its reward."""
        chain, last = chunk.chain, self.steps - 1
        schedule = self.bench.policy.schedule
        noise = chain.members.noise(chain.shape, repeat, "perturb").to(x0.device)
        x = schedule.alpha[last] * x0 + schedule.sigma[last] * noise
        made = chain.transition(x, last).mean
        again = self.grade(made, chunk)
        mask = graded.valid.reshape(-1, *[1] * (x0.ndim - 1))
        self._pull(made, torch.where(mask, again.gradient, 0.0), torch.zeros(len(x0)), share)

    def _one_step(self, chunk: Chunk, draw: Draw) -> Seen:
        """ReFL: without gradient to a late step, one call with gradient, the reward of its one-step estimate."""
        window = self.settings.last or self.steps
        key = rng.key(draw.visit.seed, draw.visit.iteration, stream="timestep")
        k = self.steps - window + int(rng.uniform(key) * window)
        chain = chunk.chain
        x = chain.walk(chain.start(), k)
        paid = torch.zeros(len(chunk))
        if chain.penalty is not None and chain.reference is not None and chain.charged[k]:
            with torch.no_grad(), chain.reference():
                charge = chain.transition(x, k)
            made = chain.transition(x, k)
            paid = chain.penalty(made, charge)
        else:
            made = chain.transition(x, k)
        graded = self.grade(made.x0_hat, chunk)
        paid = torch.where(graded.valid, paid.to(graded.valid.device), 0.0)
        self._pull(made.x0_hat, graded.gradient, paid, chunk.share)
        pretrain = self._pretrain(chunk, graded.valid) if self.settings.pretrain_weight else None
        return Seen(graded, paid.detach(), pretrain)

    def _pretrain(self, chunk: Chunk, valid: Tensor) -> Tensor:
        """ReFL's other loss, ``weight mean (v - u)^2``: the denoising error, here on samples of the pre-trained model.

        The paper takes pairs of its pre-training data (2304.05977, algorithm 1). Unguided, at one time a sample, uniform.
        """
        bench, chain, m = self.bench, chunk.chain, chunk.chain.members
        if bench.reference is None:
            raise ValueError("direct.pretrain_weight: this trainer was built without a reference policy")
        with bench.reference():
            x0 = chain.walk(chain.start(), self.steps)
        who = list(zip(m.prompt_id, m.occurrence, m.member, strict=True))
        times = [rng.uniform(rng.key(m.seed, m.iteration, *each, 1, "timestep")) for each in who]
        x1 = m.noise(chain.shape, 0, "renoise").to(x0.device)
        wide = (-1, *[1] * (x0.ndim - 1))
        t, alpha, sigma = (v.to(x0.device) for v in self.renoiser.path(times, 0))
        alpha, sigma = alpha.reshape(wide), sigma.reshape(wide)
        made = bench.adapter.predict(interpolate(x0, x1, alpha, sigma), t, chain.prompted.positive)
        error = mean_square(made.value.float() - prediction_from_endpoints(x0, x1, made.kind, alpha, sigma))
        kept = torch.where(valid.to(error.device), error, 0.0)
        (self.settings.pretrain_weight * chunk.share * kept.sum()).backward()  # type: ignore[no-untyped-call]
        return kept.detach()

    def grade(self, x0: Tensor, chunk: Chunk) -> Graded:
        """Loss and gradient of the rewards at finished latents; counted as time of the reward."""
        with self.bench.clock.phase("reward"):
            text = pooled_text(chunk.chain.prompted.positive) if self.rewards.needs_text else None
            return self.rewards.grade(x0, chunk.requests, self.bench.adapter.decode, self._objective, text)

    def _objective(self, score: Tensor) -> Tensor:
        d, name = self.settings, self.config.objective.name
        if name == "refl":
            return refl_loss(score, d.margin, d.scale)
        if name == "alignprop":
            return alignprop_loss(score, d.target)
        return -d.strength * score if name == "ctrl" else -score

    @staticmethod
    def _pull(x: Tensor, gradient: Tensor, penalty: Tensor, share: float) -> None:
        """Back-propagate ``share (<gradient, x> + penalty)``, whose gradient is that of the loss behind ``gradient``."""
        loss = share * ((x * gradient.to(x.device)).sum() + penalty.sum().to(x.device))
        if loss.requires_grad:
            loss.backward()  # type: ignore[no-untyped-call]

    # -- reports ---------------------------------------------------------------------------------------------------

    def _check_failures(self, seen: Sequence[Seen]) -> None:
        """Raise RewardFailure when more of the iteration's samples failed than ``failures`` allows."""
        valid = self.bench.backend.gather(torch.cat([s.graded.valid.cpu() for s in seen]))
        invalid, limit = int((~valid).sum()), self.config.failures.max_invalid_fraction
        if invalid > limit * len(valid):
            raise RewardFailure(
                f"{invalid} of {len(valid)} samples have no finite reward and gradient, more than "
                f"failures.max_invalid_fraction ({limit:g}) allows; mend the reward, or lower optimizer.lr"
            )

    def _metrics(self, seen: Sequence[Seen], norms: Sequence[float]) -> dict[str, Any]:
        backend = self.bench.backend
        graded = Graded.join([s.graded for s in seen])
        valid = graded.valid
        columns = {"score/mean": graded.score, "direct/loss": graded.loss}
        columns |= {f"reward/{label}/mean": values for label, values in graded.scores.items()}
        if self.form.divergence or self.config.objective.kl.form != "none":
            columns["policy/kl"] = torch.cat([s.penalty for s in seen])
        if self.settings.pretrain_weight:
            columns["direct/pretrain_loss"] = torch.cat([s.pretrain for s in seen if s.pretrain is not None])
        columns |= {name: torch.cat([s.extra[name] for s in seen]) for name in seen[0].extra}
        columns["direct/gradient_norm"] = graded.gradient.flatten(1).norm(dim=1)
        sums = torch.stack([torch.where(valid, v.double(), 0.0).sum().cpu() for v in columns.values()])
        count = int(backend.total(valid.sum().cpu()))
        means = backend.total(sums).tolist()
        row: dict[str, Any] = {
            name: total / count if count else None for name, total in zip(columns, means, strict=True)
        }
        row["score/invalid"] = int(backend.total((~valid).sum().cpu()))
        row |= {"optimizer/lr": self.bench.rate, "update/steps": len(norms)}
        row |= {"memory/reward_gradient_mb": self.rewards.nbytes / 2**20} if self.rewards.nbytes else {}
        if norms:
            row["optimizer/grad_norm"] = float(np.mean(norms)) if np.isfinite(norms).all() else None
        return row
