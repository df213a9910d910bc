"""Blocks of rows and of columns: the results do not depend on them, and nobody's tensors are written to."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from flowrl.advantage import blocks, scans
from flowrl.advantage.blocks import by_rows
from flowrl.advantage.checks import check_number, check_share
from flowrl.advantage.inputs import read_segments
from flowrl.advantage.method import Method
from flowrl.advantage.scans import column_blocks, first_step
from flowrl.advantage.segments import number_ids
from flowrl.advantage.steps import following_value, segment_gather
from tests.advantage.registry_inputs import inputs_for, same
from tests.advantage.test_properties import ESTIMATORS, run


@pytest.mark.parametrize("method", [pytest.param(m, id=m.key) for m in ESTIMATORS])
def test_the_size_of_blocks_changes_nothing(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    inputs = inputs_for(method, 2)
    kept = {name: x.clone() for name, x in inputs.items() if isinstance(x, torch.Tensor)}
    whole = run(method, inputs)
    monkeypatch.setattr(blocks, "_ELEMENTS", 30)  # five rows of six steps: blocks of 5, 5 and 2 rows
    monkeypatch.setattr(scans, "_BLOCK", 4)
    same(run(method, inputs), whole, atol=1e-6)
    for name, x in kept.items():
        assert torch.equal(x.nan_to_num(), inputs[name].nan_to_num()), f"{name} was written to"


def test_rows_come_back_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ELEMENTS", 4)
    x, sizes = torch.arange(10).view(5, 2), []

    def call(part: torch.Tensor, row: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        sizes.append(len(part))
        return part.double() + 1, row

    moved, rows = by_rows(call, x, torch.arange(5))
    assert sizes == [2, 2, 1] and moved.dtype == torch.float64
    assert moved.tolist() == (x + 1).tolist() and rows.tolist() == [0, 1, 2, 3, 4]


def test_columns_are_cut_from_the_end() -> None:
    assert column_blocks(130) == [slice(66, 130), slice(2, 66), slice(0, 2)]


@pytest.mark.parametrize("spread", [1, 10**15])
def test_ids_near_and_far_are_numbered_alike(spread: int) -> None:
    ids = torch.tensor([[3, -2], [3, 5]]) * spread
    index, number = number_ids(ids)
    assert int(index.min()) == 0 and int(index.max()) < number <= 16
    assert (index[:, :, None, None] == index).equal(ids[:, :, None, None] == ids)


def test_first_step_and_following_value() -> None:
    mask = torch.tensor([[0, 1, 0, 1], [0, 0, 0, 0], [1, 1, 0, 0]]).bool()
    assert first_step(mask).tolist() == [1, 4, 0]
    x = torch.tensor([[1.0, 2, 3, 4]]).expand(3, 4)
    assert following_value(x, mask).tolist() == [[0, 4, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    assert following_value(x[2:], mask[2:]).tolist() == [[2, 0, 0, 0]]


def test_what_is_gathered_from_is_not_written_to() -> None:
    segment = torch.tensor([[0, 1, -1]])
    assert segment_gather(torch.tensor([[5.0, 7.0]]), segment).tolist() == [[5, 7, 0]]
    assert segment.tolist() == [[0, 1, -1]]


@pytest.mark.parametrize("rows", [[[0, 2, -1, 1]], [[0, 1, 2, 1]], [[-1, 1, -1, 0]]])
def test_segments_fall_across_a_hole_too(rows: list[list[int]]) -> None:
    segment = torch.tensor(rows)
    with pytest.raises(ValueError, match=r"never decrease .* row 0 does at step 3"):
        read_segments(segment, torch.ones_like(segment, dtype=torch.bool))
    assert read_segments(segment, torch.ones_like(segment, dtype=torch.bool), ordered=False).tolist() == rows


def test_segments_of_any_number_are_cut_to_int32() -> None:
    segment, mask = torch.tensor([[0, 2**40, 2**40]]), torch.tensor([[True, True, False]])
    assert read_segments(segment, mask, 2**62, ordered=False).tolist() == [[0, 2**31 - 1, -1]]
    with pytest.raises(ValueError, match=r"got -1 .. 1099511627776"):
        read_segments(segment, mask, 3, ordered=False)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: check_number("x", float("nan")), "x: expected a finite number, got nan"),
        (lambda: check_number("x", 1.0, 1.0, strict=True), "x: expected a finite number > 1, got 1.0"),
        (lambda: check_number("x", float("nan"), 0.0, finite=False), "x: expected a number >= 0, got nan"),
        (lambda: check_share("x", 0.0, strict=True), r"x: expected a number in \(0, 1\], got 0"),
    ],
)
def test_numbers_out_of_range(call: Any, message: str) -> None:
    check_number("x", float("inf"), 0.0, finite=False)
    check_share("x", 0.0)
    with pytest.raises(ValueError, match=message):
        call()
