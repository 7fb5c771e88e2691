"""Write the tables of the documentation that the code knows best, or say with `--check` which pages are out of date.

A table stands between `<!-- generated: NAME -->` and `<!-- end -->`; all else on a page is written by hand. Every
table has a page: a new dialect cannot be mounted and left undocumented.
"""

import ast
import asyncio
import inspect
import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, get_args

import msgspec
import typer
from structlog.testing import capture_logs

from quiver import app, config, errors
from quiver.admin import admin_dialect, by_key
from quiver.api.call import Dialect, Route, status_of
from quiver.api.jsonrpc import CODES, MESSAGES
from quiver.api.jsonrpc_methods import METHODS
from quiver.api.openai import OPENAI
from quiver.api.openapi import docs_routes
from quiver.cli import cli
from quiver.config import Alias, Field
from quiver.errors import QuiverError, SetupError
from quiver.models.catalogue import Catalogue, ModelSpec
from quiver.telemetry.observer import Work
from quiver.types import Caller, FileProgress, Kind, Timings

ROOT = Path(__file__).resolve().parent.parent
BEGIN = "<!-- generated: "
MARKED = re.compile(rf"({BEGIN}(?P<name>[^>]+) -->\n).*?(<!-- end -->)", re.DOTALL)
CLIENT_TESTS: Mapping[str, str] = {"make test": "tests/test_clients.py", "make test-clients": "tests/clients/test_*.py"}
DASHBOARD: Any = admin_dialect(None, by_key, OPENAI)
DIALECTS = (*app.DIALECTS, docs_routes(app.DIALECTS, OPENAI), DASHBOARD)


class StaleDocs(Exception):
    """The pages and the code disagree in a way that no writing of tables mends."""


