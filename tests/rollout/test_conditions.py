"""A new condition: the pre-trained model bit by bit before training and without classes, and several attributes at once."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from flowrl.pipelines.sd3 import Sd3Adapter
from safetensors.torch import load_file

from flowrl.data.conditions import choices, in_turn, multiply_out
from flowrl.errors import UserError
from flowrl.records import PromptRow, Request
from flowrl.rollout.conditions import ClassVectors, Conditioned

ATTRIBUTES = {"hue": 2, "size": 3}


def request(number: int, **asked: int) -> Request:
    return Request("a photo of a circle", number, 36, 36, metadata={"condition": asked} if asked else {})


@pytest.fixture(scope="module")
def adapter(tiny_sd3: Path) -> Conditioned:
    inner = Sd3Adapter.load(str(tiny_sd3), torch.float32, torch.device("cpu"))
    inner.add_lora(4, 8.0, ["attention"], 0)
    return Conditioned(inner, ATTRIBUTES, "pooled")


@pytest.fixture(scope="module")
def base(tiny_sd3: Path) -> Sd3Adapter:
    return Sd3Adapter.load(str(tiny_sd3), torch.float32, torch.device("cpu"))


REQUESTS = [request(0, hue=1, size=2), request(1, hue=0), request(2, size=1)]


def outputs(adapter, requests: list[Request]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(len(requests), 4, 9, 9, generator=generator)
    t = torch.linspace(0.9, 0.2, len(requests))
    with torch.no_grad():
        return adapter.predict(x, t, adapter.encode(requests)).value


def test_at_the_start_every_class_gives_the_pre_trained_model_bit_by_bit(
    adapter: Conditioned, base: Sd3Adapter
) -> None:
    assert torch.equal(outputs(adapter, REQUESTS), outputs(base, REQUESTS))
    named = dict(adapter.trainable().named_parameters())
    vectors = [name for name, p in named.items() if "condition_vectors" in name and p.requires_grad]
    assert len(vectors) == 2  # they are trained, saved and averaged with the network's own


@pytest.fixture
def trained(adapter: Conditioned):
    """The condition and LoRA as after training: nothing is zero."""
    before = {name: p.detach().clone() for name, p in adapter.trainable().named_parameters() if p.requires_grad}
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.trainable().parameters():
            if p.requires_grad:
                p += 0.3 * torch.randn(p.shape, generator=generator)
    yield adapter
    with torch.no_grad():
        for name, p in adapter.trainable().named_parameters():
            if p.requires_grad:
                p.copy_(before[name])


def test_without_classes_it_stays_the_pre_trained_model_bit_by_bit(trained: Conditioned, base: Sd3Adapter) -> None:
    plain = [request(number) for number in range(3)]
    assert torch.equal(outputs(trained, plain), outputs(base, plain))
    with trained.lora_off():
        assert torch.equal(outputs(trained, REQUESTS), outputs(base, REQUESTS))
    assert not torch.allclose(outputs(trained, REQUESTS), outputs(base, REQUESTS), atol=1e-3)


def test_rows_with_and_without_classes_share_a_batch(trained: Conditioned, base: Sd3Adapter) -> None:
    mixed = [request(0, hue=1), request(1), request(2, size=0, hue=0), request(3)]
    found, plain = outputs(trained, mixed), outputs(base, mixed)
    torch.testing.assert_close(found[[1, 3]], plain[[1, 3]], atol=1e-5, rtol=1e-5)
    for row in (0, 2):
        assert not torch.allclose(found[row], plain[row], atol=1e-3)
    asked = [request(0, hue=1), request(1, hue=1), request(2, size=0, hue=0), request(3, hue=1)]
    torch.testing.assert_close(found[[0, 2]], outputs(trained, asked)[[0, 2]], atol=1e-5, rtol=1e-5)


def test_the_negative_branch_asks_for_nothing(trained: Conditioned, base: Sd3Adapter) -> None:
    x, t = torch.ones(3, 4, 9, 9), torch.full((3,), 0.5)
    with torch.no_grad():
        found = trained.predict(x, t, trained.encode(REQUESTS, negative=True)).value
        assert torch.equal(found, base.predict(x, t, base.encode(REQUESTS, negative=True)).value)


def test_classes_of_several_attributes_add_up() -> None:
    vectors = ClassVectors(ATTRIBUTES, 4)
    with torch.no_grad():
        for table in vectors.tables:
            table += torch.randn(table.shape)
    hue, size = vectors.tables
    found = vectors(torch.tensor([[1, 2], [-1, 0], [0, -1], [-1, -1]]))
    torch.testing.assert_close(found, torch.stack([hue[1] + size[2], size[0], hue[0], torch.zeros(4)]))
    found.sum().backward()
    assert float(hue.grad[0].sum()) == 4 and float(hue.grad[1].sum()) == 4 and float(size.grad[1].abs().sum()) == 0


def test_prompts_multiply_out() -> None:
    rows = [PromptRow("a", 0, {"tag": "x"}), PromptRow("b", 1)]
    made, weights = multiply_out(rows, [0.25, 0.75], ATTRIBUTES)
    assert len(choices(ATTRIBUTES)) == 11 and len(made) == 22
    assert [row.prompt_id for row in made] == list(range(22)) and weights == [0.25] * 11 + [0.75] * 11
    assert made[0].metadata == {"tag": "x", "condition": {"size": 0}}
    assert {json.dumps(row.metadata["condition"], sort_keys=True) for row in made[11:]} == {
        json.dumps(choice, sort_keys=True) for choice in choices(ATTRIBUTES)
    }
    shown = in_turn([*rows, PromptRow("c", 2, {"condition": {"hue": 1}})], ATTRIBUTES)
    assert [row.metadata["condition"] for row in shown] == [{"size": 0}, {"size": 1}, {"hue": 1}]


def test_bad_requests(adapter: Conditioned, tiny_sd3: Path) -> None:
    with pytest.raises(UserError, match="asks for 'shade'; known are hue, size"):
        adapter.encode([request(0, shade=1)])
    with pytest.raises(UserError, match=r"condition\.hue: 2 is no class; use 0 to 1"):
        adapter.encode([request(0, hue=2)])
    with pytest.raises(UserError, match="this model has no 'words'; use one of hidden, pooled"):
        Conditioned(adapter.inner, ATTRIBUTES, "words")


def test_export_has_the_vectors(trained: Conditioned, tmp_path: Path) -> None:
    trained.export(str(tmp_path))
    found = load_file(tmp_path / "condition.safetensors")
    assert torch.equal(found["hue"], trained.vectors.tables[0]) and found["size"].shape[0] == 3
    assert (tmp_path / "pytorch_lora_weights.safetensors").is_file()
