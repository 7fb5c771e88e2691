"""The documentation cannot lie: its tables are the code's, its examples run, its links lead somewhere."""

import asyncio
import json
import re
import runpy
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest

import quiver
from conftest import listening
from quiver.config import Config, load

ROOT = Path(__file__).parent.parent
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
PAGES_WITH_EXAMPLES = (
    "README.md",
    "docs/bulk.md",
    "docs/client.md",
    "docs/cohere.md",
    "docs/fastembed_query.md",
    "docs/inference_api.md",
    "docs/infinity.md",
    "docs/jina.md",
    "docs/jsonrpc.md",
    "docs/mixedbread.md",
    "docs/ollama.md",
    "docs/openai.md",
    "docs/runpod.md",
    "docs/s3_embedding.md",
    "docs/tei.md",
    "docs/voyage.md",
)
EXAMPLE = re.compile(
    r"^```(?P<language>sh|python)\n(?P<code>.*?)^```\n(?:\n```json\n(?P<reply>.*?)^```\n)?", re.MULTILINE | re.DOTALL
)
PRINTED = re.compile(r"\bprint\(.*\)  # (.+)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]*)(?:#([^)]*))?\)")
PATIENCE_SECONDS = 20


def read(name: str) -> str:
    """Read a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def examples() -> list[Any]:
    """Return (language, code, reply) of every example, named by page and line."""
    found = []
    for name in PAGES_WITH_EXAMPLES:
        text = read(name)
        for match in EXAMPLE.finditer(text):
            line = text.count("\n", 0, match.start()) + 1
            found.append(pytest.param(*match.group("language", "code", "reply"), id=f"{name}:{line}"))
    return found


def faults_of(code: str, reply: str | None, output: str) -> str | None:
    """Say how an example's output differs from what its page shows, if so."""
    if reply is not None:
        return None if numbers_rounded(reply) == numbers_rounded(output) else f"the reply is {output}"
    expected = PRINTED.findall(code)
    return None if not expected or expected == output.splitlines() else f"it prints {output!r}"


def numbers_rounded(text: str) -> object:
    """Decode JSON; the last digits of a vector are another CPU's to choose."""
    return json.loads(text, parse_float=lambda digits: round(float(digits), 3))


async def run(language: str, code: str) -> str:
    """Run an example in a process of its own and return what it prints; a warning is an error."""
    command = ("bash", "-euo", "pipefail", "-c") if language == "sh" else (sys.executable, "-W", "error", "-c")
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(*command, code, stdout=pipe, stderr=pipe, cwd=ROOT)
    output, complaints = await asyncio.wait_for(process.communicate(), PATIENCE_SECONDS)
    assert process.returncode == 0, complaints.decode()
    return output.decode()


@pytest.mark.skipif(shutil.which("curl") is None, reason="the examples call curl")
@pytest.mark.parametrize("minilm", ["float32"], indirect=True)
@pytest.mark.parametrize(("language", "code", "reply"), examples())
async def test_an_example_does_what_its_page_shows(minilm, language, code, reply):
    """It runs against a live server, and prints what stands beside it."""
    async with listening(minilm) as url:
        code = code.replace("http://localhost:8000", url).replace(".venv/bin/quiver", f"'{sys.executable}' -m quiver")
        output = await run(language, code)

    assert faults_of(code, reply, output) is None


@pytest.mark.parametrize(
    ("code", "reply", "output"),
    [
        ("print(n)  # 384", None, "385\n"),
        ("print(n)  # 384", None, ""),
        ("curl", '{"a": 1}', '{"a": 2}'),
        ("curl", '{"a": [0.25]}', '{"a": [0.26]}'),
    ],
)
def test_another_output_is_seen(code, reply, output):
    """Negative control: an example whose output differs from its page is at fault."""
    assert faults_of(code, reply, output)


async def test_an_example_that_fails_is_seen():
    """Negative control: a process that ends badly is no example."""
    with pytest.raises(AssertionError, match="No such thing"):
        await run("python", "raise SystemExit('No such thing')")


