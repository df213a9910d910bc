"""Checks of how trajectories are drawn and credited: windows, trees, step values, budgets, and what an objective asks for."""

from __future__ import annotations

import math
from collections.abc import Iterator

from flowrl import registry
from flowrl.config.engine import PLAIN, VALUES, loss_name
from flowrl.config.families import family_of
from flowrl.config.guide import takes_start, takes_values
from flowrl.config.rewards import declared, split_preset
from flowrl.config.schema import Config


def problems(config: Config) -> Iterator[str]:
    """List what is wrong, each as ``key.path: what; what to do``."""
    yield from _fraction(config)
    yield from _tree(config)
    yield from _values(config)
    yield from _objective(config)
    yield from _budget(config)


def stochastic_count(config: Config) -> int:
    """Stochastic steps a sample."""
    window = config.rollout.window
    return config.rollout.steps - 1 if window.kind == "full" else window.size


def _fraction(config: Config) -> Iterator[str]:
    window, count = config.rollout.window, stochastic_count(config)
    if 0 < window.fraction <= 1 and count >= 1 and math.floor(window.fraction * count + 1e-9) < 1:
        yield (
            f"rollout.window.fraction: {window.fraction} of {count} stochastic steps leaves none to train; raise it, or "
            "widen the window"
        )
    if window.kind == "sliding" and window.strategy == "decaying" and window.least > window.every:
        yield (
            f"rollout.window.least: {window.least} iterations at the last place are more than the {window.every} at the "
            "first (rollout.window.every); use at most that"
        )


def _tree(config: Config) -> Iterator[str]:
    rollout, size = config.rollout, config.batch.group_size
    if rollout.seeds > 1 and not rollout.share_prefix:
        yield (
            "rollout.seeds: without rollout.share_prefix every member has a start noise of its own already; set "
            "share_prefix=true, or seeds=1"
        )
    elif rollout.seeds >= 1 and not rollout.splits and size % rollout.seeds:
        yield f"rollout.seeds: {size} members (batch.group_size) do not share out over {rollout.seeds}; use a divisor"
    if not rollout.splits:
        return
    if not rollout.share_prefix:
        yield "rollout.splits: members part at steps only where they share a start; set rollout.share_prefix=true"
    window = rollout.window
    places = range(rollout.steps - 1) if window.kind == "full" else range(window.first, window.first + window.size)
    if window.kind != "full" and window.first != window.last:
        yield "rollout.splits: a tree needs a window that stays where it is; use window.kind=full, or first = last"
        return
    for step in rollout.splits:
        if step not in places:
            yield (
                f"rollout.splits: latents part by the noise of their step, and step {step} has none; use steps "
                f"{places.start} to {places.stop - 1}"
            )
    if len(set(rollout.splits)) < len(rollout.splits):
        yield f"rollout.splits: {list(rollout.splits)} names a step twice; name each once"
    leaves = rollout.seeds * rollout.children ** len(rollout.splits)
    if leaves != size:
        yield (
            f"rollout.splits: {rollout.seeds} seeds times {rollout.children} children at {len(rollout.splits)} steps make "
            f"{leaves} leaves, and batch.group_size is {size}; make them equal"
        )


def _values(config: Config) -> Iterator[str]:
    a, credit = config.advantage, config.credit
    if a.name not in registry.names("advantage"):
        return
    takes = a.name not in PLAIN and _reads_values(a.name)
    if takes and credit.values == "none":
        yield (
            f"advantage.name: {a.name} takes values of intermediate states; set credit.values=x0 (one-step estimates, no "
            "extra network calls) or credit.values=ode"
        )
    if not takes and not takes_values(config) and credit.values != "none":
        yield (
            f"credit.values: {credit.values} scores every trained step, and advantage.name={a.name} does not read that; "
            "set it to none, or use vgpo, dense_grpo, stepwise or tp_grpo"
        )
    if a.name == "vgpo":
        yield from _positive(config)


