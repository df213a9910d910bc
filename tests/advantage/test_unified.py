"""UPGE, HPT, SRFT, SRPO, SCOPE and OTR: worked numbers, plain loops, known gradients, enumeration, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from flowrl.advantage.policy_loss import clipped
from flowrl.advantage.unified import hpt, otr, route_mask, scope, scope_weights, srft, srpo_routed, upge

NAN = math.nan
GROUP = [40, -3, 40, 40, -3, 7, 40, 12]
CORRECT = [True, False, False, True, True, False, False, True]
VALID = [True, True, True, True, True, True, False, True]


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


def draws(seed: int, number: int, rows: int = 8) -> tuple[list[list[list[float]]], list[list[bool]]]:
    draw = random.Random(seed)
    values = [[[draw.gauss(-1, 0.5) for _ in range(4)] for _ in range(rows)] for _ in range(number)]
    mask = [[draw.random() < 0.7 for _ in range(4)] for _ in range(rows)]
    for row in mask[:-1]:
        row[draw.randrange(4)] = True
    mask[2], mask[4], mask[-1] = [False, True, False, False], [True, False, False, False], [False] * 4
    return values, mask


def slope(loss: Tensor, log_prob: Tensor) -> Tensor:
    return torch.autograd.grad(loss.sum(), log_prob, retain_graph=True)[0]


@pytest.mark.parametrize("denominator", ["old", "self", "sequence", "one", "shaped"])
def test_upge_against_a_plain_loop(denominator: str) -> None:
    (new, old), mask = draws(3, 2)
    draw = random.Random(9)
    advantage = [draw.gauss(0, 1) for _ in range(8)]
    stable = [[draw.random() < 0.6 for _ in range(4)] for _ in range(8)]
    tensors = [f64(x).masked_fill(~torch.tensor(mask), NAN) for x in (new, old)]
    tensors[0].requires_grad_()
    inputs = (*tensors, f64(advantage), torch.tensor(mask), torch.tensor(stable))
    loss = upge(*inputs, denominator=denominator, shape=0.3).loss  # type: ignore[arg-type]
    gradient = slope(loss, tensors[0])
    for i in range(8):
        length = max(sum(mask[i]), 1)
        mean = sum(n - o for n, o, m in zip(new[i], old[i], mask[i], strict=True) if m) / length
        for t in range(4):
            pi = math.exp(new[i][t])
            den = {
                "old": math.exp(old[i][t]),
                "self": pi,
                "sequence": pi / math.exp(mean),
                "one": 1.0,
                "shaped": (pi + 0.3) ** 2 / 0.3,
            }[denominator]
            wanted = -advantage[i] * pi / den if mask[i][t] and stable[i][t] else 0.0
            assert loss[i, t].item() == pytest.approx(wanted, abs=1e-9)
            assert gradient[i, t].item() == pytest.approx(wanted, abs=1e-9)


def test_upge_reproduces_other_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    log_prob = (torch.randn(5, 4, generator=generator, dtype=torch.float64) / 2 - 1).requires_grad_()
    old = log_prob.detach() + torch.randn(5, 4, generator=generator, dtype=torch.float64) / 2
    a, mask = torch.randn(5, 4, generator=generator, dtype=torch.float64), ones(5, 4)
    one = torch.ones(5).double()
    likelihood = slope(-log_prob, log_prob)
    assert torch.allclose(slope(upge(log_prob, old, one, mask, denominator="self").loss, log_prob), likelihood)
    reinforce = slope(-a * log_prob, log_prob)
    assert torch.allclose(slope(upge(log_prob, old, a, mask, denominator="self").loss, log_prob), reinforce)
    rho = (log_prob - old).exp()
    assert torch.allclose(slope(upge(log_prob, old, a, mask).loss, log_prob), slope(-a * rho, log_prob))
    stable = ~(((a > 0) & (rho > 1.28)) | ((a < 0) & (rho < 0.8)))
    assert 0 < stable.sum() < 20
    ppo = slope(clipped(rho, a, 0.2, 0.28), log_prob)
    assert torch.allclose(slope(upge(log_prob, old, a, mask, stable).loss, log_prob), ppo)
    gspo = slope(-a[:, :1] * (log_prob - old).mean(1, keepdim=True).exp() * 4, log_prob)
    assert torch.allclose(slope(upge(log_prob, old, a[:, 0], mask, denominator="sequence").loss, log_prob), gspo)
    pi = log_prob.exp()
    assert torch.allclose(
        slope(upge(log_prob, old, a, mask, denominator="one").loss, log_prob), slope(-a * pi, log_prob)
    )
    luffy = slope(-a * pi / (pi + 0.1), log_prob)
    assert torch.allclose(slope(upge(log_prob, old, a, mask, denominator="shaped").loss, log_prob), luffy)


@pytest.mark.parametrize("denominator", ["old", "self", "sequence"])
def test_upge_on_policy_is_the_policy_gradient(denominator: str) -> None:
    log_prob = torch.tensor([[-1.0, -2.0]], requires_grad=True)
    a, old = torch.tensor([[0.5, -2.0]], requires_grad=True), log_prob.detach().clone().requires_grad_()
    loss = upge(log_prob, old, a, ones(1, 2), denominator=denominator).loss  # type: ignore[arg-type]
    assert loss.tolist() == [[-0.5, 2.0]]
    loss.sum().backward()
    assert log_prob.grad is not None and log_prob.grad.tolist() == [[-0.5, 2.0]]
    assert old.grad is None and a.grad is None


def test_hpt_gate() -> None:
    correct, group = torch.tensor(CORRECT), torch.tensor(GROUP)
    result = hpt(correct, group)
    assert result.reinforce.tolist() == [1, 1, 1, 1, 1, 0, 1, 1] and result.reinforce.dtype == torch.float32
    assert torch.equal(result.reinforce + result.supervise, torch.ones(8))
    half = hpt(correct, group, gate=0.5)  # shares 1/2, 1/2, 0 and 1: above the gate, not at it
    assert half.reinforce.tolist() == [0, 0, 0, 0, 0, 0, 0, 1]
    third = hpt(correct, group, torch.tensor(VALID), gate=0.5, reinforce_coef=2.0, supervise_coef=0.3)
    assert third.reinforce.tolist() == [2, 0, 2, 2, 0, 0, 2, 2]
    assert third.supervise.tolist() == pytest.approx([0, 0.3, 0, 0, 0.3, 0.3, 0, 0])
    alone = hpt(torch.tensor([True]), torch.tensor([1]), torch.tensor([False]))
    assert alone.reinforce.tolist() == [0.0] and alone.supervise.tolist() == [1.0]
    assert hpt(torch.tensor([True]), torch.tensor([1]), gate=1.0).supervise.tolist() == [1.0]


def test_srft_weights() -> None:
    entropy = f64([[1.0, 3.0], [0.5, NAN], [NAN, NAN]])
    mask = torch.tensor([[True, True], [True, False], [False, False]])
    rows = srft(entropy, mask)
    assert rows.supervise.tolist() == pytest.approx([0.5 * math.exp(-2), 0.5 * math.exp(-0.5), 0.5])
    assert rows.reinforce.tolist() == pytest.approx([0.1 * math.exp(2), 0.1 * math.exp(0.5), 0.1])
    batch = srft(entropy, mask, unit="batch", supervise_coef=1.0, reinforce_coef=2.0)
    assert batch.supervise.tolist() == pytest.approx([math.exp(-1.5)] * 3)
    assert batch.reinforce.tolist() == pytest.approx([2 * math.exp(1.5)] * 3)
    other = torch.tensor([2.5, 1.0], dtype=torch.float64)
    ranks = srft(entropy, mask, unit="batch", reduce=lambda x: x + other if x.ndim else x)
    assert ranks.supervise.tolist() == pytest.approx([0.5 * math.exp(-7 / 4)] * 3)
    assert rows.supervise.dtype == rows.reinforce.dtype == torch.float32


def test_srpo_worked_numbers() -> None:
    correct, group = torch.tensor([False, True]), torch.tensor([0, 0])
    routes = srpo_routed(correct, group, torch.tensor([[0.0, 1.0], [NAN, NAN]]), ones(2, 2))
    assert routes.distill.tolist() == [True, False]
    assert routes.weight[0].tolist() == pytest.approx([1.4621, 0.5379], abs=1e-4)
    assert routes.weight[1].tolist() == [1.0, 1.0]
    assert srpo_routed(correct, group, torch.rand(2, 2), ones(2, 2), beta=0.0).weight.eq(1).all()
    hopeless = srpo_routed(torch.tensor([False, False]), group, torch.rand(2, 2), ones(2, 2))
    assert not hopeless.distill.any() and hopeless.weight.eq(1).all()


def test_srpo_against_a_plain_loop() -> None:
    (entropy,), mask = draws(4, 1)
    group, correct, valid = torch.tensor(GROUP), torch.tensor(CORRECT), torch.tensor(VALID)
    routes = srpo_routed(
        correct, group, f64(entropy).masked_fill(~torch.tensor(mask), NAN), torch.tensor(mask), valid, beta=0.7
    )
    taught = [
        VALID[i] and not CORRECT[i] and any(CORRECT[j] and VALID[j] and GROUP[j] == GROUP[i] for j in range(8))
        for i in range(8)
    ]
    assert routes.distill.tolist() == taught == route_mask(correct, group, valid).tolist() and sum(taught) == 2
    raw = {(i, t): math.exp(-0.7 * entropy[i][t]) for i in range(8) for t in range(4) if mask[i][t] and taught[i]}
    mean = sum(raw.values()) / len(raw)
    for i in range(8):
        for t in range(4):
            wanted = (raw[i, t] / mean if taught[i] else 1.0) if mask[i][t] else 0.0
            assert routes.weight[i, t].item() == pytest.approx(wanted, rel=1e-5)
    shared = srpo_routed(
        correct, group, f64(entropy), torch.tensor(mask), valid, beta=0.7,
        reduce=lambda x: x + f64([10.0, 5.0]) if x.ndim else x,
    )  # fmt: skip
    scale = (sum(raw.values()) + 10) / (len(raw) + 5)
    first = next(iter(raw))
    assert shared.weight[first].item() == pytest.approx(raw[first] / scale, rel=1e-5)


def test_records_are_frozen() -> None:
    weights = hpt(torch.tensor([True]), torch.tensor([1]))
    routes = srpo_routed(torch.tensor([True]), torch.tensor([1]), torch.zeros(1, 1), ones(1, 1))
    for record, name in ((weights, "reinforce"), (routes, "weight")):
        with pytest.raises(FrozenInstanceError):
            setattr(record, name, None)


def test_no_sibling_that_counts_teaches_nobody() -> None:
    correct, group = torch.tensor([False, True]), torch.tensor([0, 0])
    assert not route_mask(correct, group, torch.tensor([True, False])).any()
    assert not route_mask(correct, group, torch.tensor([False, True])).any()


def test_scope_worked_numbers() -> None:
    group = torch.zeros(2, dtype=torch.int64)
    nll, other = f64([2.0, 4.0]).log(), f64([9.0, 1.0])
    right, wrong = ones(2), ~ones(2)
    assert scope_weights(other, nll, wrong, group).tolist() == pytest.approx([0.6667, 0.3333], abs=1e-4)
    assert scope_weights(nll, other, right, group).tolist() == pytest.approx([0.3333, 0.6667], abs=1e-4)
    assert scope_weights(nll, other, right, group, direction="code").tolist() == pytest.approx([2 / 3, 1 / 3])
    assert scope_weights(other, nll, wrong, group, direction="code").tolist() == pytest.approx([2 / 3, 1 / 3])
    assert scope_weights(other, nll, wrong, group, normalise="mean1").tolist() == pytest.approx([4 / 3, 2 / 3])
    assert scope_weights(nll, other, right, group, tau=0.5).tolist() == pytest.approx([0.2, 0.8])
    assert scope_weights(nll, other, right, group, tau=1e9).tolist() == pytest.approx([0.5, 0.5])
    three = f64([1.361, 1.755, 2.383]).log()
    weights = scope_weights(three, three, ~ones(3), torch.tensor([5, 5, 5]))
    assert weights.tolist() == pytest.approx([0.426, 0.330, 0.243], abs=1e-3)
    assert scope_weights(
        three * 0 + 2000, three, torch.tensor([True, False, True]), torch.tensor([5, 5, 6])
    ).tolist() == [1, 1, 1]


@pytest.mark.parametrize("valid", [VALID, [True] * 8])
@pytest.mark.parametrize(("direction", "normalise"), [("paper", "sum1"), ("code", "mean1")])
def test_scope_against_a_plain_loop(direction: str, normalise: str, valid: list[bool]) -> None:
    (new, old, teacher), mask = draws(5, 3)
    tensors = [f64(x).masked_fill(~torch.tensor(mask), NAN) for x in (new, old, teacher)]
    tensors[0].requires_grad_()
    inputs = (*tensors[:2], torch.tensor(mask), tensors[2], torch.tensor(CORRECT), torch.tensor(GROUP))
    options = {"tau": 0.4, "direction": direction, "normalise": normalise}
    loss = scope(*inputs, torch.tensor(valid), **options).loss  # type: ignore[arg-type]
    gradient = slope(loss, tensors[0])
    counts = [valid[i] and any(mask[i]) for i in range(8)]

    def score(i: int) -> float:
        source, sign = (old, 1 if direction == "paper" else -1) if CORRECT[i] else (teacher, -1)
        nll = -sum(x for x, m in zip(source[i], mask[i], strict=True) if m) / sum(mask[i])
        return math.exp(sign * nll / 0.4)

    for i in range(8):
        branch = [j for j in range(8) if counts[j] and GROUP[j] == GROUP[i] and CORRECT[j] == CORRECT[i]]
        weight = score(i) / sum(score(j) for j in branch) if counts[i] else 0.0
        weight *= len(branch) if normalise == "mean1" else 1
        for t in range(4):
            rho = math.exp(new[i][t] - old[i][t])
            wanted = weight * (-rho if CORRECT[i] else rho * (new[i][t] - teacher[i][t])) if mask[i][t] else 0.0
            assert loss[i, t].item() == pytest.approx(wanted, abs=1e-6)
            assert gradient[i, t].item() == pytest.approx(wanted, abs=1e-6)
    if all(valid):
        assert torch.equal(scope(*inputs, **options).loss, loss)  # type: ignore[arg-type]


def test_scope_defaults() -> None:
    old, correct = f64([[-1.0], [-3.0]]), ones(2)
    loss = scope(old, old, ones(2, 1), old, correct, torch.tensor([0, 0])).loss
    assert loss[:, 0].tolist() == pytest.approx([-1 / (1 + math.exp(2)), -1 / (1 + math.exp(-2))])
    half = scope(old.bfloat16(), old.bfloat16(), ones(2, 1), old.bfloat16(), correct, torch.tensor([0, 0])).loss
    assert half.dtype == torch.float32


LOGITS = f64([0.3, -0.8, 1.1, 0.0])


@pytest.mark.parametrize("form", ["sampled", "expected"])
def test_otr_against_a_plain_loop(form: str) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 5, generator=generator, dtype=torch.float64)
    token = torch.randint(5, (2, 3), generator=generator)
    mask = torch.tensor([[True, True, False], [True, False, False]])
    poisoned = logits.masked_fill(~mask[..., None], NAN).requires_grad_()
    options = {"form": form, "samples": 40_000, "temperature": 0.7, "wrong_reward": -0.4}
    loss = otr(
        poisoned, torch.where(mask, token, -100), mask, generator=torch.Generator().manual_seed(1), **options
    ).loss  # type: ignore[arg-type]
    for i in range(2):
        for t in range(3):
            weights = [math.exp(x / 0.7) for x in logits[i, t].tolist()]
            norm = math.log(sum(math.exp(x) for x in logits[i, t].tolist()))
            wanted = 0.0
            for a in range(5):
                reward = 1.0 if a == token[i, t].item() else -0.4
                wanted -= weights[a] / sum(weights) * reward * (logits[i, t, a].item() - norm)
            tolerance = 1e-9 if form == "expected" else 0.02
            assert loss[i, t].item() == pytest.approx(wanted if mask[i, t] else 0.0, abs=tolerance)
    loss.sum().backward()
    assert poisoned.grad is not None and poisoned.grad.isfinite().all() and not poisoned.grad[~mask].any()


def test_otr_gradient_by_enumeration() -> None:
    logits = LOGITS.clone().requires_grad_()
    loss = otr(logits[None, None], torch.tensor([[2]]), ones(1, 1), temperature=1.0, wrong_reward=-0.25).loss
    log_pi = logits.log_softmax(0)
    fine_tuning = slope(-1.25 * log_pi[2].exp().detach() * log_pi[2], logits)
    assert torch.allclose(slope(loss, logits), fine_tuning, atol=1e-12)


def test_otr_defaults_and_randomness() -> None:
    logits, token = LOGITS.float()[None, None], torch.tensor([[1]])
    value = otr(logits, token, ones(1, 1)).loss
    assert torch.equal(value, otr(logits, token, ones(1, 1), form="expected", temperature=1.3, wrong_reward=-0.1).loss)
    first, same, third = (
        otr(logits, token, ones(1, 1), form="sampled", generator=torch.Generator().manual_seed(s)).loss
        for s in (1, 1, 2)
    )
    assert torch.equal(first, same) and not torch.equal(first, third)
    assert abs(first.item() - value.item()) < 0.3
    draws = torch.Generator().manual_seed(1)
    assert torch.equal(otr(logits, token, ones(1, 1), form="sampled", samples=256, generator=draws).loss, first)
    one = otr(logits, token, ones(1, 1), form="sampled", samples=1, generator=torch.Generator().manual_seed(0)).loss
    log_pi = logits[0, 0].log_softmax(0)
    options = [-log_pi[a].item() * (1.0 if a == 1 else -0.1) for a in range(4)]
    assert min(abs(one.item() - x) for x in options) < 1e-6
    assert otr(logits.bfloat16(), token, ones(1, 1)).loss.dtype == torch.float32


Z, M, A, G = torch.zeros(2, 3), ones(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
C, L, T = torch.tensor([True, False]), torch.zeros(2, 3, 4), torch.zeros(2, 3, dtype=torch.int64)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: upge(Z, Z, A, M, denominator="ref"), "denominator: expected old, self, sequence, one or shaped"),  # type: ignore[arg-type]
    (lambda: upge(Z, Z, A, M, shape=0.0), "shape: expected a number > 0, got 0"),
    (lambda: upge(Z, Z, A, M, Z), r"stable: expected bool \[2, 3\]"),
    (lambda: upge(Z, Z, A, Z), "mask: expected bool"),
    (lambda: hpt(C, G, gate=1.1), r"gate: expected a number in \[0, 1\]"),
    (lambda: hpt(C, G, gate=-0.1), r"gate: expected a number in \[0, 1\]"),
    (lambda: hpt(A, G), r"correct: expected bool \[2\]"),
    (lambda: hpt(C, G.int()), "group: expected int64"),
    (lambda: hpt(C, G, A), "valid: expected bool"),
    (lambda: srft(Z, M, unit="row"), "unit: expected 'sample' or 'batch'"),  # type: ignore[arg-type]
    (lambda: srft(Z[:1], M), "entropy: expected real"),
    (lambda: srft(Z, Z), "mask: expected bool"),
    (lambda: srpo_routed(C, G, Z, M, beta=-1.0), "beta: expected a number >= 0"),
    (lambda: srpo_routed(C, G, Z[:, :1] * NAN, M[:, :1]), "entropy: 1 unmasked steps are not finite"),
    (lambda: srpo_routed(C, G, Z, M[:1]), r"mask: expected bool \[2, T\]"),
    (lambda: scope_weights(A, A, C, G, tau=0.0), "tau: expected a number > 0"),
    (lambda: scope_weights(A, A, C, G, direction="up"), "direction, normalise: expected paper or code"),  # type: ignore[arg-type]
    (lambda: scope_weights(A, A, C, G, normalise="sum"), "direction, normalise: expected paper or code"),  # type: ignore[arg-type]
    (lambda: scope_weights(A * NAN, A, C, G), "student_nll: 2 unmasked steps are not finite"),
    (lambda: scope_weights(A, A * NAN, C, G), "teacher_nll: 2 unmasked steps are not finite"),
    (lambda: scope(Z, Z, M, Z[:1], C, G), "teacher_log_prob: expected real"),
    (lambda: otr(L[0], T, M), r"logits: expected floating \[2, 3, 'V'\]"),
    (lambda: otr(L.long(), T, M), r"logits: expected floating \[2, 3, 'V'\]"),
    (lambda: otr(L, T.int(), M), r"token: expected int64 \[2, 3\]"),
    (lambda: otr(L, T, Z), "mask: expected bool"),
    (lambda: otr(L, T, M, form="sampled"), "generator: the sampled form needs a torch.Generator"),
    (lambda: otr(L, T, M, form="exact"), "form, samples, temperature: expected sampled or expected"),  # type: ignore[arg-type]
    (lambda: otr(L, T, M, samples=0), "form, samples, temperature: expected sampled or expected"),
    (lambda: otr(L, T, M, temperature=0.0), "form, samples, temperature: expected sampled or expected"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
