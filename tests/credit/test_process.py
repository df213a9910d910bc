"""Process rewards: what each one says on problems with known answers, and what becomes of failures."""

from __future__ import annotations

from contextlib import contextmanager

import pytest
import torch

from flowrl.credit.networks import LatentNetwork, noise_level, pooled_text
from flowrl.credit.process import (
    Extrapolation,
    FeatureReward,
    LatentReward,
    ProcessContext,
    ProcessMember,
    ProcessSet,
    ask,
    ask_gradient,
)
from flowrl.credit.process.combine import observed
from flowrl.credit.process.storage import Card, load_model, make_network, read_card, save_model
from flowrl.errors import UserError
from flowrl.records import Conditioning, ProcessScore, Prompted, Request
from flowrl.rollout.policy import Policy
from tests.training.toy import GaussianAdapter


def prompted(count: int) -> Prompted:
    requests = tuple(Request(f"prompt {i}", i, 4, 4) for i in range(count))
    return Prompted(Conditioning({"id": torch.arange(count)}), None, requests)


def context(adapter, outcome=None, steps: int = 10) -> ProcessContext:
    schedule = adapter.schedule(steps, None)
    policy = Policy(adapter, schedule, "ode", 0.0)

    def total(name, args):
        return outcome or (lambda x0, requests: (x0.flatten(1).sum(1), torch.ones(len(x0), dtype=torch.bool)))

    @contextmanager
    def reference():
        yield

    return ProcessContext(adapter, schedule, policy.predict, reference, total)


# ------------------------------------------------------------------------------------------------ x0 extrapolation


@pytest.mark.parametrize("n", [1, 3, 0])
def test_extrapolation_of_a_linear_reward_on_gaussian_data(n: int) -> None:
    """One step gives the posterior mean, m + s^2 (1 - t) / D (x - (1 - t) m); more steps the Euler path's end."""
    adapter = GaussianAdapter(10, mean=1.0, spread=0.5)
    reward = Extrapolation(ode_steps=n)
    reward.bind(context(adapter))
    x = torch.linspace(-2, 2, 7).reshape(7, 1, 1, 1)
    t = adapter.grid[[2, 3, 4, 5, 6, 8, 10]]
    found = reward.score(x, t, prompted(7))
    assert bool(found.valid.all()) and not reward.differentiable
    tt = t.double()
    d = (1 - tt) ** 2 * 0.25 + tt**2
    posterior = 1 + 0.25 * (1 - tt) / d * (x.flatten() - (1 - tt))
    path = 1 + 0.5 / d.sqrt() * (x.flatten() - (1 - tt))  # the exact flow's end, which more Euler steps come nearer to
    if n == 1:
        torch.testing.assert_close(found.values.double(), posterior, rtol=1e-5, atol=1e-5)
    elif n == 3:
        assert float((found.values - path).abs().max()) < 0.7 * float((posterior - path).abs().max())
    else:
        for row, step in enumerate([2, 3, 4, 5, 6, 8, 10]):
            end = float(x[row])
            for k in range(step, 10):
                here, there = float(adapter.grid[k]), float(adapter.grid[k + 1])
                end += (there - here) * (-1 + float(adapter.network.slope(adapter.grid[k])) * (end - (1 - here)))
            assert float(found.values[row]) == pytest.approx(end, abs=1e-5)


def test_extrapolation_hands_each_latent_its_own_request() -> None:
    seen: list[str] = []

    def outcome(x0, requests):
        seen.extend(r.prompt for r in requests)
        return torch.zeros(len(x0)), torch.tensor([r.prompt_id != 1 for r in requests])

    reward = Extrapolation()
    reward.bind(context(GaussianAdapter(10), outcome))
    rows = torch.tensor([2, 1, 1])
    found = reward.score(torch.zeros(3, 1, 1, 1), torch.full((3,), 0.5), prompted(3)[rows])
    assert seen == ["prompt 2", "prompt 1", "prompt 1"] and found.valid.tolist() == [True, False, False]


