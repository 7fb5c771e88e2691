"""The text of a key and its hash."""

import re

import bcrypt
import pytest
from hypothesis import given
from hypothesis import strategies as st

from quiver import keys

SCANNER = re.search(r"`(.+)`\.", keys.__doc__)[1]
KEY = keys.mint("qv")


def test_a_key_is_read_as_it_was_made():
    """It has its prefix and id, and a secret that is no other's."""
    made = [keys.mint(prefix) for prefix in ("qv", "fe") for _ in range(100)]
    assert [keys.parse(key.text) for key in made] == made
    assert {key.text[:3] for key in made} == {"qv_", "fe_"}
    assert len({key.id for key in made}) == len({key.text.split("_")[2] for key in made}) == 200


@given(st.integers(0, 2**256 - 1), st.integers(0, 2**256 - 1))
def test_distinct_secrets_are_written_distinctly(one, other):
    """All 256 bits are in the letters."""
    written = [keys.base62(number, keys.SECRET_LETTERS) for number in (one, other)]
    assert (written[0] == written[1]) == (one == other)
    assert all(len(text) == keys.SECRET_LETTERS for text in written)


@given(st.integers(0, len(KEY.text) - 1), st.sampled_from(keys.LETTERS + "_"))
def test_a_mistyped_key_is_none(place, letter):
    """Any one letter that is another is noticed without asking anybody."""
    text = KEY.text[:place] + letter + KEY.text[place + 1 :]
    assert (keys.parse(text) is None) == (text != KEY.text)


@pytest.mark.parametrize(
    "text",
    ["", "qv_", KEY.text + "\n", " " + KEY.text, KEY.text.upper(), KEY.text[:-1], "\ud800", "é" * 66, "0" * 10**6],
)
def test_what_is_no_key_is_none(text):
    """Nothing but a whole key in its own letters is one."""
    assert keys.parse(text) is None


def test_the_documented_pattern_finds_keys():
    """A scanner for leaked secrets sees a key in a text, and nothing else."""
    found = re.findall(SCANNER, f"KEY={KEY.text}; sha=da39a3ee5e6b4b0d3255bfef95601890afd80709 qv_short_key_here")
    assert found == [KEY.text]


def test_a_key_is_not_printed():
    """Neither a log line nor a traceback shows it."""
    assert KEY.text.split("_")[2] not in repr(KEY)


def test_a_hash_is_of_one_key():
    """It is bcrypt's, matches its key and no other, and is another each time."""
    hashed = keys.hash_key(KEY, rounds=4)
    assert hashed.startswith("$2b$04$")
    assert keys.matches(KEY, hashed)
    assert not keys.matches(keys.mint("qv"), hashed)
    assert hashed != keys.hash_key(KEY, rounds=4)


def test_every_letter_of_a_key_is_hashed():
    """Bcrypt reads 72 bytes and no more: two keys that differ in the last letters alone do not match each other."""
    other = keys.KeyText(KEY.prefix, KEY.id, KEY.text[:-1] + ("a" if KEY.text[-1] != "a" else "b"))
    assert not keys.matches(other, keys.hash_key(KEY, rounds=4))


@pytest.mark.parametrize("hashed", ["", "x" * 60, bcrypt.hashpw(b"", bcrypt.gensalt(4)).decode()[:-3]])
def test_a_damaged_hash_matches_nothing(hashed):
    """A row that was changed by hand opens no door and breaks no server."""
    assert not keys.matches(KEY, hashed)
