"""Files of a cluster without Ray: how they are cut, and what a worker makes of a part."""

import json
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fakes import byte_tokenizer, hash_vector
from quiver.bulk import BulkOptions, Columns
from quiver.config import Config, ModelsConfig
from quiver.errors import QuiverError
from quiver.scale import partitions
from quiver.scale.bulk_worker import Order, Worker
from quiver.scale.partitions import Partition
from quiver.scale.storage import Location
from ray_stub import MODEL, open_hash


def expected(text: str) -> bytes:
    """Return the bits that a single process gives."""
    (encoding,) = byte_tokenizer().encode([text], truncate=False)
    return hash_vector(encoding.ids).astype("<f4").tobytes()


def lines_of(parts: list[Partition]) -> list[str]:
    """Return the texts of all partitions, in their order."""
    return [line.text for part in parts for line in partitions.read(part, Columns())]


@given(
    texts=st.lists(
        st.text(st.characters(codec="utf-8", exclude_characters="\r"), min_size=1).filter(str.strip), min_size=1
    ),
    most=st.integers(1, 300),
)
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_each_line_is_in_one_partition(tmp_path, texts, most):
    """Wherever a file is cut, each line is read once and whole, in order."""
    file = tmp_path / "corpus.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    assert lines_of(partitions.cut([str(file)], None, most)) == texts


@pytest.mark.parametrize("most", [1, 10_000])
def test_parquet_is_cut_between_row_groups(tmp_path, most):
    """Each row is in one partition, with the number that it has in its file."""
    file, texts = tmp_path / "corpus.parquet", [f"row {i}" for i in range(100)]
    pq.write_table(pa.table({"text": texts}), file, row_group_size=10)
    parts = partitions.cut([str(file)], None, most)
    lines = [line for part in parts for line in partitions.read(part, Columns())]
    assert len(parts) == (10 if most == 1 else 1)
    assert [(line.text, line.number) for line in lines] == [(text, i + 1) for i, text in enumerate(texts)]


def test_csv_stays_whole(tmp_path):
    """A row may hold ends of lines, and is not cut in them."""
    file = tmp_path / "corpus.csv"
    file.write_text('text\n"a\nb"\nc\n', encoding="utf-8")
    assert lines_of(partitions.cut([str(file)], None, 1)) == ["a\nb", "c"]


def test_files_that_are_not_there_are_said(tmp_path):
    """A missing file, a folder, and a file that is named twice."""
    file = tmp_path / "a.jsonl"
    file.write_text('{"text": "a"}\n', encoding="utf-8")
    for files, complaint in (
        ([f"{file}x"], "no such file"),
        ([str(tmp_path)], "is a directory"),
        ([str(file), str(file)], "named twice"),
        (["nowhere://x/a.jsonl"], "no file that can be reached"),
    ):
        with pytest.raises(QuiverError, match=complaint):
            partitions.cut(files, "jsonl")


def test_a_worker_writes_a_partition_whole_and_again_the_same(tmp_path):
    """Rows, bad lines and what became of it stand in files of its name, and done again they have the same bytes."""
    file, out = tmp_path / "a.jsonl", tmp_path / "out"
    file.write_text('{"text": "a"}\n{"txt": "b"}\n{"text": "a"}\n{"text": "c"}\n', encoding="utf-8")
    (part,) = partitions.cut([str(file)], None)
    order = Order(BulkOptions(files=(), output=out, skip_bad=True), Location(str(out)), "")
    worker = Worker(Config(models=ModelsConfig(model=(MODEL,), data_dir=tmp_path)), order, open_hash)
    done, first = worker.do(part), (out / "part-00000.parquet").read_bytes()
    assert (done.num_rows, done.num_bad, done.num_texts, done.error) == (3, 1, 2, "")
    assert sorted(path.name for path in out.iterdir()) == [
        f"part-00000.{end}" for end in ("errors.jsonl", "json", "parquet")
    ]
    assert (worker.do(part), (out / "part-00000.parquet").read_bytes()) == (done, first)
    vectors = np.stack(pq.read_table(out / "part-00000.parquet")["embedding"].to_numpy(zero_copy_only=False))
    assert [vector.astype("<f4").tobytes() for vector in vectors] == [expected(text) for text in ("a", "a", "c")]

    strict = Order(BulkOptions(files=(), output=out), Location(str(out)), "")
    assert (
        "has no 'text'"
        in Worker(Config(models=ModelsConfig(model=(MODEL,), data_dir=tmp_path)), strict, open_hash).do(part).error
    )
    other = Worker(
        Config(models=ModelsConfig(model=(MODEL,), data_dir=tmp_path)), replace(order, vector="other"), open_hash
    )
    assert "gives other vectors" in other.do(part).error
