"""The methods table: every algorithm that the library holds, with what backs it. ``flowrl methods`` prints it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from types import MappingProxyType

from flowrl import registry
from flowrl.advantage.catalogue import METHODS as ADVANTAGE_METHODS
from flowrl.advantage.method import Method
from flowrl.advantage.pipeline import inputs_of, options_of
from flowrl.config import engine
from flowrl.credit.catalogue import METHODS as PROCESS
from flowrl.errors import UserError
from flowrl.objectives import METHODS as OBJECTIVE_METHODS
from flowrl.objectives.actor_critic import METHODS as AC_FLOW
from flowrl.objectives.differentiable.methods import METHODS as DIRECT_METHODS
from flowrl.objectives.forward.methods import METHODS as FORWARD_METHODS


@dataclass(frozen=True)
class Entry:
    """One row of the table; the fields are the keys of ``flowrl methods --json``.

    key: unique within its kind. tier: 1 trained end to end, 2 formula or worked numbers, 3 reconstructed. paper: arXiv
    number or "". evidence: label (exact, golden, formula, identity, learned, reconstructed) to a test id
    (``path::test``) or a results file. config: the override that runs it, or "". refusal: why a training run on
    denoising steps cannot name it, or "". inputs: what the function takes ("?" behind an optional one); options: its
    keywords with their defaults. exempt: property that the whole registry is tested for -> why this entry is not.
    """

    key: str
    kind: str
    tier: int
    paper: str
    title: str
    evidence: Mapping[str, str]
    config: str
    refusal: str = ""
    inputs: tuple[str, ...] = ()
    options: Mapping[str, str] = field(default_factory=dict)
    exempt: Mapping[str, str] = field(default_factory=dict)


_KERNELS = "tests/dynamics/test_kernels.py::"
_BENCH = "tests/dynamics/test_gaussian_bench.py::"
_FAMILY = "tests/dynamics/test_kernel_family.py::"
_LAWS = "tests/dynamics/test_bench_laws.py::"


def _kernel(key: str, tier: int, paper: str, title: str, evidence: Mapping[str, str]) -> Entry:
    shared = {"exact": _BENCH + "test_factors_equal_the_closed_recursion"}
    config = "" if key == "ode" else f"rollout.kernel.name={key}"  # the ode kernel draws pictures and is never trained
    return Entry(key, "kernel", tier, paper, title, {**shared, **evidence}, config)


KERNELS = (
    _kernel(
        "ode",
        2,
        "2209.03003",
        "Euler steps of the probability-flow ODE, without noise",
        {"identity": _KERNELS + "test_full_mixing_equals_euler_to_double_precision"},
    ),
    _kernel(
        "flow_sde",
        2,
        "2505.05470",
        "Flow-GRPO's SDE by Euler-Maruyama, g = a sqrt(t / (1 - t))",
        {
            "formula": _KERNELS + "test_euler_maruyama_equals_its_velocity_and_score_forms",
            "identity": _KERNELS + "test_without_noise_euler_maruyama_is_the_ode",
        },
    ),
    _kernel(
        "dance_sde",
        2,
        "2505.07818",
        "DanceGRPO's SDE by Euler-Maruyama, constant g",
        {
            "formula": _KERNELS + "test_euler_maruyama_equals_its_velocity_and_score_forms",
            "identity": _KERNELS + "test_without_noise_euler_maruyama_is_the_ode",
        },
    ),
    _kernel(
        "cps",
        2,
        "2509.05952",
        "coefficients-preserving sampling, rho = cos(eta pi / 2)",
        {
            "formula": _KERNELS + "test_cps_keeps_the_noise_of_the_next_time_whatever_eta",
            "identity": _KERNELS + "test_without_noise_every_mixing_kernel_is_the_euler_step",
            "learned": "docs/results/credit/rest.json",
        },
    ),
    _kernel(
        "precise",
        1,
        "2605.23522",
        "PRECISE: the SDE solved exactly over a step with x0_hat held still",
        {
            "formula": _KERNELS + "test_precise_solves_the_frozen_equation",
            "identity": _KERNELS + "test_full_ddim_is_memoryless_precise",
        },
    ),
    _kernel(
        "precise_dance",
        2,
        "2605.23522",
        "PRECISE with DanceGRPO's constant g",
        {
            "formula": _FAMILY + "test_precise_dance_solves_the_frozen_equation",
            "identity": _FAMILY + "test_euler_maruyama_is_the_first_order_part_of_the_exact_step",
        },
    ),
    _kernel(
        "memoryless",
        2,
        "2409.08861",
        "memoryless SDE, g^2 = 2t / (1 - t), solved exactly over a step",
        {
            "formula": _LAWS + "test_steps_of_a_memoryless_chain_add_up_to_the_divergence_of_the_data",
            "identity": _FAMILY + "test_memoryless_is_full_ddim_and_precise_at_root_two",
        },
    ),
    _kernel(
        "wan_sde",
        2,
        "2505.05470",
        "the SDE of Flow-GRPO's public Wan script, g = t_1 t",
        {"formula": _FAMILY + "test_wan_form_equals_its_velocity_form"},
    ),
    Entry(
        key="ddim",
        kind="kernel",
        tier=2,
        paper="2010.02502",
        title="DDIM with eta, on any path",
        evidence={
            "golden": _KERNELS + "test_ddim_equals_diffusers",
            "identity": _KERNELS + "test_full_ddim_is_memoryless_precise",
        },
        config="rollout.kernel.name=ddim",
    ),
)


_GUIDE = "tests/dynamics/test_reward_guidance.py::"
_GUIDED = "tests/rollout/test_guided.py::"
_SEARCH = "tests/rollout/test_search.py::"
_BY_SPSA = """'process=[{"name":"x0"}]' rollout.guide.reward=x0 rollout.guide.gradient=spsa rollout.guide.first=1"""
GUIDANCE = (
    Entry(
        key="langevin",
        kind="guidance",
        tier=2,
        paper="2602.04928",
        title="Euphonium's guided SDE: the score moves by the gradient of a process reward",
        evidence={
            "exact": _GUIDED + "test_every_sample_moves_as_the_affine_recursion_says",
            "formula": _GUIDE + "test_euler_maruyama_moves_by_half_g_squared_dt",
            "identity": "tests/training/test_euphonium.py::test_zero_guidance_is_flow_grpo_and_dance_grpo_bit_for_bit",
        },
        config=_BY_SPSA,
    ),
    Entry(
        key="exact_tilt",
        kind="guidance",
        tier=3,
        paper="2602.04928",
        title="guidance that moves the velocity too: exact where the reward is the value of the outcome",
        evidence={
            "exact": "tests/training/test_general_tilt.py::"
            "test_exact_tilt_guidance_by_the_value_reaches_the_tilted_law",
            "formula": _GUIDE + "test_slope_and_shift_agree_for_exact_tilt",
            "reconstructed": _GUIDE + "test_exact_tilt_of_a_quadratic_reward_reaches_its_gaussian",
        },
        config=_BY_SPSA + " rollout.guide.mode=exact_tilt",
    ),
    Entry(
        key="langevin_weighted",
        kind="guidance",
        tier=3,
        paper="2602.04928",
        title="langevin with Feynman-Kac weights for what it leaves",
        evidence={
            "exact": _GUIDED + "test_weighted_langevin_samples_stand_for_the_tilted_law",
            "reconstructed": "tests/training/test_euphonium.py::test_weights_count_members",
        },
        config=_BY_SPSA + " rollout.guide.mode=langevin_weighted objective.name=euphonium euphonium.process=0.0",
    ),
    Entry(
        key="best_of",
        kind="search",
        tier=2,
        paper="",
        title="best of n start noises, by an outcome or a process reward",
        evidence={
            "exact": _SEARCH + "test_best_of_n_takes_the_greatest_and_raises_the_mean_by_the_order_statistic",
            "identity": _SEARCH + "test_best_of_one_is_plain_sampling_bit_for_bit",
        },
        config="search.kind=best_of",
    ),
    Entry(
        key="beam",
        kind="search",
        tier=2,
        paper="",
        title="beam search over denoising states",
        evidence={
            "formula": _SEARCH + "test_a_beam_keeps_the_best_children_at_every_step",
            "identity": _SEARCH + "test_a_beam_without_branching_is_best_of_n",
        },
        config="search.kind=beam",
    ),
    Entry(
        key="particles",
        kind="search",
        tier=2,
        paper="",
        title="particles with weights exp(R / lambda), systematic resampling by effective sample size",
        evidence={
            "exact": _SEARCH + "test_particles_with_exact_weights_reach_the_tilted_law",
            "formula": _SEARCH + "test_systematic_resampling_takes_each_index_by_its_share",
        },
        config="search.kind=particles",
    ),
)


def entries() -> list[Entry]:
    """List every method: kernels, the engine's, objectives, then those of other packages (group ``flowrl.methods``).

    An entry point of that group names a `Method`, as in the engine's catalogue. Raises UserError where two entries of a
    kind share a key or an entry point is something else.
    """
    rows = [
        *KERNELS,
        *GUIDANCE,
        *(_entry(method) for method in (*ADVANTAGE_METHODS, *OBJECTIVE_METHODS, *FORWARD_METHODS, *DIRECT_METHODS)),
        *(_entry(method) for method in (*AC_FLOW, *PROCESS)),
    ]
    for name, target in registry.targets("method").items():
        method = registry.resolve("method", name)
        if not isinstance(method, Method):
            raise UserError(
                f"flowrl.methods entry point {name!r} ({target}): expected a Method, found {type(method).__name__}"
            )
        rows.append(_entry(method))
    seen: set[tuple[str, str]] = set()
    for row in rows:
        if (row.kind, row.key) in seen:
            raise UserError(f"the {row.kind} {row.key!r} is listed twice; rename one of the two methods")
        seen.add((row.kind, row.key))
    return rows


def methods_json() -> str:
    """Write the table as one JSON array."""
    return json.dumps([asdict(row) for row in entries()], indent=2, ensure_ascii=False)


def methods_text() -> str:
    """Write the table for a terminal: one row a method, its evidence as labels; then what is exempt from what, and why."""
    found = entries()
    rows = [("kind", "key", "tier", "paper", "evidence", "config")]
    rows += [(r.kind, r.key, str(r.tier), r.paper or "-", ",".join(r.evidence), r.config or "-") for r in found]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    exempt = [f"  {r.key}: {name}: {reason}" for r in found for name, reason in r.exempt.items()]
    return "\n".join([*lines, "", "exempt from a property that is tested over the whole registry:", *exempt])


def methods_markdown(kinds: Sequence[str]) -> str:
    """Write the entries of ``kinds`` as a Markdown table: what each needs, and what a training run says to it."""
    lines = ["| key | what | paper | tier | needs | in a training run |", "|---|---|---|---|---|---|"]
    for r in entries():
        if r.kind in kinds:
            needs = ", ".join(f"`{name}`" for name in r.inputs if not name.endswith("?"))
            run = f"`{r.config}`" if r.config else r.refusal or "called by hand"
            paper = f"[{r.paper}](https://arxiv.org/abs/{r.paper})" if r.paper else "-"
            lines.append(f"| `{r.key}` | {r.title} | {paper} | {r.tier} | {needs} | {run} |")
    return "\n".join(lines)


# What a method needs of a run beside its own name, for the default eight steps and groups of sixteen: kind, key, overrides.
_RUNS = """
objective dance_grpo objective.name=dance_grpo rollout.kernel.name=dance_sde rollout.kernel.noise=0.3 {full} {part}
objective flow_grpo_fast objective.name=flow_grpo_fast rollout.window.kind=random
objective mix_grpo objective.name=mix_grpo rollout.window.kind=sliding
objective tempflow objective.name=tempflow advantage.name=seed_grpo rollout.seeds=4 rollout.window.size=1
objective flash_grpo objective.name=flash_grpo rollout.window.kind=iso_temporal rollout.window.size=1
objective neighbor_grpo objective.name=neighbor_grpo rollout.share_prefix=false
objective nft objective.name=nft forward.old_rate=0.001 {plain}
objective awm objective.name=awm {leash} {plain}
objective orw objective.name=orw objective.kl.form=velocity objective.kl.weight=1.0 {plain}
objective ram objective.name=ram {plain}
objective ac_flow objective.name=ac_flow {plain}
objective dpo_online objective.name=dpo_online {plain}
objective dgpo objective.name=dgpo {plain}
objective crd objective.name=crd objective.kl.form=velocity objective.kl.weight=1.0 {plain}
objective refl objective.name=refl direct.last=3 direct.scale=1.0 {pixels}
objective draft objective.name=draft direct.last=2 {pixels}
objective draft_lv objective.name=draft_lv {pixels}
objective alignprop objective.name=alignprop direct.last=0 direct.least=1 {pixels}
objective adjoint_matching objective.name=adjoint_matching direct.temperature=0.01 {pixels} {forgetting}
objective ctrl objective.name=ctrl direct.last=0 direct.strength=10.0 {colours} {memoryless}
objective euphonium objective.name=euphonium credit.values=process {spsa}
objective dpok objective.name=dpok objective.kl.form=paper objective.kl.weight=0.01
estimator vgpo advantage.name=vgpo credit.values=x0 advantage.options.shift=0.1
estimator step_credit advantage.name=step_credit credit.values=x0
estimator dense_grpo advantage.name=dense_grpo credit.values=ode
estimator stepwise advantage.name=stepwise credit.values=x0
estimator tp_grpo advantage.name=tp_grpo credit.values=ode
estimator seed_grpo advantage.name=seed_grpo rollout.seeds=4
estimator gae advantage.name=gae credit.values=critic
estimator t_ppo advantage.name=t_ppo credit.values=critic
estimator pdppo advantage.name=pdppo credit.values=critic
estimator poise advantage.name=poise credit.values=critic
estimator open_reasoner_zero advantage.name=open_reasoner_zero credit.values=x0
estimator ma_rlhf advantage.name=ma_rlhf credit.values=x0
estimator mt_ppo advantage.name=mt_ppo credit.values=x0
estimator rubricem advantage.name=rubricem credit.values=x0
estimator prorag advantage.name=prorag credit.values=x0
estimator spo_chain advantage.name=spo_chain credit.values=ode
estimator spo_tree advantage.name=spo_tree {full} rollout.splits=[0,2,4,6]
estimator gigpo advantage.name=gigpo {full} rollout.splits=[0,2,4,6]
estimator branch_grpo advantage.name=branch_grpo {full} rollout.splits=[0,2,4,6]
estimator tree_grpo advantage.name=tree_grpo {full} rollout.splits=[0,2,4,6]
selection best_worst_k batch.selection.name=best_worst
selection d3s batch.selection.name=d3s
selection knapsack batch.allocation.name=knapsack
selection vade batch.allocation.name=vade
""".format(
    full="rollout.window.kind=full rollout.window.first=0",
    part="rollout.window.fraction=0.6",
    spsa=_BY_SPSA,
    pixels="""'rewards=[{"name":pixels}]'""",
    colours="""'rewards=[{"name":colour_class}]' 'condition.attributes={"colour":3}'""",
    memoryless="rollout.kernel.name=memoryless",
    forgetting="rollout.kernel.name=flow_sde rollout.kernel.noise=1.4142135623730951",
    leash="objective.kl.form=velocity objective.kl.weight=1.0 forward.anchor=old forward.old_rate=0.001 "
    "forward.old_limit=0.3 forward.sampler=live",
    plain="rollout.kernel.name=ode rollout.window.kind=full rollout.window.first=0 rollout.share_prefix=false",
)
RUNS: Mapping[tuple[str, str], str] = MappingProxyType(
    {(kind, key): run for kind, key, run in (line.split(" ", 2) for line in _RUNS.strip().splitlines())}
)

_CONFIG = {
    "estimator": ("advantage.name", engine.SUPPLIED | engine.VALUES),
    "policy_loss": ("objective.loss", engine.LOSS_INPUTS),
}


def _entry(method: Method) -> Entry:
    config, refusal = method.config, ""
    inputs: tuple[str, ...] = ()
    options: dict[str, str] = {}
    if method.call is not None:
        inputs = tuple(name if required else f"{name}?" for name, required in inputs_of(method.call).items())
        options = {name: repr(value) for name, value in options_of(method.call).items()}
        if method.kind in _CONFIG:
            key, supplied = _CONFIG[method.kind]
            refusal = engine.refused(method, method.call, supplied)
            config = config or ("" if refusal else f"{key}={method.key}")
        elif method.tokens_only:
            refusal = method.tokens_only
    config = RUNS.get((method.kind, method.key), config)
    return Entry(
        method.key, method.kind, method.tier, method.paper_id, method.title, dict(method.evidence), config,
        refusal, inputs, options, dict(method.exempt),
    )  # fmt: skip
