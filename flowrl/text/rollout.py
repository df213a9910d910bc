"""Sampling: groups of completions, value rollouts from cut points, and trees of branches; every token is counted.

B rows, P prompt tokens, T completion tokens. Noise is keyed by (seed, iteration, problem, row, level), so a run does not
depend on what was drawn before.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from flowrl import rng
from flowrl.advantage import group_count, group_sum
from flowrl.advantage.trees import spo_cuts
from flowrl.text import tasks
from flowrl.text.config import Chain, Rollout
from flowrl.text.model import log_probs, prompts

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM

    from flowrl.text.tasks import Problem

PLAIN, CHAIN, TREE = 0, 1, 2  # what a keyed draw is for
Judge = Callable[[Sequence["Problem"], Tensor, Tensor], tasks.Grades]
"""Grade completions: problems of the rows, tokens [B, T], mask [B, T]."""


@dataclass(frozen=True)
class Sampled:
    """One rollout: the rows that are trained, and what they cost.

    problems: the row's problem, B of them; prompt: int64 [B, P]; tokens: int64 [B, T], PAD after the end; mask: bool
    [B, T]; group: int64 [B], an id for each drawn problem; old_log_prob, entropy: float32 [B, T]; grades: of the rows.
    segment: int64 [B, T], a chain's segment or a tree's level, else the turn. segment_value: float32 [B, S + 1] of a
    chain; node_path: int64 [B, L] of a tree. samples: continuations drawn, branches and value rollouts included;
    generated: tokens drawn for them, a shared prefix once.
    """

    problems: list[Problem]
    prompt: Tensor
    tokens: Tensor
    mask: Tensor
    group: Tensor
    old_log_prob: Tensor
    entropy: Tensor
    grades: tasks.Grades
    segment: Tensor
    samples: int
    generated: int
    segment_value: Tensor | None = None
    node_path: Tensor | None = None


def written(tokens: Tensor) -> Tensor:
    """Mark the tokens up to the end sign, itself included: bool like ``tokens``."""
    end = (tokens == tasks.END).long()
    return end.cumsum(1) - end == 0


@torch.no_grad()
def generate(
    model: LlamaForCausalLM,
    prompt: Tensor,
    given: Tensor,
    length: Tensor,
    noise: Tensor | None,
    until: int | None = None,
) -> Tensor:
    """Continue rows whose first ``length`` tokens are given: int64 [B, T], PAD after the end and after ``until``.

    prompt: int64 [B, P]; given: int64 [B, T]; length: int64 [B]; noise: float [B, T] in [0, 1), one draw a token by
    inverting the cumulative distribution, or None for the most probable token; until: sample no further than this.
    """
    tokens, last = torch.full_like(given, tasks.PAD), given.shape[1] if until is None else until
    start = int(length.min())
    tokens[:, :start] = given[:, :start]
    done = (tokens == tasks.END).any(1)
    if bool(done.all()):
        return tokens
    made = model(torch.cat([prompt, tokens[:, :start]], dim=1), use_cache=True)
    for t in range(start, last):
        logits = made.logits[:, -1].float()
        if noise is None:
            drawn = logits.argmax(-1)
        else:
            drawn = (logits.softmax(-1).cumsum(-1) <= noise[:, t, None]).sum(-1).clamp(max=tasks.VOCABULARY - 1)
        now = torch.where(t < length, given[:, t], drawn)
        tokens[:, t] = torch.where(done, tasks.PAD, now)
        done = done | (tokens[:, t] == tasks.END)
        if t + 1 == last or bool(done.all()):
            break
        made = model(tokens[:, t, None], past_key_values=made.past_key_values, use_cache=True)
    return tokens


def uniforms(keys: Sequence[int], steps: int) -> Tensor:
    """Independent draws in [0, 1) of keyed noise: float32 [len(keys), steps]."""
    drawn: Tensor = torch.special.ndtr(rng.normal(keys, (steps,)))
    return drawn.clamp(max=1 - 2**-24)


class Sampler:
    """Draws one iteration's rollout. steps: longest completion in tokens."""

    def __init__(self, model: LlamaForCausalLM, judge: Judge, settings: Rollout, steps: int, seed: int) -> None:
        self.model, self.judge, self.settings, self.steps, self.seed = model, judge, settings, steps, seed

    def sample(self, problems: Sequence[Problem], iteration: int) -> Sampled:
        """Draw groups of completions of ``problems`` with the branching that the settings name."""
        if self.settings.branching == "tree":
            return self._tree(problems, iteration)
        plain = self._plain(problems, iteration)
        return self._chain(plain, self.settings.chain, iteration) if self.settings.branching == "chain" else plain

    def _keys(
        self, iteration: int, rows: Sequence[Problem], member: Sequence[int], kind: int, place: Sequence[int]
    ) -> list[int]:
        return [
            rng.key(self.seed, iteration, p.id, kind, m, at, "step")
            for p, m, at in zip(rows, member, place, strict=True)
        ]

    def _plain(self, problems: Sequence[Problem], iteration: int) -> Sampled:
        size = self.settings.group_size
        rows = [p for p in problems for _ in range(size)]
        keys = self._keys(iteration, rows, list(range(size)) * len(problems), PLAIN, [0] * len(rows))
        prompt, nothing = prompts(rows), torch.full((len(rows), self.steps), tasks.PAD)
        tokens = generate(
            self.model, prompt, nothing, torch.zeros(len(rows), dtype=torch.int64), uniforms(keys, self.steps)
        )
        group = torch.arange(len(problems)).repeat_interleave(size)
        return self._finish(rows, prompt, tokens, group, len(rows), int(written(tokens).sum()))

    @torch.no_grad()
    def _finish(
        self, rows: list[Problem], prompt: Tensor, tokens: Tensor, group: Tensor, samples: int, generated: int
    ) -> Sampled:
        mask = written(tokens)
        old, entropy = log_probs(self.model, prompt, tokens)
        grades = self.judge(rows, tokens, mask)
        return Sampled(
            problems=rows, prompt=prompt, tokens=tokens, mask=mask, group=group, old_log_prob=old, entropy=entropy,
            grades=grades, segment=grades.turn, samples=samples, generated=generated,
        )  # fmt: skip

    def _chain(self, base: Sampled, chain: Chain, iteration: int) -> Sampled:
        """Value the state before each segment but the first by rollouts, the first by the others of the group."""
        segment = spo_cuts(
            base.old_log_prob, base.mask,
            interval=chain.interval, max_probability=chain.max_probability, max_cuts=chain.max_cuts,
        )  # fmt: skip
        count, width = segment.amax(1) + 1, int(segment.max()) + 1
        value = torch.full((len(segment), width + 1), torch.nan)
        outcome = base.grades.outcome
        others = (group_count(base.group) - 1).float()
        value[:, 0] = (group_sum(outcome, base.group) - outcome) / others
        value.scatter_(1, count[:, None], outcome[:, None])
        row, cut = torch.nonzero(torch.arange(1, width) < count[:, None], as_tuple=True)
        if len(row) == 0:
            return replace(base, segment=segment, segment_value=value)
        at = (segment[row] <= cut[:, None]).long().mul(base.mask[row].long()).sum(1)  # tokens before segment cut + 1
        mean, generated = self._value(base, row, at, chain.rollouts, iteration)
        value[row, cut + 1] = mean
        return replace(
            base, segment=segment, segment_value=value,
            samples=base.samples + len(row) * chain.rollouts, generated=base.generated + generated,
        )  # fmt: skip

    def _value(self, base: Sampled, row: Tensor, at: Tensor, rollouts: int, iteration: int) -> tuple[Tensor, int]:
        """Mean outcome of continuations of the first ``at`` tokens of rows ``row``: float32 [N], and tokens drawn."""
        many, length = row.repeat_interleave(rollouts), at.repeat_interleave(rollouts)
        rows = [base.problems[i] for i in many.tolist()]
        # A row is named by its index, a cut by its place: both differ between any two rollouts of a problem.
        member = [i * rollouts + k for i, k in zip(many.tolist(), list(range(rollouts)) * len(row), strict=True)]
        keys = self._keys(iteration, rows, member, CHAIN, length.tolist())
        tokens = generate(self.model, base.prompt[many], base.tokens[many], length, uniforms(keys, self.steps))
        mask = written(tokens)
        outcome = self.judge(rows, tokens, mask).outcome
        return outcome.view(-1, rollouts).mean(1), int(mask.sum() - length.sum())

    def _tree(self, problems: Sequence[Problem], iteration: int) -> Sampled:
        """Branch level by level; a row that has ended is not branched again."""
        tree, levels = self.settings.tree, len(self.settings.tree.branches)
        path = torch.arange(len(problems))[:, None]
        name = torch.zeros(len(problems), dtype=torch.int64)  # the branches taken so far, as one number
        tokens = torch.full((len(problems), self.steps), tasks.PAD)
        samples = generated = 0
        for level, branches in enumerate(tree.branches):
            start = level * tree.segment
            until = self.steps if level == levels - 1 else min(self.steps, start + tree.segment)
            growing = ~(tokens == tasks.END).any(1) & (start < self.steps)
            parent = torch.repeat_interleave(torch.where(growing, branches, 1))
            child = torch.arange(len(parent)) - torch.searchsorted(parent, parent)
            tokens, name = tokens[parent], name[parent] * branches + child
            path = torch.cat([path[parent], child[:, None]], dim=1)
            fresh = growing[parent].nonzero().flatten()
            if len(fresh):
                rows = [problems[i] for i in path[fresh, 0].tolist()]
                noise = uniforms(
                    self._keys(iteration, rows, name[fresh].tolist(), TREE, [level] * len(rows)), self.steps
                )
                at = torch.full_like(fresh, start)
                tokens[fresh] = generate(self.model, prompts(rows), tokens[fresh], at, noise, until)
                samples += len(fresh)
                generated += int(written(tokens[fresh])[:, start:until].sum())
        rows = [problems[i] for i in path[:, 0].tolist()]
        made = self._finish(rows, prompts(rows), tokens, path[:, 0], samples, generated)
        level_of = (torch.arange(self.steps) // tree.segment).clamp(max=levels - 1).expand_as(made.mask)
        # The engine takes the row itself as the leaf below the last level, so its own column is left out.
        return replace(made, segment=torch.where(made.mask, level_of, -1), node_path=path[:, :-1])
