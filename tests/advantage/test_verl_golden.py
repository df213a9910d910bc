"""verl 0.9.1, recorded by scripts/record_verl.py: the engine gives its numbers under the options of ``verl_cases``.

Every function that verl registers is held to 1e-5, with the gradients of the losses. Where nothing selects verl's
behaviour the difference is checked to be there with its size, and so is what a wrong option gives; the page
docs/peers_verl_trl.md states the same sizes.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from flowrl.advantage import Advantage, aggregate, estimate, policy_loss

from .verl_cases import (
    GOLDEN,
    GRPO,
    KL_NAMES,
    LOSS_INPUTS,
    batch_of,
    channels,
    gaps,
    kl_gaps,
    ours,
    reduced,
    run_loss,
    tensor,
)

TOLERANCE = 1e-5
PAGE = Path(__file__).parents[2] / "docs" / "peers_verl_trl.md"


def find(kind: str, **wanted: Any) -> dict[str, Any]:
    """The one recorded entry that has these values."""
    found = [e for e in GOLDEN[kind] if all(e.get(k) == v for k, v in wanted.items())]
    assert len(found) == 1, f"{len(found)} entries of {kind} have {wanted}"
    return dict(found[0])


def labels(kind: str, *parts: str) -> Callable[[Any], str]:
    return lambda e: "-".join(json.dumps(e.get(part), sort_keys=True) for part in parts)


def zero_tail_with_holes(entry: Mapping[str, Any]) -> bool:
    """verl counts the second longest row's unmasked steps and takes the number for a column."""
    return bool(
        entry["name"] == "optimal_token_baseline" and "holes" in entry["case"] and entry["options"]["handle_zero_tail"]
    )


def beyond_limit(entry: Mapping[str, Any]) -> bool:
    """The engine cuts log-ratios at 20 everywhere, verl in some functions; 25 in the data."""
    return entry.get("log_prob") == "far_log_prob" and entry["name"] in ("gspo", "kl_cov", "dro", "geo_mean")


def mean_advantage(entry: Mapping[str, Any]) -> bool:
    """verl's geo_mean gives every step the row's mean advantage, the engine each its own: the gradients differ."""
    return bool(entry["name"] == "geo_mean" and entry["advantage"] == "by_step")


AGREE = [e for e in GOLDEN["estimators"] if not zero_tail_with_holes(e)]
LOSSES_AGREE = [e for e in GOLDEN["losses"] if not beyond_limit(e) and not mean_advantage(e)]


def test_everything_that_verl_registers_is_recorded() -> None:
    assert GOLDEN["about"]["verl"] == "0.9.1" and GOLDEN["about"]["script"] == "scripts/record_verl.py"
    names = {x for x in GOLDEN["registries"]["estimators"]} | {x for x in GOLDEN["registries"]["losses"]}
    assert {e["name"] for e in [*AGREE, *LOSSES_AGREE]} == names and len(names) == 14 + 12 - 1  # gpg is both


@pytest.mark.parametrize("entry", AGREE, ids=labels("estimators", "name", "case", "options"))
def test_estimators_agree(entry: dict[str, Any]) -> None:
    given = batch_of(entry["case"], entry["rows"])
    assert max(gaps(entry, ours(entry["name"], entry["options"], given), given["mask"])) < TOLERANCE


def test_gdpo_with_two_channels_and_weights_agrees() -> None:
    recorded, given = GOLDEN["channels"], batch_of("outcome_ragged")
    made = channels(tensor(recorded["rewards"]), given["group"], torch.tensor(recorded["weights"]), given["mask"])
    assert (made.advantage - tensor(recorded["advantages"])).abs().max() < TOLERANCE


@pytest.mark.parametrize(
    "entry", LOSSES_AGREE, ids=labels("losses", "name", "advantage", "mode", "settings", "log_prob")
)
def test_losses_and_their_gradients_agree(entry: dict[str, Any]) -> None:
    loss, gradient = run_loss(entry)
    assert (loss - tensor(entry["loss"])).abs() < TOLERANCE
    assert (gradient - tensor(entry["gradient"])).abs().max() < TOLERANCE


@pytest.mark.parametrize("entry", GOLDEN["aggregations"], ids=labels("aggregations", "mode", "shared"))
def test_aggregations_agree(entry: dict[str, Any]) -> None:
    matrix = LOSS_INPUTS["by_step"] * LOSS_INPUTS["weights"]
    assert (reduced(entry, matrix, LOSS_INPUTS["mask"]) - tensor(entry["loss"])).abs() < TOLERANCE


