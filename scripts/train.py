"""``torchrun scripts/train.py CONFIG [key=value ...]`` is ``flowrl train CONFIG [key=value ...]``."""

import sys

from flowrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["train", *sys.argv[1:]]))
