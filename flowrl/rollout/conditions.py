"""A new condition for a pre-trained model (CTRL, 2406.12120): class vectors that start at zero, beside its prompt.

The vectors of the asked classes are added to one of the adapter's conditioning tensors. They start at zero, and LoRA does
too, so an untrained condition changes nothing, bit for bit. A request without classes never meets vectors or LoRA: it is
the pre-trained model for good. Classes of several attributes add up.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from flowrl.data.conditions import NULL, classes_of
from flowrl.errors import UserError
from flowrl.protocols import GuidanceRule, PipelineAdapter
from flowrl.records import Conditioning, Prediction, Request, Schedule

KEY = "condition"


class ClassVectors(nn.Module):
    """One vector a class of each attribute, all zero at first. width: of the conditioning tensor that they are added to."""

    def __init__(self, attributes: Mapping[str, int], width: int) -> None:
        super().__init__()
        self.tables = nn.ParameterList([nn.Parameter(torch.zeros(count, width)) for count in attributes.values()])

    def forward(self, classes: Tensor) -> Tensor:
        """int64 [B, attributes], NULL for none, to float32 [B, width]: the sum over attributes."""
        total = torch.zeros(len(classes), self.tables[0].shape[1], device=classes.device)
        for table, asked in zip(self.tables, classes.unbind(1), strict=True):
            # The null class is no parameter: it stays zero whatever is trained.
            total = total + torch.where((asked == NULL)[:, None], 0.0, table[asked.clamp(min=0)])
        return total


class Conditioned:
    """An adapter with a new condition. Requests ask for it by metadata, ``condition: {attribute: class}``.

    The negative branch of guidance asks for no class, so guidance also leads towards the classes. The
    inner adapter must have LoRA, which is left out where no class is asked for.
    """

    def __init__(self, inner: PipelineAdapter, attributes: Mapping[str, int], tensor: str) -> None:
        self.inner, self.attributes, self.tensor = inner, dict(attributes), tensor
        found = inner.encode([Request("", -1, 0, 0)]).tensors
        if tensor not in found:
            raise UserError(f"condition.tensor: this model has no {tensor!r}; use one of {', '.join(found)}")
        self.vectors = ClassVectors(attributes, found[tensor].shape[-1]).to(inner.device)
        inner.trainable().add_module("condition_vectors", self.vectors)
        self.guidance_rule: GuidanceRule = inner.guidance_rule
        self.guidance_boundary: float | None = inner.guidance_boundary
        self.device: torch.device = inner.device
        self._off = False

    def encode(self, requests: Sequence[Request], negative: bool = False) -> Conditioning:
        found = self.inner.encode(requests, negative)
        none = [NULL] * len(self.attributes)
        rows = [none if negative else classes_of(request, self.attributes) for request in requests]
        return Conditioning({**found.tensors, KEY: torch.tensor(rows, device=self.device)})

    def predict(self, x: Tensor, t: Tensor, conditioning: Conditioning, features: Sequence[str] = ()) -> Prediction:
        tensors = dict(conditioning.tensors)
        classes = tensors.pop(KEY)
        plain = Conditioning(tensors)
        asking = (classes != NULL).any(1)
        if self._off or not bool(asking.any()):
            with self.inner.lora_off():
                return self.inner.predict(x, t, plain, features)
        if bool(asking.all()):
            return self.inner.predict(x, t, self._added(plain, classes), features)
        return self._mixed(x, t, plain, classes, asking, features)

    def _mixed(
        self, x: Tensor, t: Tensor, plain: Conditioning, classes: Tensor, asking: Tensor, features: Sequence[str]
    ) -> Prediction:
        """Rows that ask for a class and rows that do not, by a call each."""
        yes, no = asking.nonzero().flatten(), (~asking).nonzero().flatten()
        with self.inner.lora_off():
            base = self.inner.predict(x[no], t[no], plain[no], features)
        tuned = self.inner.predict(x[yes], t[yes], self._added(plain[yes], classes[yes]), features)
        order = torch.cat([yes, no]).argsort()

        def joined(a: Tensor, b: Tensor) -> Tensor:
            return torch.cat([a, b])[order]

        hidden = {name: joined(tuned.features[name], base.features[name]) for name in tuned.features}
        return replace(tuned, value=joined(tuned.value, base.value), features=hidden)

    def _added(self, plain: Conditioning, classes: Tensor) -> Conditioning:
        held = plain.tensors[self.tensor]
        vectors = self.vectors(classes).to(held.dtype)
        moved = held + vectors.reshape(len(held), *[1] * (held.ndim - 2), -1)
        return Conditioning({**plain.tensors, self.tensor: moved})

    @contextmanager
    def lora_off(self) -> Iterator[None]:
        """Within the block the model is the pre-trained one, whatever is asked for."""
        before, self._off = self._off, True
        try:
            yield
        finally:
            self._off = before

    def latent_shape(self, request: Request) -> tuple[int, ...]:
        return self.inner.latent_shape(request)

    def schedule(self, steps: int, request: Request) -> Schedule:
        return self.inner.schedule(steps, request)

    def decode(self, x0: Tensor, request: Request) -> Tensor:
        return self.inner.decode(x0, request)

    def encode_media(self, media: Tensor, request: Request) -> Tensor:
        return self.inner.encode_media(media, request)

    def trainable(self) -> nn.Module:
        return self.inner.trainable()

    def add_lora(self, rank: int, alpha: float, groups: Sequence[str], seed: int) -> None:
        self.inner.add_lora(rank, alpha, groups, seed)

    def load_lora(self, folder: str) -> None:
        """The LoRA, and the class vectors where the folder has them."""
        from safetensors.torch import load_file

        self.inner.load_lora(folder)
        file = Path(folder) / "condition.safetensors"
        if file.is_file():
            found = load_file(file)
            if {name: len(table) for name, table in found.items()} != self.attributes:
                raise UserError(f"{file}: its attributes are not those of condition.attributes; was that changed?")
            with torch.no_grad():
                for name, table in zip(self.attributes, self.vectors.tables, strict=True):
                    table.copy_(found[name])

    def export(self, folder: str) -> None:
        """The LoRA, and the class vectors as condition.safetensors: one [classes, width] tensor an attribute."""
        from safetensors.torch import save_file

        self.inner.export(folder)
        tensors = dict(zip(self.attributes, self.vectors.tables, strict=True))
        save_file(
            {name: table.detach().cpu().contiguous() for name, table in tensors.items()},
            Path(folder) / "condition.safetensors", {"tensor": self.tensor},
        )  # fmt: skip
