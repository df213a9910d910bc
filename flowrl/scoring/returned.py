"""Reading what a plain function returned: one number or None a picture, with flowrl's or flow_grpo's extras."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from numbers import Real
from typing import Any

import numpy as np
import numpy.typing as npt

from flowrl.errors import UserError
from flowrl.records import RewardResult

NO_VALUE = "returned no value (None or NaN)"


def as_result(value: Any, name: str, count: int) -> RewardResult:
    """Scores, the pair (scores, extras) of flow_grpo, or a RewardResult, as a RewardResult. Raises UserError."""
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
