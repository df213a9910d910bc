"""A trained process reward on disk: model.safetensors for its weights, model.json for everything else."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from flowrl.credit.networks import FeatureHead, LatentNetwork, module_bytes
from flowrl.errors import UserError

FORMAT = "flowrl process reward 1"
Kind = Literal["latent", "features"]


@dataclass(frozen=True)
class Card:
    """What stands beside the weights. kind: latent (a `LatentNetwork`) or features (a `FeatureHead`); network: what its
    class is made with; features: modules of the generator that a head reads; levels: parts of [0, 1] that t falls into;
    temperature, offset: of each level, the value is ``output / temperature + offset``; quality: the report of each level
    on held-out groups; facts: how it was trained.
    """

    kind: Kind
    network: Mapping[str, Any]
    levels: int
    temperature: Sequence[float]
    offset: Sequence[float]
    features: Sequence[str] = ()
    quality: Sequence[Mapping[str, Any]] = ()
    facts: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.kind not in ("latent", "features"):
            raise ValueError(f"kind: expected latent or features, got {self.kind!r}")
        if self.levels < 1 or len(self.temperature) != self.levels or len(self.offset) != self.levels:
            raise ValueError(f"levels: {self.levels} levels need as many temperatures and offsets")
        if not all(math.isfinite(v) and v > 0 for v in self.temperature) or not all(map(math.isfinite, self.offset)):
            raise ValueError("temperature, offset: expected finite numbers, temperatures above 0")


def make_network(kind: Kind, network: Mapping[str, Any]) -> LatentNetwork | FeatureHead:
    """Build the untrained network of a card."""
    return LatentNetwork(**network) if kind == "latent" else FeatureHead(**network)


def save_model(folder: Path, module: nn.Module, card: Card) -> None:
    """Write both files; the card last and whole, so that a folder with a card has its weights."""
    folder.mkdir(parents=True, exist_ok=True)
    weights: dict[str, Tensor] = {
        name: value.detach().cpu().contiguous() for name, value in module.state_dict().items()
    }
    save_file(weights, folder / "model.safetensors")
    draft = folder / "model.json.part"
    draft.write_text(json.dumps({"format": FORMAT, **asdict(card)}, indent=1, allow_nan=False), encoding="utf-8")
    os.replace(draft, folder / "model.json")


def read_card(folder: Path) -> Card:
    """Read model.json. Raises UserError where there is none, or it is not a card."""
    file = folder / "model.json"
    if not file.is_file():
        raise UserError(f"{folder}: no model.json there; scripts/train_reward_model.py makes such a folder")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(found, dict) or found.pop("format", None) != FORMAT:
            raise UserError(f"{file}: not a {FORMAT!r}")
        return Card(**found)
    except (TypeError, ValueError) as error:
        raise UserError(f"{file}: cannot be read as a process reward: {error}") from error


def held_bytes(path: str | Path) -> int:
    """Bytes that the trained process reward of a folder takes once it is loaded, from its card alone; errors of `read_card`."""
    card = read_card(Path(path))
    with torch.device("meta"):
        return module_bytes(make_network(card.kind, card.network))


def load_model(folder: Path) -> tuple[LatentNetwork | FeatureHead, Card]:
    """Read a trained process reward, frozen. Raises UserError where a file is missing, damaged or does not fit the card."""
    card = read_card(folder)
    try:
        module = make_network(card.kind, card.network)
        module.load_state_dict(load_file(folder / "model.safetensors"))
    except (OSError, RuntimeError, TypeError, ValueError, SafetensorError) as error:
        raise UserError(f"{folder}: the weights cannot be loaded: {error}") from error
    return module.eval().requires_grad_(False), card
