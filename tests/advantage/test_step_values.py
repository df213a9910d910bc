"""Credit from values of states: worked numbers, plain loops, identities, bad input."""

from __future__ import annotations

import math
import statistics
from typing import Any

import pytest
import torch

from flowrl.advantage.estimators import grpo
from flowrl.advantage.step_values import (
    dense_grpo,
    shape_values,
    step_credit,
    stepwise,
    tp_grpo,
    turning_points,
    vgpo,
)
from tests.advantage.step_cases import NAN, cells, check, draw_case, loop_shapes, standardise

VALUES = torch.tensor([[0.2, 0.6], [0.4, 1.0]], dtype=torch.float64)
STARTS = torch.tensor([0.1, 0.3], dtype=torch.float64)
ONE = torch.zeros(2, dtype=torch.int64)
ALL = torch.ones(2, 2, dtype=torch.bool)


def test_shapes_worked_numbers() -> None:
    assert shape_values(VALUES, None, ALL, "value").tolist() == VALUES.tolist()
    assert shape_values(VALUES, STARTS, ALL, "gain").tolist() == pytest.approx(torch.tensor([[0.1, 0.4], [0.1, 0.6]]))
    cumulative = shape_values(VALUES, None, ALL, "cumulative", gamma=0.5)
    assert cumulative.tolist() == pytest.approx(torch.tensor([[0.5, 0.6], [0.9, 1.0]]))
    hole = torch.tensor([[0.2, 9.0, 0.6, 0.7]]), torch.tensor([0.1]), torch.tensor([[True, False, True, True]])
    assert shape_values(*hole, "gain").tolist()[0] == pytest.approx([0.1, 0, 0.4, 0.1])
    assert shape_values(*hole, "cumulative").tolist()[0] == pytest.approx([1.5, 0, 1.3, 0.7])


@pytest.mark.parametrize(
    ("shaping", "gamma", "lost"),
    [
        ("value", 1.0, [False, True, False]),
        ("gain", 1.0, [False, True, True]),
        ("cumulative", 0.9, [True, True, False]),
        ("cumulative", 0.0, [False, True, False]),
    ],
)
def test_a_missing_value_takes_what_needs_it(shaping: Any, gamma: float, lost: list[bool]) -> None:
    value, on = torch.tensor([[0.2, NAN, 0.6]]), torch.ones(1, 3, dtype=torch.bool)
    assert shape_values(value, torch.tensor([0.5]), on, shaping, gamma=gamma).isnan().tolist() == [lost]
    assert shape_values(value, torch.tensor([0.5]), on, shaping, gamma=gamma).dtype == torch.float64


def test_step_credit_worked_numbers() -> None:
    value = step_credit(VALUES, ONE, ALL, eps=0.0)
    assert value.advantage.tolist() == pytest.approx(torch.tensor([[-1.0, -1], [1, 1]]))
    assert value.group_mean is not None and value.group_mean.tolist() == pytest.approx([0.8, 0.8])
    assert value.group_std is not None and value.group_std.tolist() == pytest.approx([0.2, 0.2])
    whole = step_credit(VALUES, torch.tensor([4, 9]), ALL, normaliser="global", eps=0.0)  # mean .55, std sqrt(.0875)
    assert whole.advantage.tolist() == pytest.approx(
        torch.tensor([[-1.183216, 0.169031], [-0.507093, 1.521278]]), abs=1e-5
    )
    doubled = step_credit(VALUES, ONE, ALL, normaliser="global", eps=0.0, reduce=lambda x: 2 * x)
    assert torch.allclose(doubled.advantage, whole.advantage) and doubled.live.all()


