"""What every request passes: may it come in, what is done with a body that nobody wants, what is counted and logged."""

import asyncio
import hmac
import logging
import time
from contextlib import suppress

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.messages import plain
from scripts.server.errors import Refused, error_reply
from scripts.server.service import Service

CHAT, MODELS, HEALTH, METRICS = "/v1/chat/completions", "/v1/models", "/health", "/metrics"
LOCAL = {"127.0.0.1", "localhost", "[::1]"}
GONE = 499  # nginx's number for a client that left; nobody reads it
DRAINED_BYTES, DRAINED_SECONDS = 256 * 1024**2, 5.0
log = logging.getLogger("serve")


class Door:
    def __init__(self, app: ASGIApp, service: Service):
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        exchange, started = Exchange(scope, receive, send), time.perf_counter()
        refusal = self._refusal(scope["path"], Headers(scope=scope))
        self.service.active += 1
        try:
            await (error_reply(refusal) if refusal else self.app)(scope, exchange.receive, exchange.send)
        except asyncio.CancelledError:  # the server has waited long enough, and ends
            if exchange.status == GONE:
                exchange.status = 503
                await error_reply(self.service.unavailable())(scope, receive, send)
        except Exception:
            exchange.status = 500  # said further out
            raise
        finally:
            self._count(scope, exchange.status, time.perf_counter() - started)
            self.service.active -= 1

    def _refusal(self, path: str, headers: Headers) -> Refused | None:
        settings = self.service.settings
        if path == HEALTH:
            return None
        if settings.key:
            given = headers.get("authorization", "")
            if not hmac.compare_digest(given.encode(), f"Bearer {settings.key}".encode()):
                how = "is not the right one" if given else "is missing"
                return Refused(f"the API key {how}: send `Authorization: Bearer KEY`, with what the server has in "
                               "MINIMIND_API_KEY", status=401, headers={"WWW-Authenticate": "Bearer"})  # fmt: skip
        # A page in a browser here may know a name of its own that means this machine (DNS rebinding).
        elif settings.local and _host(headers) not in LOCAL:
            return Refused("without a key only this machine is answered, as 127.0.0.1 or localhost: set "
                           "MINIMIND_API_KEY, or start the server with --no_key", status=401)  # fmt: skip
        return None

    def _count(self, scope: Scope, status: int, seconds: float) -> None:
        path = scope["path"] if scope["path"] in (CHAT, MODELS, HEALTH, METRICS) else "other"
        self.service.metrics.requests.labels(path, status).inc()
        if path == CHAT:
            self.service.metrics.duration.observe(seconds)
        if path not in (HEALTH, METRICS):
            log.info("%s %s %d %.2f s", scope["method"], plain(scope["path"])[:100], status, seconds)


class Exchange:
    """A request and its reply.

    Most clients read nothing until they have sent all: were the connection closed under them, they would report a
    broken pipe, and never why. So a refusal is sent at once, and then what still comes is thrown away for a while.
    """

    def __init__(self, scope: Scope, receive: Receive, send: Send):
        self.status = GONE
        self._receive, self._send = receive, send
        headers = Headers(scope=scope)
        self._body_over = "transfer-encoding" not in headers and headers.get("content-length", "0") == "0"

    async def receive(self) -> Message:
        message = await self._receive()
        self._body_over = self._body_over or not message.get("more_body")
        return message

    async def send(self, message: Message) -> None:
        unwanted = self.status >= 400 and not self._body_over
        if message["type"] == "http.response.start":
            self.status = message["status"]
            if self.status >= 400 and not self._body_over:
                message["headers"] = [*message["headers"], (b"connection", b"close")]
        elif unwanted and not message.get("more_body"):
            await self._send({**message, "more_body": True})
            with suppress(TimeoutError):
                async with asyncio.timeout(DRAINED_SECONDS):
                    await self._drain()
            message = {"type": "http.response.body"}
        await self._send(message)

    async def _drain(self) -> None:
        left = DRAINED_BYTES
        while left > 0 and not self._body_over:
            left -= len((await self.receive()).get("body", b""))


def _host(headers: Headers) -> str:
    host = headers.get("host", "")
    return host if host.endswith("]") else host.rpartition(":")[0] or host
