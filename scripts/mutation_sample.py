"""A seeded random sample of mutants of flowrl/advantage, made and run by mutmut, with every survivor listed.

    python -m venv other; other/bin/pip install mutmut==3.8.1 and what the tests need; git clone this repository to CLONE
    other/bin/python scripts/mutation_sample.py CLONE --number 330 --seed 0 --out docs/results/mutation.json

mutmut mutates every function of the package; its tests run once to learn which test reaches which function, then each
mutant of the sample runs against the tests that reach it. A mutant that no test reaches counts as a survivor, and so
does an equivalent one. tests/advantage/test_standalone.py is left out: it copies the package, and mutmut's own code with it.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

SETTINGS = """[mutmut]
source_paths=flowrl/advantage
pytest_add_cli_args_test_selection=tests/advantage
pytest_add_cli_args=
    --ignore=tests/advantage/test_standalone.py
    -p
    no:cacheprovider
also_copy=
    flowrl
    tests
    pipelines
    rewards
    configs
    assets
    docs
    scripts
    README.md
    CONTRIBUTING.md
"""
STATUS = {0: "survived", 33: "not reached", 24: "timeout", 36: "timeout", 152: "timeout", 255: "timeout"}


def mutmut(clone: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(Path(sys.executable).parent / "mutmut"), *arguments]
    return subprocess.run(
        command, cwd=clone, env={**os.environ, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True
    )


def outcomes(clone: Path) -> dict[str, int | None]:
    """Exit code of every mutant by name, None where it was not run."""
    found: dict[str, int | None] = {}
    for file in sorted((clone / "mutants/flowrl/advantage").glob("*.meta")):
        found |= json.loads(file.read_text())["exit_code_by_key"]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("clone", type=Path)
    parser.add_argument("--number", type=int, default=330)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    (args.clone / "setup.cfg").write_text(SETTINGS)
    if not outcomes(args.clone):
        mutmut(args.clone, "run", "--max-children", str(args.jobs), "none.*")  # makes the mutants and the statistics
    names = sorted(outcomes(args.clone))
    sample = random.Random(args.seed).sample(names, args.number)  # noqa: S311
    started = time.time()
    for first in range(0, len(sample), 110):
        mutmut(args.clone, "run", "--max-children", str(args.jobs), *sample[first : first + 110])
        done = outcomes(args.clone)
        counts = Counter(STATUS.get(done[name], "killed") for name in sample[: first + 110])
        print(f"{min(first + 110, len(sample))} of {len(sample)}: {dict(counts)}", flush=True)
    done = outcomes(args.clone)
    fate = {name: "not run" if done[name] is None else STATUS.get(done[name], "killed") for name in sample}
    alive = [name for name in sample if fate[name] in ("survived", "not reached", "not run")]
    record = {
        "tool": "mutmut 3.8.1", "command": f"scripts/mutation_sample.py CLONE --number {args.number} --seed {args.seed}",
        "commit": subprocess.run(["git", "rev-parse", "HEAD"], cwd=args.clone, capture_output=True, text=True).stdout.strip(),
        "mutants_in_all": len(names), "sample": len(sample), "fates": dict(Counter(fate.values())),
        "killed_share": round(1 - len(alive) / len(sample), 4), "seconds": round(time.time() - started),
        "survivors": {name: mutmut(args.clone, "show", name).stdout for name in alive},
    }  # fmt: skip
    args.out.write_text(json.dumps(record, indent=1) + "\n")
    print({key: value for key, value in record.items() if key != "survivors"})


if __name__ == "__main__":
    main()
