"""The other end of a ProcessCaller: ``python -m flowrl.scoring.worker_main NAME`` loads a reward and scores batches.

Frames of ``flowrl.scoring.wire`` come in on standard input and go out on standard output; whatever else writes to
standard output, the reward's prints too, goes to standard error. The process ends with its input.
"""

from __future__ import annotations

import os
import platform
import sys
import threading
from collections.abc import Sequence
from queue import SimpleQueue
from typing import IO, Any

from flowrl import __version__
from flowrl.config.schema import RewardEntry
from flowrl.errors import UserError
from flowrl.scoring import wire
from flowrl.scoring.adapt import load_reward
from flowrl.scoring.executors.contract import CallFailed, Residence

_Frame = tuple[dict[str, Any], bytes]


def main(argv: Sequence[str]) -> int:
    """Serve one reward until the input ends."""
    if len(argv) != 1:
        sys.stderr.write("usage: python -m flowrl.scoring.worker_main NAME, started by flowrl\n")
        return 2
    inbox, outbox = _own_streams()
    frames: SimpleQueue[_Frame] = SimpleQueue()
    threading.Thread(target=_read, args=(inbox, frames), daemon=True).start()
    hello = {"type": "hello", "protocol": wire.PROTOCOL, "flowrl": __version__, "python": platform.python_version()}
    wire.write_frame(outbox, hello)
    load, _ = frames.get()
    label = str(load["label"])
    try:
        made = load_reward(RewardEntry(name=argv[0], args=load["args"], opponents=load["opponents"]))
        reward = Residence(label, made, load.get("offload") is True)
    except (UserError, CallFailed) as error:
        wire.write_frame(outbox, {"type": "failed", "error": str(error)})
        return 1
    wire.write_frame(outbox, {"type": "ready"})
    while True:
        header, body = frames.get()
        wire.write_frame(outbox, _answer(reward, header, body))


def _own_streams() -> tuple[IO[bytes], IO[bytes]]:
    """Keep the pipes to ourselves: the reward reads nothing, and prints to standard error."""
    inbox, outbox = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    nothing = os.open(os.devnull, os.O_RDONLY)
    os.dup2(nothing, 0)
    os.close(nothing)
    os.dup2(2, 1)
    sys.stdout = sys.stderr
    return inbox, outbox


def _read(inbox: IO[bytes], frames: SimpleQueue[_Frame]) -> None:
    """Pass frames on; leave when there are no more, even where the reward hangs: nobody waits for it."""
    try:
        while (frame := wire.read_frame(inbox, wire.LOCAL_LIMITS)) is not None:
            frames.put(frame)
    except wire.WireError as error:
        sys.stderr.write(f"flowrl worker: {error}\n")
        sys.stderr.flush()
    os._exit(0)


def _answer(reward: Residence, header: dict[str, Any], body: bytes) -> dict[str, Any]:
    number = header.get("id")
    try:
        batch = wire.unpack(header["batch"], body, wire.LOCAL_LIMITS)
        result = wire.pack_result(reward.score(batch, header.get("last") is not False))
        wire.dumps(result)
    except (CallFailed, wire.WireError) as error:
        fatal = isinstance(error, CallFailed) and error.fatal
        return {"type": "failed", "id": number, "error": str(error), "fatal": fatal}
    return {"type": "result", "id": number, "result": result}


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
