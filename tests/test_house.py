"""The architecture's rules, held by reading the source; each one is shown a sample that breaks it."""

import ast
import itertools
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import pytest

from quiver import errors
from quiver.api.call import STATUSES, status_of
from quiver.errors import EngineError, QuiverError, Refused, SetupError, Unavailable
from quiver.graphs import ARCHITECTURES

ROOT = Path(__file__).parent.parent
SRC = ROOT / "src"
TESTS = ROOT / "tests"

LAYERS = (
    ("quiver.__main__",),
    ("quiver.cli",),
    ("quiver.cli_accounts", "quiver.cli_jobs", "quiver.cli_processes", "quiver.cli_scale"),
    ("quiver.cli_database",),
    ("quiver.cli_settings", "quiver.cli_values"),
    ("quiver.scale",),
    ("quiver.bulk",),
    ("quiver.bench", "quiver.progress"),
    ("quiver.app", "quiver.supervisor"),
    ("quiver.entrances",),
    ("quiver.stores", "quiver.member", "quiver.seat"),
    ("quiver.api.server", "quiver.api.openapi", "quiver.api.health", "quiver.api.usage", "quiver.admin"),
    ("quiver.api.http",),
    ("quiver.api.connection", "quiver.api.listeners", "quiver.api.tls"),
    ("quiver.api.edge",),
    ("quiver.api.dispatch", "quiver.api.root"),
    ("quiver.api.router", "quiver.api.replies"),
    ("quiver.api",),  # every other file in api/ is a dialect
    ("quiver.api.openai_batches", "quiver.api.runpod_wire"),
    ("quiver.api.openai_files", "quiver.api.batch_lines", "quiver.api.runpod_worker", "quiver.api.openrpc"),
    ("quiver.api.forms",),
    (
        "quiver.api.vectors",
        "quiver.api.documents",
        "quiver.api.rate_headers",
        "quiver.api.tei_wire",
        "quiver.api.jsonrpc",
    ),
    ("quiver.api.call", "quiver.api.secure", "quiver.api.joined"),
    ("quiver.service", "quiver.admission"),
    ("quiver.gate", "quiver.billing", "quiver.jobs", "quiver.engine.engine"),
    ("quiver.job_keeper", "quiver.register"),
    ("quiver.job_runner",),
    ("quiver.keyring", "quiver.metering", "quiver.limits", "quiver.sync_jobs", "quiver.webhook"),
    ("quiver.engine.ranking", "quiver.engine.verbs"),
    ("quiver.engine.runner",),
    ("quiver.engine.replicas", "quiver.engine.probe", "quiver.engine.encoders"),
    ("quiver.engine.statuses",),
    ("quiver.engine.model",),
    ("quiver.engine.scheduler", "quiver.engine.tokenizer", "quiver.engine.outputs", "quiver.engine.openai_ids"),
    ("quiver.engine.cache", "quiver.engine.attempts", "quiver.engine.watchdog", "quiver.engine.threads"),
    ("quiver.engine.waiting", "quiver.engine.pooling", "quiver.engine.prompts", "quiver.engine.scoring"),
    ("quiver.engine.packing", "quiver.engine.phases", "quiver.engine.backlog", "quiver.engine.turns"),
    ("quiver.backends",),
    ("quiver.graphs", "quiver.models", "quiver.db", "quiver.siblings"),
    ("quiver.telemetry",),
    ("quiver.config",),
    ("quiver.spool", "quiver.job"),
    ("quiver.keys", "quiver.remote", "quiver.types"),
    ("quiver.accounts",),
    ("quiver.errors", "quiver.memory", "quiver.capacity", "quiver.place", "quiver.patience"),
    ("quiver.cgroups",),
    ("quiver.client",),  # stands alone
    ("quiver", "quiver.engine"),  # nothing but a docstring and the version
)
"""Imports only point down; a name stands for everything below it that is not named itself."""

ONE_THING = frozenset(
    {
        "quiver.admin",
        "quiver.bench",
        "quiver.bulk",
        "quiver.backends",
        "quiver.client",
        "quiver.config",
        "quiver.db",
        "quiver.graphs",
        "quiver.models",
        "quiver.scale",
        "quiver.telemetry",
    }
)
"""Packages whose own files may import each other; elsewhere, those of one layer may not."""

