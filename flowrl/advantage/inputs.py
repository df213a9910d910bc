"""The names by which methods ask for tensors, and the checks that every method shares.

B samples, T steps (tokens or denoising transitions), R reward channels, S segments, L tree levels, N votes. A method's
positional parameters carry these names, so that a registry can call any of them. A NaN reward is no value: it leaves
the statistics, and counts as 0 where rewards are added up.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .blocks import by_rows

_GREATEST = 2**31 - 1  # int32


@dataclass(frozen=True)
class Input:
    """One named input. shape: axis letters, several where a method may take either; dtype: float, int64, bool."""

    shape: str
    dtype: str
    meaning: str


INPUTS: Mapping[str, Input] = {
    "rewards": Input("[B] or [B, R]", "float", "outcome rewards, NaN for no value"),
    "group": Input("[B]", "int64", "rows of one prompt share an id of any spacing"),
    "valid": Input("[B]", "bool", "rows that count; all by default"),
    "weights": Input("[R]", "float", "weight of each reward channel"),
    "mask": Input("[B, T]", "bool", "steps at which the policy acted"),
    "step_reward": Input("[B, T]", "float", "reward given at each step, 0 on masked steps"),
    "step_value": Input(
        "[B, T]", "float", "value of the state after each step, the last one the outcome; NaN for none"
    ),
    "start_value": Input("[B]", "float", "value of the state before the first step, NaN for none"),
    "step": Input("[B, T]", "int64", "index of each step in the whole schedule"),
    "node": Input("[B, T]", "int64", "rows of a group with an equal id at a step share that transition"),
    "seed_group": Input("[B]", "int64", "rows of a group with an equal id have the same start noise"),
    "trajectory": Input("[B]", "int64", "rows of one episode share an id"),
    "segment": Input("[B, T]", "int64", "turn, stage or block of a step: 0, 1, ... never decreasing, -1 outside"),
    "anchor": Input("[B, T]", "int64", "equal ids: the same state"),
    "node_path": Input("[B, L]", "int64", "node of the leaf at each level of its tree, level 0 the root"),
    "value": Input("[B, T]", "float", "critic's value of the state before each step"),
    "value_high": Input("[B, T]", "float", "value of the upper level"),
    "value_term": Input("[B, T]", "float", "value of the termination head"),
    "value_post": Input("[B, T]", "float", "value of the post-decision state"),
    "segment_value": Input("[B, S + 1]", "float", "value at the cut points, the last one the outcome"),
    "confidence": Input("[B, S + 1]", "float", "probability of the right answer before and after each segment"),
    "stage_reward": Input("[B, S]", "float", "reward of each stage, segment or budget"),
    "answer_reward": Input("[B, S, Q]", "float", "reward of Q answers at each of S budgets"),
    "votes": Input("[N, B, T]", "bool", "critics that call the step wrong"),
    "entropy": Input("[B, T]", "float", "uncertainty of the policy at each step"),
    "log_prob": Input("[B, T]", "float", "log-prob under the present weights; carries the gradient"),
    "old_log_prob": Input("[B, T]", "float", "log-prob under the weights that drew the samples"),
    "reference_log_prob": Input("[B, T]", "float", "log-prob under the reference policy"),
    "process_log_prob": Input("[B, T]", "float", "log-prob under an implicit process reward model"),
    "tempered_log_prob": Input("[B, T]", "float", "log-prob of the same steps under the tempered policy"),
    "advantage": Input("[B, T]", "float", "advantages of a policy loss; no gradient"),
    "token": Input("[B, T]", "int64", "discrete actions"),
    "sum_pi_squared": Input("[B, T]", "float", "sum over the vocabulary of pi^2"),
    "switch": Input("[B, T]", "bool", "the step starts a new segment"),
    "done": Input("[B]", "bool", "the episode ended"),
    "truncated": Input("[B]", "bool", "the row was cut before its end"),
    "correct": Input("[B]", "bool", "the outcome is right"),
    "pivot": Input("[B]", "int64", "first step after the branch point"),
    "length": Input("[B]", "float", "steps of the row"),
    "cost": Input("[B]", "float", "what the row cost to produce: steps, seconds, network calls"),
    "energy": Input("[B]", "float", "squared norm of the row's score, or a proxy"),
    "outcome": Input("[B]", "int64", "equal ids: the same outcome"),
    "probe": Input("[B]", "float", "predicted reward of the row's own features"),
    "prompt_value": Input("[B]", "float", "predicted reward of the row's prompt"),
    "greedy_reward": Input("[B]", "float", "reward of the greedy rollout of the row's prompt"),
    "slot": Input("[B]", "int64", "the prompt's place in a state"),
    "shift": Input("[B]", "float", "how far the policy moved since the prompt's last visit"),
    "choice": Input("[B, E]", "bool", "choices (edges, step kinds, branches) that the row made"),
    "turn": Input("[B]", "int64", "place of the row in its episode, where one row is one turn"),
    "clip_scale": Input("[B, T]", "float", "factor of the clip range, as Advantage.clip_scale"),
    "old_prob": Input("[B, T]", "float", "probability in (0, 1] of each step when it was drawn"),
    "divergence": Input("[B, T]", "float", "exact divergence of the present policy from the old one at each step"),
    "ratio_variance": Input("[B, T]", "float", "exact variance of the ratio at each step"),
    "trust": Input("[B]", "float", "how far the reference is trusted, in [0, 1]"),
    "share": Input("[B, T]", "float", "share of the step ratio, in [0, 1]"),
    "stable": Input("[B, T]", "bool", "steps that keep their gradient"),
    "uniform": Input("[B] or [B, T]", "float", "draws from [0, 1)"),
    "teacher_log_prob": Input("[B, T]", "float", "log-prob under a teacher"),
    "logits": Input("[B, T, V]", "float", "logits over the vocabulary; a loss's carry the gradient"),
    "x0_hat": Input("[B, T, ...]", "float", "prediction of the clean latent at each step"),
    "mean_shift_squared": Input("any", "float", "squared distance of two Gaussian means, summed over elements"),
    "sigma": Input("any", "float", "standard deviation of a Gaussian step"),
    "objective_shift": Input("[B, T]", "float", "predicted change of the objective at each step"),
    "policy_shift": Input("[B, T]", "float", "predicted change of the policy at each step"),
    "chosen": Input("[P]", "int64", "row of the better sample of each pair"),
    "rejected": Input("[P]", "int64", "row of the worse sample of each pair"),
    "online": Input("[B]", "bool", "rows drawn from the present policy"),
    "scores": Input("[B, K]", "float", "scores of samples in the order that they should have"),
    "main_reward": Input("[B]", "float", "reward in [0, 1] that measures difficulty"),
    "gated": Input("[R]", "bool", "reward channels that count only where the hard one is reached"),
    "step_energy": Input("[B, T]", "float", "squared norm of each step's score, or a proxy"),
    "importance": Input("[B] or [B, T]", "float", "importance ratio of the samples"),
    "stage_matrix": Input(
        "[S, S]", "float", "upper triangular: what a later stage's reward is worth to an earlier one"
    ),
    "budget_probability": Input("[S]", "float", "how likely each budget is"),
    "phase_mask": Input("[B, T]", "bool", "steps of the phases that are credited"),
    "bootstrap": Input("[B]", "float", "value of the state after the last step"),
    "window_start": Input("[B]", "int64", "first step of the present window"),
    "proxy_reward": Input("[B, T]", "float", "predicted reward of each step"),
    "sampled": Input("[B, T]", "bool", "steps drawn for the estimate"),
    "subgoal_end": Input("[B, T]", "bool", "steps at which a subgoal is reached"),
    "intervened": Input("[B, T]", "bool", "steps of an intervention"),
    "success_rate": Input("[P]", "float", "success rate of each prompt"),
    "pass_rate": Input("[P]", "float", "success rate of each prompt"),
    "diversity": Input("[P]", "float", "diversity of each prompt's samples, in [0, 1]"),
    "budget": Input("[P]", "int64", "samples given to each prompt"),
    "success": Input("[P, H]", "bool", "whether each hint level of each prompt led to success"),
    "hint_ratio": Input("[P]", "float", "share of the solution given as a hint"),
    "prefix": Input("[B]", "int64", "steps of the prefix"),
    "prefix_id": Input("[B]", "int64", "rows with an equal prefix share an id"),
    "tier": Input("[R]", "int64", "level of each reward channel in the hierarchy"),
    "gram": Input("[R, R]", "float", "inner products of the gradients of R rewards"),
    "order": Input("[R, R]", "int64", "order in which conflicts are resolved"),
    "stability": Input("[R]", "float", "cosine of each gradient with its previous one"),
    "kl": Input("scalar", "float", "KL seen in this iteration"),
    "observed": Input("scalar", "float", "entropy seen in this iteration"),
    "gradient": Input("[D]", "float", "flat gradient"),
    "hessian_product": Input("[D]", "float", "Hessian times the last move"),
    "gradient_mean_square": Input("scalar", "float", "squared norm of the mean gradient"),
    "gradient_variance": Input("scalar", "float", "variance of the gradient, summed over parameters"),
    "kernel": Input("[B, B]", "float", "Fisher kernel of the samples"),
    "environments": Input("scalar", "int64", "parallel samples"),
    "reference_environments": Input("scalar", "int64", "parallel samples of the reference setting"),
    "reference_minibatches": Input("scalar", "int64", "minibatches of the reference setting"),
    "state": Input("", "state", "what the method remembers"),
}


def check_ids(name: str, ids: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``ids`` is int64 of ``shape``."""
    if ids.dtype != torch.int64 or tuple(ids.shape) != shape:
        raise ValueError(f"{name}: expected int64 {list(shape)}, got {ids.dtype} {list(ids.shape)}")


