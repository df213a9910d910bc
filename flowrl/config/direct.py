"""Settings of methods that differentiate a reward, and their checks."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from flowrl.config.families import family_of

if TYPE_CHECKING:
    from flowrl.config.schema import Config

MEMORYLESS = {"memoryless": None, "precise": math.sqrt(2), "flow_sde": math.sqrt(2), "ddim": 1.0}
"""Kernels that can forget their start, and the noise at which they do (None: always)."""
CHAINS = frozenset({"draft", "draft_lv", "alignprop", "ctrl"})
"""Objectives that back-propagate through several steps."""


@dataclass(frozen=True, kw_only=True)
class Direct:
    """Methods that differentiate a reward; each reads some of these.

    last: steps at the end of the chain that have a gradient (draft), among which the one step is drawn (refl), or at most
    (alignprop, ctrl: their number is drawn anew each iteration from [least, last]); 0 is every step. per_sample: draw that
    number for each sample. stochastic: steps draw noise by rollout.kernel (always for adjoint_matching and ctrl).
    checkpoint: keep one latent in checkpoint_every steps and compute the steps again when their gradient is due; without
    it every step's activations are kept. repeats: further pictures of each sample, noised to the last step again
    (draft_lv). margin, scale: ReFL's hinge; pretrain_weight: of its pre-training loss, the denoising error on samples that
    the pre-trained model draws of the same prompts. target: reward that alignprop aims at; null: as high as can be.
    temperature: lambda of adjoint_matching, the reward's scale in nats of the whole latent. strength: gamma of ctrl. trained:
    stochastic steps a sample that adjoint_matching trains on, a keyed choice, 0 for all; final: the last of them, always
    chosen. quantile: adjoint_matching drops losses above it; 1 keeps all.
    """

    last: int = 1
    least: int = 0
    per_sample: bool = False
    stochastic: bool = False
    checkpoint: bool = True
    checkpoint_every: int = 1
    repeats: int = 2
    margin: float = 2.0
    scale: float = 1e-3
    pretrain_weight: float = 0.0
    target: float | None = None
    temperature: float = 1.0
    strength: float = 1.0
    trained: int = 0
    final: int = 1
    quantile: float = 1.0


def problems(config: Config) -> Iterator[str]:
    """Say what is wrong with ``direct`` and what a differentiable reward asks of the rest, one line each."""
    d, name = config.direct, config.objective.name
    if family_of(name) != "direct":
        if d != Direct():
            yield f"direct: objective.name={name} differentiates no reward; remove the section, or use draft or refl"
        return
    yield from _ranges(config)
    yield from _rewards(config)
    yield from _parts(config)
    if name in ("adjoint_matching", "ctrl"):
        yield from _memoryless(config)


def _ranges(config: Config) -> Iterator[str]:
    d, steps = config.direct, config.rollout.steps
    for key in ("last", "least", "trained", "final"):
        value = vars(d)[key]
        if not 0 <= value <= steps:
            yield f"direct.{key}: {value} is out of range; use 0 to {steps} (rollout.steps)"
    for key, low in (("checkpoint_every", 1), ("repeats", 0)):
        if vars(d)[key] < low:
            yield f"direct.{key}: {vars(d)[key]} is out of range; use at least {low}"
    if d.least > (d.last or steps):
        yield f"direct.least: {d.least} is above direct.last ({d.last or steps}); use at most that"
    for key in ("temperature", "strength", "scale"):
        if not vars(d)[key] > 0:
            yield f"direct.{key}: {vars(d)[key]} is out of range; use more than 0"
    if not 0 <= d.pretrain_weight < math.inf:
        yield f"direct.pretrain_weight: {d.pretrain_weight} is out of range; use 0 (without) or more"
    elif d.pretrain_weight and config.objective.name != "refl":
        yield (
            f"direct.pretrain_weight: {config.objective.name} has no pre-training loss; remove it, or hold the model back by "
            "objective.kl.form=velocity"
        )
    if not 0 < d.quantile <= 1:
        yield f"direct.quantile: {d.quantile} is out of range; use more than 0 and at most 1"


def _rewards(config: Config) -> Iterator[str]:
    from flowrl.config.rewards import declared, read_shaping

    for index, entry in enumerate(config.rewards):
        if entry.duty != "train":
            continue
        key = f"rewards.{index}"
        if entry.executor.kind in ("process", "worker", "http"):
            yield (
                f"{key}.executor.kind: {entry.executor.kind} runs in another process, where no gradient reaches; "
                f"objective.name={config.objective.name} needs thread or inline"
            )
        elif declared(entry.name, "differentiable") not in ("pictures", "latents"):
            yield (
                f"{key}.name: {entry.name} declares no gradient, which objective.name={config.objective.name} needs; use a "
                "reward that does, such as tiny_clip, or objective.name=flow_grpo"
            )
        for place, shape in enumerate(read_shaping(entry.shaping)[0]):
            if shape.kind in ("rank", "gate"):
                yield f"{key}.shaping.{place}: {shape.kind} has no gradient; remove it for {config.objective.name}"


def _parts(config: Config) -> Iterator[str]:
    o, name = config.objective, config.objective.name
    if o.passes > 1:
        yield f"objective.passes: {name} draws its samples anew for every update; use 1, and more objective.updates"
    for key, given in (("ratio", o.ratio), ("step_weight", o.step_weight), ("loss", o.loss)):
        if given:
            yield f"objective.{key}: {name} has no {key}; remove it"
    if config.credit.values != "none":
        yield f"credit.values: {name} assigns no credit; set it to none"
    if config.batch.selection.name != "all" or config.batch.allocation.name != "fixed":
        yield f"batch.selection, batch.allocation: {name} trains on every sample alike; use all and fixed"
    penalised = o.kl.form != "none" or name == "ctrl"
    if penalised and name == "adjoint_matching":
        yield "objective.kl.form: adjoint_matching has its divergence in direct.temperature; set it to none"
    elif penalised and config.model.train == "full":
        yield (
            f"model.train: full, and {name} with a penalty differentiates the pre-trained model beside the trained one; use "
            "lora, whose weights can be left out"
        )
    if name == "ctrl" and o.kl.form != "none":
        yield "objective.kl.form: ctrl has its path divergence built in, in units of direct.strength; set it to none"
    elif o.kl.form in ("paper", "no_dt") and not config.direct.stochastic:
        yield f"objective.kl.form: {o.kl.form} needs steps with noise; set direct.stochastic=true, or use velocity"


def _memoryless(config: Config) -> Iterator[str]:
    kernel, name = config.rollout.kernel, config.objective.name
    level = MEMORYLESS.get(kernel.name, 0.0)
    if level is not None and (level == 0.0 or abs(kernel.noise - level) > 1e-3):
        advice = "rollout.kernel.name=memoryless" if not level else f"noise {level:.4f}, or the kernel memoryless"
        yield (
            f"rollout.kernel: {name} reaches the reward-tilted model only where sampling forgets its start noise, and "
            f"{kernel.name} at noise {kernel.noise} does not; use {advice}"
        )
    if name == "adjoint_matching" and config.rollout.guidance != 1:
        yield (
            f"rollout.guidance: adjoint_matching trains the velocity itself, and {config.rollout.guidance} would train a "
            "mixture of two; use 1 (evaluation.guidance may differ)"
        )


@dataclass(frozen=True)
class Calls:
    """Network calls a chunk of samples of one iteration, guidance branches included: forwards without and with gradient,
    backwards, forwards of the reference (whose backwards are among the backwards)."""

    rollout: int
    update: int
    backward: int
    reference: int


def calls(config: Config) -> list[Calls]:
    """The calls of every number of steps that may be drawn, each equally likely; per_sample drawing costs at least as much."""
    d, steps, name = config.direct, config.rollout.steps, config.objective.name
    most = d.last or steps
    if name == "refl":
        return [_one_step(config, k) for k in range(steps - most, steps)]
    if name == "adjoint_matching":
        trained = min(d.trained or steps - 1, steps - 1)
        return [Calls(steps, trained, trained + steps - 1, steps)]
    if name == "draft_lv":
        return [_chain(config, 1, d.repeats)]
    drawn = d.least not in (0, most) and name != "draft"
    return [_chain(config, kept) for kept in (range(d.least, most + 1) if drawn else (most,))]


def _branches(config: Config) -> tuple[int, int]:
    """(forwards a prediction, those with gradient)."""
    from flowrl import registry

    embedded = registry.resolve("pipeline", config.model.adapter).guidance_rule == "embedded"
    count = 1 if config.rollout.guidance == 1 or embedded else 2
    return count, count if config.rollout.cfg_gradient == "full" else 1


def _charged(config: Config) -> list[bool]:
    """Which steps call the reference."""
    steps, form = config.rollout.steps, config.objective.kl.form
    if config.objective.name == "ctrl" or form == "velocity":
        return [True] * steps
    return [form != "none" and k < steps - 1 for k in range(steps)]


def _one_step(config: Config, k: int) -> Calls:
    count, graded = _branches(config)
    pretrains = config.direct.pretrain_weight > 0  # a sample of the reference, and one call with gradient, unguided
    drawn = count * config.rollout.steps if pretrains else 0
    return Calls(count * k, count + pretrains, graded + pretrains, count * _charged(config)[k] + drawn)


def _chain(config: Config, kept: int, repeats: int = 0) -> Calls:
    d, steps = config.direct, config.rollout.steps
    count, graded = _branches(config)
    closes = config.objective.name == "ctrl"
    policy = [not (closes and k == steps - 1) for k in range(steps)]
    reference = _charged(config)
    first = steps - kept
    late, late_reference = sum(policy[first:]), sum(reference[first:])
    backward = graded * (late + late_reference + repeats)
    if not d.checkpoint:
        # The first latent asks for no gradient of its own, so nothing comes back through the reference there.
        backward -= graded * (first == 0 and reference[0])
        return Calls(count * sum(policy[:first]), count * (late + repeats), backward, count * sum(reference))
    again = [k for k in range(first, steps) if (k - first + 1) % d.checkpoint_every and k < steps - 1]
    update = late + sum(policy[k] for k in again) + repeats
    asked = sum(reference) + late_reference + sum(reference[k] for k in again)
    return Calls(count * sum(policy), count * update, backward, count * asked)
