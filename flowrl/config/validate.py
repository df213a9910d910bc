"""Cross-field checks of a configuration: ranges, conflicts, names and files. No model and no torch is loaded."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

from flowrl import registry
from flowrl.config import (
    condition,
    direct,
    engine,
    evaluation,
    forward,
    guide_checks,
    neighbours,
    process_checks,
    rewards,
    tracking,
    trajectory,
)
from flowrl.config.dialect import ConfigError
from flowrl.config.distributed import distributed_problems, sharding_problems
from flowrl.config.families import family_of
from flowrl.config.load import from_mapping
from flowrl.config.model import problems as model_problems
from flowrl.config.render import to_mapping
from flowrl.config.schema import Config

WORLDS = ("world/v1", "world/video1")
EMBEDDED_SIZE = 36
EMBEDDED_CLIP = (24, 24, 5)
"""Height, width and frames of the embedded video model, adapter wan."""
MAX_SEED = 2**63 - 1
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")

_RANGES: tuple[tuple[str, Callable[[float], bool], str], ...] = (
    ("use at least 1", lambda value: value >= 1, """
        iterations model.height model.width model.lora.rank batch.groups batch.group_size batch.micro_batch
        rollout.window.size rollout.window.every rollout.window.stride rollout.window.least rollout.seeds rollout.children
        credit.stride objective.updates objective.passes ema.every failures.min_valid
        evaluation.count evaluation.per_prompt evaluation.steps evaluation.quick tracking.pictures.rows
    """),
    ("use at least 0", lambda value: value >= 0, """
        seed threads rollout.window.first rollout.window.rate
        credit.ode_steps rollout.guidance advantage.clip objective.kl.weight optimizer.lr
        optimizer.weight_decay optimizer.warmup evaluation.guidance evaluation.seed evaluation.every evaluation.grid
        checkpoint.every alarm.patience failures.breaker failures.breaker_s tracking.pictures.every
    """),
    ("use more than 0", lambda value: value > 0, """
        model.lora.alpha objective.clip_range optimizer.eps optimizer.max_grad_norm
    """),
    ("use at least 0 and less than 1", lambda value: 0 <= value < 1, "optimizer.betas.0 optimizer.betas.1 ema.decay"),
    ("use 0 to 1", lambda value: 0 <= value <= 1, "failures.max_invalid_fraction alarm.diversity_fall"),
    ("use more than 0 and less than 1", lambda value: 0 < value < 1, "alarm.level"),
    ("use more than 0 and at most 1", lambda value: 0 < value <= 1, "rollout.window.fraction batch.allocation.memory"),
    (f"use at most {MAX_SEED}", lambda value: value <= MAX_SEED, "seed evaluation.seed"),
    ("use at least 2, so that a damaged one has a predecessor", lambda value: value >= 2, "checkpoint.keep"),
)  # fmt: skip


def validate(config: Config, world_size: int = 1) -> list[str]:
    """List everything that is wrong across the fields of a config, each as ``key.path: what; what to do``.

    world_size: processes that share the batch. Reward arguments are checked against the reward's signature, which
    imports the reward's module. The range of ``optimizer.lr`` includes 0: that run is the control that must not learn.
    """
    problems: list[str] = []
    for part in _CHECKS:
        problems += part(config)
    groups, updates = config.batch.groups, config.objective.updates
    problems += distributed_problems(config.distributed, groups, updates, world_size)
    return problems + list(sharding_problems(config))


def check(config: Config, world_size: int = 1) -> Config:
    """Return the config when it is right in types, ranges and across fields, else raise ConfigError with all errors."""
    config = from_mapping(to_mapping(config))  # a Config made in Python has had no type checks yet
    problems = validate(config, world_size)
    if problems:
        raise ConfigError(problems)
    return config


def _ranges(config: Config) -> Iterator[str]:
    for advice, holds, keys in _RANGES:
        for key in keys.split():
            value = _value(config, key)
            if not holds(value):
                yield f"{key}: {value} is out of range; {advice}"


def _value(config: Config, key: str) -> float:
    here: object = config
    for part in key.split("."):
        here = here[int(part)] if isinstance(here, tuple) else vars(here)[part]
    if not isinstance(here, int | float):
        raise TypeError(f"{key} is not a number")
    return here


def _run(config: Config) -> Iterator[str]:
    if not config.run_dir.strip():
        yield "run_dir: is empty; name the folder of this run, such as runs/first"
    elif Path(config.run_dir).is_file():
        yield f"run_dir: {config.run_dir} is a file; name a folder"


def _model(config: Config) -> Iterator[str]:
    model = config.model
    yield from model_problems(model)
    if model.dtype == "fp16" and config.distributed.sharding != "none":
        yield "model.dtype: fp16 scales the gradients of whole weights, and distributed.sharding splits them; use bf16"
    if model.free_text_encoders and config.data.preferences:
        yield "model.free_text_encoders: the prompts of data.preferences are encoded as they come; set it to false"
    if model.adapter not in registry.names("pipeline") and ":" not in model.adapter:
        yield f"model.adapter: {registry.unknown('pipeline', model.adapter)}"
    if model.train == "lora" and not model.lora.targets:
        yield (
            "model.lora.targets: is empty, so nothing would be trained; "
            "use [attention, feed_forward] or model.train=full"
        )
    if model.path == "embedded" and model.adapter == "wan":
        if (model.height, model.width, model.frames) != EMBEDDED_CLIP:
            height, width, frames = EMBEDDED_CLIP
            yield (
                f"model.height, model.width, model.frames: the embedded video model makes {frames} frames of {height} x "
                f"{width}, not {model.frames} of {model.height} x {model.width}; set those"
            )
    elif model.path == "embedded":
        if (model.height, model.width) != (EMBEDDED_SIZE, EMBEDDED_SIZE) and min(model.height, model.width) >= 1:
            yield (
                f"model.height, model.width: the embedded model makes pictures of {EMBEDDED_SIZE} x {EMBEDDED_SIZE}, "
                f"not {model.height} x {model.width}; remove both keys"
            )
    elif not model.path.strip():
        yield (
            "model.path: is empty; give a folder, a hub id such as stabilityai/stable-diffusion-3.5-medium, or embedded"
        )
    elif not Path(model.path).expanduser().is_dir() and not _HUB_ID.fullmatch(model.path):
        yield (
            f"model.path: no folder {model.path!r}, and it is not a hub id (owner/name); give one of them, or embedded"
        )


def _data(config: Config) -> Iterator[str]:
    yield from _prompts("data", config.data.prompts, config.data.format)
    yield from _prompts("evaluation", config.evaluation.prompts, config.evaluation.format)


def _prompts(section: str, prompts: str, form: str) -> Iterator[str]:
    key = f"{section}.prompts"
    if not prompts.strip():
        yield f"{key}: is empty; give a prompt file, or world/v1 for the embedded world"
    elif prompts.startswith("world/"):
        if prompts not in WORLDS:
            yield f"{key}: unknown world {prompts!r}; use {', '.join(WORLDS)}, or give a prompt file"
        elif form != "auto":
            yield f"{section}.format: {form} is for files, and {key} is {prompts}; remove it"
    elif Path(prompts).is_dir():
        yield f"{key}: {prompts} is a folder; give a prompt file"
    elif not Path(prompts).is_file():
        yield f"{key}: no file {prompts!r}; check the path (it is relative to where you run)"
    elif form == "auto" and Path(prompts).suffix.lower() not in (".txt", ".jsonl"):
        yield (
            f"{section}.format: auto knows .txt and .jsonl, not {Path(prompts).name!r}; "
            "name it: lines, jsonl, geneval or ocr"
        )


def _batch(config: Config) -> Iterator[str]:
    size = config.batch.group_size
    yield from engine.problems(config)
    if size == 1 and family_of(config.objective.name) != "direct":
        yield (
            f"batch.group_size: {config.advantage.name} compares the members of a group, and a group of 1 has none; "
            "use at least 2"
        )
    if 1 < size < config.failures.min_valid:
        yield (
            f"failures.min_valid: {config.failures.min_valid} valid members are asked of groups of {size}, so every "
            f"group would be dropped; use at most {size}"
        )
    if config.failures.min_valid == 1:
        yield "failures.min_valid: a single valid member has nothing to be compared with; use at least 2"
    if config.objective.updates > config.batch.groups >= 1:
        yield (
            f"objective.updates: {config.objective.updates} updates cannot share out {config.batch.groups} groups, "
            "each taking at least one; use fewer updates or more batch.groups"
        )


def _rollout(config: Config) -> Iterator[str]:
    kernel, steps = config.rollout.kernel, config.rollout.steps
    if kernel.name not in registry.names("kernel"):
        yield f"rollout.kernel.name: {registry.unknown('kernel', kernel.name)}"
    elif kernel.name == "ode" and family_of(config.objective.name) == "trajectory":
        yield (
            "rollout.kernel.name: ode draws no noise, so no step has a log-probability to train; "
            "use precise, cps or flow_sde"
        )
    elif kernel.noise <= 0:
        yield f"rollout.kernel.noise: {kernel.noise} leaves no step to train; use more than 0, such as 0.7"
    elif kernel.name in ("cps", "ddim") and kernel.noise > 1:
        yield (
            f"rollout.kernel.noise: {kernel.noise} is too large for {kernel.name}; its eta is more than 0 and at most 1"
        )
    if steps < 2:
        yield f"rollout.steps: {steps} leaves no stochastic step, as the last one is deterministic; use at least 2"
    else:
        yield from _window(config, steps)


def _window(config: Config, steps: int) -> Iterator[str]:
    window = config.rollout.window
    if window.kind == "full":
        if window.first > 0:
            yield (
                f"rollout.window.first: {window.first} has no meaning for a full window, which starts at step 0; "
                "remove it, or use rollout.window.kind=random"
            )
        return
    if window.last < window.first:
        yield (
            f"rollout.window.last: {window.last} comes before rollout.window.first ({window.first}); "
            f"use at least {window.first}"
        )
        return
    latest = steps - 1 - window.size
    if latest < 0:
        yield (
            f"rollout.window.size: {window.size} steps do not fit into the {steps - 1} stochastic steps of "
            f"rollout.steps={steps} (the last step is deterministic); use at most {steps - 1}"
        )
    elif window.last > latest:
        yield (
            f"rollout.window.last: a window of {window.size} that starts at step {window.last} ends at step "
            f"{window.last + window.size - 1}, past step {steps - 2}, the last stochastic one of "
            f"rollout.steps={steps}; use at most {latest}"
        )


def _objective(config: Config) -> Iterator[str]:
    kl, optimizer = config.objective.kl, config.optimizer
    if config.objective.name not in registry.names("objective"):
        yield f"objective.name: {registry.unknown('objective', config.objective.name)}"
    if kl.form == "none" and kl.weight > 0:
        yield (
            f"objective.kl.form: none, yet objective.kl.weight is {kl.weight}; "
            "choose paper, no_dt or velocity, or set the weight to 0"
        )
    if kl.form != "none" and kl.weight == 0:
        yield (
            f"objective.kl.weight: 0, yet objective.kl.form is {kl.form}; "
            "give a weight such as 0.04, or set the form to none"
        )
    total = config.iterations * config.objective.updates * config.objective.passes
    if optimizer.warmup > 0 and optimizer.warmup >= total >= 1:
        yield f"optimizer.warmup: {optimizer.warmup} of the run's {total} optimizer steps; use fewer than {total}"


_Check = Callable[[Config], Iterator[str]]
_CHECKS: tuple[_Check, ...] = (
    _ranges, _run, _model, _data, _batch, _rollout, trajectory.problems, _objective, direct.problems,
    forward.problems,
    neighbours.problems, guide_checks.problems, process_checks.problems,
    condition.problems, rewards.problems,
    evaluation.problems, tracking.problems,
)  # fmt: skip
