"""Several chunks at once, one behind the other: the lanes never wait for the disk, and the disk bounds what is read.

    read (a thread) ──> flights (at most so many) ──> write (a thread), in the order of reading
      └────────────── only when a chunk was written ──────┘

A flight is the computation of those texts of a chunk that no chunk before it had.
"""

import asyncio
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np

from quiver.bulk.chunks import Chunk
from quiver.bulk.lines import Bad, BadLine, Fault, Line, Rows, Vectors
from quiver.bulk.window import Flight, Outcomes, Window
from quiver.bulk.writer import Writer
from quiver.errors import InferenceFailed, InvalidInput, QuiverError

Embed = Callable[[Sequence[str]], Awaitable[Vectors]]
"""Texts -> a vector each. Raises `InvalidInput` or `InferenceFailed` for a text, anything else for all."""


@dataclass(frozen=True, slots=True)
class Step:
    """What one chunk added."""

    num_lines: int
    num_texts: int
    """Those that were computed."""
    num_tokens: int
    done_bytes: int


@dataclass(frozen=True, slots=True)
class _Waiting:
    """A chunk whose vectors are on their way."""

    chunk: Chunk
    lines: Sequence[Line]
    seats: Sequence[tuple[Flight, int]]
    own: Flight | None
    """The flight of those texts that this chunk was the first to have."""


class Pipeline:
    """Takes chunks through an embedder to a writer."""

    def __init__(
        self,
        embed: Embed,
        writer: Writer,
        *,
        max_flights: int,
        skip_bad: bool,
        on_step: Callable[[Step], None] = lambda _: None,
    ) -> None:
        self._embed = embed
        self._writer = writer
        self._max_flights = max_flights
        self._skip_bad = skip_bad
        self._on_step = on_step
        self._dimensions = writer.state.job.dimensions
        self._window = Window(self._dimensions)
        self._waiting: deque[_Waiting] = deque()

    async def run(self, read: Callable[[], Chunk | None]) -> None:
        """Take all chunks through; whatever ends it, the writer has said on the disk how far it came.

        Raises `BadLine`, `OutputFailed`, and what the embedder raises.
        """
        with ThreadPoolExecutor(1, "bulk-read") as reading, ThreadPoolExecutor(1, "bulk-write") as writing:
            loop = asyncio.get_running_loop()
            try:
                is_over = False
                while not is_over or self._waiting:
                    if is_over or len(self._waiting) >= self._max_flights:
                        await self._land(lambda work: loop.run_in_executor(writing, work))
                    elif chunk := await loop.run_in_executor(reading, read):
                        self._waiting.append(self._start(chunk))
                    else:
                        is_over = True
            finally:
                await self._cancel()
                await asyncio.shield(loop.run_in_executor(writing, self._writer.save))

    def _start(self, chunk: Chunk) -> _Waiting:
        """Have computed what no chunk before had."""
        lines = chunk.lines
        texts = [line.text for line in lines]
        own = None
        if unknown := self._window.unknown(texts):
            own = asyncio.create_task(outcomes(self._embed, unknown, self._dimensions))
            self._window.add(unknown, own)
        seats = self._window.seats(texts)
        self._window.trim()
        return _Waiting(chunk, lines, seats, own)

    async def _land(self, in_thread: Callable[[Callable[[], None]], Awaitable[None]]) -> None:
        """Write the oldest chunk once its vectors are there."""
        waiting = self._waiting[0]
        rows, bad = await _assembled(waiting, self._dimensions)
        if bad and not self._skip_bad:
            done = f"{self._writer.state.place.num_lines:,} lines are done"
            raise BadLine(f"{bad[0]} ({done}; mend it and run again, or give --skip-bad)")
        await in_thread(lambda: self._writer.write(rows, bad, waiting.chunk.end))
        self._waiting.popleft()
        own = waiting.own.result() if waiting.own else None
        num_texts, num_tokens = (len(own.vectors), own.num_tokens) if own else (0, 0)
        self._on_step(Step(len(waiting.chunk.items), num_texts, num_tokens, waiting.chunk.done_bytes))

    async def _cancel(self) -> None:
        flights = [waiting.own for waiting in self._waiting if waiting.own]
        for flight in flights:
            flight.cancel()
        await asyncio.gather(*flights, return_exceptions=True)


async def _assembled(waiting: _Waiting, dimensions: int) -> tuple[Rows, list[Bad]]:
    """Return the rows of a chunk's good lines, and its bad lines, each in their order."""
    found = {flight: await flight for flight in dict.fromkeys(flight for flight, _ in waiting.seats)}
    faults = [found[flight].faults.get(row) for flight, row in waiting.seats]
    kept = [i for i, fault in enumerate(faults) if fault is None]
    vectors = np.empty((len(kept), dimensions), np.float32)
    for flight, outcome in found.items():
        places = [place for place, i in enumerate(kept) if waiting.seats[i][0] is flight]
        vectors[places] = outcome.vectors[[waiting.seats[kept[place]][1] for place in places]]
    return Rows([waiting.lines[i] for i in kept], vectors), _bad(waiting.chunk.items, faults)


def _bad(items: Sequence[Line | Bad], faults: Sequence[Fault | None]) -> list[Bad]:
    """Return what was bad when it was read and what the model refused; `faults` are those of the lines."""
    told, bad = iter(faults), []
    for item in items:
        if isinstance(item, Bad):
            bad.append(item)
        elif fault := next(told):
            bad.append(Bad(item.file, item.number, str(fault)))
    return bad


async def outcomes(embed: Embed, texts: Sequence[str], dimensions: int) -> Outcomes:
    """Embed texts; where some are refused, halve them until only those are left out that are the reason."""
    try:
        vectors = await embed(texts)
    except (InvalidInput, InferenceFailed) as error:
        if len(texts) == 1:
            return Outcomes(np.zeros((1, dimensions), np.float32), {0: Fault(_about_one(error))}, 0)
        middle = len(texts) // 2
        first, last = [await outcomes(embed, half, dimensions) for half in (texts[:middle], texts[middle:])]
        faults = first.faults | {middle + i: fault for i, fault in last.faults.items()}
        return Outcomes(np.concatenate((first.vectors, last.vectors)), faults, first.num_tokens + last.num_tokens)
    return Outcomes(vectors.rows, {}, vectors.num_tokens)


def _about_one(error: QuiverError) -> str:
    """Say it of the text: which of a request's inputs it was tells nothing here."""
    return error.message.replace("input 0 ", "the text ").replace("input[0] ", "the text ")