@pytest.mark.parametrize("entry", GOLDEN["kl"], ids=labels("kl", "kind", "log_prob"))
def test_kl_estimators_agree_up_to_the_limit_of_the_log_ratio(entry: dict[str, Any]) -> None:
    value, slope = kl_gaps(entry)
    if entry["log_prob"] == "log_prob" or entry["kind"] in ("k3", "low_var_kl"):
        assert max(value, slope) < TOLERANCE
    elif entry["kind"] in ("k3+", "low_var_kl+"):
        assert value < TOLERANCE and slope == pytest.approx(25.0)
    else:
        assert value == pytest.approx(112.5 if KL_NAMES.get(entry["kind"], entry["kind"]) == "k2" else 5.0)


# What the wrong option gives instead: id -> (verl's function, batch, the engine's call, greatest difference).
Call = Callable[[dict[str, Tensor]], Advantage]


def other(name: str, **options: Any) -> Call:
    return lambda given: estimate(name, given, options)


WRONG: dict[str, tuple[str, str, dict[str, Any], Call, float]] = {
    "ddof": ("grpo", "tokens_ragged", {"norm_adv_by_std_in_grpo": True}, other("grpo", **{**GRPO, "ddof": 0}), 0.29289),
    "eps": (
        "grpo",
        "tokens_ragged",
        {"norm_adv_by_std_in_grpo": True},
        other("grpo", **{**GRPO, "eps": 1e-4}),
        0.00022113,
    ),
    "singleton": (
        "grpo",
        "tokens_ragged",
        {"norm_adv_by_std_in_grpo": True},
        other("grpo", **{**GRPO, "singleton": "zero"}),
        0.18699,
    ),
    "rloo-singleton": ("rloo", "tokens_ragged", {}, other("rloo"), 0.18699),
    "rloo-vectorised": ("rloo_vectorized", "tokens_ragged", {}, other("rloo", singleton="raw"), 0.18699),
    "holes": ("reinforce_plus_plus", "tokens_holes", {"gamma": 1.0}, other("reinforce_pp", holes="reset"), 1.6097),
    "dead": (
        "reinforce_plus_plus_baseline",
        "outcome_ragged",
        {},
        other("reinforce_pp_baseline", singleton="raw"),
        0.081261,
    ),
    "whiten-unit": (
        "reinforce_plus_plus_baseline",
        "outcome_ragged",
        {},
        other("reinforce_pp_baseline", singleton="raw", dead="whiten", unit="sample"),
        0.20839,
    ),
    "remax-tokens": ("remax", "tokens_ragged", {}, other("remax"), 2.5297),
    "gpg-alpha": ("gpg", "outcome_ragged", {}, other("gpg", singleton="raw"), 0.066288),
    "passk-std": ("grpo_passk", "tokens_ragged", {"norm_adv_by_std_in_grpo": True}, other("pass_at_k"), 2.2524),
    "gdpo-batch": (
        "gdpo",
        "tokens_ragged",
        {},
        lambda given: estimate("gdpo", {**given, "rewards": given["rewards"][:, None]}, GRPO),
        0.15051,
    ),
    "opo-singleton": ("opo", "tokens_ragged", {}, other("opo"), 0.18699),
    "otb-tail": (
        "tir_optimal_token_baseline",
        "tokens_holes",
        {"handle_zero_tail": True},
        other("otb", align="rank", singleton="raw"),
        2.6771,
    ),
    "otb-align": (
        "tir_optimal_token_baseline",
        "tokens_holes",
        {"handle_zero_tail": True},
        other("otb", zero_tail=True, singleton="raw"),
        0.80399,
    ),
    "gae-whiten": ("gae", "tokens_ragged", {"gamma": 1.0, "lam": 1.0}, other("gae", lam=1.0), 1.1188),
}

# The same for losses: id -> (how the recorded entry is found, our loss of it, difference of the loss).
LossCall = Callable[[dict[str, Tensor]], Tensor]
MASK = LOSS_INPUTS["mask"]
BY_STEP = {"advantage": "by_step", "mode": "token-mean", "log_prob": None}
ROWS = {"advantage": "by_row", "mode": "seq-mean-token-mean"}
CLIP = {"clip_ratio_low": 0.2, "clip_ratio_high": 0.3}


def step_mean(name: str, **options: Any) -> LossCall:
    return lambda given: aggregate(policy_loss(name, given, options).loss, MASK, "step_mean")


def row_mean(name: str, **options: Any) -> LossCall:
    return lambda given: aggregate(policy_loss(name, given, options).loss, MASK, "seq_mean_mean")


