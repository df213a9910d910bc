"""Every setting of a run: frozen dataclasses, with units and ranges. Loading and checks live in load.py and validate.py.

Derived numbers are properties and are never written back.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal

from flowrl.config.condition import Condition
from flowrl.config.direct import Direct
from flowrl.config.distributed import Distributed
from flowrl.config.evaluation import Measures
from flowrl.config.forward import Forward
from flowrl.config.guide import Euphonium, Guide, Search
from flowrl.config.model import Model
from flowrl.config.neighbours import Neighbours
from flowrl.config.process import ActorCritic, Critic, ProcessEntry
from flowrl.config.tracking import Tracking


@dataclass(frozen=True, kw_only=True)
class Data:
    """prompts: "world/v1" or "world/video1" for an embedded world's training sentences, or a file.

    format: "auto" takes world/... as the world and .txt as lines and .jsonl as jsonl; geneval and ocr are named.
    tags: how often each tag of the prompts is drawn, as {tag: weight}, uniformly within a tag; a tag left out is not drawn.
    Empty: the world's own weights, or one pass over the file after another.
    preferences: a jsonl file of prompt, chosen and rejected (pictures beside it), for objective.name=dpo.
    """

    prompts: str = "world/v1"
    format: Literal["auto", "lines", "jsonl", "geneval", "ocr"] = "auto"
    tags: dict[str, float] = field(default_factory=dict)
    preferences: str = ""


@dataclass(frozen=True, kw_only=True)
class Allocation:
    """How many members each group gets, decided before the rollout from how often its prompt succeeded so far.

    name: fixed (``group_size`` each) | knapsack (Knapsack RL: more members where success is likely but not sure, within
    [low, high], the same total). vade: prompts are drawn by Thompson sampling of their success rates (VADE), at fixed size.
    success: score from which a sample counts as a success. memory: how much of a prompt's record survives a visit.
    """

    name: Literal["fixed", "knapsack", "vade"] = "fixed"
    low: int = 2
    high: int = 128
    success: float = 0.5
    memory: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Selection:
    """Which members of a group are trained, chosen after the scores are known.

    name: all | best_worst (half of ``number`` the best, half the worst, DanceGRPO) | d3s (the ``number`` members whose
    rewards vary most). Advantages are those of the whole group.
    """

    name: Literal["all", "best_worst", "d3s"] = "all"
    number: int = 8


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The global batch of one iteration, in groups (one prompt each) and members (samples of that prompt).

    micro_batch: samples a network call in rollout, decode and update; an execution detail.
    """

    groups: int = 24
    group_size: int = 16
    micro_batch: int = 64
    allocation: Allocation = field(default_factory=Allocation)
    selection: Selection = field(default_factory=Selection)

    @property
    def samples(self) -> int:
        return self.groups * self.group_size


@dataclass(frozen=True, kw_only=True)
class Kernel:
    """Step kernel of the stochastic steps, by its name in flowrl.dynamics.

    noise: a for flow_sde and precise, eta for the others; memoryless and wan_sde fix their own.
    """

    name: str = "precise"
    noise: float = 0.9


@dataclass(frozen=True, kw_only=True)
class Window:
    """Which steps are stochastic (and trained): all of them, or ``size`` steps whose start is random or slides.

    kind: full | random | sliding | iso_temporal (random, each group its own; all its members share it). first, last: range
    of the start step, both inclusive. every: iterations before a sliding window moves by one step (it returns to ``first``
    after ``last``); stride: by how much it moves. strategy: of a sliding window, progressive | random | decaying (down to
    ``least`` iterations a place) | exponential (``rate``, ``threshold``). fraction: how much of the stochastic steps is
    trained, a keyed random part (DanceGRPO: 0.6). See flowrl.dynamics.windows.
    """

    kind: Literal["full", "random", "sliding", "iso_temporal"] = "random"
    size: int = 2
    first: int = 0
    last: int = 2
    every: int = 5
    stride: int = 1
    strategy: Literal["progressive", "random", "decaying", "exponential"] = "progressive"
    least: int = 1
    rate: float = 0.1
    threshold: int = 13
    fraction: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Rollout:
    """How trajectories are drawn. guidance 1 means no guidance; guidance_low: the scale for little noise, for models with an
    expert of its own there (Wan 2.2); cfg_gradient: which branches the update differentiates.

    share_prefix: the members of a group share start noise and latents until the first stochastic step, and what they share
    is computed once. seeds: start noises a group, each with an equal part of its members. splits: steps at which every
    latent has ``children`` instead (a tree; children ** splits, times the seeds, is the group size).
    solver: of the deterministic steps after the window, euler | heun | dpmpp_2m. storage_dtype: of the latents kept for the
    update.
    """

    steps: int = 8
    kernel: Kernel = field(default_factory=Kernel)
    window: Window = field(default_factory=Window)
    share_prefix: bool = True
    seeds: int = 1
    splits: tuple[int, ...] = ()
    children: int = 2
    solver: Literal["euler", "heun", "dpmpp_2m"] = "euler"
    guidance: float = 1.0
    guidance_low: float | None = None
    cfg_gradient: Literal["full", "conditional"] = "full"
    storage_dtype: Literal["fp32", "bf16"] = "fp32"
    guide: Guide = field(default_factory=Guide)


