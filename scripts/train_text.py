"""Train a tiny language model: ``python scripts/train_text.py CONFIG [key=value ...]``, CONFIG a file or text_outcome."""

import sys

from flowrl.errors import UserError
from flowrl.text import load, train


def main(arguments: list[str]) -> int:
    """Run the recipe that the first argument names; return the exit code."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        return 0 if arguments else 2
    try:
        train(
            load(arguments[0], arguments[1:]),
            lambda line: print(line, flush=True),
            " ".join(["train_text.py", *arguments]),
        )
    except UserError as error:
        print(f"train_text: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
