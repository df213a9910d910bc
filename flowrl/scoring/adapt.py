"""From what a user wrote (a class, an object, a plain function) to a reward of our protocol.

A class has ``score(batch: RewardBatch) -> RewardResult``, or ``compare(first, second)`` to judge pairs; ``args`` are its
constructor's. Anything else that can be called, a method ``score`` that takes more than a batch among it, returns one
float or None a picture (or the pair (scores, extras) of flow_grpo), and says by the names of its parameters what it wants:

    images      uint8 [B, H, W, 3]                        metadata    one mapping a sample
    videos      uint8 [B, F, H, W, 3]                     group_ids   one int a sample
    completions pictures or videos, TRL's word            reference   media that were edited, as images
    prompts     one text a sample                         latents     x0 [B, ...] (``batch``: with needs_latents = True)
    batch       the RewardBatch itself                    log_extra, log_metric   as in TRL
    first, second   two RewardBatches: a judge of pairs, see flowrl.scoring.scopes

Any other parameter takes its value from ``args``; one without a default that ``args`` does not give is a metadata
column of that name, one value a sample (the convention of TRL). ``**kwargs`` is taken for TRL's sake where there is no
``metadata``: it receives every further column that all samples have.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from flowrl.config.rewards import apply_preset, short_name, split_preset
from flowrl.config.schema import RewardEntry
from flowrl.errors import UserError
from flowrl.protocols import Reward
from flowrl.records import RewardBatch, RewardResult
from flowrl.registry import RUNTIME_PARAMETERS, check_arguments, resolve
from flowrl.scoring.returned import as_result
from flowrl.scoring.rows import take
from flowrl.scoring.scopes import GroupWise, PairWise, gather

MEDIA = ("images", "videos", "completions", "batch", "latents")
TEXT_ONLY = ("completion_ids", "trainer_state")


@dataclass
class Adapted:
    """A reward made of something else, with what that says of itself (see protocols.Reward)."""

    name: str
    score: Callable[[RewardBatch], RewardResult]
    scope: str = "sample"
    minimum: float = -np.inf
    media: frozenset[str] = frozenset()
    backbone: str = ""
    deterministic: bool = False
    licence: str = ""
    needs_latents: bool = False
    offload: Callable[[], None] = lambda: None
    onload: Callable[[], None] = lambda: None


def load_reward(entry: RewardEntry) -> Reward:
    """Resolve the name of a config entry (registry key with or without preset, ``module:attr`` or ``path.py:attr``) and
    adapt what it names.

    Raises UserError for an unknown name, wrong arguments, or an unusable signature.
    """
    key, _ = split_preset(entry.name)
    found = resolve("reward", key)
    args, divisor = apply_preset(entry.name, entry.args, found)
    if inspect.isclass(found):
        problems = check_arguments("reward", key, args)
        if problems:
            raise UserError(f"reward {key!r}: args: " + "; ".join(problems))
    reward = as_reward(found, short_name(entry.name), args, entry.opponents)
    return reward if divisor == 1.0 else _adapted(reward, reward.name, _Divided(reward, divisor).score)


def as_reward(obj: Any, name: str, args: Mapping[str, Any], opponents: int = 0) -> Reward:
    """Make a Reward of a class, an object, or a function (see the module's text).

    args: keyword arguments of the constructor or of the function, checked against its signature. opponents: of a judge of
    pairs, how many each member meets, 0 for all. Raises UserError.
    """
    if inspect.isclass(obj):
        return _of_object(_made(obj, name, args), name, {}, opponents)
    if _method(obj, "score") or _method(obj, "compare"):
        if args:
            raise UserError(f"reward {name!r}: it is an object that is made already; remove args {', '.join(args)}")
    elif not callable(obj):
        raise UserError(f"reward {name!r}: {type(obj).__name__} is neither a class with score(batch) nor a function")
    return _of_object(obj, name, args, opponents)


def _made(cls: type[Any], name: str, args: Mapping[str, Any]) -> Any:
    called = any("__call__" in vars(base) for base in cls.__mro__)
    if not (_method(cls, "score") or _method(cls, "compare") or called):
        raise UserError(
            f"reward {name!r}: class {cls.__name__} has no method score(batch: RewardBatch) -> RewardResult"
        )
    signature = inspect.signature(cls)
    if all(p.kind is not p.VAR_KEYWORD for p in signature.parameters.values()):
        _refuse_unknown(args, list(signature.parameters), name)
    try:
        signature.bind(**args)
    except TypeError as error:
        raise UserError(f"reward {name!r}: args: {error}; its signature is {signature}") from error
    try:
        return cls(**args)
    except UserError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"reward {name!r}: cannot be made: {type(error).__name__}: {error}") from error


def _of_object(obj: Any, name: str, args: Mapping[str, Any], opponents: int) -> Reward:
    """An object with score or compare, or anything callable."""
    own = obj.name if isinstance(getattr(obj, "name", None), str) else name
    scope = getattr(obj, "scope", "sample")
    if scope not in ("sample", "pair", "group"):
        raise UserError(f"reward {name!r}: scope is {scope!r}; use sample, pair or group")
    if _method(obj, "compare"):
        return _adapted(obj, own, PairWise(obj, own, opponents).score, "pair")
    if _method(obj, "score"):
        if _takes_batch(obj.score):
            return _scoped(obj, own, obj.score, scope)
        called = obj.score
    else:
        called = obj
    parameters = _checked_parameters(called, own)
    if {"first", "second"} <= {p.name for p in parameters}:
        return _adapted(obj, own, PairWise(_FunctionJudge(called, own, args), own, opponents).score, "pair")
    function = _FunctionReward(called, own, args, getattr(obj, "media", None))
    return _scoped(obj, own, function.score, scope, function.media)


def _scoped(
    obj: Any, name: str, score: Callable[[RewardBatch], RewardResult], scope: str, media: frozenset[str] | None = None
) -> Reward:
    if scope == "pair":
        raise UserError(
            f"reward {name!r}: scope is pair, so it needs compare(first: RewardBatch, second: RewardBatch) -> RewardResult"
        )
    if scope == "group":
        return _adapted(obj, name, GroupWise(Adapted(name, score)).score, "group", media)
    if media is None and score == getattr(obj, "score", None) and isinstance(getattr(obj, "name", None), str):
        ready: Reward = obj
        return ready
    return _adapted(obj, name, score, "sample", media)


def _adapted(
    target: Any,
    name: str,
    score: Callable[[RewardBatch], RewardResult],
    scope: str = "",
    media: frozenset[str] | None = None,
) -> Adapted:
    default = Adapted(name, score)
    said = {key: getattr(target, key, vars(default)[key]) for key in vars(default) if key not in ("name", "score")}
    made = replace(default, **said)
    return replace(made, scope=scope or made.scope, media=made.media if media is None else media)


def _method(obj: Any, name: str) -> bool:
    return callable(getattr(obj, name, None))


def _takes_batch(score: Callable[..., Any]) -> bool:
    """Whether a method is our protocol's: one required parameter, which is not called as one of a function's."""
    try:
        parameters = inspect.signature(score).parameters.values()
    except ValueError:  # written in C
        return True
    needed = [p.name for p in parameters if p.default is p.empty and p.kind not in (p.VAR_KEYWORD, p.VAR_POSITIONAL)]
    return len(needed) <= 1 and not set(needed) & (RUNTIME_PARAMETERS - {"batch"})


def _refuse_unknown(args: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    for key in args:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise UserError(f"reward {name!r}: args: unknown argument {key!r}; {hint}")


class _Divided:
    """A reward whose scores are divided by a number; component "native" keeps them as they were."""

    def __init__(self, reward: Reward, divisor: float) -> None:
        self._reward, self._divisor = reward, divisor

    def score(self, batch: RewardBatch) -> RewardResult:
        result = self._reward.score(batch)
        scores = (result.scores / self._divisor).astype(np.float32)
        return replace(result, scores=scores, components={**result.components, "native": result.scores})


class _Arguments:
    """What a function's parameters are to be given."""

    def __init__(self, function: Callable[..., Any], name: str, args: Mapping[str, Any]) -> None:
        self.name = name
        self._function = function
        self._args = dict(args)
        parameters = _checked_parameters(function, name)
        named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        _refuse_unknown(args, [p.name for p in named if p.name not in RUNTIME_PARAMETERS], name)
        self.given = [p.name for p in named if p.name in RUNTIME_PARAMETERS]
        self.needed = [p.name for p in named if p.default is p.empty]
        self.columns = [name for name in self.needed if name not in (*RUNTIME_PARAMETERS, *args)]
        self.open = len(named) < len(parameters)

    def call(self, offered: Mapping[str, Any], metadata: Sequence[Mapping[str, Any]]) -> Any:
        keywords = {name: offered[name] for name in self.given} | self._args
        columns = list(self.columns)
        if self.open:
            shared = set.intersection(*(set(row) for row in metadata))
            columns = sorted(shared - keywords.keys() - RUNTIME_PARAMETERS)
        for column in columns:
            keywords[column] = [row[column] for row in metadata]
        return self._function(**keywords)


class _FunctionReward:
    """A plain function, called by keyword with what its signature asks for."""

    def __init__(
        self, function: Callable[..., Any], name: str, args: Mapping[str, Any], media: frozenset[str] | None
    ) -> None:
        self.name = name
        self._arguments = _Arguments(function, name, args)
        given = self._arguments.given
        plain = {"image"} if "images" in given else {"video"} if "videos" in given else {"image", "video"}
        self.media = frozenset(plain) if media is None else media

    def score(self, batch: RewardBatch) -> RewardResult:
        errors: list[str | None] = [self._missing(metadata) for metadata in batch.metadata]
        rows = [index for index, error in enumerate(errors) if error is None]
        if not rows:
            return RewardResult(_empty(len(batch)), np.zeros(len(batch), np.bool_), errors)
        part = batch if len(rows) == len(batch) else take(batch, rows)
        result = self._scores(part)
        if part is batch:
            return result
        whole = gather(len(batch), [(rows, result)])
        return replace(whole, errors=[new or old for new, old in zip(whole.errors, errors, strict=True)])

    def _missing(self, metadata: Mapping[str, Any]) -> str | None:
        lacking = [column for column in self._arguments.columns if column not in metadata]
        return f"{self.name}: the prompt's metadata has no {lacking[0]!r}" if lacking else None

    def _scores(self, batch: RewardBatch) -> RewardResult:
        kind = "video" if batch.images.ndim == 5 else "image"
        if kind not in self.media:
            raise UserError(
                f"reward {self.name!r}: scores {' and '.join(sorted(self.media))}s, and these are {kind}s "
                f"{list(batch.images.shape)}; name its parameter {kind}s, or set its attribute media"
            )
        for name, value in (("reference", batch.reference), ("latents", batch.latents)):
            if name in self._arguments.needed and value is None:
                raise UserError(f"reward {self.name!r}: needs {name}, and this run has none; choose another reward")
        log = _Log(self.name, len(batch))
        offered = {
            "batch": batch, "images": batch.images, "videos": batch.images, "completions": batch.images,
            "prompts": list(batch.prompts), "metadata": list(batch.metadata), "group_ids": list(batch.group_ids),
            "reference": batch.reference, "latents": batch.latents, "log_extra": log.extra, "log_metric": log.metric,
        }  # fmt: skip
        return log.added_to(as_result(self._arguments.call(offered, batch.metadata), self.name, len(batch)))


class _FunctionJudge:
    """A function of ``first`` and ``second``: how much better the first picture of each pair is."""

    def __init__(self, function: Callable[..., Any], name: str, args: Mapping[str, Any]) -> None:
        self.name = name
        self._arguments = _Arguments(function, name, args)

    def compare(self, first: RewardBatch, second: RewardBatch) -> RewardResult:
        offered = {"first": first, "second": second, "prompts": list(first.prompts), "metadata": list(first.metadata)}
        unknown = [key for key in self._arguments.given if key not in offered]
        if unknown:
            raise UserError(
                f"reward {self.name!r}: a judge of pairs has no {unknown[0]}; it takes first, second, prompts, metadata "
                "and columns, and first.images and second.images are its pictures"
            )
        lacking = [c for c in self._arguments.columns if any(c not in row for row in first.metadata)]
        if lacking:
            raise UserError(f"reward {self.name!r}: the metadata of a prompt has no {lacking[0]!r}")
        return as_result(self._arguments.call(offered, first.metadata), self.name, len(first))


class _Log:
    """TRL's log_extra(column, values) and log_metric(name, value): numbers become components, texts details."""

    def __init__(self, name: str, count: int) -> None:
        self._name, self._count = name, count
        self._components: dict[str, npt.NDArray[np.float32]] = {}
        self._details: list[str | None] = []

    def extra(self, column: str, values: Sequence[Any]) -> None:
        if len(values) != self._count:
            raise UserError(
                f"reward {self._name!r}: log_extra({column!r}) has {len(values)} values for {self._count} pictures"
            )
        if all(isinstance(value, Real) for value in values):
            self._components[column] = np.array(values, np.float32)
        else:
            old = self._details or [None] * self._count
            self._details = [
                "; ".join([*([] if text is None else [text]), f"{column}: {value}"])
                for text, value in zip(old, values, strict=True)
            ]

    def metric(self, name: str, value: float) -> None:
        self._components[name] = np.full(self._count, value, np.float32)

    def added_to(self, result: RewardResult) -> RewardResult:
        if not self._components and not self._details:
            return result
        components = {**result.components, **self._components}
        return replace(result, components=components, details=self._details or result.details)


def _checked_parameters(function: Callable[..., Any], name: str) -> list[inspect.Parameter]:
    """The parameters of a usable signature. Raises UserError with what to write instead."""
    advice = "write it as f(images, prompts) or f(images, prompts, metadata), further parameters being args or columns"
    try:
        parameters = list(inspect.signature(function).parameters.values())
    except ValueError as error:
        raise UserError(f"reward {name!r}: its signature cannot be read ({error}); {advice}") from error
    if inspect.iscoroutinefunction(function):
        raise UserError(f"reward {name!r}: is an async function; make it a plain one")
    names = [p.name for p in parameters]
    for parameter in parameters:
        if parameter.kind in (parameter.POSITIONAL_ONLY, parameter.VAR_POSITIONAL):
            raise UserError(f"reward {name!r}: parameter {parameter} cannot be passed by name; {advice}")
        if parameter.kind is parameter.VAR_KEYWORD and "metadata" in names:
            raise UserError(f"reward {name!r}: takes both metadata and {parameter}; remove {parameter}")
        if parameter.name in TEXT_ONLY and parameter.default is parameter.empty:
            raise UserError(
                f"reward {name!r}: {parameter.name} belongs to text training and is not given here; remove it, or give "
                "it a default"
            )
    if not set(names) & set(MEDIA) and not {"first", "second"} <= set(names):
        raise UserError(f"reward {name!r}: f({', '.join(map(str, parameters))}) takes no pictures; {advice}")
    return parameters


def _empty(count: int) -> npt.NDArray[np.float32]:
    return np.full(count, np.nan, np.float32)
