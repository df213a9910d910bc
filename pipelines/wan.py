"""Wan 2.1 and 2.2 text-to-video: a rectified-flow transformer over frames; 2.2 has one expert for much noise, one for little."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from flowrl.pipelines.base import DiffusersAdapter, Geometry
from flowrl.pipelines.latent_statistics import standardise, unstandardise
from flowrl.pipelines.packing import flow_schedule
from flowrl.pipelines.texts import Encoded

from flowrl.errors import UserError
from flowrl.records import Conditioning, Prediction, Request, Schedule

_ATTENTION = tuple(f"{layer}.{name}" for layer in ("attn1", "attn2") for name in ("to_q", "to_k", "to_v", "to_out.0"))
TEXT_LENGTH = 226


class Experts(torch.nn.Module):
    """Two networks of one shape under one roof; each sample goes to the one that its time belongs to.

    boundary: time in [0, 1] from which on a sample is the first one's.
    """

    def __init__(self, high: torch.nn.Module, low: torch.nn.Module, boundary: float) -> None:
        super().__init__()
        self.transformer, self.transformer_2, self.boundary = high, low, boundary

    @property
    def dtype(self) -> torch.dtype:
        return self.transformer.dtype  # type: ignore[return-value]

    def forward(
        self,
        hidden_states: torch.Tensor,
        timestep: torch.Tensor,
        encoder_hidden_states: torch.Tensor,
        total: float,
        encoder_hidden_states_image: torch.Tensor | None = None,
        return_dict: bool = False,
    ) -> tuple[torch.Tensor]:
        """As one network's; total: what a time of 1 is in ``timestep``."""
        given = (hidden_states, timestep, encoder_hidden_states, encoder_hidden_states_image)
        high = timestep >= self.boundary * total
        if bool(high.all()) or not bool(high.any()):
            chosen = self.transformer if bool(high[0]) else self.transformer_2
            return chosen(*given, return_dict=False)  # type: ignore[no-any-return]
        whole: torch.Tensor | None = None
        for network, rows in ((self.transformer, high), (self.transformer_2, ~high)):
            value = network(*(None if x is None else x[rows] for x in given), return_dict=False)[0]
            if whole is None:
                whole = value.new_zeros(len(rows), *value.shape[1:])
            whole = whole.index_put((rows.nonzero().flatten(),), value)
        return (whole,)  # type: ignore[return-value]