def test_extrapolation_refuses_what_it_cannot_do() -> None:
    reward = Extrapolation()
    with pytest.raises(ValueError, match="call bind first"):
        reward.score(torch.zeros(1, 1, 1, 1), torch.zeros(1), prompted(1))
    reward.bind(context(GaussianAdapter(10)))
    with pytest.raises(ValueError, match=r"t = 0\.55 is no time of the run's schedule"):
        reward.score(torch.zeros(1, 1, 1, 1), torch.tensor([0.55]), prompted(1))
    with pytest.raises(ValueError, match="come without requests"):
        reward.score(torch.zeros(1, 1, 1, 1), torch.tensor([0.5]), Prompted(Conditioning({"id": torch.zeros(1)}), None))
    with pytest.raises(ValueError, match="ode_steps: expected a number >= 0"):
        Extrapolation(ode_steps=-1)


# ------------------------------------------------------------------------------------------------ learned, on disk


def saved_latent(folder):
    torch.manual_seed(0)
    settings = {"channels": 4, "text": 0, "width": 8, "blocks": 2}
    card = Card("latent", settings, 2, [2.0, 4.0], [0.5, -1.0])
    network = make_network(card.kind, card.network)
    save_model(folder, network, card)
    return network.eval()


def test_a_latent_network_comes_back_from_disk_with_its_temperatures(tmp_path) -> None:
    network = saved_latent(tmp_path)
    reward = LatentReward(path=str(tmp_path))
    x, t = torch.randn(4, 4, 5, 5), torch.tensor([0.1, 0.49, 0.5, 1.0])
    found = reward.score(x, t, prompted(4))
    raw = network(x, t, torch.zeros(4, 0))[:, 0]
    torch.testing.assert_close(
        found.values, raw / torch.tensor([2.0, 2.0, 4.0, 4.0]) + torch.tensor([0.5, 0.5, -1.0, -1.0])
    )
    assert {p.name for p in tmp_path.iterdir()} == {"model.safetensors", "model.json"}
    assert not any(p.requires_grad for p in reward.network.parameters())


def test_the_gradient_of_a_latent_network_is_that_of_finite_differences(tmp_path) -> None:
    saved_latent(tmp_path)
    reward = LatentReward(path=str(tmp_path))
    reward.network.double()
    x, t = torch.randn(3, 4, 5, 5), torch.tensor([0.2, 0.5, 0.9])
    found = ask_gradient("latent", _Double(reward), x, t, prompted(3))
    assert found.gradient is not None and bool(found.valid.all())
    direction = torch.randn_like(x)
    step = 1e-4
    ahead, behind = (_Double(reward).score((x + s * direction).double(), t, prompted(3)).values for s in (step, -step))
    slope = (found.gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope.double(), ((ahead - behind) / (2 * step)).double(), rtol=1e-3, atol=1e-4)


class _Double:
    """The same reward on float64 latents, so that differences are exact."""

    differentiable = True

    def __init__(self, reward) -> None:
        self.reward = reward

    def score(self, x, t, prompted):
        network = self.reward.network
        trunk = network.trunk(x.double()).mean((2, 3))
        flat = x.double().flatten(2)
        from flowrl.credit.networks import time_features

        moments = torch.cat([flat.mean(2), (flat.square().mean(2) + 1e-12).sqrt()], 1)
        values = network.head(torch.cat([trunk, moments, time_features(t).double()], 1))[:, 0]
        return ProcessScore(values, torch.ones(len(x), dtype=torch.bool))


def test_damaged_and_foreign_folders_are_refused(tmp_path) -> None:
    with pytest.raises(UserError, match=r"no model\.json there; scripts/train_reward_model\.py"):
        LatentReward(path=str(tmp_path))
    saved_latent(tmp_path / "a")
    with pytest.raises(UserError, match="holds a process reward of kind 'latent'"):
        FeatureReward(path=str(tmp_path / "a"))
    file = tmp_path / "a" / "model.json"
    file.write_text(file.read_text().replace('"levels": 2', '"levels": 3'))
    with pytest.raises(UserError, match="3 levels need as many temperatures"):
        read_card(tmp_path / "a")
    saved_latent(tmp_path / "b")
    (tmp_path / "b" / "model.safetensors").write_bytes(b"nothing")
    with pytest.raises(UserError, match="the weights cannot be loaded"):
        load_model(tmp_path / "b")


# ------------------------------------------------------------------------------------------------ features


@pytest.fixture(scope="module")
def sd3(tiny_sd3):
    from flowrl.pipelines.sd3 import Sd3Adapter

    return Sd3Adapter.load(str(tiny_sd3), torch.float32, torch.device("cpu"))


