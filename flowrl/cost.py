"""How often one iteration of a config calls the network: plain arithmetic, no model, no torch.

With B samples in P groups, T schedule steps, K trained steps from step s on, c guidance branches (1 or 2), and n_k the
distinct latents before step k (B where members share nothing; a latent that chunks share counts once in each):

    rollout      c (P s + sum_{k >= s} n_k) forwards with a shared prefix, else c B T
    update       c sum_{trained k} n_k forwards a pass, and as many backwards (without c where one branch is detached)
    loss         the update's forwards of all passes but the first minibatch's, with a loss over whole trajectories
    reference    the update's forwards of one pass with a KL term, whatever the number of passes
    values       c n (K - 1) forwards where step values come from ODE runs of n steps
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowrl.config.engine import loss_name
from flowrl.config.schema import Config

SOLVER_CALLS = {"euler": 1, "heun": 2, "dpmpp_2m": 1}


@dataclass(frozen=True)
class Count:
    """Network work an iteration: its least, mean and most over the starts of the window. Samples and calls alike."""

    least: float
    mean: float
    most: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Count:
        return cls(min(values), sum(values) / len(values), max(values))

    def __add__(self, other: Count) -> Count:
        return Count(self.least + other.least, self.mean + other.mean, self.most + other.most)

    def times(self, count: int) -> Count:
        return Count(count * self.least, count * self.mean, count * self.most)


@dataclass(frozen=True)
class Work:
    """Samples through the network and the calls they come in."""

    samples: Count
    calls: Count

    def __add__(self, other: Work) -> Work:
        return Work(self.samples + other.samples, self.calls + other.calls)

    def times(self, count: int) -> Work:
        return Work(self.samples.times(count), self.calls.times(count))


NONE = Work(Count(0, 0, 0), Count(0, 0, 0))


def window_of(config: Config) -> tuple[int, tuple[int, ...]]:
    """Stochastic steps a sample, and the possible first steps of the window."""
    window = config.rollout.window
    if window.kind == "full":
        return config.rollout.steps - 1, (0,)  # the last step is deterministic under every kernel
    return window.size, tuple(range(window.first, window.last + 1, window.stride))


def trained_of(config: Config) -> int:
    """Trained steps a sample."""
    return max(1, math.floor(config.rollout.window.fraction * window_of(config)[0] + 1e-9))


def branches_of(config: Config) -> int:
    """Network calls a prediction: 2 with guidance."""
    return 1 if config.rollout.guidance == 1 else 2


def _blocks(config: Config, start: int) -> list[int]:
    """How many members of a group share one latent before each step, for a window that starts at ``start``."""
    rollout, size = config.rollout, config.batch.group_size
    if not rollout.share_prefix:
        return [1] * rollout.steps
    blocks = [size // rollout.seeds]
    for k in range(rollout.steps - 1):
        parts = blocks[-1] if k == start and not rollout.splits else 1
        width = rollout.children if k in rollout.splits else parts
        blocks.append(blocks[-1] // width)
    return blocks


def _latents(groups: int, size: int, chunk: int, block: int) -> int:
    """Distinct latents in all chunks of ``chunk`` rows out of ``groups * size``; runs of ``block`` members share one."""
    return sum(1 for row in range(groups * size) if row % chunk == 0 or row % size % block == 0)


def rollout_work(config: Config) -> Work:
    """Forwards of the rollout."""
    batch, rollout = config.batch, config.rollout
    window, starts = window_of(config)
    samples, calls = [], []
    chunks = math.ceil(batch.samples / batch.micro_batch)
    for start in starts:
        blocks = _blocks(config, start)
        stems = batch.groups * rollout.seeds
        end = (min(start, *rollout.splits) if rollout.splits else start) if rollout.share_prefix else 0
        each = [SOLVER_CALLS[rollout.solver] if k >= start + window else 1 for k in range(rollout.steps)]
        each[-1] = 1  # the step to t = 0 is a plain one under every solver
        later = sum(
            each[k] * _latents(batch.groups, batch.group_size, batch.micro_batch, blocks[k])
            for k in range(end, rollout.steps)
        )
        samples.append(stems * end + later)
        calls.append(math.ceil(stems / batch.micro_batch) * end + chunks * sum(each[end:]))
    return Work(Count.of(samples), Count.of(calls)).times(branches_of(config))


def _trained(config: Config, groups: int) -> Work:
    """Forwards of one branch over the trained transitions of ``groups`` groups, each once."""
    batch = config.batch
    window, starts = window_of(config)
    kept = trained_of(config)
    least, mean, most = [], [], []
    for start in starts:
        blocks = _blocks(config, start)[start : start + window]
        each = sorted(_latents(groups, batch.group_size, batch.micro_batch, block) for block in blocks)
        least.append(sum(each[:kept]))  # where a part of the window is trained, which one is drawn
        mean.append(sum(each) * kept / window)
        most.append(sum(each[window - kept :]))
    calls = kept * math.ceil(groups * batch.group_size / batch.micro_batch)
    return Work(Count(min(least), sum(mean) / len(mean), max(most)), Count.of([calls]))


def _shares(config: Config) -> list[int]:
    """Groups of each update."""
    whole, rest = divmod(config.batch.groups, config.objective.updates)
    return [whole + (index < rest) for index in range(config.objective.updates)]


def pass_work(config: Config) -> Work:
    """Forwards of one branch in one pass over a rollout."""
    total = NONE
    for share in _shares(config):
        total = total + _trained(config, share)
    return total


def loss_work(config: Config) -> Work:
    """Forwards of a loss over whole trajectories: it needs the present log-probs, known only before the first step."""
    loss = loss_name(config.objective)
    if loss == "ppo":
        return NONE
    from flowrl.advantage.catalogue import JOINT_LOSSES

    if loss not in JOINT_LOSSES:
        return NONE
    known = _trained(config, _shares(config)[0]).times(-1)
    return (pass_work(config).times(config.objective.passes) + known).times(branches_of(config))


def value_work(config: Config) -> Work:
    """Forwards of the runs that give step values; the one-step estimate comes with the rollout."""
    if config.credit.values != "ode":
        return NONE
    batch, steps = config.batch, config.rollout.steps
    samples, calls = [], []
    for start in window_of(config)[1]:
        total = number = 0
        for state, latents in _valued(config, start):
            run = min(config.credit.ode_steps or steps, steps - state)
            total += latents * run
            number += math.ceil(latents / batch.micro_batch) * run
        samples.append(total)
        calls.append(number)
    return Work(Count.of(samples), Count.of(calls)).times(branches_of(config))


def value_samples(config: Config) -> int:
    """Pictures that are decoded and scored an iteration for step values."""
    if config.credit.values == "none":
        return 0
    return sum(latents for _, latents in _valued(config, window_of(config)[1][0]))


def _valued(config: Config, start: int) -> list[tuple[int, int]]:
    """(index of the schedule, distinct latents) of every state that gets a value; fraction 1 is taken."""
    from flowrl.config.trajectory import reads_start

    blocks = _blocks(config, start)
    stride, trained = config.credit.stride, trained_of(config)
    states = [start + k + 1 for k in range(stride - 1, trained - 1, stride)]
    if reads_start(config):
        states = [start, *states]
    samples = config.batch.samples
    return [(state, samples // blocks[state]) for state in states]