def check_flags(name: str, flags: Tensor, shape: tuple[int, ...]) -> None:
    """Raise ValueError unless ``flags`` is bool of ``shape``."""
    if flags.dtype != torch.bool or tuple(flags.shape) != shape:
        raise ValueError(f"{name}: expected bool {list(shape)}, got {flags.dtype} {list(flags.shape)}")


def check_mask(mask: Tensor, rows: int | None = None) -> None:
    """Raise ValueError unless ``mask`` is bool [B, T] with B, T >= 1 (and B = ``rows`` where it is given)."""
    if mask.dtype != torch.bool or mask.ndim != 2 or mask.numel() == 0 or rows not in (None, len(mask)):
        wanted = "[B, T] with B, T >= 1" if rows is None else f"[{rows}, T] with T >= 1"
        raise ValueError(f"mask: expected bool {wanted}, got {mask.dtype} {list(mask.shape)}")


def read_steps(name: str, x: Tensor, mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``x`` detached as ``dtype``, 0 on masked steps whatever they held.

    Raises ValueError unless it is real [B, T] like ``mask`` and finite on unmasked steps.
    """
    if x.shape != mask.shape or x.is_complex():
        raise ValueError(f"{name}: expected real {list(mask.shape)} like mask, got {x.dtype} {list(x.shape)}")
    kept = torch.where(mask, x.detach().to(dtype), 0.0)
    if not _all_finite(kept):
        raise ValueError(f"{name}: {int((~kept.isfinite()).sum())} unmasked steps are not finite")
    return kept


def _all_finite(x: Tensor) -> bool:
    """Tell whether there is neither NaN nor infinity: both show in the least and the greatest value."""
    return bool(torch.stack(torch.aminmax(x)).isfinite().all())


def read_step_reward(step_reward: Tensor, mask: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return ``step_reward`` detached as ``dtype``, with NaN (no value) as 0.

    Raises ValueError unless it is real [B, T] like ``mask``, free of infinities, 0 on masked steps (an accumulation
    would drop a reward there without a word: put it on the unmasked step before it), and not NaN throughout.
    """
    if step_reward.shape != mask.shape or step_reward.is_complex():
        raise ValueError(
            f"step_reward: expected real {list(mask.shape)} like mask, got {step_reward.dtype} "
            f"{list(step_reward.shape)}"
        )
    value = step_reward.detach().to(dtype)
    kept = torch.where(mask, value, 0.0)
    if not torch.equal(kept, value):  # a NaN somewhere, or a reward on a masked step
        kept = _drop_nan(value, mask)
    if not _all_finite(kept):
        raise ValueError("step_reward: infinite values on unmasked steps")
    return kept


def _drop_nan(value: Tensor, mask: Tensor) -> Tensor:
    lost = ~mask & (value != 0) & ~value.isnan()
    if bool(lost.any()):
        row, step = (int(i) for i in lost.nonzero()[0])
        raise ValueError(
            f"step_reward: a reward on a masked step (row {row}, step {step}) would be lost; "
            "put it on the unmasked step before it"
        )
    known = mask & ~value.isnan()
    if bool(mask.any()) and not bool(known.any()):
        raise ValueError("step_reward: every unmasked step is NaN; mask failed rewards instead")
    return torch.where(known, value, 0.0)


def read_rewards(
    rewards: Tensor, group: Tensor | None, valid: Tensor | None, channels: bool = False
) -> tuple[Tensor, Tensor]:
    """Check outcome rewards; return them as float64 and the bool mask of values that count, both in their shape.

    rewards: [B], or [B, R] with ``channels``; group: None where the method has none. Raises ValueError, naming the
    argument, for a wrong shape or dtype, an infinite reward, an empty batch, or valid rewards that are all NaN.
    """
    dims, wanted = (2, "[B, R]") if channels else (1, "[B]")
    if rewards.ndim != dims or rewards.numel() == 0:
        raise ValueError(f"rewards: expected {wanted} with at least one value, got {list(rewards.shape)}")
    if rewards.is_complex():
        raise ValueError(f"rewards: expected real numbers, got {rewards.dtype}")
    if group is not None and (group.dtype != torch.int64 or group.shape != rewards.shape[:1]):
        raise ValueError(
            f"group: expected int64 [{len(rewards)}], one id a reward, got {group.dtype} {list(group.shape)}"
        )
    if valid is None:
        valid = torch.ones(len(rewards), dtype=torch.bool, device=rewards.device)
    if valid.dtype != torch.bool or valid.shape != rewards.shape[:1]:
        raise ValueError(f"valid: expected bool [{len(rewards)}], got {valid.dtype} {list(valid.shape)}")
    value = rewards.detach().double()
    asked = valid[:, None].expand_as(value) if channels else valid
    if bool((asked & value.isinf()).any()):
        raise ValueError("rewards: infinite values among the valid samples; mark failed rewards with valid=False")
    mask = asked & ~value.isnan()
    if bool(asked.any()) and not bool(mask.any()):
        raise ValueError("rewards: every valid sample is NaN; mark failed rewards with valid=False")
    return value, mask


def read_rows(name: str, x: Tensor, counted: Tensor, lowest: float = -math.inf) -> Tensor:
    """Return ``x`` detached as float64, 0 where ``counted`` (bool, [B] or a scalar) is False, whatever it held.

    Raises ValueError unless it is real, of the shape of ``counted``, finite and >= ``lowest`` where it counts.
    """
    if x.shape != counted.shape or x.is_complex():
        raise ValueError(f"{name}: expected real {list(counted.shape)}, got {x.dtype} {list(x.shape)}")
    kept = torch.where(counted, x.detach().double(), 0.0)
    wrong = ~kept.isfinite() | (counted & (kept < lowest))
    if bool(wrong.any()):
        at = wrong.nonzero()[0].tolist()
        bound = "" if lowest == -math.inf else f" and >= {lowest:g}"
        place = f" at row {at[0]}" if at else ""
        raise ValueError(f"{name}: expected finite values{bound} where they count, got {float(x[tuple(at)]):g}{place}")
    return kept


def read_segments(segment: Tensor, mask: Tensor, number: int | None = None, *, ordered: bool = True) -> Tensor:
    """Return ``segment`` (int64 [B, T]) as int32 with -1 on masked steps, whatever they held.

    Raises ValueError for another dtype or shape, an id below -1, one not below ``number`` (T by default), or, where
    they are to be ``ordered``, one that is smaller than another before it in its row.
    """
    check_ids("segment", segment, tuple(mask.shape))
    limit = mask.shape[1] if number is None else number

    ends, doubtful = [], []

    def read(segment: Tensor, mask: Tensor) -> tuple[Tensor]:
        kept = torch.where(mask, segment, -1)
        ends.append(torch.stack(torch.aminmax(kept)))
        small = kept.clamp_(max=_GREATEST).int() if limit > _GREATEST else kept.int()
        if ordered:  # a row that may not be in order: it falls from a step to the next, or goes on after a hole (-1)
            before, after = small[:, :-1], small[:, 1:]
            doubtful.append((((before > after) | (before < 0)) & (after >= 0)).any())
        return (small,)

    (kept,) = by_rows(read, segment, mask)
    least, most = int(torch.stack(ends).min()), int(torch.stack(ends).max())
    if least < -1 or most >= limit:
        raise ValueError(f"segment: expected ids in -1 .. {limit - 1} on unmasked steps, got {least} .. {most}")
    if any(doubtful):
        falling = (kept >= 0) & (kept < kept.cummax(dim=1).values)
        if bool(falling.any()):
            row, step = (int(i) for i in falling.nonzero()[0])
            raise ValueError(
                f"segment: expected ids that never decrease along a row, but row {row} does at step {step}"
            )
    return kept


def read_parts(name: str, x: Tensor, axes: str, group: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """Check a row's several rewards; return them as float64, 0 where they do not count, and the mask of those that do.

    axes: the shape that is asked for, such as "B, S". Raises ValueError, naming the argument, for another number of
    axes, an empty or complex tensor, ids or flags that do not match, an infinite value, or valid rows of NaN alone.
    """
    if x.ndim != axes.count(",") + 1 or x.numel() == 0 or x.is_complex():
        raise ValueError(f"{name}: expected real [{axes}], not empty, got {x.dtype} {list(x.shape)}")
    check_ids("group", group, x.shape[:1])
    asked = torch.ones_like(group, dtype=torch.bool) if valid is None else valid
    check_flags("valid", asked, x.shape[:1])
    rows = asked.view(-1, *[1] * (x.ndim - 1))
    value = x.detach().double()
    known = rows & ~value.isnan()
    value = torch.where(known, value, 0.0)
    if bool(value.isinf().any()):
        raise ValueError(f"{name}: infinite values among the valid rows")
    if bool(asked.any()) and not bool(known.any()):
        raise ValueError(f"{name}: every value of the valid rows is NaN; mark failed rows with valid=False")
    return value, known
