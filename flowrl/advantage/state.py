"""What a method remembers between iterations: a plain dataclass of tensors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Self

from torch import Tensor


@dataclass(frozen=True)
class State:
    """Base of every state: its fields are tensors, and nothing changes in place.

    A method with memory has a subclass of this and a pure function ``update(state, ...) -> state``.
    """

    def state_dict(self) -> dict[str, Tensor]:
        """Return the fields by name, contiguous copies that safetensors can write."""
        return {f.name: vars(self)[f.name].detach().clone().contiguous() for f in fields(self)}

    @classmethod
    def from_state_dict(cls, tensors: Mapping[str, Tensor]) -> Self:
        """Build the state from ``state_dict``; raises ValueError where a name is missing or unknown."""
        names = {f.name for f in fields(cls)}
        if set(tensors) != names:
            raise ValueError(f"{cls.__name__}: expected tensors {sorted(names)}, got {sorted(tensors)}")
        return cls(**{name: tensors[name] for name in names})
