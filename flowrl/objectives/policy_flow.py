"""PolicyFlow on denoising steps: a surrogate ratio from the change of the velocity, and the Brownian regulariser.

2602.01156 trains small flow policies of robots. There an action is the end of an ODE path plus Gaussian noise, and the
ratio compares that noise with the noise shifted by ``v - v_old`` at a random point of the straight line from the path's
noise to its end: the change of velocity stands for the change of the end point. Here the Gaussian noise is that of a
stochastic denoising step. Reconstructed: the paper has no denoising steps. What is open is named:

- transport, what a change of velocity does to the next latent (see `policy_flow_log_ratio`);
- where the two velocities are taken: at the latent of the rollout (no further network calls; the trainer's replay), or
  on the straight line between x1 and x0 (``flowrl.dynamics.interpolate``), as in the paper. The functions take both.

t = 1 is noise here, and the velocity points from data to noise; the paper has both the other way round.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from flowrl.advantage.checks import check_choice
from flowrl.dynamics.kernels import StepPoint
from flowrl.objectives.ratios import reduction_factor
from flowrl.records import LogProbReduction

Transport = Literal["step", "kernel", "path"]


def policy_flow_log_ratio(
    value: Tensor,
    old_value: Tensor,
    x_next: Tensor,
    old_mean: Tensor,
    std: Tensor,
    point: StepPoint,
    reduction: LogProbReduction,
    *,
    transport: Transport = "step",
    slope: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Score the step's noise under a mean that the change of velocity shifts: (now, old) for any policy loss.

    ``now = R[-(x_next - old_mean - shift)^2 / (2 std^2)]``, ``old = R[-(x_next - old_mean)^2 / (2 std^2)]``, R the
    reduction, ``shift = -c (value - old_value)``. On policy now = old exactly. transport gives c:

    step: dt, an Euler step's; it needs no kernel, so it also serves steps of a higher-order solver with noise added.
    kernel: ``slope`` (``mean_slope``, [N, 1, ..., 1]), what the kernel does: for kernels the plain ratio exactly.
    path: 1, the whole path at once, as in the paper, where the noise is added at the end of the path.

    value (carries the gradient), old_value: velocities of a flow, [N, ...]; x_next, old_mean: alike; std:
    [N, 1, ..., 1] above 0. Returns float32 [N] twice. The paper clips at 0.2 with ``sum`` over a few action elements.
    Raises ValueError for a wrong shape, std <= 0, an unknown transport or a missing slope.
    """
    if not value.shape == old_value.shape == x_next.shape == old_mean.shape or value.ndim < 2:
        raise ValueError("value, old_value, x_next, old_mean: expected one shape [N, ...] for all four")
    if not bool((std > 0).all()):
        raise ValueError("std: expected numbers above 0; a deterministic step has no ratio")
    check_choice("transport", transport, get_args(Transport))
    length: Tensor | float = point.length if transport == "step" else 1.0
    if transport == "kernel":
        if slope is None:
            raise ValueError("slope: the transport 'kernel' needs the kernel's mean_slope")
        length = slope.float()
    std = std.float()
    noise = (x_next.float() - old_mean.detach().float()) / std
    shift = -length * (value.float() - old_value.detach().float()) / std
    factor = -0.5 * reduction_factor(reduction, value[0].numel())
    return factor * (noise - shift).square().flatten(1).sum(1), factor * noise.square().flatten(1).sum(1)


def brownian_regulariser(
    value: Tensor, old_value: Tensor, x: Tensor, point: StepPoint, reduction: LogProbReduction = "mean"
) -> Tensor:
    """Measure how far the velocity is from pure diffusion: R[(t value + x1_hat_old)^2], one number a sample.

    ``x1_hat_old = x + (1 - t) old_value`` is the old policy's noise estimate, and ``-x1_hat / t`` the score: a velocity
    equal to the score carries the samples as Brownian motion does, which raises their entropy. A small weight (0.002 to
    0.25 in the paper's tasks) keeps a policy from collapsing without knowing its entropy; on pictures it pulls towards
    noise. value (carries the gradient), old_value, x: [N, ...]; reduction: ``mean`` as the released code, ``sum`` as
    the paper writes it. Returns float32 [N]. PolicyFlow (2602.01156), with time and velocity in this library's sense.
    Raises ValueError where the shapes differ.
    """
    if not value.shape == old_value.shape == x.shape or value.ndim < 2:
        raise ValueError("value, old_value, x: expected one shape [N, ...] for all three")
    noise = x.float() + (1 - point.t) * old_value.detach().float()
    gap = point.t * value.float() + noise
    return gap.square().flatten(1).sum(1) * reduction_factor(reduction, value[0].numel())
