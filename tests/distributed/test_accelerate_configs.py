"""The shipped files for accelerate launch are read by accelerate, and lead to one process a GPU."""

from __future__ import annotations

from pathlib import Path

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.utils import DistributedType

FOLDER = Path(__file__).parents[2] / "configs" / "accelerate"


@pytest.mark.parametrize(("name", "machines", "processes"), [("ddp", 1, 8), ("two_nodes", 2, 16)])
def test_accelerate_reads_a_shipped_file(name: str, machines: int, processes: int) -> None:
    config = load_config_from_file(str(FOLDER / f"{name}.yaml"))
    assert (config.num_machines, config.num_processes) == (machines, processes)
    assert config.distributed_type == DistributedType.MULTI_GPU
    assert config.mixed_precision == "no"  # model.dtype says it, and autocast from outside would change the numbers
    assert "Not run" in (FOLDER / f"{name}.yaml").read_text()


def test_every_shipped_file_has_a_test() -> None:
    assert {path.stem for path in FOLDER.iterdir()} == {"ddp", "two_nodes"}
