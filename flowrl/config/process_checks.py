"""What is wrong with process rewards, critics and actor-critic settings of a config; nothing heavy is loaded."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from flowrl import registry
from flowrl.config.families import family_of
from flowrl.config.process import ActorCritic, Critic, ProcessEntry
from flowrl.config.rewards import declared
from flowrl.config.schema import Config
from flowrl.errors import UserError

VALUES_OF_MODELS = ("process", "critic")
WEIGHTINGS = ("exponential", "linear", "critic_only")


def problems(config: Config) -> Iterator[str]:
    """List what is wrong, each as ``key.path: what; what to do``."""
    for index, entry in enumerate(config.process):
        yield from _entry(f"process.{index}", entry)
    yield from _credit(config)
    yield from _critic(config)
    if config.objective.name == "ac_flow":
        yield from _ac_flow(config)
    elif config.actor_critic != ActorCritic():
        yield f"actor_critic: objective.name={config.objective.name} has no such part; remove the section, or use ac_flow"
    if config.critic != Critic() and config.objective.name != "ac_flow" and config.credit.values != "critic":
        yield "critic: nothing in this run has one; remove the section, or use credit.values=critic or objective.name=ac_flow"


def _entry(key: str, entry: ProcessEntry) -> Iterator[str]:
    try:
        for line in registry.check_arguments("process_reward", entry.name, entry.args):
            yield f"{key}.args.{line}"
    except UserError as error:
        yield f"{key}.name: {error}"
        return
    if not all(value > 0 for value in entry.temperature):
        yield f"{key}.temperature: {list(entry.temperature)} divides values; use numbers above 0"
    if not 0 <= entry.min_accuracy < 1:
        yield f"{key}.min_accuracy: {entry.min_accuracy} is out of range; use at least 0 and less than 1 (0.5 is chance)"
    path = entry.args.get("path")
    if entry.name in ("latent", "features") and isinstance(path, str) and not (Path(path) / "model.json").is_file():
        yield f"{key}.args.path: no trained process reward in {path!r}; scripts/train_reward_model.py makes one"
    if entry.name == "x0":
        yield from _outcome(key, entry)


def _outcome(key: str, entry: ProcessEntry) -> Iterator[str]:
    steps, name, args = (entry.args.get(k, d) for k, d in (("ode_steps", 1), ("reward", ""), ("args", None)))
    if isinstance(steps, int) and steps < 0:
        yield f"{key}.args.ode_steps: {steps} is out of range; use at least 0 (0 is every remaining step)"
    if not name and args:
        yield f"{key}.args.args: are of a reward of its own; name it by {key}.args.reward, or remove them"
    if not isinstance(name, str) or not name:
        return
    try:
        for line in registry.check_arguments("reward", name, args or {}):
            yield f"{key}.args.args.{line}"
    except UserError as error:
        yield f"{key}.args.reward: {error}"
        return
    if declared(name, "scope") == "group" or callable(declared(name, "compare")):
        yield f"{key}.args.reward: {name} compares finished pictures of a group; use one that scores a picture alone"


def _credit(config: Config) -> Iterator[str]:
    values = config.credit.values
    if values == "process" and not any(entry.weight for entry in config.process):
        yield "credit.values: process needs at least one entry of process with a weight; see docs/process_rewards.md"
    if values in VALUES_OF_MODELS and family_of(config.objective.name) != "trajectory":
        yield (
            f"credit.values: {values} values the steps of a trajectory, and objective.name={config.objective.name} has none; "
            "set it to none"
        )
    if config.advantage.name == "pdppo" and values not in ("none", "critic"):
        yield "credit.values: pdppo has a critic of the state after the action, before its noise; use critic"


def _critic(config: Config) -> Iterator[str]:
    critic = config.critic
    for name in ("bins", "width", "blocks", "steps", "batch", "buffer"):
        if vars(critic)[name] < 1:
            yield f"critic.{name}: {vars(critic)[name]} is out of range; use at least 1"
    for name in ("delta", "lr", "max_grad_norm"):
        if not vars(critic)[name] > 0:
            yield f"critic.{name}: {vars(critic)[name]} is out of range; use more than 0"
    for name in ("lam", "below"):
        if not 0 <= vars(critic)[name] <= 1:
            yield f"critic.{name}: {vars(critic)[name]} is out of range; use 0 to 1"
    if not 0 <= critic.ema < 1:
        yield f"critic.ema: {critic.ema} is out of range; use at least 0 and less than 1"
    for name in ("warmup", "weight_decay"):
        if not vars(critic)[name] >= 0:
            yield f"critic.{name}: {vars(critic)[name]} is out of range; use at least 0"
    yield from _critic_features(critic)
    if critic.loss == "hl_gauss" and (critic.bins < 2 or critic.low >= critic.high):
        yield f"critic.bins: {critic.bins} over {critic.low} .. {critic.high}; use at least 2, and low below high"


def _critic_features(critic: Critic) -> Iterator[str]:
    names = critic.features
    if not all(names) or len(set(names)) < len(names):
        yield f"critic.features: {list(names)} repeats a name or has an empty one; name each module once"
    if names and critic.blocks != Critic().blocks:
        yield "critic.blocks: are of its convolutions, and with critic.features it has none; remove one of the two"


def _ac_flow(config: Config) -> Iterator[str]:
    options = config.objective.loss_options
    for name in ("reward_limit", "advantage_limit"):
        if vars(config.actor_critic)[name] < 0:
            yield f"actor_critic.{name}: {vars(config.actor_critic)[name]} is out of range; use at least 0"
    alpha, tau = options.get("alpha", 0.3), options.get("temperature", 1.0)
    if isinstance(alpha, int | float) and alpha < 0:
        yield f"objective.loss_options.alpha: {alpha} is out of range; use at least 0"
    if isinstance(tau, int | float) and not tau > 0:
        yield f"objective.loss_options.temperature: {tau} is out of range; use more than 0"
    if options.get("regulariser") == "adaptive" and alpha == 0:
        yield "objective.loss_options.alpha: the adaptive regulariser shares it out; use more than 0, or regulariser=fixed"
    for name, known in (("weighting", WEIGHTINGS), ("regulariser", ("fixed", "adaptive"))):
        if name in options and options[name] not in known:
            yield f"objective.loss_options.{name}: {options[name]!r} is unknown; use {', '.join(known)}"
    if config.objective.kl.form != "none":
        yield "objective.kl.form: ac_flow regularises by objective.loss_options.alpha (the Wasserstein term); use none"
