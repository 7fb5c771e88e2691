"""The page on accounts cannot lie: its examples run, and print what stands beside them."""

import json
import re
import time

import pytest

from desk import over_http, post, staffed
from quiver.accounts import FIRST_TIERS, SCOPES, period_of
from quiver.gate import KEY_HEADERS
from test_docs import EXAMPLE, PRINTED, read, run

PAGE = "docs/accounts.md"
SCALE = FIRST_TIERS[-1]
MOVES = {"period", "resets_at", "key"}
"""What differs from day to day, and from key to key."""


def examples():
    """Return the examples of the page, by language."""
    return {match["language"]: match for match in EXAMPLE.finditer(read(PAGE))}


def still(shown):
    """Leave out what moves."""
    if isinstance(shown, dict):
        return {name: still(value) for name, value in shown.items() if name not in MOVES}
    return [still(value) for value in shown] if isinstance(shown, list) else shown


@pytest.mark.parametrize("minilm", ["float32"], indirect=True)
@pytest.mark.parametrize("language", ["sh", "python"])
async def test_an_example_of_accounts_does_what_its_page_shows(minilm, tmp_path, monkeypatch, language):
    """With a key of the tier that the page speaks of, after one request of two texts."""
    example = examples()[language]
    async with staffed(tmp_path, model=minilm) as (parts, desk), over_http(parts) as client:
        key = await desk.key(email="ann@example.com", tier=SCALE)
        monkeypatch.setenv("KEY", key)
        assert (await post(parts, "/v1/embeddings", key, b'{"input": ["to be", "or not to be"]}')).status == 200
        await parts.stores.register.meter.flush()
        output = await run(language, example["code"].replace("http://localhost:8000", str(client.base_url).rstrip("/")))
    if language == "python":
        assert PRINTED.findall(example["code"]) == output.splitlines()
        return
    shown, said = json.loads(example["reply"]), json.loads(output)
    assert still(said) == still(shown)
    assert set(said) == set(shown)
    assert said["period"] == period_of(time.time())
    assert said["data"][0]["key"] == key.split("_")[1]
    assert re.fullmatch(r"[0-9A-Za-z]{12}", shown["data"][0]["key"])


def test_the_page_names_every_scope_and_header():
    """What a key may be good for, and what replies say, is all on the page."""
    page = read(PAGE)
    assert [scope for scope in SCOPES if f"| `{scope}` |" not in page] == []
    assert [name for name in KEY_HEADERS if f"`{name}: KEY`" not in page.lower().replace("key`", "KEY`")] == []
