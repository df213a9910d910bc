"""The ablations that scripts/toy_study.py runs: what each varies, what it reports of a seed, what is claimed of it beforehand."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from _toys import Affine, Law, Mixture, Run, above, begin, double_shifted, draw, law, uniform
from _toys_credit import a11
from torch import Tensor

Row = dict[str, Any]


@dataclass(frozen=True)
class Claim:
    """``metric`` of variant ``more`` is above that of ``less`` (of 0 where it is empty); with a margin, they are within it."""

    text: str
    metric: str
    more: str
    less: str = ""
    margin: float | None = None


@dataclass(frozen=True)
class Study:
    """One ablation. run: (seed) -> a row a variant, with "variant", figures, and curves as lists; panels: (curve of x, curve of
    y, title) or, where there are no curves, ("", figure, title) for bars."""

    title: str
    setting: str
    run: Callable[[int], Iterator[Row]]
    claims: tuple[Claim, ...]
    panels: tuple[tuple[str, str, str], ...]


def followed(run: Run, iterations: int, every: int, look: Callable[[], dict[str, float]]) -> Row:
    """Train and look at the policy every few iterations: the last look, the curves of all looks, the costs."""
    looks = [look()]
    for _ in range(iterations // every):
        run.go(every)
        looks.append(look())
    curves = {f"{name}_curve": [round(seen[name], 5) for seen in looks] for name in looks[0]}
    return looks[-1] | curves | {"iteration": [every * k for k in range(len(looks))]} | run.costs()


# -- A1: a reference penalty against none --------------------------------------------------------------------------------


def a1(seed: int) -> Iterator[Row]:
    """The right mode is what is wanted; the second axis also raises the proxy, and costs quality."""
    centres = torch.tensor([[-1.0, 0.0], [1.0, 0.0]])

    def proxy(x: Tensor) -> Tensor:
        return torch.sigmoid(4 * (x[:, 0] + x[:, 1] - 0.5))

    def gold(x: Tensor) -> Tensor:
        return torch.sigmoid(4 * (x[:, 0] - 0.5)) * torch.exp(-x[:, 1].square() / (2 * 0.45**2))

    for name, weight in (("no KL", 0.0), ("KL 0.1", 0.1), ("KL 0.3", 0.3)):
        changes = {
            "seed": seed, "optimizer.lr": 0.006, "batch.group_size": 16, "objective.log_prob_reduction": "sum",
            "objective.kl.form": "paper" if weight else "none", "objective.kl.weight": weight,
        }  # fmt: skip
        run = begin(Mixture(centres, 0.3, seed), uniform(), 2, proxy, changes)

        def look(run: Run = run) -> dict[str, float]:
            x, kl = draw(run.adapter, "flow_sde", 0.7, 2000, 10_000 + seed)
            return {
                "proxy": float(proxy(x).mean()), "gold": float(gold(x).mean()), "kl": kl,
                "diversity": float(x.std(0).mean()), "spurious_axis": float(x[:, 1].mean()),
            }  # fmt: skip

        yield {"variant": name} | followed(run, 32, 4, look)


# -- A3: the noise level ---------------------------------------------------------------------------------------------------


def shape_look(run: Run, kernel: str, noise: float, spread: float, reward: Callable[[Law], float]) -> Callable[[], Any]:
    """Figures of an affine policy's own sampler and of the ODE on the same weights; gold is minus the cost of a wrong spread."""
    start = law(run.adapter, kernel, noise)

    def look() -> dict[str, float]:
        own, quiet = law(run.adapter, kernel, noise), law(run.adapter, "ode", 0.0)
        return {
            "proxy": reward(own), "gold": -own.shape_cost(spread), "kl": own.kl_from(start), "path_kl": own.path_kl,
            "diversity": float(own.variance.sqrt().mean()), "variance": float(own.variance.mean()),
            "ode_proxy": reward(quiet), "ode_variance": float(quiet.variance.mean()),
        }  # fmt: skip

    return look


