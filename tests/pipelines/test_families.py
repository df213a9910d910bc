"""Every family against its stock pipeline: the grid to the bit, the picture at a guidance, LoRA, and a run of the trainer."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

from flowrl import api, registry
from flowrl.checkpoint import store
from flowrl.dynamics.guidance import guide
from flowrl.errors import UserError
from flowrl.records import Request
from flowrl.rollout.policy import Policy
from flowrl.rollout.sampling import sample
from tests.pipelines.families import FAMILIES, PICTURE, WORDS
from tests.training.helpers import make, small_config

CPU = torch.device("cpu")
PROMPT = "a photo of a red circle"
EVERY = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each family's pipeline, saved as safetensors; to be read only."""
    root = tmp_path_factory.mktemp("families")
    for name, family in FAMILIES.items():
        family.build().save_pretrained(root / name)
    return {name: root / name for name in FAMILIES}


def load(folders: dict[str, Path], name: str):
    return registry.resolve("pipeline", FAMILIES[name].adapter).load(str(folders[name]), torch.float32, CPU)


def ask(name: str, size: int = 0, prompt: str = PROMPT) -> Request:
    family = FAMILIES[name]
    return Request(prompt, 0, *family.sizes[size], family.frames, metadata=family.metadata)


def run_stock(adapter, name: str, size: int, steps: int, latents: torch.Tensor, output: str):
    height, width = FAMILIES[name].sizes[size]
    made = adapter.pipe(
        prompt=PROMPT, num_inference_steps=steps, height=height, width=width, latents=latents, output_type=output,
        return_dict=False, **FAMILIES[name].stock(FAMILIES[name].guidance),
    )  # fmt: skip
    return made[0]


@EVERY
@pytest.mark.parametrize("size", [0, 1])
def test_grid_equals_the_stock_pipeline_to_the_bit(folders: dict[str, Path], name: str, size: int) -> None:
    adapter = load(folders, name)
    ours = {steps: adapter.schedule(steps, ask(name, size)) for steps in (4, 10, 28, 40)}
    for steps, schedule in ours.items():
        x = FAMILIES[name].to_stock(torch.zeros(1, *adapter.latent_shape(ask(name, size))))
        adapter.pipe.scheduler = type(adapter.pipe.scheduler).from_config(adapter.pipe.scheduler.config)
        # The grid is made before the first step: stopping there leaves it as the stock call has it.
        adapter.pipe.scheduler.step = _stop
        with pytest.raises(StopIteration):
            run_stock(adapter, name, size, steps, x, "latent")
        sigmas, times = adapter.pipe.scheduler.sigmas, adapter.pipe.scheduler.timesteps
        if adapter.network_name == "unet":  # sigma over alpha, in the stock scheduler's own scaling
            torch.testing.assert_close(schedule.sigma / schedule.alpha, sigmas, atol=1e-5, rtol=1e-5)
            assert torch.equal((schedule.t[:-1] * 1000).round(), times)
        else:
            assert torch.equal(schedule.sigma, sigmas) and torch.equal(schedule.alpha, 1 - sigmas)
            assert torch.equal(schedule.t[:-1], times / 1000)


def _stop(*args: object, **inputs: object) -> None:
    raise StopIteration


@EVERY
def test_deterministic_sampling_gives_the_stock_picture(folders: dict[str, Path], name: str) -> None:
    adapter, family, request = load(folders, name), FAMILIES[name], ask(name)
    noise = torch.randn(1, *adapter.latent_shape(request), generator=torch.Generator().manual_seed(3))
    policy = Policy(
        adapter, adapter.schedule(5, request), "ode", 0.0, family.guidance, guidance_low=family.guidance_low
    )
    ours = sample(policy, policy.encode([request]), noise)
    stock = adapter.pipe.scheduler
    start = family.to_stock(noise)
    if (
        adapter.network_name == "unet"
    ):  # Euler's latents are scaled by 1 / alpha, and the stock call scales its own noise
        stock.set_timesteps(5)
        start = start * (stock.sigmas[0] ** 2 + 1) ** 0.5 / stock.init_noise_sigma
    torch.testing.assert_close(
        family.to_stock(ours), run_stock(adapter, name, 0, 5, start, "latent"), atol=5e-5, rtol=1e-4
    )
    picture = run_stock(adapter, name, 0, 5, start, "pt")
    if picture.ndim == 5:
        picture = picture.transpose(1, 2)  # frames first in the stock video
    torch.testing.assert_close(adapter.decode(ours, request), picture, atol=1e-4, rtol=0)


