"""What a config may ask of the advantage engine: names, options, and what a training run can supply.

torch is imported only where a config strays from the plain group estimators and PPO's loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from flowrl import registry
from flowrl.config.families import family_of
from flowrl.config.schema import Config, Objective

if TYPE_CHECKING:
    from flowrl.advantage import Method

# What training/credit.py hands to an estimator, and training/losses.py to a policy loss.
SUPPLIED = frozenset({
    "rewards", "group", "valid", "weights", "mask", "step_reward", "trajectory", "length", "cost", "step", "node",
    "seed_group", "old_log_prob", "anchor", "node_path", "segment", "truncated",
})  # fmt: skip
VALUES = frozenset({"step_value", "start_value", "value", "segment_value", "stage_reward", "value_post", "probe"})
"""What ``credit.values`` adds."""
LOSS_INPUTS = frozenset({"log_prob", "old_log_prob", "advantage", "mask"})
# Optional inputs that stand in for a probability: a denoising step has a density, which is not one.
SUBSTITUTES = {"dcpo_dynamic": "old_prob", "dppo": "divergence"}
PLAIN = frozenset({"grpo", "dr_grpo", "rloo", "lite_ppo", "gdpo"})


def loss_name(objective: Objective) -> str:
    """The policy loss that an objective runs: the one it names itself, else that of its form; "" for other families."""
    if family_of(objective.name) != "trajectory":
        return ""
    if objective.loss or objective.name == "flow_grpo":
        return objective.loss or "ppo"
    return str(registry.resolve("objective", objective.name)[objective.name].loss)


def problems(config: Config) -> Iterator[str]:
    """Say what is wrong with ``advantage`` and ``objective.loss``, one line each."""
    a, o = config.advantage, config.objective
    if a.name not in PLAIN or a.options:
        yield from _of(
            "estimator", "advantage", "advantage.name", a.name, "advantage.options", a.options, SUPPLIED | VALUES
        )
    if a.whiten == "sample" and a.name not in PLAIN and _of_steps(a.name):
        yield (
            f"advantage.whiten: sample counts every sample once, and {a.name} gives one advantage a step; use step, or none"
        )
    name = "" if o.name not in registry.names("objective") else loss_name(o)
    if name in registry.SURROGATES:
        yield from _options(name, registry.resolve("surrogate", name), "objective.loss_options", o.loss_options)
    elif name and (name != "ppo" or o.loss_options):
        yield from _of(
            "policy_loss", "policy_loss", "objective.loss", name, "objective.loss_options", o.loss_options, LOSS_INPUTS
        )


def _of_steps(name: str) -> bool:
    """Tell whether an estimator that a run can use gives one advantage a step: these, and no others, take the mask."""
    from flowrl.advantage.catalogue import ESTIMATORS
    from flowrl.advantage.pipeline import inputs_of

    return name in ESTIMATORS and "mask" in inputs_of(ESTIMATORS[name])


def _options(name: str, call: Callable[..., Any], key: str, options: Mapping[str, Any]) -> Iterator[str]:
    from flowrl.advantage.pipeline import check_options

    try:
        check_options(name, call, options)
    except ValueError as error:
        yield f"{key}: {error}"


def _of(
    kind: str,
    table: str,
    name_key: str,
    name: str,
    option_key: str,
    options: Mapping[str, Any],
    supplied: frozenset[str],
) -> Iterator[str]:
    from flowrl.advantage.catalogue import METHODS

    known = {m.key: m for m in METHODS if m.kind == kind}
    if name not in known:
        yield f"{name_key}: {registry.unknown(table, name)}"
        return
    method = known[name]
    if method.call is None:
        return
    refusal = refused(method, method.call, supplied)
    if refusal:
        yield f"{name_key}: {refusal}"
        return
    yield from _options(name, method.call, option_key, options)


def refused(method: Method, call: Callable[..., Any], supplied: frozenset[str]) -> str:
    """Say why a training run on denoising steps cannot run the method, or ""."""
    from flowrl.advantage.inputs import INPUTS
    from flowrl.advantage.pipeline import inputs_of

    if method.tokens_only:
        return f"{method.key} has no meaning on denoising steps: {method.tokens_only}"
    for needed, required in inputs_of(call).items():
        if required and needed not in supplied:
            meaning = INPUTS[needed].meaning if needed in INPUTS else "an input of its own"
            return (
                f"{method.key} needs {needed!r} ({meaning}), which a training run does not produce; "
                "call flowrl.advantage from a loop of your own"
            )
    if method.key in SUBSTITUTES:
        return (
            f"{method.key} needs probabilities, and a denoising step has a density; give {SUBSTITUTES[method.key]!r} "
            "from a loop of your own"
        )
    return ""
