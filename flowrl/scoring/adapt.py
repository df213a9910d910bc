"""From what a user wrote (a class, a plain function) to a reward of our protocol.

A class has ``score(batch: RewardBatch) -> RewardResult``; ``args`` are its constructor's. A function returns one float
or None a picture, and says by the names of its parameters what it wants:

    images      uint8 [B, H, W, 3]                        metadata    one mapping a sample
    prompts     one text a sample                         group_ids   one int a sample
    batch       the RewardBatch itself

Any other parameter takes its value from ``args``; one without a default that ``args`` does not give is a metadata
column of that name, one value a sample (the convention of TRL). ``**kwargs`` is taken for TRL's sake where there is no
``metadata``: it receives every further column that all samples have. The pair (scores, extras) of flow_grpo is
understood.
"""

from __future__ import annotations

import dataclasses
import difflib
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from flowrl.config.schema import RewardEntry
from flowrl.errors import UserError
from flowrl.protocols import Reward
from flowrl.records import RewardBatch, RewardResult
from flowrl.registry import check_arguments, resolve

GIVEN = ("batch", "images", "prompts", "metadata", "group_ids")
NO_VALUE = "returned no value (None or NaN)"


def load_reward(entry: RewardEntry) -> Reward:
    """Resolve the name of a config entry (registry key, ``module:attr`` or ``path.py:attr``) and adapt what it names.

    Raises UserError for an unknown name, wrong arguments, or an unusable signature.
    """
    found = resolve("reward", entry.name)
    if inspect.isclass(found):
        problems = check_arguments("reward", entry.name, entry.args)
        if problems:
            raise UserError(f"reward {entry.name!r}: args: " + "; ".join(problems))
    return as_reward(found, short_name(entry.name), entry.args)


def short_name(name: str) -> str:
    """A registry key as it is; the part behind the colon of ``module:attr`` and ``path.py:attr``."""
    return name.rpartition(":")[2]


def as_reward(obj: Any, name: str, args: Mapping[str, Any]) -> Reward:
    """Make a Reward of a class with ``score``, an object with ``score``, or a function (see the module's text).

    args: keyword arguments of the constructor or of the function, checked against its signature. Raises UserError.
    """
    if inspect.isclass(obj):
        return _from_class(obj, name, args)
    if _scores_batches(obj):
        if args:
            raise UserError(f"reward {name!r}: it is an object that is made already; remove args {_listed(args)}")
        return _named(obj, name)
    if not callable(obj):
        raise UserError(f"reward {name!r}: {type(obj).__name__} is neither a class with score(batch) nor a function")
    return _FunctionReward(obj, name, args)


def _from_class(cls: type[Any], name: str, args: Mapping[str, Any]) -> Reward:
    if not _scores_batches(cls):
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
        made = cls(**args)
    except UserError:
        raise
    except (ValueError, TypeError, OSError, ImportError) as error:
        raise UserError(f"reward {name!r}: cannot be made: {type(error).__name__}: {error}") from error
    return _named(made, name)


def _scores_batches(obj: Any) -> bool:
    return hasattr(obj, "score") and callable(obj.score)


def _named(reward: Any, name: str) -> Reward:
    if hasattr(reward, "name") and isinstance(reward.name, str):
        named: Reward = reward
        return named
    return _Named(reward.score, name)


@dataclasses.dataclass
class _Named:
    """An object with ``score`` and no name of its own."""

    score: Callable[[RewardBatch], RewardResult]
    name: str


def _refuse_unknown(args: Mapping[str, Any], known: Sequence[str], name: str) -> None:
    for key in args:
        if key not in known:
            near = difflib.get_close_matches(key, known, 1)
            hint = f"did you mean {near[0]!r}?" if near else f"it takes {', '.join(known) or 'none'}"
            raise UserError(f"reward {name!r}: args: unknown argument {key!r}; {hint}")


def _listed(names: Mapping[str, Any] | Sequence[str]) -> str:
    return ", ".join(names)


class _FunctionReward:
    """A plain function, called by keyword with what its signature asks for."""

    def __init__(self, function: Callable[..., Any], name: str, args: Mapping[str, Any]) -> None:
        self.name = name
        self._function = function
        self._args = dict(args)
        parameters = _checked_parameters(function, name)
        named = [p for p in parameters if p.kind is not p.VAR_KEYWORD]
        _refuse_unknown(args, [p.name for p in named if p.name not in GIVEN], name)
        self._given = [p.name for p in named if p.name in GIVEN]
        self._columns = [p.name for p in named if p.name not in (*GIVEN, *args) and p.default is p.empty]
        self._open = len(named) < len(parameters)

    def score(self, batch: RewardBatch) -> RewardResult:
        errors: list[str | None] = [self._missing(metadata) for metadata in batch.metadata]
        rows = [index for index, error in enumerate(errors) if error is None]
        if not rows:
            return RewardResult(_empty(len(batch)), np.zeros(len(batch), np.bool_), errors)
        result = _as_result(self._call(_take(batch, rows)), self.name, len(rows))
        return result if len(rows) == len(batch) else _spread(result, rows, errors)

    def _missing(self, metadata: Mapping[str, Any]) -> str | None:
        lacking = [column for column in self._columns if column not in metadata]
        return f"{self.name}: the prompt's metadata has no {lacking[0]!r}" if lacking else None

    def _call(self, batch: RewardBatch) -> Any:
        given = {
            "batch": batch,
            "images": batch.images,
            "prompts": list(batch.prompts),
            "metadata": list(batch.metadata),
            "group_ids": list(batch.group_ids),
        }
        keywords = {name: given[name] for name in self._given} | self._args
        columns = list(self._columns)
        if self._open:
            shared = set.intersection(*(set(row) for row in batch.metadata))
            columns = sorted(shared - keywords.keys() - set(GIVEN))
        for column in columns:
            keywords[column] = [row[column] for row in batch.metadata]
        return self._function(**keywords)


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
    if "images" not in names and "batch" not in names:
        raise UserError(f"reward {name!r}: f({', '.join(map(str, parameters))}) takes no pictures; {advice}")
    return parameters


