"""How a model is run: checkpointed activations, compiled blocks, attention backends, tiles, freed encoders, fp16."""

from __future__ import annotations

import dataclasses
from importlib import metadata
from pathlib import Path

import pytest
import torch
from flowrl.pipelines import execution, texts, tiny_families

from flowrl import registry
from flowrl.config import model as model_settings
from flowrl.config.schema import Model
from flowrl.errors import UserError
from flowrl.records import Request
from flowrl.training.loss_scale import LossScale
from tests.pipelines.families import WORDS
from tests.training.helpers import make, small_config, tensors

CPU = torch.device("cpu")
PROMPTS = ("a photo of a red circle", "a blue square moving left")


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("flux")
    tiny_families.build_flux(WORDS, guidance=False).save_pretrained(folder)
    return folder


def adapter_of(folder: Path, family: str = "flux", dtype: torch.dtype = torch.float32):
    return registry.resolve("pipeline", family).load(str(folder), dtype, CPU)


def requests(size: int = 16) -> list[Request]:
    return [Request(text, number, size, size) for number, text in enumerate(PROMPTS)]


def gradients(adapter) -> tuple[dict[str, torch.Tensor], int]:
    """Gradients of one call by name, and the bytes that autograd kept for it."""
    kept = 0

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        nonlocal kept
        kept += tensor.numel() * tensor.element_size()
        return tensor

    given = adapter.encode(requests())
    x = torch.randn(2, *adapter.latent_shape(requests()[0]), generator=torch.Generator().manual_seed(1))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        value = adapter.predict(x, torch.tensor([0.9, 0.4]), given).value
    value.square().sum().backward()
    named = adapter.trainable().named_parameters()
    return {name: p.grad.clone() for name, p in named if p.grad is not None}, kept


def with_lora(folder: Path, family: str = "flux", dtype: torch.dtype = torch.float32, **settings):
    adapter = adapter_of(folder, family, dtype)
    adapter.add_lora(4, 8.0, ("attention", "feed_forward"), 1)
    for name, parameter in adapter.trainable().named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(generator=torch.Generator().manual_seed(2), std=0.1)
    adapter.configure(Model(**settings))
    return adapter


def test_checkpointed_activations_give_the_same_gradients_from_fewer_saved_tensors(flux: Path) -> None:
    plain, all_kept = gradients(with_lora(flux))
    spared, kept = gradients(with_lora(flux, activation_checkpointing=True))
    assert plain.keys() == spared.keys() and len(plain) > 10
    for name, gradient in plain.items():
        torch.testing.assert_close(spared[name], gradient, atol=1e-7, rtol=1e-5)
    assert kept < all_kept / 2


