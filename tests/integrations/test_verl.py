"""The adapters against what verl's registries, configs and compute_advantage gave when they were run inside verl.

verl cannot be installed beside flowrl; a stand-in for its core_algos has the recorded signatures, and
scripts/record_verl.py ran the same adapters in the real one.
"""

from __future__ import annotations

import inspect
import os
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from flowrl.advantage import ESTIMATORS, POLICY_LOSSES, estimate
from flowrl.errors import UserError
from flowrl.integrations.verl import (
    FOLLOWED,
    PREFIX,
    Estimator,
    Loss,
    group_ids,
    place,
    policy_loss_config,
    register,
)
from tests.advantage.verl_cases import GOLDEN, LOSS_INPUTS, batch_of, reduced, tensor

ADAPTED = GOLDEN["adapters"]


def vanilla() -> tuple[torch.Tensor, dict[str, Any]]:
    raise AssertionError("never called")


class Core(ModuleType):
    """verl.trainer.ppo.core_algos: its two registries, under the rules of 0.9.1."""

    def __init__(self) -> None:
        super().__init__("verl.trainer.ppo.core_algos")
        self.estimators: dict[str, Any] = {}
        self.losses: dict[str, Any] = {"vanilla": vanilla}

    def register_adv_est(self, name_or_enum: Any) -> Any:
        def decorator(fn: Any) -> Any:
            if name_or_enum in self.estimators and self.estimators[name_or_enum] != fn:
                raise ValueError(f"Adv estimator {name_or_enum} has already been registered")
            self.estimators[name_or_enum] = fn
            return fn

        return decorator

    def register_policy_loss(self, name: str) -> Any:
        def decorator(func: Any) -> Any:
            self.losses[name] = func
            return func

        return decorator

    def get_policy_loss_fn(self, name: str) -> Any:
        return self.losses[name]

    def agg_loss(self, loss_mat: Tensor, loss_mask: Tensor, loss_agg_mode: str, **shared: Any) -> Tensor:
        """Held to verl's own in tests/advantage/test_verl_golden.py."""
        return reduced({"mode": loss_agg_mode, "shared": shared}, loss_mat, loss_mask)


