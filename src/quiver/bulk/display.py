"""How a run shows itself on standard error: a bar at a terminal, a log line now and then elsewhere."""

import time
from collections.abc import Callable
from typing import Self

import structlog
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from quiver.bulk.pipeline import Step

log = structlog.get_logger(__name__)
LOG_SECONDS = 10.0
_MINUTE = 60


class Rates:
    """How fast a run is since it began, and how long it will take."""

    def __init__(self, done_bytes: int, total_bytes: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self.num_lines = 0
        self.done_bytes = done_bytes
        self.total_bytes = total_bytes
        self._num_tokens = 0
        self._first_bytes = done_bytes
        self._clock = clock
        self._start = clock()

    def note(self, step: Step) -> None:
        """Count a step."""
        self.num_lines += step.num_lines
        self._num_tokens += step.num_tokens
        self.done_bytes = step.done_bytes

    @property
    def texts_per_second(self) -> float:
        """Lines that were done, those whose text came before included."""
        return self.num_lines / self._seconds

    @property
    def tokens_per_second(self) -> float:
        """Tokens that were computed."""
        return self._num_tokens / self._seconds

    @property
    def seconds_left(self) -> float | None:
        """None where nobody knows."""
        done = self.done_bytes - self._first_bytes
        if self.total_bytes is None or not done:
            return None
        return self._seconds * max(0, self.total_bytes - self.done_bytes) / done

    @property
    def _seconds(self) -> float:
        return max(1e-6, self._clock() - self._start)


class Display:
    """Shows the steps of one run."""

    def __init__(
        self, rates: Rates, name: str, console: Console | None = None, clock: Callable[[], float] = time.monotonic
    ) -> None:
        console = console or Console(stderr=True)
        self._rates = rates
        self._name = name
        self._clock = clock
        self._logged_at = clock()
        self._bar: Progress | None = None
        if console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                TaskProgressColumn(),
                TextColumn("{task.fields[rate]}"),
                TimeElapsedColumn(),
            )
            self._bar = Progress(*columns, console=console, refresh_per_second=4)
            self._task = self._bar.add_task(name, total=rates.total_bytes, completed=rates.done_bytes, rate="")

    def __enter__(self) -> Self:
        if self._bar:
            self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar:
            self._bar.stop()

    def __call__(self, step: Step) -> None:
        """Count a step and show it."""
        self._rates.note(step)
        if self._bar:
            self._bar.update(self._task, completed=self._rates.done_bytes, rate=self._words())
        elif self._clock() - self._logged_at >= LOG_SECONDS:
            self._logged_at = self._clock()
            self._log()

    def _words(self) -> str:
        rates = self._rates
        left = "" if rates.seconds_left is None else f"  {duration(rates.seconds_left)} left"
        return f"{rates.texts_per_second:,.0f} texts/s  {rates.tokens_per_second:,.0f} tokens/s{left}"

    def _log(self) -> None:
        rates, facts = self._rates, {}
        if rates.total_bytes:
            facts["percent"] = round(100 * rates.done_bytes / rates.total_bytes)
        if rates.seconds_left is not None:
            facts["seconds_left"] = round(rates.seconds_left)
        log.info(
            "embedding",
            output=self._name,
            lines=rates.num_lines,
            texts_per_second=round(rates.texts_per_second),
            tokens_per_second=round(rates.tokens_per_second),
            **facts,
        )


def duration(seconds: float) -> str:
    """Write a time for people: `42 s`, `3:05`, `2:10:00`."""
    minutes, rest = divmod(round(seconds), _MINUTE)
    if not minutes:
        return f"{rest} s"
    hours, minutes = divmod(minutes, _MINUTE)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
