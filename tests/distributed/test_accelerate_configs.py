"""The shipped files for accelerate launch are read by accelerate, and lead to one process a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from accelerate.utils import DistributedType
from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

from flowrl.distributed.launch import processes_of
from flowrl.errors import UserError

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"


ZERO = {f"zero{stage}": (1, 8) for stage in (1, 2, 3)}
FILES = {"ddp": (1, 8), "two_nodes": (2, 16), "fsdp2": (1, 8), "fsdp2_two_nodes": (2, 16)} | ZERO


@pytest.mark.parametrize("name", FILES)
def test_accelerate_reads_a_shipped_file(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == FILES[name]
    kinds = {"fsdp2": DistributedType.FSDP, "zero": DistributedType.DEEPSPEED}
    kind = next((kind for start, kind in kinds.items() if name.startswith(start)), DistributedType.MULTI_GPU)
    assert config.distributed_type == kind
    assert config.mixed_precision == "no"  # model.dtype says it, and autocast from outside would change the numbers
    assert "Not run" in (FOLDER / f"{name}.yaml").read_text()


@pytest.mark.parametrize("name", ["fsdp2", "fsdp2_two_nodes"])
def test_what_accelerate_tells_its_processes_is_taken_for_fsdp2(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    given = [part for key, value in config.fsdp_config.items() for part in (f"--{key}", str(value))]
    words = ["--use_fsdp", *given, "--num_processes", "2", "--num_machines", "1", "scripts/train.py"]
    arguments = launch_command_parser().parse_args(words)
    arguments.mixed_precision, arguments.dynamo_backend, arguments.use_cpu = "no", "no", False
    told = prepare_multi_gpu_env(arguments)
    started = told | {"WORLD_SIZE": "2", "RANK": "0"}  # by torchrun's part of the launcher
    assert processes_of(started, 2, "fsdp2") == 2
    with pytest.raises(UserError, match="set distributed"):
        processes_of(started, 2)


@pytest.mark.parametrize("name", ZERO)
def test_what_accelerate_tells_its_processes_is_taken_for_deepspeed(name: str) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    given = [part for key, value in config.deepspeed_config.items() for part in (f"--{key}", str(value))]
    words = ["--use_deepspeed", *given, "--num_processes", "2", "--num_machines", "1", "scripts/train.py"]
    arguments = launch_command_parser().parse_args(words)
    arguments.mixed_precision, arguments.dynamo_backend, arguments.use_cpu = "no", "no", False
    arguments.main_process_port, arguments.deepspeed_fields_from_accelerate_config = 0, "zero_stage"
    started = prepare_deepspeed_cmd_env(arguments)[1] | {"WORLD_SIZE": "2", "RANK": "0"}  # by torchrun's part of it
    assert processes_of(started, 2, name) == 2
    with pytest.raises(UserError, match=rf"stage {name[-1]}, and distributed\.sharding is none"):
        processes_of(started, 2)


def test_every_shipped_file_has_a_test() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == set(FILES)