@dataclass(frozen=True, kw_only=True)
class Advantage:
    """How scores become advantages; see flowrl.advantage. options: the estimator's own, such as {ddof: 1, eps: 1e-6}.

    whiten: standardise afterwards over the batch, counting every trained step or every sample once. clip: advantages
    are clipped to +- this; 0 is off.
    """

    name: str = "grpo"
    options: dict[str, Any] = field(default_factory=dict)
    whiten: Literal["none", "step", "sample"] = "none"
    clip: float = 5.0


@dataclass(frozen=True, kw_only=True)
class Credit:
    """Values of intermediate latents, for estimators that take them (vgpo, dense_grpo, stepwise, tp_grpo).

    values: none | x0 (rewards of the one-step clean estimate, no extra network calls) | ode (rewards of a deterministic
    run to the end, in ode_steps steps; 0: all that are left) | process (the entries of ``process``) | critic (a network
    trained on the run's own samples). stride: every how many trained steps a value is taken; the steps between carry the
    next one.
    """

    values: Literal["none", "x0", "ode", "process", "critic"] = "none"
    ode_steps: int = 0
    stride: int = 1


@dataclass(frozen=True, kw_only=True)
class Kl:
    """Penalty towards the reference policy.

    form: none | paper (||mean - mean_ref||^2 / (2 std^2)) | no_dt (paper with std^2 over its step length taken out) |
    velocity (||v - v_ref||^2), each a mean over latent elements. weight: its factor in the loss.
    """

    form: Literal["none", "paper", "no_dt", "velocity"] = "none"
    weight: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Objective:
    """The policy loss. clip_range is in units of the ratio under ``log_prob_reduction``.

    name: one of flowrl.objectives.forms: which ratio, weight of each step and loss. ratio, step_weight, loss: "" takes the
    named objective's own. loss: a policy loss of flowrl.advantage or flowrl.objectives; clip_range is that of ppo, the
    others take bounds from loss_options.
    updates: optimizer steps a pass, each on its share of the groups; passes: how often a rollout is trained on.
    skip_silent: leave out groups whose advantages are all zero (the same gradient, fewer calls); only without a KL term.
    """

    name: str = "flow_grpo"
    ratio: Literal["", "plain", "debiased", "normalised"] = ""
    step_weight: Literal[
        "", "none", "std", "inverse_dt", "inverse_slope", "std_over_slope", "dt", "std_over_dt", "dt_std_over_slope"
    ] = ""
    loss: str = ""
    loss_options: dict[str, Any] = field(default_factory=dict)
    clip_range: float = 0.2
    log_prob_reduction: Literal["sum", "mean", "sqrt"] = "sqrt"
    updates: int = 1
    passes: int = 1
    skip_silent: bool = True
    kl: Kl = field(default_factory=Kl)


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """AdamW. schedule: constant, or linear to zero over the run; warmup in optimizer steps."""

    lr: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 1e-4
    schedule: Literal["constant", "linear"] = "constant"
    warmup: int = 0
    max_grad_norm: float = 1.0


@dataclass(frozen=True, kw_only=True)
class Ema:
    """Average of the trained weights, used by evaluation and export. decay 0 turns it off; every: in optimizer steps."""

    decay: float = 0.9
    every: int = 1


@dataclass(frozen=True, kw_only=True)
class Executor:
    """Where a reward runs, and how long it may take: see flowrl.scoring.executors.settings for every field.

    kind: thread (beside the rollout) | inline | process (a fresh one of this Python) | worker (of the interpreter
    ``python``) | http (a service at ``url``). workers: calls at a time. timeout_s, total_s, breaker, breaker_s: null takes
    those of ``failures``.
    """

    kind: Literal["thread", "inline", "process", "worker", "http"] = "thread"
    timeout_s: float | None = None
    total_s: float | None = None
    start_s: float = 300.0
    workers: int = 1
    queue: int = 64
    retries: int = 2
    backoff_s: float = 0.5
    breaker: int | None = None
    breaker_s: float | None = None
    python: str = ""
    url: str = ""
    token_env: str = ""
    allow: tuple[str, ...] = ()
    encoding: Literal["safetensors", "png"] = "safetensors"
    body_bytes: int = 16 << 20


