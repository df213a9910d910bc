"""Settings that are refused: wrong overrides, ranges, names and conflicts, each with its exact message."""

from __future__ import annotations

from pathlib import Path

import pytest

from flowrl import registry

from .refusals import FIXED, Case, expect_refusal, one_problem

CASES = [
    ("override_form", ["iterations"], "override 'iterations': expected key.sub=value, as in rollout.steps=10"),
    (
        "override_index",
        ["rewards.1.weight=2"],
        "rewards.1.weight (override): the list rewards has no '1'; use rewards.0",
    ),
    (
        "override_below_scalar",
        ["batch.groups.x=2"],
        "batch.groups.x (override): batch.groups is a single setting, 24 (a whole number), and has no 'x' inside",
    ),
    (
        "override_yaml",
        ["rewards=["],
        "override 'rewards=[': not valid YAML: expected the node content, but found '<stream end>'; mend the "
        "line, or put the text in quotes",
    ),
    ("reward_without_name", ["rewards=[{weight: 1.0}]"], "rewards.0.name (override): missing; give text"),
    (
        "no_reward",
        ["rewards=[]"],
        "rewards: none given; add one, as in rewards='[{name: compositional}]' (flowrl rewards list names them)",
    ),
    (
        "unknown_reward",
        ["rewards=[{name: compositionel}]"],
        "rewards.0.name: unknown reward 'compositionel'; did you mean compositional? Known are "
        f"{', '.join(registry.names('reward'))}, package.module:name or path/to/file.py:name",
    ),
    (
        "reward_argument",
        ["rewards.0.args.detecter=world/v1"],
        "rewards.0.args.detecter: unknown argument of compositional; did you mean detector?",
    ),
    (
        "reward_argument_type",
        ["rewards=[{name: jpeg, args: {quality: high}}]"],
        "rewards.0.args.quality: expected int, found 'high' (str)",
    ),
    (
        "reward_file_missing",
        ['rewards=[{name: "mine.py:score"}]'],
        "rewards.0.name: mine.py: no such file; check the path (it is relative to where you run)",
    ),
    (
        "reward_package_missing",
        ['rewards=[{name: "no_such_package.rewards:score"}]'],
        "rewards.0.name: no_such_package.rewards:score: no module named 'no_such_package'; install the package "
        "that has it",
    ),
    (
        "duplicate_reward",
        ["rewards=[{name: jpeg}, {name: jpeg, weight: 0.0}]"],
        "rewards: jpeg is given 2 times; keep one, or give each a label of its own",
    ),
    (
        "no_weight",
        ["rewards.0.weight=0"],
        "rewards: every weight is 0, so nothing is trained on; give one a weight such as 1.0",
    ),
    (
        "group_of_one",
        ["batch.group_size=1"],
        "batch.group_size: grpo compares the members of a group, and a group of 1 has none; use at least 2",
    ),
    ("no_groups", ["batch.groups=0"], "batch.groups: 0 is out of range; use at least 1"),
    (
        "window_outside",
        ["rollout.window.last=6"],
        "rollout.window.last: a window of 2 that starts at step 6 ends at step 7, past step 6, the last "
        "stochastic one of rollout.steps=8; use at most 5",
    ),
    (
        "window_too_large",
        ["rollout.window.size=8"],
        "rollout.window.size: 8 steps do not fit into the 7 stochastic steps of rollout.steps=8 (the last step "
        "is deterministic); use at most 7",
    ),
    (
        "window_backwards",
        ["rollout.window.first=3"],
        "rollout.window.last: 2 comes before rollout.window.first (3); use at least 3",
    ),
    (
        "window_full_first",
        ["rollout.window.kind=full", "rollout.window.first=2"],
        "rollout.window.first: 2 has no meaning for a full window, which starts at step 0; remove it, or use "
        "rollout.window.kind=random",
    ),
    (
        "one_step",
        ["rollout.steps=1"],
        "rollout.steps: 1 leaves no stochastic step, as the last one is deterministic; use at least 2",
    ),
    (
        "ode",
        ["rollout.kernel.name=ode"],
        "rollout.kernel.name: ode draws no noise, so no step has a log-probability to train; use precise, cps "
        "or flow_sde",
    ),
    (
        "unknown_kernel",
        ["rollout.kernel.name=flowsde"],
        "rollout.kernel.name: unknown kernel 'flowsde'; did you mean flow_sde? Known are cps, dance_sde, ddim, "
        "flow_sde, memoryless, ode, precise, precise_dance, wan_sde",
    ),
    (
        "no_noise",
        ["rollout.kernel.noise=0"],
        "rollout.kernel.noise: 0.0 leaves no step to train; use more than 0, such as 0.7",
    ),
    (
        "too_much_noise",
        ["rollout.kernel={name: cps, noise: 1.5}"],
        "rollout.kernel.noise: 1.5 is too large for cps; its eta is more than 0 and at most 1",
    ),
    ("negative_guidance", ["rollout.guidance=-1"], "rollout.guidance: -1.0 is out of range; use at least 0"),
    (
        "kl_without_form",
        ["objective.kl.weight=0.04"],
        "objective.kl.form: none, yet objective.kl.weight is 0.04; choose paper, no_dt or velocity, or set the "
        "weight to 0",
    ),
    (
        "kl_without_weight",
        ["objective.kl.form=velocity"],
        "objective.kl.weight: 0, yet objective.kl.form is velocity; give a weight such as 0.04, or set the "
        "form to none",
    ),
    ("clip_range", ["objective.clip_range=0"], "objective.clip_range: 0.0 is out of range; use more than 0"),
    (
        "updates",
        ["objective.updates=25"],
        "objective.updates: 25 updates cannot share out 24 groups, each taking at least one; use fewer updates "
        "or more batch.groups",
    ),
    ("warmup", ["optimizer.warmup=60"], "optimizer.warmup: 60 of the run's 60 optimizer steps; use fewer than 60"),
    ("beta", ["optimizer.betas=[0.9, 1]"], "optimizer.betas.1: 1.0 is out of range; use at least 0 and less than 1"),
    ("decay", ["ema.decay=1"], "ema.decay: 1.0 is out of range; use at least 0 and less than 1"),
    (
        "seed",
        ["seed=9223372036854775808"],
        "seed: 9223372036854775808 is out of range; use at most 9223372036854775807",
    ),
    (
        "keep",
        ["checkpoint.keep=1"],
        "checkpoint.keep: 1 is out of range; use at least 2, so that a damaged one has a predecessor",
    ),
    (
        "min_valid",
        ["failures.min_valid=17"],
        "failures.min_valid: 17 valid members are asked of groups of 16, so every group would be dropped; use "
        "at most 16",
    ),
    (
        "invalid_fraction",
        ["failures.max_invalid_fraction=2"],
        "failures.max_invalid_fraction: 2.0 is out of range; use 0 to 1",
    ),
    (
        "unknown_advantage",
        ["advantage.name=lite_pp"],
        "advantage.name: unknown advantage 'lite_pp'; did you mean lite_ppo? Known are "
        + ", ".join(sorted(registry.names("advantage"))),
    ),
    (
        "unknown_objective",
        ["objective.name=cowboy"],
        "objective.name: unknown objective 'cowboy'; use one of ac_flow, adjoint_matching, alignprop, awm, crd, ctrl, "
        "dance_grpo, ddpo, dgpo, dpo, dpo_online, dpok, draft, draft_lv, euphonium, flash_grpo, flow_dppo, flow_grpo, "
        "flow_grpo_fast, grpo_guard, mix_grpo, neighbor_grpo, nft, orw, pcpo, policy_flow, ram, refl, tempflow",
    ),
    (
        "unknown_adapter",
        ["model.adapter=sd"],
        "model.adapter: unknown pipeline 'sd'; did you mean sd3? Known are flux, flux_kontext, qwen_image, sd3, sdxl, "
        "stable_diffusion, wan, wan_image, package.module:name or path/to/file.py:name",
    ),
    (
        "model_path2",
        ["model.path=./mine"],
        "model.path: no folder './mine', and it is not a hub id (owner/name); give one of them, or embedded",
    ),
    (
        "model_size",
        ["model.height=512", "model.width=512"],
        "model.height, model.width: the embedded model makes pictures of 36 x 36, not 512 x 512; remove both keys",
    ),
    (
        "no_targets",
        ["model.lora.targets=[]"],
        "model.lora.targets: is empty, so nothing would be trained; use [attention, feed_forward] or model.train=full",
    ),
    ("run_dir_empty", ['run_dir=""'], "run_dir: is empty; name the folder of this run, such as runs/first"),
    (
        "unknown_world",
        ["data.prompts=world/v2"],
        "data.prompts: unknown world 'world/v2'; use world/v1, world/video1, or give a prompt file",
    ),
    (
        "world_format",
        ["data.format=geneval"],
        "data.format: geneval is for files, and data.prompts is world/v1; remove it",
    ),
    (
        "prompts_missing",
        ["data.prompts=prompts.txt"],
        "data.prompts: no file 'prompts.txt'; check the path (it is relative to where you run)",
    ),
    (
        "evaluation_prompts",
        ["evaluation.prompts=held_out.txt"],
        "evaluation.prompts: no file 'held_out.txt'; check the path (it is relative to where you run)",
    ),
]


@pytest.mark.parametrize(("name", "overrides", "line"), CASES, ids=[case[0] for case in CASES])
def test_refused(
    name: str,
    overrides: list[str],
    line: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    case = Case(name, ["train", "fixed.yaml", *overrides], one_problem(line), {"fixed.yaml": FIXED})
    expect_refusal(case, tmp_path, monkeypatch, capsys)
