"""A network split over processes by torch's ``fully_shard`` (FSDP2), block by block.

Frozen weights, and all weights in full fine-tuning, are cut into shards. LoRA layers and single numbers stay whole in every
process, as without sharding: they are small beside the network. Gradients of shards are added up here rather than by
FSDP, so that they travel once an update, summed and not averaged, whatever number of calls a process has made.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowrl.distributed import layout
from flowrl.distributed.checksums import ReplicaMismatch, checksum
from flowrl.distributed.turns import Turns
from flowrl.errors import UserError

Gather = Literal["block", "rollout", "iteration"]
LORA = "lora_"


@dataclass
class Held:
    """One parameter of a unit. local: this process's rows, sharing memory with FSDP's shard; shape: of the whole."""

    name: str
    module: nn.Module
    attribute: str
    shape: torch.Size
    trained: bool
    local: nn.Parameter

    @property
    def current(self) -> Any:
        """What the module holds now: the shard, or the whole while its unit is gathered."""
        return self.module._parameters[self.attribute]


def blocks_of(network: nn.Module) -> list[nn.Module]:
    """The repeated blocks of a network, inner ones first: diffusers' ``_no_split_modules`` and ``_repeated_blocks``.

    Where it names none: the members of its lists of at least two modules of one class. [] where there are none.
    """
    named: set[str] = set()
    for module in network.modules():
        for attribute in ("_no_split_modules", "_repeated_blocks"):
            named |= set(vars(type(module)).get(attribute) or ())
    found = [m for m in network.modules() if m is not network and type(m).__name__ in named]
    if not found:
        lists = [list(m) for m in network.modules() if isinstance(m, nn.ModuleList)]
        found = [m for members in lists if len(members) > 1 and len({type(m) for m in members}) == 1 for m in members]
    return found[::-1]


class Sharded:
    """A network whose weights lie in parts in ``world`` processes. Every process makes and uses one alike.

    gather: how long gathered weights stay: "block" (for one call of a block: least memory), "rollout" (except during
    updates, where it is block by block), "iteration" (always; shards are what the optimizer and the average hold, so this
    is ZeRO-2's memory). example: one call of the network on one sample, with its output. Between the calls of different
    processes see `flowrl.distributed.turns`.
    """

    def __init__(
        self, network: nn.Module, rank: int, world: int, device: torch.device, gather: Gather, timeout_s: float,
        example: Callable[[], Tensor],
    ) -> None:  # fmt: skip
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        self.network, self.rank, self.world, self.kept = network, rank, world, gather
        self.turns = Turns(example, timeout_s)
        self.original = type(network)
        named = dict(network.named_parameters())
        whole = {p for name, p in named.items() if LORA in name or p.ndim == 0}
        for p in whole:
            p.data = p.data.to(device)  # blocks follow as they are cut, one by one: none needs room for the network
        places = {p: (m, attribute) for m in network.modules() for attribute, p in m._parameters.items()}
        layers: list[Any] = [*blocks_of(network), network]
        owners: dict[nn.Parameter, int] = {}
        for number, layer in enumerate(layers):
            for p in layer.parameters():
                owners.setdefault(p, number)
        facts = {name: (p.shape, p.requires_grad, places[p], owners[p]) for name, p in named.items() if p not in whole}
        mesh = init_device_mesh(device.type, (world,))
        self.units: list[Any] = []
        for layer in layers:
            self.units.append(fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole))
        network.set_requires_gradient_sync(False)  # type: ignore[operator]
        network.register_forward_pre_hook(self._before_call, prepend=True)
        self.gathered = False
        self._begin(facts)

    optimizer: None = None  # training makes its own, of the shards

    @property
    def can_go_back(self) -> bool:
        """Whether a process may leave a network call halfway: not where a call is itself a meeting."""
        return self.gathered

    def _begin(self, facts: Mapping[str, Any]) -> None:
        """Make one call, after which FSDP has settled where its shards lie, and take hold of them."""
        self.turns.serving = True
        with torch.no_grad():
            self.turns.example()
        self.turns.serving = False
        self._let_go()
        self.held: list[list[Held]] = [[] for _ in self.units]
        for name, (shape, trained, (module, attribute), number) in facts.items():
            shard = module._parameters[attribute]
            local = nn.Parameter(shard.to_local().detach(), requires_grad=trained)
            self.held[number].append(Held(name, module, attribute, shape, trained, local))
        self.by_name = {held.name: held for unit in self.held for held in unit}
        self.own = {id(held.local) for held in self.by_name.values()}
        self.rest()

    def _before_call(self, module: nn.Module, inputs: Any) -> None:
        if not self.gathered:
            self.turns.before_call()

    # -- gathering -------------------------------------------------------------------------------------------------

    def _gather(self) -> None:
        for unit in self.units:
            unit.unshard()
        self.network.set_reshard_after_forward(False)  # type: ignore[operator]
        self.network.set_reshard_after_backward(False)  # type: ignore[operator]
        self.gathered = True

    def _let_go(self) -> None:
        for unit in self.units:
            unit.reshard()
        self.network.set_reshard_after_forward(True)  # type: ignore[operator]
        self.network.set_reshard_after_backward(True)  # type: ignore[operator]
        self.gathered = False

    def rest(self) -> None:
        """The state outside updates: gathered, unless blocks are gathered one by one. Every process calls it."""
        if self.kept != "block" and not self.gathered:
            self.meet()
            self._gather()

    @contextmanager
    def updating(self) -> Iterator[None]:
        """Within the block weights are gathered as they are for updates."""
        if self.kept == "rollout" and self.gathered:
            self._let_go()
        yield
        self.rest()

    def changed(self) -> None:
        """Shards were written to: let go of what was gathered from the old ones. Every process calls it."""
        again = self.gathered
        self._let_go()
        if again:
            self._gather()

    def meet(self) -> None:
        """Before a meeting of all processes: whoever still has calls to make is waited for."""
        if not self.gathered:
            self.turns.meet()

    pause = meet

    def backward(self, loss: Tensor) -> None:
        """``loss.backward()``, where it is every process's turn to do so."""
        if self.gathered:
            loss.backward()  # type: ignore[no-untyped-call]
        else:
            self.turns.backward(loss)

    # -- what is trained -------------------------------------------------------------------------------------------

    def parameters(self) -> dict[str, nn.Parameter]:
        """Trained parameters by name, in the network's order: this process's shards, and what is whole."""
        found = {}
        for name, p in self.network.named_parameters():
            held = self.by_name.get(name)
            trained = p.requires_grad if held is None else held.trained
            if trained:
                found[name] = p if held is None else held.local
        return found

    def is_shard(self, name: str) -> bool:
        return name in self.by_name

    def whole(self, name: str, part: Tensor) -> Tensor:
        """The whole tensor of all processes' parts shaped like the shard of ``name``; a collective.

        It is on the CPU of the first process; the others get an empty tensor.
        """
        self.meet()
        rows = self.by_name[name].shape[0]
        own = layout.padded(part.detach(), rows, self.world)
        parts = [torch.empty_like(own) for _ in range(self.world)] if self.rank == 0 else None
        torch.distributed.gather(own, parts, dst=0)
        return torch.empty(0) if parts is None else layout.put_together([p.cpu() for p in parts], rows)

    def part(self, name: str, whole: Tensor) -> Tensor:
        """This process's part of a whole tensor of ``name``. ValueError for another shape."""
        held = self.by_name[name]
        if whole.shape != held.shape:
            raise ValueError(f"{name}: {tuple(whole.shape)} where the network has {tuple(held.shape)}")
        return layout.part_of(whole, self.rank, self.world)

    def owns(self, parameter: nn.Parameter) -> bool:
        """Whether it is this process's shard of a parameter."""
        return id(parameter) in self.own

    def gradients(self) -> list[Tensor]:
        """The summed gradients of this process's shards."""
        return [held.local.grad for held in self.by_name.values() if held.local.grad is not None]

    def add_gradients(self) -> int:
        """Sum the gradients of the shards over processes, one collective a block; returns how many.

        A parameter without a gradient counts as 0.
        """
        count = 0
        for unit, held in zip(self.units, self.held, strict=True):
            trained = [h for h in held if h.trained]
            if not trained:
                continue
            unit.unshard()
            gradients = [torch.zeros_like(h.current) if h.current.grad is None else h.current.grad for h in trained]
            flat = layout.for_everyone([g.detach() for g in gradients], self.world)
            for h in trained:
                h.current.grad = None
            del gradients
            if not self.gathered:
                unit.reshard()
            own = torch.empty_like(flat[0])
            torch.distributed.reduce_scatter(own, list(flat))
            count += 1
            shapes = [h.shape for h in trained]
            for h, gradient in zip(trained, layout.own_parts(own, shapes, self.rank, self.world), strict=True):
                h.local.grad = gradient.clone()
        return count

    def check(self) -> None:
        """Compare what all processes compute with: a checksum of every gathered parameter. Raises ReplicaMismatch."""
        self.meet()
        names, sums = [], []
        for unit, held in zip(self.units, self.held, strict=True):
            unit.unshard()
            for h in held:
                names.append(h.name)
                sums.append(checksum(h.current).cpu())
            if not self.gathered:
                unit.reshard()
        own = torch.stack(sums).to(next(iter(self.by_name.values())).local.device)
        found = [torch.empty_like(own) for _ in range(self.world)]
        torch.distributed.all_gather(found, own)
        wrong = (torch.stack(found) != found[0]).nonzero().tolist()
        if wrong:
            rank, place = wrong[0]
            raise ReplicaMismatch(
                f"process {rank} of {self.world} computes with other values of {names[place]} than process 0, though both "
                "were gathered from the same shards; go on from the last checkpoint"
            )

    @contextmanager
    def exporting(self, lead: bool) -> Iterator[None]:
        """Within the block the network of the ``lead`` process is a plain one on the CPU, its trained weights whole.

        Every process enters. Frozen weights stay in shards: an export of LoRA does not write them.
        """
        again = self.gathered
        self._let_go()
        before: list[tuple[Held, Any]] = []
        for name, h in self.by_name.items():
            if h.trained:
                full = self.whole(name, h.local)
                if lead:
                    before.append((h, h.current))
                    h.module._parameters[h.attribute] = nn.Parameter(full)
        sharded = type(self.network)
        if lead:
            self.network.__class__ = self.original
        try:
            yield
        finally:
            self.network.__class__ = sharded
            for h, shard in before:
                h.module._parameters[h.attribute] = shard
        if again:
            self.meet()
            self._gather()

    def memory(self) -> dict[str, int]:
        """Bytes of this process's weights: "held" between gathers, "whole" when gathered."""
        replicated = sum(
            p.numel() * p.element_size() for name, p in self.network.named_parameters() if name not in self.by_name
        )
        held = sum(h.local.numel() * h.local.element_size() for h in self.by_name.values())
        full = sum(h.shape.numel() * h.local.element_size() for h in self.by_name.values())
        return {"held": held + replicated, "whole": full + replicated}


def check_torch() -> None:
    """Raise UserError where torch has no ``fully_shard`` that can leave parameters out (torch 2.11 has)."""
    from torch.distributed import fsdp

    if "fully_shard" not in vars(fsdp) or "ignored_params" not in inspect.signature(fsdp.fully_shard).parameters:
        raise UserError(
            f"distributed.sharding: fsdp2 needs torch's fully_shard with ignored_params, which {torch.__version__} lacks; "
            "install torch 2.11 or newer, or set none"
        )


def gradient_norm(shards: Sequence[Tensor], whole: Sequence[Tensor], total: Callable[[Tensor], Tensor]) -> Tensor:
    """``sqrt(sum of squares)`` of gradients of which some lie in shards. total: sums a float64 scalar over processes."""
    own = torch.stack([g.double().square().sum().cpu() for g in shards]).sum() if shards else torch.zeros(()).double()
    rest = torch.stack([g.double().square().sum().cpu() for g in whole]).sum() if whole else torch.zeros(()).double()
    return (total(own) + rest).sqrt()
