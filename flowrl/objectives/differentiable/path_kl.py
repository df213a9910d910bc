"""Divergence of a chain from the chain of the reference, step by step, and CTRL's objective on top of it."""

from __future__ import annotations

from torch import Tensor


def step_kl(mean: Tensor, mean_ref: Tensor, std: Tensor) -> Tensor:
    """``||mean - mean_ref||^2 / (2 std^2)``, summed over latent elements: nats of one step, [B], in the given type.

    The sum over the steps of a chain is its divergence from the reference chain (Girsanov; for Euler-Maruyama
    ``dt (1 + g^2 (1 - t) / 2t)^2 ||dv||^2 / 2 g^2``). mean, mean_ref: [B, ...]; std: [B, 1, ..., 1], above 0 (ValueError): a
    step without noise has no divergence.
    """
    if not bool((std > 0).all()):
        raise ValueError("step_kl: a step with std 0 has no divergence; leave the last step out")
    return ((mean - mean_ref) / std).square().flatten(1).sum(1) / 2


def ctrl_loss(log_likelihood: Tensor, kl: Tensor, strength: float) -> Tensor:
    """``-gamma log p(y | x0, c) + KL(path || reference path)``, [B] (CTRL, 2406.12120, its objective 8).

    log_likelihood: [B], of an offline classifier; of several independent conditions, their sum. kl: [B] in nats of the
    whole latent, so ``strength`` is the gamma of ``p(x | c) p(y | x, c)^gamma``. The released code averages the
    divergence over D latent elements and weights the two terms by .1 and .01: gamma = 10 D here.
    """
    return kl - strength * log_likelihood
