"""Where settings come from, which source wins, and what is refused."""

import dataclasses
import itertools
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from quiver import config
from quiver.config import FIELDS, PRESETS, Config, Secret
from quiver.errors import ConfigError

HUNTER = "hunter-zwei"
DEFAULT_PORT = 8000
SAMPLES = {int: ("7", 7), float: ("2.5", 2.5), Secret: (HUNTER, HUNTER)}
"""A text of each type, and its value; other types get what stands in `sample`."""


def sample(field):
    """Return a text that differs from a field's default, and the value it stands for."""
    special = {
        "model": ("a/b, c/d", ("a/b", "c/d")),
        "cors_origins": ("https://a.example", ("https://a.example",)),
        "host": ("0.0.0.0", "0.0.0.0"),  # noqa: S104  nothing listens here
        "hub_endpoint": ("https://hub.example", "https://hub.example"),
        "log_level": ("debug", "debug"),
        "log_format": ("json", "json"),
        "backend": ("onnx", ("onnx",)),
        "root_dialects": ("tei", ("tei",)),
        "metrics_families": ("tei", ("tei",)),
        "ray_address": ("auto", "auto"),
        "ray_object_store_bytes": ("300000000", 300_000_000),
        "ray_min_replicas": ("2, 3", (2, 3)),
        "ray_max_replicas": ("7, 8", (7, 8)),
        "ray_cpus": ("0.5, 8", (0.5, 8.0)),
        "ray_gpus": ("0, 1", (0.0, 1.0)),
        "dtype": ("int8", ("int8",)),
        "onnx_file": ("onnx/model.onnx", ("onnx/model.onnx",)),
        "default_prompt_name": ("query", ("query",)),
        "default_prompt": ("query: ", "query: "),
        "allow_models": ("*", ("*",)),
        "exclude_models": ("*-zh-*, *q8*", ("*-zh-*", "*q8*")),
        "url_prefix": ("/v1", "/v1"),
        "served_model_name": ("mine", ("mine",)),
        "revision": ("v1.5", ("v1.5",)),
        "pooling": ("cls", ("cls",)),
        "batch_inputs": ("32", (32,)),
        "openai_ids": ("refuse", "refuse"),
        "tls": ("on", "on"),
        "socket_dir": ("run/hero_embedder_provider", Path("run/hero_embedder_provider")),
        "otlp_endpoint": ("http://localhost:4317", "http://localhost:4317"),
        "otlp_service_name": ("mine", "mine"),
        "otlp_sample_ratio": ("0.5", 0.5),
        "cache_scope": ("shared", "shared"),
        "auth": ("required", "required"),
        "key_prefix": ("fe", "fe"),
        "redis_prefix": ("mine:", "mine:"),
    }
    if field.name in special:
        return special[field.name]
    if field.name in {"data_dir", "hub_cache", "cl100k_file", "tls_cert", "tls_key", "tls_client_ca"}:
        return "somewhere", Path("somewhere")
    if field.type is bool:
        return ("false", False) if field.default else ("true", True)
    return SAMPLES[field.type]


def in_its_words(alias, text):
    """Return what stands under another system's name to mean the same."""
    if alias.unit == "ms":
        return str(1000 * float(text))
    return text.removesuffix(f"/{alias.below}") if alias.below else text


def value_of(settings, field):
    """Return a field's value in the tree."""
    return getattr(getattr(settings, field.section), field.name)


def load(env=None, flags=None, **sources):
    """Load from the given sources alone."""
    return config.load(env=env or {}, flags=flags or {}, **sources)


@pytest.fixture
def write(tmp_path):
    """Write a settings file, or several presets beside each other."""

    def write(text, name="quiver.toml"):
        path = tmp_path / name
        path.write_text(text, encoding="utf-8")
        return path

    return write


# Order


SOURCES = ("preset", "file", "env", "flags")
"""Weakest first."""


