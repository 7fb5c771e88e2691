"""`quiver embed FILE… -o OUT`, as a person types it: what it says and how it ends."""

import json
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
from rich.console import Console

import checkpoints
from fakes import FakeClock
from quiver.bulk.display import Display, Rates, duration
from quiver.bulk.pipeline import Step
from server_process import QUIVER, clean_environment, run
from test_cli import embed_directly

EX_DATAERR, EX_CONFIG, INTERRUPTED = 65, 78, 130


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the directory of a tiny random model."""
    return checkpoints.make(tmp_path_factory.mktemp("models") / "tiny", "bert")


@pytest.fixture
def file(tmp_path):
    """Return a file of twenty texts."""
    path = tmp_path / "in.txt"
    path.write_text("".join(f"this is text {i}\n" for i in range(20)), encoding="utf-8")
    return path


def test_a_file_becomes_a_file(tiny, file, tmp_path):
    """The output has the engine's vectors; standard output stays empty, and standard error says what was done."""
    output = tmp_path / "out.npy"
    done = run("embed", str(file), "-o", str(output), "--model", str(tiny))
    assert (done.returncode, done.stdout) == (0, "")
    assert json.loads(done.stderr.splitlines()[-1])["event"] == "done"
    assert json.loads(done.stderr.splitlines()[-1])["rows"] == 20
    np.testing.assert_array_equal(np.load(output), embed_directly(tiny, file.read_text().splitlines()))


def test_standard_input_becomes_a_file(tiny, tmp_path):
    """`-` is a file like any other, in the format that is asked for."""
    output = tmp_path / "out.jsonl"
    words = ("--format", "csv", "--column", "body", "--id-column", "k", "--model", str(tiny), "--dimensions", "8")
    done = run("embed", "-", "-o", str(output), *words, stdin="k,body\nx,one\ny,two\n")
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(line["id"], line["text"], len(line["embedding"])) for line in lines] == [("x", "one", 8), ("y", "two", 8)]


def test_texts_take_wishes_too(tiny):
    """Without -o, dimensions and scaling hold for texts."""
    done = run("embed", "one", "--dimensions", "8", "--no-normalize", "--model", str(tiny))
    assert len(json.loads(done.stdout)["embedding"]) == 8


def test_bad_input_ends_with_65(tiny, file, tmp_path):
    """A bad line is named in one line, the run ends with 65, and --skip-bad does without it."""
    output = tmp_path / "out.npy"
    file.write_bytes(file.read_bytes() + b"\xff\n")
    done = run("embed", str(file), "-o", str(output), "--model", str(tiny))
    assert done.returncode == EX_DATAERR
    assert re.search(
        r"^quiver: .*in\.txt:21: not UTF-8 \(byte 1 of the line\) .*--skip-bad\)\n\Z", done.stderr, re.MULTILINE
    )
    assert run("embed", str(file), "-o", str(output), "--model", str(tiny), "--skip-bad").returncode == 0
    assert len(np.load(output)) == 20
    (error,) = map(json.loads, (tmp_path / "out.npy.errors.jsonl").read_text().splitlines())
    assert error == {"file": str(file), "line": 21, "error": "not UTF-8 (byte 1 of the line)"}


@pytest.mark.parametrize(
    ("words", "complaint"),
    [
        (("text", "--skip-bad"), "these options are for files: give -o OUTPUT"),
        (("text", "--url", "http://localhost/v1"), "these options are for files: give -o OUTPUT"),
        (("in.xyz", "-o", "out.npy"), "in.xyz does not show its format: give --format"),
        (("in.txt", "-o", "out.xyz"), "out.xyz does not show its format: give --output-format"),
        (("in.txt", "-o", "out.npy", "--url", "nowhere"), "'nowhere' is no base URL"),
    ],
)
def test_wrong_words_end_with_78(tmp_path, words, complaint):
    """A mistake in the options is one line, before any model is loaded."""
    (tmp_path / "in.txt").write_text("a\n", encoding="utf-8")
    words = [str(tmp_path / word) if word.startswith(("in.", "out.")) else word for word in words]
    done = run("embed", *words)
    assert (done.returncode, done.stdout) == (EX_CONFIG, "")
    assert complaint in done.stderr


