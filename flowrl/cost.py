"""How often one iteration of a config calls the network: plain arithmetic, no model, no torch.

With B samples in P groups, T schedule steps, K trained steps from step s on, c guidance branches (1 or 2), and n_k the
distinct latents before step k (B where members share nothing; a latent that chunks share counts once in each):

    rollout      c (P s + sum_{k >= s} n_k) forwards with a shared prefix, else c B T
    update       c sum_{trained k} n_k forwards a pass, and as many backwards (without c where one branch is detached)
    loss         the update's forwards of all passes but the first minibatch's, with a loss over whole trajectories
    reference    the update's forwards of one pass with a KL term, whatever the number of passes
    values       c n (K - 1) forwards where step values come from ODE runs of n steps, or from a process reward on them; K - 1
                 from a head on features; none from a network on latents
    critic       B K forwards where it reads features (2 B K with pdppo, B M in ac_flow), none where it reads latents

Objectives on re-noised samples (`flowrl.training.learners.forward`), with M draws of (t, noise) a sample: the rollout is B
deterministic steps of its solver, update B M forwards and backwards a pass, old and reference B M forwards each where the
loss or its penalty looks at them, loss B M forwards a pass where it looks at groups that exceed a call.

Objectives that differentiate a reward (`flowrl.config.direct.calls`), with the last K of T steps differentiated: the rollout
is c T forwards, the update c K more and as many backwards, the reference, where there is a penalty, c (T + K) forwards and
c K of those backwards; Adjoint Matching T, then n forwards and n + T - 1 backwards for n trained steps, and T of the reference.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from flowrl import registry
from flowrl.config import direct, forward
from flowrl.config.engine import loss_name
from flowrl.config.families import family_of
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
    if family_of(config.objective.name) != "trajectory":
        return 0, (0,)
    window = config.rollout.window
    if window.kind == "full":
        return config.rollout.steps - 1, (0,)  # the last step is deterministic under every kernel
    return window.size, tuple(range(window.first, window.last + 1, window.stride))


def trained_of(config: Config) -> int:
    """Trained steps a sample."""
    return max(1, math.floor(config.rollout.window.fraction * window_of(config)[0] + 1e-9))


def branches_of(config: Config) -> int:
    """Network calls a prediction: 2 with guidance, unless the family has its scale inside the network."""
    return guided_branches(config, config.rollout.guidance)


def guided_branches(config: Config, scale: float) -> int:
    """Network calls a prediction under a guidance scale: read off the family, without loading a model."""
    embedded = registry.resolve("pipeline", config.model.adapter).guidance_rule == "embedded"
    return 1 if scale == 1 or embedded else 2


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


def _stems_end(config: Config, start: int) -> int:
    """Steps that whole stems make before their members part, or are guided."""
    rollout = config.rollout
    if not rollout.share_prefix:
        return 0
    end = min(start, *rollout.splits) if rollout.splits else start
    everywhere = rollout.guide.active and rollout.guide.mode != "langevin"
    return min(end, rollout.guide.first) if everywhere else end


def guide_samples(config: Config) -> Count:
    """Latents that a guide's process reward is asked about, an iteration: calls at a latent times distinct latents.

    One call with gradient, or 2 ``draws`` of spsa, and one more for the weights of langevin_weighted; at the stochastic
    steps of its window, in the other modes at all steps of it. Where each group has a window of its own, more.
    """
    if not config.rollout.guide.active:
        return Count(0, 0, 0)
    return Count.of([sum(latents for _, latents in _guided(config, start)) for start in window_of(config)[1]])


def guide_work(config: Config) -> Work:
    """Forwards of a guide that calls the network: x0 follows the policy, a head on features takes one call."""
    from flowrl.config.rewards import labels

    guide, batch, steps = config.rollout.guide, config.batch, config.rollout.steps
    named = dict(zip(labels(config.process), config.process, strict=True))
    entry = named.get(guide.reward)
    if not guide.active or entry is None or entry.name not in ("x0", "features"):
        return NONE
    ode = int(entry.args.get("ode_steps", 1)) or steps
    samples, calls = [], []
    for start in window_of(config)[1]:
        runs = [
            (latents, min(ode, steps - state) if entry.name == "x0" else 1) for state, latents in _guided(config, start)
        ]
        samples.append(sum(latents * run for latents, run in runs))
        calls.append(math.ceil(batch.samples / batch.micro_batch) * sum(run for _, run in runs))
    work = Work(Count.of(samples), Count.of(calls))
    return work.times(branches_of(config)) if entry.name == "x0" else work


def _guided(config: Config, start: int) -> list[tuple[int, int]]:
    """(index of the schedule, distinct latents) of every call of a guide, for a window that starts at ``start``."""
    guide, batch, steps = config.rollout.guide, config.batch, config.rollout.steps
    window = window_of(config)[0]
    last = steps - 1 if guide.last is None else guide.last
    weighted = guide.mode == "langevin_weighted"
    blocks = _blocks(config, start)
    found = []
    for k in range(start, start + window) if guide.mode == "langevin" else range(steps):
        if guide.first <= k <= last:
            latents = _latents(batch.groups, batch.group_size, batch.micro_batch, blocks[k])
            found += [(k, latents)] * (1 if guide.gradient == "autograd" else 2 * guide.draws)
            found += [(k + 1, latents)] * weighted
    return found


def rollout_work(config: Config) -> Work:
    """Forwards of the rollout."""
    if config.objective.name == "dpo":  # its pictures are given
        return NONE
    if family_of(config.objective.name) == "direct":
        return _per_chunk(config, [made.rollout for made in direct.calls(config)])
    batch, rollout = config.batch, config.rollout
    window, starts = window_of(config)
    samples, calls = [], []
    chunks = math.ceil(batch.samples / batch.micro_batch)
    for start in starts:
        blocks = _blocks(config, start)
        stems = batch.groups * rollout.seeds
        end = _stems_end(config, start)
        each = [SOLVER_CALLS[rollout.solver] if k >= start + window else 1 for k in range(rollout.steps)]
        each[-1] = 1  # the step to t = 0 is a plain one under every solver
        later = sum(
            each[k] * _latents(batch.groups, batch.group_size, batch.micro_batch, blocks[k])
            for k in range(end, rollout.steps)
        )
        samples.append(stems * end + later)
        calls.append(math.ceil(stems / batch.micro_batch) * end + chunks * sum(each[end:]))
    return Work(Count.of(samples), Count.of(calls)).times(branches_of(config))


def _per_chunk(config: Config, calls: Sequence[int]) -> Work:
    """Calls that every chunk of every update makes, for samples that share nothing."""
    size = config.batch.group_size
    chunks = sum(math.ceil(groups * size / config.batch.micro_batch) for groups in _shares(config))
    count = Count.of(calls)
    return Work(count.times(config.batch.samples), count.times(chunks))


def _trained(config: Config, groups: int) -> Work:
    """Forwards of one branch over the trained transitions of ``groups`` groups, each once."""
    batch = config.batch
    window, starts = window_of(config)
    kept = trained_of(config)
    if config.objective.name == "neighbor_grpo":  # a few anchors a group stand for all its members
        rows = groups * min(config.neighbours.anchors, batch.group_size)
        return Work(Count.of([kept * rows]), Count.of([kept * math.ceil(rows / batch.micro_batch)]))
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
    if config.credit.values == "process":
        return _process_work(config)
    if config.critic.features:
        return _critic_work(config)
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
    if config.credit.values in ("none", "critic"):
        return 0
    times = 1
    if config.credit.values == "process":  # networks on latents decode nothing
        times = sum(entry.name == "x0" and entry.weight != 0 for entry in config.process)
    return times * sum(latents for _, latents in _valued(config, window_of(config)[1][0]))


def _critic_work(config: Config) -> Work:
    """Forwards for a critic on features: of each trained transition's state, or of each draw of ac_flow, one a sample."""
    batch = config.batch
    if config.objective.name == "ac_flow":
        return _per_chunk(config, [config.forward.draws])
    states = batch.samples * trained_of(config)
    work = Work(Count.of([states]), Count.of([math.ceil(states / batch.micro_batch)]))
    return work.times(2 if config.advantage.name == "pdppo" else 1)