def test_gains_worked_numbers() -> None:
    """Gains .1, .4 and .1, .6: nothing to compare at the first step."""
    dense = dense_grpo(VALUES, STARTS, ONE, ALL, eps=0.0)
    assert dense.advantage.tolist() == pytest.approx(torch.tensor([[0.0, -1], [0, 1]]))
    assert not dense.advantage[:, 0].any() and dense.loss_mask.all() and dense.live.all()
    joint = stepwise(VALUES, STARTS, ONE, ALL, eps=0.0)  # mean .3, std sqrt(.045)
    assert joint.advantage.tolist() == pytest.approx(
        torch.tensor([[-0.942809, 0.471405], [-0.942809, 1.414214]]), abs=1e-5
    )
    sample = dense_grpo(VALUES, STARTS, ONE, ALL, ddof=1, eps=1.0)
    assert sample.advantage[:, 1].tolist() == pytest.approx([-0.1 / (0.1 * math.sqrt(2) + 1), 0.1 / (1 + 0.141421)])


@pytest.mark.parametrize("ddof", [0, 1])
@pytest.mark.parametrize("normaliser", ["per_step", "joint", "global"])
@pytest.mark.parametrize(("shaping", "gamma"), [("value", 1.0), ("gain", 1.0), ("cumulative", 0.7), ("cumulative", 0)])
def test_step_credit_against_a_loop(shaping: Any, gamma: float, normaliser: Any, ddof: int) -> None:
    for seed in range(3):
        case = draw_case(seed)
        result = step_credit(**case, shaping=shaping, normaliser=normaliser, gamma=gamma, ddof=ddof)
        x, mask = loop_shapes(case, shaping, gamma)
        expected = standardise(x, mask, cells(case["group"].tolist(), 6, normaliser), ddof, 1e-4)
        check(result, expected, x, mask)
        named = {("gain", "per_step"): dense_grpo, ("gain", "joint"): stepwise}.get((shaping, normaliser))
        if named is not None:
            assert torch.equal(named(**case, ddof=ddof).advantage, result.advantage)
            assert torch.equal(named(**case, ddof=ddof).live, result.live)


def test_values_equal_to_the_outcome_give_grpo() -> None:
    case = draw_case(0)
    reward = torch.rand(14, dtype=torch.float64)
    plain = grpo(reward, case["group"], case["valid"]).over_steps(case["mask"])
    result = step_credit(reward[:, None].expand(14, 6), case["group"], torch.ones(14, 6).bool(), valid=case["valid"])
    assert torch.equal(torch.where(case["mask"], result.advantage, 0.0), plain.advantage)
    assert plain.group_mean is not None and result.group_mean is not None and result.group_std is not None
    assert torch.equal(plain.group_mean, result.group_mean) and torch.equal(plain.live, result.live)


@pytest.mark.parametrize("seed", range(3))
def test_gains_telescope(seed: int) -> None:
    case = draw_case(seed, missing=0.0)
    gains = shape_values(case["step_value"], case["start_value"], case["mask"], "gain")
    last = [max(t for t in range(6) if case["mask"][b, t]) for b in range(14)]
    outcome = case["step_value"][torch.arange(14), torch.tensor(last)]
    assert torch.allclose(gains.sum(1), outcome - case["start_value"])
    constant = torch.full((14, 6), 0.4, dtype=torch.float64)
    constant[:, -1] = outcome
    flat = shape_values(constant, torch.full((14,), 0.4, dtype=torch.float64), torch.ones(14, 6).bool(), "gain")
    assert not flat[:, :-1].any() and torch.allclose(flat[:, -1], outcome - 0.4)


@pytest.mark.parametrize("shaping", ["value", "gain"])
def test_a_shift_of_one_step_leaves_per_step_credit_alone(shaping: Any) -> None:
    case = draw_case(1, missing=0.0)
    case["mask"] = torch.ones(14, 6, dtype=torch.bool)
    moved = case | {"step_value": case["step_value"] + torch.tensor([3.0, -1, 0, 2, 5, -4], dtype=torch.float64)}
    a, b = step_credit(**case, shaping=shaping), step_credit(**moved, shaping=shaping)
    assert torch.allclose(a.advantage, b.advantage, atol=1e-6)
    joint = step_credit(**moved, shaping=shaping, normaliser="joint").advantage
    assert not torch.allclose(joint, step_credit(**case, shaping=shaping, normaliser="joint").advantage, atol=1e-2)


