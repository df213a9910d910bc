"""A network too large for one device: it stays in main memory until it is cut, while everything else moves."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from flowrl.pipelines.sd3 import Sd3Adapter

from flowrl.distributed.backend import Backend
from flowrl.training import build
from tests.training.helpers import small_config

META = torch.device("meta")


def test_everything_but_the_network_moves(tiny_sd3: Path) -> None:
    """On the meta device, where nothing can be computed: it shows where each part is."""
    adapter = Sd3Adapter.load(str(tiny_sd3), torch.float32, torch.device("cpu"))
    adapter.bring(META)
    parts = {name: part for name, part in adapter.pipe.components.items() if isinstance(part, torch.nn.Module)}
    places = {name: {p.device.type for p in part.parameters()} for name, part in parts.items()}
    assert places.pop("transformer") == {"cpu"} and len(places) >= 3
    assert all(found == {"meta"} for found in places.values()), places
    assert adapter.device == META


@pytest.mark.parametrize(("sharding", "world", "apart"), [("none", 2, False), ("fsdp2", 1, False), ("fsdp2", 2, True)])
def test_only_a_network_that_will_be_cut_stays_behind(
    tiny_sd3: Path, monkeypatch: pytest.MonkeyPatch, sharding: str, world: int, apart: bool
) -> None:
    config = small_config(tiny_sd3, **{"distributed.sharding": sharding})
    backend = Backend()
    backend.world = world
    brought: list[torch.device] = []
    monkeypatch.setattr(Sd3Adapter, "bring", lambda self, device: brought.append(device))
    build.load_adapter(config, META if apart else torch.device("cpu"), apart=build.splits(config, backend))
    assert brought == ([META] if apart else [])
