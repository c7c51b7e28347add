"""Answers from a server that speaks OpenAI's protocol, such as scripts/serve.py, in the place of the demo's engine."""

import base64
import http.client
import json
import os
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from urllib.parse import urlsplit

from PIL import Image

from model.config import BICUBIC
from model.inference.answerer import Answer, Interrupted, Options
from model.inference.window import Forgotten
from model.messages import UserError
from model.views import MAX_TILES
from scripts.demo import limits
from scripts.demo.engine import Job, in_a_line, log
from scripts.demo.limits import Refused
from scripts.demo.weights import Weight

KEY = "MINIMIND_API_KEY"
SIDE = 224  # pixels of the squares that are sent where a server does not say what its model sees
SECONDS_TO_CONNECT, SECONDS_OF_LIST = 5.0, 60.0  # until a server is unreachable; that a list of models is believed
SECONDS_BETWEEN_LOOKS = 0.1  # at whether an answer is still wanted
LONGEST_LINE, LONGEST_REPLY, LONGEST_TEXT = 2**20, 2**20, 2**16  # bytes, bytes, characters that a server may send
REASONS = {401: "no_entry", 403: "no_entry", 413: "too_long", 429: "server_busy", 503: "server_busy"}


@dataclass
class Coming:
    """An answer while it comes."""

    started: float = field(default_factory=time.perf_counter)
    text: str = ""
    pieces: int = 0
    first: float = 0.0  # seconds to the first piece
    finish_reason: str = ""
    usage: dict = field(default_factory=dict)

    def add(self, event: dict) -> str:
        """The text that an event brings. Raises KeyError, TypeError, ... where it is none of OpenAI's."""
        if event.get("error"):
            raise RuntimeError(f"the server says: {event['error']}")
        self.usage = event.get("usage") or self.usage
        piece = ""
        for choice in event["choices"]:
            piece += choice["delta"].get("content") or ""
            self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if piece and not self.pieces:
            self.first = time.perf_counter() - self.started
        self.pieces, self.text = self.pieces + bool(piece), self.text + piece
        return piece

    def answer(self, ending: str) -> Answer:
        """token_ids stay empty: a server does not tell them. Without its count, each piece counts as a token."""
        new, prompt = (self.usage.get(name) for name in ("completion_tokens", "prompt_tokens"))
        new = new if isinstance(new, int) else self.pieces
        seconds = time.perf_counter() - self.started - self.first
        speed = max(new - 1, 0) / seconds if seconds else 0.0
        turns = self.usage.get("forgotten_turns")  # of our own servers with --context_window
        forgotten = Forgotten(turns if isinstance(turns, int) else 0)
        prompt = prompt if isinstance(prompt, int) else 0
        return Answer(self.text, (), prompt, new, self.first, speed, ending, forgotten=forgotten)


class Remote:
    """Asks a server, each question in a thread of its own: who waits for whom is the server's to say."""

    def __init__(self, address: str):
        """address: as http://127.0.0.1:8000, with or without /v1. The key is read from the environment.

        Raises:
            UserError: no address of that kind.
        """
        parts = urlsplit(address)
        try:
            usable = parts.scheme in ("http", "https") and parts.hostname and parts.port != 0 and not parts.username
        except ValueError:  # of the port
            usable = False
        if not usable or parts.query or parts.fragment:
            raise UserError(f"--server {address}: an address is like http://127.0.0.1:8000; a key goes into {KEY}")
        self.address = f"{parts.scheme}://{parts.netloc}"
        self._secure, self._host, self._port = parts.scheme == "https", parts.hostname, parts.port
        self._path = parts.path.rstrip("/").removesuffix("/v1") + "/v1"
        self._places = threading.BoundedSemaphore(limits.MAX_WAITING)
        self._models: list[Weight] = []
        self._listed = float("-inf")  # on the clock of time.monotonic

    def models(self) -> list[Weight]:
        """What the server offers. Raises Refused where it cannot be asked and never could."""
        if time.monotonic() - self._listed > SECONDS_OF_LIST:
            try:
                self._models = self._list()
            except Refused:
                if not self._models:
                    raise
            self._listed = time.monotonic()
        return self._models

    def ahead_of(self, job: Job) -> int:
        return 0

    def ask(self, weight: Weight, messages: Sequence[dict], pictures: Sequence[Image.Image], options: Options) -> Job:
        """As Engine.ask: the job's result is an Answer, its text grows. Raises Refused where too many wait."""
        if not self._places.acquire(blocking=False):
            raise Refused("server_busy")
        body = request(str(weight.path), messages, pictures, options)
        job = Job(lambda job: self._answer(body, job))

        def run() -> None:
            try:
                job.run()
            finally:
                self._places.release()

        threading.Thread(target=run, name="web_demo question", daemon=True).start()
        return job

    def _list(self) -> list[Weight]:
        connection = self._connection()
        try:
            content = json.loads(self._send(connection, "GET", "/models").read(LONGEST_REPLY))
            return [_as_weight(model, self.address) for model in content["data"]]
        except (OSError, http.client.HTTPException) as error:
            log.warning("%s: %s", self.address, in_a_line(error))
            raise Refused("unreachable") from error
        except (ValueError, KeyError, TypeError) as error:
            if isinstance(error, Refused):
                raise
            log.warning("%s: its list of models cannot be read: %s", self.address, in_a_line(error))
            raise Refused("server_refused") from error
        finally:
            connection.close()

    def _answer(self, body: bytes, job: Job) -> Answer:
        coming, connection = Coming(), self._connection()
        try:
            connection.connect()
            line = connection.sock  # http.client forgets it where the reply is to be the last
            line.settimeout(limits.MAX_SECONDS)
            threading.Thread(target=_hang_up, args=(line, job), name="web_demo hang up", daemon=True).start()
            for event in _events(self._send(connection, "POST", "/chat/completions", body)):
                job.text += coming.add(event)
                if job.stopped() or len(coming.text) > LONGEST_TEXT:
                    return coming.answer("stopped")
            if not coming.finish_reason:
                raise RuntimeError("the server ended before the answer did")
        except Refused:
            raise
        except Exception as error:
            if job.stopped():
                return coming.answer("stopped")
            if isinstance(error, (OSError, http.client.HTTPException)) and not coming.pieces:
                log.warning("%s: %s", self.address, in_a_line(error))
                raise Refused("unreachable") from error
            raise Interrupted(coming.answer("error"), error) from error
        finally:
            connection.close()
        return coming.answer("length" if coming.finish_reason == "length" else "end")

    def _connection(self) -> http.client.HTTPConnection:
        kind = http.client.HTTPSConnection if self._secure else http.client.HTTPConnection
        return kind(self._host, self._port, timeout=SECONDS_TO_CONNECT)

    def _send(
        self, connection: http.client.HTTPConnection, method: str, path: str, body: bytes | None = None
    ) -> http.client.HTTPResponse:
        """Raises Refused where the reply is not what was asked for."""
        key, headers = os.environ.get(KEY, "").strip(), {"Content-Type": "application/json"}
        if key:
            headers["Authorization"] = f"Bearer {key}"
        connection.request(method, self._path + path, body, headers)
        reply = connection.getresponse()
        if reply.status == 200:
            return reply
        content = reply.read(LONGEST_REPLY)
        log.warning("%s said %d: %s", self.address, reply.status, in_a_line(content.decode(errors="replace")))
        raise Refused(REASONS.get(reply.status) or ("too_long" if _too_long(content) else "server_refused"))