A_DIALECT_SEES = frozenset(
    {
        "quiver",  # its version
        "quiver.api.call",
        "quiver.api.documents",
        "quiver.api.openai_batches",
        "quiver.api.openai_files",
        "quiver.api.runpod_wire",
        "quiver.api.jsonrpc",
        "quiver.api.openrpc",
        "quiver.api.rate_headers",
        "quiver.api.runpod_worker",
        "quiver.api.tei_wire",
        "quiver.api.vectors",
        "quiver.service",
        "quiver.job",
        "quiver.sync_jobs",
        "quiver.webhook",
        "quiver.engine.outputs",
        "quiver.types",
        "quiver.capacity",
        "quiver.errors",
    }
)

READS_ENVIRONMENT = frozenset(
    {"quiver/cli_settings.py", "quiver/client/core.py", "quiver/scale/ray_serve.py", "quiver/scale/cluster.py"}
)
"""The command line, which hands it to the configuration; the client, and what `serve run` imports, which have no other;
and what hands Ray its own settings, which it takes from nowhere else."""

A_CLIENT_NEEDS = frozenset({"httpx", "numpy"})

ANYWHERE = ("",)
DOORS = {
    "alembic": ("quiver/db/",),
    "bcrypt": ("quiver/keys.py",),
    "ctranslate2": ("quiver/backends/ct2.py",),
    "httptools": (),
    "httpx": ("quiver/client/wire.py",),
    "huggingface_hub": ("quiver/models/hub.py",),
    "matplotlib": ("quiver/bench/plot.py",),
    "msgspec": ANYWHERE,
    "numpy": ANYWHERE,
    "onnx": ("quiver/backends/", "quiver/graphs/"),
    "onnxruntime": ("quiver/backends/",),
    "opentelemetry": ("quiver/telemetry/traces.py",),
    "orjson": ("quiver/api/", "quiver/bulk/sinks.py"),
    "platformdirs": ("quiver/config/",),
    "python_multipart": ("quiver/api/forms.py",),
    "prometheus_client": ("quiver/telemetry/",),
    "pyarrow": ("quiver/bulk/parquet.py", "quiver/scale/storage.py"),
    "rich": (
        "quiver/bench/",
        "quiver/bulk/display.py",
        "quiver/cli.py",
        "quiver/cli_values.py",
        "quiver/progress.py",
    ),
    "ray": ("quiver/scale/cluster.py", "quiver/scale/ray_data.py", "quiver/scale/ray_serve.py"),
    "redis": ("quiver/remote.py",),
    "safetensors": ("quiver/models/weights.py",),
    "sqlalchemy": ("quiver/db/",),
    "starlette": ("quiver/api/http.py", "quiver/scale/proxy.py"),
    "structlog": (
        "quiver/telemetry/",
        "quiver/api/dispatch.py",
        "quiver/app.py",
        "quiver/bulk/",
        "quiver/job_keeper.py",
        "quiver/job_runner.py",
        "quiver/jobs.py",
        "quiver/member.py",
        "quiver/metering.py",
        "quiver/progress.py",
        "quiver/register.py",
        "quiver/scale/",
        "quiver/supervisor.py",
        "quiver/sync_jobs.py",
    ),
    "torch": ("quiver/backends/pytorch/",),
    "transformers": ("quiver/backends/pytorch/",),
    "tokenizers": ("quiver/engine/tokenizer.py",),
    "typer": ("quiver/cli",),
    "uvicorn": ("quiver/api/server.py", "quiver/api/connection.py"),
    "uvloop": ("quiver/cli_settings.py", "quiver/bench/run.py"),
}
"""Where each package may be imported, as the beginning of a path; one that is not here has no door at all."""

MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 50
MUTATORS = frozenset(
    {"add", "append", "clear", "discard", "extend", "insert", "pop", "popitem", "remove", "setdefault", "update"}
)
UNFINISHED = re.compile(r"\b(?:TO[D]O|FIX[M]E|XX[X])\b")
MACHINE = re.compile(
    r"(?<![\w.~}])/(?:work|root|home/\w+|Users/\w+|tmp/\w+)/|pypi[.]org|python[h]osted|npm[j]s|arti[f]actory"
)
"""The brackets keep the patterns from finding themselves."""

Rule = Callable[[str, str], Iterable[str]]
"""(path below src or tests, source) -> what is wrong in it."""


# What the source says


def module_of(path: str) -> str:
    """Name the module of a path below src."""
    return path.removesuffix(".py").removesuffix("/__init__").replace("/", ".")


