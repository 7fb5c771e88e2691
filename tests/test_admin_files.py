"""The files of the dashboard's page, held by reading them: small, their own, and to be read by everybody."""

import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from quiver.admin.pages import FOLDER, MEDIA_TYPES

DOCS = Path(__file__).parent.parent / "docs"
MAX_LINES = 400
MAX_PICTURES, MAX_PICTURE_BYTES = 5, 150_000
ENOUGH = 4.5
"""Contrast of text, by WCAG's level AA."""
SURFACES = ("bg", "panel", "sunk")
ON = {
    **dict.fromkeys(("text", "dim"), SURFACES),
    "accent": (*SURFACES, "soft"), "bad": (*SURFACES, "bad-soft"),
    "on-accent": ("accent",), "good": ("good-soft",), "warn": ("warn-soft",), "busy": ("busy-soft",),
}  # fmt: skip
"""Colours of text, and what it stands on; chips and notices have a surface of their own."""


def texts() -> dict[str, str]:
    """Read the files."""
    return {path.name: path.read_text(encoding="utf-8") for path in FOLDER.iterdir()}


def strangers(text: str) -> list[str]:
    """Find addresses of anybody else; a namespace is a name, and nothing is fetched there."""
    return [
        url for url in re.findall(r"(?:https?:)?//[a-z][\w.-]+\.[a-z]{2,}[^\"'\s]*", text) if "www.w3.org" not in url
    ]


def inline(text: str) -> list[str]:
    """Find what a strict policy would refuse: scripts, handlers and styles in HTML, code made of text."""
    found = re.findall(r"<script(?![^>]*\bsrc=)[^>]*>|<style|\son\w+=\"|\sstyle=\"", text)
    return found + re.findall(r"\binnerHTML\b|\bouterHTML\b|\beval\(|\binsertAdjacentHTML\b|\bdocument\.write\b", text)


def test_the_page_asks_nobody_else_and_runs_nothing_inline():
    """Whatever it shows goes in as text, and all that it loads lies beside it."""
    for name, text in texts().items():
        assert strangers(text) == [], name
        assert inline(text) == [], name


@pytest.mark.parametrize(
    ("find", "sample"),
    [
        (strangers, 'import x from "https://cdn.example.com/x.js"'),
        (strangers, '<link href="//fonts.example.com/a.css">'),
        (inline, "<script>go()</script>"),
        (inline, '<p onclick="go()">'),
        (inline, '<p style="color: red">'),
        (inline, "main.innerHTML = text"),
    ],
)
def test_a_breach_is_seen(find, sample):
    """Negative control: each is found."""
    assert find(sample)


def test_files_are_small_and_of_known_types():
    """None has more lines than any other source here may have."""
    assert {Path(name).suffix for name in texts()} <= set(MEDIA_TYPES)
    assert [name for name, text in texts().items() if len(text.splitlines()) > MAX_LINES] == []


def test_the_page_names_each_module():
    """Each is fetched at once with the page, and none is missing or left over."""
    page = texts()["index.html"]
    named = set(re.findall(r'href="static/(\w+\.js)"', page)) | {"app.js"}
    imported = set(itertools.chain(*(re.findall(r'from "\./(\w+\.js)"', text) for text in texts().values())))
    assert named == {name for name in texts() if name.endswith(".js")} == imported | {"app.js"}


def palette() -> dict[str, tuple[str, str]]:
    """Return each colour of the style sheet, for light and dark."""
    found = re.findall(r"--([\w-]+): light-dark\((#[0-9a-f]{6}), (#[0-9a-f]{6})\);", texts()["style.css"])
    return {name: (light, dark) for name, light, dark in found}


def luminance(colour: str) -> float:
    """Return how bright a colour is, as WCAG has it."""
    channels = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    red, green, blue = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in channels]
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue


def contrast(one: str, other: str) -> float:
    """Return how well one colour is seen on another."""
    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def pairs() -> Iterator[tuple[str, str, int]]:
    """Yield each text with what it stands on, in light and in dark."""
    for text, surfaces in ON.items():
        yield from ((text, surface, scheme) for surface in surfaces for scheme in (0, 1))


@pytest.mark.parametrize(("text", "surface", "scheme"), list(pairs()))
def test_text_can_be_read(text, surface, scheme):
    """Every colour of text stands out from what it stands on, in light and in dark."""
    assert contrast(palette()[text][scheme], palette()[surface][scheme]) >= ENOUGH


def test_contrast_is_what_wcag_says():
    """Negative control: black on white is 21, a pale grey on white is too little."""
    assert contrast("#000000", "#ffffff") == pytest.approx(21)
    assert contrast("#999999", "#ffffff") < ENOUGH


def test_the_pictures_of_the_docs_are_few_and_small():
    """They are shown in docs/dashboard.md, and a clone need not wait for them."""
    pictures = sorted(DOCS.glob("dashboard-*.png"))
    shown = re.findall(r"\]\((dashboard-\w+\.png)\)", (DOCS / "dashboard.md").read_text(encoding="utf-8"))
    assert 0 < len(pictures) <= MAX_PICTURES
    assert sorted(shown) == [picture.name for picture in pictures]
    assert [picture.name for picture in pictures if picture.stat().st_size > MAX_PICTURE_BYTES] == []
