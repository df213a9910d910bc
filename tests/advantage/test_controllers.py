"""Controllers, the off-policy mask and the monitors: worked numbers, walks by hand, plain loops, bad input."""

from __future__ import annotations

import math
import random
from collections.abc import Callable
from dataclasses import FrozenInstanceError

import pytest
import torch
from torch import Tensor

from flowrl.advantage.controllers import (
    EntropyControlState,
    KLControlState,
    adaptive_entropy,
    adaptive_kl,
    likelihood_indicators,
    offpolicy_mask,
    x0_hat_spread,
)

NAN = math.nan


def f64(values: object) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


def ones(*shape: int) -> Tensor:
    return torch.ones(*shape, dtype=torch.bool)


@pytest.mark.parametrize(
    ("kl", "factor"), [(6.6, 1 + 0.1 * 0.256), (60.0, 1 + 0.2 * 0.256), (0.0, 1 - 0.2 * 0.256), (5.7, 1 - 0.05 * 0.256)]
)
def test_adaptive_kl_values(kl: float, factor: float) -> None:
    state = KLControlState.start(0.2)
    after = adaptive_kl(state, torch.tensor(kl), target=6.0, horizon=1000.0, samples=256)
    assert after.coef.item() == pytest.approx(0.2 * factor, rel=1e-6) and after.coef.dtype == torch.float64
    assert state.coef.item() == 0.2


def test_adaptive_kl_rests_on_target() -> None:
    state = KLControlState.start()
    assert state.coef.item() == 0.001
    assert adaptive_kl(state, f64(0.1)).coef.item() == pytest.approx(0.001, rel=1e-12)
    assert adaptive_kl(state, f64(9.0)).coef.item() == pytest.approx(0.001 * (1 + 0.2 / 10_000), rel=1e-12)
    assert KLControlState.from_state_dict(state.state_dict()).coef.item() == 0.001
    assert KLControlState.start(0.0).coef.item() == 0.0
    half = adaptive_kl(state, torch.tensor(0.05), target=0.5, horizon=0.5).coef.item()
    assert half == pytest.approx(0.001 * (1 - 0.4), rel=1e-6)


def test_adaptive_entropy_walk() -> None:
    state = EntropyControlState.start(0.003)
    assert state.applied().item() == 0.003 and EntropyControlState.start().coef.item() == 0.0
    walk = []
    for entropy in (0.1, 0.2, 0.21, 0.3, 0.3, 0.3, 0.0):
        state = adaptive_entropy(state, f64(entropy))
        walk.append((round(state.coef.item(), 6), round(state.applied().item(), 6)))
    assert walk == [(0.008, 0.008), (0.013, 0.013), (0.008, 0), (0.003, 0), (0.0, 0), (0.0, 0), (0.005, 0.005)]
    assert state.coef.dtype == torch.float64
    assert EntropyControlState.from_state_dict(state.state_dict()).applied().item() == pytest.approx(0.005)
    capped = adaptive_entropy(EntropyControlState.start(0.9), f64(-5.0), target=-4.0, step=0.5)
    assert capped.coef.item() == 1.0
    bounded = adaptive_entropy(EntropyControlState.start(0.5), f64(0.0), step=0.5, least=0.1, most=0.7)
    assert bounded.coef.item() == pytest.approx(0.7)
    assert adaptive_entropy(bounded, f64(1.0), step=0.7, least=0.1, most=0.7).coef.item() == pytest.approx(0.1)
    assert adaptive_entropy(bounded, f64(0.0), step=0.1, least=0.3, most=0.3).coef.item() == pytest.approx(0.3)


@pytest.mark.parametrize("seed", range(3))
def test_offpolicy_mask_against_a_plain_loop(seed: int) -> None:
    draw = random.Random(seed)
    new, old = ([[draw.gauss(-1, 1) for _ in range(4)] for _ in range(12)] for _ in range(2))
    mask = [[draw.random() < 0.7 for _ in range(4)] for _ in range(12)]
    advantage = [-1.0] * 4 + [draw.choice([-1.0, 0.0, 1.0]) for _ in range(8)]
    old[0] = [1.0 + x for x in new[0]]
    mask[0][0] = True
    tensors = [f64(x).masked_fill(~torch.tensor(mask), NAN) for x in (new, old)]
    kept = offpolicy_mask(*tensors, f64(advantage), torch.tensor(mask), limit=0.2)
    wide = offpolicy_mask(*tensors, f64(advantage)[:, None].expand(12, 4), torch.tensor(mask), limit=0.2)
    assert torch.equal(kept, wide)
    dropped = 0
    for i in range(12):
        gap = sum(o - n for n, o, m in zip(new[i], old[i], mask[i], strict=True) if m) / max(sum(mask[i]), 1)
        keep = advantage[i] >= 0 or gap <= 0.2
        dropped += not keep
        assert kept[i].tolist() == [m and keep for m in mask[i]]
    assert dropped > 0


