"""What a plan says of memory before weights are read, against what a run really holds; and what does not fit."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from flowrl.pipelines.sd3 import Sd3Adapter

from flowrl import fit
from flowrl.cli import main
from flowrl.config import load
from flowrl.config.schema import Config, Model
from flowrl.errors import UserError
from flowrl.performance.memory import Division, ModelSize, Network, Settings, memory_of, memory_of_part
from flowrl.plan import plan_text
from tests.training.helpers import make, small_config, tensors

GIB = 2**30


def held(*parts: object) -> int:
    """Bytes of distinct tensors: a tied embedding is one."""
    found = {t.data_ptr(): t for part in parts for t in tensors(part).values()}
    return sum(t.numel() * t.element_size() for t in found.values())


@pytest.mark.parametrize("train", ["lora", "full"])
def test_the_embedded_model_holds_what_the_plan_says(train: str) -> None:
    """Weights, trained parameters, gradients, optimizer state, average and reference copy, byte for byte."""
    prompt = {"batch.groups": 1, "batch.group_size": 2, "batch.micro_batch": 2, "rollout.steps": 2, "rollout.window.size": 1,
              "rollout.window.last": 0, "ema.decay": 0.5, "model.train": train, "model.path": "embedded"}  # fmt: skip
    config = small_config(Path("embedded"), **prompt)
    size = fit.size_of(config)
    assert size is not None
    said = memory_of(size, fit.settings_of(config))
    trainer = make(config)
    trainer.iterate()
    for parameter in trainer.weights.parameters:
        assert parameter.dtype == torch.float32
    trained = sum(p.numel() * 4 for p in trainer.weights.parameters)
    parts = [part for part in trainer.adapter.pipe.components.values() if isinstance(part, torch.nn.Module)]
    own = held({str(n): {k: v for k, v in part.state_dict().items()} for n, part in enumerate(parts)})
    # A position counter of a text encoder is a buffer that the files leave out.
    assert said.weights + said.trained == own
    assert said.gradients == trained
    states = trainer.optimizer.state_dict()["state"].values()
    assert said.optimizer == sum(t.numel() * t.element_size() for s in states for t in s.values())
    assert said.average == sum(t.numel() * 4 for t in trainer.weights.shadow) == trained
    assert said.trained == (trained if train == "lora" else 0)
    assert said.reference == (0 if train == "lora" else trained)
    assert size.shape == trainer.adapter.latent_shape(_request())


def _request():
    from flowrl.records import Request

    return Request("", 0, 36, 36)


SIZE = ModelSize(
    {"transformer": 10 * GIB, "text_encoder": 4 * GIB}, [Network(10 * GIB, 100, 10, 1024, 1024, [(1536, 512)] * 10)],
    ("text_encoder",), (4, 8, 8),
)  # fmt: skip


@pytest.mark.parametrize("checkpointed", [False, True])
def test_the_estimate_of_activations_is_near_what_autograd_keeps(checkpointed: bool) -> None:
    """On the embedded model, eight samples: within a third, or with checkpointing the blocks' inputs and some more."""
    switch = f"model.activation_checkpointing={str(checkpointed).lower()}"
    config = load("demo", ["batch.micro_batch=8", switch])
    size = fit.size_of(config)
    assert size is not None
    network = size.networks[0]
    assert (network.tokens, network.blocks, network.width) == (9 + 2 * 13, 4, 128)
    adapter = Sd3Adapter.load("embedded", torch.float32, torch.device("cpu"))
    adapter.add_lora(32, 64.0, config.model.lora.targets, 1)
    adapter.configure(config.model)
    weights = {p.untyped_storage().data_ptr() for p in adapter.network.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    given = adapter.encode([_request()] * 8)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = adapter.predict(torch.randn(8, 4, 9, 9), torch.full((8,), 0.5), given).value
    assert value.requires_grad
    said = memory_of(size, fit.settings_of(config)).activations or 0
    if checkpointed:
        said = said * network.blocks // (network.blocks + 17)
    assert said / 1.33 < sum(kept.values()) < said * 1.33


def test_worked_numbers() -> None:
    """LoRA of rank 4 on ten layers of 1024 x 1024: 4 x 2048 x 10 numbers; bf16 halves weights and activations alone."""
    made = memory_of(SIZE, Settings(lora_rank=4, dtype="bf16", ema=True, micro_batch=3))
    assert made.weights == 28 * GIB and made.parts == {"transformer": 20 * GIB, "text_encoder": 8 * GIB}
    assert (made.trained, made.gradients, made.average) == (327680, 327680, 327680)
    assert made.optimizer == 2 * 327680 + 20 * 4
    assert made.activations == 17 * 10 * 1024 * 1024 * 3 * 2
    spared = memory_of(SIZE, Settings(lora_rank=4, dtype="bf16", micro_batch=3, activation_checkpointing=True))
    assert spared.activations == (10 + 17) * 1024 * 1024 * 3 * 2 and spared.average == 0
    assert memory_of(SIZE, Settings(lora_rank=4, dtype="bf16", free_text_encoders=True)).weights == 20 * GIB
    assert memory_of(SIZE, Settings(lora_rank=4, dtype="bf16", branches=2)).activations == 2 * 17 * 10 * 1024 * 1024 * 2
    full = memory_of(SIZE, Settings(dtype="bf16"))
    assert (full.weights, full.gradients, full.reference) == (56 * GIB, 40 * GIB, 40 * GIB)
    assert full.optimizer == 80 * GIB + 400


def _config(*words: str) -> Config:
    return load("sd3_fast", ["model.dtype=bf16", "model.lora.rank=4", "batch.micro_batch=8", *words])


@pytest.mark.parametrize(
    ("words", "gib", "says"),
    [
        ((), 40, ""),
        ((), 31, "batch.micro_batch: 8 samples a call take about 30.66 GiB, and the accelerator has 31.00 GiB; use at most 3, or "
                 "model.activation_checkpointing=true; model.memory_check=false"),
        (("batch.micro_batch=1", "model.activation_checkpointing=true"), 29, "use batch.micro_batch=1 "
                 "model.free_text_encoders=true; model.memory_check=false goes on all the same"),
        (("model.train=full",), 60, "one sample a call, and the accelerator has 60.00 GiB; use batch.micro_batch=1 "
                 "model.activation_checkpointing=true model.free_text_encoders=true model.train=lora; model.memory"),
        (("model.train=full",), 10, "use a larger one, or a smaller model"),
    ],
)  # fmt: skip
def test_an_accelerator_that_is_too_small_names_what_would_fit(words: tuple[str, ...], gib: int, says: str) -> None:
    found = fit.shortage(_config(*words), SIZE, gib * GIB)
    assert says in found and bool(says) == bool(found)


def test_worked_numbers_of_a_part() -> None:
    """SIZE's 20 GiB of bf16 weights in ten blocks of 2 GiB, beside 8 GiB of text encoder, on four processes."""
    lora = Settings(lora_rank=4, dtype="bf16", ema=True, micro_batch=3)
    whole = memory_of(SIZE, lora)
    block = memory_of_part(SIZE, lora, Division(world=4, gather="block"))
    assert block.parts == {"network in parts": 5 * GIB, "gathered": 4 * GIB, "other models": 8 * GIB}
    assert replace(whole, weights=17 * GIB, parts=block.parts) == block  # LoRA and what belongs to it stay whole
    always = memory_of_part(SIZE, lora, Division(world=4, gather="iteration"))
    assert always.weights == 33 * GIB and always.activations == whole.activations
    rollout = memory_of_part(SIZE, lora, Division(world=4, gather="rollout"))
    assert (rollout.weights, rollout.gradients, rollout.activations) == (33 * GIB, 0, 0)
    many = replace(lora, micro_batch=3000)
    assert memory_of_part(SIZE, many, Division(world=4)) == memory_of_part(
        SIZE, many, Division(world=4, gather="block")
    )
    assert memory_of_part(SIZE, lora, Division(world=1, gather="block")) == whole
    full, cut = Settings(dtype="bf16", ema=True), Division(world=4, gather="block")
    assert memory_of_part(SIZE, full, cut).parts == {
        "network in parts": 10 * GIB, "gathered": 8 * GIB, "other models": 16 * GIB
    }  # fmt: skip
    part, undivided = memory_of_part(SIZE, full, cut), memory_of(SIZE, full)
    assert (part.optimizer, part.average, part.reference) == (20 * GIB + 100, 10 * GIB, 10 * GIB)
    assert part.gradients == undivided.gradients == 40 * GIB


def test_worked_numbers_of_deepspeed() -> None:
    """On four processes: 10 GiB numbers trained, Adam's 80 GiB and a float32 copy of the part beside it."""
    full, lora = Settings(dtype="bf16", ema=True), Settings(lora_rank=4, dtype="bf16", ema=True)
    undivided, one, two, three = memory_of(SIZE, full), *(
        memory_of_part(SIZE, full, Division(world=4, sharding=f"zero{stage}")) for stage in (1, 2, 3)
    )  # fmt: skip
    assert one == replace(undivided, optimizer=(80 * GIB + 400) // 4 + 10 * GIB)
    assert two == replace(one, gradients=10 * GIB)
    assert three.parts == {"network in parts": 10 * GIB, "gathered": 4 * GIB, "other models": 16 * GIB}
    assert (three.average, three.reference, three.gradients) == (10 * GIB, 10 * GIB, 10 * GIB)
    # Where LoRA alone is trained, the network that was loaded whole is the most that is ever held.
    loaded = memory_of_part(SIZE, lora, Division(world=4, sharding="zero3"))
    assert (loaded.weights, loaded.optimizer, loaded.activations) == (28 * GIB, 0, 0)


@pytest.mark.parametrize(
    ("words", "gib", "says"),
    [
        (("distributed.sharding=zero3", "distributed.processes=4", "model.train=full"), 128, ""),
        (("distributed.sharding=zero3", "distributed.processes=4", "model.train=full"), 84,
         "use batch.micro_batch=1 model.activation_checkpointing=true model.free_text_encoders=true; model.memory"),
        (("distributed.sharding=zero3", "distributed.processes=4", "model.train=full"), 20, "use a larger one, or a smaller"),
        (("distributed.sharding=fsdp2", "distributed.processes=4", "distributed.gather=block"), 24, ""),
        (("distributed.sharding=fsdp2", "distributed.processes=4", "distributed.gather=rollout"), 24,
         "use batch.micro_batch=1 model.free_text_encoders=true distributed.gather=block; model.memory"),
        (("distributed.processes=4",), 20, "model.activation_checkpointing=true model.free_text_encoders=true "
         "distributed.sharding=fsdp2 distributed.gather=block; model.memory"),
        (("distributed.processes=4", "objective.name=draft"), 20, "use a larger one, or a smaller model"),
    ],
)  # fmt: skip
def test_parts_fit_where_the_whole_does_not(words: tuple[str, ...], gib: int, says: str) -> None:
    found = fit.shortage(_config(*words), SIZE, gib * GIB)
    assert says in found and bool(says) == bool(found)


def test_a_plan_says_between_how_many_processes_it_divides() -> None:
    words = ["distributed.sharding=fsdp2", "distributed.gather=block"]
    text = plan_text(load("demo", [*words, "distributed.processes=4"]))
    assert "memory of one process of 4 at its fullest, distributed.gather=block" in text and "network in parts" in text
    zero = plan_text(load("demo", ["distributed.sharding=zero2", "distributed.processes=4"]))
    assert "memory of one process of 4 at its fullest, distributed.sharding=zero2" in zero
    assert "undivided: distributed.processes=N" in plan_text(load("demo", words))


def test_the_micro_batch_that_is_named_fits_and_one_more_does_not() -> None:
    found = fit.shortage(_config(), SIZE, 31 * GIB)
    most = int(found.split("use at most ")[1].split(",")[0])
    assert fit.shortage(_config(f"batch.micro_batch={most}"), SIZE, 31 * GIB) == ""
    assert fit.shortage(_config(f"batch.micro_batch={most + 1}"), SIZE, 31 * GIB) != ""


def test_the_plan_prints_memory_and_refuses_what_does_not_fit(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["plan", "demo"]) == 0
    said = capsys.readouterr().out
    assert "memory of one process" in said and "an estimate for" in said and "transformer" in said
    monkeypatch.setattr(fit, "device_bytes", lambda device=None: 1 << 20)
    assert main(["plan", "demo"]) == 2
    assert "and the accelerator has 1.00 MiB; " in capsys.readouterr().err
    assert main(["plan", "demo", "model.memory_check=false"]) == 0


def test_guidance_that_is_differentiated_whole_holds_two_calls() -> None:
    words = ("rollout.guidance=4.5", "rollout.cfg_gradient=full")
    assert fit.settings_of(_config(*words)).branches == 2
    assert fit.settings_of(_config(words[0], "rollout.cfg_gradient=conditional")).branches == 1
    assert fit.settings_of(_config()).branches == 1


def test_a_model_that_is_not_here_is_said_to_be_unknown() -> None:
    text = plan_text(Config(model=Model(adapter="flux", path="owner/never-downloaded")))
    assert "memory: known once the files of owner/never-downloaded are on this machine" in text


def test_a_run_stops_before_weights_are_read(tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("flowrl.training.build.device_bytes", lambda device: 1 << 16)
    monkeypatch.setattr(Sd3Adapter, "load", None)
    with pytest.raises(UserError, match=r"the accelerator has 0.06 MiB"):
        make(small_config(tiny_sd3))