@dataclass(frozen=True, kw_only=True)
class RewardEntry:
    """One reward: a registry key, ``module:attr`` or ``path.py:attr``; ``key/26`` divides its scores by 26, and
    ``key/preset`` scales them as the reward's preset of that name does.

    args: keyword arguments of the reward, checked against its signature. label: its name in metrics ("": made of name).
    role: train | monitor (scored with every batch, never trained on, cannot stop a run; so is weight 0) | gold (scored at
    evaluations alone, its weight being its part of the gold score). shaping: steps from score to what is trained on, in
    order: {affine: [scale, offset]}, {clip: [low, high]}, {sigmoid: [centre, width]}, {rank: {}} (place in the group, 0 to
    1), {gate: {by: label, at_least: 0.5, otherwise: 0}} (see flowrl.scoring.shaping). opponents: of a reward that compares
    pairs, how many other members each one meets; 0: all. offload: keep a reward's networks in main memory, and on their
    device only while there is something to score.
    """

    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    role: Literal["train", "gold", "monitor"] = "train"
    shaping: tuple[dict[str, Any], ...] = ()
    opponents: int = 0
    offload: bool = False
    executor: Executor = field(default_factory=Executor)

    @property
    def duty(self) -> Literal["train", "gold", "monitor"]:
        """The role in effect: a weight of 0 leaves nothing to train on."""
        return "monitor" if self.role == "train" and self.weight == 0 else self.role


@dataclass(frozen=True, kw_only=True)
class Failures:
    """When failed rewards drop a group and when they stop the run.

    min_valid: members with a score that a group needs. max_invalid_fraction: of an iteration's samples, beyond which the
    run stops with the first error. timeout_s, total_s: seconds that one call of a reward may take, and all of its calls of
    an iteration; null: no limit. breaker: failed calls in a row after which a reward is left alone for breaker_s seconds;
    0: never. allow_shared_backbone: take a gold reward that stands on the same network as a trained one.
    """

    min_valid: int = 2
    max_invalid_fraction: float = 0.1
    timeout_s: float | None = 120.0
    total_s: float | None = 600.0
    breaker: int = 5
    breaker_s: float = 30.0
    allow_shared_backbone: bool = False


@dataclass(frozen=True, kw_only=True)
class Alarm:
    """Watches evaluations during training for a score that rises while a gold reward or the diversity falls.

    patience: evaluations in a row that must say so before it warns and tags the checkpoint; 0: never. level: coverage of
    the intervals, bootstrapped over prompts. diversity_fall: by which part the diversity must have fallen at least, 0 to 1.
    """

    patience: int = 2
    level: float = 0.95
    diversity_fall: float = 0.25


@dataclass(frozen=True, kw_only=True)
class Evaluation(Measures):
    """Paired evaluation: same prompts, noise, steps and guidance for every checkpoint.

    prompts: a world (its held-out sentences) or a file; count: distinct prompts; per_prompt: pictures each; every: iterations
    between evaluations during training (0: only base and end); quick: prompts of those in-training evaluations.
    """

    prompts: str = "world/v1"
    format: Literal["auto", "lines", "jsonl", "geneval", "ocr"] = "auto"
    count: int = 252
    per_prompt: int = 4
    steps: int = 10
    guidance: float = 1.0
    guidance_low: float | None = None
    seed: int = 1234
    every: int = 0
    quick: int = 100
    grid: int = 24
    rewards: tuple[RewardEntry, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """every: iterations between checkpoints (0: only at the end and on a stop signal); keep: newest ones kept, at least 2."""

    every: int = 10
    keep: int = 2


@dataclass(frozen=True, kw_only=True)
class Config:
    """One run. ``run_dir`` must not hold another run; ``threads``: torch CPU threads, 0 leaves torch's default."""

    run_dir: str = "runs/default"
    seed: int = 0
    iterations: int = 100
    threads: int = 0
    model: Model = field(default_factory=Model)
    data: Data = field(default_factory=Data)
    batch: Batch = field(default_factory=Batch)
    rollout: Rollout = field(default_factory=Rollout)
    process: tuple[ProcessEntry, ...] = ()
    critic: Critic = field(default_factory=Critic)
    actor_critic: ActorCritic = field(default_factory=ActorCritic)
    credit: Credit = field(default_factory=Credit)
    advantage: Advantage = field(default_factory=Advantage)
    objective: Objective = field(default_factory=Objective)
    direct: Direct = field(default_factory=Direct)
    euphonium: Euphonium = field(default_factory=Euphonium)
    forward: Forward = field(default_factory=Forward)
    neighbours: Neighbours = field(default_factory=Neighbours)
    condition: Condition = field(default_factory=Condition)
    optimizer: Optimizer = field(default_factory=Optimizer)
    ema: Ema = field(default_factory=Ema)
    rewards: tuple[RewardEntry, ...] = ()
    failures: Failures = field(default_factory=Failures)
    alarm: Alarm = field(default_factory=Alarm)
    evaluation: Evaluation = field(default_factory=Evaluation)
    checkpoint: Checkpoint = field(default_factory=Checkpoint)
    tracking: Tracking = field(default_factory=Tracking)
    search: Search = field(default_factory=Search)
    distributed: Distributed = field(default_factory=Distributed)