def a3(seed: int) -> Iterator[Row]:
    for a in (0.1, 0.4, 0.7, 1.4):
        changes = {"seed": seed, "optimizer.lr": 0.03, "batch.group_size": 16, "rollout.kernel.noise": a}
        run = begin(Affine(uniform(), 1, 0.0, 1.0), uniform(), 1, lambda x: x[:, 0], changes)
        look = shape_look(run, "flow_sde", a, 1.0, lambda found: float(found.mean[0]))
        yield {"variant": f"a = {a:g}"} | followed(run, 20, 4, look)


# -- A5: GRPO-Guard against the plain ratio -------------------------------------------------------------------------------


def a5(seed: int) -> Iterator[Row]:
    """64 elements; the proxy is the root-mean of the first two axes' sum, gold takes back what is spent off the first."""
    size = 64

    def proxy(x: Tensor) -> Tensor:
        return x[:, 0] + x[:, 1]

    def look_of(run: Run) -> Callable[[], dict[str, float]]:
        start = law(run.adapter, "flow_sde", 0.7)

        def look() -> dict[str, float]:
            own = law(run.adapter, "flow_sde", 0.7)
            second = own.mean.square() + own.variance
            parts = {
                f"clip_{sign}": sum(r[f"policy/clip_fraction_{end}"] for r in run.rows) / max(1, len(run.rows))
                for sign, end in (("positive", "high"), ("negative", "low"))
            }
            return {
                "proxy": float(own.mean[0] + own.mean[1]), "gold": float(own.mean[0] - 0.5 * (second[1:].mean() - 1)
                - 0.5 * (second[1] - 1)), "kl": own.kl_from(start), "path_kl": own.path_kl,
                "diversity": float(own.variance.sqrt().mean()), **parts,
                "clip_asymmetry": parts["clip_negative"] - parts["clip_positive"],
                "clip_fraction": sum(parts.values()),
            }  # fmt: skip

        return look

    for name, objective, clip in (("plain", "flow_grpo", 0.05), ("Guard", "grpo_guard", 0.0125)):
        changes = {
            "seed": seed, "optimizer.lr": 0.05, "batch.group_size": 16, "objective.name": objective,
            "objective.clip_range": clip, "objective.passes": 4, "objective.log_prob_reduction": "sqrt",
        }  # fmt: skip
        run = begin(Affine(uniform(), size, 0.0, 1.0), uniform(), size, proxy, changes)
        yield {"variant": name} | followed(run, 12, 3, look_of(run))


# -- A6: VGPO where rewards saturate ---------------------------------------------------------------------------------------


def a6(seed: int) -> Iterator[Row]:
    """Success is x0 above a limit. Saturated: all samples succeed. Else one in six does."""
    settings = [(f"saturated, k = {k:g}", -4.0, k, 1.0) for k in (0.0, 0.05, 0.5)]
    settings += [(f"open, k = {k:g}", 1.0, k, 1.0) for k in (0.0, 0.05, 0.5)]
    settings += [(f"open, k = 0, gamma = {gamma:g}", 1.0, 0.0, gamma) for gamma in (0.0, 0.9)]
    for name, limit, k, gamma in settings:
        changes = {
            "seed": seed, "optimizer.lr": 0.03, "batch.group_size": 16, "advantage.name": "vgpo", "credit.values": "x0",
            "advantage.options": {"k": k, "gamma": gamma, "shift": 0.1},
        }  # fmt: skip
        run = begin(
            Affine(uniform(), 1, 0.0, 1.0), uniform(), 1, lambda x, limit=limit: (x[:, 0] > limit).float(), changes
        )
        start = law(run.adapter, "flow_sde", 0.7)

        def look(run: Run = run, limit: float = limit, start: Law = start) -> dict[str, float]:
            own = law(run.adapter, "flow_sde", 0.7)
            norms = [r.get("optimizer/grad_norm") or 0.0 for r in run.rows]
            return {
                "proxy": above(limit, own), "gold": above(limit, own) - above(3.0, own), "kl": own.kl_from(start),
                "path_kl": own.path_kl, "diversity": float(own.variance.sqrt()), "mean": float(own.mean),
                "gradient_norm": sum(norms) / max(1, len(norms)),
            }  # fmt: skip

        yield {"variant": name} | followed(run, 15 if limit > 0 else 10, 5, look)


