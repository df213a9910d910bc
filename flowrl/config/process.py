"""Settings of process rewards and of the critic, and what is wrong with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True, kw_only=True)
class ProcessEntry:
    """One process reward: what a latent on the way is worth.

    name: x0 (an outcome reward of an estimate of the finished picture: args ode_steps, reward, args) | latent | features
    (trained ones: args path, a folder of scripts/train_reward_model.py) | ``module:attr`` | ``path.py:attr``. weight: in
    the sum that ``credit.values: process`` takes; 0 leaves it to guidance. label: its name in metrics ("": made of name).
    temperature: values are divided by that of their noise level, as many equal levels of t as there are numbers, cleanest
    first; empty: by 1. min_accuracy: noise levels whose pair accuracy against the outcome, as measured so far, is lower give
    no credit (0: all do; 0.5 is chance).
    """

    name: str
    weight: float = 1.0
    args: dict[str, Any] = field(default_factory=dict)
    label: str = ""
    temperature: tuple[float, ...] = ()
    min_accuracy: float = 0.0


@dataclass(frozen=True, kw_only=True)
class Critic:
    """A value network, trained on the run's own samples: for ``credit.values: critic`` and ac_flow.

    features: modules of the generator whose hidden states it reads, as they were before training, averaged over places: one
    network call a state; none: it reads the latent itself.
    loss: squared | huber (linear beyond ``delta``) | hl_gauss (``bins`` bins over [low, high], in standard deviations of
    the reward). width, blocks: of its convolutions (width alone with features). lr, weight_decay, steps, batch,
    max_grad_norm: of its AdamW, steps an iteration. buffer: iterations whose samples it learns from. ema: of the averaged
    weights that give all values. lam: of the returns it is regressed to, 1 is the outcome.
    warmup: iterations before it may be used. min_explained: share of the variance of outcomes that it must explain on
    samples it was not trained on, at states with t < ``below`` (all where none is). closed: until then the policy has no
    update ("wait"), or plain group advantages ("outcome"; ac_flow: without a critic). diverged: a critic that explains less
    than minus this three times in a row is stopped for good.
    """

    features: tuple[str, ...] = ()
    loss: Literal["squared", "huber", "hl_gauss"] = "huber"
    delta: float = 1.0
    bins: int = 51
    low: float = -4.0
    high: float = 4.0
    width: int = 16
    blocks: int = 3
    lr: float = 1e-3
    weight_decay: float = 0.0
    steps: int = 16
    batch: int = 256
    max_grad_norm: float = 1.0
    buffer: int = 2
    ema: float = 0.9
    lam: float = 1.0
    warmup: int = 5
    min_explained: float = 0.2
    below: float = 0.3
    closed: Literal["wait", "outcome"] = "wait"
    diverged: float = 1.0


@dataclass(frozen=True, kw_only=True)
class ActorCritic:
    """What objective.name=ac_flow makes of rewards and critic (reconstructed: see flowrl.objectives.actor_critic).

    scale: rewards are standardised in their group, by running statistics, or not at all ("none"); reward_limit,
    advantage_limit: clips of shaped rewards and of advantages, 0 for none; mean_one: exponential weights have mean 1 over
    an update. Its weighting (exponential | linear | critic_only), temperature (tau), alpha (of the Wasserstein term) and
    regulariser (fixed | adaptive) are ``objective.loss_options``.
    """

    scale: Literal["group", "running", "none"] = "group"
    reward_limit: float = 3.0
    advantage_limit: float = 1.0
    mean_one: bool = True
