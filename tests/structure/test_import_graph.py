"""A module imports only from lower ranks, and each outside library is imported in one place."""

from __future__ import annotations

import ast
import sys

import pytest

from .sources import CODE, Import, Source, imports, sample, sources

RANKS = {
    "advantage": 0,
    "core": 1,
    "dynamics": 2,
    "config": 2,
    "tracking": 2,
    "distributed": 2,
    "checkpoint": 2,
    "data": 2,
    "performance": 2,
    "objectives": 3,
    "credit": 3,
    "scoring": 3,
    "worlds": 3,
    "rollout": 4,
    "evaluation": 5,
    "training": 6,
    "text": 6,
    "doctor": 5,
    "cost": 5,
    "fit": 5,
    "plan": 6,
    "methods": 6,
    "api": 7,
    "comparison": 7,
    "integrations": 7,
    "cli": 7,
    # Outside the library proper: they import ranks 0 to 3, and flowrl/ never imports them.
    "pipelines": 4,
    "rewards": 4,
    # Data only.
    "configs": 0,
    "assets": 0,
}
# Single modules of rank 1 that may know one another.
CORE = {"records", "protocols", "registry", "rng", "errors"}
# Equal ranks that may meet, from -> to.
MEETINGS = {
    ("cli", "api"): "the command line is the public Python face with words around it",
    ("fit", "cost"): "memory counts the branches of guidance that the cost counts",
    ("cli", "comparison"): "one command, kept out of the command line for its length",
}
# The package's own face reaches upward, lazily; test_imports.py checks that it stays light.
FACES = {"flowrl/__init__.py"}

LIBRARY_HOMES: dict[str, tuple[str, ...]] = {
    "diffusers": ("pipelines",),
    "peft": ("pipelines",),
    "accelerate": ("distributed",),
    "deepspeed": ("distributed",),
    "transformers": ("pipelines", "rewards", "text", "integrations"),
    "wandb": ("tracking",),
    "swanlab": ("tracking",),
    "trackio": ("tracking",),
    "tensorboard": ("tracking",),
    "torch.utils.tensorboard": ("tracking",),
}
PICKLES = ("pickle", "cPickle", "_pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal")
# The one place that reads an upstream .pt, with weights_only=True, which runs no code of the file.
CONVERTER = "flowrl/scoring/convert.py"
LIGHT = {"config": ("torch", "numpy", "diffusers", "transformers")}


def unit(module: str) -> str:
    """The package, or the single module, of flowrl that owns a dotted name; "" for flowrl itself."""
    parts = module.split(".")
    if len(parts) == 1:
        return ""
    if parts[1] in CORE:
        return "core"
    return "cli" if parts[1] == "__main__" else parts[1]


def within(module: str, package: str) -> bool:
    return module == package or module.startswith(package + ".")


def own_imports(source: Source) -> list[Import]:
    return [item for item in imports(source) if within(item.module, "flowrl")]


def rank_violations(source: Source) -> list[str]:
    if source.path in FACES:
        return []
    here = unit(source.module)
    if here not in RANKS:
        return [f"{source.path}: flowrl.{here} has no rank; give it one here and in CONTRIBUTING.md"]
    found = []
    for item in own_imports(source):
        if item.module == "flowrl.__version__":
            continue
        there = unit(item.module)
        if there not in RANKS:
            found.append(
                f"{source.path}:{item.line}: imports {item.module}, which has no rank (the public face is for users)"
            )
        elif there != here and RANKS[there] >= RANKS[here] and (here, there) not in MEETINGS:
            found.append(
                f"{source.path}:{item.line}: {here} (rank {RANKS[here]}) imports {there} (rank {RANKS[there]})"
            )
    return found


def advantage_violations(source: Source) -> list[str]:
    """The engine is copied into other projects: torch, the standard library and relative imports only."""
    found = []
    for node in ast.walk(source.tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module or ""]
        else:
            continue
        found += [
            f"{source.path}:{node.lineno}: the shared engine imports {name}"
            for name in names
            if name.split(".")[0] not in sys.stdlib_module_names | {"torch"}
        ]
    climbs = [item for item in own_imports(source) if not within(item.module, "flowrl.advantage")]
    return found + [f"{source.path}:{item.line}: the shared engine reaches {item.module}" for item in climbs]


def library_violations(source: Source) -> list[str]:
    here = unit(source.module)
    found = []
    for item in imports(source):
        for library, homes in LIBRARY_HOMES.items():
            if within(item.module, library) and here not in homes:
                found.append(f"{source.path}:{item.line}: imports {item.module}; only {', '.join(homes)} may")
        if any(within(item.module, library) for library in LIGHT.get(here, ())):
            found.append(f"{source.path}:{item.line}: {here} imports {item.module}; it must stay light")
    return found


def pickle_violations(source: Source) -> list[str]:
    found = [
        f"{source.path}:{item.line}: imports {item.module}; weights are safetensors, messages JSON"
        for item in imports(source)
        if any(within(item.module, name) for name in PICKLES) or item.module in ("torch.save", "torch.load")
        if (source.path, item.module) != (CONVERTER, "pickle.UnpicklingError")
    ]
    allowed = {
        node.func
        for node in ast.walk(source.tree)
        if isinstance(node, ast.Call) and source.path == CONVERTER and any(map(_weights_only, node.keywords))
    }
    for node in ast.walk(source.tree):
        if node in allowed:
            continue
        if isinstance(node, ast.Attribute) and node.attr in ("save", "load") and isinstance(node.value, ast.Name):
            if node.value.id == "torch":
                found.append(f"{source.path}:{node.lineno}: torch.{node.attr} pickles; use safetensors")
        elif isinstance(node, ast.keyword) and node.arg == "allow_pickle":
            found.append(f"{source.path}:{node.value.lineno}: allow_pickle")
    return found


