"""Record what verl 0.9.1 computes, for the tests that hold the advantage engine to it.

    python3 -m venv verlenv
    verlenv/bin/pip install torch==2.13.0 numpy             # first, so that nothing brings another torch
    verlenv/bin/pip install --no-deps verl==0.9.1
    verlenv/bin/pip install omegaconf==2.3.0 hydra-core orjson codetiming packaging psutil pyyaml requests httpx2
    verlenv/bin/pip install --no-deps "tensordict>=0.8,<=0.10.0,!=0.9.0" "transformers>=5.5.3,<5.11,!=5.6.0" \\
        "tokenizers<=0.23.0" "huggingface-hub<2" ray datasets pandas pyarrow ...
    verlenv/bin/python scripts/record_verl.py --output tests/advantage/verl_golden.json

What is missing then names itself one import at a time (pip install --no-deps NAME); verl's pins conflict with flowrl's,
so the environment is its own. Nothing of verl is replaced or stubbed: its functions are the published ones. The last
part runs flowrl's own adapters through verl's registries, configs and ``compute_advantage``; it needs flowrl's sources
beside this script and nothing more. Everything is seeded, on CPU, in float32.
"""

from __future__ import annotations

import argparse
import inspect
import json
import platform
import sys
from collections.abc import Callable
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
SEED = 20
STEPS = 9
# Groups of 4, 3, 3, 2, 2 and 1 rows; the rewards of "flat" are all equal, "solo" is alone.
LABELS = ("a", "b", "flat", "a", "c", "solo", "b", "a", "d", "flat", "c", "b", "a", "d", "flat")
LENGTHS = (9, 4, 3, 6, 7, 5, 4, 8, 2, 9, 1, 7, 6, 5, 3)
HOLES = ((0, 3), (0, 4), (3, 0), (4, 2), (7, 1), (7, 2), (9, 5), (11, 3), (12, 4))
ACTOR = {"strategy": "fsdp", "rollout_n": 1, "ppo_micro_batch_size_per_gpu": 1}
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}


def plain(x: Any) -> Any:
    """Make something JSON of a result: tensors keep all nine digits of float32."""
    if isinstance(x, Tensor):
        flat = x.detach().flatten().tolist()
        digits = [float(f"{v:.9g}") for v in flat] if x.is_floating_point() else [int(v) for v in flat]
        return {"shape": list(x.shape), "values": digits}
    if isinstance(x, dict):
        return {k: plain(v) for k, v in x.items()}
    return [plain(v) for v in x] if isinstance(x, (list, tuple)) else x


def masks() -> dict[str, Tensor]:
    ragged = torch.arange(STEPS) < torch.tensor(LENGTHS)[:, None]
    holes = ragged.clone()
    for row, step in HOLES:
        holes[row, step] = False
    return {"ragged": ragged, "holes": holes}


def last(mask: Tensor) -> Tensor:
    return torch.where(mask, torch.arange(STEPS), -1).amax(1)


def make_inputs() -> dict[str, dict[str, Any]]:
    """Four batches: token rewards or outcomes alone (some of them 0), rows without or with holes in their masks."""
    g = torch.Generator().manual_seed(SEED)
    rows = len(LABELS)
    outcome = torch.randint(0, 5, (rows,), generator=g) / 4
    outcome[torch.tensor([x == "flat" for x in LABELS])] = 0.5
    dense = torch.randn(rows, STEPS, generator=g) / 2
    shared = {
        "values": torch.randn(rows, STEPS, generator=g),
        "reward_baselines": torch.rand(rows, generator=g),
        "old_log_probs": -0.05 - 2 * torch.rand(rows, STEPS, generator=g),
        "rollout_is_weights": 0.5 + torch.rand(rows, STEPS, generator=g),
    }
    pi = shared["old_log_probs"].exp()
    shared["sum_pi_squared"] = pi.square() + (1 - pi).square() * torch.rand(rows, STEPS, generator=g)
    found = {}
    for kind in ("tokens", "outcome"):
        for name, mask in masks().items():
            at_end = torch.zeros(rows, STEPS)
            at_end[torch.arange(rows), last(mask)] = outcome
            flat = torch.tensor([x == "flat" for x in LABELS])[:, None]
            reward = at_end if kind == "outcome" else torch.where(flat, at_end, torch.where(mask, dense, 0.0))
            found[f"{kind}_{name}"] = {
                "token_level_rewards": reward,
                "response_mask": mask,
                "index": [f"uid-{x}" for x in LABELS],
                **shared,
            }
    return found


