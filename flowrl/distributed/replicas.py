"""Whether every process holds the same weights: checksums of the bits, compared in one collective."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from flowrl.distributed.backend import Backend
from flowrl.distributed.checksums import ReplicaMismatch, checksum


def check_replicas(named: Mapping[str, Tensor], backend: Backend) -> None:
    """Compare tensors over all processes, in one collective; every process must have the same names and shapes.

    Raises ReplicaMismatch, in every process alike, that names the first process and tensor that differ from most.
    """
    if backend.world == 1 or not named:
        return
    found = backend.stack(torch.stack([checksum(tensor).to(backend.device) for tensor in named.values()]).cpu())
    usual = found.mode(dim=0).values if backend.world > 2 else found[0]
    wrong = (found != usual).nonzero().tolist()
    if wrong:
        names = list(named)
        rank, place = wrong[0]
        others = f" (and {len(wrong) - 1} more)" if len(wrong) > 1 else ""
        raise ReplicaMismatch(
            f"process {rank} of {backend.world} holds other values of {names[place]} than the rest{others}: the copies of the "
            "weights have come apart, and what follows would train several models. Go on from the last checkpoint; if it "
            "happens again, look for a draw, a file or a version of a package that differs between processes."
        )


def check_models(named: Mapping[str, Tensor], backend: Backend) -> None:
    """`check_replicas` at the start of a run, for whole models: names and shapes are compared first.

    Raises ReplicaMismatch where a process has loaded another model, or other weights of it.
    """
    if backend.world == 1:
        return
    layout = "\n".join(f"{name} {tuple(tensor.shape)} {tensor.dtype}" for name, tensor in named.items())
    written = torch.tensor(list(layout.encode()), dtype=torch.uint8)
    sums = backend.stack(torch.stack([torch.tensor(len(written)), checksum(written)]))
    wrong = (sums != sums[0]).any(1).nonzero().flatten().tolist()
    if wrong:
        raise ReplicaMismatch(
            f"process {wrong[0]} of {backend.world} has loaded a model with other parameters than process 0; give every "
            "machine the same files, package versions and config"
        )
    check_replicas(named, backend)