@pytest.fixture
def core(monkeypatch: pytest.MonkeyPatch) -> Core:
    made = Core()
    for name in ("verl", "verl.trainer", "verl.trainer.ppo"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", made)
    return made


def call(entry: dict[str, Any], estimator: Any, index: Any = None) -> tuple[Tensor, Tensor]:
    raw = GOLDEN["batches"][entry["case"]]
    made: tuple[Tensor, Tensor] = estimator(
        token_level_rewards=tensor(raw["token_level_rewards"]),
        response_mask=tensor(raw["response_mask"]),
        config={"gamma": entry["gamma"], "flowrl": entry["block"], "norm_adv_by_std_in_grpo": True},
        index=np.array(raw["index"], dtype=object) if index is None else index,
        reward_baselines=tensor(raw["reward_baselines"]),
    )
    return made


@pytest.mark.parametrize("entry", ADAPTED["estimators"], ids=lambda e: f"{e['name']}-{e['case']}")
def test_estimators_give_what_they_gave_inside_verl(entry: dict[str, Any]) -> None:
    advantages, returns = call(entry, Estimator(entry["name"].removeprefix(PREFIX)))
    assert (advantages - tensor(entry["advantages"])).abs().max() < 1e-5
    assert (returns - tensor(entry["returns"])).abs().max() < 1e-5
    assert advantages.dtype == torch.float32 and bool((advantages != 0).any())
    assert bool((advantages[~batch_of(entry["case"])["mask"]] == 0).all())


@pytest.mark.parametrize("entry", ADAPTED["losses"], ids=lambda e: e["name"])
def test_losses_give_what_they_gave_inside_verl(entry: dict[str, Any], core: Core) -> None:
    register()
    log_prob = LOSS_INPUTS["log_prob"].clone().requires_grad_()
    torch.manual_seed(GOLDEN["about"]["seed"])
    loss, metrics = core.losses[entry["name"]](
        old_log_prob=LOSS_INPUTS["old_log_prob"],
        log_prob=log_prob,
        advantages=LOSS_INPUTS[entry["advantage"]],
        response_mask=LOSS_INPUTS["mask"],
        loss_agg_mode=entry["mode"],
        config={**actor_defaults(), **entry["settings"], "policy_loss": {**COVARIANCE, "flowrl": entry.get("own", {})}},
        rollout_is_weights=None,
    )
    loss.backward()
    assert log_prob.grad is not None
    assert float(loss) == pytest.approx(tensor(entry["loss"]).item(), abs=1e-5)
    assert (log_prob.grad - tensor(entry["gradient"])).abs().max() < 1e-5
    assert metrics == pytest.approx(entry["metrics"], abs=1e-5)


COVARIANCE = {
    "clip_cov_ratio": 2e-4, "clip_cov_lb": 1.0, "clip_cov_ub": 5.0, "kl_cov_ratio": 2e-4, "ppo_kl_coef": 0.1,
    "dro_beta": None,
}  # fmt: skip


def actor_defaults() -> dict[str, Any]:
    """Those fields of verl's ActorConfig that the adapters read."""
    return {"clip_ratio": 0.2, "clip_ratio_c": 3.0, "tau_pos": 1.0, "tau_neg": 1.05}


def test_the_adapters_take_what_verl_hands_over() -> None:
    """Names and order of verl's own parameters, as recorded from the package."""
    recorded = GOLDEN["signatures"]
    ours, theirs = inspect.signature(Loss("ppo")), recorded["vanilla"]
    places = [theirs.index(f"{name}:") for name in ours.parameters]
    assert places == sorted(places) and theirs.count(":") >= len(places) == 7
    assert "tuple[torch.Tensor, dict[str, typing.Any]]" in theirs
    for name in ("token_level_rewards", "response_mask", "index", "config"):
        assert f"{name}:" in recorded["grpo"] and name in inspect.signature(Estimator("grpo")).parameters
    assert recorded["register_adv_est"].startswith("(name_or_enum") and recorded["register_policy_loss"].startswith(
        "(name"
    )
    for name in ("loss_mat", "loss_mask", "loss_agg_mode", "dp_size", "batch_num_tokens", "global_batch_size"):
        assert f"{name}:" in recorded["agg_loss"]


def test_every_method_is_registered_or_refused_with_a_reason(core: Core) -> None:
    made = register()
    assert set(made.estimators) == set(core.estimators)
    assert {*made.losses, "vanilla"} == set(core.losses)
    names = {PREFIX + key for key in (*ESTIMATORS, *POLICY_LOSSES)}
    assert {*made.estimators, *made.losses, *made.refused} == names
    assert {e["name"] for part in ADAPTED.values() for e in part} <= {*made.estimators, *made.losses}
    assert "sum_pi_squared" in made.refused["flowrl_otb"] and "gdpo alone" in made.refused["flowrl_gdpo"]
    assert made.refused["flowrl_gae"] == "gae needs value, which verl does not hand over"
    assert set(FOLLOWED) <= {name.removeprefix(PREFIX) for name in made.losses}


def test_registering_twice(core: Core) -> None:
    first = register({"grpo": {"ddof": 1}})
    assert register({"grpo": {"ddof": 1}}) == first
    with pytest.raises(UserError, match="once for each process"):
        register({"grpo": {"ddof": 0}})


@pytest.mark.parametrize(
    ("estimators", "losses", "message"),
    [
        ({"gppo": {}}, {}, "no estimator is called 'gppo'"),
        ({}, {"grpo": {}}, "no policy loss is called 'grpo'"),
        ({"gae": {}}, {}, "gae needs value"),
        ({"otb": {}}, {}, "optimal_token_baseline alone"),
        ({}, {"otr": {}}, "otr needs logits, token"),
        ({"grpo": {"ddoff": 1}}, {}, "did you mean 'ddof'"),
    ],
)
def test_what_cannot_be_registered(core: Core, estimators: Any, losses: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        register(estimators, losses)
    assert not core.estimators


def test_without_verl_and_with_an_old_one(core: Core, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(core, "get_policy_loss_fn", lambda name: lambda: None)
    with pytest.raises(UserError, match=r"verl 0\.9\.1 or newer"):
        register()
    monkeypatch.setitem(sys.modules, "verl.trainer.ppo.core_algos", None)
    with pytest.raises(UserError, match=r"pip install verl==0\.9\.1"):
        register()


def test_options_of_the_config_win_over_those_of_register() -> None:
    entry = {"case": "outcome_ragged", "gamma": 1.0, "block": {"options": {"singleton": "raw"}}}
    own = Estimator("grpo", {"singleton": "zero", "ddof": 1})
    given = batch_of("outcome_ragged")
    wanted = estimate("grpo", given, {"singleton": "raw", "ddof": 1}).over_steps(given["mask"]).advantage
    assert torch.equal(call(entry, own)[0], wanted)
    for block, message in (
        ({"option": {}}, "expected a block"),
        ({"options": {"x": 1}}, "no option 'x'"),
        (3, "got 3"),
    ):
        with pytest.raises(UserError, match=message):
            call({**entry, "block": block}, own)


def test_what_verl_configures_for_its_own_estimators() -> None:
    entry = {"case": "tokens_ragged", "block": {}}
    low, high = (call({**entry, "gamma": gamma}, Estimator("reinforce_pp"))[1] for gamma in (0.5, 1.0))
    assert (low - high).abs().max() > 0.1
    given = {"token_level_rewards": torch.ones(2, 3), "response_mask": torch.ones(2, 3), "index": np.array(["a", "a"])}
    with pytest.raises(UserError, match="flowrl_dr_grpo"):
        Estimator("grpo")(**given, config={"norm_adv_by_std_in_grpo": False})
    with pytest.raises(UserError, match=r"flowrl_remax: .*greedy_reward"):
        Estimator("remax")(**given)
    with pytest.raises(UserError, match=r"flowrl_rloo: .*'group'"):
        Estimator("rloo")(**{**given, "index": None})


def test_losses_follow_verls_fields_and_their_own_block_wins(core: Core) -> None:
    shape = (1, 2)
    given = {
        "old_log_prob": torch.zeros(shape), "log_prob": torch.full(shape, 0.5), "advantages": torch.ones(shape),
        "response_mask": torch.ones(shape),
    }  # fmt: skip
    fields = {"clip_ratio": 0.1, "clip_ratio_low": None, "clip_ratio_high": None}
    assert float(Loss("ppo")(**given, config=fields)[0]) == pytest.approx(-1.1)
    assert float(Loss("ppo")(**given, config={**fields, "clip_ratio_high": 0.3})[0]) == pytest.approx(-1.3)
    assert float(Loss("ppo", {"high": 0.4})(**given, config=fields)[0]) == pytest.approx(-1.4)
    block = {**fields, "policy_loss": {"flowrl": {"high": 0.05}}}
    assert float(Loss("ppo", {"high": 0.4})(**given, config=block)[0]) == pytest.approx(-1.05)
    assert float(Loss("ppo")(**given)[0]) == pytest.approx(-1.2)
    shared = {**fields, "global_batch_info": {"dp_size": 2, "batch_num_tokens": 8}}
    weights = torch.tensor([[1.0, 3.0]])
    total, metrics = Loss("ppo")(**given, config=shared, rollout_is_weights=weights)
    assert float(total) == pytest.approx(-1.1 * 4 * 2 / 8)
    assert metrics == pytest.approx({"actor/ppo_kl": -0.5, "actor/pg_clipfrac": 1.0, "actor/pg_clipfrac_low": 0.0})
    with pytest.raises(UserError, match="no option 'hihg'"):
        Loss("ppo")(**given, config={"policy_loss": {"flowrl": {"hihg": 1}}})


def test_a_reward_on_a_masked_step_moves_to_the_unmasked_one_before_it() -> None:
    rewards = torch.tensor([[1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0], [1.0, 2.0, 4.0, 8.0]])
    mask = torch.tensor([[1, 0, 1, 0], [0, 0, 1, 0], [0, 0, 0, 0]]).bool()
    assert place(rewards, mask).tolist() == [[3, 0, 12, 0], [0, 0, 15, 0], [0, 0, 0, 0]]
    made, _ = Estimator("reinforce_pp", {"whiten": False})(token_level_rewards=rewards, response_mask=mask)
    assert made.tolist() == [[15, 0, 12, 0], [0, 0, 15, 0], [0, 0, 0, 0]]


def test_group_ids_of_any_labels() -> None:
    assert group_ids(np.array(["b", "a", "b", "c"], dtype=object)).tolist() == [0, 1, 0, 2]
    assert group_ids(np.array(["x"])).tolist() == [0]
    assert group_ids(torch.tensor([7, 7, -3])).tolist() == [0, 0, 1]


def test_policy_loss_config_adds_a_block(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded:
        def __init__(self, **fields: Any) -> None:
            self.fields = fields

    module = ModuleType("verl.workers.config")
    module.PolicyLossConfig = Recorded  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "verl.workers.config", module)
    made = policy_loss_config(flowrl={"high": 0.3}, loss_mode="flowrl_gppo", dro_beta=0.1)
    assert made.flowrl == {"high": 0.3}
    assert made.fields["loss_mode"] == "flowrl_gppo" and made.fields["dro_beta"] == 0.1
    assert "rollout_correction" not in made.fields


def test_policy_loss_config_has_verls_fields_and_defaults() -> None:
    recorded = GOLDEN["signatures"]["PolicyLossConfig"]
    ours = inspect.signature(policy_loss_config).parameters
    assert set(re.findall(r"(\w+): ", recorded)) - {"_target_"} == set(ours) - {"flowrl"}
    for name, parameter in ours.items():
        if name not in ("flowrl", "rollout_correction"):
            stated = re.search(rf"\b{name}: [^=]* = ([^,)]*)", recorded)
            assert stated and stated[1] == repr(parameter.default), name


def test_importing_it_needs_torch_alone_and_registers_only_when_verl_is_told_to_load_it() -> None:
    program = (
        "import importlib, os, sys, flowrl.integrations.verl as ours; "
        "heavy = {'verl', 'transformers', 'diffusers', 'omegaconf', 'yaml', 'ray'} & set(sys.modules); "
        "print('heavy:', *heavy); "
        "os.environ['VERL_USE_EXTERNAL_MODULES'] = 'other,flowrl.integrations.verl'; "
        "importlib.reload(ours)"
    )
    root = Path(__file__).parents[2]
    environment = {k: v for k, v in os.environ.items() if k != "VERL_USE_EXTERNAL_MODULES"} | {"PYTHONPATH": str(root)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, check=False)
    assert done.stdout == "heavy:\n"
    assert "UserError: flowrl.integrations.verl needs verl" in done.stderr
