"""One request's inputs through encoding and the lanes: what every verb does, whatever it wants in the end."""

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from quiver.backends.sessions import cores
from quiver.capacity import Limits
from quiver.config import EngineConfig, Scope
from quiver.engine.cache import Cache, Origin
from quiver.engine.encoders import Encoders
from quiver.engine.pooling import pool
from quiver.engine.replicas import Replica
from quiver.engine.watchdog import Watchdog
from quiver.errors import InvalidInput, TooManyInputs
from quiver.telemetry.observer import Observer, Work
from quiver.types import Caller, Encoding, Floats, Input, ModelRequest, Pair, Priority, Timings, Usage


@dataclass(frozen=True, slots=True)
class Form:
    """How inputs are read, and what is wanted of them."""

    prompt: str = ""
    """Stands before each text."""
    fill: int = 0
    """Tokens that each encoding is brought to, with masks; 0: as it is."""
    per_token: bool = False
    unscaled: bool = False
    is_fresh: bool = False
    """What is known is not looked up, and nothing is kept."""


PLAIN = Form()


@dataclass(frozen=True, slots=True)
class Computed:
    """What the lanes gave for one request's inputs."""

    results: Sequence[Floats]
    encodings: Sequence[Encoding]
    usage: Usage


@dataclass(frozen=True, slots=True)
class Known:
    """Results that were computed before, and who shares them."""

    cache: Cache
    scope: Scope = "auto"

    def origin(self, replica: Replica, caller: Caller) -> Origin:
        """Name all that a replica's results for a caller depend on, beside the inputs."""
        spec = replica.model.spec
        return Origin(
            scope=_scope(self.scope, caller),
            model=spec.id,
            revision=f"{spec.revision} {replica.fingerprint}",
            backend=replica.model.backend.name,
            dtype=replica.model.dtype,
            pooling=spec.pooling,
            kind=spec.kind,
        )


@dataclass(frozen=True, slots=True)
class _Given:
    """A result for each input, how long each waited for a lane, and which of them were known before."""

    results: Sequence[Floats]
    waits: Sequence[float]
    """Of those that were computed, in seconds."""
    cached: tuple[int, ...] = ()


