"""TRL's GRPO trainer with any estimator of the engine.

    from flowrl.integrations.trl import trainer_with
    Trainer = trainer_with("gdpo", {"ddof": 1})
    Trainer(model=..., reward_funcs=[...], args=GRPOConfig(...), train_dataset=...).train()

TRL draws, scores and trains as it always does; only the advantages are the engine's. Written against TRL 1.16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowrl.advantage import ESTIMATORS, estimate
from flowrl.advantage.pipeline import Whiten, check_options, inputs_of
from flowrl.errors import UserError

# What TRL's rollout can hand to an estimator.
SUPPLIED = frozenset(
    {"rewards", "group", "valid", "weights", "mask", "token", "step_reward", "trajectory", "length", "cost"}
)


def trainer_with(
    name: str,
    options: Mapping[str, Any] | None = None,
    *,
    whiten: Whiten = "none",
    clip: float = 0.0,
    base: type | None = None,
) -> type:
    """Make a subclass of TRL's GRPOTrainer whose advantages come from the estimator ``name``.

    options, whiten, clip: as ``estimate``. base: the trainer to derive from, ``trl.GRPOTrainer`` by default. Rewards of
    several functions reach estimators of channels one by one, with TRL's reward_weights, and the others as their
    weighted sum; None from a reward function is no value. An estimator that gives one advantage a token is taken over
    the completion's tokens. Its weights multiply the advantages last: a clipped loss is homogeneous in them. What a
    configuration says of scale_rewards and multi_objective_aggregation has no effect. Raises UserError for an unknown
    estimator or option, or for one that needs what TRL's rollout does not have.
    """
    if name not in ESTIMATORS:
        raise UserError(f"trainer_with: no estimator is called {name!r}; flowrl methods lists them")
    missing = [n for n, required in inputs_of(ESTIMATORS[name]).items() if required and n not in SUPPLIED]
    if missing:
        raise UserError(f"trainer_with: {name} needs {', '.join(missing)}, which TRL's rollout does not have")
    try:
        check_options(name, ESTIMATORS[name], options or {})
    except ValueError as error:
        raise UserError(f"trainer_with: {error}") from error
    if base is None:
        try:
            from trl import GRPOTrainer  # type: ignore[attr-defined]
        except ImportError as error:
            raise UserError("flowrl.integrations.trl needs TRL: pip install 'flowrl[trl]'") from error
        base = GRPOTrainer
    chosen = {"name": name, "options": dict(options or {}), "whiten": whiten, "clip": clip}
    return type(f"GRPOTrainerWith_{name}", (_EngineAdvantages, base), {"_engine": chosen})


class _EngineAdvantages:
    """Takes the rewards as TRL gathers them, and puts the engine's advantages into TRL's batch."""

    _engine: Mapping[str, Any]
    _engine_rewards: Tensor

    def _calculate_rewards(self, *args: Any) -> Tensor:
        self._engine_rewards = super()._calculate_rewards(*args)  # type: ignore[misc]
        return self._engine_rewards

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        output: dict[str, Any] = super()._generate_and_score_completions(inputs)  # type: ignore[misc]
        trainer: Any = self
        training = trainer.model.training
        size = trainer.num_generations if training else trainer.num_generations_eval
        mask, token = output["completion_mask"], output["completion_ids"]
        if "tool_mask" in output:
            mask = mask * output["tool_mask"]
        accelerator = trainer.accelerator
        everyone = {
            key: accelerator.gather(accelerator.pad_across_processes(x, dim=1, pad_index=0))
            for key, x in (("mask", mask), ("token", token))
        }
        made = advantages_of(
            self._engine, self._engine_rewards, trainer.reward_weights, size, everyone["mask"].bool(), everyone["token"]
        )
        start = accelerator.process_index * len(mask)
        mine = made[start : start + len(mask)]
        output["advantages"] = mine[:, : mask.shape[1]] if mine.ndim == 2 else mine
        return output


def advantages_of(
    engine: Mapping[str, Any], rewards: Tensor, weights: Tensor, group_size: int, mask: Tensor, token: Tensor
) -> Tensor:
    """Run the estimator on a batch as TRL holds it: float32 [B] or [B, T], its weights multiplied in.

    engine: name, options, whiten and clip; rewards: [B, R], NaN for no value; weights: [R]; rows of one prompt lie
    ``group_size`` together; mask, token: [B, T].
    """
    rows = len(rewards)
    valid = ~rewards.isnan().all(dim=1)
    total = (rewards * weights.to(rewards.device)).nansum(dim=1)
    channels = "weights" in inputs_of(ESTIMATORS[engine["name"]])
    length = mask.sum(dim=1)
    last = torch.where(mask, torch.arange(mask.shape[1], device=mask.device), -1).amax(dim=1)
    outcome = torch.zeros(mask.shape, dtype=torch.float64, device=rewards.device)
    reached = (valid & (last >= 0)).nonzero().flatten()
    outcome[reached, last[reached]] = total[reached].double()
    found = estimate(
        engine["name"],
        {
            "rewards": rewards if channels else torch.where(valid, total, torch.nan),
            "group": torch.arange(rows, device=rewards.device) // group_size,
            "valid": valid,
            "weights": weights.to(rewards.device),
            "mask": mask,
            "token": token.long(),
            "step_reward": outcome,
            "trajectory": torch.arange(rows, device=rewards.device),
            "length": length.float(),
            "cost": length.clamp(min=1).float(),
        },
        engine["options"],
        whiten=engine["whiten"],
        clip=engine["clip"],
    )
    return found.advantage * found.weight
