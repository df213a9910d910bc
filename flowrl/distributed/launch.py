"""How many processes the launcher started, read from the environment, and whether that and what they need is there."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import metadata

from flowrl.errors import UserError

MPI_SIZES = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "MV2_COMM_WORLD_SIZE", "SLURM_STEP_NUM_TASKS")
"""What mpirun and srun say of the number of processes; a run joins them only through WORLD_SIZE."""
STAGES = ("zero1", "zero2", "zero3")
"""The values of ``distributed.sharding`` that are DeepSpeed's, in the order of its stages 1, 2 and 3."""
DEEPSPEED = (0, 19)
"""The oldest DeepSpeed whose parts have the names that `flowrl.distributed.zero` uses."""


def world_size(environment: Mapping[str, str]) -> int:
    """Number of processes by WORLD_SIZE, 1 where it is not set. UserError for anything but a whole number from 1."""
    text = environment.get("WORLD_SIZE", "1")
    if not text.isdecimal() or int(text) < 1:
        raise UserError(
            f"WORLD_SIZE is {text!r} in the environment; torchrun sets it to the number of processes, else unset it"
        )
    return int(text)


def processes_of(environment: Mapping[str, str], wanted: int | None = None, sharding: str = "none") -> int:
    """Number of processes of this run: at least 1.

    wanted: ``distributed.processes``; sharding: ``distributed.sharding``. Raises UserError where the launcher was asked for
    something else than it started or the config says: ``accelerate launch --cpu --num_processes 2`` starts one process and
    says nothing, and processes under mpirun or srun alone do not know of each other, so each would train on its own and
    write to one folder.
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
    _check_sharding(environment, sharding)
    if world == 1 and wanted is None:
        _check_alone(environment)
    return world


def require(sharding: str) -> None:
    """Raise UserError where ``distributed.sharding`` needs DeepSpeed and it is not installed here, or is too old."""
    if sharding not in STAGES:
        return
    try:
        found = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        found = ""
    if tuple(int(part) for part in found.split(".")[:2] if part.isdecimal()) < DEEPSPEED:
        said = f"{found} is installed" if found else "which is not installed"
        raise UserError(
            f"distributed.sharding: {sharding} needs DeepSpeed {'.'.join(map(str, DEEPSPEED))} or newer, {said}; pip install -U "
            "'flowrl[deepspeed]', or set fsdp2"
        )


def _check_sharding(environment: Mapping[str, str], sharding: str) -> None:
    """Raise UserError where accelerate launch was asked for another way of splitting the model than the config is."""
    if environment.get("ACCELERATE_USE_DEEPSPEED", "").lower() == "true":
        stage = environment.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "")
        if f"zero{stage}" not in STAGES:
            raise UserError(
                f"ACCELERATE_USE_DEEPSPEED is set: accelerate launch was asked for DeepSpeed's stage {stage or 'unknown'}; set "
                "zero_stage to 1, 2 or 3 there, as configs/accelerate/zero1.yaml does"
            )
        if sharding != f"zero{stage}":
            raise UserError(
                f"ACCELERATE_USE_DEEPSPEED is set: accelerate launch was asked for DeepSpeed's stage {stage}, and "
                f"distributed.sharding is {sharding}; set distributed.sharding=zero{stage}, or launch with torchrun"
            )
    if environment.get("ACCELERATE_USE_FSDP", "").lower() == "true":
        version = environment.get("FSDP_VERSION", "1")
        if version != "2":
            raise UserError(
                f"ACCELERATE_USE_FSDP is set with version {version} of FSDP; flowrl uses 2: set fsdp_version: 2, as "
                "configs/accelerate/fsdp2.yaml does"
            )
        if sharding != "fsdp2":
            raise UserError(
                "ACCELERATE_USE_FSDP is set: accelerate launch was asked for FSDP, and distributed.sharding is "
                f"{sharding}; set distributed.sharding=fsdp2, or launch with torchrun"
            )


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
