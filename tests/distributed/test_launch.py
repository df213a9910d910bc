"""A run knows how many processes it has, and stops when a launcher was asked for another number."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import pytest
from accelerate.commands.launch import launch_command_parser
from accelerate.utils.launch import prepare_simple_launcher_cmd_env

from flowrl import api
from flowrl.config import check, load
from flowrl.distributed.backend import Backend
from flowrl.distributed.launch import processes_of
from flowrl.errors import UserError
from tests.distributed.processes import run
from tests.training.helpers import small_config

TORCHRUN = {"WORLD_SIZE": "2", "RANK": "1", "MASTER_PORT": "29500", "ACCELERATE_MIXED_PRECISION": "no"}

FSDP = {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
DEEPSPEED = {"ACCELERATE_USE_DEEPSPEED": "true"}


@pytest.mark.parametrize(
    ("environment", "wanted", "count"),
    [
        ({}, None, 1),
        ({}, 1, 1),
        ({"WORLD_SIZE": "1", "RANK": "0"}, None, 1),
        (TORCHRUN, None, 2),
        (TORCHRUN, 2, 2),
        (TORCHRUN | {"SLURM_STEP_NUM_TASKS": "2"}, None, 2),  # srun starts a torchrun on each machine
        ({"OMPI_COMM_WORLD_SIZE": "1", "PMI_SIZE": ""}, None, 1),
        ({"OMPI_COMM_WORLD_SIZE": "4"}, 1, 1),  # a run of its own in each, by choice
        ({"MASTER_PORT": "29500"}, None, 1),
    ],
)
def test_the_number_of_processes(environment: Mapping[str, str], wanted: int | None, count: int) -> None:
    assert processes_of(environment, wanted) == count


@pytest.mark.parametrize(
    ("environment", "wanted", "words"),
    [
        ({}, 2, "distributed.processes: 2 asked for, and the launcher started 1"),
        (TORCHRUN, 4, "distributed.processes: 4 asked for, and the launcher started 2"),
        (TORCHRUN, 1, "distributed.processes=2"),
        ({"WORLD_SIZE": "2"}, None, "RANK is not set"),
        ({"WORLD_SIZE": "0"}, None, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "two"}, None, "WORLD_SIZE is 'two'"),
        ({"OMPI_COMM_WORLD_SIZE": "2"}, None, "these 2 processes do not know of each other"),
        (TORCHRUN | FSDP, None, "distributed.sharding is none; set distributed.sharding=fsdp2"),
        (TORCHRUN | FSDP | {"FSDP_VERSION": "1"}, None, "version 1 of FSDP"),
        (TORCHRUN | DEEPSPEED, 2, "DeepSpeed's stage unknown; set zero_stage to 1, 2 or 3"),
        (TORCHRUN | DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "0"}, 2, "DeepSpeed's stage 0; set zero_stage"),
        (
            TORCHRUN | DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"},
            2,
            "stage 2, and distributed.sharding is none",
        ),
        ({"WORLD_SIZE": "1", "SLURM_STEP_NUM_TASKS": "8"}, None, "SLURM_STEP_NUM_TASKS is 8"),
    ],
)
def test_another_number_than_asked_for_is_an_error(
    environment: Mapping[str, str], wanted: int | None, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        processes_of(environment, wanted)


def test_a_launcher_may_be_told_of_the_shards_too() -> None:
    assert processes_of(TORCHRUN | FSDP, 2, "fsdp2") == 2
    assert processes_of(TORCHRUN, 2, "fsdp2") == 2
    third = TORCHRUN | DEEPSPEED | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
    assert processes_of(third, 2, "zero3") == processes_of(TORCHRUN, 2, "zero3") == 2
    with pytest.raises(
        UserError, match=r"stage 3, and distributed\.sharding is zero1; set distributed\.sharding=zero3"
    ):
        processes_of(third, 2, "zero1")
    with pytest.raises(UserError, match=r"asked for FSDP, and distributed\.sharding is zero1"):
        processes_of(TORCHRUN | FSDP, 2, "zero1")


def launched(*options: str) -> dict[str, str]:
    """The environment that accelerate's own launcher gives to the one process that it starts with --cpu."""
    arguments = launch_command_parser().parse_args(["--cpu", *options, "scripts/train.py"])
    arguments.num_machines, arguments.mixed_precision, arguments.dynamo_backend = 1, "no", "no"
    arguments.use_cpu = True
    environment = prepare_simple_launcher_cmd_env(arguments)[1]
    for name in ("WORLD_SIZE", "RANK"):
        environment.pop(name, None)
    return environment


def test_accelerate_starts_one_process_where_two_were_asked_for_and_flowrl_says_so(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MASTER_PORT", raising=False)
    assert processes_of(launched("--num_processes", "1")) == 1
    two = launched("--num_processes", "2")
    with pytest.raises(UserError, match="asked for more than one process or machine and started one"):
        processes_of(two)
    assert processes_of(two, 1) == 1
    with pytest.raises(UserError, match="2 asked for"):
        processes_of(two, 2)


def test_a_run_stops_before_it_loads_anything(tmp_path: Path) -> None:
    config = small_config(tmp_path / "no_model", run_dir=str(tmp_path / "run"), **{"distributed.processes": 2})
    with pytest.raises(UserError, match="torchrun --nproc_per_node 2"):
        api.train(config)
    assert not (tmp_path / "run").exists()


def describe(processes: int | None) -> str:
    return Backend(processes).describe()


def test_two_processes_say_so() -> None:
    assert run(2, describe, 2) == ["2 processes on cpu (gloo)"] * 2
    assert Backend().describe().startswith("1 process on ")


@pytest.mark.parametrize(
    ("override", "world", "words"),
    [
        ("distributed.processes=0", 1, "distributed.processes: 0 processes"),
        ("distributed.timeout_s=0", 1, "distributed.timeout_s: 0 seconds"),
        ("batch.groups=7", 8, "batch.groups: 7 groups cannot be shared out over 8 processes, each of which needs one"),
        ("distributed.gather=never", 2, "distributed.gather"),
        ("objective.updates=6", 8, "use at most 3 updates, or batch.groups=48"),
    ],
)
def test_settings_that_do_not_fit_the_processes(override: str, world: int, words: str) -> None:
    with pytest.raises(UserError, match=words):
        check(load("demo", [override]), world)