def _reads_values(name: str) -> bool:
    from flowrl.advantage import ESTIMATORS
    from flowrl.advantage.pipeline import inputs_of

    return name in ESTIMATORS and any(inputs_of(ESTIMATORS[name]).get(value, False) for value in VALUES)


def reads_start(config: Config) -> bool:
    """Whether the estimator takes the value of the state before the first trained step."""
    from flowrl.advantage import ESTIMATORS
    from flowrl.advantage.pipeline import inputs_of

    if takes_start(config):
        return True
    wanted = inputs_of(ESTIMATORS[config.advantage.name])
    required = any(wanted.get(name, False) for name in ("start_value", "value", "segment_value", "probe"))
    return required or config.advantage.options.get("shaping") == "gain"


def _positive(config: Config) -> Iterator[str]:
    """VGPO's weights are ratios of values: every value must be above 0."""
    shift = config.advantage.options.get("shift", 0.0)
    if not isinstance(shift, int | float):
        return
    least = 0.0
    for entry in config.rewards:
        if entry.duty != "train":
            continue
        shaped = entry.shaping or split_preset(entry.name)[1]
        bound = _least(entry.name) if entry.weight > 0 and not shaped else None
        if bound is None:
            if shift <= 0:
                yield (
                    f"advantage.options.shift: vgpo divides by values, and the reward {entry.name} (weight {entry.weight}) "
                    "may be 0 or negative; give a shift that makes every value positive"
                )
            return
        least += entry.weight * bound
    if least + shift <= 0:
        yield (
            f"advantage.options.shift: vgpo divides by values, and these rewards go down to {least:g}; give a shift above "
            f"{0.0 - least:g}, such as {0.1 - least:g}"
        )


def _least(reward: str) -> float | None:
    """The lower bound that a reward declares (its ``minimum``), None where it declares none."""
    found = declared(reward, "minimum")
    return float(found) if isinstance(found, int | float) and math.isfinite(found) else None


def _objective(config: Config) -> Iterator[str]:
    o = config.objective
    if o.name not in registry.names("objective") or family_of(o.name) != "trajectory":
        return
    plain = o.name == "flow_grpo" and not o.ratio
    if plain:
        return
    form = registry.resolve("objective", o.name)[o.name]
    if form.reference and o.kl.form == "none":
        yield (
            f"objective.kl.form: {o.name} is defined with a penalty towards the pre-trained model; set "
            "objective.kl.form=paper and objective.kl.weight"
        )
    ratio = o.ratio or form.ratio
    if ratio == "policy_flow" and config.model.adapter == "stable_diffusion":
        yield "objective.name: policy_flow compares velocities, and stable_diffusion predicts noise; use flow_grpo or ddpo"
    if ratio != "plain":
        from flowrl.advantage.catalogue import JOINT_LOSSES

        loss = loss_name(o)
        if loss in JOINT_LOSSES:
            yield (
                f"objective.loss: {loss} looks at whole trajectories of plain ratios, and {o.name} has the ratio "
                f"{ratio!r}; use objective.ratio=plain, or objective.loss=ppo"
            )


def _budget(config: Config) -> Iterator[str]:
    batch, rollout = config.batch, config.rollout
    allocation, selection = batch.allocation, batch.selection
    if allocation.name == "knapsack":
        if rollout.seeds > 1 or rollout.splits:
            yield (
                "batch.allocation.name: knapsack makes groups of unequal size, which do not share out over "
                "rollout.seeds or rollout.splits; use fixed"
            )
        if not 2 <= allocation.low <= batch.group_size <= allocation.high:
            yield (
                f"batch.allocation: low = {allocation.low}, high = {allocation.high} must hold batch.group_size = "
                f"{batch.group_size} between them, and low be at least 2"
            )
    if selection.name != "all" and not 2 <= selection.number <= batch.group_size:
        yield (
            f"batch.selection.number: {selection.number} members are no choice among {batch.group_size} "
            "(batch.group_size); use 2 to that"
        )