def imports_of(source: str) -> Iterator[str]:
    """Yield every imported name in full, wherever the import stands: `from a import b` is `a.b`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from (f"{'.' * node.level}{node.module or ''}.{alias.name}" for alias in node.names)


def entry_of(module: str) -> str:
    """Return the longest entry of LAYERS that stands for a module."""
    entries = [e for e in itertools.chain(*LAYERS) if module == e or module.startswith(e + ".")]
    return max(entries, key=len)


def depth_of(module: str) -> int:
    """Return how far down the list a module stands."""
    return next(i for i, layer in enumerate(LAYERS) if entry_of(module) in layer)


def functions_of(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    """Yield every function and method."""
    return (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef))


def calls_of(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Yield every call with the dotted name of what is called."""
    return ((ast.unparse(node.func), node) for node in ast.walk(tree) if isinstance(node, ast.Call))


def root_name(node: ast.AST) -> str:
    """Return `a` of `a.b[0].c`."""
    while isinstance(node, ast.Attribute | ast.Subscript):
        node = node.value
    return node.id if isinstance(node, ast.Name) else ""


# The rules


def points_up(path: str, source: str) -> Iterator[str]:
    """Find imports that do not point down the list."""
    module = module_of(path)
    for name in imports_of(source):
        if name.startswith("."):
            yield f"{name} is relative"
        elif name.split(".")[0] == "quiver":
            inside = entry_of(module) == entry_of(name) and entry_of(module) in ONE_THING
            if not inside and depth_of(name) <= depth_of(module):
                yield f"{module} imports {name}"


def sees_too_much(path: str, source: str) -> Iterator[str]:
    """Find what a dialect has no business with."""
    if entry_of(module_of(path)) != "quiver.api":
        return
    for name in imports_of(source):
        if name.startswith("quiver.") and entry_of(name) not in A_DIALECT_SEES:
            yield f"{path} imports {name}"


def wrong_door(path: str, source: str) -> Iterator[str]:
    """Find packages that are imported elsewhere than at their door."""
    for name in imports_of(source):
        package = name.split(".")[0]
        if package == "quiver" or package in sys.stdlib_module_names:
            continue
        if not path.startswith(DOORS.get(package, ())):
            yield f"{path} imports {package}"


def client_needs_more(path: str, source: str) -> Iterator[str]:
    """Find what the client imports beside itself, its two packages and the standard library."""
    if not path.startswith("quiver/client/"):
        return
    for name in imports_of(source):
        own = name == "quiver.__version__" or name.startswith("quiver.client")
        if not own and name.split(".")[0] not in sys.stdlib_module_names | A_CLIENT_NEEDS:
            yield f"{path} imports {name}"


def reads_environment(path: str, source: str) -> Iterator[str]:
    """Find readers of the environment beside those that may."""
    if path not in READS_ENVIRONMENT and re.search(r"\bos\.(?:environ|getenv)", source):
        yield f"{path} reads the environment"


def too_long(path: str, source: str) -> Iterator[str]:
    """Find files and functions that have outgrown their size."""
    if (lines := len(source.splitlines())) > MAX_FILE_LINES:
        yield f"{path} has {lines} lines"
    for function in functions_of(ast.parse(source)):
        if (lines := function.end_lineno - function.lineno + 1) > MAX_FUNCTION_LINES:
            yield f"{function.name} has {lines} lines"


def sleeps(path: str, source: str) -> Iterator[str]:
    """Find sleeps where one waits on events only."""
    if path.startswith(("quiver/engine/", "quiver/backends/")):
        yield from (name for name, _ in calls_of(ast.parse(source)) if name.rpartition(".")[2] == "sleep")


def prints(path: str, source: str) -> Iterator[str]:
    """Find prints, but for those that are marked as the output of a command."""
    lines = source.splitlines()
    for name, call in calls_of(ast.parse(source)):
        if name == "print" and "noqa: T201" not in "".join(lines[call.lineno - 1 : call.end_lineno]):
            yield f"{path}:{call.lineno} prints"