@EVERY
def test_another_guidance_gives_another_picture(folders: dict[str, Path], name: str) -> None:
    """The parity above could not fail where the scale were ignored on both sides."""
    if name == "flux_schnell":
        pytest.skip("schnell has no guidance")
    adapter, request = load(folders, name), ask(name)
    noise = torch.randn(1, *adapter.latent_shape(request), generator=torch.Generator().manual_seed(3))
    made = []
    for scale in (2.0, FAMILIES[name].guidance):
        policy = Policy(adapter, adapter.schedule(3, request), "ode", 0.0, scale)
        made.append(sample(policy, policy.encode([request]), noise))
    assert float((made[0] - made[1]).abs().max()) > 1e-3


@EVERY
def test_a_run_exports_a_lora_that_the_stock_pipeline_loads(
    folders: dict[str, Path], name: str, tmp_path: Path
) -> None:
    """Two iterations train; the exported LoRA in a stock pipeline predicts what the averaged policy predicts."""
    family = FAMILIES[name]
    config = small_config(folders[name], run_dir=str(tmp_path / "run"), iterations=2, **{
        "model.adapter": family.adapter, "model.height": family.sizes[0][0], "model.width": family.sizes[0][1],
        "model.frames": family.frames, "ema.decay": 0.5, "optimizer.lr": 0.05, "rollout.guidance": family.guidance,
        "rollout.guidance_low": family.guidance_low, "rollout.kernel.name": "ddim" if name == "sdxl" else "flow_sde",
        "rollout.kernel.noise": 0.7, "rollout.window.first": 1, "batch.group_size": 3, "batch.micro_batch": 3,
        "evaluation.count": 1, "data.prompts": str(_prompts(tmp_path)), "evaluation.prompts": str(_prompts(tmp_path)),
        "rewards": [{"name": "tests.pipelines.test_families:redness"}],
    })  # fmt: skip
    api.train(config)
    trainer = make(config)
    trainer.load_state(store.load(tmp_path / "run" / "checkpoints").state)
    fresh = load(folders, name)
    request = ask(name)
    x = torch.randn(2, *fresh.latent_shape(request), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.95, 0.3])

    def predicted(adapter) -> torch.Tensor:
        policy = Policy(adapter, adapter.schedule(4, request), "ode", 0.0, family.guidance)
        with torch.no_grad():
            return adapter.predict(x, t, policy.encode([request, request]).positive).value

    plain = predicted(fresh)
    fresh.pipe.load_lora_weights(str(tmp_path / "run" / "export"))
    if name == "wan_two_experts":
        second = str(tmp_path / "run" / "export" / "transformer_2")
        fresh.pipe.load_lora_weights(second, load_into_transformer_2=True)
    with trainer.weights.averaged():
        ours = predicted(trainer.adapter)
    assert float((plain - ours).abs().max()) > 1e-3
    torch.testing.assert_close(predicted(fresh), ours, atol=1e-5, rtol=1e-4)
    own = load(folders, name)
    own.load_lora(str(tmp_path / "run" / "export"))
    torch.testing.assert_close(predicted(own), ours, atol=1e-5, rtol=1e-4)


def _prompts(folder: Path) -> Path:
    """Two prompts with a picture beside the file, which families that start from none leave alone."""
    Image.fromarray(PICTURE).save(folder / "source.png")
    file = folder / "prompts.jsonl"
    rows = [{"prompt": text, "image": "source.png"} for text in ("a photo of a red circle", "a blue square")]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return file


def redness(images, prompts):
    """The mean of the red channel of pictures [B, H, W, 3] or videos [B, F, H, W, 3]."""
    return images[..., 0].reshape(len(images), -1).mean(1) / 255.0


redness.media = frozenset({"image", "video"})