def test_offpolicy_mask_edges() -> None:
    new, old = torch.tensor([[0.0, 0.0]]), torch.tensor([[1.0, 0.0]])
    minus = torch.tensor([-1.0])
    assert offpolicy_mask(new, old, minus, ones(1, 2)).all()
    assert not offpolicy_mask(new, old + 0.01, minus, ones(1, 2)).any()
    assert offpolicy_mask(new, old + 9, minus, ones(1, 2), limit=math.inf).all()
    assert not offpolicy_mask(new, old, minus, torch.tensor([[True, False]])).any()
    mixed = offpolicy_mask(new, old + 9, torch.tensor([[-1.0, 0.0]]), ones(1, 2))
    assert mixed.tolist() == [[False, True]]


def test_indicators_worked_numbers() -> None:
    p = f64([[[0.5, 0.3, 0.15, 0.05]] * 2, [[0.05, 0.15, 0.3, 0.5], [NAN] * 4]])
    mask = torch.tensor([[True, True], [True, False]])
    logits = (p.log() + 3.0).requires_grad_()
    result = likelihood_indicators(logits, mask, k=2)
    entropy = -(0.5 * math.log(0.5) + 0.3 * math.log(0.3))
    assert result.entropy.flatten().tolist() == pytest.approx([entropy] * 3 + [0.0])
    assert result.mass.flatten().tolist() == pytest.approx([0.8] * 3 + [0.0])
    assert result.mean_entropy.item() == pytest.approx(entropy) and result.mean_mass.item() == pytest.approx(0.8)
    assert not result.entropy.requires_grad and result.entropy.dtype == result.mass.dtype == torch.float32
    own = likelihood_indicators(logits, mask, k=2, renormalise=True)
    q = (0.5 / 0.8, 0.3 / 0.8)
    assert own.entropy[0, 0].item() == pytest.approx(-sum(x * math.log(x) for x in q))
    single = likelihood_indicators(logits, torch.tensor([[True, False], [False, False]]), k=2)
    assert single.mean_entropy.item() == pytest.approx(entropy) and single.mean_mass.item() == pytest.approx(0.8)
    with pytest.raises(FrozenInstanceError):
        setattr(single, "mass", None)  # noqa: B010
    empty = likelihood_indicators(logits, ~ones(2, 2), k=1)
    assert empty.mean_entropy.item() == 0.0 and empty.mean_mass.item() == 0.0


def test_indicators_of_the_whole_vocabulary() -> None:
    logits = torch.randn(2, 3, 20, generator=torch.Generator().manual_seed(0))
    log_p = logits.log_softmax(-1)
    for renormalise in (False, True):
        result = likelihood_indicators(logits, ones(2, 3), k=20, renormalise=renormalise)
        assert torch.allclose(result.entropy, -(log_p.exp() * log_p).sum(-1), atol=1e-5)
        assert torch.allclose(result.mass, torch.ones(2, 3), atol=1e-5)
    ten = likelihood_indicators(logits, ones(2, 3))
    assert torch.allclose(ten.mass, log_p.exp().sort(-1, descending=True).values[..., :10].sum(-1), atol=1e-5)
    assert (likelihood_indicators(logits, ones(2, 3), k=1).mass == log_p.exp().max(-1).values).float().mean() > 0.1


def test_states_are_frozen() -> None:
    for state in (KL, ENTROPY):
        with pytest.raises(FrozenInstanceError):
            setattr(state, "coef", None)  # noqa: B010


def test_spread_worked_numbers() -> None:
    x0_hat = f64([[[0.0, 0.0], [1.0, 1.0]], [[2.0, 4.0], [1.0, 1.0]], [[5.0, 5.0], [NAN, NAN]]])
    mask = torch.tensor([[True, True], [True, True], [True, False]])
    spread = x0_hat_spread(x0_hat, torch.tensor([8, 8, -1]), mask)
    assert spread.dtype == torch.float32
    assert spread.tolist() == [[pytest.approx(math.sqrt(2.5)), 0.0], [pytest.approx(math.sqrt(2.5)), 0.0], [0.0, 0.0]]


