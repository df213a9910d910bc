"""DeepSpeed's stages 1 and 2: weights whole in every process, what the optimizer holds in equal parts."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flowrl.distributed.zero_base import Zero


class Flat(Zero):
    """Weights whole in every process; Adam's state, and at stage 2 gradients between backward passes, in equal parts.

    DeepSpeed lays the trained parameters one after another in one flat tensor, of which each process owns a part.
    """

    can_go_back = True  # a network call is no meeting

    def __init__(
        self,
        engine: Any,
        trained: Mapping[str, nn.Parameter],
        stage: int,
        timeout_s: float,
        example: Callable[[], Tensor],
    ) -> None:
        super().__init__(engine, trained, stage, timeout_s, example)
        start = self.owner.bit16_groups_flat[0].data_ptr()
        self.places = {name: (p.data_ptr() - start) // p.element_size() for name, p in self.trained.items()}
        self.own = {id(p) for p in self.trained.values()}
        self.optimizer = FlatSteps(self)

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, in the network's order."""
        return dict(self.trained)

    def is_shard(self, name: str) -> bool:
        """No weight is in parts."""
        return False

    def whole(self, name: str, part: Tensor) -> Tensor:
        """``part`` is whole already."""
        return part.detach()

    def part(self, name: str, whole: Tensor) -> Tensor:
        """Every process has all of ``whole``."""
        return whole

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether DeepSpeed reduces its gradient."""
        return id(parameter) in self.own

    def forget(self) -> None:
        """Drop all gradients."""
        self.owner.zero_grad(set_to_none=True)
        for held in (self.owner.averaged_gradients, self.owner.all_grad_tensors):
            for number in held:
                held[number] = None

    def pause(self) -> None:
        """Nothing to wait for: other processes have weights of their own."""

    def changed(self) -> None:
        """Values were written into the weights: take them over into the copy that the optimizer steps."""
        self.owner.refresh_fp32_params()

    def check(self) -> None:
        """Nothing is gathered; whole weights are compared as without DeepSpeed."""

    def exporting(self, lead: bool) -> AbstractContextManager[None]:
        """Trained weights are whole always."""
        return nullcontext()

    def gathered(self, part: Tensor) -> Tensor:
        """The flat tensor of all processes' parts, on the CPU of the first; empty in the others."""
        return torch.cat(self._everywhere(part) or [torch.empty(0)])

    def memory(self) -> dict[str, int]:
        """Bytes of the two moments of Adam: of this process's part, and of all."""
        part = self.owner.single_partition_of_fp32_groups[0]
        whole = sum(p.numel() * p.element_size() for p in self.trained.values())
        return {"held": 2 * part.numel() * part.element_size(), "whole": 2 * whole}


class FlatSteps:
    """DeepSpeed's optimizer as training uses one; its state is that of an optimizer of whole parameters."""

    def __init__(self, zero: Flat) -> None:
        self.zero = zero

    @property
    def adam(self) -> torch.optim.Optimizer:
        """What steps this process's part."""
        return self.zero.owner.optimizer  # type: ignore[no-any-return]

    @property
    def part(self) -> nn.Parameter:
        """This process's part of the flat parameters."""
        return self.zero.owner.single_partition_of_fp32_groups[0]  # type: ignore[no-any-return]

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The one group, whose parameter is the part."""
        return self.adam.param_groups

    def step(self) -> None:
        """Step this process's part, and hand the new weights to all."""
        self.zero.owner.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop all gradients."""
        self.zero.forget()

    def state_dict(self) -> dict[str, Any]:
        """The state by number of the parameter, whole in the first process and empty in the others; all take part."""
        own, trained = self.adam.state.get(self.part, {}), self.zero.trained
        found: dict[int, dict[str, Any]] = {number: {} for number in range(len(trained))} if own else {}
        for key, value in own.items():
            flat = self.zero.gathered(value) if value.ndim else None
            for number, (name, p) in enumerate(trained.items()):
                if flat is None:
                    found[number][key] = value.clone()
                else:
                    found[number][key] = self._cut(flat, name).reshape(p.shape).clone() if len(flat) else flat
        numbers = list(range(len(trained)))
        return {"state": found, "param_groups": [{**group, "params": numbers} for group in self.param_groups]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take this process's part of a state of whole parameters. ValueError where it is of other parameters."""
        state, trained = state_dict["state"], self.zero.trained
        if state and [tuple(s["exp_avg"].shape) for s in state.values()] != [tuple(p.shape) for p in trained.values()]:
            raise ValueError("optimizer state: of other parameters than the network's")
        for group, saved in zip(self.param_groups, state_dict["param_groups"], strict=True):
            group.update({key: value for key, value in saved.items() if key != "params"})
        self.adam.state.pop(self.part, None)
        for key, value in state[0].items() if state else ():
            own = self.adam.state[self.part]
            if not value.ndim:
                own[key] = value.clone()
                continue
            flat = torch.zeros(len(self.part) * self.zero.world)
            for number, name in enumerate(trained):
                self._cut(flat, name).copy_(state[number][key].flatten())
            own[key] = flat.chunk(self.zero.world)[self.zero.rank].to(self.part, copy=True)

    def _cut(self, flat: Tensor, name: str) -> Tensor:
        start = self.zero.places[name]
        return flat[start : start + self.zero.trained[name].numel()]
