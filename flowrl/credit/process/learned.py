"""Process rewards that were trained on latents: a small network, and a head on hidden states of a generator. No decoding."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from flowrl.credit.networks import FeatureHead, LatentNetwork, noise_level, pooled_text
from flowrl.credit.process.context import ProcessContext
from flowrl.credit.process.storage import Card, load_model
from flowrl.errors import UserError
from flowrl.records import Conditioning, ProcessScore, Prompted


def calibrated(output: Tensor, t: Tensor, card: Card) -> Tensor:
    """Turn a network's output into a value: ``output / temperature + offset`` of its noise level. float32 [B]."""
    level = noise_level(t, card.levels).to(output.device)
    temperature, offset = (torch.tensor(list(v), device=output.device)[level] for v in (card.temperature, card.offset))
    return output.float() / temperature + offset


def _load(path: str, kind: str) -> tuple[LatentNetwork | FeatureHead, Card]:
    module, card = load_model(Path(path))
    if card.kind != kind:
        raise UserError(f"{path}: holds a process reward of kind {card.kind!r}; name it in process as {card.kind}")
    return module, card


class LatentReward:
    """A `LatentNetwork` that reads latent, time and pooled text. path: a folder of scripts/train_reward_model.py."""

    differentiable = True

    def __init__(self, *, path: str) -> None:
        module, self.card = _load(path, "latent")
        if not isinstance(module, LatentNetwork):
            raise UserError(f"{path}: not a latent network")
        self.network = module

    def bind(self, context: ProcessContext) -> None:
        self.network.to(context.adapter.device)

    def score(self, x: Tensor, t: Tensor, prompted: Prompted) -> ProcessScore:
        """See ProcessReward. The gradient reaches x."""
        values = calibrated(self.network(x, t, pooled_text(prompted.positive))[:, 0], t, self.card)
        return ProcessScore(values, values.detach().isfinite())


class FeatureReward:
    """A `FeatureHead` on hidden states of the generator, as it was before training: one network call a latent.

    path: a folder of scripts/train_reward_model.py. The call is of the positive branch alone, without guidance.
    """

    differentiable = True

    def __init__(self, *, path: str) -> None:
        module, self.card = _load(path, "features")
        if not isinstance(module, FeatureHead):
            raise UserError(f"{path}: not a head on features")
        self.head = module
        self.context: ProcessContext | None = None

    def bind(self, context: ProcessContext) -> None:
        self.head.to(context.adapter.device)
        self.context = context

    def score(self, x: Tensor, t: Tensor, prompted: Prompted) -> ProcessScore:
        """See ProcessReward. The gradient reaches x, to first order; none reaches the generator's weights."""
        if self.context is None:
            raise ValueError("features: this process reward serves no run yet; call bind first")
        wanted = x.requires_grad and torch.is_grad_enabled()
        point = x.detach().requires_grad_(wanted)
        # The reference may swap weights in place, so the backward is done before they are swapped back.
        with self.context.reference(), torch.set_grad_enabled(wanted):
            taps = taps_of(self.context.adapter.predict, point, t, prompted.positive, self.card.features)
            values = calibrated(self.head(taps, t, pooled_text(prompted.positive))[:, 0], t, self.card)
            gradient = torch.autograd.grad(values.sum(), point)[0] if wanted else None
        values = values.detach()
        valid = values.isfinite()
        if gradient is not None:
            values = values + ((x - x.detach()) * gradient).flatten(1).sum(1)
        return ProcessScore(values, valid)


def taps_of(
    predict: Callable[..., object], x: Tensor, t: Tensor, conditioning: Conditioning, names: Sequence[str]
) -> list[Tensor]:
    """Hidden states of the named modules, in order, by one network call. predict: an adapter's."""
    found = vars(predict(x, t, conditioning, features=tuple(names)))["features"]
    return [found[name] for name in names]