def test_rounding_is_no_signal() -> None:
    """Gains of .1 that differ in the last digit of values near a million."""
    value = torch.tensor([[0.3, 0.4], [0.7, 0.8]], dtype=torch.float64) + 1e6
    start = torch.tensor([0.2, 0.6], dtype=torch.float64) + 1e6
    assert len(set(shape_values(value, start, ALL, "gain").flatten().tolist())) > 1
    for normaliser in ("per_step", "joint", "global"):
        result = step_credit(value, ONE, ALL, start, shaping="gain", normaliser=normaliser, eps=0.0)  # type: ignore[arg-type]
        assert not result.advantage.any() and not result.live.any() and result.loss_mask.all()


@pytest.mark.parametrize("normaliser", ["per_step", "joint", "global"])
def test_without_eps_the_unit_of_the_values_does_not_matter(normaliser: Any) -> None:
    case = draw_case(2)
    tiny = case | {name: case[name] * 1e-14 for name in ("step_value", "start_value")}
    for shaping in ("value", "gain", "cumulative"):
        options: dict[str, Any] = {"shaping": shaping, "normaliser": normaliser, "eps": 0.0}
        a, b = step_credit(**case, **options), step_credit(**tiny, **options)
        assert a.advantage.any() and torch.allclose(a.advantage, b.advantage, atol=1e-5)


# -- TP-GRPO ------------------------------------------------------------------------------------------------------------


def _turns(row: list[float], start: float, first: bool = True, consistent: bool = True) -> list[bool]:
    path, found = [start, *row], []
    for k in range(1, len(path)):
        gain, trend, rest = path[k] - path[k - 1], path[-1] - start, path[-1] - path[k]
        turned = first if k == 1 else (path[k - 1] - path[k - 2]) * trend < 0
        found.append(gain * trend > 0 and turned and (gain * rest > 0 or not consistent))
    return found


def test_turning_points_worked_numbers() -> None:
    """Start .5, path .4 .6 .5 .55 .8: step 1 turns up and on; step 3 too; steps 0 and 2 go against."""
    value, start, on = torch.tensor([[0.4, 0.6, 0.5, 0.55, 0.8]]), torch.tensor([0.5]), torch.ones(1, 5).bool()
    assert turning_points(value, start, on).tolist() == [[False, True, False, True, False]]
    two = torch.cat([value, torch.tensor([[0.5, 0.6, 0.5, 0.5, 0.5]])])
    result = tp_grpo(two, torch.tensor([0.5, 0.5]), ONE, torch.ones(2, 5).bool(), eps=0.0)
    # Row 0 earns -.1, .8 - .4, -.1, .8 - .5, .25; row 1 its gains 0, .1, -.1, 0, 0.
    assert result.advantage.tolist() == pytest.approx(torch.tensor([[-1.0, 1, 0, 1, 1], [1, -1, 0, -1, -1]]), abs=1e-5)
    assert result.advantage[:, 2].tolist() == pytest.approx([0, 0])
    rising = torch.tensor([[0.6, 0.7, 0.8]]), torch.tensor([0.5]), torch.ones(1, 3).bool()
    assert turning_points(*rising).tolist() == [[True, False, False]]
    assert not turning_points(*rising, first=False).any()
    overshoot = torch.tensor([[0.4, 0.9, 0.8]]), torch.tensor([0.5]), torch.ones(1, 3).bool()
    assert not turning_points(*overshoot).any()
    assert turning_points(*overshoot, consistent=False).tolist() == [[False, True, False]]


