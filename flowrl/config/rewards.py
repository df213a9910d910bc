"""What a list of rewards means: labels, presets, shaping steps, roles; and the checks of all of it.

A light module: neither torch nor numpy is loaded, but a reward's own module is, to see what it takes and declares.
"""

from __future__ import annotations

import inspect
import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from flowrl import registry
from flowrl.config.process import ProcessEntry
from flowrl.config.render import to_plain
from flowrl.config.schema import Config, Executor, RewardEntry
from flowrl.errors import UserError

ShapeKind = Literal["affine", "clip", "sigmoid", "rank", "gate"]
_LABEL = re.compile(r"[A-Za-z0-9_][\w.-]*")
_GATE_KEYS = ("by", "at_least", "at_most", "otherwise")


@dataclass(frozen=True)
class Shape:
    """One shaping step, read and checked. numbers: of affine, clip and sigmoid; the rest is a gate's.

    A gate is open where the score of ``by`` lies within [at_least, at_most]; a closed one gives ``otherwise``, and masks
    the sample where that is None.
    """

    kind: ShapeKind
    numbers: tuple[float, ...] = ()
    by: str = ""
    at_least: float = -math.inf
    at_most: float = math.inf
    otherwise: float | None = 0.0


# ---------------------------------------------------------------------------------------------------------- names


def split_preset(name: str) -> tuple[str, str]:
    """Part ``pickscore/26`` into a registry key and a preset ("" for none); names with a colon have none."""
    if ":" in name:
        return name, ""
    key, _, preset = name.partition("/")
    return key, preset


def short_name(name: str) -> str:
    """A registry key without its preset; the part behind the colon of ``module:attr`` and ``path.py:attr``."""
    return split_preset(name)[0].rpartition(":")[2]


def labels(entries: Sequence[RewardEntry] | Sequence[ProcessEntry]) -> list[str]:
    """What each (process) reward is called in metrics: its label, else its short name; a second one alike gets ``_2``."""
    found: list[str] = []
    for entry in entries:
        base = entry.label or short_name(entry.name)
        label, number = base, 1
        while label in found:
            number += 1
            label = f"{base}_{number}"
        found.append(label)
    return found


def judging(config: Config) -> tuple[RewardEntry, ...]:
    """The rewards of an evaluation: its own, or those of training; and gold in either case."""
    if not config.evaluation.rewards:
        return config.rewards
    return (*config.evaluation.rewards, *(entry for entry in config.rewards if entry.duty == "gold"))


def concise(entry: RewardEntry) -> dict[str, Any]:
    """An entry as plain data: name, weight, args, and what else differs from the defaults."""
    plain: dict[str, Any] = to_plain(entry)
    usual = to_plain(RewardEntry(name=entry.name))
    return {key: value for key, value in plain.items() if key in ("name", "weight", "args") or value != usual[key]}


def declared(name: str, attribute: str) -> Any:
    """What a reward's class or function says of itself (scope, backbone, minimum, presets), None where it says nothing.

    A name that cannot be resolved says nothing either: that is reported where names are checked.
    """
    try:
        target = registry.resolve("reward", split_preset(name)[0])
    except UserError:
        return None
    found = getattr(target, attribute, None)
    return None if isinstance(found, property) else found


def apply_preset(name: str, args: Mapping[str, Any], target: object) -> tuple[dict[str, Any], float]:
    """What a name's preset means: the arguments to make the reward with, and the number to divide its scores by.

    A preset that the reward lists in ``presets`` becomes its argument ``preset``; any other one is a number. Raises
    UserError for a preset that is neither.
    """
    key, preset = split_preset(name)
    known = getattr(target, "presets", None) or ()
    if not preset:
        return dict(args), 1.0
    if preset in known:
        return {**args, "preset": preset}, 1.0
    try:
        number = float(preset)
    except ValueError:
        number = math.nan
    if not math.isfinite(number) or number == 0:
        listed = ", ".join(f"{key}/{other}" for other in known)
        raise UserError(
            f"{key} has no preset {preset!r}; use {listed or 'none'}, or {key}/26 to divide its scores by 26"
        )
    return dict(args), number


