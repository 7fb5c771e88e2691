"""Golden exchanges: what each API answers, request by request, at its natural path and under its own prefix."""

import json
from pathlib import Path

import pytest

from conftest import assembled
from fakes import HashBackend, LogitBackend, TokenBackend, fake_model
from quiver.api.call import Call
from quiver.api.root import WIDE
from quiver.app import DIALECTS
from quiver.config import ServerConfig

EXCHANGES = sorted((Path(__file__).parent / "dialects").glob("*/*.json"))
TOLERANCE = 1e-6


def model_of(kind):
    """Make the fake model that an exchange asks for."""
    prompts = {"query": "query: ", "passage": "passage: "}
    match kind:
        case "hash":
            return fake_model(HashBackend(), prompts=prompts)
        case "logits":
            return fake_model(LogitBackend(), kind="rerank", dimensions=1)
        case "classifier":
            return fake_model(LogitBackend(labels=3), kind="classify", labels=("sad", "glad", "mad"), dimensions=3)
        case "sparse":
            return fake_model(TokenBackend(), kind="sparse")
        case "tokens":
            return fake_model(TokenBackend(), prompts=prompts)
    raise ValueError(f"there is no fake model {kind!r}")


def call_of(request, prefix=""):
    """Make the call that a golden file describes; a body of text is sent as it is."""
    body = request.get("body")
    raw = body.encode() if isinstance(body, str) else b"" if body is None else json.dumps(body).encode()
    headers = {"content-type": "application/json", **request.get("headers", {})}
    return Call(request["method"], prefix + request["path"], headers, raw, request.get("query", {}))


def assert_same(found, wanted, place="body"):
    """Compare JSON values: numbers to the tolerance, `"<any>"` with whatever is there."""
    if wanted == "<any>":
        return
    if isinstance(wanted, dict):
        assert isinstance(found, dict), place
        assert found.keys() == wanted.keys(), place
        for key, value in wanted.items():
            assert_same(found[key], value, f"{place}.{key}")
    elif isinstance(wanted, list):
        assert isinstance(found, list), place
        assert len(found) == len(wanted), place
        for i, value in enumerate(wanted):
            assert_same(found[i], value, f"{place}[{i}]")
    elif isinstance(wanted, float):
        assert found == pytest.approx(wanted, abs=TOLERANCE), place
    else:
        assert (found, type(found)) == (wanted, type(wanted)), place


@pytest.mark.parametrize("path", EXCHANGES, ids=lambda path: f"{path.parent.name}/{path.stem}")
async def test_an_exchange_is_as_recorded(path):
    """Status, the recorded headers and the whole body; the same under the API's prefix as at the root."""
    exchange = json.loads(path.read_text(encoding="utf-8"))
    wanted = exchange["reply"]
    server = ServerConfig(root_dialects=tuple(exchange.get("root_dialects", ())))
    model = model_of(exchange.get("model", "hash"))
    async with assembled(model, models=exchange.get("models"), server=server) as parts:
        for prefix in ("", f"/{path.parent.name}"):
            reply = await parts.api.receive(call_of(exchange["request"], prefix))
            assert reply.status == wanted["status"], reply.body
            found = json.loads(reply.body) if reply.body else None
            if reply.status >= 400 and not prefix and exchange["request"]["path"] in WIDE:
                found = {key: value for key, value in found.items() if key in wanted["body"]}  # the rest is for others
            assert_same(found, wanted["body"])
            assert wanted.get("headers", {}).items() <= dict(reply.headers).items()


def test_every_dialect_has_exchanges():
    """No API is without recorded exchanges, and each exchange belongs to one."""
    assert {path.parent.name for path in EXCHANGES} == {d.name for d in DIALECTS if d.has_prefix}


@pytest.mark.parametrize(
    ("found", "wanted"), [({"a": 1}, {"a": 2}), ([1.0], [1.1]), ({"a": 1, "b": 2}, {"a": 1}), (1, True), ([], [1])]
)
def test_a_difference_would_be_seen(found, wanted):
    """Negative control: another value, an additional field, another type fail the comparison."""
    with pytest.raises(AssertionError):
        assert_same(found, wanted)
