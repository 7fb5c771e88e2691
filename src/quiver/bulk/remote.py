"""A server that speaks OpenAI's embeddings: asked again while it is busy or away, for as long as that makes sense."""

import asyncio
import base64
import email.utils
import http.client
import random
import ssl
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from queue import Empty, LifoQueue
from typing import Any, Self
from urllib.parse import urlsplit

import msgspec
import numpy as np

from quiver.bulk.lines import Vectors
from quiver.errors import ConfigError, InferenceFailed, InvalidInput, Refused, Unavailable

TIMEOUT_SECONDS = 120.0
MAX_TRIES = 8
MAX_PAUSE_SECONDS = 30.0
MAX_RETRY_AFTER_SECONDS = 300.0
"""A server that says to come back later than that has a quota, not a queue: better to stop and to say so."""
_AGAIN = frozenset({408, 409, 425, 429, 500, 502, 503, 504})
_ABOUT_INPUTS = frozenset({400, 413, 422})
_INPUT_CODES = frozenset({"inference_error", "non_finite_output"})


class _Item(msgspec.Struct):
    index: int
    embedding: str | list[float]


class _Usage(msgspec.Struct):
    prompt_tokens: int = 0


class _Reply(msgspec.Struct):
    data: list[_Item]
    usage: _Usage = msgspec.field(default_factory=_Usage)


@dataclass(frozen=True, slots=True)
class _Answer:
    status: int
    retry_after: str
    body: bytes


class Server:
    """One server's embeddings route, over connections that stay open: as many as requests at once."""

    def __init__(self, url: str, api_key: str, form: Mapping[str, Any], max_requests: int) -> None:
        """`form` is what each request says beside its texts. Raises `ConfigError`."""
        parts = urlsplit(url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ConfigError(f"{url!r} is no base URL of a server: it is like http://localhost:8000/v1")
        self._url = url
        self._host, self._port = parts.hostname, _port(url)
        self._tls = ssl.create_default_context() if parts.scheme == "https" else None
        self._path = f"{parts.path.rstrip('/')}/embeddings"
        self._headers = {"Content-Type": "application/json", "Accept": "application/json"}
        if api_key:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._form = form
        self._idle: LifoQueue[http.client.HTTPConnection] = LifoQueue()
        self._threads = ThreadPoolExecutor(max_requests, thread_name_prefix="bulk-url")

    async def embed(self, texts: Sequence[str]) -> Vectors:
        """Return a vector for each text. Raises `InvalidInput`, `Refused`, `Unavailable`."""
        body = msgspec.json.encode({**self._form, "input": list(texts)})
        loop = asyncio.get_running_loop()
        for attempt in range(1, MAX_TRIES + 1):
            try:
                answer = await loop.run_in_executor(self._threads, self._post, body)
            except (OSError, http.client.HTTPException) as error:
                why, asked = f"{type(error).__name__}: {error}", ""
            else:
                if answer.status == 200:  # noqa: PLR2004  HTTP's own
                    return _vectors(answer.body, len(texts))
                why, asked = self._refusal(answer), answer.retry_after
            if attempt < MAX_TRIES:
                await asyncio.sleep(pause_seconds(attempt, asked))
        raise Unavailable(f"{self._url} failed {MAX_TRIES} times, at last with: {why}")

    def _refusal(self, answer: _Answer) -> str:
        """Return why a request is to be tried again; raises why it is not."""
        code, message = _error(answer)
        if code in _INPUT_CODES:
            raise InferenceFailed(message)
        if answer.status in _ABOUT_INPUTS:
            raise InvalidInput(message)
        if answer.status in _AGAIN and code != "insufficient_quota":
            return f"{answer.status} {message}"
        raise Refused(f"{self._url} refuses: {answer.status} {message}")

    def _post(self, body: bytes) -> _Answer:
        connection = self._connection()
        try:
            connection.request("POST", self._path, body, self._headers)
            reply = connection.getresponse()
            answer = _Answer(reply.status, reply.headers.get("Retry-After", ""), reply.read())
        except BaseException:
            connection.close()
            raise
        self._idle.put(connection)  # one that the server closed opens itself again
        return answer

    def _connection(self) -> http.client.HTTPConnection:
        try:
            return self._idle.get_nowait()
        except Empty:
            pass
        if self._tls:
            return http.client.HTTPSConnection(self._host, self._port, timeout=TIMEOUT_SECONDS, context=self._tls)
        return http.client.HTTPConnection(self._host, self._port, timeout=TIMEOUT_SECONDS)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._threads.shutdown(cancel_futures=True)
        while not self._idle.empty():
            self._idle.get_nowait().close()


def pause_seconds(attempt: int, retry_after: str, *, now: float | None = None) -> float:
    """Return how long to wait: what the server says, in seconds or as a date, else twice as long each time.

    Raises `Unavailable` where the server says to come back much later.
    """
    seconds = _seconds(retry_after, time.time() if now is None else now)
    if seconds is None:
        return min(MAX_PAUSE_SECONDS, 2.0 ** (attempt - 2)) * random.uniform(0.5, 1.0)  # noqa: S311  no secret
    if seconds > MAX_RETRY_AFTER_SECONDS:
        raise Unavailable(f"the server says to come back in {seconds:,.0f} s: run the same command then, it goes on")
    return max(0.0, seconds)


def _seconds(retry_after: str, now: float) -> float | None:
    try:
        return float(retry_after)
    except ValueError:
        pass
    try:
        return email.utils.parsedate_to_datetime(retry_after).timestamp() - now
    except ValueError:
        return None


def _port(url: str) -> int | None:
    try:
        return urlsplit(url).port
    except ValueError as error:
        raise ConfigError(f"{url!r} is no base URL of a server: {error}") from error


def _error(answer: _Answer) -> tuple[str, str]:
    """Return code and message of OpenAI's error object, or the beginning of what came instead."""
    try:
        error = msgspec.json.decode(answer.body)["error"]
        return str(error.get("code") or error.get("type") or ""), str(error["message"])
    except (msgspec.DecodeError, AttributeError, KeyError, TypeError):
        return "", answer.body[:200].decode(errors="replace")


def _vectors(body: bytes, count: int) -> Vectors:
    """Read a reply -> (count, D). Raises `Refused` for one that does not answer each text."""
    try:
        reply = msgspec.json.decode(body, type=_Reply)
        items = sorted(reply.data, key=lambda item: item.index)
        rows = np.stack([_row(item.embedding) for item in items])
    except ValueError as error:  # msgspec's errors are such, and base64's, and NumPy's
        raise Refused(f"the server's reply is not OpenAI's: {error}") from error
    if [item.index for item in items] != list(range(count)):
        raise Refused(f"the server answered {len(items)} texts instead of {count}")
    return Vectors(rows, reply.usage.prompt_tokens)


def _row(embedding: str | list[float]) -> np.ndarray[Any, np.dtype[np.float32]]:
    if isinstance(embedding, str):
        return np.frombuffer(base64.b64decode(embedding), "<f4").astype(np.float32)
    return np.asarray(embedding, np.float32)
