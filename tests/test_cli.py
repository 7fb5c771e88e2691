"""The command `quiver`, as a person types it."""

import asyncio
import json
import re

import numpy as np
import pytest
from typer.testing import CliRunner

import checkpoints
from quiver import __version__, app
from quiver.cli import CLUSTER, LINES_PER_REQUEST, ONE_SHOT, cli
from quiver.config import DEFAULT_MODEL, FIELDS, Config, ModelsConfig
from quiver.models.catalogue import Catalogue
from quiver.types import Caller, EmbedRequest
from server_process import run

COMMANDS = {
    "serve": set(FIELDS),
    "embed": {*ONE_SHOT, *CLUSTER, "api_key"},
    "rerank": set(ONE_SHOT),
    "bench": {"model", "dtype", "lanes", "batch_tokens", "api_key"},
    "models": {"data_dir", "hub_cache"},
}
"""The settings that each command takes."""

EX_CONFIG = 78


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """Return the directory of a tiny random model."""
    return checkpoints.make(tmp_path_factory.mktemp("models") / "tiny", "bert")


def type_in(*words):
    """Run a command in this process, on a terminal that is wide enough for every table."""
    return CliRunner(env={"COLUMNS": "500", "NO_COLOR": "1"}).invoke(cli, words)


def embed_directly(model, texts):
    """Return the vectors of an engine without any command around it."""

    async def work():
        engine = app.build(Config(models=ModelsConfig(model=(str(model),)))).engine
        async with engine:
            await engine.load(lambda *_: None)
            return (await engine.embed(EmbedRequest(inputs=texts), Caller("test"))).vectors

    return asyncio.run(work())


def parse(stdout):
    """Read one JSON object a line."""
    return [json.loads(line) for line in stdout.splitlines()]


def test_version():
    """`--version` prints the name and the version, and nothing else."""
    done = type_in("--version")
    assert (done.exit_code, done.stdout) == (0, f"quiver {__version__}\n")


@pytest.mark.parametrize("command", COMMANDS)
def test_help_lists_each_setting_once(command):
    """`--help` shows each setting that the command takes once, with its help, its name in the environment and its default."""
    done = type_in(command, "--help")
    assert done.exit_code == 0
    text = " ".join(done.stdout.split())
    for field in FIELDS.values():
        taken = int(field.name in COMMANDS[command])
        assert len(re.findall(rf"\[{field.env_names[0]}; (?:default: |not set)", text)) == taken
        assert len(re.findall(rf"(?<![\w-]){field.flag}(?![\w-])", text)) == taken or field.name == "model"
        assert text.count(f" {field.help} [") == taken
    assert text.count("QUIVER_CONFIG") == 1


def test_help_lists_the_commands():
    """`--help` names each command; no word at all shows the same."""
    for words in (["--help"], []):
        text = type_in(*words).output
        assert all(re.search(rf"\b{command}\b", text) for command in COMMANDS)


@pytest.mark.parametrize("words", [["frobnicate"], ["serve", "--frob"], ["serve", "extra"], ["embed"], ["--frob"]])
def test_what_is_not_a_command_exits_with_2(words):
    """An unknown command or flag, one argument too many or too few: usage on standard error, nothing on output."""
    done = type_in(*words)
    assert done.exit_code == 2
    assert "Usage: " in done.stderr
    assert done.stdout == ""


@pytest.mark.parametrize(
    ("words", "env", "wanted"),
    [
        (["serve", "--port", "x"], {}, "--port = 'x'"),
        (["serve", "--config", "nowhere.toml"], {}, "cannot read nowhere.toml"),
        (["serve", "--preset", "smal"], {}, "'small'"),
        (["serve"], {"QUIVER_PROT": "1"}, "'QUIVER_PORT'"),
        (["embed", "--dtype", "int4", "a"], {}, "--dtype = 'int4'"),
        (["embed", "--model", "nonsense", "a"], {}, "'nonsense' is no model"),
        (["bench", "--lanes", "-1"], {}, "--lanes = '-1'"),
    ],
)
def test_a_wrong_setting_is_one_line(words, env, wanted):
    """It is said in one line on standard error, without a traceback, and the exit code is EX_CONFIG."""
    done = run(*words, **env)
    assert done.returncode == EX_CONFIG
    assert done.stdout == ""
    assert re.fullmatch(r"quiver: [^\n]+\n", done.stderr), done.stderr
    assert wanted in done.stderr


