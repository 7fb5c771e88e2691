"""How ONNX Runtime's backends share the cores: two sessions for each model.

Under load each lane computes on its own core (the narrow session): no lane waits for another's threads, which is worth
a tenth of the throughput. A forward pass that finds itself alone spreads over all cores (the wide session): that halves
the latency of an idle server.
"""

import os
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import onnxruntime as ort

MAX_BYTES_FOR_TWO = 512 << 20
"""Each session packs the weights for itself; a model that is larger than this has the wide one alone."""

_NO_MEMORY = ("Failed to allocate memory", "bad allocation", "bad_alloc")
"""What ONNX Runtime says in an error of no other kind than most."""


class Sessions:
    """One model in a wide session and a narrow one."""

    def __init__(self, start: Callable[[ort.SessionOptions], ort.InferenceSession], *, num_bytes: int) -> None:
        """Let `start` make each session of a model whose weights have so many bytes."""
        self._wide: ort.InferenceSession = start(_options(threads=cores()))
        self._narrow = start(_options(threads=1)) if num_bytes <= MAX_BYTES_FOR_TWO else self._wide
        self._running = 0
        self._lock = threading.Lock()

    @contextmanager
    def free(self) -> Iterator[ort.InferenceSession]:
        """Lend a session for one forward pass: the wide one to a pass that finds itself alone.

        Raises `MemoryError` where ONNX Runtime finds none.
        """
        with self._lock:
            self._running += 1
            session = self._wide if self._running == 1 else self._narrow
        try:
            yield session
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
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _options(*, threads: int) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.enable_mem_pattern = False  # the pattern's key is a XOR of sizes: two shapes can share one
    # The arena keeps what the largest batch took. Batches are bounded, so it is small, and worth 6 % of the throughput.
    options.enable_cpu_mem_arena = True
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")  # idle threads leave the core to others
    return options