class WanAdapter(DiffusersAdapter):
    """Velocity prediction on [C, F', H / f, W / f] latents of (frames - 1) / 4 + 1 = F' latent frames."""

    pipeline_name = "WanPipeline"
    embedded_name = "embedded_wan"
    network_name = "transformer"
    target_groups = {  # noqa: RUF012 - typed in the base class
        "attention": _ATTENTION,
        "feed_forward": ("ffn.net.0.proj", "ffn.net.2"),
    }

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if pipe.config.expand_timesteps:
            raise UserError(
                "model.path: this is Wan 2.2's 5B model with a time a token, which flowrl does not drive yet"
            )
        if pipe.config.boundary_ratio is not None:
            if pipe.transformer is None or pipe.transformer_2 is None:
                raise UserError(
                    "model.path: the checkpoint states an expert boundary but holds one expert; give the whole one"
                )
            self.guidance_boundary = pipe.config.boundary_ratio
            self.network = Experts(pipe.transformer, pipe.transformer_2, pipe.config.boundary_ratio)

    @classmethod
    def geometry_of(cls, vae: Mapping[str, Any], network: Mapping[str, Any]) -> Geometry:
        patch = network.get("patch_size", (1, 2, 2))[1]
        return Geometry(
            vae.get("z_dim", 16), vae.get("scale_factor_spatial", 8), patch, vae.get("scale_factor_temporal", 4)
        )

    @classmethod
    def latent_of(cls, geometry: Geometry, request: Request) -> tuple[int, ...]:
        return (geometry.channels, geometry.latent_frames(request), *geometry.sides(request))

    @classmethod
    def network_names(cls, parts: Sequence[str]) -> tuple[str, ...]:
        return tuple(name for name in ("transformer", "transformer_2") if name in parts)

    @property
    def networks(self) -> list[Any]:
        return [network for _, network in self.experts]

    @property
    def experts(self) -> list[tuple[str, torch.nn.Module]]:
        """(name in the pipeline, network): one, or the two of 2.2."""
        names = ("transformer", "transformer_2") if isinstance(self.network, Experts) else ("transformer",)
        return [(name, getattr(self.pipe, name)) for name in names]

    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        (hidden,) = self.encoded(requests, negative)
        return Conditioning({"hidden": hidden})

    @classmethod
    def text_limits(cls, tokenizers: Mapping[str, Any]) -> Mapping[str, int]:
        return {"tokenizer": min(TEXT_LENGTH, tokenizers["tokenizer"].model_max_length)}

    def encode_texts(self, texts: list[str]) -> Encoded:
        length = min(TEXT_LENGTH, self.pipe.tokenizer.model_max_length)
        hidden, _ = self.pipe.encode_prompt(
            texts, do_classifier_free_guidance=False, device=self.device, max_sequence_length=length
        )
        return (hidden,)

    def schedule(self, steps: int, request: Request) -> Schedule:
        scheduler = type(self.pipe.scheduler).from_config(self.pipe.scheduler.config)
        scheduler.set_timesteps(steps, device="cpu")
        return flow_schedule(scheduler)

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, features: Sequence[str] = ()
    ) -> Prediction:
        total = self.pipe.scheduler.config.num_train_timesteps
        # A multi-step scheduler rounds its times down to whole numbers; the grid holds them over the total.
        time = t * total
        time = torch.where((time - time.round()).abs() < 1e-3, time.round(), time)
        extra = {"total": total} if isinstance(self.network, Experts) else {}
        with self.precision(), self.tapped(features) as found:
            value = self.network(
                hidden_states=self._input(x, conditioning).to(self.network.dtype),
                timestep=time,
                encoder_hidden_states=conditioning.tensors["hidden"].to(self.network.dtype),
                return_dict=False,
                **self._pictures(conditioning),
                **extra,
            )[0]
        return Prediction(value.float(), "velocity", found)

    def _input(self, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return x

    def _pictures(self, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        return {}

    def decode(self, x0: torch.Tensor, request: Request) -> torch.Tensor:
        """Latents [B, C, F', H, W] to float32 [B, 3, F, H, W] in [0, 1]."""
        vae = self.pipe.vae
        with torch.set_grad_enabled(x0.requires_grad):
            video = vae.decode(unstandardise(vae, x0).to(vae.dtype), return_dict=False)[0].float()
        return (video / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_media(self, media: torch.Tensor, request: Request) -> torch.Tensor:
        """float32 [B, 3, F, H, W] in [0, 1] to latents."""
        vae = self.pipe.vae
        return standardise(vae, vae.encode((media * 2 - 1).to(vae.dtype)).latent_dist.mode().float())

    def add_lora(self, rank: int, alpha: float, groups: Sequence[str], seed: int) -> None:
        from flowrl.pipelines.lora import add_lora

        endings = self.endings(groups)
        for number, (_, network) in enumerate(self.experts):
            add_lora(network, rank, alpha, endings, seed + number)
        self.has_lora = True

    @contextmanager
    def lora_off(self) -> Iterator[None]:  # type: ignore[override]
        from flowrl.pipelines.lora import lora_off

        with ExitStack() as off:
            for _, network in self.experts:
                off.enter_context(lora_off(network))
            yield

    def load_lora(self, folder: str) -> None:
        from flowrl.pipelines.lora import load_lora

        super().load_lora(folder)
        if isinstance(self.network, Experts):
            load_lora(self.pipe, f"{folder}/transformer_2", {"load_into_transformer_2": True})

    def export(self, folder: str) -> None:
        from flowrl.pipelines.lora import save_lora

        if self.has_lora:
            # Two files of one layout; load_lora_weights takes the second with load_into_transformer_2=True.
            for name, network in self.experts:
                place = folder if name == "transformer" else f"{folder}/{name}"
                save_lora(type(self.pipe), "transformer", network, place)
            return
        for name, network in self.experts:
            network.save_pretrained(f"{folder}/{name}", safe_serialization=True)  # type: ignore[operator]
