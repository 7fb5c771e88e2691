"""What deploys a server: images, compose files, monitoring and the unit of systemd, held against the server itself."""

import configparser
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from quiver import app
from quiver.config import FIELDS, RESERVED_ENV, Config, load
from quiver.errors import ConfigError
from server_process import serving

ROOT = Path(__file__).parent.parent
DEPLOY = ROOT / "deploy"
SETTINGS = {name for field in FIELDS.values() for name in field.env_names} | RESERVED_ENV
NOT_OURS = {"HOME", "PATH", "NVIDIA_VISIBLE_DEVICES", "NVIDIA_DRIVER_CAPABILITIES"}
"""What the system, Python and the driver read."""
PATHS = {route.path for dialect in app.dialects() for route in dialect.routes}
UNITS = {"s": 1, "m": 60}
LONGEST_STOP = Config().server.drain_seconds + Config().server.drain_delay_seconds


def read(name: str) -> str:
    """Read a file of the repository."""
    return (ROOT / name).read_text(encoding="utf-8")


def seconds(text: str) -> int:
    """Read a time as compose files and Dockerfiles write it."""
    return int(text[:-1]) * UNITS[text[-1]]


def instructions(name: str) -> list[tuple[str, str]]:
    """Take a Dockerfile apart into words and what stands behind them."""
    text = re.sub(r"^#.*\n", "", read(name), flags=re.MULTILINE).replace("\\\n", " ")
    return [(word, rest) for word, _, rest in (line.partition(" ") for line in text.splitlines()) if word]


def arguments(name: str) -> dict[str, str]:
    """Return what a Dockerfile's arguments are by default."""
    return dict(rest.split("=", 1) for word, rest in instructions(name) if word == "ARG")


def variables(name: str) -> dict[str, str]:
    """Return the environment of the image that a Dockerfile ends with."""
    last = max(i for i, (word, _) in enumerate(instructions(name)) if word == "FROM")
    found = [rest for word, rest in instructions(name)[last:] if word == "ENV"]
    return dict(pair for rest in found for pair in re.findall(r"(\w+)=(\S+)", rest))


def compose() -> dict[str, Any]:
    """Return the services of the full compose file."""
    found: dict[str, Any] = yaml.safe_load(read("deploy/compose.full.yaml"))
    return found


# Images


@pytest.mark.parametrize("name", ["deploy/Dockerfile", "deploy/Dockerfile.cuda"])
def test_an_image_sets_what_the_server_reads(name):
    """Each variable is a setting or another program's, and the server takes their values; it ends as no root."""
    env = variables(name)
    assert set(env) <= SETTINGS | NOT_OURS
    assert load(env=env, flags={})
    assert [rest for word, rest in instructions(name) if word == "USER"][-1] == "10001:10001"


def test_a_container_listens_to_its_network():
    """Without a preset the server itself listens to its own machine alone, which in a container is nobody."""
    settings = load(env=variables("deploy/Dockerfile"), flags={}).server
    assert settings.host == "0.0.0.0"  # noqa: S104  that is the point
    exposed = [rest for word, rest in instructions("deploy/Dockerfile") if word == "EXPOSE"]
    assert exposed == [str(settings.port)]


def test_a_container_is_told_more_by_those_who_run_it():
    """An image's own words give way to a preset's port, a port of another system's name, and a host of ours."""
    image = variables("deploy/Dockerfile")
    assert load(env=image | {"INFINITY_PORT": "7997"}, flags={}).server.port == 7997
    assert load(env=image | {"QUIVER_PRESET": "tei"}, flags={}).server.port == 3000
    assert load(env=image | {"QUIVER_HOST": "::"}, flags={}).server.host == "::"


def test_an_image_is_built_of_what_it_may_see():
    """What is copied exists, and .dockerignore lets it in; a .env and what is ignored by git stay outside."""
    first, *allowed = [line for line in read(".dockerignore").splitlines() if line and line[0] != "#"]
    assert first == "*"
    copied = [rest.split()[:-1] for word, rest in instructions("deploy/Dockerfile") if word == "COPY"]
    sources = {source for words in copied if not words[0].startswith("--from") for source in words}
    assert sources == {line[1:] for line in allowed if line[0] == "!"}
    assert all((ROOT / source).exists() for source in sources)