def _process_work(config: Config) -> Work:
    """Forwards for process rewards: x0 follows the policy, with guidance; a head on features takes one call without."""
    batch, steps = config.batch, config.rollout.steps
    total = NONE
    for entry in config.process:
        if not entry.weight or entry.name not in ("x0", "features"):
            continue
        ode = int(entry.args.get("ode_steps", 1)) or steps
        samples, calls = [], []
        for start in window_of(config)[1]:
            runs = [
                (latents, min(ode, steps - state) if entry.name == "x0" else 1)
                for state, latents in _valued(config, start)
            ]
            samples.append(sum(latents * run for latents, run in runs))
            calls.append(sum(math.ceil(latents / batch.micro_batch) * run for latents, run in runs))
        work = Work(Count.of(samples), Count.of(calls))
        total = total + (work.times(branches_of(config)) if entry.name == "x0" else work)
    return total


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


@dataclass(frozen=True)
class Update:
    """Network work of an iteration's update, all passes and branches together."""

    forward: Work
    backward: Work
    loss: Work
    reference: Work
    old: Work = NONE


def update_work(config: Config) -> Update:
    """Network work of the update, with what it asks of other policies."""
    objective, rollout = config.objective, config.rollout
    if family_of(objective.name) == "forward":
        return _forward_update(config)
    if family_of(objective.name) == "direct":
        made = direct.calls(config)
        works = [
            _per_chunk(config, [vars(each)[name] for each in made]) for name in ("update", "backward", "reference")
        ]
        return Update(works[0], works[1], NONE, works[2])
    one, branches = pass_work(config), branches_of(config)
    differentiated = branches if rollout.cfg_gradient == "full" else 1
    return Update(
        forward=one.times(branches * objective.passes),
        backward=one.times(differentiated * objective.passes),
        loss=loss_work(config),
        reference=one.times(branches) if objective.kl.form != "none" or _aims_at_reference(config) else NONE,
    )


def _aims_at_reference(config: Config) -> bool:
    """Whether a distillation of guidance starts from the pre-trained model's velocity."""
    e = config.euphonium
    return config.objective.name == "euphonium" and e.distil > 0 and e.target == "reference"


def _forward_update(config: Config) -> Update:
    """The update of an objective on re-noised samples; without guidance, whatever the rollout has."""
    objective, batch = config.objective, config.batch
    form = registry.resolve("objective", objective.name)[objective.name]
    size = 2 if form.pairs else batch.group_size
    split = form.joint and size > batch.micro_batch
    samples = calls = 0
    for groups in _shares(config):
        samples += groups * size
        if form.joint and not split:
            calls += math.ceil(groups / (batch.micro_batch // size))
        else:
            calls += math.ceil(groups * size / batch.micro_batch)
    one = Work(Count.of([samples]), Count.of([calls])).times(config.forward.draws)
    passes = one.times(objective.passes)
    old, reference = forward.needs(config)
    return Update(passes, passes, passes if split else NONE, one if reference else NONE, one if old else NONE)
