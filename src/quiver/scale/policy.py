"""How many replicas a model should have: enough for the tokens that come, and for those that wait."""

import math
from collections.abc import Sequence

from quiver.scale.wire import LoadStats

FULL = 0.7
"""Part of the time that replicas should be at work: with more of it, waiting grows out of all proportion."""


def wanted_replicas(loads: Sequence[LoadStats], *, queue_seconds: float) -> int:
    """Return the number of replicas that the load of those that there are asks for; at least one.

    Busy ones ask for as many as leave each free for a part of its time. What waits longer than it may asks for as many
    more times the replicas as it waits longer.
    """
    if not loads:
        return 1
    speed = sum(load.tokens_per_second for load in loads)
    waiting_seconds = sum(load.waiting_tokens for load in loads) / speed if speed else 0.0
    for_rate = math.ceil(sum(load.busy for load in loads) / FULL)
    for_queue = math.ceil(len(loads) * waiting_seconds / queue_seconds) if waiting_seconds > queue_seconds else 0
    return max(1, for_rate, for_queue)
