"""Whether models still compute: a forward pass of one token each, beside the lanes and not behind what waits."""

import asyncio
import time
from collections.abc import Sequence
from functools import partial

import numpy as np

from quiver.engine.model import Model
from quiver.engine.threads import in_daemon_thread
from quiver.errors import EngineError, NotReady
from quiver.types import Encoding

SECONDS = 5.0
"""A model that does not compute one token in so long is not ready."""
FRESH_SECONDS = 0.5
"""So long an answer holds: whoever asks more often costs no more."""


class Probe:
    """Lets one forward pass run, however many ask."""

    def __init__(self) -> None:
        self._checking: asyncio.Future[None] | None = None
        self._checked_at = -FRESH_SECONDS

    async def check(self, models: Sequence[Model]) -> None:
        """Compute one token with each. Raises `NotReady`."""
        if time.monotonic() - self._checked_at < FRESH_SECONDS:
            return
        if self._checking is None or self._checking.done():
            self._checking = asyncio.ensure_future(in_daemon_thread(partial(_compute_one_token, models), name="probe"))
        try:
            async with asyncio.timeout(SECONDS):
                await asyncio.shield(self._checking)
        except EngineError as error:
            raise NotReady(error.message) from error
        except TimeoutError as error:
            raise NotReady(f"a forward pass of one token takes longer than {SECONDS:g} s") from error
        self._checked_at = time.monotonic()


def _compute_one_token(models: Sequence[Model]) -> None:
    for model in models:
        try:
            model.compute([Encoding(np.zeros(1, np.int64))])
        except Exception as error:
            raise NotReady(f"{model.spec.id} cannot compute ({type(error).__name__})") from error