def test_balanced_turning_points_keep_the_strongest_of_each_direction() -> None:
    """Three rows rise, with trends .1, .3 and .2; one falls: only the row with .3 keeps its turn, and the falling one."""
    value = torch.tensor([[0.55, 0.6], [0.6, 0.8], [0.6, 0.7], [0.4, 0.1]])
    start, on = torch.full((4,), 0.5), torch.ones(4, 2).bool()
    assert turning_points(value, start, on)[:, 0].all()
    assert turning_points(value, start, on, balance=True)[:, 0].tolist() == [False, True, False, True]
    assert turning_points(value[:3], start[:3], on[:3], balance=True)[:, 0].all()
    group = torch.zeros(4, dtype=torch.int64)
    balanced = tp_grpo(value, start, group, on, balance=True, eps=0.0).advantage
    expected = torch.tensor([0.05, 0.3, 0.1, -0.4], dtype=torch.float64)
    expected = (expected - expected.mean()) / expected.std(correction=0)
    assert torch.allclose(balanced[:, 0].double(), expected, atol=1e-5)


@pytest.mark.parametrize(("first", "consistent"), [(True, True), (False, True), (True, False), (False, False)])
def test_tp_grpo_against_a_loop(first: bool, consistent: bool) -> None:
    turns = 0
    for seed in range(4):
        case = draw_case(seed)
        result = tp_grpo(**case, first=first, consistent=consistent)
        mask, x = case["mask"].tolist(), []
        for b, row in enumerate(case["step_value"].tolist()):
            on = [t for t in range(6) if mask[b][t]]
            path = [row[t] if bool(case["valid"][b]) else NAN for t in on]
            start, earned = float(case["start_value"][b]), [0.0] * 6
            for k, (t, turned) in enumerate(zip(on, _turns(path, start, first, consistent), strict=True)):
                earned[t] = (path[-1] if turned else path[k]) - (path[k - 1] if k else start)
                turns += turned
            x.append(earned)
        check(result, standardise(x, mask, cells(case["group"].tolist(), 6, "per_step"), 0, 1e-4), x, mask)
    assert turns > 3


def test_tp_grpo_without_turning_points_is_dense_grpo() -> None:
    value, on = torch.linspace(0, 1, 24).view(4, 6).square(), torch.ones(4, 6).bool()
    group, start = torch.tensor([1, 1, 2, 2]), torch.full((4,), -0.5)
    assert not turning_points(value, start, on, first=False).any()
    plain = dense_grpo(value, start, group, on).advantage
    assert torch.equal(tp_grpo(value, start, group, on, first=False).advantage, plain)
    assert turning_points(value, start, on)[:, 0].all()


# -- VGPO ---------------------------------------------------------------------------------------------------------------


def test_vgpo_worked_numbers() -> None:
    """One step, Q = 1, 2, 4, 5, k = .3; then two rows of two steps with Q = (2, 1) and (4, 3)."""
    q, one = torch.tensor([[1.0], [2], [4], [5]]), torch.zeros(4, dtype=torch.int64)
    result = vgpo(q, one, torch.ones(4, 1).bool(), k=0.3, eps=0.0)
    assert result.advantage[:, 0].tolist() == pytest.approx([-0.96491, -0.03246, 1.83246, 2.76491], abs=1e-5)
    value = torch.tensor([[1.0, 1], [1, 3]])
    inside = vgpo(value, ONE, ALL, k=0.3, eps=0.0)
    assert inside.advantage.tolist() == pytest.approx(torch.tensor([[-0.2, -1], [2.371429, 1]]), abs=1e-5)
    outside = vgpo(value, ONE, ALL, k=0.3, eps=0.0, weight_inside=False)
    assert outside.advantage.tolist() == pytest.approx(
        torch.tensor([[-0.533333, -0.666667], [2.514286, 0.857143]]), abs=1e-5
    )


