"""Process rewards as step values, through the real rollout: identities, failures, levels left out, costs, resume."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from flowrl.config.validate import validate
from flowrl.credit.networks import pooled_text
from flowrl.credit.process.storage import Card, make_network, save_model
from flowrl.errors import UserError
from flowrl.evaluation.process_section import process_table
from flowrl.plan import plan
from flowrl.records import ProcessScore
from flowrl.training.trainer import Trainer
from tests.training.helpers import make, small_config
from tests.training.toy import GaussianAdapter, LatentReward, rows, toy_config

BASE = {
    "rollout.share_prefix": False, "advantage.name": "stepwise", "rollout.window.kind": "random", "rollout.window.size": 3,
    "rollout.window.first": 2, "rollout.window.last": 2, "batch.group_size": 16, "credit.values": "process",
}  # fmt: skip
HERE = "tests.training.test_process_values:"


class Posterior:
    """The exact one-step value of the toy; how: what goes wrong with it."""

    differentiable = True

    def __init__(self, *, how: str = "fine") -> None:
        self.how = how

    def score(self, x, t, prompted):
        d = (1 - t) ** 2 * 0.25 + t**2
        values = 1 + 0.25 * (1 - t) / d * (x.flatten(1).sum(1) - (1 - t))
        if self.how == "nan":
            values = torch.where(torch.arange(len(x)) == 5, torch.nan, values)
        if self.how == "length":
            values = values[:-1]
        if self.how == "raises":
            raise RuntimeError("out of luck")
        if self.how == "noise":
            values = torch.rand(len(x), generator=torch.Generator().manual_seed(int(1e6 * float(t[0]))))
        return ProcessScore(values, torch.ones(len(values), dtype=torch.bool))


def plain_function(x, t, prompted):
    return x.flatten(1).sum(1)


def trainer_of(process: list[dict], **changes: object) -> Trainer:
    adapter = GaussianAdapter(10, mean=1.0, spread=0.5)
    config = toy_config(**(BASE | {"process": process} | changes))
    return Trainer(config, adapter, LatentReward(lambda x0: x0.flatten(1).sum(1)), rows(4))


def test_one_step_extrapolation_is_credit_values_x0() -> None:
    """process x0 with one step values every state as credit.values=x0 does, by one network call a state more."""
    one = trainer_of([{"name": "x0"}])
    two = trainer_of([], **{"credit.values": "x0"})
    a, b = one._collect(), two._collect()
    torch.testing.assert_close(a.values.start, b.values.start, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(a.values.step, b.values.step, rtol=1e-5, atol=1e-6)
    extra = one.counter.counts.forward_samples - two.counter.counts.forward_samples
    assert extra == 64 * 3 == plan(one.config).values.samples.mean


def test_values_are_weighted_divided_and_added() -> None:
    entries = [
        {"name": HERE + "Posterior", "weight": 2.0, "temperature": [4.0]},
        {"name": HERE + "plain_function", "weight": 0.5},
    ]
    found = trainer_of(entries)._collect()
    x = torch.cat([found.trajectory.x[:, :1], found.trajectory.x_next[:, :-1]], 1).reshape(64, 3).double()
    t = GaussianAdapter(10).grid[2:5].double()
    d = (1 - t) ** 2 * 0.25 + t**2
    expected = 0.5 * (1 + 0.25 * (1 - t) / d * (x - (1 - t))) + 0.5 * x
    got = torch.cat([found.values.start[:, None], found.values.step], 1)
    torch.testing.assert_close(got[:, :3], expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(got[:, 3], torch.from_numpy(found.scored.scores).double())


@pytest.mark.parametrize(("how", "lost"), [("nan", [5]), ("fine", [])])
def test_a_value_that_fails_masks_its_member_and_is_counted(how: str, lost: list[int]) -> None:
    trainer = trainer_of([{"name": HERE + "Posterior", "args": {"how": how}}])
    found = trainer._collect()
    assert found.values.start.isnan().nonzero().flatten().tolist() == lost
    batch, _ = trainer._credit(found)
    others = torch.tensor([i for i in range(64) if i not in lost])
    assert bool(batch.element[others].all()) and not bool(batch.element[lost, :2].any())
    assert found.facts["process/Posterior/invalid"] == 3 * len(lost)


@pytest.mark.parametrize(("how", "said"), [("length", r"values is \[63\] for 64 latents"), ("raises", "out of luck")])
def test_a_process_reward_that_never_works_stops_the_run_with_its_error(how: str, said: str) -> None:
    with pytest.raises(UserError, match=f"none of 192 latents has a value; first error: Posterior: .*{said}"):
        trainer_of([{"name": HERE + "Posterior", "args": {"how": how}}])._collect()


def test_levels_without_signal_are_left_out_from_the_next_iteration_on() -> None:
    entries = [{"name": HERE + "Posterior", "args": {"how": "noise"}, "min_accuracy": 0.8, "label": "noise"}]
    trainer = trainer_of(entries, **{"batch.group_size": 32})
    first = trainer._collect()
    assert float(first.values.start.std()) > 0.1 and first.facts["process/noise/left_out/6"] == 1
    assert 0.3 < first.facts["process/noise/accuracy/6"] < 0.7
    second = trainer._collect()
    group = second.trajectory.group_id
    scores = torch.from_numpy(second.scored.scores).double()
    for g in group.unique().tolist():
        torch.testing.assert_close(second.values.start[group == g], scores[group == g].mean().expand(32))
    good = trainer_of([{"name": HERE + "Posterior", "min_accuracy": 0.52}])
    row = good.iterate() | good.iterate()
    assert row["process/Posterior/left_out/5"] == 0 and row["process/Posterior/accuracy/5"] > 0.55
    table = process_table([row])
    assert "Posterior" in table and "in use" in table and process_table([{"score/mean": 1.0}]) == ""


def test_it_trains_and_resumes_bit_exactly(tmp_path: Path) -> None:
    from flowrl.checkpoint import store

    trainer = trainer_of([{"name": HERE + "Posterior", "min_accuracy": 0.5}], **{"optimizer.lr": 0.02})
    before = trainer.iterate()["score/mean"]
    store.save(tmp_path, 1, trainer.state(), info={}, keep=2)
    expected = [trainer.iterate()["process/Posterior/accuracy/5"] for _ in range(8)]
    other = trainer_of([{"name": HERE + "Posterior", "min_accuracy": 0.5}], **{"optimizer.lr": 0.02})
    other.load_state(store.load(tmp_path).state)
    found = [other.iterate() for _ in range(8)]
    assert [row["process/Posterior/accuracy/5"] for row in found] == expected
    assert found[-1]["score/mean"] > before + 0.03
    assert torch.equal(trainer.adapter.network.delta, other.adapter.network.delta)


def test_learned_process_rewards_cost_no_decoding(tiny_sd3: Path, tmp_path: Path) -> None:
    """Two states a sample (stepwise reads the first too): a head on features takes a call each, a latent network none."""
    config = small_config(tiny_sd3)
    adapter = make(config).adapter
    from flowrl.records import Request

    asked = adapter.encode([Request("one red circle", 0, 36, 36)])
    text = pooled_text(asked).shape[1]
    tap = adapter.predict(torch.zeros(1, 4, 9, 9), torch.zeros(1), asked, features=("transformer_blocks.0",))
    width = tap.features["transformer_blocks.0"].shape[-1]
    sizes = {
        "features": {"widths": [width], "text": text, "width": 8},
        "latent": {"channels": 4, "text": text, "width": 8, "blocks": 2},
    }
    calls = {}
    for kind, size in sizes.items():
        torch.manual_seed(0)
        names = ["transformer_blocks.0"] if kind == "features" else []
        save_model(tmp_path / kind, make_network(kind, size), Card(kind, size, 8, [1.0] * 8, [0.0] * 8, names))
        made = small_config(tiny_sd3, **{
            "process": [{"name": kind, "args": {"path": str(tmp_path / kind)}}], "credit.values": "process",
            "advantage.name": "stepwise", "rollout.window.last": 0, "rollout.share_prefix": False,
        })  # fmt: skip
        trainer = make(made)
        decoded: list[int] = []
        decode = trainer.adapter.decode
        trainer.adapter.decode = lambda x0, request, decode=decode, seen=decoded: (
            seen.append(len(x0)),
            decode(x0, request),
        )[1]
        row = trainer.iterate()
        assert row["memory/process_mb"] * 2**20 == 4 * sum(p.numel() for p in make_network(kind, size).parameters())
        calls[kind] = (
            row["calls/forward_samples"],
            sum(decoded),
            plan(made).forward.samples.mean,
            plan(made).value_samples,
        )
    assert calls == {"features": (32 + 16 + 16, 8, 64, 0), "latent": (32 + 16, 8, 48, 0)}


@pytest.mark.parametrize(
    ("changes", "said"),
    [({"process": [{"name": "x1"}]}, "process.0.name: unknown process_reward 'x1'; use one of"),
     ({"process": [{"name": "x0", "args": {"steps": 1}}]}, "process.0.args.steps: unknown argument of x0; did"),
     ({"process": [{"name": "x0", "args": {"reward": "pref_grpo"}}]}, "process.0.args.reward: pref_grpo compares"),
     ({"process": [{"name": "latent", "args": {"path": "nowhere"}}]}, "process.0.args.path: no trained process reward"),
     ({"process": [{"name": "x0", "temperature": [0.0]}]}, "process.0.temperature: [0.0] divides values"),
     ({"process": [{"name": "x0", "min_accuracy": 1.0}]}, "process.0.min_accuracy: 1.0 is out of range"),
     ({"process": [{"name": "x0", "weight": 0.0}]}, "credit.values: process needs at least one entry of process with a weight"),
     ({"process": [{"name": "x0"}], "advantage.name": "pdppo"}, "credit.values: pdppo has a critic of the state"),
     ({"process": [{"name": "x0"}], "critic.lr": 0.1}, "critic: nothing in this run has one"),
     ({"credit.values": "critic", "critic.ema": 1.0, "critic.steps": 0}, "critic.steps: 0 is out of range; use at least 1"),
     ({"process": [{"name": "x0"}], "actor_critic.reward_limit": 1.0}, "actor_critic: objective.name=flow_grpo has no")],
)  # fmt: skip
def test_mistakes_in_a_config_are_named(changes: dict, said: str) -> None:
    problems = validate(toy_config(**(BASE | changes)))
    assert any(problem.startswith(said) for problem in problems), problems
