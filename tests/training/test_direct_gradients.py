"""Gradients of ReFL, DRaFT and AlignProp with the real trainer, on the affine policy: closed forms, no sampling error."""

from __future__ import annotations

import pytest
import torch

from tests.training.affine import Affine, make_trainer

B, ELEMENTS = 1.3, 64


def gradients(name: str, steps: int = 6, iteration: int = 0, **changes) -> tuple[torch.Tensor, dict]:
    """d loss / d shift of every step at the first iteration, and the metrics row."""
    network = Affine(torch.linspace(1, 0, steps + 1), 0.4, 0.8)
    trainer = make_trainer(network, "Linear", {"b": B}, **({"objective.name": name} | changes))
    held: list[torch.Tensor] = []
    trainer._step = lambda: held.append(network.shift.grad.clone()) or 0.0
    trainer.iteration = iteration
    row = trainer.iterate()
    return held[0].double(), row


def chain_slopes(steps: int = 6) -> torch.Tensor:
    """d x0 / d shift_k of the ODE chain: -dt prod over later steps of (1 - dt k_j)."""
    t = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    k = (t - (1 - t) * 0.64) / ((1 - t) ** 2 * 0.64 + t**2)
    factor = 1 - k[:-1] / steps
    return torch.stack([-factor[j + 1 :].prod() / steps for j in range(steps)])


@pytest.mark.parametrize("last", [0, 1, 4])
def test_draft_is_the_gradient_of_the_whole_chain_or_of_its_end(last: int) -> None:
    found, _ = gradients("draft", **{"direct.last": last})
    expected = -B * ELEMENTS * chain_slopes()
    if last:
        expected[: 6 - last] = 0
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_draft_lv_is_the_last_step_whatever_the_number_of_pictures() -> None:
    """For a linear reward every picture noised anew has the same gradient, so their mean is that of one."""
    expected = -B * ELEMENTS * chain_slopes()
    expected[:5] = 0
    for repeats in (0, 3):
        found, _ = gradients("draft_lv", **{"direct.repeats": repeats})
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_refl_is_the_one_step_estimate_of_a_late_step() -> None:
    """x0_hat = x - t v: the slope is -t at the drawn step and 0 elsewhere; beyond the margin there is none."""
    t = torch.linspace(1, 0, 7, dtype=torch.float64)[:-1]
    drawn = set()
    for iteration in range(12):
        found, row = gradients(
            "refl", iteration=iteration, **{"direct.last": 3, "direct.margin": 1e6, "direct.scale": 0.01}
        )
        (k,) = found.nonzero().flatten().tolist()
        drawn.add(k)
        assert float(found[k]) == pytest.approx(0.01 * B * ELEMENTS * float(t[k]), rel=1e-4)
        assert row["calls/forward"] == k + 1 and row["calls/backward"] == 1
    assert drawn == {3, 4, 5}
    found, row = gradients("refl", **{"direct.last": 3, "direct.margin": -1e6})
    assert float(found.abs().max()) == 0 and row["direct/loss"] == 0


def test_alignprop_draws_how_far_back_it_goes() -> None:
    full = -B * ELEMENTS * chain_slopes()
    lengths = set()
    for iteration in range(16):
        found, _ = gradients("alignprop", iteration=iteration, **{"direct.least": 2, "direct.last": 5})
        kept = int((found != 0).sum())
        lengths.add(kept)
        torch.testing.assert_close(found[6 - kept :], full[6 - kept :], rtol=1e-4, atol=1e-4)
    assert lengths == {2, 3, 4, 5}
    found, _ = gradients("alignprop", **{"direct.last": 0, "direct.least": 2, "direct.per_sample": True})
    share = (found / full).tolist()  # each step is trained by the samples that reach back to it: sixteenths of them
    assert share[4:] == pytest.approx([1, 1], rel=1e-4) and share == sorted(share)
    assert all(abs(16 * s - round(16 * s)) < 1e-2 for s in share) and 0 < share[1] < 1


def test_alignprop_aims_at_a_target() -> None:
    away, _ = gradients("alignprop", **{"direct.last": 0, "direct.target": 1e6})
    plain, _ = gradients("alignprop", **{"direct.last": 0})
    past, _ = gradients("alignprop", **{"direct.last": 0, "direct.target": -1e6})
    torch.testing.assert_close(away, plain)
    torch.testing.assert_close(past, -plain)


def test_stochastic_steps_differentiate_through_their_noise() -> None:
    """With memoryless noise the chain's factors and slopes are the kernel's; the noise itself is the same when replayed."""
    found, _ = gradients("draft", **{"direct.last": 0, "direct.stochastic": True})
    t = torch.linspace(1, 0, 7, dtype=torch.float64)
    now, after = t[:-1], t[1:]
    k = (now - (1 - now) * 0.64) / ((1 - now) ** 2 * 0.64 + now**2)
    rho = after * (1 - now) / (now * (1 - after))
    factor = (1 - after) * (1 - now * k) + after * rho * (1 + (1 - now) * k)
    slope = -(1 - after) * now + after * rho * (1 - now)
    slopes = torch.stack([slope[j] * factor[j + 1 :].prod() for j in range(6)])
    torch.testing.assert_close(found, -B * ELEMENTS * slopes, rtol=1e-4, atol=1e-4)


def test_a_velocity_penalty_pulls_towards_the_reference() -> None:
    """At the reference the penalty has no gradient; away from it, w times the mean over elements of 2 dv, at its own step."""
    at_reference, row = gradients("draft", **{
        "direct.last": 0, "objective.kl.form": "velocity", "objective.kl.weight": 0.5, "model.train": "lora",
    })  # fmt: skip
    torch.testing.assert_close(at_reference, -B * ELEMENTS * chain_slopes(), rtol=1e-4, atol=1e-4)
    assert row["policy/kl"] == 0
    network = Affine(torch.linspace(1, 0, 7), 0.4, 0.8)
    network.shift.data += 0.3
    trainer = make_trainer(network, "Linear", {"b": 0.0}, **{
        "objective.name": "draft", "direct.last": 0, "objective.kl.form": "velocity", "objective.kl.weight": 0.5,
        "model.train": "lora",
    })  # fmt: skip
    held: list[torch.Tensor] = []
    trainer._step = lambda: held.append(network.shift.grad.clone()) or 0.0
    row = trainer.iterate()
    torch.testing.assert_close(held[0], torch.full((6,), 0.5 * 2 * 0.3), rtol=1e-4, atol=1e-5)
    assert row["policy/kl"] == pytest.approx(0.5 * 6 * 0.09, rel=1e-4)