@given(st.sets(st.sampled_from(SOURCES)), st.permutations(range(1, 5)))
def test_the_strongest_source_that_sets_a_field_wins(tmp_path_factory, chosen, ports):
    """Defaults < preset < file < environment < flags, whichever of them speak."""
    folder = tmp_path_factory.mktemp("sources")
    given_ports = {source: port for source, port in zip(SOURCES, ports, strict=True) if source in chosen}
    for source in ("preset", "file"):
        text = f"[server]\nport = {given_ports[source]}\n" if source in chosen else ""
        (folder / f"{source}.toml").write_text(text, encoding="utf-8")
    settings = load(
        preset="preset",
        presets=folder,
        file=folder / "file.toml",
        env={"QUIVER_PORT": str(given_ports["env"])} if "env" in chosen else {},
        flags={"port": given_ports.get("flags")},
    )
    strongest = next((given_ports[source] for source in reversed(SOURCES) if source in chosen), DEFAULT_PORT)
    assert settings.server.port == strongest


def test_sources_are_merged_field_by_field(write):
    """A source that is stronger hides only the fields that it sets itself."""
    write("[server]\nport = 1\nhost = '::1'\n[engine]\nlanes = 3\n", "p.toml")
    settings = load(
        preset="p",
        presets=write("").parent,
        file=write("[server]\nport = 2\n"),
        env={"QUIVER_LANES": "4"},
        flags={"dtype": "int8"},
    )
    assert (settings.server.port, settings.server.host) == (2, "::1")
    assert (settings.engine.lanes, settings.models.dtype) == (4, ("int8",))


def test_nothing_given_is_the_defaults():
    """No source at all, flags that were not given and empty variables leave every default."""
    nothing = {"QUIVER_PORT": "", "HF_TOKEN": ""}
    assert load() == load(env=nothing, flags={"port": None, "model": []}) == Config()


def test_the_environment_may_choose_preset_and_file(write):
    """QUIVER_PRESET and QUIVER_CONFIG name a source; a flag for the same source is stronger."""
    file, other = write("[server]\nport = 5\n"), write("[server]\nport = 6\n", "other.toml")
    env = {"QUIVER_PRESET": "small", "QUIVER_CONFIG": str(file)}
    settings = load(env=env)
    assert (settings.server.port, settings.models.dtype) == (5, ("int8",))
    assert load(env=env, file=other).server.port == 6


# Names


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_a_field_is_set_by_each_of_its_names(field, write):
    """The file, every name in the environment, and the flag all give the same value."""
    text, value = sample(field)
    assert value_of(Config(), field) != value
    for alias in field.env:
        for name in () if alias.stands_for else alias.names:
            assert value_of(load(env={name: in_its_words(alias, text)}), field) == value
    assert value_of(load(flags={field.name: text}), field) == value
    assert value_of(load(file=write(f"[{field.section}]\n{field.name} = '{text}'\n")), field) == value


@pytest.mark.parametrize("field", [f for f in FIELDS.values() if len(f.env) > 1], ids=lambda field: field.name)
def test_our_own_name_is_stronger_than_an_alias(field):
    """Of several names in the environment the first one listed counts: the `QUIVER_…` one."""
    ours, *others = field.env_names
    assert ours.startswith("QUIVER_")
    text, value = sample(field)
    assert value_of(load(env={**dict.fromkeys(others, "never read"), ours: text}), field) == value


def test_names_are_unique():
    """A name in the environment or on the command line belongs to one field, and none hides `--config` or `--preset`."""
    names = list(itertools.chain(*(field.env_names for field in FIELDS.values()), config.RESERVED_ENV))
    flags = list(itertools.chain(*((*field.flags, *field.other_flags) for field in FIELDS.values())))
    flags += ["--config", "--preset", "--json", "--help"]
    assert len(set(names)) == len(names)
    assert len(set(flags)) == len(flags)
    parts = [getattr(Config(), part.name) for part in dataclasses.fields(Config)]
    assert sum(len(dataclasses.fields(part)) for part in parts) == len(FIELDS)