# -- A13: samplers at equal budget ----------------------------------------------------------------------------------------


def a13(seed: int) -> Iterator[Row]:
    """r = -(x0 - 1)^2 / 2 on N(0, 0.5^2): noise that is left over, and spread that is lost, both count."""
    for grid, times in (("uniform", uniform()), ("shifted", double_shifted())):
        for kernel, noise in (("flow_sde", 0.7), ("cps", 0.8), ("precise", 0.7)):
            changes = {
                "seed": seed, "optimizer.lr": 0.03, "batch.group_size": 16, "rollout.kernel.name": kernel,
                "rollout.kernel.noise": noise,
            }  # fmt: skip
            run = begin(Affine(times, 1, 0.0, 0.5), times, 1, lambda x: -0.5 * (x[:, 0] - 1).square(), changes)

            def reward(found: Law) -> float:
                return -0.5 * float((found.mean[0] - 1).square() + found.variance[0])

            look = shape_look(run, kernel, noise, 0.5, reward)
            start = look()["variance"]
            yield {"variant": f"{kernel}, {grid}", "start_variance": start} | followed(run, 16, 4, look)


COMMON = "10 steps, all but the last stochastic, 4 groups of 16, AdamW; constants: scripts/_toys_studies.py"
CURVES = (("iteration", "proxy", "proxy"), ("iteration", "gold", "gold"), ("kl", "gold", "gold against KL"))