class Runner:
    """Has inputs encoded, hands over to a replica's lanes those that are not known, and keeps time."""

    def __init__(
        self, config: EngineConfig, observer: Observer, watchdog: Watchdog, known: Known | None = None
    ) -> None:
        self._config = config
        self._observer = observer
        self._known = known
        self.encoders = Encoders(config.encoders or cores(), watchdog)

    @property
    def limits(self) -> Limits:
        """How much is taken."""
        config = self._config
        return Limits(
            client_batch_size=config.max_client_batch_size,
            waiting_tokens=config.max_waiting_tokens,
            truncate=config.truncate,
            encoders=self.encoders.num_threads,
        )

    async def run(
        self,
        replica: Replica,
        request: ModelRequest,
        inputs: Sequence[Input | Pair],
        caller: Caller,
        form: Form = PLAIN,
    ) -> Computed:
        """Return a result for each input. Raises what encoding and the scheduler raise."""
        start, request = time.perf_counter(), _in_turn(request, caller)
        try:
            encodings = await self._encode(replica, request, inputs, form)
            _check_tokens(encodings)
            encoded = time.perf_counter()
            if self._known and not form.is_fresh:
                given = await self._look_up(self._known, replica, request, encodings, caller)
            else:
                given = await self._submit(replica, request, encodings, caller)
        except BaseException:
            self._note_failure(replica, len(inputs), start)
            raise
        return Computed(given.results, encodings, self._usage(replica, encodings, start, encoded, given))

    async def run_together(
        self, replica: Replica, request: ModelRequest, inputs: Sequence[Input], caller: Caller, form: Form
    ) -> tuple[Floats, Usage]:
        """Read all texts as one, and pool each one's tokens -> (B, H): late chunking (Günther et al. 2024)."""
        start, request = time.perf_counter(), _in_turn(request, caller)
        tokenizer = replica.model.tokenizer
        try:
            whole, ends = tokenizer.join(await self._encode(replica, request, inputs, form))
            encoded = time.perf_counter()
            given = await self._submit(replica, request, [whole], caller)
        except BaseException:
            self._note_failure(replica, len(inputs), start)
            raise
        spans = np.concatenate(([tokenizer.num_head], ends))
        usage = self._usage(replica, [whole], start, encoded, given)
        return pool(given.results[0][: ends[-1]], spans, "mean"), usage

    def check_count(self, count: int, field: str) -> None:
        """Refuse before any work what could only fail after it."""
        if not count:
            raise InvalidInput(f"{field} is empty: send at least one text", param=field)
        if count > self._config.max_client_batch_size:
            raise TooManyInputs(
                f"{count} inputs are more than the {self._config.max_client_batch_size} of one request", param=field
            )

    def _note_failure(self, replica: Replica, inputs: int, start: float) -> None:
        """Tell of inputs for which there will be no results, be it that their client has left."""
        spec = replica.model.spec
        self._observer.inputs_left(spec.id, spec.kind, inputs, time.perf_counter() - start)

    def close(self) -> None:
        """End the threads."""
        self.encoders.close()

    async def _encode(
        self, replica: Replica, request: ModelRequest, inputs: Sequence[Input | Pair], form: Form
    ) -> Sequence[Encoding]:
        tokenizer, side = replica.model.tokenizer, request.truncate_side
        truncate = self._config.truncate if request.truncate is None else request.truncate
        encode = partial(tokenizer.encode, inputs, truncate=truncate or bool(form.fill), side=side, prompt=form.prompt)
        size = _size(inputs)
        encodings: Sequence[Encoding] = (
            encode() if size <= tokenizer.quick_chars else await self.encoders.run(encode, size=size)
        )
        if form.fill:
            encodings = tokenizer.fill(encodings, form.fill)
        if form.per_token or form.unscaled:
            return [replace(e, per_token=form.per_token, unscaled=form.unscaled) for e in encodings]
        return encodings

    async def _look_up(
        self, known: Known, replica: Replica, request: ModelRequest, encodings: Sequence[Encoding], caller: Caller
    ) -> _Given:
        """Compute what is not known."""
        waits: list[float] = []

        async def compute(places: Sequence[int]) -> Sequence[Floats]:
            given = await self._submit(replica, request, [encodings[i] for i in places], caller)
            waits.extend(given.waits)
            return given.results

        keys = known.cache.keys.of(known.origin(replica, caller), encodings)
        found = await known.cache.look_up(keys, compute, urgent=request.priority is Priority.INTERACTIVE)
        cached = tuple(i for i, is_cached in enumerate(found.cached) if is_cached)
        return _Given(found.results, waits, cached)

    async def _submit(
        self, replica: Replica, request: ModelRequest, encodings: Sequence[Encoding], caller: Caller
    ) -> _Given:
        """Compute all of them."""
        waits: list[float] = []
        results = await replica.scheduler.submit(
            encodings, caller=caller, priority=request.priority, note_waits=waits.extend
        )
        return _Given(results, waits)

    def _usage(
        self, replica: Replica, encodings: Sequence[Encoding], start: float, encoded: float, given: _Given
    ) -> Usage:
        end = time.perf_counter()
        timings = Timings(
            encode=encoded - start,
            compute=end - encoded,
            total=end - start,
            queue=sum(given.waits) / max(1, len(given.waits)),
            first=min(given.waits, default=0.0),
            start=start,
        )
        usage = Usage(
            num_tokens=sum(map(len, encodings)),
            truncated=tuple(i for i, encoding in enumerate(encodings) if encoding.truncated),
            timings=timings,
            cached=given.cached,
        )
        num_read = usage.num_tokens - sum(len(encodings[i]) for i in given.cached)
        spec = replica.model.spec
        self._observer.inputs_computed(Work(spec.id, spec.kind, encodings, num_read, timings, given.waits))
        return usage


def _in_turn(request: ModelRequest, caller: Caller) -> ModelRequest:
    """Return a request with the turn that its caller may have."""
    return replace(request, priority=Priority.BULK) if caller.priority is Priority.BULK else request


def _scope(scope: Scope, caller: Caller) -> str:
    """Name who shares a caller's results; "" is everybody."""
    if scope == "shared":
        return ""
    return caller.account or (f"caller {caller.id}" if scope == "caller" else "")


def _size(inputs: Sequence[Input | Pair]) -> int:
    """Count characters, or tokens that were given."""
    return sum([len(i.query) + len(i.document) if isinstance(i, Pair) else len(i) for i in inputs])


def _check_tokens(encodings: Sequence[Encoding]) -> None:
    """Refuse a text of which a tokenizer without special tokens makes nothing."""
    for i, encoding in enumerate(encodings):
        if not len(encoding):
            raise InvalidInput(f"input {i} has no tokens: send a text that is not empty", param=f"input[{i}]")