def rows_of(batch: dict[str, Any], keep: list[int]) -> dict[str, Any]:
    return {k: [v[i] for i in keep] if isinstance(v, list) else v[keep] for k, v in batch.items()}


def call_estimator(core: Any, name: str, batch: dict[str, Any], options: dict[str, Any], config: Any) -> Any:
    """Call a registered estimator with those of the batch's entries that it has parameters for."""
    function = core.get_adv_estimator_fn(name)
    known = inspect.signature(function).parameters
    given = {k: np.array(v, dtype=object) if k == "index" else v for k, v in batch.items() if k in known}
    given["response_mask"] = given["response_mask"].float()  # verl's loops multiply by 1 - mask
    if "config" in known:
        given["config"] = config
    return function(**given, **options)


def record_estimators(core: Any, batches: dict[str, dict[str, Any]]) -> list[dict[str, Any]]:
    from verl.trainer.config import AlgoConfig

    grouped: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
        ("gae", {"gamma": 1.0, "lam": 1.0}, {}),
        ("gae", {"gamma": 0.9, "lam": 0.8}, {}),
        *(
            (name, {"norm_adv_by_std_in_grpo": by_std}, {})
            for name in ("grpo", "grpo_vectorized")
            for by_std in (True, False)
        ),
        ("rloo", {}, {}),
        ("rloo_vectorized", {}, {}),
        ("opo", {}, {}),
        ("reinforce_plus_plus", {}, {"gamma": 1.0}),
        ("reinforce_plus_plus", {}, {"gamma": 0.9}),
        ("reinforce_plus_plus_baseline", {}, {}),
        ("remax", {}, {}),
        ("gpg", {}, {}),
        ("gpg", {"f_norm": 2.0}, {}),
        *(
            (name, {"handle_zero_tail": tail, **more}, {})
            for name in ("optimal_token_baseline", "tir_optimal_token_baseline")
            for tail in (True, False)
            for more in ({}, {"rollout_is_weights": None})
        ),
        ("grpo_passk", {}, {"norm_adv_by_std_in_grpo": True}),
        ("grpo_passk", {}, {"norm_adv_by_std_in_grpo": False}),
        ("gdpo", {}, {}),
    ]
    made = []
    for case, batch in batches.items():
        for name, options, settings in grouped:
            rows = [i for i, x in enumerate(LABELS) if x != "solo" or name != "grpo_passk"]
            given = rows_of(batch, rows)
            if "rollout_is_weights" in options:
                del given["rollout_is_weights"]
            arguments = {k: v for k, v in options.items() if k != "rollout_is_weights"}
            advantages, returns = call_estimator(core, name, given, arguments, AlgoConfig(**settings))
            made.append(
                {
                    "name": name,
                    "case": case,
                    "rows": rows,
                    "options": {**options, **settings},
                    "advantages": advantages,
                    "returns": returns,
                }
            )
    return made


def record_channels(core: Any, batch: dict[str, Any]) -> dict[str, Any]:
    """GDPO with two rewards and weights, as the trainer hands them over."""
    from verl.trainer.config import AlgoConfig

    g = torch.Generator().manual_seed(SEED + 1)
    channels = torch.rand(len(LABELS), 2, generator=g)
    mask = batch["response_mask"]
    config = AlgoConfig(gdpo_reward_keys=["one", "two"], gdpo_reward_weights=[1.0, 2.5])
    prompt = torch.ones(len(LABELS), 2, dtype=torch.int64)
    advantages, _ = core.get_adv_estimator_fn("gdpo")(
        token_level_rewards=batch["token_level_rewards"],
        response_mask=mask.float(),
        index=np.array(batch["index"], dtype=object),
        config=config,
        non_tensor_batch={"one": channels[:, 0].numpy(), "two": channels[:, 1].numpy()},
        batch={"prompts": prompt, "attention_mask": torch.cat([prompt, mask.long()], 1)},
    )
    return {"rewards": channels, "weights": [1.0, 2.5], "advantages": advantages}


