"""The browser demo's engine: one worker that answers for all tabs, and a queue that has an end."""

import ctypes
import gc
import logging
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence

from PIL import Image

from model.inference.answerer import Answerer, Interrupted, Options, PromptTooLong
from model.inference.attention_map import look, words
from model.messages import UserError, plain
from scripts.demo import limits
from scripts.demo.limits import Refused
from scripts.demo.weights import Weight

MAX_LOADED = 2  # models in memory
IDLE = 20.0  # seconds without a job until memory is tidied
log = logging.getLogger("web_demo")


class Job:
    """A request that waits for the worker, runs, or is over. The page reads it while the worker writes."""

    def __init__(self, work: Callable[["Job"], object]):
        self.work = work
        self.seconds, self.unseen = limits.MAX_SECONDS, limits.MAX_SECONDS_UNSEEN
        self.text = ""  # of the answer so far
        self.result: object = None
        self.failure = ""  # a key of scripts.demo.text
        self.over = threading.Event()
        self._asked_to_stop = False
        self._started: float | None = None
        self._seen = time.monotonic()

    def seen(self) -> None:
        """The page says that somebody is still there."""
        self._seen = time.monotonic()

    def stop(self) -> None:
        self._asked_to_stop = True

    @property
    def out_of_time(self) -> bool:
        return self._started is not None and time.monotonic() - self._started > self.seconds

    def stopped(self) -> bool:
        """True when it is to end: asked to, out of time, or nobody is there any more."""
        return self._asked_to_stop or self.out_of_time or time.monotonic() - self._seen > self.unseen

    def give_up(self) -> None:
        self.failure = "stopped_waiting"
        self.over.set()

    def run(self) -> None:
        """Never raises, and always ends with `over` set, whatever the work does."""
        if self.stopped():
            return self.give_up()
        self._started = time.monotonic()
        try:
            self.result = self.work(self)
            if self.out_of_time and getattr(self.result, "stopped", False):
                self.failure = "out_of_time"
        except Interrupted as error:
            self.result, self.failure = error.answer, "broke_off"
            log.warning("an answer broke off: %s", in_a_line(error.__cause__))
        except PromptTooLong:
            self.failure = "too_long"
        except Refused as error:
            self.failure = error.key
        except Exception as error:  # whatever it was, the next in the queue gets its turn
            self.failure = "broke_off"
            log.warning("a request failed: %s", in_a_line(error))
        finally:
            self.over.set()


def in_a_line(said: BaseException | str | None) -> str:
    """For the terminal: an error, or what a stranger wrote."""
    words = plain(" ".join(str(said).split()))[:300]
    return words if isinstance(said, str) else f"{type(said).__name__}: {words}"


class Engine:
    """One worker for all tabs: one answer at a time, the others wait in order, at most limits.MAX_WAITING of them."""

    def __init__(self, vision_model: str | None = None, device: str = "auto", window: int | None = None):
        """window: tokens of a conversation that are read, as Answerer.keep_within takes it; None: all."""
        self.vision_model, self.device, self.window = vision_model, device, window
        self._waiting: deque[Job] = deque()
        self._changed = threading.Condition()
        self._loaded: OrderedDict[Weight, Answerer] = OrderedDict()  # the worker's own
        threading.Thread(target=self._work, name="web_demo worker", daemon=True).start()

    def submit(self, job: Job) -> Job:
        """Raises Refused where too many wait already."""
        with self._changed:
            for gone in [waiting for waiting in self._waiting if waiting.stopped()]:
                self._waiting.remove(gone)
                gone.give_up()
            if len(self._waiting) >= limits.MAX_WAITING:
                raise Refused("busy")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def ahead_of(self, job: Job) -> int:
        """How many wait in front of it; 0 when it is next or runs."""
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else 0

    def ask(self, weight: Weight, messages: Sequence[dict], pictures: Sequence[Image.Image], options: Options) -> Job:
        """An answer: the job's result is an Answer, its text grows. Raises Refused where too many wait."""

        def work(job: Job) -> object:
            answerer = self._answerer(weight)
            prompt = answerer.prompt(messages, pictures)
            if len(prompt.ids) > limits.MAX_PROMPT_TOKENS:
                raise Refused("too_long")

            def show(piece: str) -> None:
                job.text += piece

            return answerer.stream(prompt, options, show, job.stopped)

        return self.submit(Job(work))

    def map_attention(
        self, weight: Weight, messages: Sequence[dict], pictures: Sequence[Image.Image], token_ids: Sequence[int]
    ) -> Job:
        """Where an answer looked: the job's result is (Looked, the answer's words). Raises Refused as ask does."""

        def work(job: Job) -> object:
            answerer = self._answerer(weight)
            looked = look(answerer.model, answerer.prompt(messages, pictures), token_ids)
            return looked, words(answerer.processor.tokenizer, token_ids)

        return self.submit(Job(work))

    def _work(self) -> None:
        while True:
            with self._changed:
                if not self._waiting:
                    self._changed.wait(IDLE)
                job = self._waiting.popleft() if self._waiting else None
            if job is None:
                tidy_memory()
                continue
            job.run()
            del job  # or it would keep its pictures until the next one comes

    def _answerer(self, weight: Weight) -> Answerer:
        """The model of these weights, loaded where it is not yet. The worker alone calls this."""
        if weight not in self._loaded:
            while len(self._loaded) >= MAX_LOADED:
                self._loaded.popitem(last=False)
            try:
                answerer = Answerer.from_weight(weight.path, self.vision_model, self.device)
                self._loaded[weight] = answerer.keep_within(self.window)
            except UserError as error:  # its sentence names files of this machine: for the terminal, not the page
                log.warning("weights cannot be used: %s", in_a_line(error))
                raise Refused("bad_weights") from error
        self._loaded.move_to_end(weight)
        return self._loaded[weight]


def tidy_memory() -> None:
    """Let go of sessions that ended, while nobody waits: Streamlit is told not to (config.toml)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc keeps what was freed until it is asked
        trim(0)