# -------------------------------------------------------------------------------------------------------- shaping


def read_shaping(steps: Iterable[Mapping[str, Any]]) -> tuple[tuple[Shape, ...], list[str]]:
    """Read shaping steps as a config writes them; returns the good ones and, as ``index: what``, what is wrong."""
    shapes, problems = [], []
    for index, step in enumerate(steps):
        made = _read_step(step)
        if isinstance(made, Shape):
            shapes.append(made)
        else:
            problems.append(f"{index}: {made}")
    return tuple(shapes), problems


def _read_step(step: Mapping[str, Any]) -> Shape | str:
    if len(step) != 1:
        return (
            f"expected one step, found {len(step)} keys; write each step as an item of its own, as in {{clip: [0, 1]}}"
        )
    ((kind, given),) = step.items()
    if kind not in _READERS:
        return f"unknown step {kind!r}; use {', '.join(_READERS)}"
    return _READERS[kind](given)


def _numbers(given: Any, what: str) -> tuple[float, float] | str:
    if not isinstance(given, list | tuple) or len(given) != 2 or not all(_is_number(v) for v in given):
        return f"expected [{what}], two numbers, found {given!r}"
    return float(given[0]), float(given[1])


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _affine(given: Any) -> Shape | str:
    found = _numbers(given, "scale, offset")
    return found if isinstance(found, str) else Shape("affine", found)


def _clip(given: Any) -> Shape | str:
    found = _numbers(given, "low, high")
    if not isinstance(found, str) and found[0] >= found[1]:
        found = f"low {found[0]:g} is not below high {found[1]:g}; give them in order"
    return found if isinstance(found, str) else Shape("clip", found)


def _sigmoid(given: Any) -> Shape | str:
    found = _numbers(given, "centre, width")
    if not isinstance(found, str) and found[1] <= 0:
        found = f"width {found[1]:g} is not above 0; scale by affine: [-1, 0] first to turn the curve round"
    return found if isinstance(found, str) else Shape("sigmoid", found)


def _rank(given: Any) -> Shape | str:
    return Shape("rank") if given in ({}, None) else f"rank takes nothing, found {given!r}; write {{rank: {{}}}}"


def _gate(given: Any) -> Shape | str:
    if not isinstance(given, Mapping) or not isinstance(given.get("by"), str) or not given["by"]:
        return "gate needs by: the label of another reward, as in {gate: {by: nsfw, at_most: 0.5}}"
    for key in given:
        if key not in _GATE_KEYS:
            return f"gate has no {key!r}; it takes {', '.join(_GATE_KEYS)}"
    bounds = {key: given[key] for key in ("at_least", "at_most") if key in given}
    if not bounds or not all(_is_number(value) for value in bounds.values()):
        return "gate needs at_least, at_most or both, as numbers: the scores between which it is open"
    if len(bounds) == 2 and bounds["at_least"] > bounds["at_most"]:
        return f"gate is never open: at_least {bounds['at_least']:g} is above at_most {bounds['at_most']:g}"
    closed = given.get("otherwise", 0.0)
    if closed != "mask" and not _is_number(closed):
        return f"gate.otherwise is {closed!r}; give the score of closed samples, or mask to leave them out"
    low, high = float(given.get("at_least", -math.inf)), float(given.get("at_most", math.inf))
    return Shape("gate", (), given["by"], low, high, None if closed == "mask" else float(closed))


_READERS: Mapping[str, Callable[[Any], Shape | str]] = {
    "affine": _affine, "clip": _clip, "sigmoid": _sigmoid, "rank": _rank, "gate": _gate,
}  # fmt: skip


# --------------------------------------------------------------------------------------------------------- checks


