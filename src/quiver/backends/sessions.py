"""How ONNX Runtime's backends share the cores: two sessions for each model.

Under load each lane computes on its own core (the narrow session): no lane waits for another's threads, which is worth
a tenth of the throughput. A forward pass that finds itself alone spreads over all cores (the wide session): that halves
the latency of an idle server. Its threads wait for their next piece of work awake, as long as the pass runs: to wake them
for each piece takes a third of a short text's time. Each has a core of its own: Linux may wake one on the core of the
thread that waits for it, where it then computes instead of beside it, and the pass takes twice as long.
"""

import functools
import math
import os
import threading
from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress

import onnxruntime as ort

from quiver import cgroups

MAX_BYTES_FOR_TWO = 512 << 20
"""Each session packs the weights for itself; a model that is larger than this has the wide one alone."""

_ARENA = {
    "max_mem": 0,
    "arena_extend_strategy": 0,
    "initial_chunk_size_bytes": -1,
    "max_dead_bytes_per_chunk": -1,
}
"""ONNX Runtime's defaults, of which it wants each to be said: no limit, and each extension twice as large as the last."""
_ARENA_LOCK = threading.Lock()

_NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc")
"""What ONNX Runtime says in an error of no other kind than most."""


class Sessions:
    """One model in a wide session and a narrow one."""

    def __init__(self, start: Callable[[ort.SessionOptions], ort.InferenceSession], *, num_bytes: int) -> None:
        """Let `start` make each session of a model whose weights have so many bytes."""
        is_two = num_bytes <= MAX_BYTES_FOR_TWO and cores() > 1  # on one core there is no difference
        self._cores = own_cores() if is_two else ()
        # Lanes that share one session would have each other's threads spin in their way.
        wanted = [session_options(threads=cores(), spin=is_two, on=self._cores), session_options(threads=1)]
        with ThreadPoolExecutor(2, "session") as starters:
            started = list(starters.map(start, wanted[: 1 + is_two]))
        self._wide: ort.InferenceSession = started[0]
        self._narrow = started[-1]
        self._running = 0
        self._lock = threading.Lock()

    @contextmanager
    def free(self) -> Iterator[ort.InferenceSession]:
        """Lend a session for one forward pass: the wide one to a pass that finds itself alone.

        Raises `MemoryError` where ONNX Runtime finds none.
        """
        with self._lock:
            self._running += 1
            is_wide = self._running == 1
        try:
            with _on(self._cores[:1] if is_wide else ()):
                yield self._wide if is_wide else self._narrow
        except Exception as error:
            if any(words in str(error) for words in _NO_MEMORY):
                raise MemoryError("ONNX Runtime found no memory for a batch") from error
            raise
        finally:
            with self._lock:
                self._running -= 1

    def close(self) -> None:
        """Give back the sessions' memory; none may be lent."""
        del self._wide, self._narrow


def cores() -> int:
    """Count the cores that this process may use."""
    seen = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return within(seen, cgroups.cores())


def within(seen: int, allowed: float) -> int:
    """Count as many as there is time for: a container sees all of its machine's, and is stopped when its time is up."""
    return max(1, math.ceil(min(seen, allowed)))


def own_cores() -> Sequence[int]:
    """Return the cores that this process may use, as the system numbers them; none where it has only some time on more."""
    return all_of(os.sched_getaffinity(0), cores()) if hasattr(os, "sched_getaffinity") else ()


def all_of(seen: Collection[int], number: int) -> Sequence[int]:
    """Return the cores that are seen if there is time for so many of them.

    Servers that each have two cores' time of a large machine would all crowd together on the same two.
    """
    return sorted(seen) if len(seen) == number else ()


@contextmanager
def _on(core: Sequence[int]) -> Iterator[None]:
    """Let the calling thread compute on a core, if one is named, and go where it likes afterwards."""
    if not core:
        yield
        return
    before = os.sched_getaffinity(0)
    with suppress(OSError):  # it is not ours any more, or not ours to choose
        os.sched_setaffinity(0, core)
    try:
        yield
    finally:
        with suppress(OSError):
            os.sched_setaffinity(0, before)


def session_options(*, threads: int, spin: bool = False, on: Sequence[int] = ()) -> ort.SessionOptions:
    """Return what a session is told; its threads `spin` between two pieces of a pass, or sleep.

    Its own threads stay `on` all of these cores but the first, which is for the thread that calls.
    """
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    if len(on) == threads > 1:
        options.add_session_config_entry("session.intra_op_thread_affinities", ";".join(str(n + 1) for n in on[1:]))
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # the pattern's key is a XOR of sizes: two shapes can share one
    # The arena keeps what the largest batch took. Batches are bounded, so it is small, and worth 6 % of the throughput.
    options.enable_cpu_mem_arena = True
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", str(int(spin)))
    options.add_session_config_entry("session.force_spinning_stop", "1")  # between passes the cores are left to others
    return options


def share_arena(options: ort.SessionOptions) -> None:
    """Let a session compute in the arena of all that do: each of its own would keep what its largest batch took.

    For sessions whose batches are bounded: what a large one took could not be given back beneath another's.
    """
    with _ARENA_LOCK:  # a model's sessions are made in two threads
        _make_arena()
    options.add_session_config_entry("session.use_env_allocators", "1")


@functools.cache
def _make_arena() -> None:
    cpu = ort.OrtMemoryInfo("Cpu", ort.OrtAllocatorType.ORT_ARENA_ALLOCATOR, 0, ort.OrtMemType.DEFAULT)
    ort.create_and_register_allocator(cpu, ort.OrtArenaCfg(_ARENA))
