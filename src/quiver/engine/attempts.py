"""One batch through a model, whatever becomes of it: what fails is split until the culprit stands alone."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from quiver.errors import InferenceFailed, NotFinite, OutOfMemory, QuiverError
from quiver.types import Encoding, Floats, Results

Compute = Callable[[Sequence[Encoding]], Results]
"""Encodings -> B results, one for each, in order; blocks. Raises `MemoryError` where there is no room for so many."""
Outcome = Floats | QuiverError


@dataclass(frozen=True, slots=True)
class Attempts:
    """How batches are computed, and who is told of it."""

    compute: Compute
    computed: Callable[[int, int, float], None]
    """Told the inputs, tokens and seconds of each forward pass that went well."""
    failed: Callable[[QuiverError], None]
    """Told of each input that cannot be computed."""
    too_large: Callable[[int], None]
    """Told the tokens of a batch for which there was no memory."""

    def outcomes(self, encodings: Sequence[Encoding]) -> list[Outcome]:
        """Return a result or an error for each."""
        try:
            return self._results(encodings)
        except Exception as error:  # noqa: BLE001  a model may raise anything
            if isinstance(error, MemoryError):
                self.too_large(sum(map(len, encodings)))
            if len(encodings) == 1:
                return [self._refuse(error)]
            half = len(encodings) // 2
            return self.outcomes(encodings[:half]) + self.outcomes(encodings[half:])

    def _results(self, encodings: Sequence[Encoding]) -> list[Outcome]:
        start = time.perf_counter()
        results: list[Outcome] = list(self.compute(encodings))
        if len(results) != len(encodings):
            raise ValueError(f"{len(encodings)} inputs gave {len(results)} results")
        self.computed(len(encodings), sum(map(len, encodings)), time.perf_counter() - start)
        return results

    def _refuse(self, error: Exception) -> QuiverError:
        refusal: QuiverError
        if isinstance(error, NotFinite):
            refusal = NotFinite(error.message)  # an exception of its own: each is raised in another task
        elif isinstance(error, MemoryError):
            refusal = OutOfMemory("there is no memory left for this input: try again, or send a shorter one")
        else:
            refusal = InferenceFailed(f"the model cannot compute this input ({type(error).__name__})")
        self.failed(refusal)
        return refusal