STUDIES: dict[str, Study] = {
    "a1": Study(
        "KL against none",
        "mixture of two modes in the plane, tiny network on top of the exact velocity; Flow-SDE 0.7; proxy: right mode or second "
        "axis, gold: right mode and near the data's second axis; kl: path KL from the start, 2,000 samples",
        a1,
        (
            Claim("the proxy comes out equal", "proxy", "no KL", "KL 0.1", margin=0.05),
            Claim("gold is lower without KL", "gold", "KL 0.1", "no KL"),
            Claim("gold is lower without KL, weight 0.3", "gold", "KL 0.3", "no KL"),
            Claim("the proxy comes out equal, weight 0.3", "proxy", "no KL", "KL 0.3", margin=0.05),
            Claim("without KL the spurious axis is used more", "spurious_axis", "no KL", "KL 0.1"),
        ),
        (*CURVES[:2], ("kl", "gold", "gold against path KL")),
    ),
    "a3": Study(
        "Noise of Flow-SDE",
        "N(0, 1), linear reward, affine policy; figures exact; gold: minus KL of the end law from data of the same mean",
        a3,
        (
            Claim("too little noise is slow: 0.1 against 0.7", "proxy", "a = 0.7", "a = 0.1"),
            Claim("0.4 against 0.7", "proxy", "a = 0.7", "a = 0.4"),
            Claim("too much noise spoils the end law: 1.4 against 0.7", "gold", "a = 0.7", "a = 1.4"),
            Claim("too much noise leaves variance", "variance", "a = 1.4", "a = 0.7"),
        ),
        (
            CURVES[0],
            ("iteration", "variance", "variance of x0"),
            ("iteration", "ode_proxy", "proxy of the ODE sampler"),
        ),
    ),
    "a5": Study(
        "GRPO-Guard against the plain ratio",
        "N(0, 1) in 64 elements, 4 passes a rollout; proxy: first + second axis; gold: first axis less half the growth of "
        "the second one's square and half that of the mean square; clip ranges 0.05 and 0.0125 (Guard)",
        a5,
        (
            Claim("plain clips negative advantages more than positive ones", "clip_asymmetry", "plain"),
            Claim("Guard clips both alike", "clip_asymmetry", "Guard", margin=0.02),
            Claim("gold is higher with Guard", "gold", "Guard", "plain"),
            Claim("the proxy comes out equal", "proxy", "Guard", "plain", margin=0.1),
        ),
        (
            ("iteration", "clip_asymmetry", "clipped: A < 0 less A > 0"),
            ("proxy", "gold", "gold against proxy"),
            CURVES[0],
        ),
    ),
    "a6": Study(
        "VGPO where rewards saturate",
        "N(0, 1), reward 1 where x0 is above a limit; saturated: -4, open: 1; shift 0.1; gold: success without passing 3",
        a6,
        (
            Claim("k > 0 keeps a gradient where all rewards are equal", "gradient_norm", "saturated, k = 0.05"),
            Claim(
                "that gradient improves nothing: gold", "gold", "saturated, k = 0.05", "saturated, k = 0", margin=0.01
            ),
            Claim(
                "and drifts from the start the further the greater k is",
                "kl",
                "saturated, k = 0.5",
                "saturated, k = 0.05",
            ),
            Claim("open rewards: k = 0.05 beats 0", "proxy", "open, k = 0.05", "open, k = 0"),
            Claim("open rewards: k = 0.5 is worse than 0", "proxy", "open, k = 0", "open, k = 0.5"),
            Claim("open rewards: gamma 1 beats 0", "proxy", "open, k = 0", "open, k = 0, gamma = 0"),
            Claim("open rewards: gamma 0.9 beats 1", "proxy", "open, k = 0, gamma = 0.9", "open, k = 0"),
        ),
        (("", "gradient_norm", "mean norm of the gradient"), ("", "kl", "KL of the end law"), ("", "proxy", "success")),
    ),
    "a11": Study(
        "Which credit finds the step that earned the reward",
        "8 steps of PRECISE 0.7 on N(0, 1); the reward is the noise of step 3; 24 batches of 64 a seed, no training; snr: "
        "squared length of the mean gradient over the variance of a batch's, all steps; cosine: of a batch's with the true one",
        a11,
        (
            Claim("gain beats uniform", "snr", "gain", "uniform"),
            Claim("a tree beats uniform", "snr", "tree, over the depth", "uniform"),
            Claim(
                "a parent's baseline beats one over the depth", "snr", "tree, over the parent", "tree, over the depth"
            ),
            Claim("gain beats cumulative", "snr", "gain", "cumulative"),
            Claim("cumulative is uniform again: each step is standardised", "snr", "cumulative", "uniform", margin=0.1),
            Claim("gain with poor values still beats uniform", "snr", "gain, values off by 0.5", "uniform"),
        ),
        (
            ("", "snr", "signal to noise"),
            ("", "cosine", "cosine with the true gradient"),
            ("", "noise_at_other_steps", "noise at other steps"),
        ),
    ),
    "a13": Study(
        "EM, CPS and PRECISE at equal budget",
        "N(0, 0.5^2), quadratic reward, affine policy; uniform grid and Stable Diffusion 3's; figures exact; gold: minus the "
        "KL of the end law from data of the same mean",
        a13,
        (
            Claim(
                "shifted grid: EM keeps residual noise, PRECISE does not",
                "start_variance",
                "flow_sde, shifted",
                "precise, shifted",
            ),
            Claim(
                "CPS ends too narrow, narrower than PRECISE (uniform)",
                "start_variance",
                "precise, uniform",
                "cps, uniform",
            ),
            Claim("own reward: CPS against EM, shifted grid", "proxy", "cps, shifted", "flow_sde, shifted"),
            Claim("own reward: PRECISE against EM, shifted grid", "proxy", "precise, shifted", "flow_sde, shifted"),
            Claim("ODE reward: CPS against EM, shifted grid", "ode_proxy", "cps, shifted", "flow_sde, shifted"),
            Claim("ODE reward: PRECISE against EM, uniform grid", "ode_proxy", "precise, uniform", "flow_sde, uniform"),
        ),
        (
            CURVES[0],
            ("iteration", "variance", "variance of x0"),
            ("iteration", "ode_proxy", "proxy of the ODE sampler"),
        ),
    ),
}
