"""One denoising step as a Gaussian transition ``x_next = mean + std * noise``, for every sampler.

A kernel is a pure function of the noise level, the latent, the two endpoint estimates and the step's place on the
schedule. Two forms cover all of them:

    mixing           mean = alpha' x0_hat + sigma' rho x1_hat,                   std = sigma' sqrt(1 - rho^2)
    Euler-Maruyama   mean = x - dt (x1_hat - x0_hat) - (g^2 dt / 2t) x1_hat,     std = g sqrt(dt)

where a prime marks the next time, t = 1 is noise and ``dt = t - t' > 0``.
The Euler-Maruyama form discretises ``dx = [v - (g^2 / 2) score] dt + g dW``, which keeps the marginals of a flow for
any g(t) >= 0 and is written for flow paths alone. The mixing form holds on any path. Everything is float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from difflib import get_close_matches

import torch
from torch import Tensor

from flowrl.records import Schedule

MEMORYLESS_NOISE = math.sqrt(2.0)
"""The ``a`` that makes flow_sde and precise memoryless, g^2 = 2t / (1 - t) (Adjoint Matching, 2409.08861)."""


@dataclass(frozen=True)
class StepPoint:
    """Where a step starts and ends: float32 tensors that broadcast against the latents, usually [B, 1, ..., 1].

    t, alpha, sigma belong to the start and the ``_next`` names to the end. t_clamp is the schedule's second time:
    flow_sde uses it in place of t = 1, where its g is infinite, and nowhere else; wan_sde scales its g by it. t_last
    is the schedule's last time, 0 unless given; only wan_sde reads it.
    """

    t: Tensor
    alpha: Tensor
    sigma: Tensor
    t_next: Tensor
    alpha_next: Tensor
    sigma_next: Tensor
    t_clamp: Tensor
    t_last: Tensor = field(default_factory=lambda: torch.zeros(()))

    @classmethod
    def of(cls, schedule: Schedule, step: Tensor, ndim: int) -> StepPoint:
        """Gather each sample's own step, int64 [B] in [0, T), as [B, 1, ..., 1] of ``ndim`` dimensions.

        The tensors lie on the schedule's device.
        """
        step = step.to(schedule.t.device)

        def gather(values: Tensor, index: Tensor) -> Tensor:
            return values.float()[index].reshape(-1, *[1] * (ndim - 1))

        return cls(
            t=gather(schedule.t, step),
            alpha=gather(schedule.alpha, step),
            sigma=gather(schedule.sigma, step),
            t_next=gather(schedule.t, step + 1),
            alpha_next=gather(schedule.alpha, step + 1),
            sigma_next=gather(schedule.sigma, step + 1),
            t_clamp=gather(schedule.t, torch.ones_like(step)),
            t_last=gather(schedule.t, torch.full_like(step, schedule.steps)),
        )

    @property
    def length(self) -> Tensor:
        """``dt = t - t_next``, positive."""
        return self.t - self.t_next


Kernel = Callable[[float, Tensor, Tensor, Tensor, StepPoint], tuple[Tensor, Tensor]]
"""(noise, x, x0_hat, x1_hat, point) -> (mean, std); the mean must be linear in (x, x0_hat, x1_hat)."""


def mixing(
    x0_hat: Tensor, x1_hat: Tensor, alpha_next: Tensor, sigma_next: Tensor, rho: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Move to the next time, keeping a part ``rho`` of the noise estimate and drawing the rest anew.

    ``mean = alpha' x0_hat + sigma' rho x1_hat``, ``std = sigma' sqrt(1 - rho^2)``; rho in [0, 1], and 1 is the Euler
    ODE step of a flow. x0_hat, x1_hat: float32 [B, ...]; the rest broadcasts. Returns (mean like x0_hat, std like
    sigma_next).
    """
    mean = alpha_next * x0_hat + sigma_next * rho * x1_hat
    return mean, sigma_next * ((1 - rho) * (1 + rho)) ** 0.5


def euler_maruyama(
    x: Tensor, x0_hat: Tensor, x1_hat: Tensor, diffusion: Tensor | float, point: StepPoint
) -> tuple[Tensor, Tensor]:
    """Take one Euler-Maruyama step of the marginal-preserving SDE with diffusion coefficient g, on a flow path.

    ``mean = x - dt (x1_hat - x0_hat) - (g^2 dt / 2t) x1_hat``, ``std = g sqrt(dt)``. Shapes as in `mixing`.
    """
    dt = point.length
    mean = x - dt * (x1_hat - x0_hat) - diffusion**2 * dt / (2 * point.t) * x1_hat
    return mean, diffusion * dt.sqrt()


