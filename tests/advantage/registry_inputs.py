"""Random inputs for every estimator and policy loss of the registry, by the names of INPUTS."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from flowrl.advantage.method import Method
from flowrl.advantage.pipeline import inputs_of
from flowrl.advantage.streams import SPOState, sas_init

# Groups of 4, 3, 1 and 4 rows in mixed order, with ids of any spacing; 8 leaves of trees of two levels fit in as well.
GROUP = torch.tensor([70, 5, 70, 5, 900, 5, 70, 70, -3, -3, -3, -3])
ROWS, STEPS, SEGMENTS = len(GROUP), 6, 3
PER_ROW = frozenset(
    "rewards group valid trajectory turn done truncated correct pivot length cost energy outcome probe prompt_value "
    "greedy_reward slot shift choice main_reward bootstrap window_start trust segment_value confidence stage_reward "
    "answer_reward node_path online prefix prefix_id start_value seed_group".split()
)


def mask() -> Tensor:
    """Ragged rows, two of them with a hole; every row has an unmasked step in each segment it reaches."""
    lengths = torch.tensor([6, 4, 5, 6, 3, 6, 2, 6, 5, 6, 4, 6])
    kept = torch.arange(STEPS) < lengths[:, None]
    kept[0, 1] = kept[3, 2] = False
    return kept


def segments() -> Tensor:
    """Two steps a segment, -1 where masked at the end."""
    found = (torch.arange(STEPS) // 2).expand(ROWS, STEPS).clone()
    found[~mask()] = -1
    return found


def _paths() -> Tensor:
    """Level 0 the group's root, level 1 two children a root, level 2 the leaf itself."""
    root = torch.unique(GROUP, return_inverse=True)[1]
    order = torch.zeros(ROWS, dtype=torch.int64)
    for group in root.unique():
        rows = (root == group).nonzero().flatten()
        order[rows] = torch.arange(len(rows)) // 2
    return torch.stack([root, 10 + 2 * root + order, 100 + torch.arange(ROWS)], 1)


def _nodes() -> Tensor:
    """A group shares two steps, its two branches two more, then every row goes alone; masked steps hold junk."""
    paths = _paths()
    return torch.where(mask(), paths.repeat_interleave(2, dim=1), -77)


