"""Wan image-to-video: the first frame is given, as latents and a mask beside those that are denoised."""

from __future__ import annotations

from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

import torch
from flowrl.pipelines.base import source_pictures
from flowrl.pipelines.latent_statistics import standardise
from flowrl.pipelines.wan import WanAdapter

from flowrl.errors import UserError
from flowrl.records import Conditioning, Request


class WanImageAdapter(WanAdapter):
    """As Wan, with the first frame of each row (metadata "image") in the conditioning.

    Where the network has an input for it (2.1), the frame's CLIP features are in the conditioning too.
    """

    pipeline_name = "WanImageToVideoPipeline"
    embedded_name = ""

    def __init__(self, pipe: Any) -> None:
        if find_spec("ftfy") is None:
            raise UserError("model.adapter: wan_image needs the package ftfy, which diffusers cleans prompts with; "
                            "pip install 'flowrl[wan]'")  # fmt: skip
        super().__init__(pipe)
        self.sees_picture = pipe.transformer.config.image_dim is not None

    @torch.no_grad()
    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        text = super().encode(requests, negative)
        pictures = source_pictures(requests).to(self.device)
        given = {**text.tensors, "first": self._first_frame(pictures, requests[0])}
        if self.sees_picture:
            from PIL import Image

            shown = (pictures.movedim(1, -1) * 255).round().to(torch.uint8).cpu().numpy()
            seen = self.pipe.encode_image([Image.fromarray(picture) for picture in shown], self.device)
            given["seen"] = seen
        return Conditioning(given)

    def _first_frame(self, pictures: torch.Tensor, request: Request) -> torch.Tensor:
        """Mask and latents of a video whose frames after the first are grey: [B, 4 + C, F', H, W]."""
        vae, per = self.pipe.vae, self.pipe.vae_scale_factor_temporal
        video = torch.zeros(len(pictures), 3, request.frames, *pictures.shape[2:], device=pictures.device)
        video[:, :, 0] = pictures * 2 - 1
        latents = standardise(vae, vae.encode(video.to(vae.dtype)).latent_dist.mode().float())
        # One flag a frame, the first frame's four times over, so that they fold into the latent frames.
        mask = torch.zeros(len(pictures), per, *latents.shape[2:], device=pictures.device)
        mask[:, :, 0] = 1
        return torch.cat([mask, latents], 1)

    def _input(self, x: torch.Tensor, conditioning: Conditioning) -> torch.Tensor:
        return torch.cat([x, conditioning.tensors["first"].to(x)], 1)

    def _pictures(self, conditioning: Conditioning) -> dict[str, torch.Tensor]:
        seen = conditioning.tensors.get("seen")
        return {} if seen is None else {"encoder_hidden_states_image": seen.to(self.network.dtype)}
