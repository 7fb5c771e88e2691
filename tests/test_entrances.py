"""What is found at each listener: every API at the port and at rest.sock, one thing at each other socket."""

import socket

import pytest

from faults.servers import stub
from quiver import config
from quiver.api.listeners import bind
from quiver.errors import ConfigError
from test_sockets import RPC_HEALTH, alone, over


def test_each_socket_serves_what_it_is_for(tmp_path):
    """JSON-RPC at its root and at /rpc, the dashboard at its root and at /admin, health at both, and no more."""
    with stub(socket_dir=tmp_path) as server:
        server.ready_url()
        with over(tmp_path / "rpc.sock") as http:
            for path in ("/", "/rpc", "/jsonrpc/rpc"):
                assert http.post(path, json=RPC_HEALTH).json()["result"] == {"status": "ok", "models_ready": True}
            assert http.get("/health/ready").status_code == 200
            for path in ("/v1/embeddings", "/embed", "/rerank", "/admin/api/keys", "/api/keys", "/run"):
                refused = http.post(path, json={"input": "a"})
                assert (refused.status_code, refused.json()["jsonrpc"]) == (404, "2.0"), path
        with over(tmp_path / "admin.sock") as http:
            for path in ("/", "/admin/"):
                assert "<title>Quiver</title>" in http.get(path).text
            for path in ("/api/status", "/admin/api/status"):
                assert http.get(path).json()["state"] == "ok"
            assert http.get("/health/ready").status_code == 200
            for path in ("/v1/embeddings", "/rpc", "/rerank", "/run"):
                assert http.post(path, json={"input": "a"}).status_code == 404, path
        with over(tmp_path / "rest.sock") as http:
            assert http.get("/admin/").status_code == 404
            assert http.post("/rpc", json=RPC_HEALTH).status_code == 200
            assert http.post("/", json=RPC_HEALTH).status_code != 200, "the root is TEI's there"


def test_a_socket_that_is_taken_leaves_none_of_the_others(tmp_path):
    """A server that finds one of its places in use listens nowhere, and those that it had made are gone."""
    with socket.socket(socket.AF_UNIX) as living:
        living.bind(str(tmp_path / "admin.sock"))
        living.listen()
        with pytest.raises(ConfigError, match=r"another server listens on .*admin\.sock"):
            bind(alone(tmp_path), None)
        assert [path.name for path in tmp_path.iterdir()] == ["admin.sock"]


def test_the_preset_of_hero_opens_three_sockets(tmp_path):
    """With its preset and its variable, the three of its document lie where that says."""
    settings = config.load(preset="hero-embedder-provider", env={"PATH_SOCKETS": str(tmp_path)}, flags={"tcp": "false"})
    listeners = bind(settings.server, None)
    folder = tmp_path / "hero_embedder_provider"
    assert {path.name for path in folder.iterdir()} == {"rest.sock", "rpc.sock", "admin.sock"}
    for listener in listeners:
        listener.close()


def test_origins_may_call_the_port_and_not_the_dashboards_socket(tmp_path):
    """Pages that `cors_origins` lets in at the port get no leave where nobody asks for a key, refused at the edge or not."""
    origin = {"origin": "http://page.example", "access-control-request-method": "POST"}
    for name, path, may in (
        ("rest.sock", "/v1/embeddings", True),
        ("admin.sock", "/api/keys", False),
        ("rpc.sock", "/", False),
    ):
        for inflight in (1, 1000):
            with stub(socket_dir=tmp_path, cors_origins="*", max_inflight_bytes=inflight) as server:
                server.ready_url()
                with over(tmp_path / name) as http:
                    replies = (http.options(path, headers=origin), http.post(path, json={}, headers=origin))
            assert (replies[1].status_code == 429) is (inflight == 1)
            assert {"access-control-allow-origin" in reply.headers for reply in replies} == {may}, name