def test_features_of_named_blocks_come_with_the_prediction(sd3) -> None:
    asked = sd3.encode([Request("one red circle", 0, 36, 36)] * 2)
    x, t = torch.randn(2, 4, 9, 9), torch.tensor([0.3, 0.8])
    plain = sd3.predict(x, t, asked)
    with_features = sd3.predict(x, t, asked, features=("transformer_blocks.0", "pos_embed"))
    torch.testing.assert_close(plain.value, with_features.value, rtol=0, atol=0)
    assert plain.features == {} and set(with_features.features) == {"transformer_blocks.0", "pos_embed"}
    hidden = with_features.features["transformer_blocks.0"]
    assert (
        hidden.shape[:1] == (2,)
        and hidden.ndim == 3
        and hidden.shape[1] == with_features.features["pos_embed"].shape[1]
    )
    assert not sd3.network.transformer_blocks[0]._forward_hooks  # nothing stays behind
    with pytest.raises(ValueError, match=r"no module 'transformer_blocks\.7'; its blocks are transformer_blocks\.0"):
        sd3.predict(x, t, asked, features=("transformer_blocks.7",))


def test_features_of_a_unet_are_its_hidden_states(tiny_sd15) -> None:
    from flowrl.pipelines.stable_diffusion import StableDiffusionAdapter

    adapter = StableDiffusionAdapter.load(str(tiny_sd15), torch.float32, torch.device("cpu"))
    asked = adapter.encode([Request("one red circle", 0, 32, 32)])
    found = adapter.predict(
        torch.randn(1, 4, 16, 16), torch.tensor([0.5]), asked, features=("down_blocks.0", "mid_block")
    )
    assert all(h.ndim == 4 and h.shape[0] == 1 for h in found.features.values())


def saved_head(folder, sd3) -> None:
    asked = sd3.encode([Request("one red circle", 0, 36, 36)])
    width = sd3.predict(torch.zeros(1, 4, 9, 9), torch.zeros(1), asked, features=("transformer_blocks.0",))
    settings = {
        "widths": [width.features["transformer_blocks.0"].shape[-1]],
        "text": pooled_text(asked).shape[1],
        "width": 8,
    }
    card = Card("features", settings, 1, [1.0], [0.0], features=["transformer_blocks.0"])
    torch.manual_seed(1)
    save_model(folder, make_network("features", settings), card)


def test_a_head_on_features_costs_one_call_and_differentiates_to_the_latent(sd3, tmp_path) -> None:
    from flowrl.performance.counting import CallCounter

    saved_head(tmp_path, sd3)
    reward = FeatureReward(path=str(tmp_path))
    requests = (Request("one red circle", 0, 36, 36), Request("two blue squares", 1, 36, 36))
    rows = Prompted(sd3.encode(requests), None, requests)
    reward.bind(context(sd3, steps=4))
    torch.manual_seed(2)
    x, t = torch.randn(2, 4, 9, 9), torch.tensor([0.4, 0.7])
    with CallCounter(sd3.trainable()) as counter:
        plain = ask("features", reward, x, t, rows)
        assert (counter.counts.forward, counter.counts.forward_samples, counter.counts.forward_grad) == (1, 2, 0)
    found = ask_gradient("features", reward, x, t, rows)
    torch.testing.assert_close(found.values, plain.values)
    direction = torch.randn_like(x)
    ahead, behind = (reward.score(x + s * direction, t, rows).values for s in (1e-2, -1e-2))
    slope = (found.gradient * direction).flatten(1).sum(1)
    torch.testing.assert_close(slope, (ahead - behind) / 2e-2, rtol=2e-2, atol=2e-4)
    assert bool(plain.valid.all()) and float(plain.values.diff()) != 0


def test_a_head_reads_the_reference_whatever_training_has_done(sd3, tmp_path) -> None:
    """Weights that are swapped in place within the reference: the value is the reference's, and so is its gradient."""
    from flowrl.training.weights import Weights, snapshot_reference

    saved_head(tmp_path, sd3)
    sd3.trainable().requires_grad_(True)
    reference = snapshot_reference(Weights(sd3.trainable()))
    made = context(sd3, steps=4)
    reward = FeatureReward(path=str(tmp_path))
    reward.bind(ProcessContext(made.adapter, made.schedule, made.predict, reference, made.outcome))
    requests = (Request("one red circle", 0, 36, 36),)
    rows = Prompted(sd3.encode(requests), None, requests)
    x, t = torch.randn(1, 4, 9, 9), torch.tensor([0.5])
    before = ask_gradient("features", reward, x, t, rows)
    saved = [p.detach().clone() for p in sd3.trainable().parameters()]
    with torch.no_grad():
        for p in sd3.trainable().parameters():
            p.add_(0.05 * torch.randn_like(p))
    after = ask_gradient("features", reward, x, t, rows)
    with torch.no_grad():
        for p, old in zip(sd3.trainable().parameters(), saved, strict=True):
            p.copy_(old)
    sd3.trainable().requires_grad_(False)
    assert not before.error and not after.error
    torch.testing.assert_close(before.values, after.values, rtol=0, atol=0)
    torch.testing.assert_close(before.gradient, after.gradient, rtol=0, atol=0)