@pytest.mark.parametrize("field", FIELDS.values(), ids=FIELDS)
def test_a_field_explains_itself(field):
    """Each field's help is a text of one line that ends in a full stop."""
    assert field.help.endswith(".")
    assert field.help[0].isupper()
    assert "\n" not in field.help


@pytest.mark.parametrize("name", ["web-7f9c", "quiver", "1.2.3", "300.1.1.1"])
def test_a_hostname_that_is_no_address_is_not_ours(name):
    """Containers set HOSTNAME to their own name, which is nothing to listen on."""
    assert load(env={"HOSTNAME": name}).server.host == "127.0.0.1"


@pytest.mark.parametrize("address", ["0.0.0.0", "::", "10.1.2.3", "localhost"])  # noqa: S104  nothing listens here
def test_a_hostname_that_is_an_address_counts(address):
    """Whoever sets HOSTNAME to an address wants the server to listen there, unless HOST says otherwise."""
    assert load(env={"HOSTNAME": address}).server.host == address
    assert load(env={"HOSTNAME": address, "HOST": "127.0.0.9"}).server.host == "127.0.0.9"


@pytest.mark.parametrize("text", ["a/b,c/d", "a/b;c/d", " a/b ; c/d, ", "a/b,,c/d"])
def test_lists_are_parted_by_comma_or_semicolon(text, write):
    """The environment, a flag and a file may write a list as one text; a file may also write a list."""
    models = ("a/b", "c/d")
    assert load(env={"MODEL_ID": text}).models.model == models
    assert load(flags={"model": list(models)}).models.model == models
    assert load(file=write(f"[models]\nmodel = '{text}'\n")).models.model == models
    assert load(file=write("[models]\nmodel = ['a/b', 'c/d']\n")).models.model == models


# Refusals


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[server]\nprot = 1\n", ["[server]", "'prot'", "'port'"]),
        ("[sever]\nport = 1\n", ["[sever]", "'server'"]),
        ("[engine]\nport = 1\n", ["[engine]", "'port'"]),
        ("port = 1\n", ["[port]"]),
        ("[server]\nport = 'x'\n", ["[server] port", "'x'", "int"]),
        ("[server]\nport = 70_000\n", ["[server] port", "70000", "65535"]),
        ("[server]\nport = 1.5\n", ["[server] port", "1.5"]),
        ("[server]\nhost = 7\n", ["[server] host", "7"]),
        ("[models]\nmodel = []\n", ["[models] model", "at least one"]),
        ("[models]\ndtype = 'int4'\n", ["[models] dtype", "int4", "it takes auto, float32"]),
        ("[models]\nbatch_inputs = 0\n", ["[models] batch_inputs", "more than 0"]),
        ("[server]\nurl_prefix = 'v1'\n", ["[server] url_prefix", "'v1'", "/v1"]),
        ("[models]\ndata_dir = 7\n", ["[models] data_dir", "text"]),
        ("[engine]\ntruncate = 'maybe'\n", ["[engine] truncate", "maybe"]),
        ("[engine\n", ["not TOML"]),
    ],
)
def test_a_wrong_file_is_refused_by_name(text, words, write):
    """Unknown keys and sections, wrong types and ranges, in one line: the file, the key, and what would be right."""
    path = write(text)
    with pytest.raises(ConfigError) as refusal:
        load(file=path)
    for word in [str(path), *words]:
        assert word in refusal.value.message
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"QUIVER_PROT": "1"}, ["QUIVER_PROT", "'QUIVER_PORT'"]),
        ({"QUIVER_XYZZY": "1"}, ["QUIVER_XYZZY"]),
        ({"PORT": "eighty"}, ["environment PORT", "eighty"]),
        ({"QUIVER_PORT": "-1"}, ["environment QUIVER_PORT", "-1", "65535"]),
        ({"MAX_CLIENT_BATCH_SIZE": "0"}, ["environment MAX_CLIENT_BATCH_SIZE", "more than 0"]),
        ({"MODEL_ID": " , "}, ["environment MODEL_ID", "at least one"]),
        ({"QUIVER_TIMEOUT_SECONDS": "nan"}, ["environment QUIVER_TIMEOUT_SECONDS", "nan"]),
        ({"OTLP_ENDPOINT": "grpc://a b"}, ["environment OTLP_ENDPOINT", "'grpc://a b'", "http://localhost:4317"]),
        ({"OTEL_SAMPLE_RATIO": "1.5"}, ["environment OTEL_SAMPLE_RATIO", "1.5", "0 to 1"]),
        ({"OTEL_SAMPLE_RATIO": "nan"}, ["environment OTEL_SAMPLE_RATIO", "nan"]),
        ({"QUIVER_PRESET": "smal"}, ["'smal'", "'small'"]),
        ({"QUIVER_CONFIG": "nowhere.toml"}, ["nowhere.toml", "No such file"]),
    ],
)
def test_a_wrong_environment_is_refused_by_name(env, words):
    """The error names the variable as it was set, and the nearest that exists."""
    with pytest.raises(ConfigError) as refusal:
        load(env=env)
    for word in words:
        assert word in refusal.value.message


