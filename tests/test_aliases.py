"""What other systems call a setting, its values and its flags."""

import os

import pytest
import typer
from typer.testing import CliRunner

from quiver import config
from quiver.cli_settings import Command, with_settings
from quiver.config import FIELDS, Config
from quiver.errors import ConfigError
from test_config import load, sample, value_of


def test_a_name_may_count_in_another_unit():
    """Milliseconds of theirs are seconds of ours, and what is no number is refused under its own name."""
    assert load(env={"INFERENCE_QUEUE_TIMEOUT_MS": "2500"}).server.queue_seconds == 2.5
    with pytest.raises(ConfigError, match="environment INFERENCE_QUEUE_TIMEOUT_MS = 'soon'"):
        load(env={"INFERENCE_QUEUE_TIMEOUT_MS": "soon"})


@pytest.mark.parametrize(("word", "value"), [("true", "json"), ("1", "json"), ("Yes", "json"), ("false", "auto")])
def test_a_name_may_be_a_switch_that_stands_for_a_value(word, value):
    """Switched on it is that value, switched off it says nothing."""
    assert load(env={"JSON_OUTPUT": word}).server.log_format == value
    assert load(env={"JSON_OUTPUT": word, "LOG_FORMAT": "pretty"}).server.log_format == "text"


def test_a_switch_is_on_or_off():
    """Another word is refused, with the name that it stands under."""
    with pytest.raises(ConfigError, match="JSON_OUTPUT = 'maybe' is neither true nor false"):
        load(env={"JSON_OUTPUT": "maybe"})


def test_two_names_may_be_parts_of_one_list():
    """What stands under both is served, in the order of the names; either may be missing."""
    both = {"INFERENCE_ALLOWED_EMBEDDING_MODELS": "a/b,c/d", "INFERENCE_ALLOWED_RERANK_MODELS": "e/f"}
    assert load(env=both).models.model == ("a/b", "c/d", "e/f")
    assert load(env={"INFERENCE_ALLOWED_RERANK_MODELS": "e/f"}).models.model == ("e/f",)
    with pytest.raises(ConfigError, match="INFERENCE_ALLOWED_EMBEDDING_MODELS and INFERENCE_ALLOWED_RERANK_MODELS"):
        load(env=dict.fromkeys(both, ","))


def test_a_star_among_the_models_lets_any_be_asked_for(tmp_path):
    """It adds the catalogue to what may be loaded on first use, and leaves the list to who names models."""
    (tmp_path / "quiver.toml").write_text("[models]\nmodel = 'a/b'\n")
    starred = load(env={"INFERENCE_ALLOWED_EMBEDDING_MODELS": "*"}, file=tmp_path / "quiver.toml")
    assert (starred.models.model, starred.models.allow_models) == (("a/b",), ("*",))
    some = load(flags={"model": ["c/d", "*"]}, env={"QUIVER_ALLOW_MODELS": "e/f"})
    assert (some.models.model, some.models.allow_models) == (("c/d",), ("*",))
    assert load(env={"QUIVER_MODEL": "*"}).models.model == Config().models.model


@pytest.mark.parametrize(
    ("env", "setting", "value"),
    [
        ({"BACKEND": "optimum"}, "backend", ("onnx",)),
        ({"INFINITY_ENGINE": "ctranslate2;torch"}, "backend", ("ct2", "torch")),
        ({"DTYPES": "fp16;auto"}, "dtype", ("float16", "auto")),
        ({"DTYPE": "FLOAT16"}, "dtype", ("float16",)),
        ({"POOLING": "last-token"}, "pooling", ("last_token",)),
        ({"LOG_FORMAT": "pretty"}, "log_format", "text"),
        ({"LOG_LEVEL": "WARN"}, "log_level", "warning"),
        ({"AUTO_TRUNCATE": "yes"}, "truncate", True),
        ({"AUTO_TRUNCATE": "False"}, "truncate", False),
    ],
)
def test_the_values_of_other_systems_are_known(env, setting, value):
    """What they call a backend, an arithmetic or a level is ours, in any case of letters."""
    models = {"MODEL_ID": "a/b;c/d"} if isinstance(value, tuple) and len(value) > 1 else {}
    assert value_of(load(env=env | models), FIELDS[setting]) == value


OTHER_FLAGS = [
    pytest.param(field, alias, name, id=name)
    for field in FIELDS.values()
    for alias in field.aliases
    if alias.is_flag
    for name in alias.names
]


@pytest.fixture(scope="module")
def settings_of():
    """Return what reads a command line as `quiver serve` does, and gives its settings back."""
    app, seen = typer.Typer(), []

    @app.command(cls=Command)
    @with_settings()
    def show(*, settings):
        seen.append(settings)

    def settings_of(*words):
        done = CliRunner(env=dict.fromkeys(os.environ, "") | {"COLUMNS": "500"}).invoke(app, words)
        if done.exception:
            raise done.exception
        return seen.pop()

    return settings_of


@pytest.mark.parametrize(("field", "alias", "name"), OTHER_FLAGS)
def test_the_flags_of_other_systems_work(settings_of, field, alias, name):
    """Each is understood with its value behind a space or an equals sign; a switch also alone."""
    text, value = (
        ("true", (alias.stands_for,) if field.is_list else alias.stands_for) if alias.stands_for else sample(field)
    )
    if not (field.is_list and len(value) > 1):  # on the command line, a list is a flag that is repeated
        assert value_of(settings_of(name, text), field) == value
        assert value_of(settings_of(f"{name}={text}"), field) == value
    if field.is_switch or alias.stands_for:
        assert value_of(settings_of(name), field) == value
        assert value_of(settings_of(name, "--port", "7"), field) == value
        assert value_of(settings_of(name, "false"), field) == value_of(Config(), field)


def test_a_flag_of_another_system_may_be_repeated(settings_of):
    """Its values are one list with those of our own flag, in order."""
    models = settings_of("--model-id", "a/b", "--model", "c/d", "--model-id=e/f").models.model
    assert models == ("a/b", "c/d", "e/f")


@pytest.mark.parametrize(
    ("words", "ours"),
    [
        (["--model-id", "--port"], ["--model=--port"]),
        (["--hf-token", "", "--port", "1"], ["--hub-token=", "--port", "1"]),
        (["--model-id"], ["--model"]),
        (["--auto-truncate", "false"], ["--no-truncate"]),
        (["--auto-truncate", "text"], ["--truncate", "text"]),
        (["--json-output=false", "-"], ["-"]),
        (["a", "--", "--model-id", "b"], ["a", "--", "--model-id", "b"]),
        (["--model", "a", "--frob=b"], ["--model", "a", "--frob=b"]),
    ],
)
def test_only_what_is_theirs_is_put_into_our_words(words, ours):
    """A value is never taken for a flag, an empty one stays one, and everything else is left as it is."""
    assert config.in_our_words(words) == ours