def _weights_only(keyword: ast.keyword) -> bool:
    return keyword.arg == "weights_only" and isinstance(keyword.value, ast.Constant) and keyword.value.value is True


def test_ranks_hold() -> None:
    found = [line for source in sources(*CODE) for line in rank_violations(source)]
    assert not found, "\n".join(found)


def test_flowrl_never_names_pipelines_or_rewards() -> None:
    found = [
        f"{source.path}:{item.line}: imports {item.module}; go through the registry"
        for source in sources("flowrl")
        for item in imports(source)
        if any(within(item.module, name) for name in ("flowrl.pipelines", "flowrl.rewards", "pipelines", "rewards"))
    ]
    assert not found, "\n".join(found)


def test_the_shared_engine_stands_alone() -> None:
    found = [line for source in sources("flowrl/advantage") for line in advantage_violations(source)]
    assert not found, "\n".join(found)


def test_each_library_has_one_home() -> None:
    found = [line for source in sources(*CODE) for line in library_violations(source)]
    assert not found, "\n".join(found)


def test_nothing_is_pickled() -> None:
    found = [line for source in sources(*CODE, "scripts") for line in pickle_violations(source)]
    assert not found, "\n".join(found)


def test_every_rank_is_in_contributing() -> None:
    from .sources import ROOT

    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    missing = [name for name in (RANKS.keys() - {"core"}) | CORE if f"`{name}`" not in text]
    assert not missing, f"CONTRIBUTING.md does not name {', '.join(sorted(missing))}"


@pytest.mark.parametrize(
    ("path", "text", "check"),
    [
        ("flowrl/rollout/x.py", "from flowrl.training import y", rank_violations),
        ("flowrl/rollout/x.py", "from ..training.loop import y", rank_violations),
        ("flowrl/rollout/__init__.py", "from ..training import y", rank_violations),
        ("flowrl/records.py", "def f():\n    import flowrl.config", rank_violations),
        ("flowrl/data/x.py", "from flowrl import dynamics", rank_violations),
        ("flowrl/data/x.py", "from flowrl import train", rank_violations),
        ("flowrl/api.py", "from flowrl import cli", rank_violations),
        ("flowrl/novelty/x.py", "import os", rank_violations),
        ("pipelines/x.py", "from flowrl.rollout import y", rank_violations),
        ("pipelines/x.py", "from flowrl.rewards import y", rank_violations),
        ("flowrl/scoring/x.py", "import importlib\nimportlib.import_module('flowrl.rollout')", rank_violations),
        ("flowrl/advantage/x.py", "import numpy", advantage_violations),
        ("flowrl/advantage/x.py", "from flowrl.advantage import y", advantage_violations),
        ("flowrl/advantage/x.py", "from ..records import y", advantage_violations),
        ("flowrl/training/x.py", "from diffusers.utils import y", library_violations),
        ("rewards/x.py", "import peft", library_violations),
        ("flowrl/api.py", "from torch.utils.tensorboard import SummaryWriter", library_violations),
        ("flowrl/config/x.py", "import torch", library_violations),
        ("flowrl/checkpoint/x.py", "import pickle", pickle_violations),
        ("flowrl/checkpoint/x.py", "import torch\ntorch.save({}, 'a')", pickle_violations),
        ("flowrl/checkpoint/x.py", "from torch import load", pickle_violations),
        ("flowrl/checkpoint/x.py", "import torch\ntorch.load('a', weights_only=True)", pickle_violations),
        (CONVERTER, "import torch\ntorch.load('a', weights_only=False)", pickle_violations),
        (CONVERTER, "import torch\ntorch.save({}, 'a')", pickle_violations),
        (CONVERTER, "from pickle import loads", pickle_violations),
        ("scripts/x.py", "import numpy as np\nnp.load('a', allow_pickle=True)", pickle_violations),
    ],
)
def test_the_checks_see_a_violation(path: str, text: str, check: object) -> None:
    assert callable(check)
    assert check(sample(text, path))


@pytest.mark.parametrize(
    ("path", "text"),
    [
        ("flowrl/rollout/x.py", "from flowrl.records import Request\nfrom .y import z\nfrom flowrl.rollout import w"),
        ("flowrl/protocols.py", "from flowrl.records import Request"),
        ("flowrl/cli.py", "from flowrl.api import train"),
        (
            "pipelines/sd3.py",
            "import diffusers, transformers\nfrom flowrl.pipelines.base import y\nfrom flowrl import rng",
        ),
        ("flowrl/advantage/x.py", "import math, torch\nfrom torch import Tensor\nfrom . import y\nfrom .z import w"),
        ("flowrl/training/x.py", "import torch\nstate.save(1)\nself.load(2)\ntorch.nn.Module.load"),
    ],
)
def test_the_checks_let_good_code_pass(path: str, text: str) -> None:
    source = sample(text, path)
    found = rank_violations(source) + library_violations(source) + pickle_violations(source)
    if path.startswith("flowrl/advantage"):
        found += advantage_violations(source)
    assert found == []