def record_flat(core: Any) -> list[dict[str, Any]]:
    """GRPO of groups whose rewards are all equal, to numbers that float32 cannot hold exactly."""
    made = []
    for reward, rows in ((0.7, 3), (0.1, 6), (0.3, 7), (0.5, 4)):
        scores = torch.zeros(rows, 2)
        scores[:, 1] = reward
        advantages, _ = core.get_adv_estimator_fn("grpo")(
            token_level_rewards=scores, response_mask=torch.ones(rows, 2), index=np.array(["x"] * rows, dtype=object)
        )
        made.append({"reward": reward, "rows": rows, "advantage": float(advantages[:, 1].abs().max())})
    return made


def make_loss_inputs() -> dict[str, Tensor]:
    """Log-probs of which some have moved far, advantages by row and by step, a mask with holes and an empty row."""
    g = torch.Generator().manual_seed(SEED + 2)
    rows = len(LABELS)
    old = -0.05 - 2.5 * torch.rand(rows, STEPS, generator=g)
    moved = (old + 0.6 * torch.randn(rows, STEPS, generator=g)).clamp(max=-0.01)
    moved[0, 0], moved[1, 1], moved[4, 1] = old[0, 0] - 6.0, old[1, 1] - 3.0, -0.01
    old[4, 1] = -3.5
    by_step = torch.randn(rows, STEPS, generator=g)
    by_step[2, 1] = by_step[11, 5] = 0.0
    mask = masks()["holes"].clone()
    mask[8] = False
    by_row = torch.randn(rows, 1, generator=g).expand(rows, STEPS) * mask
    return {
        "old_log_prob": old,
        "log_prob": moved,
        "by_step": by_step * mask,
        "by_row": by_row,
        "mask": mask,
        "weights": 0.5 + torch.rand(rows, STEPS, generator=g),
        "far_log_prob": torch.where(torch.arange(STEPS) == 2, old - 25.0, moved),
    }


def actor_config(settings: dict[str, Any]) -> Any:
    from verl.workers.config import ActorConfig, PolicyLossConfig

    rest = {k: v for k, v in settings.items() if k != "policy_loss"}
    return ActorConfig(**ACTOR, **rest, policy_loss=PolicyLossConfig(**settings.get("policy_loss", {})))


def call_loss(
    function: Callable[..., Any], inputs: dict[str, Tensor], entry: dict[str, Any], config: Any
) -> dict[str, Any]:
    """Value, gradient by log_prob, and metrics of one loss."""
    log_prob = inputs[entry.get("log_prob", "log_prob")].clone().requires_grad_()
    torch.manual_seed(SEED)
    drawn: list[Tensor] = []
    plain_randperm = torch.randperm

    def spy(*args: Any) -> Tensor:  # clip_cov's draw, so that a test can repeat it
        drawn.append(plain_randperm(*args))
        return drawn[-1]

    torch.randperm = spy  # type: ignore[assignment]
    try:
        loss, metrics = function(
            old_log_prob=inputs["old_log_prob"],
            log_prob=log_prob,
            advantages=inputs[entry["advantage"]],
            response_mask=inputs["mask"],
            loss_agg_mode=entry["mode"],
            config=config,
            rollout_is_weights=inputs["weights"] if entry.get("weights") else None,
        )
    finally:
        torch.randperm = plain_randperm
    loss.backward()
    found = {**entry, "loss": loss.detach(), "gradient": log_prob.grad, "metrics": metrics}
    return {**found, "drawn": drawn[0]} if drawn else found