@pytest.mark.parametrize("inside", [True, False])
@pytest.mark.parametrize("gamma", [0.0, 0.8, 1.0])
def test_vgpo_against_a_loop(gamma: float, inside: bool) -> None:
    for seed in range(3):
        case = draw_case(seed)
        start = case.pop("start_value")
        step = torch.arange(6).expand(14, 6) + torch.arange(14)[:, None] % 2
        result = vgpo(**case, step=step, steps=8, gamma=gamma, k=0.2, weight_inside=inside, shift=0.3)
        moved = {**case, "start_value": start, "step_value": case["step_value"] + 0.3}
        q, mask = loop_shapes(moved, "cumulative", gamma)
        weight, x = [], []
        for b, row in enumerate(q):
            known = [v for v, on in zip(row, mask[b], strict=True) if on and not math.isnan(v)]
            weight.append([v / statistics.fmean(known) if known else NAN for v in row])
            x.append([v * (w if inside else 1.0) for v, w in zip(row, weight[b], strict=True)])
        expected = standardise(x, mask, cells(case["group"].tolist(), 6, "per_step"), 0, 1e-4)
        for b, t in ((b, t) for b in range(14) for t in range(6) if mask[b][t] and not math.isnan(x[b][t])):
            expected[b][t] += 0.2 * x[b][t] if int(step[b, t]) < 4 else 0.0
            expected[b][t] *= 1.0 if inside else weight[b][t]
        check(result, expected, x, mask)


def test_vgpo_reduces_to_grpo() -> None:
    """k = 0, gamma = 1 and no value before the outcome: the same cumulated value, weight 1, at every step."""
    reward = torch.tensor([0.2, 0.9, 0.4, 0.4, 0.7, 0.3])
    group, on = torch.tensor([1, 1, 1, 1, 8, 8]), torch.ones(6, 4).bool()
    value = torch.zeros(6, 4)
    value[:, -1] = reward
    plain = grpo(reward, group).over_steps(on)
    for inside in (True, False):
        result = vgpo(value, group, on, k=0.0, weight_inside=inside)
        assert torch.allclose(result.advantage, plain.advantage, atol=1e-6) and torch.equal(result.live, plain.live)
    # gamma = 0: the value of the step itself, weighted by its place.
    value = 0.1 + torch.rand(6, 4, generator=torch.Generator().manual_seed(0))
    own = value * value / value.mean(1, keepdim=True)
    assert torch.allclose(
        vgpo(value, group, on, gamma=0.0, k=0.0).advantage, step_credit(own, group, on).advantage, atol=1e-5
    )


def test_vgpo_with_equal_rewards_has_the_absolute_term_alone() -> None:
    value, on = torch.full((2, 4), 0.5), torch.ones(2, 4).bool()
    none = vgpo(value, ONE, on, k=0.0)
    assert not none.advantage.any() and not none.live.any()
    weighted = torch.tensor([2.0, 1.5]) ** 2 / 1.25  # Q = 2, 1.5, 1, .5
    some = vgpo(value, ONE, on, k=0.1)
    assert some.live.all() and not some.advantage[:, 2:].any()
    assert torch.allclose(some.advantage[:, :2], 0.1 * weighted.expand(2, 2))


def test_the_absolute_term_keeps_to_the_early_part_of_the_schedule() -> None:
    value, on, step = torch.full((2, 2), 0.5), torch.ones(2, 2).bool(), torch.tensor([[3, 5], [4, 9]])
    where = vgpo(value, ONE, on, step, steps=10).advantage != 0
    assert where.tolist() == [[True, False], [True, False]]
    assert (vgpo(value, ONE, on, step, steps=10, absolute_steps=1.0).advantage != 0).all()
    assert not vgpo(value, ONE, on, step, steps=10, absolute_steps=0.0).advantage.any()
    ragged = torch.tensor([[True, False, True], [True, True, False]])
    assert (vgpo(torch.full((2, 3), 0.5), ONE, ragged).advantage != 0).tolist() == [[True, False, False]] * 2


# -- bad input ----------------------------------------------------------------------------------------------------------


