"""Files through a cluster of this machine. `make test-ray` runs it; it needs the extra `ray`."""

import json
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest

from quiver.bulk import BulkOptions, Columns
from quiver.errors import Refused
from quiver.scale import ray_data
from ray_cluster import config_of, two_nodes, vector_of
from ray_stub import open_hash

pytestmark = [pytest.mark.ray, pytest.mark.filterwarnings("ignore")]
LINES = 200_000
ACTOR = "ray::MapWorker"


@pytest.fixture(scope="module")
def nodes():
    """Two nodes for all tests of this file."""
    with two_nodes() as nodes:
        yield nodes


def corpus(folder: Path, lines: int) -> str:
    """Write a file of so many different texts, with ids."""
    file = folder / "corpus.jsonl"
    with file.open("w", encoding="utf-8") as out:
        for i in range(lines):
            out.write(json.dumps({"id": i, "text": f"line {i} of a corpus"}) + "\n")
    return str(file)


def options(folder: Path, **more) -> BulkOptions:
    """Return what a run is asked for."""
    return BulkOptions(files=(), output=folder / "out", columns=Columns(id="id"), **more)


def rows_of(folder: Path) -> dict[int, bytes]:
    """Return the bits of each line's vector by its id; a line that stands twice is a failure."""
    found: dict[int, bytes] = {}
    for file in sorted((folder / "out").glob("part-*.parquet")):
        table = pq.read_table(file)
        vectors = np.stack(table["embedding"].to_numpy(zero_copy_only=False)).astype("<f4")
        for line_id, vector in zip(table["id"].to_pylist(), vectors, strict=True):
            assert line_id not in found
            found[line_id] = vector.tobytes()
    return found


def test_each_line_is_there_once_though_an_actor_is_killed(nodes, tmp_path, capsys):
    """Of 200,000 lines none is missing, none twice, and the bits are those of one process."""
    file, config = corpus(tmp_path, LINES), config_of(tmp_path, 0)
    killed: list[int] = []

    def kill_one() -> None:
        while not list((tmp_path / "out").glob("part-*.json")):
            time.sleep(0.05)
        victim = nodes.processes(ACTOR)[0]
        killed.append(victim.pid)
        victim.send_signal(signal.SIGKILL)

    killer = threading.Thread(target=kill_one)
    killer.start()
    start = time.monotonic()
    rows = ray_data.embed([file], str(tmp_path / "out"), options(tmp_path), config, open_hash)
    seconds = time.monotonic() - start
    killer.join()
    with capsys.disabled():
        print(  # noqa: T201  the figure that it is run for
            f"\n{rows:,} lines in {seconds:.1f} s with one of two actors killed ({rows / seconds:,.0f} a second)"
        )
    found = rows_of(tmp_path)
    assert len(killed) == 1
    assert (rows, len(found)) == (LINES, LINES)
    assert all(found[i] == vector_of(f"line {i} of a corpus") for i in range(0, LINES, 997))


@pytest.mark.usefixtures("nodes")
def test_a_run_goes_on_where_it_was(tmp_path):
    """What is done is not done again, and with other options it is refused."""
    file, config = corpus(tmp_path, 80_000), config_of(tmp_path, 0)
    ray_data.embed([file], str(tmp_path / "out"), options(tmp_path), config, open_hash)
    parts = sorted((tmp_path / "out").glob("part-*.parquet"))
    before = {part: part.stat().st_mtime_ns for part in parts}
    for part in parts[1::2]:
        part.unlink()
        part.with_suffix(".json").unlink()
    ray_data.embed([file], str(tmp_path / "out"), options(tmp_path), config, open_hash)

    assert [part.stat().st_mtime_ns == before[part] for part in parts] == [i % 2 == 0 for i in range(len(parts))]
    assert len(rows_of(tmp_path)) == 80_000
    other = replace(config, engine=replace(config.engine, truncate=True))
    with pytest.raises(Refused, match="truncate was False"):
        ray_data.embed([file], str(tmp_path / "out"), options(tmp_path), other, open_hash)
