"""The comparison with peers: a fake one goes through all of it, and the page says what was measured and no more."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
from peers import __main__ as command
from peers import report, roster
from peers.cells import LIBRARY_CELLS, SERVER_CELLS, Asked, Cell, Texts, cells_of
from peers.child import PeerFailed, last_line
from peers.exact import Reference, default_texts
from peers.measure import Measurer, Settings
from peers.places import Places
from peers.plot import draw_all
from peers.promises import promises
from peers.results import About, Exactness, Load, Results, Turn
from peers.subject import running

import fake_peer
from server_process import clean_environment

ROOT = Path(__file__).parent.parent
PAGE = ROOT / "docs" / "benchmarks.md"
TEXTS = ("what is a vector", "an arrow with a length", "yes", "one more text than three")
ABOUT = About(machine="2 cores", system="Linux", seconds=1, largest_batch=64, slow_cells=True, date="2026-01-01")
EXACT = Exactness(texts=4, least_cosine=1, median_cosine=1, largest_error=0, steady=1, largest_move=0)


@pytest.fixture
def places(tmp_path, minilm_files):
    """Return where a fake peer finds what it does not need."""
    return Places(minilm_files.root, tmp_path / "cache")


@pytest.fixture
def measurer(places):
    """Return one that is quick, and knows the vectors of the fake."""
    known = Reference(TEXTS, fake_peer.vectors_of(TEXTS).astype("float64"))
    quick = Settings(seconds=0.05, slow_cells=True, largest_batch=64, ready_seconds=60, patience_seconds=0, pool=256)
    return Measurer(places, known, quick, lambda _: None)


@pytest.fixture(scope="module")
def asked(minilm_files):
    """Return the texts of a round."""
    return Asked.of(1, minilm_files.path("tokenizer.json"), size=256)


def turn(peer: str, number: int, rate: float, **facts: Any) -> Turn:
    """Make a turn in which every cell of a server had the same rate."""
    load = Load(texts=10, tokens=int(100 * rate), seconds=100, cpu_seconds=1, p50_ms=1, p99_ms=2)
    usual = {"loads": dict.fromkeys([cell.name for cell in SERVER_CELLS], load), "idle_ms": {"6": 1.5}}
    costs = {"rss_ready": 10**6, "rss_after": 10**6, "startup_seconds": 1}
    return Turn(peer=peer, round=number, exactness=EXACT, **costs | usual | facts)


def tables_of(text: str) -> list[list[list[str]]]:
    """Read the tables of a page: rows of cells."""
    found = re.findall(r"(?:^\|.*\|$\n?)+", text, re.MULTILINE)
    return [[re.split(r"(?<!\\)\|", line)[1:-1] for line in one.splitlines()] for one in found]


def faults_of(part: str) -> list[str]:
    """Say what is wrong with a generated part."""
    faults = [f"a row of {len(row)} cells under {len(table[0])}: {row}" for table in tables_of(part) for row in table
              if len(row) != len(table[0])]  # fmt: skip
    if not part.startswith(report.BEGIN) or not part.endswith(report.END):
        faults.append("it does not stand between its marks")
    return faults + re.findall(r"\bnan\b|\binf\b|\{\w*\}", part)


async def test_a_fake_peer_goes_through_all_of_it(measurer, tmp_path):
    """Server and library are started, asked for every cell, ended, and stand in JSON, pictures and page."""
    peers, results, path = [fake_peer.ranking_peer(), fake_peer.library()], Results(about=ABOUT), tmp_path / "r.json"

    await command.take_round(measurer, peers, 1, results, path)

    assert results.missing == {}
    assert Results.read(path) == results
    server, library = (next(iter(results.of(peer.name).values())) for peer in peers)
    assert set(server.loads) == {cell.name for cell in SERVER_CELLS} | {"rerank"}
    assert set(library.loads) == {cell.name for cell in LIBRARY_CELLS}
    for load in (*server.loads.values(), *library.loads.values()):
        assert load.failed == {}
        assert load.rate > 0
    for one in (server, library):
        assert one.idle_ms.keys() == one.rested_ms.keys() == {"6", "20", "50", "256"}
        assert one.startup_seconds > 0
        assert min(one.rss_ready, one.rss_after) > 1e6
        assert one.exactness.least_cosine == pytest.approx(1, abs=1e-6)
        assert one.exactness.steady == 1
    pictures = draw_all(results, peers, tmp_path)
    assert all((tmp_path / file).stat().st_size for file in pictures.values())
    part = report.render(results, peers, pictures)
    assert faults_of(part) == []
    assert "The fake-library peer" in part


@pytest.mark.parametrize("made", [fake_peer.peer, fake_peer.library])
async def test_vectors_that_depend_on_their_company_are_seen(measurer, asked, made):
    """Negative control: a peer whose last bits move with the size of a request has no steady text."""
    found = await measurer.turn(made("moody", "moody"), 1, asked)

    assert found.exactness.steady == 0
    assert 0 < found.exactness.largest_move < 1e-3


@pytest.mark.parametrize("made", [fake_peer.peer, fake_peer.library])
async def test_a_peer_that_does_not_start_is_left_out_with_the_reason(measurer, tmp_path, made):
    """The others are measured all the same, and the reason names no folder of this machine."""
    results, peers = Results(about=ABOUT), [made("broken", "dead"), fake_peer.library()]

    await command.take_round(measurer, peers, 1, results, tmp_path / "r.json")

    assert results.measured() == ["fake-library"]
    assert "model.bin" in results.missing["broken"]
    assert "/some/folder" not in results.missing["broken"]
    assert "| The broken peer | all of it |" in report.render(results, peers, {})


async def test_a_cell_that_is_not_answered_is_noted(measurer, asked):
    """A peer that cuts every request of a cell has no figure there, but all others, and the reason."""
    found = await measurer.turn(fake_peer.peer("mute", "mute"), 1, asked)

    assert "base64" not in found.loads
    assert "reset" in found.notes["base64"]
    assert found.loads["clients-32"].rate > 0


@pytest.mark.parametrize("made", [fake_peer.peer, fake_peer.library])
async def test_a_peer_is_gone_after_its_turn(places, made):
    """Its process has ended when the next one starts."""
    async with running(made(), places, ready_seconds=20) as subject:
        pid = subject.child.process.pid
        assert psutil.pid_exists(pid)

    assert not psutil.pid_exists(pid)


def test_a_run_that_is_ended_ends_its_peer(tmp_path):
    """SIGTERM in the midst of a turn leaves no process behind."""
    texts = default_texts()
    (tmp_path / "cache").mkdir()
    np.savez(tmp_path / "cache" / "reference.npz", texts=np.array(texts), vectors=np.ones((len(texts), 384)))
    places = ("--cache", tmp_path / "cache", "--results", tmp_path / "r.json", "--page", tmp_path / "p.md")
    words = [sys.executable, "-m", "peers", "--peers", "quiver-engine", "--seconds", "60", *map(str, places)]
    variables = clean_environment(PYTHONPATH=os.pathsep.join(sys.path))
    with subprocess.Popen(words, env=variables, stderr=subprocess.DEVNULL) as run:  # noqa: S603  our own command
        workers = wait_for(
            lambda: [one for one in psutil.Process(run.pid).children() if "worker" in str(one.cmdline())]
        )
        run.terminate()
        assert run.wait(60) == 1
    assert not any(one.is_running() for one in workers)


def wait_for(look: Callable[[], list[Any]]) -> list[Any]:
    """Look again and again until something is found."""
    end = time.monotonic() + 120
    while not (found := look()):
        assert time.monotonic() < end, "nothing came"
        time.sleep(0.05)
    return found


async def test_a_program_that_is_not_there_is_a_failure_of_the_peer(places):
    """It is told as such, and not raised as an error of ours."""
    nowhere = fake_peer.peer(command=("no-such-program-anywhere",))
    with pytest.raises(PeerFailed, match="cannot be started"):
        async with running(nowhere, places, ready_seconds=1):
            pass


def test_an_environment_that_cannot_be_made_is_a_failure_of_the_peer(places, measurer):
    """A peer whose environment has no target is left out with what make said, and not raised as an error of ours."""
    homeless = fake_peer.peer(environment="of-nobody")
    with pytest.raises(PeerFailed, match="'of-nobody' could not be installed"):
        places.provide(homeless, measurer.known)


async def test_a_run_goes_on_where_it_ended(measurer, tmp_path):
    """Turns that are there are not taken again, the missing ones are."""
    results, path = Results(about=ABOUT, turns=[turn("fake-library", 1, 123.0)]), tmp_path / "r.json"

    for number in (1, 2):
        await command.take_round(measurer, [fake_peer.library()], number, results, path)

    assert [one.round for one in results.turns] == [1, 2]
    assert results.turns[0].loads["clients-1"].rate == 123
    assert Results.read(path) == results


def test_a_run_of_other_settings_is_not_gone_on_with(tmp_path):
    """What was measured for one second a cell does not mix with three."""
    options = command.parsed(["--resume", "--results", str(tmp_path / "r.json"), "--seconds", "1"])
    command.started(options).write(options.results)
    assert command.started(options).turns == []

    options.seconds = 3.0
    with pytest.raises(SystemExit, match="cannot go on"):
        command.started(options)


def test_ratios_are_of_one_round_each():
    """The machine's drift cancels: a ratio never mixes two rounds, and a round that lacks one side has none."""
    rates = {("quiver", 1): 100, ("other", 1): 50, ("quiver", 2): 30, ("other", 2): 10, ("other", 3): 1}
    results = Results(about=ABOUT, turns=[turn(peer, number, rate) for (peer, number), rate in rates.items()])

    assert results.ratios("other", "quiver", "clients-32") == [2, 3]