def request(model: str, messages: Sequence[dict], pictures: Sequence[Image.Image], options: Options) -> bytes:
    """The body. A question keeps the line break before it: where a server writes what it gets, training had one too."""
    rest = iter(pictures)
    content = {
        "model": model,
        "messages": [{**turn, "content": [_part(part, rest) for part in turn["content"]]} for turn in messages],
        "max_tokens": options.max_new_tokens, "temperature": options.temperature,
        "stream": True, "stream_options": {"include_usage": True},
    }  # fmt: skip
    if options.temperature:
        content["top_p"] = options.top_p
        content |= {"top_k": options.top_k} if options.top_k else {}  # none of OpenAI's: only where it is wanted
        content |= {"seed": options.seed} if options.seed is not None else {}
    return json.dumps(content).encode()


def _part(part: dict, pictures: Iterator[Image.Image]) -> dict:
    if part["type"] != "image":
        return part
    file = BytesIO()
    next(pictures).save(file, "PNG")
    return {
        "type": "image_url",
        "image_url": {"url": f"data:image/png;base64,{base64.b64encode(file.getvalue()).decode()}"},
    }


def _events(reply: http.client.HTTPResponse) -> Iterator[dict]:
    """What comes until the server says that it is done, or hangs up."""
    while line := reply.readline(LONGEST_LINE):
        name, _, content = line.decode().strip().partition(":")
        if name == "data" and content.strip() == "[DONE]":
            return
        if name == "data":
            yield json.loads(content)


def _hang_up(line: socket.socket, job: Job) -> None:
    """End a reply that nobody wants any more, even while nothing of it comes."""
    while not job.over.wait(SECONDS_BETWEEN_LOOKS):
        if job.stopped():
            with suppress(OSError):  # it is over already
                line.shutdown(socket.SHUT_RDWR)
            return


def _too_long(content: bytes) -> bool:
    """Whether a refusal is about a conversation that has become too long: ours names all messages, others a context."""
    try:
        error = json.loads(content)["error"]
        said = f"{error.get('code')} {error.get('type')} {error.get('message')}".lower()
        return error.get("param") == "messages" or "context" in said
    except (ValueError, KeyError, TypeError, AttributeError):
        return False


def _as_weight(model: dict, address: str) -> Weight:
    """A model of the list. Raises ValueError, KeyError or TypeError where it is none."""
    name, side = model["id"], model.get("image_size", SIDE)
    if not Path(name).name or side is not None and not 0 < side <= limits.SHOWN_SIDE:
        raise ValueError(f"a model has the name {name!r} and sees squares of {side} pixels")
    resample = Image.Resampling(model.get("resample", BICUBIC))
    tiles = model.get("tiles", 0)
    if not isinstance(tiles, int) or not 0 <= tiles <= MAX_TILES:
        raise ValueError(f"a model cuts pictures into {tiles} tiles")
    return Weight(Path(name), 0, "", side, resample=int(resample), tiles=tiles, frames=0, server=address)