def test_vgpo_refuses_values_that_make_no_weights() -> None:
    for value in (
        [[0.5, -0.1], [0.5, 0.5]],
        [[0.5, 0.0], [0.5, 0.5]],
        [[0.5, 0.5], [0.0, 0.0]],
        [[0.5, 0.5], [1e-9, 1e-9]],
    ):
        with pytest.raises(ValueError, match=r"step_value: .* raise the option shift"):
            vgpo(torch.tensor(value), ONE, ALL)
        assert vgpo(torch.tensor(value), ONE, ALL, shift=0.2).advantage.isfinite().all()
    with pytest.raises(ValueError, match=r"row 1 has Q down to -0\.1 and mean 0\.15"):
        vgpo(torch.tensor([[0.5, 0.5], [0.5, -0.1]]), ONE, ALL)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"step_value": torch.ones(2, 3)}, "step_value"),
        ({"step_value": torch.full((2, 2), NAN)}, "step_value"),
        ({"step_value": torch.tensor([[1.0, math.inf], [1, 1]])}, "step_value"),
        ({"start_value": torch.ones(3)}, "start_value"),
        ({"start_value": torch.full((2,), NAN)}, "start_value"),
        ({"start_value": None, "shaping": "gain"}, "start_value"),
        ({"group": torch.zeros(2)}, "group"),
        ({"mask": torch.ones(2, 2)}, "mask"),
        ({"valid": torch.ones(2)}, "valid"),
        ({"shaping": "sum"}, "shaping"),
        ({"normaliser": "batch"}, "normaliser"),
        ({"gamma": 1.5}, "gamma"),
        ({"ddof": 2}, "ddof"),
        ({"eps": -1.0}, "eps"),
    ],
)
def test_bad_input(change: dict[str, Any], message: str) -> None:
    given = {"step_value": VALUES, "start_value": STARTS, "group": ONE, "mask": ALL}
    with pytest.raises(ValueError, match=f"^{message}: "):
        step_credit(**{**given, **change})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": -0.1}, "k"),
        ({"gamma": -0.1}, "gamma"),
        ({"absolute_steps": 1.1}, "absolute_steps"),
        ({"shift": NAN}, "shift"),
        ({"eps": -1.0}, "eps"),
        ({"steps": -1}, "steps"),
        ({"step": torch.tensor([[0, 0], [0, 0]])}, "step"),
        ({"step": torch.tensor([[0, 1], [0, 2]]), "steps": 2}, "step"),
        ({"step": torch.tensor([[0, 1], [-1, 1]]), "steps": 2}, "step"),
        ({"step": torch.ones(2, 2), "steps": 2}, "step"),
    ],
)
def test_bad_options_of_vgpo(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{message}: "):
        vgpo(**{"step_value": VALUES, "group": ONE, "mask": ALL, **change})


def test_shape_values_refuses_an_unknown_shaping() -> None:
    with pytest.raises(ValueError, match=r"^shaping: "):
        shape_values(VALUES, STARTS, ALL, "sum")  # type: ignore[arg-type]


def test_the_global_normaliser_counts_the_samples_of_all_ranks() -> None:
    """A second rank with the same rows doubles every sum; one process that holds both gives the same."""
    value = torch.tensor([[0.1, 0.5, 1.0], [0.3, 0.2, 0.0], [0.6, 0.4, 0.7]])
    group, mask = torch.tensor([0, 0, 1]), torch.ones(3, 3, dtype=torch.bool)
    ranks = step_credit(value, group, mask, normaliser="global", ddof=1, reduce=lambda sums: 2 * sums).advantage
    whole = step_credit(
        value.repeat(2, 1), torch.cat([group, group + 2]), mask.repeat(2, 1), normaliser="global", ddof=1
    ).advantage
    torch.testing.assert_close(ranks, whole[:3])
    assert not torch.allclose(ranks, step_credit(value, group, mask, normaliser="global", ddof=1).advantage)
