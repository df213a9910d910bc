"""One estimator for supervised and reinforcement gradients, and the rules that mix the two.

The unified estimator (UPGE), gates and weights between a supervised and a reinforcement branch (HPT, SRFT), routing of
single samples to distillation (SRPO), two weighted branches (SCOPE), one-token rollouts (OTR). Everything raises
ValueError, naming the argument, for a wrong shape or dtype or an option out of range.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from .checks import check_number, check_share
from .inputs import check_flags, check_ids, check_mask, read_steps
from .loss_record import PolicyLoss, read_loss_inputs
from .method import Method
from .moments import Reduce, batch_moments
from .ratios import log_ratio, widen
from .segments import Groups

Denominator = Literal["old", "self", "sequence", "one", "shaped"]


def _known_rows(correct: Tensor, group: Tensor, valid: Tensor | None) -> Groups:
    """Check the outcome of rows; return the groups of those that count."""
    groups = Groups.of(group, valid)
    check_flags("correct", correct, tuple(group.shape))
    return groups


def _log_denominator(kept: Tensor, d: Tensor, mask: Tensor, denominator: str, shape: float) -> Tensor:
    """Take the log of the denominator per step, without gradient, from the unmasked log-probs and log-ratios."""
    new = kept.detach()
    if denominator == "self":
        return new
    if denominator == "sequence":
        return new - (d.detach().sum(1) / mask.sum(1).clamp(min=1))[:, None]
    if denominator == "one":
        return torch.zeros_like(new)
    return 2 * (new.exp() + shape).log() - math.log(shape)


def upge(
    log_prob: Tensor,
    old_log_prob: Tensor,
    advantage: Tensor,
    mask: Tensor,
    stable: Tensor | None = None,
    *,
    denominator: Denominator = "old",
    shape: float = 0.1,
) -> PolicyLoss:
    """Form the unified policy gradient: L = -stable A exp(log_prob - log den), the denominator without gradient.

    | denominator | den | reproduces |
    |---|---|---|
    | old | exp(old_log_prob) | importance-weighted gradient; PPO and GRPO with ``stable`` = not clipped |
    | self | pi | REINFORCE; supervised fine-tuning with A = 1 |
    | sequence | pi (pi_old / pi)^(1/len), ratio over the row | GSPO, with ``stable`` per row |
    | one | 1 | offline data of unknown policy (SRFT) |
    | shaped | (pi + shape)^2 / shape | the gradient of LUFFY's A pi / (pi + shape); the value differs |

    Any other denominator: pass its log as old_log_prob with "old". The value of L is not comparable between
    denominators, its gradient -stable A (pi / den) grad log pi is what counts. stable: bool [B, T], all by default;
    shape: > 0. Exponents are clamped to +-20. On-policy "old", "self" and "sequence" have gradient -A. HPT, 2509.04419
    (the estimator and its table); LUFFY, 2504.14945; SRFT, 2506.19767.

    On denoising steps: as is, except "one" and "shaped", which need a probability in [0, 1]: exp(-|eps|^2 / (2 D))
    serves as one. Supervised rows are reference images, their step log-prob the denoising loss.
    """
    if denominator not in ("old", "self", "sequence", "one", "shaped"):
        raise ValueError(f"denominator: expected old, self, sequence, one or shaped, got {denominator!r}")
    check_number("shape", shape, 0.0, strict=True, finite=False)
    kept, d, a = read_loss_inputs(log_prob, old_log_prob, advantage, mask)
    if stable is not None:
        check_flags("stable", stable, tuple(mask.shape))
        a = torch.where(stable, a, 0.0)
    if denominator != "old":
        d = log_ratio(kept, _log_denominator(kept, d, mask, denominator, shape))
    return PolicyLoss(loss=-a * d.exp())


@dataclass(frozen=True)
class BranchWeights:
    """Weights of the two losses of each row, float32 [B], without gradient."""

    reinforce: Tensor
    supervise: Tensor


def hpt(
    correct: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    gate: float = 0.0,
    reinforce_coef: float = 1.0,
    supervise_coef: float = 1.0,
) -> BranchWeights:
    """Train a prompt by reinforcement if the policy succeeds often enough, by supervision otherwise.

    P = share of right answers among the rows of the group that the policy produced itself; P > gate: weights
    (reinforce_coef, 0), else (0, supervise_coef). correct: bool [B]; group: int64 [B]; valid: bool [B], the rows of the
    policy (demonstrations False; they get their group's weights all the same); a group without any is supervised.
    Published: gate 0 or 0.25, supervise_coef 1 (0.3 at 1.5B), advantages by the group mean of the policy's rows alone,
    without deviation or clip (``dr_grpo``). HPT, 2509.04419.

    On denoising steps: the same, with the denoising loss on a reference image as supervision.
    """
    check_share("gate", gate)
    groups = _known_rows(correct, group, valid)
    reinforced = groups.mean(correct.double()) > gate
    return BranchWeights(reinforced.float() * reinforce_coef, (~reinforced).float() * supervise_coef)


def srft(
    entropy: Tensor,
    mask: Tensor,
    *,
    unit: Literal["sample", "batch"] = "sample",
    supervise_coef: float = 0.5,
    reinforce_coef: float = 0.1,
    reduce: Reduce | None = None,
) -> BranchWeights:
    """Weigh both branches by the policy's entropy H: supervise 0.5 exp(-H), reinforce 0.1 exp(H).

    H: mean entropy over the unmasked steps of the row ("sample"), or of the batch ("batch", with ``reduce`` over all
    ranks). entropy: [B, T], nats; mask: bool [B, T]; a row without a step has H = 0. SRFT, 2506.19767, as HPT
    (2509.04419) restates it.

    On denoising steps: the entropy of a Gaussian step is fixed by the schedule; use the spread of a group's x0
    predictions.
    """
    if unit not in ("sample", "batch"):
        raise ValueError(f"unit: expected 'sample' or 'batch', got {unit!r}")
    check_mask(mask)
    kept = read_steps("entropy", entropy, mask, torch.float64)
    if unit == "batch":
        mean = batch_moments(kept, mask, reduce=reduce)[0].expand(len(mask))
    else:
        mean = kept.sum(1) / mask.sum(1).clamp(min=1)
    return BranchWeights((reinforce_coef * mean.exp()).float(), (supervise_coef * (-mean).exp()).float())


@dataclass(frozen=True)
class Routes:
    """Where each row goes. distill: bool [B], to the teacher; weight: float32 [B, T], step weights of its loss."""

    distill: Tensor
    weight: Tensor


def route_mask(correct: Tensor, group: Tensor, valid: Tensor | None = None) -> Tensor:
    """Mark the wrong rows that have a right one in their group, whose answer can teach them; bool [B]."""
    groups = _known_rows(correct, group, valid)
    return groups.valid & ~correct & (groups.sum(correct.double()) > 0)


def srpo_routed(
    correct: Tensor,
    group: Tensor,
    entropy: Tensor,
    mask: Tensor,
    valid: Tensor | None = None,
    *,
    beta: float = 1.0,
    reduce: Reduce | None = None,
) -> Routes:
    """Send wrong answers with a right sibling to self-distillation, all others to the group policy gradient.

    The teacher is the policy itself, shown a right answer of the group. Step weights of the distillation are
    exp(-beta H_teacher), scaled to mean 1 over all routed steps of the batch; rows that are not routed have weight 1.
    Divide both losses by one count of steps. correct: bool [B]; group: int64 [B]; entropy: [B, T], the teacher's, read
    on routed rows only (it must be far below 700 in size); mask: bool [B, T]; valid: bool [B]; beta >= 0, 0 is
    uniform. Groups without a right answer are not routed, and their group advantage is 0. SRPO (sample-routed),
    2604.02288. Weights carry no gradient; masked steps have 0.

    On denoising steps: the teacher is the model conditioned on a winning image; for H, the teacher's spread of x0
    predictions.
    """
    check_number("beta", beta, 0.0, finite=False)
    distill = route_mask(correct, group, valid)
    check_mask(mask, len(correct))
    routed = mask & distill[:, None]
    raw = (-beta * read_steps("entropy", torch.where(routed, entropy, 0.0), mask, torch.float64)).exp()
    mean, _ = batch_moments(raw, routed, reduce=reduce)
    weight = torch.where(routed, raw / torch.where(mean > 0, mean, 1.0), 1.0)
    return Routes(distill=distill, weight=torch.where(mask, weight, 0.0).float())


def scope_weights(
    student_nll: Tensor,
    teacher_nll: Tensor,
    correct: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    tau: float = 1.0,
    direction: Literal["paper", "code"] = "paper",
    normalise: Literal["sum1", "mean1"] = "sum1",
) -> Tensor:
    """Weigh rows inside each (group, outcome) branch by perplexity; float32 [B], 0 where not valid.

    Right rows: softmax of +student_nll / tau (what was hard to find counts more), wrong rows: softmax of
    -teacher_nll / tau (a confident teacher counts more). student_nll, teacher_nll: [B], mean negative log-likelihood
    per step, so exp is the perplexity; correct: bool [B]; group: int64 [B]; valid: bool [B]; tau: > 0. direction: the
    released scripts turn the student's sign round ("code"). normalise: weights of a branch add up to 1 ("sum1") or to
    its size ("mean1", the released code). A branch of one row has 1; tau -> infinity is uniform.
    """
    check_number("tau", tau, 0.0, strict=True, finite=False)
    if direction not in ("paper", "code") or normalise not in ("sum1", "mean1"):
        raise ValueError(
            f"direction, normalise: expected paper or code, and sum1 or mean1, got {direction!r} and {normalise!r}"
        )
    rows = _known_rows(correct, group, valid)
    kept = rows.valid[:, None]
    student = read_steps("student_nll", student_nll[:, None], kept, torch.float64)[:, 0]
    teacher = read_steps("teacher_nll", teacher_nll[:, None], kept, torch.float64)[:, 0]
    score = torch.where(correct, student if direction == "paper" else -student, -teacher) / tau
    branch = Groups.of(2 * rows.index + correct.long(), rows.valid)
    raw = torch.where(rows.valid, (score - branch.max(score).nan_to_num(nan=0.0)).exp(), 0.0)
    total = branch.sum(raw)
    weight = raw / torch.where(total > 0, total, 1.0)
    return (weight * branch.count() if normalise == "mean1" else weight).float()


def scope(
    log_prob: Tensor,
    old_log_prob: Tensor,
    mask: Tensor,
    teacher_log_prob: Tensor,
    correct: Tensor,
    group: Tensor,
    valid: Tensor | None = None,
    *,
    tau: float = 1.0,
    direction: Literal["paper", "code"] = "paper",
    normalise: Literal["sum1", "mean1"] = "sum1",
) -> PolicyLoss:
    """Reinforce right answers and distil a teacher on wrong ones, each row weighted by perplexity.

    L = -w rho on right rows, w rho sg(log_prob - teacher_log_prob) on wrong ones, rho = exp(clamp(log_prob -
    old_log_prob, -20, 20)), w from ``scope_weights`` with the student's likelihood taken from old_log_prob. Sum over
    steps. log_prob, old_log_prob, teacher_log_prob: [B, T]; the rest as there. No clip, no KL (published: tau 1, groups
    of 8). SCOPE, 2604.10688; paper and released code disagree on the student's direction, see ``scope_weights``.

    On denoising steps: the negative log-likelihoods are mean ELBO losses of student and teacher on the image.
    """
    kept, d, _ = read_loss_inputs(log_prob, old_log_prob, torch.zeros_like(log_prob), mask)
    teacher = read_steps("teacher_log_prob", teacher_log_prob, mask, d.dtype)
    length = mask.sum(1).clamp(min=1)
    old = read_steps("old_log_prob", old_log_prob, mask, torch.float64)
    student_nll, teacher_nll = -old.sum(1) / length, -teacher.double().sum(1) / length
    known = mask.any(1) if valid is None else valid & mask.any(1)
    weight = scope_weights(
        student_nll, teacher_nll, correct, group, known, tau=tau, direction=direction, normalise=normalise
    )
    push = torch.where(correct[:, None], -1.0, kept.detach() - teacher)
    return PolicyLoss(loss=torch.where(mask, weight[:, None].to(d) * push * d.exp(), 0.0))


def otr(
    logits: Tensor,
    token: Tensor,
    mask: Tensor,
    *,
    form: Literal["sampled", "expected"] = "expected",
    samples: int = 256,
    temperature: float = 1.3,
    wrong_reward: float = -0.1,
    generator: torch.Generator | None = None,
) -> PolicyLoss:
    """Turn supervised fine-tuning into a one-step rollout at each position: L = -mean_k R(a_k) log pi(a_k).

    a_k ~ softmax(logits / temperature); R = 1 where a_k is the given token, ``wrong_reward`` elsewhere. "sampled" draws
    ``samples`` tokens with ``generator`` (required then); "expected" is its exact mean over the vocabulary. Sampling
    carries no gradient. logits: floating [B, T, V], carries the gradient; token: int64 [B, T]; mask: bool [B, T].
    [B, T], float32 or wider, 0 on masked steps.

    At temperature 1 the expected gradient is -(1 - wrong_reward) pi(token) grad log pi(token). OTR, 2509.26313.
    Reconstructed: abstract and notes; samples, temperature and wrong_reward are approximate.

    On denoising steps: none, it needs the probability of a discrete token.
    """
    check_mask(mask)
    check_ids("token", token, tuple(mask.shape))
    if logits.shape[:2] != mask.shape or logits.ndim != 3 or not logits.is_floating_point():
        raise ValueError(f"logits: expected floating {[*mask.shape, 'V']}, got {logits.dtype} {list(logits.shape)}")
    if form not in ("sampled", "expected") or not (samples >= 1 and temperature > 0):
        raise ValueError(
            "form, samples, temperature: expected sampled or expected, >= 1 and > 0, "
            f"got {form!r}, {samples} and {temperature}"
        )
    if form == "sampled" and generator is None:
        raise ValueError("generator: the sampled form needs a torch.Generator")
    kept = widen(torch.where(mask[..., None], logits, 0.0))
    log_pi = kept.log_softmax(-1)
    target = torch.where(mask, token, 0)[..., None]
    drawn = (kept.detach() / temperature).softmax(-1)
    if form == "expected":
        hit = drawn.gather(-1, target) * log_pi.gather(-1, target)
        value = (1 - wrong_reward) * hit.squeeze(-1) + wrong_reward * (drawn * log_pi).sum(-1)
    else:
        flat = drawn.reshape(-1, drawn.shape[-1])
        draws = torch.multinomial(flat, samples, replacement=True, generator=generator).reshape(*mask.shape, samples)
        reward = torch.where(draws == target, 1.0, wrong_reward).to(kept.dtype)
        value = (reward * log_pi.gather(-1, draws)).mean(-1)
    return PolicyLoss(loss=torch.where(mask, -value, 0.0))


_TESTS = "tests/advantage/test_unified.py::"

METHODS: tuple[Method, ...] = (
    Method(
        key="upge",
        kind="policy_loss",
        paper_id="2509.04419",
        title="unified policy gradient estimator: mask, denominator, advantage",
        tier=2,
        evidence={
            "formula": _TESTS + "test_upge_against_a_plain_loop",
            "identity": _TESTS + "test_upge_reproduces_other_gradients",
        },
        call=upge,
    ),
    Method(
        key="hpt",
        kind="weight",
        paper_id="2509.04419",
        title="HPT: reinforcement where the policy succeeds, supervision elsewhere",
        tier=2,
        evidence={"exact": _TESTS + "test_hpt_gate", "identity": _TESTS + "test_hpt_gate"},
        call=hpt,
    ),
    Method(
        key="srft",
        kind="weight",
        paper_id="2506.19767",
        title="SRFT: soft weights of both branches by entropy",
        tier=2,
        evidence={"exact": _TESTS + "test_srft_weights"},
        call=srft,
    ),
    Method(
        key="srpo_routed",
        kind="weight",
        paper_id="2604.02288",
        title="SRPO: wrong answers with a right sibling go to self-distillation",
        tier=2,
        evidence={"exact": _TESTS + "test_srpo_worked_numbers", "formula": _TESTS + "test_srpo_against_a_plain_loop"},
        call=srpo_routed,
    ),
    Method(
        key="scope",
        kind="policy_loss",
        paper_id="2604.10688",
        title="SCOPE: reinforcement and distillation, each weighted by perplexity",
        tier=2,
        evidence={"exact": _TESTS + "test_scope_worked_numbers", "formula": _TESTS + "test_scope_against_a_plain_loop"},
        call=scope,
        joint=True,
        exempt={"on_policy": "no advantage enters: rows are weighted by perplexity inside their branch"},
    ),
    Method(
        key="otr",
        kind="policy_loss",
        paper_id="2509.26313",
        title="OTR: supervised fine-tuning as one-token rollouts",
        tier=3,
        evidence={
            "reconstructed": _TESTS + "test_otr_gradient_by_enumeration",
            "formula": _TESTS + "test_otr_against_a_plain_loop",
        },
        call=otr,
        tokens_only="needs the probability of a discrete token; use one SDE step from a reference latent with a "
        "proximity reward and any policy loss",
        exempt={"on_policy": "takes logits and a target token, no advantage"},
    ),
)