def noise_kept(point: StepPoint) -> Tensor:
    """Return ``(sigma' alpha) / (sigma alpha')`` in [0, 1]: noise to signal after the step over that before it."""
    # Quotients of ordered numbers first: each rounds to at most 1, so 1 - rho^2 cannot come out negative.
    return (point.sigma_next / point.sigma) * (point.alpha / point.alpha_next)


def ode(noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    """Step without noise, std = 0: Euler for flows, DDIM with eta = 0 for variance-preserving paths."""
    return mixing(x0_hat, x1_hat, point.alpha_next, point.sigma_next, 1.0)


def flow_sde(noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    """Flow-GRPO: Euler-Maruyama with ``g = a sqrt(t / (1 - t))``, a = noise (2505.05470).

    Only where t is exactly 1 the denominator takes the second time of the schedule, as the public implementation does.
    """
    below_one = torch.where(point.t == 1, point.t_clamp, point.t)
    return euler_maruyama(x, x0_hat, x1_hat, noise * (point.t / (1 - below_one)).sqrt(), point)


def dance_sde(noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    """DanceGRPO: Euler-Maruyama with a constant ``g = eta``, eta = noise (2505.07818)."""
    return euler_maruyama(x, x0_hat, x1_hat, noise, point)


def wan_sde(noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    """Flow-GRPO for Wan: Euler-Maruyama with ``g = t_T + (t_1 - t_T) t``, t_1 and t_T the schedule's second and last time.

    g is about ``t_1 t``, finite everywhere, and has no free level: noise plays no part (github.com/yifan123/flow_grpo,
    the Wan pipeline).
    """
    return euler_maruyama(x, x0_hat, x1_hat, point.t_last + (point.t_clamp - point.t_last) * point.t, point)


def cps(noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    """Coefficients-preserving sampling: mixing with ``rho = cos(eta pi / 2)``, eta = noise in [0, 1] (2509.05952).

    The std ``sigma' sin(eta pi / 2)`` is the whole step's; it does not shrink with the step length.
    """
    return mixing(x0_hat, x1_hat, point.alpha_next, point.sigma_next, math.cos(noise * math.pi / 2))


def precise(noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    """PRECISE with Flow-GRPO's g: the SDE solved exactly over the step with x0_hat held still (2605.23522).

    mixing with ``rho = exp(-integral g^2 / 2u^2 du) = [(sigma' alpha) / (sigma alpha')]^(a^2 / 2)``, a = noise.
    Finite at t = 1, where it draws all of the noise anew.
    """
    return mixing(x0_hat, x1_hat, point.alpha_next, point.sigma_next, noise_kept(point) ** (noise**2 / 2))


def precise_dance(noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    """PRECISE with DanceGRPO's constant g = eta, eta = noise; on flow paths (2605.23522).

    mixing with ``rho = exp(-integral eta^2 / 2u^2 du) = exp(-(eta^2 / 2) (1 / t' - 1 / t))``. The step to t' = 0 is
    deterministic, its limit: ``t' sqrt(1 - rho^2) <= t'``. Below t of about eta sqrt(dt) a step draws all noise anew,
    as g^2 / 2t^2 outruns the grid there, so chains that run to t = 0 converge as sqrt(dt) in the end; those that stop
    earlier, and precise, as dt.
    """
    # rho is multiplied by sigma' = 0 there; any finite value does, and 0 * inf would not.
    t_next = torch.where(point.t_next > 0, point.t_next, point.t)
    rho = (-(noise**2 / 2) * (1 / t_next - 1 / point.t)).exp()
    return mixing(x0_hat, x1_hat, point.alpha_next, point.sigma_next, rho)


def memoryless(noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    """Sample without memory of the start noise: ``g^2 = 2t / (1 - t)``, solved exactly over the step (2409.08861).

    mixing with ``rho = (sigma' alpha) / (sigma alpha')``, on any path: the reverse of forward noising, so a step is the
    posterior of x' given x at the data x0_hat. It equals precise with a = sqrt 2 and ddim with eta = 1, and has no free
    level: noise plays no part.
    """
    return mixing(x0_hat, x1_hat, point.alpha_next, point.sigma_next, noise_kept(point))


def ddim(noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint) -> tuple[Tensor, Tensor]:
    """DDIM with eta = noise in [0, 1], on any path (2010.02502, equations 12 and 16).

    mixing with ``rho^2 = 1 - eta^2 (1 - k^2)``, ``k = (sigma' alpha) / (sigma alpha')``, hence
    ``std = eta sigma' sqrt(1 - k^2)``. On a variance-preserving path this is eta times the posterior std of DDPM;
    eta = 1 equals precise with a = sqrt 2.
    """
    kept = noise_kept(point)
    rho = (1 - noise**2 * (1 - kept) * (1 + kept)).sqrt()
    return mixing(x0_hat, x1_hat, point.alpha_next, point.sigma_next, rho)


KERNELS: dict[str, Kernel] = {
    "ode": ode,
    "flow_sde": flow_sde,
    "dance_sde": dance_sde,
    "cps": cps,
    "precise": precise,
    "ddim": ddim,
    "memoryless": memoryless,
    "precise_dance": precise_dance,
    "wan_sde": wan_sde,
}
FLOW_ONLY = frozenset({"flow_sde", "dance_sde", "precise_dance", "wan_sde"})
UNIT_NOISE = frozenset({"cps", "ddim"})
FIXED_NOISE = frozenset({"memoryless", "wan_sde"})
"""Kernels whose noise level follows from the schedule: any noise above 0 means the same, and 0 is refused."""


def transition(
    name: str, noise: float, x: Tensor, x0_hat: Tensor, x1_hat: Tensor, point: StepPoint
) -> tuple[Tensor, Tensor]:
    """Give the mean and the standard deviation of the next latent; rollout and update both call this.

    x, x0_hat, x1_hat: any float type, [B, ...]; point: as `StepPoint.of` makes it. Returns float32 mean [B, ...] and
    std [B, 1, ..., 1]. Raises ValueError for an unknown name; the other checks are `check_kernel`'s, once a run.
    """
    return _lookup(name)(noise, x.float(), x0_hat.float(), x1_hat.float(), point)


def mean_slope(name: str, noise: float, point: StepPoint) -> Tensor:
    """Return ``|d mean / d velocity|`` of a step, float32, shaped like point.t.

    ``dt (1 + g^2 (1 - t) / 2t)`` for Euler-Maruyama, ``|alpha' sigma - sigma' rho alpha|`` for mixing. On
    variance-preserving paths it is the slope in the network's v (``alpha x1 - sigma x0``).
    """
    # The mean is linear, and a unit of velocity moves x0_hat by -sigma and x1_hat by alpha.
    mean, _ = transition(name, noise, torch.zeros_like(point.t), -point.sigma, point.alpha, point)
    return mean.abs()


def next_latent(mean: Tensor, std: Tensor, noise: Tensor, storage_dtype: torch.dtype) -> Tensor:
    """Draw ``mean + std * noise`` in float32 and round it to the storage type, before anyone takes its log-prob.

    mean, noise: [B, ...]; std: [B, 1, ..., 1]. Returns storage_dtype [B, ...].
    """
    return (mean.float() + std.float() * noise.float()).to(storage_dtype)


def is_stochastic(name: str, noise: float) -> bool:
    """Tell whether a kernel's inner steps have a std above 0, hence a log-prob. Unknown names raise ValueError."""
    return _lookup(name) is not ode and (noise > 0 or name in FIXED_NOISE)


def check_kernel(name: str, noise: float, schedule: Schedule) -> None:
    """Refuse a kernel that cannot run on a schedule; call it once before a run.

    Raises ValueError for an unknown name, a noise that is negative, not finite, above 1 for cps and ddim or 0 for
    memoryless and wan_sde (which cannot be quiet), a schedule whose times do not fall strictly within [0, 1], and a
    flow kernel on a path that is not a flow's.
    """
    _lookup(name)
    if not (math.isfinite(noise) and noise >= 0):
        raise ValueError(f"rollout.kernel.noise: {noise} is not a noise level; give a finite number of at least 0")
    if name in UNIT_NOISE and noise > 1:
        raise ValueError(f"rollout.kernel.noise: {noise} is too large for {name}; its eta lies in [0, 1]")
    if name in FIXED_NOISE and noise == 0:
        raise ValueError(
            f"rollout.kernel.noise: 0 does not silence {name}, whose noise is fixed by the schedule; use the kernel ode, "
            "or any noise above 0, which all mean the same here"
        )
    t = schedule.t
    if len(t) < 2 or bool((t[1:] >= t[:-1]).any()) or not 0 <= float(t[-1]) < float(t[0]) <= 1:
        raise ValueError(
            "schedule: its times must fall strictly from at most 1 (noise) to at least 0 (data), but they are "
            f"{t.tolist()}; mend the adapter's schedule()"
        )
    off = torch.maximum((schedule.sigma - t).abs(), (schedule.alpha + schedule.sigma - 1).abs()).max()
    if name in FLOW_ONLY and float(off) > 1e-4:
        others = ", ".join(sorted(KERNELS.keys() - FLOW_ONLY))
        raise ValueError(
            f"rollout.kernel.name: {name} is for flow models (alpha = 1 - t, sigma = t), and this model's schedule is "
            f"off that by {float(off):.3g}; use one of {others}"
        )


def _lookup(name: str) -> Kernel:
    if name not in KERNELS:
        near = get_close_matches(name, KERNELS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"rollout.kernel.name: unknown kernel {name!r}; {hint}use one of {', '.join(KERNELS)}")
    return KERNELS[name]
