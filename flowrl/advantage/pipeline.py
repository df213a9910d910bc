"""Run a method by name: gather its inputs, run it, whiten, clip.

The stages of a method, each in its own function's body, are: place rewards on steps, accumulate backwards, baseline,
normalise, combine, weights / masks / clip scale. ``estimate`` adds the two that any method may be followed by.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, Literal

from torch import Tensor

from .catalogue import ESTIMATORS, POLICY_LOSSES
from .inputs import INPUTS
from .loss_record import PolicyLoss
from .moments import Reduce, masked_whiten
from .record import Advantage

Whiten = Literal["none", "step", "sample"]


def _suggest(word: str, known: list[str]) -> str:
    close = difflib.get_close_matches(word, known, n=1)
    return f"did you mean {close[0]!r}?" if close else f"expected one of {', '.join(sorted(known))}"


def inputs_of(call: Callable[..., Any]) -> dict[str, bool]:
    """List the inputs of a method's function in order: name -> whether it is required."""
    parameters = inspect.signature(call).parameters.values()
    return {p.name: p.default is p.empty for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD}


def options_of(call: Callable[..., Any]) -> dict[str, Any]:
    """List the options of a method's function with their defaults; ``reduce`` is not one of them."""
    parameters = inspect.signature(call).parameters.values()
    return {p.name: p.default for p in parameters if p.kind is p.KEYWORD_ONLY and p.name != "reduce"}


def check_options(name: str, call: Callable[..., Any], options: Mapping[str, Any]) -> None:
    """Raise ValueError for an option that the method ``name`` does not have."""
    known = list(options_of(call))
    for option in options:
        if option not in known:
            raise ValueError(f"{name}: no option {option!r}; {_suggest(option, known) if known else 'it has none'}")


def run_method(
    name: str, call: Callable[..., Any], inputs: Mapping[str, Any], options: Mapping[str, Any], reduce: Reduce | None
) -> Any:
    """Call a method with those of ``inputs`` that it asks for.

    Raises ValueError for an input that no method knows, one that this method needs and is not there, or an option
    that it does not have; and as the method does.
    """
    for given in inputs:
        if given not in INPUTS:
            raise ValueError(f"inputs: no input is called {given!r}; {_suggest(given, list(INPUTS))}")
    wanted = inputs_of(call)
    for needed, required in wanted.items():
        if required and inputs.get(needed) is None:
            meaning = f" ({INPUTS[needed].meaning}, {INPUTS[needed].shape})" if needed in INPUTS else ""
            raise ValueError(f"{name}: needs the input {needed!r}{meaning}; got {', '.join(sorted(inputs)) or 'none'}")
    check_options(name, call, options)
    shared = {"reduce": reduce} if "reduce" in inspect.signature(call).parameters else {}
    return call(**{key: inputs[key] for key in wanted if key in inputs}, **options, **shared)


def estimate(
    name: str,
    inputs: Mapping[str, Any],
    options: Mapping[str, Any] | None = None,
    *,
    whiten: Whiten = "none",
    clip: float = 0.0,
    reduce: Reduce | None = None,
) -> Advantage:
    """Run the estimator ``name`` (a key of ESTIMATORS), whiten its advantages, clip them.

    inputs: tensors by their names in INPUTS; what the method does not ask for is left aside. options: its keyword-only
    arguments. whiten: "step" standardises over all unmasked elements of the batch (a [B] result is spread over
    ``inputs["mask"]`` first), "sample" over the samples of a [B] result. clip: advantages are cut to +-clip; 0 is off.
    reduce: sums a float64 tensor over data-parallel ranks, for every statistic of the batch. Raises ValueError for an
    unknown name, input or option, a missing input, a negative clip, and as the method does.
    """
    if name not in ESTIMATORS:
        raise ValueError(f"name: unknown estimator {name!r}; {_suggest(name, list(ESTIMATORS))}")
    if not clip >= 0:
        raise ValueError(f"clip: expected a number >= 0 (0 is off), got {clip}")
    result: Advantage = run_method(name, ESTIMATORS[name], inputs, options or {}, reduce)
    result = _whitened(result, inputs.get("mask"), whiten, reduce)
    return replace(result, advantage=result.advantage.clamp(-clip, clip)) if clip > 0 else result


def _whitened(result: Advantage, mask: Tensor | None, whiten: Whiten, reduce: Reduce | None) -> Advantage:
    if whiten == "none":
        return result
    if whiten not in ("step", "sample"):
        raise ValueError(f"whiten: expected 'none', 'step' or 'sample', got {whiten!r}")
    if whiten == "sample" and result.advantage.ndim != 1:
        raise ValueError("whiten: 'sample' is for one advantage a sample; this method gives one a step, use 'step'")
    if whiten == "step" and result.advantage.ndim == 1:
        if mask is None:
            raise ValueError("whiten: 'step' needs the input 'mask' [B, T], to know how many steps each sample has")
        result = result.over_steps(mask)
    return replace(result, advantage=masked_whiten(result.advantage, result.loss_mask, reduce=reduce))


def policy_loss(name: str, inputs: Mapping[str, Any], options: Mapping[str, Any] | None = None) -> PolicyLoss:
    """Run the policy loss ``name`` (a key of POLICY_LOSSES) on ``inputs``; errors as ``estimate``."""
    if name not in POLICY_LOSSES:
        raise ValueError(f"name: unknown policy loss {name!r}; {_suggest(name, list(POLICY_LOSSES))}")
    result: PolicyLoss = run_method(name, POLICY_LOSSES[name], inputs, options or {}, None)
    return result
