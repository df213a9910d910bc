"""RPO, HyPO, DR-PO and POLAR: plain loops over pairs, enumeration, worked numbers, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage.aggregation import aggregate
from flowrl.advantage.preference import (
    PairLoss,
    dr_po,
    hypo,
    online_kl_term,
    polar_ranking,
    reset_lengths,
    rpo,
    suffix_mask,
)

NAN = math.nan
CHOSEN, REJECTED = [0, 3, 3, 5], [1, 2, 0, 4]


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int64)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


class Batch:
    """Six ragged rows in pairs; poison on masked steps."""

    def __init__(self, seed: int) -> None:
        draw = random.Random(seed)
        self.new, self.reference = ([[draw.gauss(-1, 0.7) for _ in range(4)] for _ in range(6)] for _ in range(2))
        self.mask = [[draw.random() < 0.7 for _ in range(4)] for _ in range(6)]
        self.mask[2] = [False] * 4
        kept = torch.tensor(self.mask)
        self.log_prob = f64(self.new).masked_fill(~kept, NAN).requires_grad_()
        self.inputs = (self.log_prob, f64(self.reference).masked_fill(~kept, NAN), kept, ids(*CHOSEN), ids(*REJECTED))

    def total(self, rows: list[list[float]], i: int) -> float:
        return sum(x for x, m in zip(rows[i], self.mask[i], strict=True) if m)

    def margin(self, rows: list[list[float]], p: int) -> float:
        return self.total(rows, CHOSEN[p]) - self.total(rows, REJECTED[p])

    def dpo(self, p: int, beta: float, clamp: bool = False) -> float:
        base = self.margin(self.reference, p)
        return math.log1p(math.exp(-beta * (self.margin(self.new, p) - (max(0.0, base) if clamp else base))))


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("seed", range(3))
def test_rpo_against_a_plain_loop(seed: int, reduce: str) -> None:
    batch = Batch(seed)
    result = rpo(*batch.inputs, beta=0.7, eta=0.3, sft_reduce=reduce)  # type: ignore[arg-type]
    for p in range(4):
        size = max(sum(batch.mask[CHOSEN[p]]), 1) if reduce == "mean" else 1
        wanted = batch.dpo(p, 0.7) - 0.3 * batch.total(batch.new, CHOSEN[p]) / size
        assert result.loss[p].item() == pytest.approx(wanted, abs=1e-9)
    assert result.regulariser is None
    result.loss.sum().backward()
    gradient = batch.log_prob.grad
    assert gradient is not None and gradient.isfinite().all() and not gradient[~torch.tensor(batch.mask)].any()
    defaults = rpo(*batch.inputs).loss
    assert defaults.tolist() == pytest.approx(
        [batch.dpo(p, 0.01) - 0.005 * batch.total(batch.new, CHOSEN[p]) for p in range(4)], abs=1e-9
    )


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clamp", [False, True])
def test_hypo_against_a_plain_loop(seed: int, clamp: bool) -> None:
    batch = Batch(seed)
    plain = hypo(*batch.inputs, clamp_reference=clamp)
    assert plain.loss.tolist() == pytest.approx([batch.dpo(p, 0.1, clamp) for p in range(4)], abs=1e-9)
    assert plain.regulariser is None
    online = [False, True, True, False, True, False]
    full = hypo(*batch.inputs, torch.tensor(online), beta=0.3, coef=0.2, clamp_reference=clamp)
    assert full.loss.tolist() == pytest.approx([batch.dpo(p, 0.3, clamp) for p in range(4)], abs=1e-9)
    terms = [
        (batch.new[i][t] - batch.reference[i][t]) * batch.new[i][t]
        for i in range(6)
        for t in range(4)
        if batch.mask[i][t] and online[i]
    ]
    assert full.regulariser is not None and full.regulariser.shape == (6, 4)
    mean = aggregate(full.regulariser, batch.inputs[2], "step_mean")
    assert mean.item() == pytest.approx(0.2 * sum(terms) / len(terms), abs=1e-9)
    mean.backward()
    gradient = batch.log_prob.grad
    assert gradient is not None and not gradient[[0, 3, 5]].any()
    for i in (1, 2, 4):
        for t in range(4):
            wanted = 0.2 * (batch.new[i][t] - batch.reference[i][t]) / len(terms) if batch.mask[i][t] else 0.0
            assert gradient[i, t].item() == pytest.approx(wanted, abs=1e-9)


def test_hypo_default_coefficient_and_no_fresh_rows() -> None:
    batch = Batch(0)
    none = hypo(*batch.inputs, ~ones(6)).regulariser
    assert none is not None and not none.any()
    zero, one_step = torch.zeros(2, 2), torch.tensor([[True, False], [True, True]])
    single = hypo(zero + 2, zero, one_step, ids(0), ids(1), torch.tensor([True, False]), coef=1.0).regulariser
    assert single is not None and single.tolist() == [[12.0, 0.0], [0.0, 0.0]]
    every = hypo(*batch.inputs, ones(6)).regulariser
    assert every is not None and torch.allclose(every, 1e-4 * online_kl_term(*batch.inputs[:3]), atol=1e-12)


def test_both_reduce_to_dpo() -> None:
    inputs = Batch(1).inputs
    expected = hypo(*inputs, beta=0.4, coef=0.0).loss
    assert torch.allclose(rpo(*inputs, beta=0.4, eta=0.0).loss, expected)
    assert torch.allclose(hypo(*inputs, ones(6), beta=0.4, coef=0.0).loss, expected)
    on_policy = rpo(torch.zeros(2, 1), torch.zeros(2, 1), ones(2, 1), ids(0), ids(1), eta=0.0).loss
    assert on_policy.item() == pytest.approx(math.log(2)) and on_policy.dtype == torch.float32
    flat = f64([[0.0], [0.5]])
    agree, differ = f64([[1.0], [0.2]]), f64([[0.2], [1.0]])
    for reference, same in ((agree, True), (differ, False)):
        plain = hypo(flat, reference, ones(2, 1), ids(0), ids(1)).loss
        clamped = hypo(flat, reference, ones(2, 1), ids(0), ids(1), clamp_reference=True).loss
        assert torch.equal(plain, clamped) is same


def test_online_term_has_the_exact_kl_gradient() -> None:
    logits, reference = f64([0.4, -0.3, 0.1]).requires_grad_(), f64([0.2, 0.3, 0.5]).log()
    log_pi = logits.log_softmax(0)
    (exact,) = torch.autograd.grad((log_pi.exp() * (log_pi - reference)).sum(), logits, retain_graph=True)
    term = online_kl_term(log_pi[None], reference[None], ones(1, 3))[0]
    (sampled,) = torch.autograd.grad((log_pi.exp().detach() * term).sum(), logits)
    assert torch.allclose(sampled, exact, atol=1e-12)
    poisoned = online_kl_term(f64([[NAN, -2.0]]), f64([[NAN, -0.5]]), torch.tensor([[False, True]]))
    assert poisoned.tolist() == [[0.0, 3.0]]


def test_dr_po_worked_numbers() -> None:
    length, uniform = f64([4, 4, 4, 1, 0]), f64([[0.3, 0.0], [0.3, 0.74], [0.8, 0.74], [0.0, 0.99], [0.0, 0.99]])
    assert reset_lengths(length, uniform).tolist() == [0, 2, 2, 0, 0]
    assert reset_lengths(length, uniform, probability=0.5).tolist() == [0, 2, 0, 0, 0]
    assert reset_lengths(length, uniform, probability=0.3).tolist() == [0] * 5
    assert reset_lengths(length.long(), uniform.float()).dtype == torch.int64
    assert reset_lengths(f64([4]), f64([[0.0, 0.9999999]])).tolist() == [3]
    mask = torch.tensor([[True, True, False, True, True], [True, False, False, False, False]])
    reset = dr_po(mask, f64([[0.0, 0.6], [0.0, 0.6]]))
    assert reset.prefix.tolist() == [2, 0]
    assert reset.mask.tolist() == [[False, False, False, True, True], [True, False, False, False, False]]
    assert torch.equal(dr_po(mask, f64([[0.0, 0.6], [0.0, 0.6]]), probability=0.0).mask, mask)


def test_resets_are_uniform_over_the_steps() -> None:
    uniform = torch.rand(40_000, 2, generator=torch.Generator().manual_seed(0))
    prefix = reset_lengths(torch.full((40_000,), 4.0), uniform, probability=0.8)
    share = torch.bincount(prefix, minlength=4) / 40_000
    assert share.tolist() == pytest.approx([0.4, 0.2, 0.2, 0.2], abs=0.01)


def test_suffix_mask_by_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    mask = torch.rand(8, 6, generator=generator) < 0.7
    prefix = torch.randint(7, (8,), generator=generator)
    suffix = suffix_mask(prefix, mask)
    for i in range(8):
        seen = 0
        for t in range(6):
            wanted = bool(mask[i, t]) and seen >= int(prefix[i])
            seen += bool(mask[i, t])
            assert suffix[i, t].item() is wanted


def test_polar_worked_numbers() -> None:
    scores = f64([[1.0, 0.0, -2.0], [3.0, NAN, 3.0], [NAN, 1.0, NAN]]).requires_grad_()

    def loss(x: float) -> float:
        return math.log1p(math.exp(-x))

    value = polar_ranking(scores)
    assert value.tolist() == pytest.approx([(loss(1) + loss(3) + loss(2)) / 3, math.log(2), 0.0])
    assert polar_ranking(scores, pairs="adjacent").tolist() == pytest.approx([(loss(1) + loss(2)) / 2, 0.0, 0.0])
    value.sum().backward()
    assert scores.grad is not None and scores.grad.isfinite().all()
    assert scores.grad[0, 0] < 0 < scores.grad[0, 2] and not scores.grad[2].any()
    assert polar_ranking(torch.zeros(1, 2).bfloat16()).dtype == torch.float32


@pytest.mark.parametrize("pairs", ["all", "adjacent"])
def test_polar_against_a_plain_loop(pairs: str) -> None:
    scores = torch.randn(5, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    value = polar_ranking(scores, pairs=pairs)  # type: ignore[arg-type]
    for i in range(5):
        s = scores[i].tolist()
        terms = [
            math.log1p(math.exp(s[b] - s[a])) for a in range(4) for b in range(a + 1, 4) if pairs == "all" or b == a + 1
        ]
        assert value[i].item() == pytest.approx(sum(terms) / len(terms), abs=1e-9)


Z, M, U = torch.zeros(2, 3), ones(2, 3), torch.zeros(2, 2)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: rpo(Z, Z, M, ids(0), ids(1), beta=0.0), "beta: expected a number > 0, got 0"),
    (lambda: rpo(Z, Z, M, ids(0), ids(1), eta=-0.1), "eta, sft_reduce: expected >= 0 and sum or mean"),
    (lambda: rpo(Z, Z, M, ids(0), ids(1), sft_reduce="none"), "eta, sft_reduce: expected >= 0 and sum or mean"),  # type: ignore[arg-type]
    (lambda: rpo(Z, Z, M, ids(0), ids(2)), "rejected: expected row indices 0 to 1, got"),
    (lambda: rpo(Z, Z, M, ids(-1), ids(1)), "chosen: expected row indices 0 to 1, got"),
    (lambda: rpo(Z, Z, M, ids(0, 1), ids(1)), r"rejected: expected int64 \[2\]"),
    (lambda: rpo(Z, Z, M, ids(0).int(), ids(1)), r"chosen: expected int64 \[1\]"),
    (lambda: rpo(Z, Z, M, torch.tensor(0), torch.tensor(1)), "chosen: expected"),
    (lambda: rpo(Z[:1], Z, M, ids(0), ids(1)), r"log_prob: expected floating \[2, 3\]"),
    (lambda: rpo(Z.long(), Z, M, ids(0), ids(1)), r"log_prob: expected floating \[2, 3\]"),
    (lambda: rpo(Z, Z[:1], M, ids(0), ids(1)), "reference_log_prob: expected real"),
    (lambda: rpo(Z, Z, Z, ids(0), ids(1)), "mask: expected bool"),
    (lambda: hypo(Z, Z, M, ids(0), ids(1), beta=0.0), "beta: expected a number > 0"),
    (lambda: hypo(Z, Z, M, ids(0), ids(1), coef=-1.0), "coef: expected a number >= 0"),
    (lambda: hypo(Z, Z, M, ids(0), ids(1), U), r"online: expected bool \[2\]"),
    (lambda: hypo(Z, Z, M, ids(0), ids(7)), "rejected: expected row indices"),
    (lambda: reset_lengths(torch.tensor([1.5]), U[:1]), "length: expected whole numbers >= 0"),
    (lambda: reset_lengths(torch.tensor([-1.0]), U[:1]), "length: expected whole numbers >= 0"),
    (lambda: reset_lengths(torch.zeros(2, 1), U), "length: expected whole numbers >= 0"),
    (lambda: reset_lengths(torch.zeros(2), U[:1]), r"uniform: expected \[2, 2\] in \[0, 1\)"),
    (lambda: reset_lengths(torch.zeros(2), U + 1), r"uniform: expected \[2, 2\] in \[0, 1\)"),
    (lambda: reset_lengths(torch.zeros(2), U - 0.1), r"uniform: expected \[2, 2\] in \[0, 1\)"),
    (lambda: dr_po(M, U, probability=1.1), r"probability: expected a number in \[0, 1\]"),
    (lambda: dr_po(M, U, probability=-0.1), r"probability: expected a number in \[0, 1\]"),
    (lambda: dr_po(Z, U), "mask: expected bool"),
    (lambda: suffix_mask(ids(0), M), r"prefix: expected int64 \[2\]"),
    (lambda: suffix_mask(U[:, 0], M), r"prefix: expected int64 \[2\]"),
    (lambda: suffix_mask(ids(0, 0), Z), "mask: expected bool"),
    (lambda: polar_ranking(torch.zeros(3)), r"scores: expected floating \[B, K\] with K >= 2"),
    (lambda: polar_ranking(torch.zeros(3, 1)), r"scores: expected floating \[B, K\] with K >= 2"),
    (lambda: polar_ranking(torch.zeros(3, 2).long()), r"scores: expected floating \[B, K\] with K >= 2"),
    (lambda: polar_ranking(torch.zeros(3, 2), pairs="triples"), "pairs: expected 'all' or 'adjacent'"),  # type: ignore[arg-type]
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()


def test_records_are_frozen_and_a_regulariser_is_optional() -> None:
    assert PairLoss(torch.zeros(1)).regulariser is None
    for record, name in ((PairLoss(torch.zeros(1)), "loss"), (dr_po(M, U), "prefix")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)
