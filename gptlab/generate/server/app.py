"""The server's paths."""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterable, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

from fastapi import FastAPI, Request
from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse, Response

from gptlab.config.registry import suggest
from gptlab.generate.server.answers import Answer
from gptlab.generate.server.blind import Pairs
from gptlab.generate.server.errors import Refused
from gptlab.generate.server.fields import Limits, parse, read
from gptlab.generate.server.guard import Guard
from gptlab.generate.server.page import page
from gptlab.generate.server.served import Served

BODY_SECONDS = 30.0  # in which a body has to come
DRAINED = 16  # times the limit of a body that are read before it is refused, so that the client reads why


def create_app(
    models: Sequence[Served],
    *,
    votes: Callable[[Served, Served], Path],
    limits: Limits | None = None,
    hosts: Iterable[str] = (),
    local: bool = True,
    token: str | None = None,
) -> Guard:
    """What serves these models; the first is the one of a request that names none. `votes`: the file of the votes on two of them;
    `hosts`, `local`, `token`: as Guard's."""
    limits = limits or Limits()
    by_name = {name: served for served in reversed(models) for name in (*served.aliases, served.name)}
    pairs, created = Pairs(votes), int(time.time())
    document, policy = page()

    @asynccontextmanager
    async def running(_: FastAPI) -> AsyncIterator[None]:
        for served in models:
            served.scheduler.start()
        yield
        for served in models:
            served.scheduler.close()

    # FastAPI's own pages of documentation load scripts from the network.
    app = FastAPI(title="gptlab", docs_url=None, redoc_url=None, openapi_url=None, lifespan=running)

    async def json_of(request: Request) -> dict[str, Any]:
        if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
            raise Refused(415, "the body must be sent as Content-Type: application/json")
        try:
            return parse(await asyncio.wait_for(_body(request, limits.body), BODY_SECONDS))
        except TimeoutError as error:
            raise Refused(408, "the body did not come in time") from error

    def find(name: str) -> Served:
        if not name:
            return models[0]
        if name not in by_name:
            raise Refused(404, f"there is no model {name[:100]!r}{suggest(name[:100], by_name)}", param="model", code="model_not_found")
        return by_name[name]

    async def answer(request: Request, kind: str) -> Response:
        asked = read(await json_of(request), kind, limits)
        blind = pairs.find(asked.model)
        served, finished = find(asked.model) if blind is None else blind[0], None
        asks = served.asks(asked, limits)
        if blind is not None:
            finished = blind[1](asked)
        return Answer(served, asked, served.scheduler.submit(*asks), [len(ask.prompt) for ask in asks], finished)

    @app.get("/")
    async def show() -> Response:
        return Response(document, media_type="text/html", headers={"Content-Security-Policy": policy})

    @app.get("/v1/models")
    async def list_models() -> Response:
        told = {"max_tokens": limits.tokens, "blind": len(models) > 1}
        return JSONResponse({"object": "list", "data": [served.described(created) for served in models], "gptlab": told})

    @app.get("/v1/models/{name:path}")
    async def show_model(name: str) -> Response:
        return JSONResponse(find(name).described(created))

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        return await answer(request, "completions")

    @app.post("/v1/chat/completions")
    async def chat(request: Request) -> Response:
        return await answer(request, "chat")

    @app.post("/v1/blind")
    async def blind(request: Request) -> Response:
        names = (await json_of(request)).get("models") or [served.name for served in models]
        if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
            raise Refused(422, "models must be a list of names", param="models")
        chosen = [find(name) for name in names]
        return JSONResponse({"pair": pairs.begin(chosen), "chat": all(served.format for served in chosen)})

    @app.post("/v1/votes")
    async def vote(request: Request) -> Response:
        body = await json_of(request)
        return JSONResponse(pairs.vote(body.get("pair"), body.get("vote")))

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> Response:
        return JSONResponse(error.body(), error.status, {"Retry-After": "1"} if error.status == 503 else None)

    @app.exception_handler(HTTPException)
    async def not_here(request: Request, error: HTTPException) -> Response:
        told = Refused(error.status_code, f"{request.method} {request.url.path[:100]}: {str(error.detail).lower()}")
        return JSONResponse(told.body(), error.status_code, error.headers)

    @app.exception_handler(Exception)
    async def failed(_: Request, error: Exception) -> Response:  # uvicorn writes the error to the terminal
        return JSONResponse(Refused(500, "the server failed; its terminal says why").body(), 500)

    return Guard(app, hosts=hosts, local=local, token=token)  # outermost: an answer that something failed has the headers too


async def _body(request: Request, most: int) -> bytes:
    """Raises Refused 413 for more than `most` bytes."""
    told = request.headers.get("content-length", "0")
    refused = Refused(413, f"the body is larger than {most:,} bytes")
    if told.isdecimal() and len(told) < 20 and int(told) > DRAINED * most:
        raise refused
    found, length = [], 0
    async for part in request.stream():
        length += len(part)
        if length <= most:
            found.append(part)
        elif length > DRAINED * most:
            break
    if length > most:
        raise refused
    return b"".join(found)