def test_the_page_shows_medians_and_ends():
    """Ratios stand first, with the smallest and the largest of all rounds."""
    turns = [turn("quiver", i, rate) for i, rate in enumerate((300, 200, 400), 1)]
    turns += [turn("infinity-onnx", i, 100) for i in (1, 2, 3)]
    part = report.render(Results(about=ABOUT, turns=turns), roster.PEERS, {})

    assert faults_of(part) == []
    assert tables_of(part)[0][2][2:] == [" 3.00 × ", " met "]
    assert tables_of(part)[1][2][:2] == [" Infinity, ONNX ", " 3.00 (2.00–4.00) "]
    assert tables_of(part)[2][2][1] == " 300 (200–400) "
    assert "A trial, not a measurement" in part


def promised(*turns: Turn) -> dict[str, tuple[str, bool]]:
    """Return what a run of some turns says of each promise."""
    found = promises(Results(about=ABOUT, turns=list(turns)), roster.PEERS)
    return {one.about: (one.found, one.kept) for one in found}


def test_a_promise_is_held_against_the_better_of_two():
    """Infinity's better engine of each round counts, and what was not measured is not told of."""
    ours = [turn("quiver", 1, 300), turn("quiver", 2, 300)]
    theirs = [turn("infinity-onnx", 1, 100), turn("infinity-torch", 1, 50), turn("infinity-torch", 2, 60)]
    found = promised(*ours, *theirs)

    assert found["throughput with 32 clients, Infinity's better engine"] == ("4.00 ×", True)
    assert not [about for about in found if "FastEmbed" in about]


