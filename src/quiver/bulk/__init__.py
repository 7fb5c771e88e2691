"""`quiver embed FILE… -o OUT`: files of texts to a file of vectors, each line exactly once whatever is killed when.

    sources ──> chunks ──────> pipeline ───────────────> writer ──> OUT.part, then OUT
    a line,     256 lines,     several chunks at once,   a sink,
    or why      one digest     each text once            OUT.checkpoint

No file is ever held in memory: a chunk is read when one has been written.
"""

from quiver.bulk.command import BulkOptions, embedder_for, how_to_go_on, run_bulk
from quiver.bulk.lines import Columns, Wanted

__all__ = ["BulkOptions", "Columns", "Wanted", "embedder_for", "how_to_go_on", "run_bulk"]
