"""Classifier-free guidance: one prediction out of a conditional and an unconditional one."""

from __future__ import annotations

from torch import Tensor
from torch.linalg import vector_norm

from flowrl.protocols import GuidanceRule


def guide(conditional: Tensor, unconditional: Tensor, scale: float, rule: GuidanceRule) -> Tensor:
    """Combine two predictions of one kind (2207.12598): ``g = unconditional + scale (conditional - unconditional)``.

    linear: g itself. norm_preserving: ``g ||conditional|| / ||g||`` with one norm a sample, so that a large scale
    turns the prediction without lengthening it. A scale of 1 gives the conditional prediction exactly, under both.
    conditional, unconditional: [B, ...].
    Returns float32 [B, ...]. Raises ValueError for another rule; ``embedded`` guidance happens inside the network
    and has nothing to combine.
    """
    if rule not in ("linear", "norm_preserving"):
        raise ValueError(
            f"guidance rule {rule!r} combines no predictions; use linear or norm_preserving in the adapter"
        )
    conditional, unconditional = conditional.float(), unconditional.float()
    if scale == 1:
        return conditional
    guided = unconditional + scale * (conditional - unconditional)
    if rule == "linear":
        return guided
    shape = (-1, *[1] * (guided.ndim - 1))
    # The floor keeps a prediction of exactly 0 at 0 in place of 0 / 0.
    length: Tensor = vector_norm(guided.flatten(1), dim=1).clamp_min(1e-20)
    wanted: Tensor = vector_norm(conditional.flatten(1), dim=1)
    return guided * (wanted / length).reshape(shape)
