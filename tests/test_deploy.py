"""What surrounds a server on its machine: the variables of .env, and the services that it may stand on."""

import contextlib
import os
import re
import shutil
import socket
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from quiver.config import FIELDS, RESERVED_ENV, load

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "tools" / "services.sh"
ASSIGNMENT = re.compile(r"^#?([A-Z][A-Z0-9_]*)=(.*)$", re.MULTILINE)
EX_UNAVAILABLE = 69
SETTINGS = {name for field in FIELDS.values() for name in field.env_names} | RESERVED_ENV
PACKAGES = Path("/usr/lib/postgresql").is_dir() and shutil.which("redis-server")


def variables_of(text: str) -> set[str]:
    """Return the variables that a compose file takes from the environment."""
    return set(re.findall(r"\$\{([A-Z0-9_]+)", text))


def assigned() -> dict[str, str]:
    """Return what .env.example sets or shows."""
    return dict(ASSIGNMENT.findall((ROOT / ".env.example").read_text(encoding="utf-8")))


def test_every_name_of_the_example_is_known():
    """Each is a setting's or one of the services', and each of the services' is there."""
    files = [(ROOT / "deploy" / name).read_text(encoding="utf-8") for name in ("compose.yaml", "compose.full.yaml")]
    services = set().union(*map(variables_of, files))
    assert set(assigned()) - SETTINGS == services - SETTINGS
    assert services - SETTINGS < services
    assert "HOST" in set(assigned()) & SETTINGS


def test_every_value_of_the_example_is_valid():
    """Whoever takes the marks of comments away has settings that the server takes."""
    settings = load(env=assigned(), flags={})
    assert settings.accounts.database_url.reveal().startswith("postgresql://")
    assert settings.accounts.auth == "required"


def test_the_services_names_are_no_settings():
    """A variable that begins as the settings do would keep the server from starting."""
    assert not [name for name in set(assigned()) - SETTINGS if name.startswith("QUIVER_")]


# The script


def services(word: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run tools/services.sh."""
    return subprocess.run(  # noqa: S603  our own script
        [str(SCRIPT), word], capture_output=True, text=True, env=os.environ | env, timeout=60, check=False
    )


@contextlib.contextmanager
def listener() -> Iterator[int]:
    """Take a port of this machine."""
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        yield taken.getsockname()[1]


def free_port() -> str:
    """Name a port that nobody has."""
    with listener() as port:
        return str(port)


def children_in(folder: str) -> list[str]:
    """List the processes that work in a folder."""
    found = []
    for process in psutil.process_iter():
        with contextlib.suppress(psutil.Error):
            if Path(folder) in (cwd := Path(process.cwd())).parents or str(cwd) == folder:
                found.append(process.name())
    return found


@pytest.fixture
def place() -> Iterator[dict[str, str]]:
    """Return the variables of services of this test's own, which end with it."""
    with tempfile.TemporaryDirectory() as folder:  # the user postgres may not enter pytest's
        Path(folder).chmod(0o755)
        env = {"SERVICES": "debian", "SERVICES_DIR": folder, "POSTGRES_PORT": free_port(), "REDIS_PORT": free_port()}
        try:
            yield env
        finally:
            services("down", **env)


@pytest.mark.skipif(not PACKAGES, reason="needs Debian's packages postgresql and redis-server")
def test_the_services_start_once_and_stop(place):
    """A second `up` starts nothing, it says where they are, and after `down` nothing runs; what they keep stays."""
    first, second = services("up", **place), services("up", **place)
    assert (first.returncode, first.stderr) == (0, "")
    assert first.stdout == second.stdout == services("status", **place).stdout
    assert f"postgresql://postgres:quiver@127.0.0.1:{place['POSTGRES_PORT']}/quiver" in first.stdout
    assert f"redis://127.0.0.1:{place['REDIS_PORT']}/0" in first.stdout
    assert children_in(place["SERVICES_DIR"]).count("redis-server") == 1

    assert services("down", **place).stdout == "PostgreSQL is stopped\nRedis is stopped\n"
    assert children_in(place["SERVICES_DIR"]) == []
    assert services("status", **place).returncode == 1
    assert services("down", **place).stdout == ""
    assert (Path(place["SERVICES_DIR"]) / "postgres" / "PG_VERSION").exists()


@pytest.mark.skipif(not PACKAGES, reason="needs Debian's packages postgresql and redis-server")
def test_a_port_that_is_taken_is_said(place):
    """Another server there is neither used nor stopped."""
    with listener() as port:
        refused = services("up", **place | {"POSTGRES_PORT": str(port)})
    assert refused.returncode == EX_UNAVAILABLE
    assert f"port {port} is taken: choose another, make services-up POSTGRES_PORT=" in refused.stderr
    assert children_in(place["SERVICES_DIR"]) == []


def test_docker_is_asked_where_it_works(tmp_path):
    """Compose gets the file and waits until both are healthy; where the daemon is away the packages are tried."""
    log, docker = tmp_path / "log", tmp_path / "docker"
    docker.write_text(f'#!/bin/sh\necho "$*" >> {log}\n[ "$1" != info ] || exit ${{AWAY:-0}}\n', encoding="utf-8")
    docker.chmod(0o755)
    path = f"{tmp_path}:{os.environ['PATH']}"

    assert services("up", PATH=path, SERVICES="").returncode == 0
    file = ROOT / "deploy" / "compose.yaml"
    assert log.read_text(encoding="utf-8").splitlines()[-1] == f"compose --file {file} up --detach --wait"

    log.unlink()
    services("status", PATH=path, SERVICES="", AWAY="1", SERVICES_DIR=str(tmp_path))
    assert log.read_text(encoding="utf-8").splitlines() == ["compose version", "info"]