WRONG_LOSS: dict[str, tuple[dict[str, Any], LossCall, float]] = {
    "no-dual": ({"name": "vanilla", "settings": {}, **BY_STEP}, step_mean("ppo"), 0.0048692),
    "cispo-upper": ({"name": "cispo", **BY_STEP}, step_mean("cispo", low=None, high=0.3), 0.09534),
    "sapo-steps": ({"name": "sapo", "settings": {}, **BY_STEP}, step_mean("sapo"), 0.30834),
    "gmpo-rows": ({"name": "geo_mean", "settings": CLIP, **ROWS}, row_mean("gmpo", low=0.2, high=0.3), 0.017104),
}
# What nothing selects: id -> (the recorded entry, difference of the loss, of its gradient).
FAR = {"log_prob": "far_log_prob"}
APART: dict[str, tuple[dict[str, Any], float, float]] = {
    "gspo-limit": ({"name": "gspo", **FAR}, 0.005092, 0.00086709),
    "kl_cov-limit": ({"name": "kl_cov", **FAR}, 0.0073529, 0.0014706),
    "dro-limit": ({"name": "dro", **FAR}, 5.4596, 0.11029),
    "gmpo-limit": ({"name": "geo_mean", **FAR}, 0.0025123, 0.030558),
    "gmpo-steps": ({"name": "geo_mean", "settings": CLIP, **BY_STEP}, 0.0, 0.030558),
}
TAIL = {"case": "tokens_holes", "options": {"handle_zero_tail": True}}


@pytest.mark.parametrize("key", WRONG)
def test_a_wrong_option_is_off_by_the_stated_size(key: str) -> None:
    name, case, options, call, size = WRONG[key]
    entry = find("estimators", name=name, case=case, options=options)
    given = batch_of(case, entry["rows"])
    assert gaps(entry, call(given), given["mask"])[0] == pytest.approx(size, rel=0.01)


@pytest.mark.parametrize("key", WRONG_LOSS)
def test_a_wrong_loss_is_off_by_the_stated_size(key: str) -> None:
    wanted, call, size = WRONG_LOSS[key]
    entry = find("losses", **{"weights": None, "shared": None, **wanted})
    names = ("log_prob", "old_log_prob", "mask")
    given = {**{x: LOSS_INPUTS[x] for x in names}, "advantage": LOSS_INPUTS[entry["advantage"]]}
    assert float((call(given) - tensor(entry["loss"])).abs()) == pytest.approx(size, rel=0.01)


def test_an_aggregation_over_all_rows_is_off_by_the_empty_ones() -> None:
    entry = find("aggregations", mode="seq-mean-token-sum", shared={})
    ours_, theirs = (
        aggregate(LOSS_INPUTS["by_step"] * LOSS_INPUTS["weights"], MASK, "seq_sum_mean"),
        tensor(entry["loss"]),
    )
    assert ours_ / theirs == pytest.approx(14 / 15, rel=1e-5)


@pytest.mark.parametrize("key", APART)
def test_losses_that_nothing_brings_together(key: str) -> None:
    wanted, size, slope = APART[key]
    entry = find("losses", **wanted)
    loss, gradient = run_loss(entry)
    assert float((loss - tensor(entry["loss"])).abs()) == pytest.approx(size, rel=0.01, abs=TOLERANCE)
    assert float((gradient - tensor(entry["gradient"])).abs().max()) == pytest.approx(slope, rel=0.01)


def test_zero_tail_of_a_row_with_holes_is_its_own_in_verl() -> None:
    entry = find("estimators", name="optimal_token_baseline", **TAIL)
    given = batch_of(entry["case"], entry["rows"])
    assert gaps(entry, ours(entry["name"], entry["options"], given), given["mask"])[0] == pytest.approx(
        0.7694, rel=0.01
    )


def test_equal_rewards_give_exactly_zero_here_and_rounding_errors_in_verl() -> None:
    for entry in GOLDEN["flat"]:
        rewards = torch.full((entry["rows"],), entry["reward"])
        made = estimate("grpo", {"rewards": rewards, "group": torch.zeros(len(rewards), dtype=torch.int64)}, GRPO)
        assert bool((made.advantage == 0).all())
    assert [round(entry["advantage"], 4) for entry in GOLDEN["flat"]] == [0.0, 0.0, 0.0289, 0.0]


def test_the_page_states_these_sizes() -> None:
    stated = {k: float(v) for k, v in re.findall(r"\(`([\w-]+)`: ([\d.e-]+)\)", PAGE.read_text())}
    measured = {k: v[-1] for k, v in WRONG.items()} | {k: v[-1] for k, v in WRONG_LOSS.items()}
    measured |= {k: max(v[1:]) for k, v in APART.items()} | {"otb-holes": 0.7694, "flat": 0.0289}
    assert stated == {k: pytest.approx(v, rel=0.02) for k, v in measured.items()}
