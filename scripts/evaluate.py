"""``torchrun scripts/evaluate.py RUN|CONFIG [key=value ...]`` is ``flowrl eval RUN|CONFIG [key=value ...]``."""

import sys

from flowrl.cli import main

if __name__ == "__main__":
    sys.exit(main(["eval", *sys.argv[1:]]))