# ------------------------------------------------------------------------------------------------ failures


class Broken:
    """A process reward that fails as told; its value is the sum of the latent."""

    differentiable = True

    def __init__(self, how: str) -> None:
        self.how = how

    def score(self, x, t, prompted):
        values = x.flatten(1).sum(1)
        valid = torch.ones(len(x), dtype=torch.bool)
        if self.how == "nan":
            values = torch.where(torch.arange(len(x)) == 1, torch.nan, values)
        if self.how == "length":
            return ProcessScore(values[:-1], valid[:-1])
        if self.how == "column":
            return ProcessScore(values[:, None], valid)
        if self.how == "raises":
            raise RuntimeError("out of luck")
        if self.how == "type":
            return values
        if self.how == "marked":
            valid[2] = False
        if self.how == "gradient":
            first = values[:1]
            values = torch.cat([(first - first.detach()).abs().sqrt(), values[1:]])  # finite, with an infinite slope
        if self.how == "detached":
            values = values.detach()
        return ProcessScore(values, valid)


@pytest.mark.parametrize(
    ("how", "invalid", "said"),
    [("fine", [], ""), ("nan", [1], "value 1 is not valid or not finite"), ("marked", [2], "value 2 is not valid"),
     ("length", [0, 1, 2, 3], r"values is \[3\] for 4 latents; return \[4\]"), ("column", [0, 1, 2, 3], r"values is \[4, 1\]"),
     ("raises", [0, 1, 2, 3], r"RuntimeError: out of luck \(test_process\.py:\d+\)"),
     ("type", [0, 1, 2, 3], "score returned Tensor; return a ProcessScore")],
)  # fmt: skip
@pytest.mark.parametrize("gradient", [False, True])
def test_a_failure_is_a_mask_and_is_counted(how: str, invalid: list[int], said: str, gradient: bool) -> None:
    import re

    x = torch.arange(16.0).reshape(4, 4, 1, 1)
    found = (ask_gradient if gradient else ask)("mine", Broken(how), x, torch.full((4,), 0.5), prompted(4))
    assert (~found.valid).nonzero().flatten().tolist() == invalid and found.invalid == len(invalid)
    expected = torch.where(found.valid, x.flatten(1).sum(1), 0.0)
    torch.testing.assert_close(found.values, expected)
    assert re.search(said, found.error) if said else found.error == ""
    if gradient:
        torch.testing.assert_close(found.gradient, found.valid.float().reshape(4, 1, 1, 1).expand(4, 4, 1, 1))


def test_a_gradient_that_is_not_finite_masks_its_sample() -> None:
    x = torch.ones(3, 4, 1, 1)
    found = ask_gradient("mine", Broken("gradient"), x, torch.full((3,), 0.5), prompted(3))
    assert found.valid.tolist() == [False, True, True] and "a gradient is not finite" in found.error
    assert bool((found.gradient[0] == 0).all()) and bool((found.gradient[1:] == 1).all())
    lost = ask_gradient("mine", Broken("detached"), x, torch.full((3,), 0.5), prompted(3))
    assert lost.invalid == 3 and "no gradient reaches its latents" in lost.error
    with pytest.raises(ValueError, match="has no gradient"):
        ask_gradient("x0", Extrapolation(), x, torch.full((3,), 0.5), prompted(3))


# ------------------------------------------------------------------------------------------------ sets


