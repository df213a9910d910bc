"""Qwen-Image: a rectified-flow transformer over 2 x 2 patches, with prompts encoded by a language model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from flowrl.pipelines.base import DiffusersAdapter, Geometry
from flowrl.pipelines.latent_statistics import standardise, unstandardise
from flowrl.pipelines.packing import pack, shifted_schedule, unpack
from flowrl.pipelines.texts import Encoded

from flowrl.records import Conditioning, Prediction, Request, Schedule

_ATTENTION = ("attn.to_q", "attn.to_k", "attn.to_v", "attn.to_out.0", "attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj",
              "attn.to_add_out")  # fmt: skip
_FEED_FORWARD = ("img_mlp.net.0.proj", "img_mlp.net.2", "txt_mlp.net.0.proj", "txt_mlp.net.2")
TEXT_LENGTH = 1024


class QwenImageAdapter(DiffusersAdapter):
    """Velocity prediction on packed latents [S, 4 C]: guidance keeps the norm of each token, so tokens stay tokens.

    Prompts of one call are padded to its longest, at most TEXT_LENGTH tokens, with their mask beside them.
    """

    guidance_rule = "norm_preserving"
    pipeline_name = "QwenImagePipeline"
    network_name = "transformer"
    target_groups = {"attention": _ATTENTION, "feed_forward": _FEED_FORWARD}  # noqa: RUF012 - typed in the base class
    pixel_multiple = 2

    @classmethod
    def geometry_of(cls, vae: Mapping[str, Any], network: Mapping[str, Any]) -> Geometry:
        halvings = len(vae.get("temperal_downsample", (False, True, True)))
        return Geometry(vae.get("z_dim", 16), 2**halvings, cls.pixel_multiple)

    def text_of(self, request: Request, negative: bool) -> str:
        # The stock pipeline reads an absent negative prompt as none at all; guidance needs one, and a blank is the custom.
        return (request.negative or " ") if negative else request.prompt

    @classmethod
    def text_limits(cls, tokenizers: Mapping[str, Any]) -> Mapping[str, int]:
        return {"tokenizer": TEXT_LENGTH}

    def encode_texts(self, texts: list[str]) -> Encoded:
        hidden, mask = self.pipe.encode_prompt(texts, device=self.device, max_sequence_length=TEXT_LENGTH)
        if mask is None:
            mask = torch.ones(hidden.shape[:2], dtype=torch.long, device=hidden.device)
        return hidden, mask

    @staticmethod
    def split_texts(encoded: Encoded, number: int) -> Encoded:
        hidden, mask = encoded
        length = int(mask[number].sum())  # what follows is padding up to the longest of the call
        return hidden[number : number + 1, :length], mask[number : number + 1, :length]

    def join_texts(self, rows: Sequence[Encoded]) -> Encoded:
        longest = max(mask.shape[1] for _, mask in rows)
        hidden = [F.pad(h, (0, 0, 0, longest - h.shape[1])) for h, _ in rows]
        mask = [F.pad(m, (0, longest - m.shape[1])) for _, m in rows]
        return torch.cat(hidden), torch.cat(mask)

    @torch.no_grad()
    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        hidden, mask = self.encoded(requests, negative)
        grid = torch.tensor([self._grid(r) for r in requests], device=hidden.device)
        return Conditioning({"hidden": hidden, "mask": mask, "grid": grid})

    def _grid(self, request: Request) -> tuple[int, int]:
        """Rows and columns of tokens."""
        factor = 2 * self.geometry.factor
        return request.height // factor, request.width // factor

    @classmethod
    def latent_of(cls, geometry: Geometry, request: Request) -> tuple[int, ...]:
        height, width = geometry.sides(request)
        return ((height // 2) * (width // 2), 4 * geometry.channels)

    def schedule(self, steps: int, request: Request) -> Schedule:
        return shifted_schedule(self.pipe.scheduler, steps, self.latent_shape(request)[0])

    def predict(
        self, x: torch.Tensor, t: torch.Tensor, conditioning: Conditioning, features: Sequence[str] = ()
    ) -> Prediction:
        dtype, given = self.network.dtype, conditioning.tensors
        mask = given["mask"]
        length = int(mask.sum(1).max())  # columns that are padding for all rows cost attention and mean nothing
        with self.precision(), self.tapped(features) as kept:
            value = self.network(
                hidden_states=x.to(dtype),
                timestep=t,
                guidance=None,
                encoder_hidden_states_mask=None if bool(mask[:, :length].all()) else mask[:, :length],
                encoder_hidden_states=given["hidden"][:, :length].to(dtype),
                img_shapes=[[(1, int(rows), int(columns))] for rows, columns in given["grid"].tolist()],
                return_dict=False,
            )[0]
        return Prediction(value.float(), "velocity", kept)

    def decode(self, x0: torch.Tensor, request: Request) -> torch.Tensor:
        vae = self.pipe.vae
        latents = unstandardise(vae, unpack(x0, self.spatial_shape(request)).unsqueeze(2))
        with torch.set_grad_enabled(x0.requires_grad):
            image = vae.decode(latents.to(vae.dtype), return_dict=False)[0][:, :, 0].float()
        return (image / 2 + 0.5).clamp(0, 1)

    @torch.no_grad()
    def encode_media(self, media: torch.Tensor, request: Request) -> torch.Tensor:
        vae = self.pipe.vae
        latents = vae.encode((media * 2 - 1).unsqueeze(2).to(vae.dtype)).latent_dist.mode().float()
        return pack(standardise(vae, latents)[:, :, 0])
