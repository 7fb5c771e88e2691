"""The command `quiver`. Each command's options are generated from the settings, so that they cannot disagree."""

import json
import os
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from quiver import __version__, app, cli_accounts, cli_jobs, cli_scale, config
from quiver.cli_processes import share_of, supervise
from quiver.cli_settings import Command, given_place, run_async, with_settings
from quiver.config import Config
from quiver.errors import ConfigError, EngineError, QuiverError
from quiver.models.catalogue import Catalogue, ModelSpec
from quiver.models.hub import is_here
from quiver.progress import DownloadDisplay
from quiver.telemetry import logs
from quiver.types import Caller, RerankRequest

cli = typer.Typer(
    add_completion=False,
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="Serve text embeddings under every API that clients speak.",
)
cli.add_typer(cli_accounts.cli)
cli.add_typer(cli_jobs.jobs, name="jobs")
cli.add_typer(cli_scale.scale, name="scale")

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
CLUSTER = ("ray_address", "ray_token", "ray_grows", "ray_min_replicas", "ray_max_replicas", "ray_cpus", "ray_gpus")
"""Settings of bulk runs on a Ray cluster."""


@cli.command(cls=Command)
@with_settings()
def serve(*, settings: Config) -> None:
    """Start the server."""
    place = given_place()
    logs.configure(settings.server, secrets=config.secrets(settings), process=place.number if place else None)
    if place is None and settings.server.processes > 1:
        raise typer.Exit(supervise(settings))
    with DownloadDisplay() as progress:
        run_async(app.serve(share_of(settings, place), progress, place))


@cli.command(cls=Command)
@with_settings(*ONE_SHOT, "api_key", *CLUSTER)
def embed(  # noqa: PLR0913  a command's options are its arguments
    texts: Annotated[
        list[str],
        typer.Argument(metavar="TEXT… | - | FILE…", help="Texts, or files with -o; - reads from standard input."),
    ],
    *,
    output: Annotated[
        str | None, typer.Option("--output", "-o", help="Embed FILES into it; with --ray, a folder.")
    ] = None,
    form: Annotated[str | None, typer.Option("--format", help="Of FILES: txt, jsonl, csv, tsv or parquet.")] = None,
    output_form: Annotated[
        str | None, typer.Option("--output-format", help="Of the output: jsonl, npy or parquet.")
    ] = None,
    column: Annotated[str, typer.Option(help="Where in FILES the text stands.")] = "text",
    id_column: Annotated[str | None, typer.Option(help="What in FILES is carried over as `id`.")] = None,
    dimensions: Annotated[int | None, typer.Option(help="Cut vectors to so many dimensions.")] = None,
    prompt_name: Annotated[str | None, typer.Option(help="The model's own prompt before each text.")] = None,
    normalize: Annotated[
        bool | None, typer.Option("--normalize/--no-normalize", help="Scale vectors to unit length, or not.")
    ] = None,
    allow_empty: Annotated[bool, typer.Option("--allow-empty", help="Embed empty texts of FILES, too.")] = False,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave bad lines out; see OUTPUT.errors.jsonl.")] = False,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Begin anew, whatever is there.")] = False,
    url: Annotated[str, typer.Option(help="Let a server embed FILES (http://…/v1).")] = "",
    concurrency: Annotated[int, typer.Option(min=1, help="Requests at once, with a server.")] = 8,
    ray: Annotated[bool, typer.Option("--ray", help="Let a Ray cluster embed FILES (paths, s3://…, gs://…).")] = False,
    settings: Config,
) -> None:
    """Embed texts without a server, one JSON object a line; or files of texts into a file of vectors."""
    from quiver import bulk  # noqa: PLC0415  no other command needs it

    logs.configure(settings.server)
    wanted = bulk.Wanted(dimensions=dimensions, prompt_name=prompt_name, normalize=normalize)
    if output is None:
        if form or output_form or id_column or column != "text" or allow_empty or skip_bad or overwrite or url or ray:
            raise ConfigError("these options are for files: give -o OUTPUT")
        return _embed_texts(texts, settings, wanted)
    options = bulk.BulkOptions(
        files=tuple(map(Path, texts)),
        output=Path(output),
        form=form,
        output_form=output_form,
        columns=bulk.Columns(text=column, id=id_column, allow_empty=allow_empty),
        wanted=wanted,
        skip_bad=skip_bad,
        overwrite=overwrite,
        url=url,
        max_requests=concurrency,
    )
    return _embed_on_cluster(texts, output, options, settings) if ray else _embed_files(options, settings)


def _embed_texts(texts: list[str], settings: Config, wanted: Any) -> None:
    lines = (line.rstrip("\n") for line in sys.stdin) if texts == ["-"] else iter(texts)
    with DownloadDisplay() as progress:
        run_async(_embed(settings, lines, wanted, progress))


def _embed_on_cluster(files: list[str], output: str, options: Any, settings: Config) -> None:
    from quiver.scale import ray_data  # noqa: PLC0415  no other command needs it

    if options.url or options.output_form not in (None, "parquet"):
        raise ConfigError("--ray computes itself, and writes Parquet: leave --url and --output-format out")
    try:
        ray_data.command(files, output, options, settings)
    except KeyboardInterrupt:
        typer.echo("quiver: interrupted; run the same command again, and it goes on", err=True)
        raise typer.Exit(130) from None


def _embed_files(options: Any, settings: Config) -> None:
    from quiver import bulk  # noqa: PLC0415  no other command needs it

    try:
        with DownloadDisplay() as progress:
            run_async(bulk.run_bulk(options, settings, bulk.embedder_for(options, settings, progress)))
    except KeyboardInterrupt:
        typer.echo(f"quiver: {bulk.how_to_go_on(options)}", err=True)
        raise typer.Exit(130) from None


async def _embed(settings: Config, lines: Iterator[str], wanted: Any, progress: DownloadDisplay) -> None:
    engine = app.build(settings).engine
    async with engine:
        await engine.load(progress)
        for texts in _chunks(lines):
            embeddings = await engine.embed(wanted.request(texts), Caller("cli"))
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
        run_async(_rerank(settings, request, progress))


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
    given |= {
        "rate_per_second": 0,
        "auth": "auto" if settings.server.api_key else "off",
    }  # this machine's accounts are not ours
    return tuple(part for name, value in given.items() for part in (config.FIELDS[name].flag, str(value)))


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