def test_images_and_make_install_the_same():
    """The model and torch have one version everywhere; every extra of an image is one of the package."""
    makefile = read("Makefile")
    assert f"MODEL_PACK := {arguments('deploy/Dockerfile')['MODEL_PACK']}\n" in makefile
    assert f" {arguments('deploy/Dockerfile.cuda')['TORCH']}\n" in makefile
    assert set(arguments("deploy/Dockerfile")["EXTRAS"].split(",")) <= extras()


def extras() -> set[str]:
    """Return the package's optional parts."""
    return set(
        re.findall(r"^(\w+) = \[", read("pyproject.toml").partition("[project.optional-dependencies]")[2], re.MULTILINE)
    )


def is_healthy(sockets: Path, *arguments: str) -> bool:
    """Run the health check of an image, as its HEALTHCHECK does."""
    command = [sys.executable, "-IS", str(DEPLOY / "healthcheck.py"), *arguments]
    done = subprocess.run(  # noqa: S603  our own file
        command, env={"QUIVER_SOCKET_DIR": str(sockets)}, capture_output=True, text=True, timeout=20, check=False
    )
    assert "Traceback" not in done.stderr
    return done.returncode == 0


def test_the_health_check_tells_the_truth(tmp_path):
    """Healthy is a server that answers, whatever its port and keys; nothing, and another reply than 200, is not."""
    sockets = tmp_path / "sockets"
    assert not is_healthy(sockets)
    with serving("--api-key", "secret-key", "--socket-dir", str(sockets)) as server:
        server.ready_url()
        assert is_healthy(sockets)
        assert not is_healthy(sockets, "/v1/models")
    assert not is_healthy(sockets)


def test_the_health_check_asks_where_the_image_listens():
    """The socket's directory is a setting, the image sets it, and the path is a route."""
    script = read("deploy/healthcheck.py")
    assert (
        set(re.findall(r'environ\["(\w+)"\]', script)) == {"QUIVER_SOCKET_DIR"} <= set(variables("deploy/Dockerfile"))
    )
    assert set(re.findall(r'"(/[\w/]+)"', script)) <= PATHS
    (check,) = [rest for word, rest in instructions("deploy/Dockerfile") if word == "HEALTHCHECK"]
    patience = float(*re.findall(r"^PATIENCE_SECONDS = (.+)$", script, re.MULTILINE))
    assert patience < seconds(*re.findall(r"--timeout=(\w+)", check))


# The page


def test_the_page_names_what_there_is():
    """Its variables and settings exist, its YAML is YAML, and the values that it shows are the chart's."""
    text = read("docs/deploy.md")
    assert set(re.findall(r"\bQUIVER_[A-Z_]+\b", text)) <= SETTINGS
    told = re.findall(r"`([a-z]+(?:_[a-z]+)+)` \(", text)
    assert "drain_seconds" in told
    assert set(told) <= set(FIELDS) | {"stop_grace_period"}
    chart, proxy = (
        yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    )
    assert set(chart) <= set(yaml.safe_load(read("deploy/helm/quiver/values.yaml")))
    assert set(chart["settings"]) <= set(FIELDS)
    assert proxy["http"]["services"]["quiver"]["loadBalancer"]["healthCheck"]["path"] in PATHS


def test_the_page_says_what_the_settings_are():
    """Where a figure stands behind a setting in brackets, it is the default."""
    text, server = read("docs/deploy.md"), Config().server
    for name, value in (("timeout_seconds", server.timeout_seconds), ("drain_seconds", server.drain_seconds)):
        assert f"`{name}` ({value:g})" in text
    assert f"`drain_delay_seconds` ({server.drain_delay_seconds:g})" in text
    assert f"`max_body_bytes` ({server.max_body_bytes >> 20} MiB)" in text
    assert f"`max_file_bytes` ({Config().jobs.max_file_bytes >> 20} MiB)" in text


# Compose, Prometheus, Grafana


def test_a_composed_server_is_told_what_it_reads():
    """Its variables are settings, with values that the server takes; it has the time that a stop takes."""
    server = compose()["services"]["quiver"]
    env = {name: re.sub(r"\$\{\w+:-(.*?)\}", r"\1", text) for name, text in server["environment"].items()}
    assert set(env) <= SETTINGS
    settings = load(env=variables("deploy/Dockerfile") | env, flags={})
    assert settings.accounts.database_url.reveal() == "postgresql://postgres:quiver@postgres:5432/quiver"
    assert seconds(server["stop_grace_period"]) > LONGEST_STOP
    assert server["ports"][0].endswith(f":{settings.server.port}")


