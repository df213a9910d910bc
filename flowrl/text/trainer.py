"""One iteration: draw problems, sample, grade, assign credit, update policy and critic."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowrl import rng
from flowrl.advantage import Advantage, aggregate, policy_loss
from flowrl.text import credit, tasks
from flowrl.text.config import TextConfig
from flowrl.text.model import Critic, log_probs, prompts
from flowrl.text.rollout import Judge, Sampled, Sampler, generate

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM


class Trainer:
    """Trains ``model`` in place. judge: grades completions; the task's own rule by default.

    iteration, samples and generated say how far the run is; the run is over when ``finished``.
    """

    def __init__(
        self, config: TextConfig, task: tasks.Task, model: LlamaForCausalLM, critic: Critic | None = None,
        judge: Judge | None = None,
    ) -> None:  # fmt: skip
        self.config, self.task, self.model, self.critic = config, task, model, critic
        self.iteration = self.samples = self.generated = 0

        def by_rule(problems: Any, tokens: Tensor, mask: Tensor) -> tasks.Grades:
            return tasks.grade(task, problems, tokens, mask)

        self.sampler = Sampler(model, judge or by_rule, config.rollout, tasks.longest(task), config.seed)
        self.optimizer = torch.optim.Adam(model.parameters(), lr=config.optimizer.lr)
        self.critic_optimizer = None if critic is None else torch.optim.Adam(critic.parameters(), lr=config.critic.lr)
        key = rng.key(0, 0, stream="evaluation")
        self.held_out = tasks.draw(task, key, config.evaluation.problems, evaluation=True)

    @property
    def finished(self) -> bool:
        c = self.config
        return self.generated >= c.tokens or 0 < c.iterations <= self.iteration

    def iterate(self) -> dict[str, Any]:
        """Run one iteration; return its row of metrics."""
        c, started = self.config, time.perf_counter()
        self._set_rates()
        problems = tasks.draw(self.task, rng.key(c.seed, self.iteration, stream="sampler"), c.rollout.problems)
        made = self.sampler.sample(problems, self.iteration)
        value = self._value(made)
        assigned = credit.assign(c.advantage, made, value)
        sampled = time.perf_counter()
        row = self._update(made, assigned)
        row |= {} if value is None else self._update_critic(made, assigned, value)
        self.iteration += 1
        self.samples, self.generated = self.samples + made.samples, self.generated + made.generated
        return {
            "iteration": self.iteration,
            "samples": self.samples,
            "tokens": self.generated,
            "rows": len(made.tokens),
            "reward/outcome/mean": float(made.grades.outcome.mean()),
            "reward/turns/mean": float(made.grades.share.mean()),
            "policy/entropy": float(made.entropy[made.mask].mean()),
            "policy/live_fraction": float(assigned.live.float().mean()),
            **row,
            "time/rollout_s": sampled - started,
            "time/update_s": time.perf_counter() - sampled,
        }

    @torch.no_grad()
    def evaluate(self) -> float:
        """Greedy accuracy on the held-out problems, in [0, 1]."""
        prompt = prompts(self.held_out)
        nothing = torch.full((len(prompt), self.sampler.steps), tasks.PAD)
        tokens = generate(self.model, prompt, nothing, torch.zeros(len(prompt), dtype=torch.int64), None)
        mask = torch.ones_like(tokens, dtype=torch.bool)
        return float(tasks.grade(self.task, self.held_out, tokens, mask).outcome.mean())

    def _set_rates(self) -> None:
        c = self.config
        share = 1.0 - self.generated / c.tokens if c.optimizer.schedule == "linear" else 1.0
        if c.iterations and c.optimizer.schedule == "linear":
            share = min(share, 1.0 - self.iteration / c.iterations)
        share *= min(1.0, (self.iteration + 1) / (c.optimizer.warmup + 1))
        for optimizer, lr in ((self.optimizer, c.optimizer.lr), (self.critic_optimizer, c.critic.lr)):
            for group in [] if optimizer is None else optimizer.param_groups:
                group["lr"] = lr * share

    @torch.no_grad()
    def _value(self, made: Sampled) -> Tensor | None:
        return None if self.critic is None else self.critic(made.prompt, made.tokens)

    def _minibatches(self, rows: int, updates: int, passes: int, stream_step: int) -> list[Tensor]:
        parts: list[Tensor] = []
        for number in range(passes):
            key = rng.key(self.config.seed, self.iteration, member=number, step=stream_step, stream="perturb")
            parts += torch.tensor(rng.permutation(key, rows)).tensor_split(updates)
        return [part for part in parts if len(part)]

    def _update(self, made: Sampled, assigned: Advantage) -> dict[str, Any]:
        o, seen, norms = self.config.objective, [], []
        trained = (assigned.advantage != 0) & (assigned.weight != 0) & assigned.loss_mask
        for part in self._minibatches(len(made.tokens), o.updates, o.passes, 0):
            # Rows without a gradient are not computed, and still count in the mean.
            live, count = part[trained[part].any(1)], int(assigned.loss_mask[part].sum())
            if len(live) == 0:
                continue
            loss, ratio, clipped = self._loss(made, assigned, live, count)
            norms.append(_step(loss, self.model, self.optimizer, self.config.optimizer.max_grad_norm))
            seen.append((float(loss.detach()), ratio, clipped))
        if not seen:
            return {"update/steps": 0}
        loss_mean, ratio_mean, clip_fraction = torch.tensor(seen).mean(0).tolist()
        return {
            "update/steps": len(seen), "policy/loss": loss_mean, "policy/ratio_mean": ratio_mean,
            "policy/clip_fraction": clip_fraction, "policy/grad_norm": sum(norms) / len(norms),
        }  # fmt: skip

    def _loss(self, made: Sampled, assigned: Advantage, rows: Tensor, count: int) -> tuple[Tensor, float, float]:
        o = self.config.objective
        log_prob, entropy = log_probs(self.model, made.prompt[rows], made.tokens[rows])
        mask, old = assigned.loss_mask[rows], made.old_log_prob[rows]
        given: dict[str, Any] = {
            "log_prob": log_prob, "old_log_prob": old, "advantage": assigned.advantage[rows], "mask": mask,
            "entropy": entropy.detach(), "group": made.group[rows],
        }  # fmt: skip
        if assigned.clip_scale is not None:
            given["clip_scale"] = assigned.clip_scale[rows]
        loss = policy_loss(o.loss, given, o.options)
        # Only a mean over steps may be told of the rows that were left out.
        denominator = count if o.aggregation == "step_mean" else None
        total = aggregate(loss.loss * assigned.weight[rows], mask, o.aggregation, denominator)
        stopped = [side[mask].float().mean() for side in (loss.low, loss.high) if side is not None]
        ratio = (log_prob.detach() - old)[mask].exp().mean()
        return total, float(ratio), float(torch.stack(stopped).sum()) if stopped else 0.0

    def _update_critic(self, made: Sampled, assigned: Advantage, value: Tensor) -> dict[str, Any]:
        if self.critic is None or self.critic_optimizer is None or assigned.returns is None:
            return {}
        where = assigned.loss_mask if assigned.critic_mask is None else assigned.critic_mask
        target, losses, c = assigned.returns, [], self.config
        for part in self._minibatches(len(value), c.objective.updates, c.critic.passes, 1):
            square = (self.critic(made.prompt[part], made.tokens[part]) - target[part]) ** 2
            loss = aggregate(square, where[part], "step_mean")
            _step(loss, self.critic, self.critic_optimizer, c.optimizer.max_grad_norm)
            losses.append(float(loss.detach()))
        left, spread = (target - value)[where].var(unbiased=False), target[where].var(unbiased=False)
        explained = 1 - float(left / spread) if float(spread) > 0 else 0.0
        return {"critic/loss": sum(losses) / len(losses), "critic/explained": explained}


def _step(loss: Tensor, module: torch.nn.Module, optimizer: torch.optim.Optimizer, limit: float) -> float:
    """Take one optimizer step; return the gradient norm before it was cut to ``limit``."""
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    norm = torch.nn.utils.clip_grad_norm_(module.parameters(), limit, error_if_nonfinite=True)
    optimizer.step()
    return float(norm)
