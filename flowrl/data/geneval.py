"""The GenEval metadata of a prompt: its schema, checked in one place for files, worlds and rewards alike.

``include``: clauses {class, count, color?, position?: [relation, index]} that a picture must satisfy; ``exclude``:
clauses {class, count} that it must stay below. A position reads: this object stands in ``relation`` to the object of
clause ``index``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, TypeGuard

RELATIONS = ("left of", "right of", "above", "below")


def fault(metadata: Mapping[str, Any]) -> str:
    """Say what is wrong with ``include`` and ``exclude``, or "" where both are right.

    include must be there and hold at least one clause; exclude may be missing. Further keys of the metadata are not
    looked at.
    """
    if "include" not in metadata:
        return 'key "include" is missing'
    include = metadata["include"]
    if not isinstance(include, list | tuple) or not include:
        return f'"include" must be a list of at least one clause, got {include!r}'
    for index, clause in enumerate(include):
        problem = _clause_fault(clause, ("class", "count", "color", "position"))
        if not problem and "position" in clause:
            problem = _position_fault(clause["position"], index, len(include))
        if problem:
            return f"include[{index}]: {problem}"
    exclude = metadata.get("exclude", [])
    if not isinstance(exclude, list | tuple):
        return f'"exclude" must be a list of clauses, got {exclude!r}'
    for index, clause in enumerate(exclude):
        problem = _clause_fault(clause, ("class", "count"))
        if problem:
            return f"exclude[{index}]: {problem}"
    return ""


def _clause_fault(clause: object, allowed: tuple[str, ...]) -> str:
    if not isinstance(clause, Mapping):
        return f"a clause must be an object, got {clause!r}"
    unknown = [key for key in clause if key not in allowed]
    if unknown:
        return f'unknown key "{unknown[0]}"; a clause has {", ".join(allowed)}'
    for key in ("class", "color"):
        if (key == "class" or key in clause) and not _is_text(clause.get(key)):
            return f'"{key}" must be a non-empty text, got {clause.get(key)!r}'
    count = clause.get("count")
    if not _is_int(count) or count < 1:
        return f'"count" must be an integer of at least 1, got {count!r}'
    return ""


def _position_fault(position: object, own: int, clauses: int) -> str:
    if not isinstance(position, list | tuple) or len(position) != 2:
        return f'"position" must be [relation, index], got {position!r}'
    relation, target = position
    if relation not in RELATIONS:
        return f'"position" has relation {relation!r}; use one of {", ".join(RELATIONS)}'
    if not _is_int(target) or not 0 <= target < clauses or target == own:
        return f'"position" must point at another clause (0 to {clauses - 1}, not {own}), got {target!r}'
    return ""


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)
