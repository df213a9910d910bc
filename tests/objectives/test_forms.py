"""Named objectives: the parts that each is made of, what it needs, and its entry in the methods table."""

from __future__ import annotations

from dataclasses import FrozenInstanceError, replace

import pytest

from flowrl.advantage import POLICY_LOSSES
from flowrl.objectives import METHODS
from flowrl.objectives.forms import FORMS, NEEDS, Form
from flowrl.objectives.surrogates import SURROGATES

# name -> (ratio, step weight, loss, needs)
TABLE = {
    "flow_grpo": ("plain", "none", "ppo", set()),
    "flow_grpo_fast": ("plain", "none", "ppo", set()),
    "dance_grpo": ("plain", "none", "ppo", set()),
    "mix_grpo": ("plain", "none", "ppo", set()),
    "grpo_guard": ("normalised", "inverse_slope", "ppo", {"old_value"}),
    "tempflow": ("plain", "std", "ppo", set()),
    "flash_grpo": ("plain", "std_over_slope", "ppo", set()),
    "flow_dppo": ("plain", "none", "flow_dppo", {"old_value", "divergence"}),
    "pcpo": ("plain", "dt_std_over_slope", "pcpo", set()),
    "policy_flow": ("policy_flow", "none", "ppo", {"old_value"}),
    "neighbor_grpo": ("neighbours", "none", "ppo", {"neighbours"}),
    "euphonium": ("plain", "none", "ppo", set()),
    "ddpo": ("plain", "none", "ppo", set()),
    "dpok": ("plain", "none", "dpok", {"reference"}),
}


def test_each_form_has_the_parts_of_its_method() -> None:
    found = {name: (form.ratio, form.step_weight, form.loss, set(form.needs)) for name, form in FORMS.items()}
    assert found == TABLE
    assert {name for name, form in FORMS.items() if form.mean_one} == {"tempflow", "flash_grpo", "pcpo"}
    assert FORMS["flow_dppo"].loss_options == {"threshold": 1e-5}
    for form in FORMS.values():
        assert form.needs <= set(NEEDS) and form.loss in {*POLICY_LOSSES, *SURROGATES}


def test_methods_that_differ_in_the_rollout_alone_share_flow_grpo() -> None:
    for name in ("flow_grpo_fast", "dance_grpo", "mix_grpo", "ddpo"):
        assert FORMS[name] == FORMS["flow_grpo"]


def test_an_override_changes_what_is_needed() -> None:
    guarded = replace(FORMS["flow_grpo"], ratio="normalised", step_weight="inverse_slope")
    assert guarded == FORMS["grpo_guard"] and guarded.needs == {"old_value"}
    assert replace(FORMS["grpo_guard"], ratio="plain").needs == set()
    assert replace(FORMS["dpok"], loss="flow_dppo").needs == {"old_value", "divergence", "reference"}
    assert [FORMS[n].transforms for n in ("flow_grpo", "grpo_guard", "policy_flow", "neighbor_grpo")] == [
        "plain",
        "normalised",
        None,
        None,
    ]


def test_a_form_cannot_be_changed_or_made_of_unknown_parts() -> None:
    with pytest.raises(FrozenInstanceError):
        FORMS["flow_grpo"].ratio = "normalised"  # type: ignore[misc]
    with pytest.raises(TypeError):
        FORMS["flow_dppo"].loss_options["threshold"] = 1.0  # type: ignore[index]
    with pytest.raises(ValueError, match="ratio: expected one of plain, debiased"):
        Form(ratio="clipped")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="step_weight: expected one of none, std"):
        Form(step_weight="dt2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="loss: expected one of bapo"):
        Form(loss="hinge")
    with pytest.raises(ValueError, match="step_weight: 'std' weighs by noise"):
        Form(ratio="neighbours", step_weight="std")
    assert Form(ratio="neighbours", step_weight="dt").mean_one


def test_every_form_is_in_the_methods_table() -> None:
    listed = {method.key: method for method in METHODS if method.kind == "objective"}
    assert set(listed) == set(FORMS)
    guessed = {key for key, method in listed.items() if "reconstructed" in method.evidence}
    assert guessed == {key for key, method in listed.items() if method.tier == 3}
    assert guessed == {"tempflow", "pcpo", "policy_flow", "neighbor_grpo", "euphonium"}
