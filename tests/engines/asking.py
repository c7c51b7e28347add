"""Requests for the load test: sound ones with the text that came of them, and hostile ones with their status."""

import base64
import os
import socket
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from io import BytesIO
from pathlib import Path
from random import Random

import openai
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
PATIENCE = 600.0  # seconds for one request
SIDE = 224  # pixels


@dataclass(frozen=True)
class Ask:
    text: str
    picture: Path | bytes | None = None


@dataclass(frozen=True)
class Said:
    text: str
    tokens: int


@dataclass(frozen=True)
class Server:
    address: str
    name: str
    process: subprocess.Popen
    log_path: Path

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    def client(self) -> openai.OpenAI:
        return openai.OpenAI(base_url=self.address, api_key="none", max_retries=0, timeout=PATIENCE)


@contextmanager
def serve(weight: Path, dtype: str, scratch: Path) -> Iterator[Server]:
    command = [sys.executable, str(ROOT / "scripts/serve.py"), "--weight", str(weight), "--dtype", dtype, "--port", "0"]
    log_path = scratch / f"{time.monotonic()}.log"
    with log_path.open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True,
                                   env={**os.environ, "PYTHONPATH": str(ROOT)})  # fmt: skip
    try:
        words = process.stdout.readline().split()
        if len(words) < 3:
            raise RuntimeError(f"the server did not start: {log_path.read_text()[-2000:]}")
        yield Server(words[2], words[0], process, log_path)
    finally:
        process.terminate()
        process.wait(60)


def picture_url(picture: Path | bytes) -> str:
    content = picture if isinstance(picture, bytes) else _read(picture)
    return f"data:image/png;base64,{base64.b64encode(content).decode()}"


@cache
def _read(path: Path) -> bytes:
    return path.read_bytes()


@cache
def noise(seed: int) -> bytes:
    """A picture that nobody has seen."""
    file = BytesIO()
    Image.frombytes("RGB", (SIDE, SIDE), Random(seed).randbytes(3 * SIDE * SIDE)).save(file, "PNG", compress_level=1)
    return file.getvalue()


def request_of(ask: Ask, max_tokens: int) -> dict:
    content = [{"type": "text", "text": ask.text}]
    if ask.picture:
        content.insert(0, {"type": "image_url", "image_url": {"url": picture_url(ask.picture)}})
    return {"model": openai.omit, "messages": [{"role": "user", "content": content}], "max_tokens": max_tokens,
            "temperature": 0}  # fmt: skip


def send(client: openai.OpenAI, ask: Ask, max_tokens: int, stream: bool = False) -> Said:
    request = request_of(ask, max_tokens)
    if not stream:
        answer = client.chat.completions.create(**request)
        return Said(answer.choices[0].message.content, answer.usage.completion_tokens)
    chunks = list(client.chat.completions.create(**request, stream=True, stream_options={"include_usage": True}))
    text = "".join(choice.delta.content or "" for chunk in chunks for choice in chunk.choices)
    return Said(text, chunks[-1].usage.completion_tokens)


def first_token(client: openai.OpenAI, ask: Ask, max_tokens: int) -> float:
    """Seconds until the first text is there."""
    started, first = time.perf_counter(), None
    for chunk in client.chat.completions.create(**request_of(ask, max_tokens), stream=True):
        if first is None and chunk.choices[0].delta.content:
            first = time.perf_counter() - started
    return time.perf_counter() - started if first is None else first


# hostile


def status_of(work: Callable[[], object]) -> int:
    try:
        work()
        return 200
    except openai.RateLimitError:
        raise
    except openai.APIStatusError as error:
        return error.status_code


def bomb() -> bytes:
    """A PNG header that promises 30,000 x 30,000 pixels."""
    chunk = b"IHDR" + struct.pack(">IIBBBBB", 30000, 30000, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + struct.pack(">I", 13) + chunk + struct.pack(">I", zlib.crc32(chunk)) + bytes(200)


def _asked(ask: Ask, **more: object) -> Callable[[Server, openai.OpenAI], int]:
    return lambda _server, client: status_of(lambda: client.chat.completions.create(**request_of(ask, 8), **more))


def _stream_cut_off(_server: Server, client: openai.OpenAI) -> int:
    with client.chat.completions.create(**request_of(Ask("What do you see?"), 512), stream=True) as stream:
        next(stream)
    return 200


def _body_cut_off(server: Server, _client: openai.OpenAI) -> int:
    port = int(server.address.split(":")[2].split("/")[0])
    with socket.create_connection(("127.0.0.1", port), PATIENCE) as line:
        line.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\n"
                     b'Content-Length: 100000\r\n\r\n{"messages": [')  # fmt: skip
    return 0


HOSTILE: dict[str, Callable[[Server, openai.OpenAI], int]] = {
    "no picture": _asked(Ask("What?", b"no picture at all " * 100)),
    "bomb": _asked(Ask("What?", bomb())),
    "stream cut off": _stream_cut_off,
    "too long": _asked(Ask("word " * 10_000)),
    "unknown parameter": _asked(Ask("What?"), extra_body={"temperatur": 1}),
    "body cut off": _body_cut_off,
    "too large": _asked(Ask("x" * 70_000_000)),
}
