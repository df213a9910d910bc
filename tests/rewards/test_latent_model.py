"""A latent reward model as the reward of a run: one value in training, credit and evaluation; gradients, runs, refusals."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from flowrl import api
from flowrl.checkpoint import store
from flowrl.credit.networks import FeatureHead, LatentNetwork, pooled_text, seeded
from flowrl.credit.process import LatentReward
from flowrl.credit.process.storage import Card, save_model
from flowrl.errors import UserError
from flowrl.plan import plan_text
from flowrl.records import Conditioning, Prompted, Request, RewardBatch
from flowrl.registry import resolve
from flowrl.scoring.graded import GradedRewards
from flowrl.scoring.rows import take
from flowrl.scoring.runtime import RewardRuntime
from tests.training.helpers import comparable, make, small_config, tensors
from tests.training.test_direct import METHODS
from tests.training.test_resume import cut_copy, rows_of

LEVELS = {"levels": 2, "temperature": [0.5, 3.0], "offset": [0.25, 7.0]}
REQUESTS = [Request(f"prompt {i}", i, 8, 8) for i in range(3)]


def folder(path: Path, channels: int = 4, text: int = 5) -> str:
    network = {"channels": channels, "text": text, "width": 8, "blocks": 2}
    with seeded(3):
        module = LatentNetwork(**network)
    save_model(path, module, Card("latent", network, **LEVELS))
    return str(path)


def for_model(model: Path, path: Path) -> list[dict]:
    """Rewards of a run on ``model``: a latent model that fits it."""
    said = json.loads((model / "transformer" / "config.json").read_text())
    channels, text = said["in_channels"], said["pooled_projection_dim"]
    return [{"name": "latent_model", "args": {"path": folder(path, channels, text)}}]


def latents(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(seed)
    return torch.randn(3, 4, 8, 8, generator=draw), torch.randn(3, 5, generator=draw)


def test_the_value_is_that_of_the_process_reward_at_the_cleanest_time(tmp_path: Path) -> None:
    x, text = latents()
    path = folder(tmp_path)
    value = resolve("reward", "latent_model")(path).value(x, REQUESTS, text)
    process = LatentReward(path=path).score(x, torch.zeros(3), Prompted(Conditioning({"pooled": text}), None))
    assert torch.equal(value, process.values) and value.std() > 0
    with seeded(3):
        plain = LatentNetwork(4, 5, width=8, blocks=2)
    torch.testing.assert_close(value, plain(x, torch.zeros(3), text)[:, 0] / 0.5 + 0.25)
    assert not torch.equal(value, resolve("reward", "latent_model")(path).value(x, REQUESTS, text.flip(0)))


def test_the_gradient_is_its_slope_and_the_runtime_scores_alike(tmp_path: Path) -> None:
    x, text = latents()
    entries = small_config(tmp_path, rewards=[{"name": "latent_model", "args": {"path": folder(tmp_path)}}]).rewards

    def refuse(*_) -> torch.Tensor:
        raise AssertionError("decoded")

    graded = GradedRewards(entries)
    assert graded.needs_text and not graded.needs_pictures
    found = graded.grade(x, REQUESTS, refuse, lambda score: -score, text)
    way = torch.randn(x.shape, generator=torch.Generator().manual_seed(5))
    up, down = (graded.grade(x + s * 1e-2 * way, REQUESTS, refuse, lambda s: -s, text).score for s in (1, -1))
    torch.testing.assert_close(-(found.gradient * way).flatten(1).sum(1), (up - down) / 2e-2, rtol=2e-2, atol=1e-4)
    batch = RewardBatch(np.zeros((3, 8, 8, 3), np.uint8), ["a"] * 3, [{}] * 3, latents=x, text=text)
    with RewardRuntime(entries, small_config(tmp_path).failures) as runtime:
        np.testing.assert_allclose(runtime.score(batch).scores, found.score.numpy(), rtol=1e-6)
        turned = runtime.score(take(batch, [2, 1, 0]))
    np.testing.assert_allclose(turned.scores, found.score.flip(0).numpy(), rtol=1e-5)


@pytest.mark.parametrize("name", METHODS)
def test_every_method_of_direct_rewards_trains_on_it_and_decodes_nothing(
    tiny_sd3: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    changes = {"objective.name": name, "optimizer.warmup": 0} | METHODS[name]
    trainer = make(small_config(tiny_sd3, **(changes | {"rewards": for_model(tiny_sd3, tmp_path)})))

    def refuse(*_) -> torch.Tensor:
        raise AssertionError("decoded")

    monkeypatch.setattr(trainer.adapter, "decode", refuse)
    before = [p.detach().clone() for p in trainer.weights.parameters]
    for _ in range(2):
        row = trainer.iterate()
        assert row["optimizer/grad_norm"] > 0 and row["score/invalid"] == 0 and row["score/mean"] is not None
    assert any(not torch.equal(a, b) for a, b in zip(before, trainer.weights.parameters, strict=True))


def test_a_run_is_judged_by_gold_and_resumes_bit_for_bit(tiny_sd3: Path, tmp_path: Path) -> None:
    """The evaluation scores the trained reward on its latents and the gold one on its pictures."""
    gold = {"name": "tests.training.helpers:brightness", "role": "gold"}
    config = small_config(
        tiny_sd3, rewards=[*for_model(tiny_sd3, tmp_path / "model"), gold], iterations=2,
        run_dir=str(tmp_path / "run"), **{"objective.name": "draft", "evaluation.every": 1, "checkpoint.keep": 5},
    )  # fmt: skip
    api.train(config)
    rows = rows_of(tmp_path / "run")
    judged = [json.loads(line) for line in (tmp_path / "run" / "samples.jsonl").read_text().splitlines()]
    assert judged and all(set(row["scores"]) == {"latent_model", "brightness"} for row in judged)
    assert all(row["score"] == row["scores"]["latent_model"] and row["errors"] == {} for row in judged)
    assert all(row["gold"] == row["scores"]["brightness"] for row in judged)
    other = cut_copy(tmp_path / "run", tmp_path / "cut", 1)
    api.resume(other)
    first, second = (tensors(store.load(path / "checkpoints").state) for path in (tmp_path / "run", other))
    assert first.keys() == second.keys() and [n for n in first if not torch.equal(first[n], second[n])] == []
    assert [comparable(row) for row in rows] == [comparable(row) for row in rows_of(other)]


def test_a_rollout_hands_it_latents_and_text_of_the_same_rows(tiny_sd3: Path, tmp_path: Path) -> None:
    trainer = make(
        small_config(tiny_sd3, rewards=for_model(tiny_sd3, tmp_path), **{"credit.values": "x0", "batch.micro_batch": 8})
    )
    seen: list[RewardBatch] = []
    submit = trainer.rewards.submit
    trainer.rewards.submit = lambda batch: seen.append(batch) or submit(batch)
    found = trainer._collect()
    text = pooled_text(found.prompted.positive[found.row])
    assert not torch.equal(text[0], text[-1])
    value = resolve("reward", "latent_model")(str(tmp_path)).value(found.trajectory.x0, (), text)
    scores = found.scored.per_reward["latent_model"].scores
    np.testing.assert_allclose(scores, value.numpy(), rtol=1e-5, atol=1e-6)
    of_prompt: dict[str, torch.Tensor] = {}
    for batch in seen:  # estimates of intermediate states are among them
        for prompt, row in zip(batch.prompts, batch.text, strict=True):
            torch.testing.assert_close(of_prompt.setdefault(prompt, row), row)
    assert len(of_prompt) == 2 and sum(map(len, seen)) > 8


def test_its_memory_is_stated_by_itself_the_metrics_and_the_plan(tiny_sd3: Path, tmp_path: Path) -> None:
    """Four bytes a parameter, in each place; direct rewards hold it twice, other objectives once."""
    rewards = for_model(tiny_sd3, tmp_path / "model")
    reward = resolve("reward", "latent_model")(**rewards[0]["args"])
    held = 4 * sum(p.numel() for p in reward.network.parameters())
    assert held > 1000 and reward.nbytes == resolve("reward", "latent_model").held_bytes(**rewards[0]["args"]) == held
    assert sum(v.nbytes for v in load_file(tmp_path / "model" / "model.safetensors").values()) == held
    for name, twice in (("draft", True), ("flow_grpo", False)):
        config = small_config(tiny_sd3, rewards=rewards, **{"objective.name": name})
        row = make(config).iterate()
        assert row["memory/reward_mb"] * 2**20 == held
        assert row.get("memory/reward_gradient_mb", 0) * 2**20 == (held if twice else 0)
        line = next(line for line in plan_text(config).splitlines() if "reward latent_model" in line)
        assert line.endswith(f"{held / 2**20:.2f} MiB" + (", twice: once more for its gradient" if twice else ""))
    process = [{"name": "latent", "args": rewards[0]["args"], "label": "mine"}]
    given = {"process": process, "credit.values": "process", "advantage.name": "stepwise", "rollout.window.last": 0}
    assert f"  process mine  {held / 2**20:.2f} MiB" in plan_text(small_config(tiny_sd3, **given))
    assert "critic  known once" in plan_text(small_config(tiny_sd3, **{"objective.name": "ac_flow"}))
    assert (
        "beside the model" not in plan_text(small_config(tiny_sd3))
        and "memory/reward_mb" not in make(small_config(tiny_sd3)).iterate()
    )
    gone = small_config(tiny_sd3, rewards=[{"name": "latent_model", "args": {"path": "nowhere"}}])
    assert "reward latent_model  unknown: nowhere: no model.json there" in plan_text(gone)


def test_refusals(tiny_sd3: Path, tmp_path: Path) -> None:
    reward = resolve("reward", "latent_model")
    with pytest.raises(UserError, match=r"no model.json there; scripts/train_reward_model.py makes such a folder"):
        reward(str(tmp_path / "none"))
    settings = {"widths": [4], "text": 5, "width": 8}
    save_model(tmp_path / "head", FeatureHead(**settings), Card("features", settings, features=["a"], **LEVELS))
    with pytest.raises(UserError, match=r"holds a head on features of the generator.*train one with --kind latent"):
        reward(str(tmp_path / "head"))
    made = reward(folder(tmp_path / "good"))
    x, text = latents()
    with pytest.raises(
        UserError, match=r"trained on latents of 4 channels and text of 5 numbers.*text of 2; train one"
    ):
        made.value(x, REQUESTS, text[:, :2])
    with pytest.raises(UserError, match=r"this model has latents \[2, 8, 8\]"):
        made.value(x[:, :2], REQUESTS, text)
    for given in ({}, {"latents": x}):
        with pytest.raises(UserError, match="none came with these pictures; it scores what a run draws"):
            made.score(RewardBatch(np.zeros((3, 8, 8, 3), np.uint8), ["a"] * 3, [{}] * 3, **given))
