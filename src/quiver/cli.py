"""The command `quiver`. Each command's options are generated from the settings, so that they cannot disagree."""

import asyncio
import inspect
import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from typer.core import TyperCommand

from quiver import __version__, app, config
from quiver.config import Config
from quiver.errors import EngineError, QuiverError
from quiver.models.catalogue import Catalogue, ModelSpec
from quiver.models.hub import is_here
from quiver.progress import DownloadDisplay
from quiver.telemetry import logs
from quiver.types import Caller, EmbedRequest, RerankRequest

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve text embeddings under every API that clients speak.",
)

LINES_PER_REQUEST = 256
ONE_SHOT = (
    "model",
    "backend",
    "dtype",
    "onnx_file",
    "default_prompt_name",
    "data_dir",
    "hub_endpoint",
    "hub_offline",
    "truncate",
)
"""Settings of the commands that work without a server."""

ConfigFile = Annotated[
    Path | None, typer.Option("--config", envvar="QUIVER_CONFIG", help="Settings file (quiver.toml).")
]
Preset = Annotated[
    str | None, typer.Option("--preset", envvar="QUIVER_PRESET", help="Settings of a known system or size.")
]


class Command(TyperCommand):
    """A command that takes the flags of the systems that Quiver stands in for, too."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Read the words behind the command."""
        return super().parse_args(ctx, config.in_our_words(args))