def test_values_add_up_over_members_with_weight_and_temperature() -> None:
    members = [
        ProcessMember("a", Broken("fine"), 2.0, temperature=(1.0, 4.0)),
        ProcessMember("b", Broken("nan"), -1.0),
        ProcessMember("guide", Broken("raises"), 0.0),
    ]
    found = ProcessSet(members)
    x = torch.arange(12.0).reshape(3, 4, 1, 1)
    total = x.flatten(1).sum(1).double()
    late = found.values(x, torch.full((3,), 0.25), prompted(3))
    expected = 2 * total - total
    assert late.total.isnan().tolist() == [False, True, False]
    torch.testing.assert_close(late.total[[0, 2]], expected[[0, 2]])
    early = found.values(x, torch.full((3,), 0.75), prompted(3))
    torch.testing.assert_close(early.total[[0, 2]], (2 * total / 4 - total)[[0, 2]])
    assert found.invalid == {"a": 0, "b": 2, "guide": 0} and "b: value 1" in found.first_error


def test_levels_without_signal_are_left_out() -> None:
    """After enough pairs a level below the threshold gives no credit; another level of the same reward still does."""
    found = ProcessSet([ProcessMember("a", Broken("fine"), min_accuracy=0.6, levels=4)])
    generator = torch.Generator().manual_seed(0)
    outcome = torch.randn(64, generator=generator).double()
    group = torch.arange(64) // 8
    noise = torch.randn(64, generator=generator).double()
    for t, value in ((0.9, noise), (0.1, outcome + 0.1 * noise)):
        assert [m.label for m in found.usable(t)] == ["a"]
        counts, facts = observed(value, outcome, group)
        found.observe("a", t, counts)
        assert [m.label for m in found.usable(t)] == ["a"]  # what is noted counts from the next iteration on
        found.settle(lambda x: x)
        assert counts[1] == 8 * 28 and (facts["tau"] > 0.8) == (t == 0.1)
    assert [m.label for m in found.usable(0.9)] == [] and [m.label for m in found.usable(0.1)] == ["a"]
    assert found.accuracy("a")[1] is None and found.accuracy("a")[3] < 0.6 < found.accuracy("a")[0]
    left_out = found.values(torch.ones(2, 4, 1, 1), torch.full((2,), 0.9), prompted(2))
    assert left_out.total.tolist() == [0, 0] and left_out.by_label["a"].tolist() == [4, 4]
    state = found.state()
    other = ProcessSet([ProcessMember("a", Broken("fine"), min_accuracy=0.6, levels=4)])
    other.load(state)
    assert torch.equal(other.seen["a"], found.seen["a"]) and other.seen["a"] is not state["a"]
    found.settle(lambda x: x)
    assert torch.equal(found.seen["a"], 0.9 * other.seen["a"])
    with pytest.raises(ValueError, match="not those of this run"):
        ProcessSet([ProcessMember("b", Broken("fine"))]).load(state)


def test_a_report_made_before_the_run_counts_from_the_start() -> None:
    known = ((0.5, 1000), (0.9, 1000))
    found = ProcessSet([ProcessMember("a", Broken("fine"), min_accuracy=0.55, levels=2, known=known)])
    assert [bool(found.usable(t)) for t in (0.2, 0.8)] == [False, True]


# ------------------------------------------------------------------------------------------------ networks


def test_noise_levels_and_text() -> None:
    assert noise_level(torch.tensor([0.0, 0.249, 0.25, 0.999, 1.0]), 4).tolist() == [0, 0, 1, 3, 3]
    with pytest.raises(ValueError, match=r"times in \[0, 1\]"):
        noise_level(torch.tensor([1.1]), 4)
    hidden, pooled = torch.randn(2, 3, 5), torch.randn(2, 7)
    assert torch.equal(pooled_text(Conditioning({"hidden": hidden, "pooled": pooled})), pooled)
    torch.testing.assert_close(pooled_text(Conditioning({"hidden": hidden})), hidden.mean(1))
    assert pooled_text(Conditioning({"id": torch.arange(2)})).shape == (2, 0)


def test_a_latent_network_reads_pictures_and_videos_of_any_size() -> None:
    torch.manual_seed(0)
    network = LatentNetwork(3, 5, width=8, blocks=2, out=4)
    t, text = torch.tensor([0.1, 0.9]), torch.randn(2, 5)
    x = torch.randn(2, 3, 6, 7)
    assert network(x, t, text).shape == (2, 4)
    still = network(x[:, :, None].expand(-1, -1, 3, -1, -1), t, text)
    torch.testing.assert_close(still, network(x, t, text))  # a video that does not move is its picture
    assert float((network(x, t, text) - network(x, t.flip(0), text)).detach().abs().max()) > 1e-3
    assert network(torch.randn(2, 3, 1, 1), t, text).isfinite().all()
