"""Train a process reward for a model and its rewards, and say how good it is at each noise level.

    python scripts/train_reward_model.py demo --out runs/latent_reward [--kind features --features transformer_blocks.2]
        [--loss bradley_terry] [--iterations 10] [--steps 500] [--run RUN] [key=value ...]

Draws ``iterations`` batches of the recipe's groups by the base model (``--run``: by the last checkpoint of a run), scores
them with the recipe's rewards, and trains on them noised anew. A config then names the folder:

    process:
      - {name: latent, args: {path: runs/latent_reward}, min_accuracy: 0.55}
    credit: {values: process}
"""

from __future__ import annotations

import argparse
from pathlib import Path

from flowrl.checkpoint import store
from flowrl.config import load
from flowrl.credit.quality import quality_text
from flowrl.distributed.backend import Backend
from flowrl.training.build import build
from flowrl.training.reward_model import RewardModelSettings, train_reward_model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--run", type=Path)
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
    a = parser.parse_intermixed_args()  # key=value may stand behind options, as the usage above has it
    trainer = build(load(a.config, a.overrides), Backend()).trainer
    if a.run:
        trainer.load_state(store.load(a.run / "checkpoints").state)
    settings = RewardModelSettings(
        kind=a.kind, features=tuple(filter(None, a.features.split(","))), loss=a.loss, tie=a.tie, steps=a.steps,
        levels=a.levels, width=a.width, seed=a.seed,
    )  # fmt: skip
    found = train_reward_model(trainer, settings, a.iterations, a.out, print)
    print(f"\nheld-out groups, noisiest level first ({a.out}):\n{quality_text(found)}")


if __name__ == "__main__":
    main()