def test_composed_services_are_this_machines_alone():
    """No port is published to others, and what is waited for or mounted is there."""
    services = compose()["services"]
    stores = yaml.safe_load(read("deploy/compose.yaml"))["services"]
    assert set(services["quiver"]["depends_on"]) == set(stores)
    for service in (*services.values(), *stores.values()):
        assert all(port.startswith("127.0.0.1:") for port in service.get("ports", ()))
    named = {v.partition(":")[0] for s in services.values() for v in s["volumes"] if v[0] != "."}
    assert named == set(compose()["volumes"])


def test_prometheus_asks_the_server_for_its_metrics():
    """Its job names the composed server's name, port and route, and its rules lie beside it where they are mounted."""
    settings = yaml.safe_load(read("deploy/prometheus/prometheus.yaml"))
    (job,) = settings["scrape_configs"]
    assert job["metrics_path"] in PATHS
    assert job["static_configs"] == [{"targets": [f"quiver:{Config().server.port}"]}]
    prometheus = compose()["services"]["prometheus"]
    assert "--config.file=/etc/prometheus/prometheus.yaml" in prometheus["command"]
    assert "./prometheus:/etc/prometheus:ro" in prometheus["volumes"]
    assert settings["rule_files"] == ["alerts.yaml"]


def test_grafana_finds_prometheus_and_the_dashboard():
    """What is provisioned names the composed services, and folders that are mounted."""
    folder = "deploy/grafana/provisioning"
    (source,) = yaml.safe_load(read(f"{folder}/datasources/prometheus.yaml"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (provider,) = yaml.safe_load(read(f"{folder}/dashboards/quiver.yaml"))["providers"]
    mounts = [volume.split(":")[1] for volume in compose()["services"]["grafana"]["volumes"]]
    assert f"{provider['options']['path']}/quiver.json" in mounts


# systemd


class Repeated(dict[str, Any]):
    """Values of one key that stands several times, one a line."""

    def __setitem__(self, key: str, value: Any) -> None:
        if key in self and isinstance(value, list):
            value = [*self[key], *value] if isinstance(self[key], list) else value
        super().__setitem__(key, value)


def unit() -> dict[str, list[str]]:
    """Read the section [Service] of the unit."""
    parser = configparser.RawConfigParser(strict=False, dict_type=Repeated, interpolation=None)
    parser.optionxform = str  # type: ignore[method-assign,assignment]
    parser.read_string(read("deploy/quiver.service"))
    return {key: value.splitlines() for key, value in parser["Service"].items()}


def environment_of(service: dict[str, list[str]]) -> Iterator[tuple[str, str]]:
    """Yield the variables that a unit sets."""
    for line in service["Environment"]:
        name, _, value = line.partition("=")
        yield name, value


def test_the_unit_fits_the_server():
    """Its variables are settings, its times are the server's, and what a restart cannot mend is not restarted."""
    service = unit()
    env = dict(environment_of(service))
    assert set(env) == {"HOME", "QUIVER_DATA_DIR", "QUIVER_SOCKET_DIR"}
    assert set(env) <= SETTINGS | NOT_OURS
    assert float(service["TimeoutStopSec"][0]) > LONGEST_STOP
    assert service["RestartPreventExitStatus"] == [str(app.exit_code(ConfigError("a mistake")))]
    assert service["Restart"] == ["on-failure"]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
def test_systemd_takes_the_unit(tmp_path):
    """No line of it is unknown or wrong; one that is would be said."""
    text = read("deploy/quiver.service").replace("/opt/quiver/bin/quiver", "/bin/true")
    assert complaints(tmp_path, text) == ""
    assert "PrivateTemp" in complaints(tmp_path, text.replace("PrivateTmp", "PrivateTemp"))


def complaints(folder: Path, text: str) -> str:
    """Return what systemd says of a unit."""
    file = folder / "quiver.service"
    file.write_text(text, encoding="utf-8")
    command = ["systemd-analyze", "verify", "--man=no", str(file)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603
    return "".join(line for line in done.stderr.splitlines(keepends=True) if "quiver.service" in line)
