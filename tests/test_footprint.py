"""What a server leaves on its machine: nothing but what it was told to keep, and where."""

import signal
from pathlib import Path

import httpx
import pytest

from server_process import serving


def files_below(folder: Path) -> set[str]:
    """List everything in a folder, by its path from there."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*")}


@pytest.mark.parametrize("settings", [(), ("--api-key", "secret-key", "--socket-dir", "{sockets}")])
def test_a_server_writes_nowhere_but_where_it_is_told(tmp_path, settings):
    """Neither it nor a library of its keeps anything in the home, or reports from there; what is temporary goes with it."""
    places = {name: tmp_path / name for name in ("home", "tmp", "data", "sockets")}
    for place in places.values():
        place.mkdir()
    words = [word.format(sockets=places["sockets"]) for word in settings]
    env = {"HOME": str(places["home"]), "TMPDIR": str(places["tmp"]), "QUIVER_DATA_DIR": str(places["data"])}
    with serving(*words, **env, XDG_CACHE_HOME="", XDG_DATA_HOME="", ORT_DISABLE_TELEMETRY="") as server:
        headers = {"authorization": "Bearer secret-key"}
        reply = httpx.post(f"{server.ready_url()}/v1/embeddings", json={"input": "to be"}, headers=headers)
        assert reply.status_code == httpx.codes.OK
        server.signal(signal.SIGTERM)
        assert server.ended() == 0
    assert {name: files_below(place) for name, place in places.items()} == {name: set() for name in places}
