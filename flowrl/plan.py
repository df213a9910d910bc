"""What one iteration of a config will cost: geometry, network calls (flowrl.cost), memory; no model, no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from flowrl import cost, fit, registry
from flowrl.config.families import family_of
from flowrl.config.rewards import declared, labels
from flowrl.config.schema import Config
from flowrl.cost import Count, Work
from flowrl.errors import UserError
from flowrl.performance.memory import BYTES as _BYTES

# (channels, pixels a latent cell) of families whose latents are [C, H / f, W / f]; other models are asked once loaded.
_LATENTS = {"sd3": (16, 8), "stable_diffusion": (4, 8)}
_EMBEDDED = (4, 4)
_EMBEDDED_CLIP = (4, 5, 6, 6)


@dataclass(frozen=True)
class Plan:
    """Geometry and cost of one iteration. Work with silent groups left out is smaller than update and reference say.

    starts: first step of the window, each equally frequent. stored_bytes: latents kept for the update (x and x_next of
    each trained transition, and x0), None where the latent shape is not known before the model is loaded.
    """

    groups: int
    group_size: int
    samples: int
    steps: int
    window: int
    starts: tuple[int, ...]
    branches: int
    transitions: int
    updates: int
    rollout: Work
    update_forward: Work
    update_backward: Work
    loss: Work
    reference: Work
    old: Work
    values: Work
    value_samples: int
    decode_calls: int
    reward_samples: int
    evaluation_pictures: int
    evaluation_forwards: int
    stored_bytes: int | None

    @property
    def forward(self) -> Work:
        """All forwards of an iteration."""
        return self.rollout + self.update_forward + self.loss + self.reference + self.old + self.values


def plan(config: Config, latent_shape: Sequence[int] | None = None) -> Plan:
    """Work out one iteration of ``config``.

    latent_shape: of one latent, without the batch; by default derived from the picture size for the families it is
    known for. The config is taken as checked.
    """
    batch, rollout, objective = config.batch, config.rollout, config.objective
    branches = cost.branches_of(config)
    forward, given = family_of(objective.name) == "forward", objective.name == "dpo"
    direct = family_of(objective.name) == "direct"
    window, starts = 0 if forward or direct else cost.trained_of(config), cost.window_of(config)[1]
    transitions = batch.samples * window
    update = cost.update_work(config)
    evaluation = config.evaluation
    pictures = evaluation.count * evaluation.per_prompt
    shape = latent_shape if latent_shape is not None else _latent_shape(config)
    stored = None
    if shape is not None:
        whole = batch.samples + (int(update.old.samples.most + update.reference.samples.most) if forward else 0)
        stored = math.prod(shape) * (2 * transitions * _BYTES[rollout.storage_dtype] + whole * _BYTES["fp32"])
        if direct:  # the latents of one chunk at a time
            stored = math.prod(shape) * min(batch.micro_batch, batch.samples) * (rollout.steps + 1) * _BYTES["fp32"]
    return Plan(
        groups=batch.groups,
        group_size=batch.group_size,
        samples=batch.samples,
        steps=rollout.steps,
        window=window,
        starts=starts,
        branches=branches,
        transitions=transitions,
        updates=objective.updates * objective.passes,
        rollout=cost.rollout_work(config) + cost.guide_work(config),
        update_forward=update.forward,
        update_backward=update.backward,
        loss=update.loss,
        reference=update.reference,
        old=update.old,
        values=cost.value_work(config),
        value_samples=cost.value_samples(config),
        decode_calls=0 if given else math.ceil(batch.samples / batch.micro_batch),
        reward_samples=0 if given else batch.samples * _scorers(config),
        evaluation_pictures=pictures,
        evaluation_forwards=pictures * evaluation.steps * cost.guided_branches(config, evaluation.guidance),
        stored_bytes=stored,
    )


def _scorers(config: Config) -> int:
    """Rewards that score the pictures of training; gold ones wait for evaluations."""
    return sum(entry.duty != "gold" for entry in config.rewards)


def _latent_shape(config: Config) -> tuple[int, ...] | None:
    model = config.model
    if model.path == "embedded" and model.adapter == "wan":
        return _EMBEDDED_CLIP
    known = _EMBEDDED if model.path == "embedded" else _LATENTS.get(model.adapter)
    if known is None:
        return None
    channels, factor = known
    return channels, model.height // factor, model.width // factor


def plan_text(config: Config, latent_shape: Sequence[int] | None = None) -> str:
    """Lay the plan out as text to print: geometry, then network work an iteration, then everything else, then memory."""
    size = fit.size_of(config)
    made = plan(config, latent_shape if latent_shape is not None or size is None else size.shape)
    rows = _geometry(config, made)
    left = max(len(name) for name, _ in rows)
    lines = [f"{name:<{left}}  {text}" for name, text in rows]
    memory = [*fit.lines(config, size, made.stored_bytes), *_networks_beside(config)]
    return "\n".join([*lines, "", *_work_table(made), "", *_rest(config, made), "", *memory])


def _networks_beside(config: Config) -> list[str]:
    """The memory section of small networks beside the model: rewards and process rewards that tell, critics. Often empty."""
    again = ", twice: once more for its gradient" if family_of(config.objective.name) == "direct" else ""
    rows = []
    for label, entry in zip(labels(config.rewards), config.rewards, strict=True):
        says = declared(entry.name, "held_bytes")
        if says is not None:
            rows.append((f"reward {label}", _told(says, entry.args, again if entry.duty == "train" else "")))
    for label, process in zip(labels(config.process), config.process, strict=True):
        if process.name in ("latent", "features"):
            from flowrl.credit.process.storage import held_bytes

            rows.append((f"process {label}", _told(held_bytes, process.args)))
    if config.credit.values == "critic" or config.objective.name == "ac_flow":
        rows.append(("critic", "known once the model is loaded: memory/critic_mb of the metrics"))
    width = max((len(name) for name, _ in rows), default=0)
    lines = [f"  {name:<{width}}  {text}" for name, text in rows]
    return ["memory of networks beside the model", *lines] if lines else []


def _told(says: Callable[..., int], args: Mapping[str, Any], further: str = "") -> str:
    try:
        return f"{says(**args) / 2**20:,.2f} MiB{further}"
    except UserError as error:
        return f"unknown: {error}"


def _geometry(config: Config, made: Plan) -> list[tuple[str, str]]:
    batch, rollout, objective = config.batch, config.rollout, config.objective
    if rollout.window.kind == "full":
        window = f"steps 0 to {made.steps - 2}"
    else:
        first, last = made.starts[0], made.starts[-1]
        where = f"step {first}" if first == last else f"a {rollout.window.kind} step from {first} to {last}"
        window = f"{made.window} steps from {where}"
    prefix = "computed once a group" if rollout.share_prefix else "computed for each sample"
    share = f"{batch.groups / objective.updates:g} groups"
    return [
        ("batch", f"{made.groups} groups x {made.group_size} members = {made.samples} samples"),
        ("micro-batch", f"{batch.micro_batch} samples a network call"),
        *_sampling(config, made, f"{window}; steps before are {prefix}"),
        ("updates", f"{made.updates} ({objective.passes} passes of {objective.updates}, each on {share})"),
        ("run", f"{config.iterations} iterations, {config.iterations * made.samples:,} pictures"),
    ]


def _sampling(config: Config, made: Plan, stochastic: str) -> list[tuple[str, str]]:
    rollout = config.rollout
    schedule = f"{made.steps} steps, kernel {rollout.kernel.name} (noise {rollout.kernel.noise:g})"
    trained = f"{made.transitions} transitions ({made.window} a sample)"
    if family_of(config.objective.name) == "forward":
        schedule, stochastic = (
            f"{made.steps} steps, solver {rollout.solver}",
            "no step; a sample is its finished latent",
        )
        trained = f"{made.samples} samples, each at {config.forward.draws} draws of (t, noise)"
    if family_of(config.objective.name) == "direct":
        noisy = config.direct.stochastic or config.objective.name in ("ctrl", "adjoint_matching")
        schedule = schedule if noisy else f"{made.steps} steps, deterministic"
        stochastic = "every step but the last" if noisy else "no step"
        trained = f"{made.samples} samples, along the gradient of their rewards"
    if config.objective.name == "dpo":
        schedule = "none: pictures are given"
    branches = f"{made.branches} network branch{'es' if made.branches > 1 else ''}"
    return [
        ("schedule", schedule),
        ("stochastic", stochastic),
        ("guidance", f"{rollout.guidance:g}, {branches}"),
        ("trained", trained),
    ]


def _work_table(made: Plan) -> list[str]:
    rows = [
        ("rollout, forward", made.rollout),
        ("update, forward", made.update_forward),
        ("update, backward", made.update_backward),
        ("loss, forward", made.loss),
        ("reference, forward", made.reference),
        *([("old policy, forward", made.old)] if made.old != cost.NONE else []),
        ("step values, forward", made.values),
        ("all forwards", made.forward),
    ]
    cells = [("network, an iteration", "samples", "calls", "samples a picture")]
    for name, work in rows:
        each = f"{work.samples.mean / made.samples:.2f}"
        cells.append((name, _range(work.samples), _range(work.calls), each))
    widths = [max(len(row[column]) for row in cells) for column in range(4)]
    return [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, 4))]).rstrip() for row in cells
    ]


def _range(count: Count) -> str:
    """A number, or its mean with the range where the window's start moves it."""
    if count.least == count.most:
        return f"{count.mean:,.0f}"
    return f"{count.mean:,.1f} ({count.least:,.0f} to {count.most:,.0f})"