def _take(batch: RewardBatch, rows: list[int]) -> RewardBatch:
    if len(rows) == len(batch):
        return batch
    return dataclasses.replace(
        batch,
        images=batch.images[rows],
        prompts=[batch.prompts[row] for row in rows],
        metadata=[batch.metadata[row] for row in rows],
        group_ids=[batch.group_ids[row] for row in rows] if batch.group_ids else (),
        latents=None if batch.latents is None else batch.latents[rows],
    )


def _spread(part: RewardResult, rows: list[int], errors: list[str | None]) -> RewardResult:
    """Put the result of some rows back among the rows that could not be scored."""
    count = len(errors)
    scores, valid = _empty(count), np.zeros(count, np.bool_)
    scores[rows], valid[rows] = part.scores, part.valid
    merged = list(errors)
    details: list[str | None] = [None] * count
    for place, row in enumerate(rows):
        merged[row] = part.errors[place]
        if part.details:
            details[row] = part.details[place]
    components = {}
    for name, values in part.components.items():
        components[name] = _empty(count)
        components[name][rows] = values
    return RewardResult(scores, valid, merged, components, details if part.details else ())


def _empty(count: int) -> npt.NDArray[np.float32]:
    return np.full(count, np.nan, np.float32)


def _as_result(value: Any, name: str, count: int) -> RewardResult:
    if isinstance(value, RewardResult):
        return value
    extras: Any = None
    if isinstance(value, tuple) and len(value) == 2 and _is_sequence(value[0]):
        value, extras = value
    scores = read_scores(value, name, count)
    valid = ~np.isnan(scores)
    errors = [None if ok else f"{name}: {NO_VALUE}" for ok in valid]
    return RewardResult(scores, valid, errors, _components(extras, count))


def _is_sequence(value: Any) -> bool:
    value = _plain(value)
    return isinstance(value, list | tuple) or (isinstance(value, np.ndarray) and value.ndim > 0)


def _components(extras: Any, count: int) -> dict[str, npt.NDArray[np.float32]]:
    """What of flow_grpo's extras can be logged: arrays of one number a sample. Others are for the function's own
    use."""
    found = {}
    for key, values in extras.items() if isinstance(extras, Mapping) else ():
        array = _plain(values)
        if isinstance(array, list | tuple) and all(isinstance(item, Real) for item in array):
            array = np.array(array)
        if isinstance(array, np.ndarray) and array.dtype.kind in "fiub" and array.shape == (count,):
            found[str(key)] = array.astype(np.float32)
    return found


def read_scores(value: Any, name: str, count: int) -> npt.NDArray[np.float32]:
    """Scores that a function returned, as float32 [count] with NaN for None.

    Takes a list, tuple, 1-D numpy array or 1-D torch tensor of numbers. Raises UserError for another length, shape or
    type.
    """
    expected = f"return one float (or None) a picture, {count} in all"
    value = _plain(value)
    if not isinstance(value, list | tuple | np.ndarray):
        raise UserError(f"reward {name!r}: returned {type(value).__name__} for {count} pictures; {expected}")
    if isinstance(value, np.ndarray):
        if value.ndim != 1:
            raise UserError(f"reward {name!r}: returned shape {list(value.shape)} for {count} pictures; {expected}")
        if value.dtype.kind not in "fiubO":
            raise UserError(f"reward {name!r}: returned dtype {value.dtype} for {count} pictures; {expected}")
    if len(value) != count:
        raise UserError(f"reward {name!r}: returned {len(value)} scores for {count} pictures; {expected}")
    with np.errstate(over="ignore"):  # beyond float32 is inf, which the runtime marks as invalid
        if isinstance(value, np.ndarray) and value.dtype.kind != "O":
            return value.astype(np.float32)
        return np.array([_number(item, name, row, expected) for row, item in enumerate(value)], np.float32)


def _number(item: Any, name: str, row: int, expected: str) -> float:
    item = _plain(item)
    if item is None:
        return float("nan")
    if isinstance(item, np.ndarray) and item.ndim == 0:
        item = item.item()
    if isinstance(item, Real | np.bool_):
        return float(item)
    raise UserError(f"reward {name!r}: returned {type(item).__name__} {item!r} for picture {row}; {expected}")


def _plain(value: Any) -> Any:
    """A torch tensor as a numpy array; torch is not imported for it."""
    torch = sys.modules.get("torch")
    if torch is None or not isinstance(value, torch.Tensor):
        return value
    value = value.detach().cpu()
    return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