@pytest.mark.parametrize("name", ["lanes", "batch_tokens", "drain_seconds"])
def test_a_wrong_flag_is_refused_by_name(name):
    """The error names the flag as it is typed."""
    with pytest.raises(ConfigError, match=f"^{FIELDS[name].flag} = '-1' is out of range: it takes 0 or more"):
        load(flags={name: "-1"})


def test_other_peoples_variables_are_none_of_ours():
    """Only what starts with QUIVER_ must be a name of ours."""
    assert load(env={"PATH": "/bin", "QUIVE_PORT": "1", "quiver_port": "1"}) == Config()


# Secrets


def test_a_secret_never_prints():
    """Every way of turning it into text gives asterisks; only `reveal` gives the text itself."""
    secret = Secret(HUNTER)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret:>20}", f"{secret!r}", format(secret), "%s" % secret]  # noqa: UP031
    assert not any(HUNTER in text for text in shown)
    assert all("***" in text for text in shown)
    assert secret.reveal() == HUNTER
    assert type(secret.reveal()) is str
    assert str(Secret("")) == ""


@pytest.mark.parametrize("field", [f for f in FIELDS.values() if f.type is Secret], ids=lambda field: field.name)
def test_a_tree_never_prints_its_secrets(field):
    """Neither the tree's own text nor the printable form shows one; that it is set may be seen."""
    settings = load(env={field.env_names[0]: HUNTER})
    assert value_of(settings, field).reveal() == HUNTER
    described = config.describe(settings)
    for text in (repr(settings), str(settings), repr(described), repr(dataclasses.asdict(settings))):
        assert HUNTER not in text
    assert described[field.section][field.name] == "***"


@pytest.mark.parametrize("field", [f for f in FIELDS.values() if f.type is Secret], ids=lambda field: field.name)
def test_an_error_never_prints_a_secret(field, write):
    """A secret of a wrong type is refused without being shown, also in the errors behind the error."""
    with pytest.raises(ConfigError) as refusal:
        load(file=write(f"[{field.section}]\n{field.name} = ['{HUNTER}']\n"))
    error = refusal.value
    while error:
        assert HUNTER not in f"{error} {error!r}"
        error = error.__cause__ or error.__context__


def test_the_printable_form_is_complete():
    """`describe` shows every field, as plain values."""
    described = config.describe(load(env={"QUIVER_MODEL": "a/b"}))
    assert {name for part in described.values() for name in part} == set(FIELDS)
    assert described["models"]["model"] == ["a/b"]
    assert described["server"]["port"] == DEFAULT_PORT


# Presets


@pytest.mark.parametrize("preset", sorted(path.stem for path in PRESETS.glob("*.toml")))
def test_a_shipped_preset_loads_and_changes_something(preset):
    """Each file in presets/ is valid, and is not just the defaults under another name."""
    assert load(preset=preset) != Config()
