"""Writes rows in their order, and says from time to time on the disk how far it is."""

import time
from collections.abc import Sequence
from dataclasses import replace

import msgspec

from quiver.bulk import checkpoint
from quiver.bulk.checkpoint import Checkpoint, Paths
from quiver.bulk.chunks import Place
from quiver.bulk.files import AppendFile, naming
from quiver.bulk.lines import Bad, Rows
from quiver.bulk.sinks import GROWING, SINKS, Sink

SYNC_SECONDS = 1.0
"""At most so much work is lost by a kill; waiting for the disk more often would cost speed."""


class Writer:
    """Owns the files of a run; used by one thread at a time."""

    def __init__(self, paths: Paths, start: Checkpoint, sync_seconds: float = SYNC_SECONDS) -> None:
        """Go on behind `start`. Raises `OutputFailed` or `MissingExtra`."""
        self.state = start
        """How far it is; the checkpoint on the disk may be a little behind."""
        self._paths = paths
        self._sync_seconds = sync_seconds
        self._saved_at = time.monotonic()
        self._is_whole = True
        """Whether the files hold what `state` says and no more: false where writing failed in between."""
        job = start.job
        self._sink: Sink = SINKS[job.output_form](
            paths.part, start.sizes, dimensions=job.dimensions, has_ids=job.has_ids
        )
        self._errors: AppendFile | None = None
        try:
            self._open(start)
        except BaseException:
            self.close()
            raise

    def _open(self, start: Checkpoint) -> None:
        if size := start.sizes.get("errors", 0):
            self._errors = AppendFile(self._paths.errors, size)
        else:
            with naming(self._paths.errors):
                self._paths.errors.unlink(missing_ok=True)
        if not start.place.num_lines:
            self.save()  # a disk that is full, or read only, shows before anything is computed

    def write(self, rows: Rows, bad: Sequence[Bad], end: Place) -> None:
        """Append the rows of some lines and what was bad among them; `end` is the place behind them."""
        self._is_whole = False
        if rows.lines:
            self._sink.write(rows)
        for line in bad:
            self._note(line)
        state = self.state
        num_rows, num_bad = state.num_rows + len(rows.lines), state.num_bad + len(bad)
        self.state = replace(state, place=end, num_rows=num_rows, num_bad=num_bad)
        self._is_whole = True
        if time.monotonic() - self._saved_at >= self._sync_seconds:
            self.save()

    def save(self) -> None:
        """Wait until all that was written is on the disk, and say so there; where writing failed, the last word stands."""
        if not self._is_whole:
            return
        sizes = self._sink.sync() | ({"errors": self._errors.sync()} if self._errors else {})
        self.state = replace(self.state, sizes=sizes)
        checkpoint.write(self._paths, self.state)
        self._saved_at = time.monotonic()

    def finish(self) -> None:
        """Make the output of what was written."""
        self.save()
        with naming(self._paths.whole):
            self._paths.whole.unlink(missing_ok=True)
        self._sink.finish(self._paths.whole)
        self.state = replace(self.state, finished=True)
        checkpoint.write(self._paths, self.state)
        with naming(self._paths.output):
            checkpoint.finish(self._paths, grows=self.state.job.output_form in GROWING)

    def discard(self) -> None:
        """Leave nothing but the list of bad lines: there is no output."""
        for path in (self._paths.checkpoint, self._paths.part):
            path.unlink(missing_ok=True)

    def close(self) -> None:
        """Let go of the files."""
        self._sink.close()
        if self._errors:
            self._errors.close()

    def _note(self, line: Bad) -> None:
        if self._errors is None:
            self._errors = AppendFile(self._paths.errors, 0)
        self._errors.write(msgspec.json.encode({"file": line.file, "line": line.number, "error": line.why}) + b"\n")