def keeps_state(path: str, source: str) -> Iterator[str]:
    """Find `global`, and module-level names whose value is changed in place."""
    tree = ast.parse(source)
    assigned = [node for node in tree.body if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [t for node in assigned for t in (node.targets if isinstance(node, ast.Assign) else [node.target])]
    names = {target.id for target in targets if isinstance(target, ast.Name)}
    for node in ast.walk(tree):
        if isinstance(node, ast.Global) or changed(node) in names:
            yield f"{path}:{node.lineno} keeps state in the module: {ast.unparse(node)}"


def changed(node: ast.AST) -> str | None:
    """Return the name of the container that a node changes in place, if it does."""
    if isinstance(node, ast.Subscript) and isinstance(node.ctx, ast.Store | ast.Del):
        return root_name(node)
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in MUTATORS:
        return root_name(node.func)
    return None


def speaks_http(path: str, source: str) -> Iterator[str]:
    """Find HTTP where errors are bare facts."""
    if path != "quiver/errors.py":
        return
    yield from (name for name in imports_of(source) if "http" in name.lower())
    yield from re.findall(r"\b[45]\d\d\b", source)


def says_nothing(path: str, source: str) -> Iterator[str]:
    """Find tests without the one sentence that says what must hold."""
    for function in functions_of(ast.parse(source)):
        sentence = ast.get_docstring(function) or ""
        ends = re.findall(r"[.!?](?=\s+[A-Z]|$)", sentence)
        if function.name.startswith("test_") and not (sentence.endswith(".") and len(ends) == 1):
            yield f"{path}: {function.name}"


def patches(path: str, source: str) -> Iterator[str]:
    """Find tests that put something of their own into our modules."""
    tree = ast.parse(source)
    ours = {"quiver"}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "quiver":
            ours |= {alias.asname or alias.name for alias in node.names}
    for name, call in calls_of(tree):
        if call.args and re.search(r"\b(?:monkeypatch\.(?:set|del)(?:attr|item)|patch(?:\.\w+)?|setattr)$", name):
            target = call.args[0]
            text = str(target.value) if isinstance(target, ast.Constant) else root_name(target)
            if text.split(".")[0] in ours:
                yield f"{path}:{call.lineno} patches {ast.unparse(target)}"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del) and root_name(node) in ours:
            yield f"{path}:{node.lineno} patches {ast.unparse(node)}"


def unfinished(path: str, text: str) -> Iterator[str]:
    """Find marks of work that is not done."""
    yield from (f"{path}: {mark}" for mark in UNFINISHED.findall(text))


def names_a_machine(path: str, text: str) -> Iterator[str]:
    """Find paths of one machine, and hosts that packages come from."""
    yield from (f"{path}: {mark}" for mark in MACHINE.findall(text))


SOURCE_RULES = (
    points_up,
    sees_too_much,
    wrong_door,
    client_needs_more,
    reads_environment,
    too_long,
    sleeps,
    prints,
    keeps_state,
    speaks_http,
)
TEST_RULES = (says_nothing, patches)
TEXT_RULES = (unfinished, names_a_machine)

BROKEN: list[tuple[Rule, str, str]] = [
    (points_up, "quiver/service.py", "from quiver import app"),
    (points_up, "quiver/api/cohere.py", "from quiver.api.openai import OPENAI"),
    (points_up, "quiver/engine/scheduler.py", "def f():\n    import quiver.engine.tokenizer"),
    (points_up, "quiver/gate.py", "from quiver.engine import engine"),
    (points_up, "quiver/models/hub.py", "from quiver.graphs import compile_graph"),
    (points_up, "quiver/types.py", "from . import errors"),
    (sees_too_much, "quiver/api/cohere.py", "from quiver.engine.scheduler import Scheduler"),
    (wrong_door, "quiver/api/cohere.py", "from starlette.responses import Response"),
    (wrong_door, "quiver/engine/model.py", "import onnxruntime as ort"),
    (wrong_door, "quiver/service.py", "import requests"),
    (wrong_door, "quiver/telemetry/observer.py", "from opentelemetry import trace"),
    (client_needs_more, "quiver/client/core.py", "import msgspec"),
    (client_needs_more, "quiver/client/core.py", "from quiver.errors import QuiverError"),
    (reads_environment, "quiver/models/hub.py", "import os\nTOKEN = os.environ['HF_TOKEN']"),
    (too_long, "quiver/service.py", "x = 1\n" * 401),
    (too_long, "quiver/service.py", "def f():\n" + "    x = 1\n" * 50),
    (sleeps, "quiver/engine/scheduler.py", "async def f():\n    await asyncio.sleep(1)"),
    (sleeps, "quiver/backends/onnx.py", "from time import sleep\nsleep(1)"),
    (prints, "quiver/service.py", "print('here')"),
    (keeps_state, "quiver/service.py", "def f():\n    global x\n    x = 1"),
    (keeps_state, "quiver/service.py", "CACHE: dict[str, int] = {}\ndef f():\n    CACHE['a'] = 1"),
    (keeps_state, "quiver/service.py", "SEEN = set()\ndef f(x):\n    SEEN.add(x)"),
    (speaks_http, "quiver/errors.py", "from http import HTTPStatus"),
    (speaks_http, "quiver/errors.py", "class TooLong(Exception):\n    status = 413"),
    (says_nothing, "test_a.py", "def test_a():\n    assert 1"),
    (says_nothing, "test_a.py", "async def test_a():\n    '''It holds. And more.'''"),
    (patches, "test_a.py", "def test_a(monkeypatch):\n    monkeypatch.setattr('quiver.app.build', None)"),
    (patches, "test_a.py", "from quiver import app\ndef test_a(mocker):\n    mocker.patch.object(app, 'build')"),
    (patches, "test_a.py", "from quiver.engine.engine import Engine\nEngine.ping = None"),
    (unfinished, "a.md", "TO" + "DO: later"),
    (names_a_machine, "a.md", "see /ro" + "ot/notes"),
    (names_a_machine, "a.md", "https://pypi" + ".org/simple"),
]


