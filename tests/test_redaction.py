"""No key and no text in the log: not in what we write, not in what libraries write, not in a traceback."""

import json
import logging
import sys

import httpx
import pytest
import structlog

from faults.servers import stub
from quiver import config, keys
from quiver.config import AccountsConfig, Config, ModelsConfig, Secret, ServerConfig, TlsConfig
from quiver.telemetry import logs
from quiver.telemetry.redaction import redactor

KEY = keys.mint("qv")
CANARY = "canary-4711-text"
SERVER_KEY = "the-key-of-this-server"


@pytest.mark.parametrize(
    ("line", "masked"),
    [
        (f"key {KEY.text} is revoked", f"key qv_{KEY.id}_*** is revoked"),
        (f'{{"a": "{KEY.text}"}}', f'{{"a": "qv_{KEY.id}_***"}}'),
        ("Authorization: Bearer abc.DEF-1", "Authorization: Bearer ***"),
        ("authorization: BASIC dXNlcg==", "authorization: BASIC ***"),
        ("{'authorization': 'abc'}", "{'authorization': '***'}"),
        ("[(b'x-api-key', b'abc'), (b'host', b'a')]", "[(b'x-api-key', b'***'), (b'host', b'a')]"),
        ('{"headers": "{\\"api-key\\": \\"abc\\"}"}', '{"headers": "{\\"api-key\\": \\"***\\"}"}'),
        ("x-api-key=abc", "x-api-key=***"),
        ("postgresql://user:pass@host/db", "postgresql://user:***@host/db"),
        ("redis://:pass@127.0.0.1:6379/0", "redis://:***@127.0.0.1:6379/0"),
        (f"it was {SERVER_KEY}!", "it was ***!"),
        ("\x1b[36mx-api-key\x1b[0m=\x1b[35mabc\x1b[0m", "\x1b[36mx-api-key\x1b[0m=\x1b[35m***\x1b[0m"),
    ],
)
def test_what_looks_like_a_key_is_masked(line, masked):
    """Wherever it stands; the id of one of our keys stays, for it names the key and opens nothing."""
    assert redactor([SERVER_KEY])(line) == masked


@pytest.mark.parametrize(
    "line",
    [
        "listening url=http://127.0.0.1:8000 docs=http://127.0.0.1:8000/docs",
        "sentence-transformers/all-MiniLM-L6-v2 (int8, 384 dimensions, 256 tokens)",
        '{"key": "qv_3kTz0aQ9LmXe", "event": "an authorization that the gate gave, api-key or not"}',
        "a a a",
    ],
)
def test_other_lines_stay(line):
    """Nothing else is masked, and a secret of a letter or two is not looked for."""
    assert redactor(["a"])(line) == line


@pytest.fixture
def unconfigured():
    """Leave logging behind as it was found."""
    root = logging.getLogger()
    before, level, config_before = root.handlers[:], root.level, structlog.get_config()
    yield
    root.handlers[:] = before
    root.setLevel(level)
    structlog.configure(**config_before)


def fail(text):
    """Raise what names a key, while a variable holds a text."""
    raise ValueError(f"traceback {KEY.text}", len(text))


def write_everything():
    """Log a key in all the ways there are: as a value, in a traceback, by a library, and in a library's traceback."""
    ours, library = structlog.get_logger(), logging.getLogger("a.library")
    ours.info("value", key=KEY.text, headers={"authorization": f"Bearer {SERVER_KEY}"})
    try:
        fail(CANARY)
    except ValueError:
        ours.exception("ours")
        library.exception("theirs")
    library.warning("by a library %s", KEY.text)


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.usefixtures("unconfigured")
def test_no_line_holds_a_key(capsys, form):
    """Whoever writes it, in either form, it is masked, and the rest of the line stays; JSON stays JSON."""
    logs.configure(ServerConfig(log_format=form, log_level="debug", api_key=Secret(SERVER_KEY)))
    write_everything()
    said = capsys.readouterr().err
    secret = KEY.text.split("_")[2]
    assert secret not in said
    assert SERVER_KEY not in said
    assert CANARY not in said
    assert said.count(f"qv_{KEY.id}_***") == 4
    if form == "json":
        assert [json.loads(line)["event"].split()[0] for line in said.splitlines() if line.startswith("{")] == [
            "value",
            "ours",
            "theirs",
            "by",
        ]


@pytest.mark.usefixtures("unconfigured")
def test_a_key_would_be_seen(capsys):
    """Negative control: a logger as it comes writes it down, and in a traceback the text that a variable holds."""
    structlog.configure(logger_factory=structlog.PrintLoggerFactory(sys.stderr))
    write_everything()
    said = capsys.readouterr().err
    assert KEY.text in said
    assert CANARY in said


def test_every_secret_of_the_settings_is_known():
    """Each that is a word is masked as it is; of a URL the password is."""
    settings = Config(
        server=ServerConfig(api_key=Secret("one")),
        models=ModelsConfig(hub_token=Secret("two")),
        tls=TlsConfig(tls_key_password=Secret("three")),
        accounts=AccountsConfig(database_url=Secret("postgresql://a:b@c/d")),
    )
    assert set(config.secrets(settings)) == {"one", "two", "three"}


def requests(key):
    """Return requests that a server takes, and such that it refuses in each way that it can."""
    given = {"authorization": f"Bearer {key}"}
    text = {"input": CANARY}
    yield {"json": text, "headers": given}
    yield {"json": {"input": [CANARY] * 3, "dimensions": -1}, "headers": given}
    yield {"json": {"input": {CANARY: CANARY}}, "headers": given}
    yield {"json": {"input": CANARY, "model": CANARY}, "headers": given}
    yield {"content": f'{{"input": "{CANARY}', "headers": given}
    yield {"content": f'{{"input": "{CANARY}\udc80"}}'.encode("utf-8", "surrogatepass"), "headers": given}
    yield {"json": {"input": f"!raise {CANARY}"}, "headers": given}
    yield {"json": {"input": f"!nan {CANARY}"}, "headers": given}
    yield {"json": {"input": f"!encode-raise {CANARY}"}, "headers": given}
    yield {"json": text, "headers": {"authorization": f"Bearer {KEY.text}"}}
    yield {"json": text, "headers": {"x-api-key": KEY.text}}
    yield {"json": text, "params": {"key": KEY.text}, "headers": given}
    yield {"json": text}


def test_a_real_server_logs_neither_texts_nor_keys(tmp_path):
    """At the level debug, whatever is asked and however it is refused, neither a text nor a key shows in the log."""
    with stub(api_key=SERVER_KEY, auth="auto", data_dir=tmp_path, log_level="debug") as server:
        url = server.ready_url()
        statuses = [httpx.post(f"{url}/v1/embeddings", **asked).status_code for asked in requests(SERVER_KEY)]
        with httpx.Client() as http:
            http.get(f"{url}/v1/models/{CANARY}", headers={"authorization": f"Bearer {SERVER_KEY}"})
        server.process.terminate()
        assert server.ended() == 0
        said = "".join(server.lines)
    assert {200, 400, 401, 404, 500} <= set(statuses)
    assert any("failed" in line for line in server.lines), "nothing was logged: it proves nothing"
    for secret in (CANARY, SERVER_KEY, KEY.text.split("_")[2]):
        assert secret not in said
