"""The smallest server that speaks OpenAI's embeddings: what people put before a library.

One thread calls the library, one request at a time: on a CPU each call takes all cores, and two at once would share them.
"""

import argparse
import asyncio
import functools
import importlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import orjson
import uvicorn
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

Work = Callable[..., Any]


def main() -> None:
    """Load what the arguments name and serve it until SIGTERM."""
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--port", type=int, required=True)
    arguments.add_argument("module")
    arguments.add_argument("folder")
    arguments.add_argument("verb", nargs="?", default="embed", choices=("embed", "rerank"))
    options = arguments.parse_args()
    module = importlib.import_module(options.module)
    if options.verb == "rerank":
        app = application(rerank, "/v1/rerank", module.load_reranker(options.folder))
    else:
        work = module.load(options.folder)
        work(["ready?"])
        app = application(embeddings, "/v1/embeddings", work)
    uvicorn.run(app, host="127.0.0.1", port=options.port, log_level="error", access_log=False)


def application(answer: Callable[..., Any], path: str, work: Work) -> Starlette:
    """Put one verb behind its path."""
    thread = ThreadPoolExecutor(max_workers=1)

    async def call(request: Request) -> Response:
        body = orjson.loads(await request.body())
        content = await asyncio.get_running_loop().run_in_executor(thread, functools.partial(answer, work, body))
        return Response(content, media_type="application/json")

    async def health(_: Request) -> Response:
        return Response(b"{}", media_type="application/json")

    return Starlette(routes=[Route(path, call, methods=["POST"]), Route("/health", health)])


def embeddings(work: Work, body: dict[str, Any]) -> bytes:
    """Answer as OpenAI does; what was used is counted in characters."""
    texts: Sequence[str] = [body["input"]] if isinstance(body["input"], str) else body["input"]
    data = [{"object": "embedding", "index": i, "embedding": vector} for i, vector in enumerate(work(texts))]
    used = sum(map(len, texts))
    reply = {
        "object": "list",
        "data": data,
        "model": body["model"],
        "usage": {"prompt_tokens": used, "total_tokens": used},
    }
    return orjson.dumps(reply, option=orjson.OPT_SERIALIZE_NUMPY)


def rerank(work: Work, body: dict[str, Any]) -> bytes:
    """Answer as most do: the best first."""
    scores = work(body["query"], body["documents"])
    best = sorted(range(len(scores)), key=lambda i: -scores[i])
    return orjson.dumps({"results": [{"index": i, "relevance_score": scores[i]} for i in best]})


if __name__ == "__main__":
    main()
