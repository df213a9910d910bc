"""A critic on hidden states of the pre-trained generator: what it reads, what it costs, and that it resumes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowrl.checkpoint import store
from flowrl.config import check, load
from flowrl.config.dialect import ConfigError
from flowrl.credit.networks import SummaryNetwork, summary
from flowrl.errors import UserError
from flowrl.plan import plan
from flowrl.records import Request
from flowrl.training.critic_view import View
from flowrl.training.trainer import Trainer
from tests.training.helpers import comparable, make, small_config, tensors

BLOCK = "transformer_blocks.0"
AC_FLOW = {
    "objective.name": "ac_flow", "rollout.kernel.name": "ode", "rollout.window.kind": "full", "rollout.share_prefix": False,
    "critic.closed": "outcome",
}  # fmt: skip
CRITIC = {"critic.features": (BLOCK,), "critic.steps": 2, "critic.width": 4, "critic.batch": 8}
BASELINE = {"credit.values": "critic", "critic.closed": "outcome", "rollout.share_prefix": False}


def trainer_of(model: Path, **changes: object) -> Trainer:
    return make(small_config(model, **(CRITIC | changes)))


def test_a_summary_is_mean_and_deviation_of_normalised_places() -> None:
    torch.manual_seed(0)
    tokens = torch.randn(3, 6, 5) * 4 + 2
    found = summary([tokens, tokens.transpose(1, 2).reshape(3, 5, 2, 3)])
    assert found.shape == (3, 20) and torch.equal(found[:, :10], found[:, 10:])
    one = (tokens[1] - tokens[1].mean(1, keepdim=True)) / (tokens[1].var(1, correction=0, keepdim=True) + 1e-5).sqrt()
    off = one - one.mean(0)
    torch.testing.assert_close(found[1, :10], torch.cat([one.mean(0), (off * off).mean(0).sqrt()]))
    network = SummaryNetwork(20, 2, width=4, out=3)
    assert network(found, torch.rand(3), torch.zeros(3, 2)).shape == (3, 3)
    with pytest.raises(ValueError, match="SummaryNetwork"):
        SummaryNetwork(0, 2)


@pytest.mark.parametrize(
    ("changes", "forwards"),
    # Rollout 32, reference and update 2 draws of 8 samples each; the critic reads both draws of 8.
    [(AC_FLOW, 32 + 16 + 16 + 16), (BASELINE | {"advantage.name": "gae"}, None), (BASELINE | {"advantage.name": "pdppo"}, None)],
    ids=["ac_flow", "gae", "pdppo"],
)  # fmt: skip
def test_it_costs_one_call_a_state_as_the_plan_says(tiny_sd3: Path, changes: dict, forwards: int | None) -> None:
    config = small_config(tiny_sd3, **(CRITIC | changes))
    trainer, made = make(config), plan(config)
    trainer.iterate()
    row = trainer.iterate()
    assert row["calls/forward_samples"] == made.forward.samples.mean
    assert row["calls/forward"] == made.forward.calls.mean
    if forwards is not None:
        assert row["calls/forward_samples"] == forwards
        return
    without = plan(small_config(tiny_sd3, **changes)).forward.samples.mean
    critics = 2 if changes["advantage.name"] == "pdppo" else 1
    states = config.batch.samples * config.rollout.window.size
    assert row["calls/forward_samples"] == without + critics * states and row["critic/loss"] is not None


def test_it_reads_the_generator_as_it_was_before_training(tiny_sd3: Path) -> None:
    trainer = trainer_of(tiny_sd3, **AC_FLOW, **{"optimizer.lr": 1e-2})
    view, network = trainer.learner.view, trainer.adapter.network
    found = trainer._collect()
    x, t = found.trajectory.x0, torch.linspace(0.1, 0.9, len(found.trajectory))
    before = view(x, t, found.prompted.positive, found.row)
    kept: list[torch.Tensor] = []
    module = dict(network.named_modules())
    block = next(m for name, m in module.items() if name.endswith(BLOCK))
    hook = block.register_forward_hook(lambda m, i, out: kept.append(out[1] if isinstance(out, tuple) else out))
    with torch.no_grad():
        trainer.adapter.predict(x, t, found.prompted.positive[found.row])
    hook.remove()
    torch.testing.assert_close(before, summary([kept[0]]), rtol=1e-4, atol=1e-5)  # LoRA starts at zero
    for _ in range(2):
        trainer.iterate()
    assert torch.equal(view(x, t, found.prompted.positive, found.row), before)
    with torch.no_grad():
        moved = trainer.adapter.predict(x, t, found.prompted.positive[found.row], features=(BLOCK,)).features[BLOCK]
    assert not torch.allclose(summary([moved]), before, rtol=1e-3, atol=1e-4)


def test_chunks_and_empty_batches_change_nothing(tiny_sd3: Path) -> None:
    trainer = trainer_of(tiny_sd3, **AC_FLOW)
    view = trainer.learner.view
    found = trainer._collect()
    x, t = found.trajectory.x0, torch.linspace(0.1, 0.9, len(found.trajectory))
    whole = view(x, t, found.prompted.positive, found.row)
    view.chunk = 3
    torch.testing.assert_close(view(x, t, found.prompted.positive, found.row), whole, rtol=1e-4, atol=1e-5)
    assert view(x[:0], t[:0], found.prompted.positive, found.row[:0]).shape == (0, view.reads)


@pytest.mark.parametrize("changes", [AC_FLOW, BASELINE | {"advantage.name": "gae"}], ids=["ac_flow", "gae"])
def test_resume_is_bit_exact_and_the_buffer_holds_summaries(tiny_sd3: Path, tmp_path: Path, changes: dict) -> None:
    straight = trainer_of(tiny_sd3, **changes)
    for _ in range(2):
        straight.iterate()
    store.save(tmp_path, 2, straight.state(), info={}, keep=2)
    expected = comparable(straight.iterate())
    other = trainer_of(tiny_sd3, **changes)
    other.load_state(store.load(tmp_path).state)
    assert comparable(other.iterate()) == expected
    a, b = tensors(straight.state()), tensors(other.state())
    assert a.keys() == b.keys() and [n for n in a if not torch.equal(a[n], b[n])] == []
    rows = [value for name, value in a.items() if "recent" in name and name.endswith("x")]
    assert rows and all(value.ndim == 2 for value in rows)


def test_what_is_refused(tiny_sd3: Path) -> None:
    with pytest.raises(UserError, match=r"critic\.features: the network has no module 'blocks\.7'; its blocks are"):
        trainer_of(tiny_sd3, **AC_FLOW, **{"critic.features": ("blocks.7",)})
    for changes, problem in (
        ({"features": ["a", "a"]}, r"critic\.features: \['a', 'a'\] repeats a name"),
        ({"features": ["a"], "blocks": 2}, r"critic\.blocks: are of its convolutions"),
        ({"weight_decay": -1.0}, r"critic\.weight_decay: -1\.0 is out of range; use at least 0"),
    ):
        with pytest.raises(ConfigError, match=problem):
            check(load({"objective": {"name": "ac_flow"}, "critic": changes}))
    trainer = trainer_of(tiny_sd3, **AC_FLOW)
    with pytest.raises(UserError, match="this trainer was built without it"):
        View(trainer.adapter, (BLOCK,), None, 4, Request("a red circle", 0, 36, 36))