@pytest.mark.parametrize("name", ["README.md", "docs/configuration.md"])
def test_the_settings_of_a_page_are_valid(tmp_path, name):
    """Its quiver.toml is read without an error, and says something."""
    (settings,) = re.findall(r"^```toml\n(.*?)^```$", read(name), re.MULTILINE | re.DOTALL)
    file = tmp_path / "quiver.toml"
    file.write_text(settings, encoding="utf-8")
    assert load(file=file, env={}, flags={}) != Config()


def test_the_pages_have_examples():
    """Both pages show both languages, or nothing above was tested."""
    assert {(p.id.partition(":")[0], p.values[0]) for p in examples()} == {
        (page, language) for page in PAGES_WITH_EXAMPLES for language in ("sh", "python")
    }


@pytest.fixture(scope="module")
def tool():
    """Return what tools/docs.py defines."""
    return runpy.run_path(str(ROOT / "tools" / "docs.py"))


def test_the_generated_tables_are_current(tool):
    """`make docs` would write nothing."""
    assert list(tool["outdated"]()) == []


def test_a_table_that_is_out_of_date_is_seen(tool, tmp_path):
    """Negative control: one changed default is enough, and only its page is named."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    page = tmp_path / "docs" / "configuration.md"
    current = page.read_text(encoding="utf-8")
    page.write_text(current.replace("`8000`", "`8001`"), encoding="utf-8")

    assert tool["outdated"](tmp_path) == {page: current}


@pytest.mark.parametrize(
    ("before", "after", "complaint"),
    [
        ("generated: errors", "generated: mistakes", "there is no table 'mistakes'"),
        ("<!-- end -->", "", "has no <!-- end -->"),
        ("<!-- generated: errors -->", "", "no page has the table 'errors'"),
    ],
)
def test_a_broken_mark_is_seen(tool, tmp_path, before, after, complaint):
    """A table that is unknown, open or nowhere stops the tool with the reason."""
    shutil.copytree(ROOT / "docs", tmp_path / "docs")
    shutil.copy(ROOT / "README.md", tmp_path)
    page = tmp_path / "docs" / "errors.md"
    page.write_text(page.read_text(encoding="utf-8").replace(before, after), encoding="utf-8")
    if after.endswith("mistakes"):
        (tmp_path / "docs" / "other.md").write_text("<!-- generated: errors -->\n<!-- end -->\n", encoding="utf-8")

    with pytest.raises(tool["StaleDocs"], match=re.escape(complaint)):
        tool["outdated"](tmp_path)


def dead_links(page: Path) -> list[str]:
    """List the links of a page that lead to no file, or to no heading of it."""
    dead = []
    for path, heading in LINK.findall(page.read_text(encoding="utf-8")):
        target = page.parent / path if path else page
        if not target.exists() or (heading and heading not in headings(target)):
            dead.append(f"{path}#{heading}")
    return dead


def headings(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.+)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_every_link_leads_somewhere(page):
    """Files and headings that a page points to exist."""
    assert dead_links(page) == []


def test_a_dead_link_is_seen(tmp_path):
    """Negative control: a missing file and a missing heading are found, a present one is not."""
    page = tmp_path / "page.md"
    page.write_text("# One thing\n[a](#one-thing) [b](page.md) [c](nowhere.md) [d](#another)\n", encoding="utf-8")
    assert dead_links(page) == ["nowhere.md#", "#another"]


def test_the_changelog_begins_with_this_version():
    """A release without its entry, or an entry without its release, cannot be."""
    versions = re.findall(r"^## \[(\d[^]]*)\] - \d{4}-\d\d-\d\d$", read("CHANGELOG.md"), re.MULTILINE)
    assert versions[0] == quiver.__version__


def test_the_readme_explains_every_make_target():
    """Its table has each target of the Makefile and no other."""
    targets = re.findall(r"^([a-z-]+):.*##", read("Makefile"), re.MULTILINE)
    explained = re.findall(r"^\| `make ([a-z-]+)` \|", read("README.md"), re.MULTILINE)
    assert sorted(explained) == sorted(set(targets) - {"help"})