def test_compiled_blocks_are_counted_and_lora_can_be_switched_off(
    tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each block goes through the compiler; the reference is the network without LoRA, which an untrained LoRA equals."""
    seen = []

    def counting(graph: torch.fx.GraphModule, inputs: list) -> object:
        seen.append(graph)
        return graph.forward

    monkeypatch.setattr(execution, "COMPILER", counting)
    torch._dynamo.reset()
    x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.9, 0.4])
    bare = adapter_of(tiny_sd3, "sd3")
    given = bare.encode([Request("a photo", 0, 36, 36)] * 2)
    with torch.no_grad():
        base = bare.predict(x, t, given).value
        tuned = with_lora(tiny_sd3, "sd3").predict(x, t, given).value
        compiled = with_lora(tiny_sd3, "sd3", compile="regional")
        torch.testing.assert_close(compiled.predict(x, t, given).value, tuned, atol=1e-6, rtol=1e-5)
        graphs = len(seen)
        with compiled.lora_off():
            off = compiled.predict(x, t, given).value
        again = compiled.predict(x, t, given).value
        zero_lora(compiled)
        fresh = compiled.predict(x, t, given).value
        with compiled.lora_off():
            reference = compiled.predict(x, t, given).value
    assert graphs >= 1 and len(seen) > graphs  # the block, and the block without LoRA
    torch.testing.assert_close(off, base, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(again, tuned, atol=1e-6, rtol=1e-5)
    # KL at step 0, in its velocity form: exactly 0; with weights that moved, above 0.
    assert float((fresh - reference).square().mean()) == 0 and float((again - off).square().mean()) > 0
    torch._dynamo.reset()


def zero_lora(adapter) -> None:
    for name, parameter in adapter.trainable().named_parameters():
        if "lora_B" in name:
            parameter.data.zero_()


def test_every_family_names_blocks_to_compile(tiny_sd3: Path, tiny_sd15: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(execution, "COMPILER", "eager")
    for folder, family, count in ((tiny_sd3, "sd3", 1), (tiny_sd15, "stable_diffusion", 4)):
        adapter = adapter_of(folder, family)
        names = adapter.repeated_blocks or adapter.network._repeated_blocks
        assert execution.compile_blocks(adapter.network, names) == count
    with pytest.raises(UserError, match=r"model.compile: Linear has no block that repeats; use none"):
        execution.compile_blocks(torch.nn.Linear(1, 1), ())


class Recorder(torch.nn.Module):
    """Stands in for a network whose attention is dispatched, or not."""

    def __init__(self, dispatched: bool, error: Exception | None = None) -> None:
        super().__init__()
        self.block = torch.nn.Module()
        self.block.processor = type("Processor", (), {"_attention_backend": None} if dispatched else {})()
        self.calls: list[str] = []
        self.error = error

    def set_attention_backend(self, name: str) -> None:
        self.calls.append(name)
        if self.error:
            raise self.error

    def enable_xformers_memory_efficient_attention(self) -> None:
        self.set_attention_backend("old xformers")


def test_attention_backends_by_kind_of_network() -> None:
    gpu = torch.device("cuda")
    for backend in ("flash", "flash_varlen", "xformers"):
        new = Recorder(dispatched=True)
        execution.choose_attention(new, backend, gpu)
        assert new.calls == [backend]
    old = Recorder(dispatched=False)
    execution.choose_attention(old, "xformers", gpu)
    assert old.calls == ["old xformers"]
    with pytest.raises(UserError, match="flash would change nothing; use native or xformers"):
        execution.choose_attention(Recorder(dispatched=False), "flash", gpu)
    with pytest.raises(UserError, match=r"model.attention: flash cannot run here: no such package; use native"):
        execution.choose_attention(Recorder(True, RuntimeError("no such package")), "flash", gpu)
    with pytest.raises(UserError, match="runs on a GPU alone, and this run is on cpu"):
        execution.choose_attention(Recorder(dispatched=True), "flash", CPU)


def test_a_real_network_takes_a_backend_and_leaves_the_process_alone(flux: Path) -> None:
    from diffusers.models.attention_dispatch import _AttentionBackendRegistry as Backends

    network, before = adapter_of(flux).network, Backends._active_backend
    execution.choose_attention(network, "_native_math", torch.device("cuda"))
    chosen = {m.processor._attention_backend.value for m in network.modules() if hasattr(m, "processor")}
    assert chosen == {"_native_math"} and Backends._active_backend == before


@pytest.mark.parametrize(
    ("attention", "installed", "says"),
    [
        (
            "flash",
            None,
            "flash needs flash-attn >= 2.6.3, which is not installed; pip install flash-attn, or use native",
        ),
        ("flash", "2.6.2.post1", "flash needs flash-attn >= 2.6.3, and 2.6.2.post1 is installed"),
        ("xformers", None, "xformers needs xformers >= 0.0.29, which is not installed"),
        ("flash", "2.8.3+cu12", ""),
        ("xformers", "0.0.30", ""),
        ("native", None, ""),
    ],
)
def test_a_missing_package_is_named(
    attention: str, installed: str | None, says: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def version(name: str) -> str:
        if installed is None:
            raise metadata.PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(model_settings.metadata, "version", version)
    if not says:
        model_settings.require(Model(attention=attention))
        return
    with pytest.raises(UserError) as caught:
        model_settings.require(Model(attention=attention))
    assert str(caught.value).startswith(f"model.attention: {says}")


def test_tiles_and_slices_reach_the_autoencoder(flux: Path, tiny_sd3: Path) -> None:
    adapter = adapter_of(flux)
    adapter.configure(Model(vae_tiling=True, vae_slicing=True))
    assert adapter.pipe.vae.use_tiling and adapter.pipe.vae.use_slicing
    x0 = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    whole = adapter_of(flux)
    assert not whole.pipe.vae.use_slicing
    torch.testing.assert_close(adapter.decode(x0, requests()[0]), whole.decode(x0, requests()[0]), atol=1e-5, rtol=0)
    with pytest.raises(UserError, match=r"model.vae_tiling: Linear has none; set it to false"):
        execution.divide_work(torch.nn.Linear(1, 1), tiling=True, slicing=False)


def test_freed_encoders_are_gone_and_encode_as_before(flux: Path) -> None:
    asked = requests()
    kept, freed = adapter_of(flux), adapter_of(flux)
    freed.free_text_encoders(asked, size=1)
    assert freed.pipe.text_encoder is None and freed.pipe.text_encoder_2 is None
    for negative in (False, True):
        for name, tensor in kept.encode(asked, negative).tensors.items():
            torch.testing.assert_close(freed.encode(asked, negative).tensors[name], tensor, atol=1e-6, rtol=1e-5)
    with pytest.raises(UserError, match="this prompt was not encoded before: 'a red square'"):
        freed.encode([dataclasses.replace(asked[0], prompt="a red square")])


def test_freed_encoders_of_padded_prompts_encode_as_before(tmp_path: Path) -> None:
    """Prompts of different lengths are padded to the longest of a call, whoever shared the call that encoded them."""
    tiny_families.build_qwen_image().save_pretrained(tmp_path)
    kept, freed = adapter_of(tmp_path, "qwen_image"), adapter_of(tmp_path, "qwen_image")
    asked = requests()
    freed.free_text_encoders(asked, size=2)
    x = torch.randn(2, *kept.latent_shape(asked[0]), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.9, 0.4])
    for rows in (asked, asked[:1], asked[1:]):
        ours, theirs = (a.predict(x[: len(rows)], t[: len(rows)], a.encode(rows)).value for a in (freed, kept))
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
        assert torch.equal(freed.encode(rows).tensors["mask"], kept.encode(rows).tensors["mask"])


def test_prompts_that_main_memory_cannot_hold_are_refused() -> None:
    texts.check_room(10, 2, free=10)
    with pytest.raises(
        UserError, match=r"model.free_text_encoders: 3 encoded prompts take 2.0 GiB .* and 1.0 GiB are free"
    ):
        texts.check_room(2 << 30, 3, free=1 << 30)


def test_a_run_with_freed_encoders_is_the_same_run(tiny_sd3: Path, tmp_path: Path) -> None:
    """One prompt a call on both sides, so that every number is equal."""
    rows = []
    for free in (False, True):
        changes = {
            "batch.groups": 1,
            "batch.group_size": 2,
            "batch.micro_batch": 1,
            "model.free_text_encoders": free,
            "run_dir": str(tmp_path),
        }
        prompts = tmp_path / "prompts.txt"
        prompts.write_text("a photo of a red circle\n")
        config = small_config(tiny_sd3, **changes, **{"data.prompts": str(prompts), "evaluation.prompts": str(prompts)})
        trainer = make(config)
        assert (trainer.adapter.pipe.text_encoder is None) == free
        trainer.iterate()
        rows.append(tensors(trainer.weights.state()))
    assert rows[0].keys() == rows[1].keys()
    assert all(torch.equal(rows[0][name], rows[1][name]) for name in rows[0])


def test_half_precision_gradients_survive_by_their_scale(tiny_sd3: Path) -> None:
    """A loss of 1e-10 leaves no gradient in fp16; scaled within the network it is the one of float32."""
    found = {}
    half = torch.float16
    for name, dtype, scaled in (("fp32", torch.float32, False), ("plain", half, False), ("scaled", half, True)):
        adapter = with_lora(tiny_sd3, "sd3", dtype)
        if scaled:
            LossScale.around(adapter)
        given = adapter.encode([Request("a photo", 0, 36, 36)] * 2)
        x = torch.randn(2, 4, 9, 9, generator=torch.Generator().manual_seed(1)).requires_grad_(True)
        (adapter.predict(x, torch.tensor([0.9, 0.4]), given).value.sum() * 1e-10).backward()
        named = adapter.trainable().named_parameters()
        found[name] = {"x": x.grad, **{n: p.grad for n, p in named if p.grad is not None}}
    flat = {k: torch.cat([g.flatten() for g in v.values()]) for k, v in found.items()}
    assert all(p.dtype == torch.float32 for p in found["scaled"].values())
    assert float(flat["fp32"].abs().max()) > 0 and float(flat["plain"].abs().sum()) == 0
    cosine = torch.nn.functional.cosine_similarity(flat["fp32"] * 1e10, flat["scaled"] * 1e10, dim=0)
    assert float(cosine) > 0.995
    assert 0.98 < float(flat["scaled"].norm() / flat["fp32"].norm()) < 1.02
    true, ours = (found[name]["x"].flatten() * 1e10 for name in ("fp32", "scaled"))
    x_cosine = torch.nn.functional.cosine_similarity(true, ours, dim=0)
    assert float(x_cosine) > 0.99


def test_the_scale_falls_after_an_overflow_and_grows_after_good_updates() -> None:
    scale = LossScale(4.0, growth=2)
    assert [scale.note(finite) for finite in (True, True)] == [False, False] and scale.value == 8
    assert [scale.note(False) for _ in range(4)] == [True, True, True, False] and scale.value == 1
    other = LossScale()
    scale.note(True)
    other.load(scale.state())
    assert (other.value, other.good) == (1.0, 1)


def test_a_run_in_fp16_trains_and_keeps_its_scale(tiny_sd3: Path, tmp_path: Path) -> None:
    config = small_config(tiny_sd3, **{"model.dtype": "fp16", "run_dir": str(tmp_path)})
    trainer = make(config)
    assert trainer.adapter.network.dtype == torch.float16
    before = tensors(trainer.weights.state())
    before = {name: tensor.clone() for name, tensor in before.items()}
    row = trainer.iterate()
    assert row["update/skipped"] == 0 and row["optimizer/grad_norm"] > 0 and row["update/gradient_scale"] == 2.0**16
    assert any(not torch.equal(t, before[name]) for name, t in tensors(trainer.weights.state()).items())
    assert all(p.dtype == torch.float32 for p in trainer.weights.parameters)
    assert trainer.state()["scale"] == {"value": 2.0**16, "good": 1}
