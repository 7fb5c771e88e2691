"""Log lines: JSON for machines and text for people, each naming the request that it is about."""

import json
import logging
import re

import httpx
import pytest
import structlog

from faults.servers import stub
from quiver.config import ServerConfig
from quiver.telemetry import logs

EMBED = "/v1/embeddings"
NEW = r"req_[0-9a-f]{32}"


def test_each_line_names_the_request_that_it_is_about():
    """By the id of its reply, over one connection: the client's own, its trace's, or a new one where that will not do."""
    given = {
        "mine-1": {"x-request-id": "mine-1"},
        "ab" * 16: {"traceparent": f"00-{'ab' * 16}-{'cd' * 8}-01"},
        NEW: {"x-request-id": "no good\\id"},
        f"{NEW}(?=)": {},
    }
    with stub(log_level="debug") as server, httpx.Client(base_url=server.ready_url()) as http:
        ids = [http.post(EMBED, json={"input": "a"}, headers=h).headers["x-request-id"] for h in given.values()]
        lines = [server.wait_for("answered") for _ in given]
    assert all(re.fullmatch(wanted, found) for wanted, found in zip(given, ids, strict=True))
    assert [line["request_id"] for line in lines] == ids
    assert {(line["method"], line["route"], line["status"], line["level"]) for line in lines} == {
        ("POST", EMBED, 200, "debug")
    }
    assert len(set(ids)) == len(ids)


def test_a_fault_in_a_request_can_be_found_by_its_id():
    """What fails while a request is answered is logged with the id that its client was told."""
    with stub() as server:
        body = {"input": "!observe inputs_computed"}
        reply = httpx.post(f"{server.ready_url()}{EMBED}", json=body, headers={"x-request-id": "mine-2"})
        line = server.wait_for("a handler failed")
    assert (reply.status_code, reply.headers["x-request-id"]) == (500, "mine-2")
    assert line["request_id"] == "mine-2"
    assert "RuntimeError" in line["exception"]


@pytest.fixture
def unconfigured():
    """Leave logging behind as it was found."""
    before, root = structlog.get_config(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    yield
    root.handlers[:] = handlers
    root.setLevel(level)
    structlog.configure(**before)


@pytest.mark.parametrize("form", ["json", "text"])
@pytest.mark.usefixtures("unconfigured")
def test_both_forms_say_the_same(capsys, form):
    """Event, level, values and the request, with a time, as one line of JSON or of text; nothing of it without a request."""
    logs.configure(ServerConfig(log_format=form))
    structlog.contextvars.clear_contextvars()
    structlog.get_logger("test").info("before", a=1)
    with structlog.contextvars.bound_contextvars():
        logs.about_request("mine-3")
        structlog.get_logger("test").warning("within", a=2)
    before, within = capsys.readouterr().err.splitlines()
    assert "request_id" not in before
    if form == "json":
        said = json.loads(within)
        assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:.]+Z", said.pop("timestamp"))
        assert said == {"event": "within", "level": "warning", "a": 2, "request_id": "mine-3"}
        return
    plain = re.sub(r"\x1b\[\d*m", "", within)
    assert re.match(r"\d\d:\d\d:\d\d \[warning *\] within ", plain)
    assert {"a=2", "request_id=mine-3"} <= set(plain.split())
