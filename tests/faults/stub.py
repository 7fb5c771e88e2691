"""A server whose vectors are hashes, and which a text can break: `python -m faults.stub`.

It lives the real life of a process (signals, drain, exit codes) around models that compute nothing, so that each reply
can be checked to the last bit and each fault set off by the request that carries its mark. Faults come in at the
seams alone: the backend, the tokenizer, and what is called while the server loads.
"""

import argparse
import asyncio
import contextlib
import functools
import hashlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import uvloop

from fakes import SPEC, HashBackend, byte_tokenizer
from quiver import app, config, memory
from quiver.cli_processes import share_of, supervise
from quiver.cli_settings import given_place
from quiver.engine.model import Model, WarmUp
from quiver.engine.tokenizer import Tokenizer
from quiver.errors import EngineError, QuiverError
from quiver.place import Place
from quiver.telemetry import logs
from quiver.telemetry.observer import Exchange, Observer
from quiver.types import Encoding, Floats, Ints, PackedBatch

DIMENSIONS: Mapping[str, int] = {"stub/a": 32, "stub/b": 48, "stub/c": 64, "stub/wide": 2048}
"""Models of a full stub, with the length of their vectors: three to mix up, and one whose replies are megabytes."""
MARK = "!"
"""A text that begins so is a fault."""


class LaneKilled(BaseException):
    """What no lane survives."""


RAISED: Mapping[str, type[BaseException]] = {
    "raise": ValueError,
    "die": LaneKilled,
    "die-once": LaneKilled,
    "memory": MemoryError,
    "memory-unless-alone": MemoryError,
}
"""What a word raises in the lane."""


@functools.cache
def _reader() -> Tokenizer:
    return byte_tokenizer()


def ids_of(texts: Sequence[str]) -> list[Ints]:
    """Return the ids that the stub's tokenizer makes of texts."""
    return [encoding.ids for encoding in _reader().encode(texts, truncate=False)]


def vector_of(model: str, ids: Ints) -> Floats:
    """Return the unit vector that the stub gives an input."""
    digest = hashlib.shake_256(model.encode() + ids.tobytes()).digest(DIMENSIONS[model])
    vector = np.frombuffer(digest, np.uint8).astype(np.float32) - np.float32(127.5)
    return vector / np.sqrt((vector * vector).sum(keepdims=True))


FULL_SPEED = 20_000.0
"""Tokens a second that a stub's warm-up would find, where it does not sleep for each token."""


@dataclass(slots=True)
class Behaviour:
    """How a stub behaves without being asked to."""

    latency_seconds: float = 0.0
    """Of each batch."""
    seconds_per_token: float = 0.0
    """Of each batch, besides."""
    swap_every: int = 0
    """Give every so many-th batch its first two vectors in the wrong order; 0: never."""
    leak_bytes: int = 0
    """Kept by each batch for ever."""
    load_seconds: float = 0.0
    hoard: list[bytes] = field(default_factory=list)
    breaks: set[str] = field(default_factory=set)
    """What of the observer fails the next time, as inputs have told (`!observe exchange`)."""


class StubBackend(HashBackend):
    """A backend that hashes, and does what a mark says."""

    pooled = True

    def __init__(self, model: str, behaviour: Behaviour, loop: asyncio.AbstractEventLoop, lanes: int) -> None:
        super().__init__(lanes=lanes, batch_tokens=512)
        self._model = model
        self._behaviour = behaviour
        self._loop = loop
        self._num_batches = 0
        self._mark = int(ids_of([MARK])[0][0])
        self._once: set[str] = set()

    def forward(self, batch: PackedBatch) -> Floats:
        """Return (B, dimensions)."""
        inputs = [batch.ids[start:end] for start, end in pairwise(batch.cu_seqlens)]
        vectors = np.stack([vector_of(self._model, ids) for ids in inputs])  # (B, D)
        self._behave(vectors, len(batch.ids))
        for i, ids in enumerate(inputs):
            if ids[0] == self._mark:
                vectors = self._obey(_reader().decode(ids.tolist(), special_tokens=False), vectors, i)
        return vectors

    def _behave(self, vectors: Floats, num_tokens: int) -> None:
        behaviour = self._behaviour
        self._num_batches += 1
        if seconds := behaviour.latency_seconds + behaviour.seconds_per_token * num_tokens:
            time.sleep(seconds)
        if behaviour.leak_bytes:
            behaviour.hoard.append(os.urandom(behaviour.leak_bytes))
        if behaviour.swap_every and self._num_batches % behaviour.swap_every == 0 and len(vectors) > 1:
            vectors[[0, 1]] = vectors[[1, 0]]

    def _obey(self, text: str, vectors: Floats, i: int) -> Floats:
        """Do what the text says: `!stall 3`."""
        word, _, argument = text.removeprefix(MARK).partition(" ")
        self._end_if_told(word, argument, len(vectors))
        match word:
            case "stall":
                time.sleep(float(argument.split()[0]))
            case "stall-loop":
                self._loop.call_soon_threadsafe(time.sleep, float(argument.split()[0]))
            case "nan":
                vectors[i] = np.nan
            case "infinity":
                vectors[i, 0] = np.inf
            case "observe":
                self._behaviour.breaks.add(argument.split()[0])
            case "few":
                return vectors[:-1]
        return vectors

    def _end_if_told(self, word: str, argument: str, num_inputs: int) -> None:
        """Raise what a word stands for, or end the process."""
        if word == "exit":
            os._exit(3)
        if word == "die-once" and argument in self._once:
            return
        self._once.add(argument)
        if word in RAISED and not (word == "memory-unless-alone" and num_inputs == 1):
            raise RAISED[word]