def with_settings(*names: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command `--config`, `--preset` and an option for each setting; it receives the merged tree as `settings`."""
    fields = [config.FIELDS[name] for name in names] if names else list(config.FIELDS.values())

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command).parameters.values() if p.name != "settings"]

        def run(*, config_file: Path | None = None, preset: str | None = None, **given: Any) -> None:
            flags = {field.name: given.pop(field.name) for field in fields}
            settings = config.load(preset=preset, file=config_file, env=os.environ, flags=flags)
            command(settings=settings, **given)

        keyword = inspect.Parameter.KEYWORD_ONLY
        sources = [
            inspect.Parameter("config_file", keyword, default=None, annotation=ConfigFile),
            inspect.Parameter("preset", keyword, default=None, annotation=Preset),
        ]
        options = [inspect.Parameter(f.name, keyword, default=None, annotation=_option(f)) for f in fields]
        run.__signature__ = inspect.Signature([*own, *sources, *options])  # type: ignore[attr-defined]
        run.__name__, run.__doc__ = command.__name__, command.__doc__
        return run

    return decorate


def _option(field: config.Field) -> Any:
    """Return an option of text; `config.load` gives it its type, as it does for every other source."""
    kind = bool | None if field.is_switch else list[str] | None if field.is_list else str | None
    also = f"; also {', '.join(field.other_flags)}" if field.other_flags else ""
    about = f"{field.help} [{field.env_names[0]}; {_default(field)}{also}]"
    return Annotated[kind, typer.Option("/".join(field.flags), help=about)]


def _default(field: config.Field) -> str:
    value = ", ".join(field.default) if field.is_list else field.default
    return f"default: {value}" if value not in ("", None) else "not set"


@cli.command(cls=Command)
@with_settings()
def serve(*, settings: Config) -> None:
    """Start the server."""
    logs.configure(settings.server)
    with DownloadDisplay() as progress:
        _run(app.serve(settings, progress))


@cli.command(cls=Command)
@with_settings(*ONE_SHOT)
def embed(
    texts: Annotated[
        list[str], typer.Argument(metavar="TEXT… | -", help="Texts; - reads one a line from standard input.")
    ],
    *,
    settings: Config,
) -> None:
    """Embed texts without a server: one JSON object a line."""
    logs.configure(settings.server)
    lines = (line.rstrip("\n") for line in sys.stdin) if texts == ["-"] else iter(texts)
    with DownloadDisplay() as progress:
        _run(_embed(settings, lines, progress))


async def _embed(settings: Config, lines: Iterator[str], progress: DownloadDisplay) -> None:
    engine = app.build(settings).engine
    async with engine:
        await engine.load(progress)
        for texts in _chunks(lines):
            embeddings = await engine.embed(EmbedRequest(inputs=texts), Caller("cli"))
            for text, vector in zip(texts, embeddings.vectors, strict=True):
                print(json.dumps({"text": text, "embedding": vector.tolist()}, ensure_ascii=False))  # noqa: T201  its output


@cli.command(cls=Command)
@with_settings(*ONE_SHOT)
def rerank(
    query: Annotated[str, typer.Argument(help="What the documents should be about.")],
    documents: Annotated[
        list[str], typer.Argument(metavar="DOCUMENT… | -", help="Documents; - reads one a line from standard input.")
    ],
    *,
    top_n: Annotated[int | None, typer.Option(help="Print only so many of the best.")] = None,
    raw_scores: Annotated[bool, typer.Option("--raw-scores", help="Print a cross-encoder's logits.")] = False,
    settings: Config,
) -> None:
    """Rank documents without a server, the best first: one JSON object a line."""
    logs.configure(settings.server)
    texts = [line.rstrip("\n") for line in sys.stdin] if documents == ["-"] else documents
    request = RerankRequest(query=query, documents=texts, top_n=top_n, raw_scores=raw_scores)
    with DownloadDisplay() as progress:
        _run(_rerank(settings, request, progress))


async def _rerank(settings: Config, request: RerankRequest, progress: DownloadDisplay) -> None:
    async with app.build(settings).engine as engine:
        await engine.load(progress)
        ranking = await engine.rerank(request, Caller("cli"))
        for index, score in zip(ranking.order.tolist(), ranking.scores.tolist(), strict=True):
            line = {"index": index, "score": score, "text": request.documents[index]}
            print(json.dumps(line, ensure_ascii=False))  # noqa: T201  its output


def _chunks(lines: Iterable[str]) -> Iterator[list[str]]:
    chunk: list[str] = []
    for line in lines:
        chunk.append(line)
        if len(chunk) == LINES_PER_REQUEST:
            yield chunk
            chunk = []
    if chunk:
        yield chunk


@cli.command()
@with_settings("data_dir", "hub_cache")
def models(
    *, as_json: Annotated[bool, typer.Option("--json", help="One JSON object a line.")] = False, settings: Config
) -> None:
    """List the models of the catalogue, and which of them are on this machine."""
    lines = [_describe(spec, settings) for spec in Catalogue.load()]
    if as_json:
        for line in lines:
            typer.echo(json.dumps(line))
        return
    table = Table("model", "kind", "here", "dimensions", "tokens", "licence", "also called")
    table.columns[0].no_wrap = True
    for line in lines:
        here, aliases = "yes" if line["here"] else "", ", ".join(line["aliases"])
        numbers = (str(line["dimensions"]), str(line["max_tokens"]))
        table.add_row(line["id"], line["kind"], here, *numbers, line["licence"], aliases)
    Console().print(table)


def _describe(spec: ModelSpec, settings: Config) -> dict[str, Any]:
    return {
        "id": spec.id,
        "kind": spec.kind,
        "here": is_here(spec, settings.models),
        "dimensions": spec.dimensions,
        "max_tokens": spec.max_tokens,
        "prompts": list(spec.prompts),
        "licence": spec.licence,
        "aliases": spec.aliases,
    }


@cli.command(cls=Command)
@with_settings("model", "dtype", "lanes", "batch_tokens", "api_key")
def bench(  # noqa: PLR0913  a command's options are its arguments
    *,
    url: Annotated[str, typer.Option(help="OpenAI-compatible base URL (http://…/v1); empty: start a server.")] = "",
    clients: Annotated[int, typer.Option(help="Clients of a closed load, each with one request at a time.")] = 32,
    rate: Annotated[float | None, typer.Option(help="Requests a second of an open load, instead of clients.")] = None,
    requests: Annotated[int, typer.Option(help="Requests of a round.")] = 512,
    rounds: Annotated[int, typer.Option(help="Rounds; with --limit, medians of their ratios.")] = 5,
    inputs: Annotated[int, typer.Option(help="Texts in a request.")] = 1,
    limit: Annotated[bool, typer.Option(help="Measure too what this machine can do at best.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object.")] = False,
    plot: Annotated[Path | None, typer.Option(help="Draw the latencies into this PNG.")] = None,
    settings: Config,
) -> None:
    """Measure a server: throughput, latencies, errors, and what the machine can do at best."""
    from quiver import bench as load  # noqa: PLC0415  no other command needs it

    options = load.BenchOptions(
        model=settings.models.model[0],
        url=url,
        server_arguments=_server_arguments(settings),
        api_key=settings.server.api_key,
        clients=clients,
        rate=rate,
        requests=requests,
        rounds=rounds,
        inputs_per_request=inputs,
        json=as_json,
        plot=plot,
    )
    limits = load.local_limits(settings) if limit else None
    result = load.run_bench(options, limits=limits, idle=load.idle_texts(settings) if limit else None)
    if result.load.errors:
        raise typer.Exit(1)


def _server_arguments(settings: Config) -> tuple[str, ...]:
    """Give a server that the bench starts the settings that the bench itself was given."""
    given = {name: getattr(settings.engine, name) for name in ("lanes", "batch_tokens")}
    given |= {"model": settings.models.model[0], "dtype": settings.models.settings_of(settings.models.model[0]).dtype}
    given |= {"cache_entries": 0, "redis_url": ""}  # what is known costs nothing, and tells nothing
    return tuple(part for name, value in given.items() for part in (config.FIELDS[name].flag, str(value)))


def _run(work: Any) -> None:
    try:
        import uvloop  # noqa: PLC0415  not on every platform

        runner: Callable[[Any], None] = uvloop.run
    except ImportError:
        runner = asyncio.run
    runner(work)


def _show_version(*, wanted: bool) -> None:
    if wanted:
        typer.echo(f"quiver {__version__}")
        raise typer.Exit


@cli.callback()
def root(
    *,
    version: Annotated[
        bool,
        typer.Option("--version", callback=lambda v: _show_version(wanted=v), is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Take the options that stand before a command."""


def main() -> None:
    """Run a command; an error is one line and an exit code."""
    try:
        cli(standalone_mode=True)
    except QuiverError as error:
        sys.stderr.write(f"quiver: {error.message}\n")
        sys.stderr.flush()
        if isinstance(error, EngineError):
            os._exit(app.exit_code(error))  # a thread may be stuck in a model: the end would wait for it
        sys.exit(app.exit_code(error))
