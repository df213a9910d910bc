"""DeepSpeed's stage 3: weights in equal parts too, gathered for one call of one layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.distributed.zero_base import Zero


class Parts(Zero):
    """Every parameter, laid out flat, is cut into as many equal parts as there are processes, the last one padded.

    A call is a meeting, as with ``distributed.gather=block``. For full weights alone: where some are frozen, layers are gathered
    anew at other times in a process that makes calls for others than in those, and they wait for each other for ever.
    """

    can_go_back = False

    def __init__(
        self,
        engine: Any,
        network: nn.Module,
        trained: Mapping[str, nn.Parameter],
        timeout_s: float,
        example: Callable[[], Tensor],
    ) -> None:
        super().__init__(engine, trained, 3, timeout_s, example)
        self.network = network
        self.places = {name: _place(network, name) for name in trained}
        self.local = {name: nn.Parameter(_held(p).detach()) for name, p in self.trained.items()}
        self.own = {id(p) for p in self.local.values()}
        self.optimizer = PartSteps(self)
        network.register_forward_pre_hook(self._before_call, prepend=True)

    def _before_call(self, module: nn.Module, inputs: Any) -> None:
        """Take the turn of a call, and have DeepSpeed forget in which order layers ran before.

        By that order it would gather ahead, which goes wrong where calls with and without gradient take turns.
        """
        self.turns.before_call()
        coordinator = self.owner.parameter_offload.get_param_coordinator()
        if not coordinator.is_invalid_trace():
            coordinator._invalidate_trace()

    def parameters(self) -> dict[str, nn.Parameter]:
        """This process's parts by name, which share DeepSpeed's memory."""
        return dict(self.local)

    def is_shard(self, name: str) -> bool:
        """Every trained parameter is in parts."""
        return name in self.local

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor of all processes' parts, on the CPU of the first; empty in the others."""
        parts, shape = self._everywhere(part.detach()), self._shape(name)
        return torch.cat(parts)[: shape.numel()].reshape(shape) if parts else torch.empty(0)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor of ``name``, with zeros where it is padded. ValueError for another shape."""
        if whole.shape != self._shape(name):
            raise ValueError(f"{name}: {tuple(whole.shape)} where the network has {tuple(self._shape(name))}")
        size = len(self.local[name])
        flat = whole.new_zeros(size * self.world)
        flat[: whole.numel()] = whole.flatten()
        return flat.chunk(self.world)[self.rank]

    def _shape(self, name: str) -> torch.Size:
        return self.trained[name].ds_shape  # type: ignore[attr-defined, no-any-return]

    # -- gradients -------------------------------------------------------------------------------------------------

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether DeepSpeed reduces its gradient."""
        return id(parameter) in self.own

    def forget(self) -> None:
        """Drop all gradients. Their buffers stay, and a parameter that the next update does not use must find 0 there."""
        for gradient in self.gradients():
            gradient.zero_()
        self.owner.zero_grad(set_to_none=True)

    # -- weights ---------------------------------------------------------------------------------------------------

    def pause(self) -> None:
        """Wait for calls of other processes, which need the weights as they are."""
        self.turns.meet()

    def changed(self) -> None:
        """Values were written into the parts: take them over into the copy that the optimizer steps."""
        self.owner.refresh_fp32_params()

    def check(self) -> None:
        """Nothing stays gathered, so there are no copies to compare."""

    @contextmanager
    def exporting(self, lead: bool) -> Iterator[None]:
        """Within the block the ``lead`` process's trained weights are whole, on the CPU; all processes enter it."""
        before = []
        for name, local in self.local.items():
            full = self.whole(name, local)
            if lead:
                held, attribute = self.places[name]
                before.append((held, attribute, held[attribute]))
                held[attribute] = nn.Parameter(full)
        try:
            yield
        finally:
            for held, attribute, parameter in before:
                held[attribute] = parameter

    def memory(self) -> dict[str, int]:
        """Bytes of the weights: of this process's parts, and of all."""
        every = list(self.network.parameters())
        return {
            "held": sum(_held(p).numel() * p.element_size() for p in every),
            "whole": sum(self.world * _held(p).numel() * p.element_size() for p in every),
        }


def _held(parameter: nn.Parameter) -> Tensor:
    """This process's part of a parameter, as DeepSpeed keeps it."""
    return parameter.ds_tensor  # type: ignore[attr-defined, no-any-return]


def _place(network: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    """(the table of parameters that has it, its name there) of a parameter."""
    path, _, attribute = name.rpartition(".")
    return network.get_submodule(path)._parameters, attribute


class PartSteps:
    """DeepSpeed's optimizer as training uses one; its state is that of an optimizer of this process's parts."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.places: dict[str, tuple[int, int]] = {}
        names = {p.ds_id: name for name, p in parts.trained.items()}  # type: ignore[attr-defined]
        for group, members in enumerate(parts.owner.fp16_groups):
            start = 0
            for p in members:
                self.places[names[p.ds_id]] = (group, start)
                start += p.partition_numel()

    @property
    def adam(self) -> torch.optim.Optimizer:
        """What steps this process's parts."""
        return self.parts.owner.optimizer  # type: ignore[no-any-return]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one group; DeepSpeed puts its parameters in for the time of a step."""
        return self.adam.param_groups

    def step(self) -> None:
        """Step this process's parts."""
        self.parts.owner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        self.parts.forget()

    def state_dict(self) -> dict[str, Any]:
        """The state by number of the parameter, as one of this process's parts."""
        found: dict[int, dict[str, Any]] = {}
        for number, name in enumerate(self.parts.local):
            own = self.adam.state.get(self._flat(name), {})
            if own:
                found[number] = {
                    key: (self._cut(value, name) if value.ndim else value).clone() for key, value in own.items()
                }
        numbers = list(range(len(self.parts.local)))
        return {"state": found, "param_groups": [{**group, "params": numbers} for group in self.param_groups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what `state_dict` gave."""
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.adam.state.clear()
        for number, name in enumerate(self.parts.local):
            flat = self._flat(name)
            for key, value in state_dict["state"].get(number, {}).items():
                own = self.adam.state[flat]
                if not value.ndim:
                    own[key] = value.clone()
                    continue
                if key not in own:
                    own[key] = torch.zeros_like(flat)
                self._cut(own[key], name).copy_(value)

    def _flat(self, name: str) -> nn.Parameter:
        return self.parts.owner.fp32_partitioned_groups_flat[self.places[name][0]]  # type: ignore[no-any-return]

    def _cut(self, flat: Tensor, name: str) -> Tensor:
        start = self.places[name][1]
        return flat[start : start + len(self.parts.local[name])]