def _normal(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.randn(*shape, generator=g)


def _flags(*shape: int) -> Callable[[torch.Generator], Tensor]:
    return lambda g: torch.rand(*shape, generator=g) < 0.5


MAKERS: dict[str, Callable[[torch.Generator], Any]] = {
    "rewards": lambda g: (torch.rand(ROWS, generator=g) * 0.9).round(decimals=3),
    "group": lambda g: GROUP.clone(),
    "weights": lambda g: torch.tensor([1.0, 2.0]),
    "mask": lambda g: mask(),
    "step_reward": lambda g: torch.where(mask(), torch.randn(ROWS, STEPS, generator=g), 0.0),
    "step_value": lambda g: 0.05 + 0.9 * torch.rand(ROWS, STEPS, generator=g),
    "start_value": lambda g: 0.05 + 0.9 * torch.rand(ROWS, generator=g),
    "step": lambda g: torch.arange(STEPS).expand(ROWS, STEPS).clone(),
    "node": lambda g: _nodes(),
    "seed_group": lambda g: _paths()[:, 1],
    "trajectory": lambda g: torch.arange(ROWS),
    "segment": lambda g: segments(),
    "anchor": lambda g: (torch.arange(STEPS) + 10).expand(ROWS, STEPS).clone(),
    "node_path": lambda g: _paths(),
    "value": _normal(ROWS, STEPS),
    "value_high": _normal(ROWS, STEPS),
    "value_term": _normal(ROWS, STEPS),
    "value_post": _normal(ROWS, STEPS),
    "segment_value": _normal(ROWS, SEGMENTS + 1),
    "confidence": lambda g: torch.rand(ROWS, SEGMENTS + 1, generator=g),
    "stage_reward": _normal(ROWS, SEGMENTS),
    "answer_reward": _normal(ROWS, SEGMENTS, 2),
    "votes": _flags(3, ROWS, STEPS),
    "entropy": lambda g: 0.5 * torch.rand(ROWS, STEPS, generator=g),
    "log_prob": lambda g: -1 - torch.rand(ROWS, STEPS, generator=g),
    "old_log_prob": lambda g: -1 - torch.rand(ROWS, STEPS, generator=g),
    "reference_log_prob": lambda g: -1 - torch.rand(ROWS, STEPS, generator=g),
    "process_log_prob": lambda g: -1 - torch.rand(ROWS, STEPS, generator=g),
    "tempered_log_prob": lambda g: -1 - torch.rand(ROWS, STEPS, generator=g),
    "teacher_log_prob": lambda g: -1 - torch.rand(ROWS, STEPS, generator=g),
    "advantage": _normal(ROWS, STEPS),
    "token": lambda g: torch.randint(0, 5, (ROWS, STEPS), generator=g),
    "sum_pi_squared": lambda g: torch.rand(ROWS, STEPS, generator=g),
    "switch": _flags(ROWS, STEPS),
    "done": lambda g: torch.ones(ROWS, dtype=torch.bool),
    "truncated": _flags(ROWS),
    "correct": lambda g: torch.arange(ROWS) % 2 == 0,
    "pivot": lambda g: torch.arange(ROWS) % 3,
    "length": lambda g: mask().sum(1).float(),
    "cost": lambda g: 1 + torch.rand(ROWS, generator=g),
    "energy": lambda g: 1 + torch.rand(ROWS, generator=g),
    "outcome": lambda g: torch.randint(0, 3, (ROWS,), generator=g),
    "probe": _normal(ROWS),
    "prompt_value": _normal(ROWS),
    "greedy_reward": _normal(ROWS),
    "choice": _flags(ROWS, 4),
    "trust": lambda g: torch.rand(ROWS, generator=g),
    "uniform": lambda g: torch.rand(ROWS, STEPS, generator=g),
}


def inputs_for(method: Method, seed: int) -> dict[str, Any]:
    """The inputs that a method needs, and no optional ones."""
    generator = torch.Generator().manual_seed(seed)
    if method.call is None:
        raise ValueError(f"{method.key} has no function")
    needed = [name for name, required in inputs_of(method.call).items() if required]
    made = {name: MAKERS[name](generator) for name in needed if name not in ("state", "slot")}
    if method.key in ("gdpo", "mt_grpo"):  # several reward channels
        made["rewards"] = torch.rand(ROWS, 2, generator=generator)
    if method.key == "mt_ppo":  # a turn that a row never reaches has no reward
        reached = torch.stack([((segments() == s) & mask()).any(1) for s in range(SEGMENTS)], 1)
        made["stage_reward"] = torch.where(reached, made["stage_reward"], torch.nan)
    if method.key == "otb":
        made["step_energy"] = torch.rand(ROWS, STEPS, generator=generator)
    if method.key == "spo_single_stream":
        half = torch.full((ROWS,), 4.0, dtype=torch.float64)
        made |= {"slot": torch.arange(ROWS), "state": SPOState(half, half)}
    if method.key == "dcpo_smoothed":
        made |= {"slot": torch.unique(GROUP, return_inverse=True)[1], "state": sas_init(4)}
    return made


def reorder(inputs: dict[str, Any], rows: Tensor) -> dict[str, Any]:
    """The same batch with its rows in another order."""
    found = {}
    for name, x in inputs.items():
        if name == "votes":
            found[name] = x[:, rows]
        elif isinstance(x, Tensor) and x.ndim and len(x) == ROWS:
            found[name] = x[rows]
        else:
            found[name] = x
    return found


def pad(inputs: dict[str, Any], columns: int) -> dict[str, Any]:
    """The same batch with masked steps behind it that hold junk where junk is allowed."""
    found = {}
    for name, x in inputs.items():
        if not isinstance(x, Tensor) or name in PER_ROW or x.shape[-1] != STEPS:
            found[name] = x
            continue
        shape = (*x.shape[:-1], columns)
        if name in ("mask", "switch", "votes"):
            tail = torch.zeros(shape, dtype=torch.bool)
        elif name == "segment":
            tail = torch.full(shape, -1)
        elif x.dtype == torch.int64:
            tail = torch.full(shape, 3)
        else:
            tail = torch.zeros(shape) if name == "step_reward" else torch.full(shape, 7.0)
        found[name] = torch.cat([x, tail], -1)
    return found


def halve(inputs: dict[str, Any]) -> dict[str, Any]:
    """Every floating input in bfloat16."""
    return {k: x.bfloat16() if isinstance(x, Tensor) and x.is_floating_point() else x for k, x in inputs.items()}


def same(a: Any, b: Any, rows: Tensor | None = None, columns: int | None = None, atol: float = 0.0) -> None:
    """Compare two result records field by field; ``rows`` reorders the first, ``columns`` cuts the second."""
    assert is_dataclass(a) and type(a) is type(b)
    for f in fields(a):
        x, y = vars(a)[f.name], vars(b)[f.name]
        pairs = [(x[k], y[k]) for k in x] if isinstance(x, dict) else [(x, y)]
        for left, right in pairs:
            if not isinstance(left, Tensor):
                assert (left is None and right is None) or left == right, f.name
                continue
            if rows is not None and left.ndim:
                left = left[rows]
            if columns is not None and right.ndim == 2 and right.shape[1] > columns:
                right = right[:, :columns]
            close = torch.allclose(left.double(), right.double(), rtol=atol, atol=atol, equal_nan=True)
            assert close, f"{f.name}: {left} against {right}"


__all__ = ["MAKERS", "halve", "inputs_for", "mask", "pad", "reorder", "replace", "same"]
