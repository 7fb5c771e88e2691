"""A client that checks every vector to the last bit: `python -m faults.mixing`; prints one JSON object.

Many connections ask for batches of all sizes, models and forms at once, and cut some of them off in the middle: a vector
that went to another input, another request or another connection is not the hash of the text that it was asked for.
"""

import argparse
import asyncio
import base64
import json
import random
from dataclasses import asdict, dataclass, field

import numpy as np
import uvloop

from faults.load import Answer, Line, Pool, embed
from faults.stub import DIMENSIONS, ids_of, vector_of
from quiver.types import Floats

MODELS = list(DIMENSIONS)[:3]
NUM_TEXTS = 2500
MAX_BYTES = 16
MAX_INPUTS = 64
CUT_SHARE = 0.1
SHOWN = 3


@dataclass(slots=True)
class Tally:
    """What was checked, and what was wrong."""

    vectors: int = 0
    requests: int = 0
    cut: int = 0
    wrong: int = 0
    statuses: dict[str, int] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)

    def fault(self, text: str) -> None:
        """Count something wrong, and keep the first few."""
        self.wrong += 1
        self.faults = [*self.faults, text][:SHOWN]


class Texts:
    """Distinct texts, and the vector that each model gives them."""

    def __init__(self, seed: int) -> None:
        rng = random.Random(seed)  # noqa: S311  repeatable on purpose
        self.texts = [f"{seed} {i} " + "x" * rng.randint(0, MAX_BYTES) for i in range(NUM_TEXTS)]
        ids = ids_of(self.texts)
        self.vectors = {model: [vector_of(model, each) for each in ids] for model in MODELS}
        self.base64 = {m: [base64.b64encode(v.tobytes()).decode() for v in each] for m, each in self.vectors.items()}


def faults_of(answer: Answer, expected: list[Floats] | list[str]) -> list[str]:
    """Say which vectors of a reply are not the expected ones, in order."""
    data = answer.json()["data"]
    if [item["index"] for item in data] != list(range(len(expected))):
        return [f"{len(expected)} inputs gave the indices {[item['index'] for item in data]}"]
    found = [item["embedding"] for item in data]
    if isinstance(expected[0], str):
        return [f"{f!r} is not {e!r}" for f, e in zip(found, expected, strict=True) if f != e]
    return [
        f"{f[:3]} is not {e[:3]}"
        for f, e in zip(found, expected, strict=True)
        if not np.array_equal(np.array(f, np.float32), e)
    ]


class Client:
    """One connection after the other, one request at a time."""

    def __init__(self, pool: Pool, texts: Texts, tally: Tally, seed: int) -> None:
        self._pool = pool
        self._texts = texts
        self._tally = tally
        self._rng = random.Random(seed)  # noqa: S311  repeatable on purpose

    async def run(self, vectors: int) -> None:
        """Ask until all clients together have checked so many vectors."""
        line = await self._pool.open()
        while self._tally.vectors < vectors:
            if not line.usable:
                line = await self._pool.open()
            await self._ask(line)
        line.cut()

    async def _ask(self, line: Line) -> None:
        rng, tally, texts = self._rng, self._tally, self._texts
        model = rng.choice(MODELS)
        chosen = rng.choices(range(NUM_TEXTS), k=rng.choice((1, 2, rng.randint(1, MAX_INPUTS), MAX_INPUTS)))
        form = rng.choice(("float", "base64"))
        request = embed([texts.texts[i] for i in chosen], model=model, encoding_format=form)
        back = asyncio.get_running_loop().create_future()
        line.send(request, lambda answer: back.done() or back.set_result(answer))
        tally.requests += 1
        if rng.random() < CUT_SHARE:
            await asyncio.wait({back}, timeout=rng.uniform(0, 0.2))
            if not back.done():
                tally.cut += 1
                line.cut(reset=rng.random() < 0.5)
                await back
                return
        answer: Answer = await back
        tally.statuses[str(answer.status)] = tally.statuses.get(str(answer.status), 0) + 1
        if answer.status != 200:
            return
        right = (texts.base64 if form == "base64" else texts.vectors)[model]
        tally.vectors += len(chosen)
        for fault in faults_of(answer, [right[i] for i in chosen]):
            tally.fault(f"{model} {form}: {fault}")


async def check(url: str, *, connections: int, vectors: int, seed: int) -> Tally:
    """Check so many vectors over so many connections."""
    tally, texts = Tally(), Texts(seed)
    async with Pool(url) as pool:
        clients = [Client(pool, texts, tally, seed * 1000 + i) for i in range(connections)]
        await asyncio.gather(*(client.run(vectors) for client in clients))
    return tally


def main() -> None:
    """Check, and print the tally."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("url")
    for name in ("connections", "vectors", "seed"):
        arguments.add_argument(f"--{name}", type=int, required=True)
    print(json.dumps(asdict(uvloop.run(check(**vars(arguments.parse_args()))))))  # noqa: T201  its output


if __name__ == "__main__":
    main()