def table(header: list[str], rows: Iterable[Iterable[str]]) -> str:
    """Lay cells out as Markdown."""
    lines = [header, ["---"] * len(header), *([cell.replace("|", "\\|") for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def code(words: Iterable[str]) -> str:
    """Show words as code, with commas between them."""
    return ", ".join(f"`{word}`" for word in words)


def settings_table(section: str) -> str:
    """List the settings of one section."""
    fields = (field for field in config.FIELDS.values() if field.section == section)
    rows = ([code([f.name]), _names(f.env), _names(f.cli), _default(f), _meaning(f)] for f in fields)
    return table(["key", "environment", "flag", "default", "meaning"], rows)


def _names(aliases: Iterable[Alias]) -> str:
    return ", ".join(" and ".join(f"`{name}`" for name in alias.names) + _reading(alias) for alias in aliases)


def _reading(alias: Alias) -> str:
    """Say how a name is read where it does not hold the same value."""
    if alias.stands_for:
        return f" (on: `{alias.stands_for}`)"
    return " (milliseconds)" if alias.unit else f" (there: `{alias.below}`)" if alias.below else ""


def _default(field: Field) -> str:
    if isinstance(field.default, Path):
        return "the platform's directory for user data"  # it differs from machine to machine
    if field.default in ("", None, ()):
        return "not set"
    values = field.default if field.is_list else [field.default]
    return code(str(value).lower() if isinstance(value, bool) else str(value) for value in values)


def _meaning(field: Field) -> str:
    return f"{field.help} One of {code(field.choices)}." if field.choices and not field.is_list else field.help


def presets_table() -> str:
    """List the presets: what each is for, and all that it sets."""
    return table(["preset", "stands in for", "settings"], map(_preset, sorted(config.PRESETS.glob("*.toml"))))


def _preset(path: Path) -> list[str]:
    text = path.read_text(encoding="utf-8")
    sections = tomllib.loads(text).values()
    values = (f"`{name} = {json.dumps(value)}`" for section in sections for name, value in section.items())
    return [code([path.stem]), text.partition("\n")[0].removeprefix("# ").rstrip("."), "<br>".join(values)]


def commands_list() -> str:
    """List each command with the options that are its own, and the settings that it takes."""
    return "\n".join(_command(name, command) for name, command in _commands(typer.main.get_command(cli)))


def _commands(group: Any, above: str = "") -> Iterator[tuple[str, Any]]:
    """Yield each command with the words that call it, those of a group one after another."""
    for name, command in group.commands.items():
        if hasattr(command, "commands"):
            yield from _commands(command, f"{above}{name} ")
        else:
            yield f"{above}{name}", command


def _command(name: str, command: Any) -> str:
    settings = {field.flag for field in config.FIELDS.values()}
    own = [param for param in command.params if param.opts[0] not in settings]
    taken = [param.opts[0] for param in command.params if param.opts[0] in settings]
    rows = ([code([param.metavar or param.opts[0]]), param.help] for param in own)
    parts = [f"### quiver {name}\n", f"{command.help}\n", table(["argument", "meaning"], rows)]
    if taken:
        parts.append(f"Settings: {'all of the above' if len(taken) == len(settings) else code(taken)}.\n")
    return "\n".join(parts)


KINDS: Mapping[Kind, str] = {
    "embed": "Embedding models",
    "rerank": "Rerankers",
    "classify": "Classifiers",
    "sparse": "Sparse models",
    "multi_vector": "Multi-vector models",
}


def models_list() -> str:
    """List the catalogue, each kind of model with what matters to it."""
    specs = list(Catalogue.load())
    by_kind = {kind: [spec for spec in specs if spec.kind == kind] for kind in KINDS}
    return "\n".join(f"### {KINDS[kind]}\n\n{_models(known)}" for kind, known in by_kind.items() if known)


def _models(specs: Sequence[ModelSpec]) -> str:
    """Make a table of those columns that any of the models fills."""
    columns: Mapping[str, Callable[[ModelSpec], str]] = {
        "model": lambda spec: f"**{spec.id}**<br>{spec.description}<br>{code(spec.aliases)}".removesuffix("<br>"),
        "dimensions": lambda spec: str(spec.dimensions) if spec.kind != "rerank" else "",
        "may be cut to": lambda spec: ", ".join(map(str, spec.matryoshka[1:])),
        "tokens": lambda spec: str(spec.max_tokens),
        "pooling": _pooling,
        "labels": lambda spec: ", ".join(spec.labels),
        "prompts": lambda spec: "<br>".join(f"{task}: `{json.dumps(text)}`" for task, text in spec.prompts.items()),
        "licence": lambda spec: spec.licence,
    }
    filled = {name: cells for name, cell in columns.items() if any(cells := [cell(spec) for spec in specs])}
    return table(list(filled), zip(*filled.values(), strict=True))


def _pooling(spec: ModelSpec) -> str:
    if spec.kind != "embed":
        return ""
    return spec.pooling if spec.normalize else f"{spec.pooling}, length as it comes"


def errors_table() -> str:
    """List every error with what a client sees of it, ancestors before descendants."""
    return table(["error", "code", "status", "OpenAI `type`", "meaning"], map(_error, _tree(QuiverError)))


def _tree(cls: type[QuiverError]) -> Iterator[type[QuiverError]]:
    yield cls
    for child in cls.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from _tree(child)


def _error(cls: type[QuiverError]) -> list[str]:
    name, meaning = code([cls.__name__]), (inspect.getdoc(cls) or "").partition("\n")[0]
    error = cls.__new__(cls)
    QuiverError.__init__(error, "")  # what more a class asks for is not shown here
    if isinstance(error, SetupError):
        return [name, "", f"exit {app.exit_code(error)}", "", meaning]
    status = status_of(error)
    kind = json.loads(OPENAI.render_error(status, error))["error"]["type"]
    return [name, code([cls.code]), str(status), code([kind]), meaning]


def routes_table(dialect: Dialect) -> str:
    """List the routes of one dialect."""
    rows = ([r.method, code([_path(dialect, r)]), r.summary, "no" if r.public else "yes"] for r in dialect.routes)
    return table(["method", "path", "what it does", "asks for the key"], rows)


def _path(dialect: Dialect, route: Route) -> str:
    return route.path if route.at_root else f"/{dialect.name}{route.path}"


def methods_table() -> str:
    """List the methods of JSON-RPC with their parameters in their order."""
    rows = ([code([name]), ", ".join(_parameters(method.params)), method.summary] for name, method in METHODS.items())
    return table(["method", "parameters", "what it does"], rows)


def _parameters(params: Any) -> Iterator[str]:
    for field in msgspec.structs.fields(params):
        yield f"`{field.name}`" if field.required else f"`{field.name}?`"


def numbers_table() -> str:
    """List the numbers of JSON-RPC's errors, the specification's first."""
    kinds = {number: kind for kind, number in CODES.items()}
    numbers = sorted({*MESSAGES, *kinds}, key=lambda number: (number not in MESSAGES, -number))
    meanings = ((number, MESSAGES.get(number) or inspect.getdoc(kinds[number]) or "") for number in numbers)
    return table(["number", "meaning"], ([code([str(number)]), text.partition("\n")[0]] for number, text in meanings))


def metrics_tables() -> Mapping[str, str]:
    """List the metrics that are Quiver's own, and those of each family."""
    families = get_args(config.MetricsFamily)
    text, labels = asyncio.run(_told(families))
    kinds = dict(re.findall(r"^# TYPE (\w+) (\w+)$", text, re.MULTILINE))
    helps = dict(re.findall(r"^# HELP (\w+) (.+)$", text, re.MULTILINE))
    for name, given in re.findall(r"^(\w+)\{(.+)\} ", text, re.MULTILINE):
        labels.setdefault(re.sub(r"_(bucket|sum|count)$", "", name) if name not in kinds else name, {}).update(
            dict.fromkeys(label for label in re.findall(r'(\w+)="', given) if label != "le")
        )
    prefixes = {"metrics": "quiver_"} | {f"metrics {family}": f"{family.replace('tei', 'te')}_" for family in families}
    return {table_name: _metrics(kinds, helps, labels, prefix) for table_name, prefix in prefixes.items()}


def _metrics(kinds: Mapping[str, str], helps: Mapping[str, str], labels: Mapping[str, Any], prefix: str) -> str:
    names = [name for name in kinds if name.startswith(prefix)]
    rows = ([code([name]), kinds[name], code(labels.get(name, ())), helps[name]] for name in names)
    return table(["metric", "type", "labels", "meaning"], rows)


async def _told(families: Sequence[config.MetricsFamily]) -> tuple[str, dict[str, dict[str, None]]]:
    """Return what a server shows that has met everything once, and the labels of its figures."""
    parts = app.build(config.Config(server=config.ServerConfig(metrics_families=tuple(families))))
    observer = parts.service.observer
    async with parts.engine:
        with observer.exchange("POST", {}) as exchange:
            exchange.status = 500
        observer.request_refused("overloaded")
        for kind in ("embed", "rerank"):
            observer.inputs_computed(Work("", kind, (), 0, Timings()))
        observer.batch_computed("", 1, 1, 1.0)
        observer.input_failed("", "")
        with capture_logs():
            observer.lane_died("", "")
        observer.download_progressed("", FileProgress("", 0, 0))
        labels = {f.name + "_total" * f.counted: dict.fromkeys([f.label] if f.label else []) for f in observer.figures}
        return (await parts.service.metrics(Caller("docs"))).decode(), labels


def clients_table() -> str:
    """List the clients with those calls that a test makes, and the target that runs it."""
    pinned = (ROOT / "constraints.txt", *(ROOT / "tests" / "clients").glob("requirements-*.txt"))
    versions = dict(re.findall(r"^(\S+)==(\S+)$", "\n".join(map(_read, pinned)), re.MULTILINE))
    rows = []
    for target, files in CLIENT_TESTS.items():
        calls: dict[str, dict[str, None]] = {}
        for package, *made in (mark for file in sorted(ROOT.glob(files)) for mark in _client_marks(_read(file))):
            calls.setdefault(package, {}).update(dict.fromkeys(made))
        if unpinned := sorted(set(calls) - set(versions)):
            raise StaleDocs(f"no version of {unpinned[0]!r} is pinned, in constraints.txt or tests/clients/")
        rows += [[code([name]), versions[name], code(calls[name]), "yes", code([target])] for name in sorted(calls)]
    return table(["client", "version", "calls", "works", "tried by"], rows)


def _client_marks(source: str) -> Iterator[list[str]]:
    """Yield the words of each `@pytest.mark.client("package", "call", …)`, without importing any client."""
    for node in ast.walk(ast.parse(source)):
        for mark in node.decorator_list if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else ():
            if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.client":
                yield [ast.literal_eval(word) for word in mark.args]


def _read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def all_tables() -> Mapping[str, str]:
    """Write every table; return them by name."""
    sections = dict.fromkeys(field.section for field in config.FIELDS.values())
    return {
        **{f"settings {section}": settings_table(section) for section in sections},
        **{f"routes {d.name}": routes_table(d) for d in DIALECTS},
        "clients": clients_table(),
        "presets": presets_table(),
        "commands": commands_list(),
        "models": models_list(),
        "errors": errors_table(),
        "methods": methods_table(),
        "numbers": numbers_table(),
        **metrics_tables(),
    }


def pages(root: Path) -> list[Path]:
    """List the documentation."""
    return [*sorted(root.glob("*.md")), *sorted((root / "docs").rglob("*.md"))]


def renewed(text: str, tables: Mapping[str, str]) -> str:
    """Return a page with every table written anew. Raises `StaleDocs`."""
    names = [match["name"] for match in MARKED.finditer(text)]
    if text.count(BEGIN) != len(names):
        raise StaleDocs("a generated table has no <!-- end -->")
    if unknown := sorted(set(names) - set(tables)):
        raise StaleDocs(f"there is no table {unknown[0]!r} (there are: {', '.join(tables)})")
    return MARKED.sub(lambda match: f"{match[1]}\n{tables[match['name']]}\n{match[3]}", text)


def outdated(root: Path = ROOT) -> dict[Path, str]:
    """Return what each page that is out of date should hold. Raises `StaleDocs`."""
    tables, texts = all_tables(), {page: page.read_text(encoding="utf-8") for page in pages(root)}
    everything = "".join(texts.values())
    if homeless := [name for name in tables if f"{BEGIN}{name} -->" not in everything]:
        raise StaleDocs(f"no page has the table {homeless[0]!r}: give it one, with {BEGIN}{homeless[0]} -->")
    wanted = {page: renewed(text, tables) for page, text in texts.items()}
    return {page: text for page, text in wanted.items() if text != texts[page]}


def main(*, check: bool) -> None:
    """Write the pages that are out of date, or exit with 1 naming them."""
    stale = outdated()
    for page, text in stale.items():
        print(f"{page.relative_to(ROOT)} {'is out of date: run `make docs`' if check else 'is written'}")
        if not check:
            page.write_text(text, encoding="utf-8")
    if stale and check:
        sys.exit(1)


if __name__ == "__main__":
    try:
        main(check="--check" in sys.argv[1:])
    except StaleDocs as error:
        sys.exit(f"docs: {error}")