def _value_line(config: Config, made: Plan) -> list[str]:
    if not made.value_samples:
        return []
    scores = made.value_samples * _scorers(config)
    return [f"step values ({config.credit.values}): {made.value_samples:,} further pictures decoded, {scores:,} scores"]


def _guide_line(config: Config) -> list[str]:
    guide = config.rollout.guide
    if not guide.active:
        return []
    return [f"guidance: the process reward {guide.reward} is asked about {_range(cost.guide_samples(config))} latents"]


def _rest(config: Config, made: Plan) -> list[str]:
    lines = [
        f"decode: {made.samples if made.decode_calls else 0:,} pictures in {made.decode_calls:,} calls; "
        f"rewards: {made.reward_samples:,} scores from {_scorers(config)} rewards",
        *_value_line(config, made),
        *_guide_line(config),
        f"evaluation: {made.evaluation_pictures:,} pictures, {made.evaluation_forwards:,} forward samples each time",
    ]
    if made.stored_bytes is None:
        lines.append("latents kept for the update: known once the model is loaded")
    else:
        lines.append(f"latents kept for the update: {made.stored_bytes / 2**20:,.1f} MiB")
    name = config.objective.name
    family = family_of(name)
    silent = family == "trajectory" or (family == "forward" and registry.resolve("objective", name)[name].silent)
    if silent and config.objective.skip_silent and config.objective.kl.form == "none":
        lines.append("groups whose advantages are all zero are left out of the update: its work is at most this")
    return lines