def test_two_experts_split_a_batch_by_time(folders: dict[str, Path]) -> None:
    """A batch of times on both sides of the boundary equals each sample alone, and each expert gets its own gradient."""
    adapter, request = load(folders, "wan_two_experts"), ask("wan_two_experts")
    given = adapter.encode([request] * 3)
    x = torch.randn(3, *adapter.latent_shape(request), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([0.95, 0.875, 0.5])
    adapter.trainable().requires_grad_(True)
    whole = adapter.predict(x, t, given).value
    alone = [adapter.predict(x[k : k + 1], t[k : k + 1], given[slice(k, k + 1)]).value for k in range(3)]
    torch.testing.assert_close(whole, torch.cat(alone), atol=1e-6, rtol=1e-5)
    other = adapter.pipe.transformer_2(x[:1], torch.tensor([950.0]), given.tensors["hidden"][:1], return_dict=False)[0]
    assert float((other - whole[:1]).abs().max()) > 1e-3
    whole[2].sum().backward()
    high, low = adapter.pipe.transformer, adapter.pipe.transformer_2
    assert any(p.grad is not None and bool(p.grad.any()) for p in low.parameters())
    assert not any(p.grad is not None and bool(p.grad.any()) for p in high.parameters())


def test_a_second_scale_needs_a_second_range(folders: dict[str, Path]) -> None:
    adapter = load(folders, "wan")
    with pytest.raises(UserError, match="guidance_low"):
        Policy(adapter, adapter.schedule(4, ask("wan")), "ode", 0.0, 4.0, guidance_low=3.0)


def test_qwen_guides_token_by_token(folders: dict[str, Path]) -> None:
    adapter, request = load(folders, "qwen_image"), ask("qwen_image")
    policy = Policy(adapter, adapter.schedule(4, request), "ode", 0.0, 4.0)
    prompted = policy.encode([request])
    x = torch.randn(1, *adapter.latent_shape(request), generator=torch.Generator().manual_seed(1))
    step = torch.tensor([1])
    t = policy.schedule.t[step]
    both = [adapter.predict(x, t, given).value for given in (prompted.positive, prompted.negative)]
    assert torch.equal(policy.predict(x, step, prompted).value, guide(*both, 4.0, "norm_preserving"))


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("flux_dev", {"height": 18}, "model.height: 18 is not a multiple of 4, which this model needs; use 16"),
        ("qwen_image", {"width": 30}, "model.width: 30 is not a multiple of 8, which this model needs; use 32"),
        ("wan", {"height": 20}, "model.height: 20 is not a multiple of 8, which this model needs; use 16"),
        ("wan", {"frames": 6}, "model.frames: 6 is not a multiple of 4 plus 1; use 5"),
    ],
)
def test_sizes_that_do_not_fit(folders: dict[str, Path], name: str, change: dict, says: str) -> None:
    import dataclasses

    with pytest.raises(UserError, match=says):
        load(folders, name).latent_shape(dataclasses.replace(ask(name), **change))


@pytest.mark.parametrize("name", ["flux_dev", "wan", "sdxl"])
def test_a_prompt_that_would_be_cut_is_refused(folders: dict[str, Path], name: str) -> None:
    with pytest.raises(UserError, match="longer than the 12 that the text encoder takes"):
        load(folders, name).encode([ask(name, prompt=" ".join(WORDS * 2))])


def test_embedded_is_refused_where_there_is_none() -> None:
    with pytest.raises(UserError, match="ships no embedded model"):
        registry.resolve("pipeline", "flux").load("embedded", torch.float32, CPU)


@EVERY
def test_decode_of_encode_has_the_shape_of_the_request(folders: dict[str, Path], name: str) -> None:
    adapter, request = load(folders, name), ask(name)
    shape = (
        (2, 3, request.height, request.width)
        if request.frames == 1
        else (2, 3, request.frames, request.height, request.width)
    )
    x0 = adapter.encode_media(torch.rand(*shape), request)
    assert x0.shape[1:] == adapter.latent_shape(request)
    image = adapter.decode(x0, request)
    assert image.shape == shape and 0 <= float(image.min()) and float(image.max()) <= 1