OBSERVED = ("batch_computed", "inputs_computed")
"""Called in the lane, and on the event loop."""


def break_observer(observer: Observer, breaks: set[str]) -> None:
    """Let an observer fail once where it is told to."""

    def failing(name: str) -> None:
        if name in breaks:
            breaks.remove(name)
            raise RuntimeError("a stub's observer was told to")

    def wrapped(name: str, report: Callable[..., None]) -> Callable[..., None]:
        def call(*values: object) -> None:
            failing(name)
            report(*values)

        return call

    whole = observer.exchange

    @contextlib.contextmanager
    def exchange(method: str, headers: Mapping[str, str]) -> Iterator[Exchange]:
        with whole(method, headers) as exchange:
            yield exchange
        failing("exchange")

    for name in OBSERVED:
        setattr(observer, name, wrapped(name, getattr(observer, name)))
    observer.exchange = exchange  # type: ignore[method-assign]


class StubTokenizer(Tokenizer):
    """A byte tokenizer that breaks in the encoder's thread, if a text says so."""

    def encode(self, inputs: Sequence[object], **options: object) -> list[Encoding]:
        """Turn inputs into ids, or break."""
        for given in inputs:
            if isinstance(given, str) and given.startswith("!encode-"):
                word, _, argument = given.removeprefix("!encode-").partition(" ")
                if word == "raise":
                    raise RuntimeError("a stub was told to")
                if word == "die":
                    raise LaneKilled
                time.sleep(float(argument.split()[0]))
        return super().encode(inputs, **options)


def stub_model(model: str, behaviour: Behaviour, *, lanes: int) -> Model:
    """Make a model of the stub; call it on the event loop."""
    base = byte_tokenizer()
    tokenizer = StubTokenizer(base.backend, base.max_tokens, base.vocab_size, num_tail=0, quick_chars=0)
    spec = replace(SPEC, id=model, weights=model, aliases=(), dimensions=DIMENSIONS[model])
    return Model(spec, "float32", tokenizer, StubBackend(model, behaviour, asyncio.get_running_loop(), lanes))


async def serve(
    settings: config.Config, behaviour: Behaviour, options: argparse.Namespace, place: Place | None
) -> None:
    """Serve stubs until a signal."""
    memory.keep_small()
    parts = app.build(settings)
    break_observer(parts.service.observer, behaviour.breaks)
    speed = 1 / behaviour.seconds_per_token if behaviour.seconds_per_token else FULL_SPEED

    async def load() -> None:
        await asyncio.sleep(behaviour.load_seconds)
        if options.break_if and await asyncio.to_thread(Path(options.break_if).exists):
            os._exit(3)
        for name in settings.models.model:
            parts.engine.replicas.add(
                name, stub_model(name, behaviour, lanes=options.lanes), WarmUp(tokens_per_second=speed)
            )

    await app.run(parts, load, place)


def main() -> None:
    """Run a server as the command `quiver serve` does, with models that are stubs."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--models", type=int, default=1)
    arguments.add_argument("--lanes", type=int, default=2)
    arguments.add_argument("--break-if", metavar="FILE", help="end while loading where this file is there")
    arguments.add_argument("--set", action="append", default=[], metavar="SETTING=VALUE")
    arguments.add_argument("--behave", action="append", default=[], metavar="FIELD=NUMBER")
    options = arguments.parse_args()
    given = {name: value for name, _, value in (pair.partition("=") for pair in options.set)}
    flags = {"port": "0", "cache_entries": "0", "auth": "off", **given, "model": list(DIMENSIONS)[: options.models]}
    settings = config.load(env={}, flags=flags)
    kinds: Mapping[str, Callable[[str], float]] = {"swap_every": int, "leak_bytes": int}
    behaviour = Behaviour(**{n: kinds.get(n, float)(v) for n, _, v in (pair.partition("=") for pair in options.behave)})
    place = given_place()
    logs.configure(settings.server, secrets=config.secrets(settings), process=place.number if place else None)
    try:
        if place is None and settings.server.processes > 1:
            sys.exit(supervise(settings))
        uvloop.run(serve(share_of(settings, place), behaviour, options, place))
    except QuiverError as error:
        sys.stderr.write(f"quiver: {error.message}\n")
        sys.stderr.flush()
        if isinstance(error, EngineError):
            os._exit(app.exit_code(error))  # as the command does: a thread may be stuck
        sys.exit(app.exit_code(error))


if __name__ == "__main__":
    main()