def test_a_secret_on_the_command_line_is_not_repeated():
    """An error about another setting shows no secret, and neither does --help."""
    done = run("serve", "--api-key", "hunter-zwei", "--port", "x", HF_TOKEN="hunter-drei")  # noqa: S106  not one
    assert "hunter" not in done.stderr + done.stdout
    assert "hunter" not in run("serve", "--help", QUIVER_API_KEY="hunter-zwei").stdout


def test_embed_prints_the_engines_vectors(tiny):
    """Texts given as arguments come back in order, one JSON object a line, with the engine's vectors bit for bit."""
    texts = ["a cat", "a dog on the mat", "çà et là", "猫", "a cat"]
    done = run("embed", *texts, "--model", str(tiny))
    assert (done.returncode, done.stderr) == (0, "")
    lines = parse(done.stdout)
    assert [line["text"] for line in lines] == texts
    np.testing.assert_array_equal(np.float32([line["embedding"] for line in lines]), embed_directly(tiny, texts))


def test_embed_reads_lines(tiny):
    """`-` reads one text a line: empty ones too, over the limit of one request, the last one without its newline."""
    texts = [f"line {i}" if i % 7 else "" for i in range(LINES_PER_REQUEST + 9)]
    assert texts[-1]
    done = run("embed", "-", "--model", str(tiny), stdin="\n".join(texts))
    assert done.returncode == 0
    lines = parse(done.stdout)
    assert [line["text"] for line in lines] == texts
    np.testing.assert_array_equal(np.float32([line["embedding"] for line in lines]), embed_directly(tiny, texts))


def test_embed_of_nothing_prints_nothing(tiny):
    """An empty standard input is no text at all."""
    done = run("embed", "-", "--model", str(tiny))
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_embed_takes_its_settings_from_everywhere(tiny):
    """The environment's model is used, and a flag is stronger."""
    over_long = "word " * 600
    refused = run("embed", over_long, MODEL_ID=str(tiny))
    assert refused.returncode != 0
    assert re.fullmatch(r"quiver: input 0 has \d+ tokens, [^\n]+\n", refused.stderr), refused.stderr
    assert run("embed", over_long, "--truncate", MODEL_ID=str(tiny)).returncode == 0
    assert run("embed", over_long, "--no-truncate", MODEL_ID=str(tiny), AUTO_TRUNCATE="true").returncode != 0


def test_models_lists_the_catalogue():
    """The table shows each model of the catalogue with its aliases."""
    done = type_in("models")
    assert done.exit_code == 0
    for spec in Catalogue.load():
        assert spec.id in done.stdout
        assert str(spec.dimensions) in done.stdout


def test_models_as_json():
    """`models --json` gives the catalogue's numbers, one object a line, in its order."""
    specs = list(Catalogue.load())
    lines = parse(type_in("models", "--json").stdout)
    assert [line["id"] for line in lines] == [spec.id for spec in specs]
    for line, spec in zip(lines, specs, strict=True):
        assert (line["dimensions"], line["max_tokens"]) == (spec.dimensions, spec.max_tokens)
        assert (line["licence"], tuple(line["aliases"])) == (spec.licence, spec.aliases)
    assert next(line["here"] for line in lines if line["id"] == DEFAULT_MODEL)


def test_rerank_prints_the_best_first(tiny):
    """Each document comes with its place in the input and its score, the highest first; --top-n keeps only the best."""
    documents = ["a dog", "the cat sat on the mat", "çà et là"]
    done = run("rerank", "a dog", *documents, "--model", str(tiny))
    assert (done.returncode, done.stderr) == (0, "")
    lines = parse(done.stdout)
    assert [documents[line["index"]] for line in lines] == [line["text"] for line in lines]
    scores = [line["score"] for line in lines]
    assert lines[0]["text"] == "a dog"
    assert scores == sorted(scores, reverse=True)
    best = run("rerank", "a dog", "-", "--top-n", "1", "--model", str(tiny), stdin="\n".join(documents))
    assert parse(best.stdout) == lines[:1]