def problems(config: Config) -> Iterator[str]:
    """Everything that is wrong with the rewards of a config, each as ``key.path: what; what to do``."""
    if not config.rewards:
        yield "rewards: none given; add one, as in rewards='[{name: compositional}]' (flowrl rewards list names them)"
    elif not any(entry.duty == "train" for entry in config.rewards):
        if all(entry.weight == 0 for entry in config.rewards):
            yield "rewards: every weight is 0, so nothing is trained on; give one a weight such as 1.0"
        else:
            yield "rewards: none has role train, so nothing is trained on; give one that role and a weight"
    for section, entries in (("rewards", config.rewards), ("evaluation.rewards", config.evaluation.rewards)):
        yield from _entries(section, entries)
        yield from _gates(section, entries)
    yield from _gold(config)
    yield from _values(config)
    for name in ("timeout_s", "total_s"):
        seconds = vars(config.failures)[name]
        if seconds is not None and seconds <= 0:
            yield f"failures.{name}: {seconds:g} is out of range; use seconds above 0, or null for no limit"


def _entries(section: str, entries: Sequence[RewardEntry]) -> Iterator[str]:
    for (_, name), count in Counter((bool(entry.label), entry.label or entry.name) for entry in entries).items():
        if count > 1:
            yield f"{section}: {name} is given {count} times; keep one, or give each a label of its own"
    given = [entry.label for entry in entries if entry.label]
    for index, entry in enumerate(entries):
        key = f"{section}.{index}"
        if entry.label and not _LABEL.fullmatch(entry.label):
            yield f"{key}.label: {entry.label!r} cannot name a metric; use letters, digits, _ . and -"
        if not entry.label and short_name(entry.name) in given:
            yield f"{key}.label: {short_name(entry.name)} is the label of another reward; give this one a label too"
        if entry.role == "gold" and entry.weight == 0:
            yield f"{key}.weight: 0 leaves a gold reward out of the gold score; give it a weight, or use role: monitor"
        if entry.opponents < 0:
            yield f"{key}.opponents: {entry.opponents} is out of range; use 0 for all members, or a number of them"
        for wrong in read_shaping(entry.shaping)[1]:
            yield f"{key}.shaping.{wrong}"
        yield from _executor(key, entry)
        yield from _offload(key, entry)
        yield from _plugin(key, entry)


def _offload(key: str, entry: RewardEntry) -> Iterator[str]:
    if not entry.offload:
        return
    if entry.executor.kind == "http":
        yield f"{key}.offload: where a service keeps its networks is set there; remove it"
    elif entry.executor.kind != "worker" and not (declared(entry.name, "offload") and declared(entry.name, "onload")):
        yield f"{key}.offload: {entry.name} has no offload() and onload() to be called; remove it"


def _executor(key: str, entry: RewardEntry) -> Iterator[str]:
    if entry.executor == Executor():
        return
    # By name: the settings stand on a higher rank.
    settings = registry.resolve("reward", "flowrl.scoring.executors.settings:ExecutorSettings")
    given = {name: value for name, value in vars(entry.executor).items() if value is not None}
    try:
        settings(**given)
    except UserError as error:
        yield f"{key}.{error}"


def _plugin(key: str, entry: RewardEntry) -> Iterator[str]:
    name, _ = split_preset(entry.name)
    if ":" not in name and name not in registry.names("reward"):
        yield f"{key}.name: {registry.unknown('reward', name)}"
        return
    if entry.executor.kind in ("worker", "http"):
        return  # it is loaded elsewhere, where it may need packages that are not here
    try:
        args, _ = apply_preset(entry.name, entry.args, registry.resolve("reward", name))
        yield from (f"{key}.args.{problem}" for problem in registry.check_arguments("reward", name, args))
    except UserError as error:
        yield f"{key}.name: {error}"


def _gates(section: str, entries: Sequence[RewardEntry]) -> Iterator[str]:
    known = dict(zip(labels(entries), entries, strict=True))
    for index, (label, entry) in enumerate(known.items()):
        for place, shape in enumerate(read_shaping(entry.shaping)[0]):
            if shape.kind != "gate":
                continue
            key = f"{section}.{index}.shaping.{place}.gate.by"
            if shape.by == label:
                yield f"{key}: {label} would gate itself; name another reward, or use clip"
            elif shape.by not in known:
                yield f"{key}: no reward is called {shape.by!r}; use one of {', '.join(known)}"
            elif known[shape.by].role == "gold" and entry.duty == "train":
                yield f"{key}: {shape.by} is gold, and a gold reward must not shape what is trained on; add a monitor"


