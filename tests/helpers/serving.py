"""Our server on a loopback port, in a thread of this process, and clients that speak plain HTTP to it."""

import base64
import http.client
import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import uvicorn
from PIL import Image

from helpers.data import encoded
from model.inference.answerer import Answerer
from scripts.serve import Server
from scripts.server.app import build_app
from scripts.server.service import Service, Settings

CHAT = "/v1/chat/completions"
PATIENCE = 20.0  # seconds


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    content: dict | str

    @property
    def text(self) -> str:
        return self.content["choices"][0]["message"]["content"]

    @property
    def error(self) -> str:
        return self.content["error"]["message"]


@dataclass(frozen=True)
class Served:
    port: int
    service: Service
    server: Server

    def connect(self) -> http.client.HTTPConnection:
        return http.client.HTTPConnection("127.0.0.1", self.port, timeout=PATIENCE)

    def request(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        connection = self.connect()
        connection.request(method, path, body, {name.replace("_", "-"): value for name, value in headers.items()})
        return reply_of(connection.getresponse())

    def get(self, path: str, **headers: str) -> Reply:
        return self.request("GET", path, **headers)

    def post(self, body: dict | bytes, **headers: str) -> Reply:
        content = body if isinstance(body, bytes) else json.dumps(body).encode()
        return self.request("POST", CHAT, content, **{"Content_Type": "application/json", **headers})

    def ask(self, *content: dict | str, **parameters: object) -> Reply:
        """One question of a user."""
        return self.post(question(*content, **parameters))

    def stream(self, *content: dict | str, **parameters: object) -> Iterator[dict | str]:
        """Events as they come; the last is "[DONE]" where all went well."""
        connection = self.connect()
        body = json.dumps(question(*content, **parameters, stream=True)).encode()
        connection.request("POST", CHAT, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        assert answer.status == 200 and answer.headers["content-type"].startswith("text/event-stream"), answer.read()
        for line in answer:
            if line.strip():
                kind, _, content = line.decode().strip().partition(": ")
                assert kind == "data"
                yield content if content == "[DONE]" else json.loads(content)

    def send_head(self, length: int, more: str = "") -> socket.socket:
        """A connection over which a body of so many bytes is announced, and nothing of it sent."""
        line = socket.create_connection(("127.0.0.1", self.port), PATIENCE)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: {length}"
        line.sendall(f"{head}\r\n{more}\r\n".encode())
        return line

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").content.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(name))


def reply_of(answer: http.client.HTTPResponse) -> Reply:
    content = answer.read().decode()
    is_json = answer.headers.get("content-type", "").startswith("application/json")
    return Reply(answer.status, dict(answer.headers), json.loads(content) if is_json else content)


def question(*content: dict | str, **parameters: object) -> dict:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return {"messages": [{"role": "user", "content": parts}], **parameters}


def as_part(picture: Image.Image | bytes, kind: str = "PNG") -> dict:
    content = picture if isinstance(picture, bytes) else encoded(picture, kind)
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{base64.b64encode(content).decode()}"}}


@contextmanager
def serving(answerer: Answerer, stop_seconds: float = 5.0, **settings: object) -> Iterator[Served]:
    service = Service(answerer, Settings(**{"name": "tiny", **settings}))
    config = uvicorn.Config(
        build_app(service), log_config=None, access_log=False, ws="none", timeout_graceful_shutdown=1
    )
    server, listening = Server(config, service, stop_seconds), socket.create_server(("127.0.0.1", 0))
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
    thread.start()
    try:
        wait_until(lambda: server.started)
        yield Served(listening.getsockname()[1], service, server)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        service.batcher.close(0.0)
    assert not thread.is_alive()


def wait_until(condition, seconds: float = PATIENCE) -> None:
    until = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < until, "it did not come to that"
        time.sleep(0.005)


def slow_steps(answerer: Answerer, seconds: float, monkeypatch) -> None:
    """Every further token takes so long."""
    step = answerer.reader.step

    def slowly(*arguments: object) -> object:
        time.sleep(seconds)
        return step(*arguments)

    monkeypatch.setattr(answerer.reader, "step", slowly)