# The tests


def python_files(folder: Path) -> dict[str, str]:
    """Read every Python file of a folder, by its path in it."""
    files = {path.relative_to(folder).as_posix(): path.read_text(encoding="utf-8") for path in folder.rglob("*.py")}
    assert files, f"{folder} holds no Python file"
    return files


def text_files() -> dict[str, str]:
    """Read every file that is, or would be, in the repository; of an unpacked archive, every file in it."""
    command = ("git", "ls-files", "--cached", "--others", "--exclude-standard")
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False).stdout  # noqa: S603
    paths = [ROOT / name for name in listed.splitlines()] or [path for top in (SRC, TESTS) for path in top.rglob("*.*")]
    contents = {path: path.read_bytes() for path in paths if path.is_file()}
    return {p.relative_to(ROOT).as_posix(): c.decode("utf-8") for p, c in contents.items() if b"\0" not in c}


def found(rule: Rule, files: dict[str, str]) -> list[str]:
    """Apply a rule to many files."""
    return [fault for path, source in sorted(files.items()) for fault in rule(path, source)]


@pytest.mark.parametrize("rule", SOURCE_RULES, ids=lambda rule: rule.__name__)
def test_the_source_keeps_the_rule(rule):
    """No file of the package breaks it."""
    assert found(rule, python_files(SRC)) == []


@pytest.mark.parametrize("rule", TEST_RULES, ids=lambda rule: rule.__name__)
def test_the_tests_keep_the_rule(rule):
    """No test breaks it."""
    assert found(rule, python_files(TESTS)) == []


@pytest.mark.parametrize("rule", TEXT_RULES, ids=lambda rule: rule.__name__)
def test_every_file_keeps_the_rule(rule):
    """No text file of the repository breaks it."""
    assert found(rule, text_files()) == []


@pytest.mark.parametrize(("rule", "path", "sample"), BROKEN, ids=lambda part: getattr(part, "__name__", None))
def test_a_breach_is_seen(rule, path, sample):
    """Negative control: the rule finds the sample that breaks it."""
    assert list(rule(path, sample))


def test_every_rule_has_a_negative_control():
    """A rule that could not fail would hold nothing."""
    assert {rule for rule, _, _ in BROKEN} == {*SOURCE_RULES, *TEST_RULES, *TEXT_RULES}


def subclasses(error: type[QuiverError]) -> Iterator[type[QuiverError]]:
    """Yield an error and everything under it that the package defines."""
    if error.__module__ == errors.__name__:
        yield error
    for below in error.__subclasses__():
        yield from subclasses(below)


@pytest.mark.parametrize("error", [e for e in subclasses(QuiverError) if not e.__subclasses__()])
def test_every_error_has_a_status(error):
    """What a request can meet has a status of its own kind; what only a start can meet is nobody's reply."""
    if issubclass(error, SetupError):
        return
    assert any(cls in STATUSES for cls in error.__mro__)
    statuses = {Refused: (*range(400, 429), 431), Unavailable: (409, 429, 503, 504), EngineError: (500, 503)}
    kind = next(kind for kind in statuses if issubclass(error, kind))
    assert status_of(error.__new__(error)) in statuses[kind]


def test_the_drawn_tree_of_errors_is_the_real_one():
    """The docstring of errors.py draws each class once, as deep as it stands."""
    drawn = {name: len(lead) // 4 for lead, name in re.findall(r"^ {4}([ │├└─]*)(\w+)", errors.__doc__, re.MULTILINE)}
    real = {error.__name__: len(error.__mro__) - len(QuiverError.__mro__) for error in subclasses(QuiverError)}
    assert drawn == real


@pytest.mark.parametrize("architecture", sorted(ARCHITECTURES))
def test_every_architecture_is_tested(architecture):
    """Its name stands in the tests of graphs, or in the checkpoints that they are run on."""
    files = (*TESTS.glob("checkpoints*.py"), *TESTS.glob("test_graphs*.py"))
    text = "".join(file.read_text(encoding="utf-8") for file in files)
    assert f'"{architecture}"' in text
