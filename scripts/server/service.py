"""Who is answered: from a request's body to a prompt, to its place among the rows, to the pieces of its answer."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field

from PIL import Image

from model.inference.answerer import Answer, Answerer, Interrupted, Options
from model.inference.batcher import Batcher, Closed, Full
from model.inference.reader import Prompt
from model.messages import UserError, plain
from scripts.server.addresses import AllowedHosts
from scripts.server.conversation import read_conversation
from scripts.server.errors import Refused
from scripts.server.limits import Limits
from scripts.server.metrics import Metrics
from scripts.server.pictures import read_picture
from scripts.server.requests import parse

READERS = 4  # bodies that are parsed, with their pictures, at a time
RETRY = {"Retry-After": "1"}  # seconds
log = logging.getLogger("serve")


@dataclass(frozen=True)
class Settings:
    """What the flags of scripts/serve.py say."""

    name: str  # of the model, for clients
    limits: Limits = field(default_factory=Limits)
    key: str = ""  # "": none is asked for
    keep_order: bool = False  # of words and pictures
    hosts: AllowedHosts = field(default_factory=AllowedHosts)
    local: bool = True  # without a key: only who calls this machine localhost, or 127.0.0.1, is answered


@dataclass
class Asked:
    """What is kept of a request."""

    messages: list[dict]
    pictures: list[Image.Image]  # no larger than the model sees them
    options: Options
    stream: bool
    include_usage: bool


class Service:
    """The model behind the routes."""

    def __init__(self, answerer: Answerer, settings: Settings):
        self.answerer, self.settings, self.limits = answerer, settings, settings.limits
        self.batcher = Batcher(answerer, self.limits.rows, self.limits.waiting)
        self.metrics = Metrics(self.limits)
        self.metrics.running.set_function(lambda: self.batcher.rows)
        self.metrics.waiting.set_function(lambda: self.batcher.waiting)
        self.started = int(time.time())
        self.active = 0  # requests that are not over
        self.held_bytes = 0  # of bodies that are being read
        self.stopping = self.broken = False
        self._readers = ThreadPoolExecutor(READERS, "reading requests")

    @property
    def full(self) -> bool:
        return self.batcher.rows + self.batcher.waiting >= self.limits.rows + self.limits.waiting

    async def ask(self, body: bytes | bytearray, arrived: float) -> "Running":
        """arrived: on the clock of time.perf_counter. Raises Refused."""
        asked = await asyncio.get_running_loop().run_in_executor(self._readers, self.read, body)
        return Running(self, asked, arrived)

    def read(self, body: bytes | bytearray) -> Asked:
        """All that needs no turn, in a thread that may take its time. Raises Refused."""
        request = parse(body)
        if request.model not in (None, self.settings.name):
            raise Refused(f"is {request.model[:80]!r}: this server has {self.settings.name!r}", "model", 404)
        options = request.options(self.limits)
        conversation = read_conversation(request.messages, self.limits, self.settings.keep_order)
        if conversation.pictures and not self.answerer.reader.sees:
            where = conversation.pictures[0][1]
            raise Refused("is a picture, and this model is a decoder without eyes: ask without", where)
        reduced = self.answerer.processor.sight.reduced
        pictures = [
            reduced(read_picture(url, where, self.limits, self.settings.hosts)) for url, where in conversation.pictures
        ]
        usage = bool(request.stream_options and request.stream_options.include_usage)
        return Asked(conversation.messages, pictures, options, bool(request.stream), usage)

    def busy(self) -> Refused:
        message = f"too many are asking, {self.limits.waiting} wait already: ask again soon"
        return Refused(message, status=429, headers=RETRY)

    def unavailable(self) -> Refused:
        why = "is being stopped: ask again soon" if self.stopping else "answers no more: it must be started anew"
        return Refused(f"this server {why}", status=503, headers=RETRY)

    def stop(self, seconds: float) -> None:
        """Take no more; what runs or waits may end within so many seconds, then it is stopped. Returns at once."""
        self.stopping = True
        threading.Thread(target=self.batcher.close, args=(seconds,), name="stopping").start()

    async def close(self) -> None:
        await asyncio.to_thread(self.batcher.close, 0.0)
        self._readers.shutdown(wait=False, cancel_futures=True)


class Running:
    """A request on its way to an answer: what the batcher's thread does for it, and what the event loop hears of it."""

    def __init__(self, service: Service, asked: Asked, arrived: float):
        """Raises Refused where too many wait."""
        self.service, self.asked = service, asked
        self.gone = False  # whoever asked is
        self._deadline: float | None = None  # on the clock of time.monotonic, once its turn has come
        self._loop, self._events = asyncio.get_running_loop(), asyncio.Queue()
        self._before = time.perf_counter() - arrived  # seconds until the batcher has it
        try:
            self._future = service.batcher.submit(self._prompt, asked.options, self._tell, self._stopped)
        except Closed:
            service.broken = not service.stopping
            raise service.unavailable() from None
        except Full:
            raise service.busy() from None
        self._future.add_done_callback(self._over)

    async def begun(self) -> None:
        """Returns when its turn has come. Raises Refused where there will be no answer."""
        if await self._events.get() is None:
            self._events.put_nowait(None)
            self.answer()

    async def pieces(self) -> AsyncIterator[str]:
        """Of the answer, as it grows; how it ended says `answer`."""
        while (piece := await self._events.get()) is not None:
            yield piece

    def answer(self) -> Answer:
        """Once there are no more pieces. Raises Refused."""
        try:
            answer = self._future.result()
        except Refused:
            raise
        except Interrupted as error:
            log.warning("an answer broke off: %s", _in_a_line(error.__cause__))
            raise Refused("the answer broke off: ask again, or see the server's log", status=500) from None
        except Closed:
            raise self.service.unavailable() from None
        if self._ending(answer) == "server stopped":
            raise Refused("the server was stopped before the answer had ended: ask again", status=503, headers=RETRY)
        return answer

    # What follows is called by the batcher's thread.

    def _prompt(self) -> Prompt:
        self._deadline = time.monotonic() + self.service.limits.seconds
        messages, pictures = self.asked.messages, self.asked.pictures
        self.asked.messages = self.asked.pictures = []  # the prompt has what is needed of them
        try:
            prompt = self.service.answerer.prompt(messages, pictures)
        except UserError as error:
            raise Refused(f"make no prompt: {error}", "messages") from None
        most = self.service.limits.prompt_tokens
        if len(prompt.ids) > most:
            raise Refused(f"take {len(prompt.ids):,} tokens, more than {most:,}: leave older ones out", "messages")
        self._count_pictures(prompt)
        self._tell("")
        return prompt

    def _tell(self, piece: str | None) -> None:
        with suppress(RuntimeError):  # the loop has ended, and nobody listens
            self._loop.call_soon_threadsafe(self._events.put_nowait, piece)

    def _late(self) -> bool:
        return self._deadline is not None and time.monotonic() > self._deadline

    def _stopped(self) -> bool:
        return self.gone or self._late()

    def _over(self, future: Future[Answer]) -> None:
        metrics = self.service.metrics
        if error := future.exception():
            metrics.answers.labels("refused" if isinstance(error, Refused) else "error").inc()
        else:
            answer = future.result()
            metrics.count(answer, self._ending(answer))
            if answer.new_tokens:
                metrics.first.observe(self._before + answer.seconds_to_first)
        self._tell(None)

    def _ending(self, answer: Answer) -> str:
        if not answer.stopped:
            return answer.ending
        return "client gone" if self.gone else "out of time" if self._late() else "server stopped"

    def _count_pictures(self, prompt: Prompt) -> None:
        remembered = getattr(self.service.answerer.reader, "pictures", None)
        known = set(remembered.keys()) if remembered else set()
        for digest in prompt.digests if prompt.pictures else ():
            self.service.metrics.pictures.labels("yes" if digest in known else "no").inc()


def _in_a_line(error: BaseException | None) -> str:
    return f"{type(error).__name__}: {plain(' '.join(str(error).split()))[:300]}"
