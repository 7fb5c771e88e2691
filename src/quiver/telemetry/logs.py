"""Log lines: text for people at a terminal, JSON for machines elsewhere. Never a caller's text, vector or key."""

import logging
import sys
from collections.abc import Callable

import structlog

from quiver.config import ServerConfig
from quiver.telemetry.redaction import processor, redactor


class LibraryFormatter(structlog.stdlib.ProcessorFormatter):
    """Writes what libraries log as we write our own lines, without what looks like a key."""

    def __init__(
        self,
        renderer: structlog.typing.Processor,
        before: list[structlog.typing.Processor],
        redact: Callable[[str], str],
    ) -> None:
        super().__init__(processor=renderer, foreign_pre_chain=before)
        self._redact = redact

    def format(self, record: logging.LogRecord) -> str:
        """Return the line, its traceback included."""
        return self._redact(super().format(record))


def configure(config: ServerConfig, *, secrets: tuple[str, ...] = (), process: int | None = None) -> None:
    """Send every log line, our own and the libraries', to standard error in one form.

    What looks like a key is masked in it, and so are the server's own key and `secrets`; of several processes, each
    says which one it is.
    """
    as_text = config.log_format == "text" or (config.log_format == "auto" and sys.stderr.isatty())
    stamp = structlog.processors.TimeStamper(fmt="%H:%M:%S" if as_text else "iso", utc=not as_text)
    shared: list[structlog.typing.Processor] = [
        structlog.contextvars.merge_contextvars,
        structlog.stdlib.add_log_level,
        stamp,
        *([] if process is None else [_from(process)]),
        structlog.processors.format_exc_info,
    ]
    renderer = _for_people() if as_text else structlog.processors.JSONRenderer()
    redact = redactor((config.api_key.reveal(), *secrets))
    level = getattr(logging, config.log_level.upper())
    structlog.configure(
        processors=[*(shared[:-1] if as_text else shared), renderer, processor(redact)],
        wrapper_class=structlog.make_filtering_bound_logger(level),
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(LibraryFormatter(renderer, shared[:-1], redact))
    logging.basicConfig(handlers=[handler], level=max(level, logging.WARNING), force=True)


def about_request(request_id: str) -> None:
    """Let every line that is logged from here on, in this task and those that it starts, name the request."""
    structlog.contextvars.bind_contextvars(request_id=request_id)


def _from(process: int) -> structlog.typing.Processor:
    """Let each line say which process it is from."""

    def add(_: object, __: str, event: structlog.typing.EventDict) -> structlog.typing.EventDict:
        return {**event, "process": process}

    return add


def _for_people() -> structlog.typing.Processor:
    """Write tracebacks plainly: the renderer's own choice shows the values of variables, texts among them."""
    return structlog.dev.ConsoleRenderer(exception_formatter=structlog.dev.plain_traceback)