def test_spread_against_a_plain_loop() -> None:
    generator = torch.Generator().manual_seed(0)
    x0_hat = torch.randn(7, 3, 2, 2, generator=generator)
    mask = torch.rand(7, 3, generator=generator) < 0.7
    group = torch.tensor([3, 9, 3, 3, 9, 3, 1])
    poisoned = torch.where(mask[..., None, None], x0_hat, NAN).requires_grad_()
    spread = x0_hat_spread(poisoned, group, mask)
    assert not spread.requires_grad
    for i in range(7):
        for t in range(3):
            if not mask[i, t]:
                assert spread[i, t] == 0
                continue
            rows = torch.stack([x0_hat[j, t].flatten() for j in range(7) if group[j] == group[i] and mask[j, t]])
            assert spread[i, t].item() == pytest.approx(rows.var(0, correction=0).mean().sqrt().item(), abs=1e-6)


Z, M, A, G = torch.zeros(2, 3), ones(2, 3), torch.zeros(2), torch.zeros(2, dtype=torch.int64)
KL, ENTROPY, ONE = KLControlState.start(), EntropyControlState.start(), torch.tensor(1.0)
BAD: list[tuple[Callable[[], object], str]] = [
    (lambda: KLControlState.start(-1.0), "coef: expected a number >= 0, got -1"),
    (lambda: EntropyControlState.start(-1.0), "coef: expected a number >= 0, got -1"),
    (lambda: adaptive_kl(KL, torch.ones(1)), "kl: expected a finite real scalar"),
    (lambda: adaptive_kl(KL, ONE * NAN), "kl: expected a finite real scalar, got nan"),
    (lambda: adaptive_kl(KL, ONE * 1j), "kl: expected a finite real scalar"),
    (lambda: adaptive_kl(KL, ONE, target=0.0), "target, horizon, samples: expected > 0"),
    (lambda: adaptive_kl(KL, ONE, horizon=0.0), "target, horizon, samples: expected > 0"),
    (lambda: adaptive_kl(KL, ONE, samples=0), "target, horizon, samples: expected > 0"),
    (lambda: adaptive_entropy(ENTROPY, A), "observed: expected a finite real scalar"),
    (lambda: adaptive_entropy(ENTROPY, ONE, step=0.0), "step, least, most: expected step > 0"),
    (lambda: adaptive_entropy(ENTROPY, ONE, least=-0.1), "step, least, most: expected step > 0"),
    (lambda: adaptive_entropy(ENTROPY, ONE, least=0.3, most=0.2), "step, least, most: expected step > 0"),
    (lambda: offpolicy_mask(Z, Z, A, M, limit=NAN), "limit: expected a number, got nan"),
    (lambda: offpolicy_mask(Z[:1], Z, A, M), "log_prob: expected real"),
    (lambda: offpolicy_mask(Z, Z[:1], A, M), "old_log_prob: expected real"),
    (lambda: offpolicy_mask(Z, Z, Z[:1], M), "advantage: expected real"),
    (lambda: offpolicy_mask(Z, Z, A, Z), "mask: expected bool"),
    (lambda: likelihood_indicators(Z, M), r"logits: expected floating \[2, 3, 'V'\]"),
    (lambda: likelihood_indicators(torch.zeros(2, 2, 9), M), r"logits: expected floating \[2, 3, 'V'\]"),
    (lambda: likelihood_indicators(torch.zeros(2, 3, 9).long(), M), r"logits: expected floating \[2, 3, 'V'\]"),
    (lambda: likelihood_indicators(torch.zeros(2, 3, 9), M), "k: expected 1 to 9, got 10"),
    (lambda: likelihood_indicators(torch.zeros(2, 3, 9), M, k=0), "k: expected 1 to 9, got 0"),
    (lambda: likelihood_indicators(torch.zeros(2, 3, 9), Z), "mask: expected bool"),
    (lambda: x0_hat_spread(Z, G, M), r"x0_hat: expected floating \[2, 3, '...'\]"),
    (lambda: x0_hat_spread(torch.zeros(2, 2, 4), G, M), r"x0_hat: expected floating \[2, 3, '...'\]"),
    (lambda: x0_hat_spread(torch.zeros(2, 3, 4).int(), G, M), r"x0_hat: expected floating \[2, 3, '...'\]"),
    (lambda: x0_hat_spread(torch.zeros(2, 3, 4), G.int(), M), "group: expected int64"),
    (lambda: x0_hat_spread(torch.zeros(2, 3, 4), G[:1], M), r"group: expected int64 \[2\]"),
    (lambda: x0_hat_spread(torch.zeros(2, 3, 4), G, Z), "mask: expected bool"),
]


@pytest.mark.parametrize(("call", "message"), BAD)
def test_bad_input_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        call()