def loss_entries() -> list[dict[str, Any]]:
    settings: dict[str, list[dict[str, Any]]] = {
        "vanilla": [{}, {**CLIP, "clip_ratio_c": 1.5}],
        "dppo_tv": [CLIP, {"clip_ratio_low": 0.05, "clip_ratio_high": 0.1, "clip_ratio_c": 1.2}],
        "dppo_kl": [CLIP, {"clip_ratio_low": 0.01, "clip_ratio_high": 0.02, "clip_ratio_c": 1.2}],
        "gspo": [CLIP, {"clip_ratio_low": 3e-4, "clip_ratio_high": 4e-4}],
        "sapo": [{}, {"tau_pos": 2.0, "tau_neg": 3.0}],
        "gpg": [{}],
        "clip_cov": [
            {"policy_loss": {"clip_cov_ratio": 1.0, "clip_cov_lb": 0.1, "clip_cov_ub": 1.0}},
            {**CLIP, "policy_loss": {"clip_cov_ratio": 0.08, "clip_cov_lb": -0.5, "clip_cov_ub": 5.0}},
            {},
        ],
        "kl_cov": [{}, {"policy_loss": {"kl_cov_ratio": 0.2, "ppo_kl_coef": 0.7}}],
        "geo_mean": [CLIP, {"clip_ratio_low": 0.4, "clip_ratio_high": 0.4}],
        "dro": [{"policy_loss": {"dro_beta": 0.3}}],
        "cispo": [CLIP],
        "bypass_mode": [
            {"policy_loss": {"rollout_correction": {"loss_type": "ppo_clip", "rollout_is": None}}},
            {"policy_loss": {"rollout_correction": {"loss_type": "reinforce", "rollout_is": "token"}}},
        ],
    }
    entries = []
    for name, all_settings in settings.items():
        for number, chosen in enumerate(all_settings):
            base = {"name": name, "settings": chosen, "advantage": "by_step", "mode": "token-mean"}
            entries += [base, {**base, "advantage": "by_row", "mode": "seq-mean-token-mean"}]
            if number == 0:
                shared = {"dp_size": 2, "batch_num_tokens": 200, "global_batch_size": 40, "loss_scale_factor": 16}
                entries.append({**base, "weights": True, "advantage": "by_row"})
                entries.append({**base, "mode": "seq-mean-token-sum-norm", "shared": shared, "advantage": "by_row"})
                entries.append({**base, "log_prob": "far_log_prob"})
    return entries