def _gold(config: Config) -> Iterator[str]:
    train = [entry for entry in config.rewards if entry.duty == "train"]
    gates = {shape.by for entry in train for shape in read_shaping(entry.shaping)[0] if shape.kind == "gate"}
    named = zip(labels(config.rewards), config.rewards, strict=True)
    train += [
        entry for label, entry in named if label in gates and entry.duty == "monitor"
    ]  # they shape what is learned
    for section, entries in (("rewards", config.rewards), ("evaluation.rewards", config.evaluation.rewards)):
        for index, entry in enumerate(entries):
            if entry.role != "gold":
                continue
            key = f"{section}.{index}"
            if any((other.name, other.args) == (entry.name, entry.args) for other in train):
                yield f"{key}.role: {entry.name} is trained on as well, so it is no gold; name another reward"
                continue
            mine = declared(entry.name, "backbone")
            shared = [other.name for other in train if mine and declared(other.name, "backbone") == mine]
            if shared and not config.failures.allow_shared_backbone:
                yield f"{key}.role: {shared_backbone(entry.name, shared[0], str(mine))}"
    gold = [entry for entry in config.rewards if entry.role == "gold"]
    judges = labels([*config.evaluation.rewards, *gold]) if config.evaluation.rewards else []
    if any(label != name for label, name in zip(judges[len(config.evaluation.rewards) :], labels(gold), strict=False)):
        yield "evaluation.rewards: a gold reward of rewards has a namesake here; give one of them a label of its own"


def shared_backbone(gold: str, trained: str, backbone: str) -> str:
    """Say that a gold reward is no independent judge of a trained one."""
    return (
        f"{gold} stands on {backbone}, as the trained {trained} does, so it cannot show that one being hacked; choose a "
        "gold reward on another network, or set failures.allow_shared_backbone=true"
    )


def scope_of(entry: RewardEntry) -> str:
    """sample, pair or group: what a reward declares, or is by its signature."""
    if entry.executor.kind in ("worker", "http"):
        return "sample"  # what is loaded elsewhere is not known here
    scope = declared(entry.name, "scope")
    if isinstance(scope, str):
        return scope
    pairs = declared(entry.name, "compare") or {"first", "second"} <= parameters_of(entry.name)
    return "pair" if pairs else "sample"


def reads_latents(entry: RewardEntry) -> bool:
    """Whether a reward reads the latents of a batch: what it declares, or whether a parameter is called ``latents``."""
    said = declared(entry.name, "needs_latents")
    if said is not None:
        return bool(said)
    if declared(entry.name, "differentiable") == "latents":
        return True
    scored = declared(entry.name, "score")
    return "latents" in parameters_of(entry.name) or (callable(scored) and "latents" in _parameters(scored))


def parameters_of(name: str) -> frozenset[str]:
    """The names of a function's parameters; none for a class, and for what cannot be read."""
    try:
        target = registry.resolve("reward", split_preset(name)[0])
    except UserError:
        return frozenset()
    return frozenset() if isinstance(target, type) or not callable(target) else _parameters(target)


def _parameters(function: Callable[..., Any]) -> frozenset[str]:
    try:
        return frozenset(inspect.signature(function).parameters)
    except ValueError:  # written in C
        return frozenset()


def relative(entry: RewardEntry) -> bool:
    """Whether a reward's value depends on the other members of its group, by its scope or by a rank."""
    return scope_of(entry) != "sample" or any("rank" in step for step in entry.shaping)


def _values(config: Config) -> Iterator[str]:
    if config.credit.values == "none":
        return
    for index, entry in enumerate(config.rewards):
        if entry.duty == "train" and relative(entry):
            yield (
                f"credit.values: {config.credit.values} scores states that members share, and rewards.{index} compares "
                "the members of a group; use rewards of single samples, or credit.values=none"
            )
