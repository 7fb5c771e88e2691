"""When a process that ended is started again, and when that is given up."""

from dataclasses import dataclass

STABLE_SECONDS = 10.0
"""Who was ready for so long and then ends had bad luck: that counts as the first time."""
FIRST_SECONDS = 0.5
MOST_SECONDS = 30.0
MAX_FAILURES = 5
"""So often in a row, with nobody else to serve, and the server ends."""


@dataclass(slots=True)
class Patience:
    """How often one process has ended too soon, in a row."""

    failures: int = 0

    def after_end(self, ready_seconds: float) -> float:
        """Note that it ended after it had been ready for so long -> how long to wait before the next start."""
        self.failures = 1 if ready_seconds >= STABLE_SECONDS else self.failures + 1
        return min(MOST_SECONDS, FIRST_SECONDS * 2 ** (self.failures - 2)) if self.failures > 1 else 0.0

    @property
    def is_at_its_end(self) -> bool:
        """Whether another start would most likely end as the last ones did."""
        return self.failures >= MAX_FAILURES