def record_losses(core: Any, inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    made = []
    for entry in loss_entries():
        config = actor_config(entry["settings"])
        config.global_batch_info.update(entry.get("shared", {}))
        made.append(call_loss(core.get_policy_loss_fn(entry["name"]), inputs, entry, config))
    return made


def record_aggregations(core: Any, inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    matrix = inputs["by_step"] * inputs["weights"]
    made = []
    for mode in ("token-mean", "token-sum", "seq-mean-token-sum", "seq-mean-token-sum-norm", "seq-mean-token-mean"):
        for shared in (
            {},
            {"loss_scale_factor": 16},
            {"dp_size": 2, "batch_num_tokens": 200, "global_batch_size": 40},
        ):
            loss = core.agg_loss(matrix, inputs["mask"], mode, **shared)
            made.append({"mode": mode, "shared": shared, "loss": loss})
    return made


def record_kl(core: Any, inputs: dict[str, Tensor]) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for log_prob in ("log_prob", "far_log_prob"):
        for kind in ("kl", "k1", "abs", "mse", "k2", "low_var_kl", "k3", "k1+", "abs+", "k2+", "k3+", "low_var_kl+"):
            lp = inputs[log_prob].clone().requires_grad_()
            value = core.kl_penalty(lp, inputs["old_log_prob"], kind)
            value.sum().backward()
            made.append({"kind": kind, "log_prob": log_prob, "value": value, "gradient": lp.grad})
    return made


def record_adapters(core: Any, batches: dict[str, dict[str, Any]], inputs: dict[str, Tensor]) -> dict[str, Any]:
    """Run flowrl's functions by verl's own ways: registries, configs by hydra, compute_advantage on a DataProto."""
    sys.path.insert(0, str(ROOT))
    from omegaconf import OmegaConf
    from verl import DataProto
    from verl.trainer.ppo.ray_trainer import compute_advantage
    from verl.utils.config import omega_conf_to_dataclass

    from flowrl.integrations.verl import register

    registered = register()
    blocks: dict[str, dict[str, Any]] = {
        "flowrl_reinforce_pp_baseline": {"options": {"singleton": "raw", "dead": "whiten"}},
        "flowrl_grpo": {"options": {"ddof": 1, "eps": 1e-6}, "whiten": "step", "clip": 1.0},
    }
    estimators = []
    for case in ("outcome_ragged", "tokens_holes"):
        batch = batches[case]
        for name in registered.estimators:
            if name in ("flowrl_bnpo", "flowrl_dgpo_difficulty") and case != "outcome_ragged":
                continue  # they ask for rewards in [0, 1]
            block = blocks.get(name, {})
            config = OmegaConf.create({"gamma": 0.9, "flowrl": block, "norm_adv_by_std_in_grpo": True})
            tensors = {k: batch[k] for k in ("token_level_rewards", "response_mask", "reward_baselines")}
            data = DataProto.from_dict(tensors, {"uid": np.array(batch["index"], dtype=object)})
            data = compute_advantage(data, adv_estimator=name, config=config)
            kept = {k: data.batch[k] for k in ("advantages", "returns")}
            estimators.append({"name": name, "case": case, "block": block, "gamma": 0.9, **kept})
    losses = []
    for name in registered.losses:
        entry: dict[str, Any] = {"name": name, "settings": CLIP, "advantage": "by_row", "mode": "token-mean"}
        if name == "flowrl_gppo":
            entry["own"] = {"high": 0.5, "beta_low": 0.25}
        made = {"_target_": "flowrl.integrations.verl.policy_loss_config", "flowrl": entry.get("own", {})}
        actor = {"_target_": "verl.workers.config.ActorConfig", **ACTOR, **CLIP, "policy_loss": made}
        config = omega_conf_to_dataclass(OmegaConf.create(actor))
        losses.append(call_loss(core.get_policy_loss_fn(name), inputs, entry, config))
    return {"estimators": estimators, "losses": losses}


def signatures(core: Any) -> dict[str, str]:
    names = ("register_adv_est", "register_policy_loss", "get_adv_estimator_fn", "get_policy_loss_fn", "agg_loss")
    found = {name: str(inspect.signature(getattr(core, name))) for name in names}
    found["vanilla"] = str(inspect.signature(core.get_policy_loss_fn("vanilla")))
    found["PolicyLossConfig"] = str(inspect.signature(import_module("verl.workers.config").PolicyLossConfig))
    found["grpo"] = str(inspect.signature(core.get_adv_estimator_fn("grpo")))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="record verl's numbers")
    parser.add_argument("--output", type=Path, default=ROOT / "tests" / "advantage" / "verl_golden.json")
    output = parser.parse_args().output
    import verl.trainer.ppo.core_algos as core

    torch.set_num_threads(1)
    about = {
        "script": "scripts/record_verl.py",
        "seed": SEED,
        "verl": metadata.version("verl"),
        "torch": torch.__version__,
        "numpy": np.__version__,
        "python": platform.python_version(),
    }
    print(about)
    registries = {"estimators": sorted(core.ADV_ESTIMATOR_REGISTRY), "losses": sorted(core.POLICY_LOSS_REGISTRY)}
    batches, inputs = make_inputs(), make_loss_inputs()
    found: dict[str, Any] = {
        "about": about,
        "registries": registries,
        "signatures": signatures(core),
        "batches": batches,
        "estimators": record_estimators(core, batches),
        "channels": record_channels(core, batches["outcome_ragged"]),
        "flat": record_flat(core),
        "loss_inputs": inputs,
        "losses": record_losses(core, inputs),
        "aggregations": record_aggregations(core, inputs),
        "kl": record_kl(core, inputs),
        "adapters": record_adapters(core, batches, inputs),
    }
    print({k: len(v) for k, v in found.items()})
    parts = [f"{json.dumps(k)}: {json.dumps(plain(v), separators=(',', ':'))}" for k, v in found.items()]
    output.write_text("{\n" + ",\n".join(parts) + "\n}\n")


if __name__ == "__main__":
    main()
