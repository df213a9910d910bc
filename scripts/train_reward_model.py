"""Train a process reward for a model and its rewards, and say how good it is at each noise level.

    python scripts/train_reward_model.py demo --out runs/latent_reward [--kind features --features transformer_blocks.2]
        [--loss bradley_terry] [--iterations 10] [--steps 500] [--run RUN] [--resume] [key=value ...]

Draws ``iterations`` batches of the recipe's groups by the base model (``--run``: by the last checkpoint of a run), scores
them with the recipe's rewards, and trains on them noised anew. A config then names the folder:

    process:
      - {name: latent, args: {path: runs/latent_reward}, min_accuracy: 0.55}
    credit: {values: process}

Each batch is on disk once it is scored, network and optimizer every ``--every`` steps. After a kill, or a stop by SIGTERM or
Ctrl-C (exit code 143 or 130), the same command with ``--resume`` goes on, bit for bit as if nothing had happened; with other
settings it is refused. A folder in use is refused without it. ``samples/`` and ``checkpoints/`` in the folder serve only that.
"""

from __future__ import annotations

import argparse
import shlex
import sys
from pathlib import Path

from flowrl.config import load
from flowrl.credit.quality import quality_text
from flowrl.distributed.backend import Backend
from flowrl.errors import UserError
from flowrl.training.build import build
from flowrl.training.reward_model import RewardModelSettings
from flowrl.training.reward_model_run import Asked, Journal, train_reward_model


def parsed(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", default="")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--every", type=int, default=100)
    parser.add_argument("--kind", choices=("latent", "features"), default="latent")
    parser.add_argument("--features", default="")
    parser.add_argument(
        "--loss", choices=("bradley_terry", "bradley_terry_ties", "thurstone", "regression"), default="bradley_terry"
    )
    parser.add_argument("--tie", type=float, default=0.0)
    parser.add_argument("--iterations", type=int, default=10)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--levels", type=int, default=8)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--seed", type=int, default=0)
    # key=value may stand behind options, as the usage above has it
    found = parser.parse_intermixed_args(arguments)
    for name in ("iterations", "steps", "every"):
        if vars(found)[name] < 1:
            parser.error(f"--{name}: expected a number of at least 1, got {vars(found)[name]}")
    return found


def main(arguments: list[str]) -> int:
    """Train as the arguments say; return the exit code."""
    a = parsed(arguments)
    settings = RewardModelSettings(
        kind=a.kind, features=tuple(filter(None, a.features.split(","))), loss=a.loss, tie=a.tie, steps=a.steps,
        levels=a.levels, width=a.width, seed=a.seed,
    )  # fmt: skip
    resumed = arguments if a.resume else [*arguments, "--resume"]
    again = shlex.join(["python", "scripts/train_reward_model.py", *resumed])
    try:
        config = load(a.config, a.overrides)
        run = str(Path(a.run)) if a.run else ""
        asked = Asked(config=config, settings=settings, iterations=a.iterations, run=run)
        journal = Journal(a.out, asked, resume=a.resume, every=a.every)
        trainer = build(config, Backend()).trainer
        found = train_reward_model(trainer, journal, lambda line: print(line, flush=True), again)
    except UserError as error:
        print(f"train_reward_model: {error}", file=sys.stderr)
        return 2
    print(f"\nheld-out groups, noisiest level first ({a.out}):\n{quality_text(found)}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
