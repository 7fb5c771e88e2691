"""A bulk run that is killed, and run again: each line once, and the bytes of a run that nobody disturbed."""

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quiver.bulk.chunks import Place
from server_process import clean_environment

SCRIPT = Path(__file__).with_name("bulk_process.py")
FORMS = ("jsonl", "npy", "parquet")
PATIENCE_SECONDS = 120
ALLOWED_BYTES = 16 << 20


def corpus(path, count, *, bad=()):
    """Write JSON lines with ids; those of some numbers are junk."""
    with path.open("w", encoding="utf-8") as file:
        for number in range(1, count + 1):
            line = "{junk" if number in bad else json.dumps({"text": f"the text of line {number}", "n": number})
            file.write(f"{line}\n")
    return path


def command(mode, file, output, **asked):
    """Return the words of a process."""
    request = {"files": [str(file)], "output": str(output), "id_column": "n", "skip_bad": True, **asked}
    return (sys.executable, str(SCRIPT), mode, json.dumps(request))


def run(mode, file, output, **asked):
    """Let a process work to its end; returns what it printed."""
    words = command(mode, file, output, **asked)
    environment = clean_environment(PYTHONPATH=":".join(filter(None, sys.path)))
    done = subprocess.run(  # noqa: S603  our own script
        words, capture_output=True, text=True, check=False, env=environment, timeout=PATIENCE_SECONDS
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def kill_when_written(file, output, size):
    """Start a run and kill it once so many bytes are written; returns whether it was still at work."""
    part = output.with_name(f"{output.name}.part")
    environment = clean_environment(PYTHONPATH=":".join(filter(None, sys.path)))
    words = command("run", file, output, pause_seconds=0.004, sync_seconds=0.1)
    with subprocess.Popen(  # noqa: S603  our own script
        words, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, env=environment
    ) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size > size):
            time.sleep(0.002)
        process.kill()
    return process.returncode == -signal.SIGKILL


def files_of(output):
    """Return the bytes of an output and of all beside it."""
    return {path.name.removeprefix(output.stem): path.read_bytes() for path in output.parent.glob(f"{output.stem}.*")}


@pytest.mark.parametrize("form", FORMS)
def test_killed_in_the_middle(tmp_path, form):
    """Killed three times at chance moments and then left alone, a run has the bytes of one that never was killed."""
    file = corpus(tmp_path / "in.jsonl", 2400, bad={700, 1300})
    right, output = tmp_path / f"right.{form}", tmp_path / f"out.{form}"
    assert run("run", file, right)["rows"] == 2398
    size, chance = right.stat().st_size, random.Random(form)  # noqa: S311  repeatable on purpose
    kills = [kill_when_written(file, output, share * size * chance.uniform(0.5, 1)) for share in (0.2, 0.5, 0.8)]
    assert any(kills), "no run was killed at work"
    assert not output.exists()

    assert run("run", file, output)["rows"] == 2398
    assert files_of(output) == files_of(right)


@pytest.mark.parametrize("form", FORMS)
def test_a_line_that_comes_twice_is_seen(tmp_path, form):
    """Negative control: a run that forgets what it has read, but not what it has written, has other bytes."""
    file = corpus(tmp_path / "in.jsonl", 2400)
    right, output = tmp_path / f"right.{form}", tmp_path / f"out.{form}"
    run("run", file, right)
    assert kill_when_written(file, output, right.stat().st_size / 4)
    saved = tmp_path / f"out.{form}.checkpoint"
    checkpoint = json.loads(saved.read_text(encoding="utf-8"))
    assert checkpoint["place"]["num_lines"] > 0
    checkpoint["place"] = {"num_lines": 0, "digest": Place().digest}
    saved.write_text(json.dumps(checkpoint), encoding="utf-8")

    assert run("run", file, output)["rows"] > 2400
    assert files_of(output) != files_of(right)


@pytest.mark.parametrize("form", FORMS)
def test_killed_at_calls_that_change_the_disk(tmp_path, form):
    """Killed at every eighth such call, what is not safe on the disk lost with it, a second run makes all right."""
    file = corpus(tmp_path / "in.jsonl", 300, bad={9})
    (tmp_path / "runs").mkdir()
    found = run("crash", file, tmp_path / "runs" / f"out.{form}", every=8)["right"]
    assert len(found) > 5
    assert all(found), found


def test_a_disk_that_does_not_keep_its_word_is_seen(tmp_path):
    """Negative control: where what was said to be safe is lost, not everything can be made right."""
    file = corpus(tmp_path / "in.jsonl", 300)
    (tmp_path / "runs").mkdir()
    assert not all(run("crash", file, tmp_path / "runs" / "out.npy", every=8, keeps_words=False)["right"])


def test_memory_does_not_grow_with_the_lines(tmp_path):
    """Three times as many lines, each with another text, take no more memory; if vectors were kept, it would be seen."""
    few, many = (corpus(tmp_path / f"{count}.jsonl", count) for count in (45_000, 135_000))
    small = run("run", few, tmp_path / "few.npy", sync_seconds=1.0, dimensions=384)
    large = run("run", many, tmp_path / "many.npy", sync_seconds=1.0, dimensions=384)
    hoard = run("run", few, tmp_path / "hoard.npy", sync_seconds=1.0, dimensions=384, hoards=True)
    assert (small["rows"], large["rows"]) == (45_000, 135_000)
    assert large["bytes"] - small["bytes"] < ALLOWED_BYTES, (small, large)
    assert hoard["bytes"] - small["bytes"] > ALLOWED_BYTES, (small, hoard)