def test_who_has_less_is_named():
    """A peer that is quicker, once it is idle or ready, or smaller, is named where that was promised of ours."""
    quick = {"idle_ms": {"6": 1.0, "20": 9.0}, "rested_ms": {"6": 1.5}, "startup_seconds": 0.5}
    found = promised(turn("quiver", 1, 1), turn("fastembed-server", 1, 1, **quick))
    name = "FastEmbed behind a minimal server"

    assert found["latency of an idle server below every server's"] == (f"{name} (6 tokens): 0.67 ×", False)
    assert found["ready sooner than every peer"] == (f"{name}: 0.50 ×", False)
    assert found["memory after all of it below every peer's"] == ("below all", True)
    assert found["latency of requests below every server's"] == ("below all", True)


def test_a_disturbed_run_says_so():
    """A page cannot hide that others used the machine."""
    load = Load(texts=1, tokens=1, seconds=1, cpu_seconds=1, p50_ms=1, p99_ms=1, others=0.5)
    results = Results(about=ABOUT, turns=[turn("quiver", 1, 1, loads={"clients-1": load})])
    assert "**Disturbed:**" in report.render(results, roster.PEERS, {})


def test_the_committed_page_is_that_of_the_committed_results():
    """The generated part of docs/benchmarks.md is what its JSON gives; without results it says that there are none."""
    path = PAGE.with_suffix(".json")
    results = Results.read(path) if path.exists() else None
    pictures = {name: f"peers-{name}.png" for name in report.PICTURES if (PAGE.parent / f"peers-{name}.png").exists()}
    page = PAGE.read_text(encoding="utf-8")

    assert report.put_into(page, report.render(results, roster.PEERS, pictures)) == page
    assert faults_of(report.MARKED.search(page)[0]) == []


