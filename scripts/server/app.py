"""The routes: how a request's body is read, and how its answer is sent while somebody waits for it."""

import asyncio
import time
from collections.abc import AsyncIterator, Coroutine
from contextlib import asynccontextmanager
from typing import TypeVar

from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from model.messages import plain
from scripts.server.door import CHAT, GONE, HEALTH, METRICS, MODELS, Door
from scripts.server.errors import Refused, error_reply
from scripts.server.limits import MEGABYTE
from scripts.server.replies import chunks, completion
from scripts.server.service import Running, Service

Result = TypeVar("Result")


def build_app(service: Service) -> Starlette:
    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        yield
        await service.close()

    app = Starlette(
        routes=[
            Route(CHAT, chat, methods=["POST"]),
            Route(MODELS, models, methods=["GET"]),
            Route(MODELS + "/{name:path}", model, methods=["GET"]),
            Route(HEALTH, health, methods=["GET"]),
            Route(METRICS, metrics, methods=["GET"]),
        ],
        middleware=[Middleware(Door, service=service)],
        exception_handlers={Refused: refused, HTTPException: no_route, ClientDisconnect: gone, Exception: failed},
        lifespan=lifespan,
    )
    app.state.service = service
    return app


async def chat(request: Request) -> Response:
    service, arrived = request.app.state.service, time.perf_counter()
    if service.stopping or service.broken:
        raise service.unavailable()
    if service.full:
        raise service.busy()  # before anything of its body is read
    running = await ask(request, service, arrived)
    try:
        if not running.asked.stream:
            return JSONResponse(await unless_gone(request, completion(running)))
        await unless_gone(request, running.begun())
    except BaseException:
        running.gone = True
        raise
    return Stream(running)


class Stream(StreamingResponse):
    """Whoever leaves it ends the answer, also before its first event."""

    def __init__(self, running: Running):
        self.running = running
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx is to pass on every piece at once
        super().__init__(chunks(running), media_type="text/event-stream", headers=headers)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.running.gone = True


async def ask(request: Request, service: Service, arrived: float) -> Running:
    """Raises Refused, ClientDisconnect."""
    limits, body = service.limits, bytearray()
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() != "application/json":
        raise Refused("the content type must be application/json", status=415)
    length = request.headers.get("content-length", "0")
    too_large = Refused(f"the body has more than {limits.body_bytes // MEGABYTE} MB: send fewer or smaller pictures",
                        status=413)  # fmt: skip
    if not length.isdecimal() or int(length) > limits.body_bytes:
        raise too_large
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for piece in request.stream():
                body += piece
                service.held_bytes += len(piece)
                if len(body) > limits.body_bytes:
                    raise too_large
                if service.held_bytes > limits.bodies_bytes:
                    raise service.busy()
        return await service.ask(body, arrived)
    except TimeoutError:
        raise Refused(f"the body did not come within {limits.body_seconds:g} seconds: send less at once", status=408) \
            from None  # fmt: skip
    finally:
        service.held_bytes -= len(body)


async def unless_gone(request: Request, work: Coroutine[None, None, Result]) -> Result:
    """What the work returns or raises. Raises ClientDisconnect as soon as nobody waits for it any more."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    working, leaving = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientDisconnect
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


def model_object(service: Service) -> dict:
    """image_size, resample and tiles, which OpenAI has not: pixels a side that the model sees, null without eyes,
    Pillow's number of the filter that makes a picture so large, and into how many of these it is cut at most."""
    processor, sees = service.answerer.processor, service.answerer.reader.sees
    return {"id": service.settings.name, "object": "model", "created": service.started, "owned_by": "minimind-vlm",
            "image_size": processor.image_size if sees else None, "resample": processor.resample,
            "tiles": processor.sight.tiles}  # fmt: skip


async def models(request: Request) -> Response:
    return JSONResponse({"object": "list", "data": [model_object(request.app.state.service)]})


async def model(request: Request) -> Response:
    service, name = request.app.state.service, request.path_params["name"]
    if name != service.settings.name:
        raise Refused(f"there is no model {name[:80]!r}: this server has {service.settings.name!r}", status=404)
    return JSONResponse(model_object(service))


async def health(request: Request) -> Response:
    service = request.app.state.service
    status = "stopping" if service.stopping else "broken" if service.broken else "ok"
    return JSONResponse({"status": status, "model": service.settings.name}, 200 if status == "ok" else 503)


async def metrics(request: Request) -> Response:
    return Response(request.app.state.service.metrics.text(), media_type="text/plain; version=0.0.4")


async def refused(_request: Request, error: Refused) -> Response:
    return error_reply(error)


async def no_route(request: Request, error: HTTPException) -> Response:
    paths = ", ".join((CHAT, MODELS, HEALTH, METRICS))
    return error_reply(Refused(f"{request.method} {plain(request.url.path)[:100]} is nothing that this server does: "
                              f"it has {paths}", status=error.status_code))  # fmt: skip


async def gone(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=GONE)


async def failed(_request: Request, error: Exception) -> Response:
    """A mistake of ours; uvicorn logs its traceback."""
    return error_reply(Refused("the server made a mistake, which stands in its log", status=500))
