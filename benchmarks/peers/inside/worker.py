"""A library in a process of its own: reads commands as lines of JSON, and answers each with one line.

It keeps the time itself, so that nothing but calls of the library is in it.
"""

import base64
import importlib
import json
import os
import sys
import time
from typing import Any

from peers.peer import Embed


def main() -> None:
    """Load the peer that the arguments name, say so, and do what comes until there is no more."""
    module, *arguments = sys.argv[1:]
    replies = os.fdopen(os.dup(1), "w")  # what a library prints must not get among the replies
    os.dup2(2, 1)
    embed: Embed = importlib.import_module(module).load(*arguments)
    embed(["ready?"])
    say(replies, {"ready": True})
    for line in sys.stdin:
        command = json.loads(line)
        say(replies, {"vectors": vectors, "measure": measure}[command.pop("do")](embed, **command))


def say(replies: Any, reply: dict[str, Any]) -> None:
    """Write one line."""
    replies.write(json.dumps(reply) + "\n")
    replies.flush()


def vectors(embed: Embed, texts: list[str]) -> dict[str, Any]:
    """Embed texts in one call and return the vectors' bytes."""
    found = embed(texts)  # (N, D)
    return {"shape": found.shape, "vectors": base64.b64encode(found.astype("<f4").tobytes()).decode()}


def measure(embed: Embed, texts: list[str], batch: int, calls: int, seconds: float) -> dict[str, Any]:
    """Call with `batch` texts at a time until the time is up or there were so many calls; at least once."""
    latencies: list[float] = []
    start = time.perf_counter()
    while not latencies or (len(latencies) < calls and time.perf_counter() - start < seconds):
        at = len(latencies) * batch % (len(texts) - batch + 1)
        sent = time.perf_counter()
        embed(texts[at : at + batch])
        latencies.append(time.perf_counter() - sent)
    return {"latencies": latencies, "seconds": time.perf_counter() - start}


if __name__ == "__main__":
    main()
