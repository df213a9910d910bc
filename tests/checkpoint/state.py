"""A nasty state, and equality to the last bit."""

from __future__ import annotations

import math
import struct
from typing import Any

import torch


def adamw_state(seed: int = 0) -> tuple[dict[str, torch.Tensor], dict[str, Any]]:
    """LoRA-like parameters and the state of an AdamW that took two steps on them."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {"blocks.0.lora_A.weight": (4, 16), "blocks.0.lora_B.weight": (16, 4), "norm": (16,)}
    weights = {name: torch.nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    optimizer = torch.optim.AdamW(
        [{"params": list(weights.values())[:2], "lr": 3e-4}, {"params": [weights["norm"]]}], betas=(0.9, 0.95)
    )
    for _ in range(2):
        optimizer.zero_grad()
        sum((weight**2).sum() for weight in weights.values()).backward()
        optimizer.step()
    return {name: weight.detach().clone() for name, weight in weights.items()}, optimizer.state_dict()


def nasty_state() -> dict[str, Any]:
    """Everything that a checkpoint may hold, at its edges."""
    weights, optimizer = adamw_state()
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    bits = torch.tensor([0x7FC00001, -0x800000, 1, -0x80000000], dtype=torch.int32)  # NaN payload, -inf, denormal, -0
    return {
        "policy": weights,
        "optimizer": optimizer,
        "ema": {"decay": 0.1 + 0.2, "weights": {name: weight.to(torch.bfloat16) for name, weight in weights.items()}},
        "shapes": {
            "scalar": torch.tensor(1.5),
            "empty": torch.zeros(0, 3),
            "empty_int": torch.zeros(0, dtype=torch.int64),
            "transposed": base.t(),
            "strided": base[:, ::2],
            "expanded": torch.tensor([7]).expand(5),
            "shared": [base, base[1:], base],
            "bits": bits.view(torch.float32),
            "flags": torch.tensor([True, False, True]),
            "int64": torch.tensor([2**62, -(2**63), 2**63 - 1]),
            "bytes": torch.tensor([255, 0], dtype=torch.uint8),
            "half": torch.tensor([65504.0, 6e-8], dtype=torch.float16),
            "float8": torch.tensor([1.0, -2.0]).to(torch.float8_e4m3fn),
            "double": torch.tensor([math.pi], dtype=torch.float64),
        },
        "a/b c": torch.tensor([1, 2]),
        "other": {"x": torch.tensor(3)},
        "numbers": [
            0.1,
            -0.0,
            5e-324,
            1.7976931348623157e308,
            math.inf,
            -math.inf,
            math.nan,
            1.0,
            1,
            2**70,
            True,
            None,
        ],
        "keys": {1: "int", "1": "text", -3: {"deep": (1, (2.5, [None, ()]))}, 2**40: []},
        "names": {"a": {"b": torch.tensor(1)}, "a/b": torch.tensor(2), "__metadata__": torch.tensor(3), "": [{}]},
        "text": ["", "grün \U0001f600 \ud800 \x00\n\u2028", "$"],
        "marks": {"$": "tensor", "file": "x", "name": "y"},
        "cursor": {"order": [3, 1, 2], "position": (4, 5), "run_id": None},
    }


def same(left: Any, right: Any) -> bool:
    """Equal in type, order of keys, and every bit of every float and tensor."""
    if isinstance(left, torch.Tensor):
        return (
            isinstance(right, torch.Tensor)
            and left.dtype == right.dtype
            and left.shape == right.shape
            and _bytes(left) == _bytes(right)
        )
    if type(left) is not type(right):
        return False
    if isinstance(left, dict):
        return list(left) == list(right) and all(same(left[key], right[key]) for key in left)
    if isinstance(left, (list, tuple)):
        return len(left) == len(right) and all(same(a, b) for a, b in zip(left, right, strict=True))
    if isinstance(left, float):
        return math.isnan(left) == math.isnan(right) and (math.isnan(left) or _pack(left) == _pack(right))
    return bool(left == right)


def _bytes(tensor: torch.Tensor) -> bytes:
    return bytes(tensor.detach().contiguous().reshape(-1).view(torch.uint8).tolist()) if tensor.numel() else b""


def _pack(value: float) -> bytes:
    return struct.pack("<d", value)
