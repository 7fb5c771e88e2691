"""When lanes come free: one after the other, or who comes meanwhile would wait for a whole batch, however many there are."""


class Phases:
    """When each lane's batch is expected to end, by the monotonic clock; the scheduler holds its lock."""

    def __init__(self, lanes: int) -> None:
        self._lanes = lanes
        self._ends: dict[int, float] = {}

    def begin(self, lane: int, end: float) -> None:
        """Note that a lane is at work until then."""
        self._ends[lane] = end

    def end(self, lane: int) -> None:
        """Note that a lane has come free, or is no more."""
        self._ends.pop(lane, None)

    def meet(self, now: float, seconds: float) -> bool:
        """Tell whether a batch of so many seconds would end together with another lane's."""
        apart = seconds / (2 * self._lanes)
        return any(abs(now + seconds - end) < apart for end in self._ends.values())
