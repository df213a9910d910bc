"""The catalogue says what exists: every key has code, every piece of evidence has a test."""

from __future__ import annotations

import ast
import functools
from pathlib import Path

import pytest

from flowrl import advantage
from flowrl.advantage import AGGREGATIONS, ESTIMATORS, METHODS, POLICY_LOSSES, Method
from flowrl.advantage.pipeline import inputs_of
from flowrl.objectives import FORMS
from flowrl.objectives import METHODS as OBJECTIVE_METHODS

ROOT = Path(__file__).parents[2]
ENTRIES = METHODS + OBJECTIVE_METHODS


@functools.cache
def _test_functions(path: Path) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")}


@pytest.mark.parametrize("method", ENTRIES, ids=[f"{m.kind}-{m.key}" for m in ENTRIES])
def test_evidence_exists(method: Method) -> None:
    for label, test_id in method.evidence.items():
        file, _, name = test_id.partition("::")
        if not name:  # a recorded result
            assert label == "learned" and (ROOT / file).is_file(), f"{method.key}: {label} points to {file}"
            continue
        assert name in _test_functions(ROOT / file), f"{method.key}: {label} points to {test_id}, which does not exist"


def test_entries_are_unique_and_complete() -> None:
    names = [(m.kind, m.key) for m in ENTRIES]
    assert len(names) == len(set(names))

    def keys(kind: str) -> set[str]:
        return {m.key for m in ENTRIES if m.kind == kind}

    assert keys("estimator") == set(ESTIMATORS)
    assert keys("aggregation") == set(AGGREGATIONS)
    assert {m.key for m in OBJECTIVE_METHODS} == set(FORMS)
    assert keys("policy_loss") == set(POLICY_LOSSES)


@pytest.mark.parametrize("method", ENTRIES, ids=[f"{m.kind}-{m.key}" for m in ENTRIES])
def test_labels_are_honest(method: Method) -> None:
    """Trained end to end means a recorded curve; a source that could not be read is labelled so."""
    assert (method.tier == 1) <= ("learned" in method.evidence), "tier 1 without a recorded run"
    assert (method.tier == 3) == ("reconstructed" in method.evidence)


def test_every_input_has_a_meaning() -> None:
    used = {name for m in METHODS if m.call is not None for name in inputs_of(m.call)}
    assert used <= set(advantage.INPUTS), used - set(advantage.INPUTS)


# Section B of the field's catalogue: what the engine owes, by key. A second name stands where the entry is split.
OWED = """
open_reasoner_zero spo_chain spo_tree ktae grpo_ma mt_grpo mt_ppo gigpo hae a2tgpo empg capo_credit grpo_vps ma_rlhf r3l gtpo
oprl prl prorag rubricem intervention brpo t_ppo pdppo poise v0 lare calm graph_grpo eapo full_rollout
grpo dr_grpo rloo reinforce_pp reinforce_pp_baseline lite_ppo gdpo bnpo copo dgpo_difficulty adora opo otb oblr_po
spo_single_stream pass_at_k gpg remax
ppo dual_clip dapo gspo cispo sapo vespo luspo gmpo dppo dro clip_cov kl_cov bapo gppo dcpo_dynamic dcpo_smoothed dhpo r2vpo
rapo capo_curvature copg real upge hpt bgpo srpo_routed scope otr dcpo_distribution
k1 k2 k3 adaptive_kl adaptive_entropy offpolicy_mask rpo hypo dr_po likelihood_indicators
d3s pf_ppo knapsack vade mmr1_vas sec clpo scaf_grpo ghpo prefix_rl medloc hapo otc rl_struct duration
pcgrad gcond n_pg_igt harpg bayesian_pg scaled_minibatches implicit_q polar_ranking
""".split()


def test_nothing_owed_is_missing() -> None:
    assert set(OWED) <= {m.key for m in METHODS}


def test_public_names_exist() -> None:
    assert len(set(advantage.__all__)) == len(advantage.__all__)
    assert all(hasattr(advantage, name) for name in advantage.__all__)


@pytest.mark.parametrize(
    ("kind", "tier", "evidence"),
    [("magic", 1, {"exact": "a"}), ("kl", 4, {"exact": "a"}), ("kl", 1, {"proof": "a"}), ("kl", 1, {})],
)
def test_an_entry_checks_itself(kind: str, tier: int, evidence: dict[str, str]) -> None:
    with pytest.raises(ValueError, match="method x: "):
        Method(key="x", kind=kind, paper_id="", title="", tier=tier, evidence=evidence)


def test_evidence_cannot_be_changed() -> None:
    with pytest.raises(TypeError):
        METHODS[0].evidence["exact"] = "elsewhere"  # type: ignore[index]