def test_an_interrupted_run_says_how_to_go_on(tiny, tmp_path):
    """Ctrl-C ends with 130 and says what to do; doing so gives the output of a run that nobody interrupted."""
    file, output, right = tmp_path / "in.txt", tmp_path / "out.npy", tmp_path / "right.npy"
    file.write_text(
        "".join(f"this is text {i} of many {'words ' * (i % 90)}\n" for i in range(24_000)), encoding="utf-8"
    )
    words = [*QUIVER, "embed", str(file), "--model", str(tiny), "-o"]
    part = tmp_path / "out.npy.part"
    with subprocess.Popen(  # noqa: S603  our own command
        [*words, str(output)], stderr=subprocess.PIPE, text=True, env=clean_environment()
    ) as process:
        while process.poll() is None and not (part.exists() and part.stat().st_size > 1000):
            time.sleep(0.01)
        process.send_signal(signal.SIGINT)
        said = process.communicate(timeout=20)[1]
    assert process.returncode == INTERRUPTED, said
    assert re.fullmatch(
        r"quiver: interrupted: [\d,]+ lines are done, in .*out\.npy\.part; run the same command again, and it goes on there",
        said.splitlines()[-1],
    )
    for path in (output, right):
        subprocess.run([*words, str(path)], check=True, capture_output=True, env=clean_environment())  # noqa: S603
    assert output.read_bytes() == right.read_bytes()


def test_the_base_install_needs_no_pyarrow(tiny, file, tmp_path):
    """Without the extra, files are embedded as long as none is Parquet; one that is says what to install."""
    code = "import sys; sys.modules['pyarrow'] = None; from quiver.cli import main; main()"
    for form, status in (("npy", 0), ("parquet", EX_CONFIG)):
        words = ["embed", str(file), "-o", str(tmp_path / f"out.{form}"), "--model", str(tiny)]
        done = subprocess.run(  # noqa: S603  our own command
            [sys.executable, "-c", code, *words], capture_output=True, text=True, check=False, env=clean_environment()
        )
        assert done.returncode == status, done.stderr
    assert "pip install 'quiver[parquet]'" in done.stderr
    assert not list(tmp_path.glob("out.parquet*"))


# What people see


def test_rates_and_the_time_left():
    """Rates are of what this run did, and the time left is what the rest takes at its speed."""
    clock = FakeClock()
    rates = Rates(1000, 5000, clock)
    assert rates.seconds_left is None
    clock.pass_by(10)
    rates.note(Step(num_lines=200, num_texts=150, num_tokens=3000, done_bytes=2000))
    assert (rates.texts_per_second, rates.tokens_per_second, rates.seconds_left) == (20, 300, 30)
    assert Rates(0, None, clock).seconds_left is None


@pytest.mark.parametrize(("seconds", "text"), [(0.4, "0 s"), (59.4, "59 s"), (185, "3:05"), (7800, "2:10:00")])
def test_durations_are_for_people(seconds, text):
    """A time is written in the largest unit that it has."""
    assert duration(seconds) == text


def test_a_terminal_sees_a_bar(capsys):
    """At a terminal the bar tells the percentage, both rates and the time left; elsewhere nothing is drawn."""
    clock = FakeClock()
    for is_terminal in (True, False):
        console = Console(force_terminal=is_terminal, width=150, stderr=True)
        rates = Rates(0, 1000, clock)
        with Display(rates, "out.npy", console) as display:
            clock.pass_by(2)
            display(Step(num_lines=5000, num_texts=5000, num_tokens=60_000, done_bytes=250))
        shown = re.sub(r"\x1b\[[\d;?]*[a-zA-Z]", "", capsys.readouterr().err)
        if is_terminal:
            assert re.search(r"out\.npy .* 25% +2,500 texts/s  30,000 tokens/s  6 s left", shown)
        else:
            assert shown == ""


def test_elsewhere_a_line_now_and_then(capsys):
    """Where nobody watches, a line is logged every ten seconds, not for every step."""
    now = FakeClock()
    display = Display(Rates(0, 1000, now), "out.npy", Console(force_terminal=False), now)
    for _ in range(25):
        now.pass_by(1)
        display(Step(num_lines=10, num_texts=10, num_tokens=100, done_bytes=100))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 2
    assert all(
        re.search("embedding .*lines=.*percent=10.*texts_per_second=10", re.sub(r"\x1b\[\d*m", "", x)) for x in lines
    )
