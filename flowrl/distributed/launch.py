"""How many processes the launcher started, read from the environment, and whether that is what was asked for."""

from __future__ import annotations

from collections.abc import Mapping

from flowrl.errors import UserError

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""What mpirun and srun say of the number of processes; a run joins them only through WORLD_SIZE."""
SHARDING = {"ACCELERATE_USE_FSDP": "FSDP", "ACCELERATE_USE_DEEPSPEED": "DeepSpeed"}
"""Ways of splitting a model that accelerate launch can be asked for."""


def world_size(environment: Mapping[str, str]) -> int:
    """Number of processes by WORLD_SIZE, 1 where it is not set. UserError for anything but a whole number from 1."""
    text = environment.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"WORLD_SIZE is {text!r} in the environment; torchrun sets it to the number of processes, else unset it"
        )
    return int(text)


def processes_of(environment: Mapping[str, str], wanted: int | None = None) -> int:
    """Number of processes of this run: at least 1.

    wanted: ``distributed.processes``. Raises UserError where the launcher was asked for another number than it started:
    ``accelerate launch --cpu --num_processes 2`` starts one process and says nothing, and processes under mpirun or srun
    alone do not know of each other, so each would train on its own and write to one folder.
    """
    world = world_size(environment)
    if world > 1 and "RANK" not in environment:
        raise UserError(
            f"WORLD_SIZE is {world} in the environment, but RANK is not set, so no launcher did it; start the run with "
            f"torchrun --nproc_per_node {world} scripts/train.py CONFIG, or unset WORLD_SIZE"
        )
    if wanted is not None and wanted != world:
        raise UserError(
            f"distributed.processes: {wanted} asked for, and the launcher started {world}; use torchrun --nproc_per_node "
            f"{wanted} scripts/train.py CONFIG, or distributed.processes={world}"
        )
    for name, what in SHARDING.items():
        if environment.get(name, "").lower() == "true":
            raise UserError(
                f"{name} is set: accelerate launch was asked for {what}, which flowrl does not do yet; every process holds a "
                "whole copy of the model (DDP). Launch with configs/accelerate/ddp.yaml, or with torchrun"
            )
    if world == 1 and wanted is None:
        _check_alone(environment)
    return world


def _check_alone(environment: Mapping[str, str]) -> None:
    """Raise UserError where a launcher meant this process to be one of several."""
    for name in MPI_SIZES:
        text = environment.get(name, "")
        if text.isdecimal() and int(text) > 1:
            raise UserError(
                f"{name} is {text} in the environment, but WORLD_SIZE is not set: these {text} processes do not know of each "
                "other; start the run with torchrun, or set distributed.processes=1 where each is to be a run of its own"
            )
    # accelerate sets a port without WORLD_SIZE where several processes were asked for and its simple launcher starts one.
    if "WORLD_SIZE" not in environment and "ACCELERATE_MIXED_PRECISION" in environment and "MASTER_PORT" in environment:
        raise UserError(
            "accelerate launch was asked for more than one process or machine and started one (it does so with --cpu); use "
            "torchrun --nproc_per_node N scripts/train.py CONFIG, or set distributed.processes=1 if one is right"
        )