@pytest.mark.parametrize("page", ["", f"{report.BEGIN}\n", f"{report.BEGIN}\n{report.END}\n" * 2])
def test_a_page_without_a_place_is_refused(page):
    """Nothing is written where it cannot be known where to."""
    with pytest.raises(ValueError, match="the page needs one"):
        report.put_into(page, "")


def test_a_table_of_unequal_rows_is_seen():
    """Negative control: a row that lacks a cell, a figure that is none and a missing mark are faults."""
    assert len(faults_of("| a | b |\n| --- | --- |\n| nan |\n")) == 3


def test_every_peer_can_be_made():
    """Names are unique, baselines exist, each environment has its requirements and its target, torch exactly."""
    names = [peer.name for peer in roster.PEERS]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    environments = re.search(r"^PEER_ENVIRONMENTS := (.*)$", makefile, re.MULTILINE)[1].split()
    assert len(set(names)) == len(names)
    assert {peer.baseline for peer in roster.PEERS} <= set(names)
    assert set(environments) == {peer.environment for peer in roster.PEERS} - {""}
    for environment in environments:
        pins = (ROOT / f"benchmarks/peers/requirements-{environment}.txt").read_text(encoding="utf-8").splitlines()
        pins = [pin for pin in pins if not pin.startswith("#")]
        assert all(re.fullmatch(r"[\w,\[\]-]+==[\w.]+", pin) for pin in pins)
        assert not any(pin.startswith("torch==") for pin in pins[1:])


@pytest.mark.parametrize("peer", roster.PEERS, ids=lambda peer: peer.name)
def test_every_command_can_be_filled_in(places, peer):
    """No placeholder is misspelt, and the process's environment says nothing of ours but where its code lies."""
    for words in (peer.command, peer.rerank, peer.prepare):
        assert not any("{" in word for word in places.filled(peer, words, 8000))
    variables = places.variables(peer, 8000)
    assert variables["HF_HUB_OFFLINE"] == "1"
    assert not any(name.startswith("QUIVER_") for name in variables.keys() - {"QUIVER_DATA_DIR"})


def test_a_request_wraps_around():
    """Requests take texts in order and begin anew before they would run over the end, as a worker does."""
    texts = Texts(("a", "b", "c", "d", "e"), (1, 2, 3, 4, 5))
    firsts = [(list(some), tokens) for (some, tokens), _ in zip(texts.requests(2), range(3), strict=False)]
    assert firsts == [(["a", "b"], 3), (["c", "d"], 7), (["a", "b"], 3)]
    assert next(texts.rotated(0.5).requests(4)) == (["c", "d", "e", "a"], 13)


def test_texts_are_those_that_are_asked_for(asked):
    """Half are queries, the shorter ones; idle texts have exactly their tokens, and no kind lacks its counts."""
    queries, passages = asked.kinds["queries"], asked.kinds["passages"]
    assert len(queries.texts) == len(passages.texts) == len(asked.kinds["mixed"].texts) / 2
    assert max(queries.tokens) < 32
    assert sum(passages.tokens) > 5 * sum(queries.tokens)
    assert {n: set(texts.tokens) for n, texts in asked.idle.items()} == {n: {n} for n in (6, 20, 50, 256)}


def test_short_runs_leave_out_what_is_slow():
    """A quick run has no request of 1,024 texts, and base64 is asked of those alone who can."""
    quick = list(cells_of(is_server=True, base64=False, slow=False))
    assert not {"batch-1024", "base64"} & {cell.name for cell in quick}
    assert Cell("batch-32", "32 in one request", batch=32) in quick
    assert command.parsed(["--quick"]).rounds < command.parsed([]).rounds


def test_the_last_line_names_no_folder():
    """Of what a peer said, the last words are kept, and no path of this machine; a long line costs no time."""
    assert last_line("Traceback\n  ^^^^\nOSError: no file /a/b-c/d.bin here\n ^^^\n") == "OSError: no file …/d.bin here"
    assert last_line("^\n") == "it said nothing"
    assert last_line("ERROR: No matching distribution found\nmake: *** [Makefile:1] Error 1") == (
        "ERROR: No matching distribution found"
    )
    assert len(last_line("/abc" * 100_000)) <= 300
