"""The browser demo's engine: which weights there are, one worker that answers, and a queue that has an end."""

import ctypes
import functools
import gc
import json
import logging
import sys
import threading
import time
from collections import OrderedDict, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image
from safetensors import SafetensorError, safe_open

from model.inference.answerer import Answerer, Interrupted, Options, PromptTooLong
from model.inference.attention_map import look, words
from model.messages import UserError
from scripts.demo.chat import Refused

MOST_WAITING = 8  # jobs behind the one that runs
MOST_SECONDS = 120.0  # of the machine for a job
MOST_UNSEEN = 10.0  # seconds after which a job whose page is gone is given up
MOST_PROMPT = 4096  # tokens
MOST_NEW = 1024  # tokens
MOST_LOADED = 2  # models in memory
IDLE = 20.0  # seconds without a job until memory is tidied
SHOWN_PARTS = 3  # of a data file's path: quickstart/data/sft.jsonl
STAGES = ("sft_vlm", "pretrain_vlm")  # in the order in which they are offered; what is none of them comes last
log = logging.getLogger("web_demo")


@dataclass(frozen=True)
class Weight:
    path: Path
    changed: int  # nanoseconds, so that weights that were trained anew are loaded anew
    stage: str
    image_size: int | None  # pixels per side; None: a decoder without eyes
    data: str = ""  # what it was trained on, steps, validation loss and tower: as the file says, "" where it does not
    steps: str = ""
    val_loss: str = ""
    tower: str = ""


def find_weights(folders: Sequence[Path]) -> list[Weight]:
    """The weights of these folders and of the folders in them: folder after folder, the most finished first.

    A page chooses from this list and nothing else, so no name that comes from a browser is ever a path.
    """
    found: dict[Path, Weight] = {}
    for folder in folders:
        paths = [path.resolve() for form in ("*.safetensors", "*/*.safetensors") for path in folder.glob(form)]
        here = [_weight(path, path.stat().st_mtime_ns) for path in paths if path.is_file()]
        found |= {w.path: w for w in sorted(filter(None, here), key=_how_finished) if w.path not in found}
    return list(found.values())


def _how_finished(weight: Weight) -> tuple:
    stage = STAGES.index(weight.stage) if weight.stage in STAGES else len(STAGES)
    return weight.image_size is None, stage, weight.path.stem.endswith("_best"), -weight.changed


@functools.lru_cache(maxsize=256)
def _weight(path: Path, changed: int) -> Weight | None:
    """None: a file of tensors, but not a model of this project."""
    try:
        with safe_open(path, framework="pt") as file:
            facts = file.metadata() or {}
        config, stage = json.loads(facts.get("config", "null")), json.loads(facts.get("stage_config", "{}"))
    except (SafetensorError, OSError, ValueError):
        return None
    if not isinstance(config, dict) or "hidden_size" not in config:
        return None
    data = stage.get("data_path", "") if isinstance(stage, dict) else ""
    return Weight(
        path, changed, facts.get("stage", ""), (config.get("vision_config") or {}).get("image_size"),
        data="/".join(Path(str(data)).parts[-SHOWN_PARTS:]), steps=facts.get("step", ""),
        val_loss=facts.get("val_loss", ""), tower=Path(str(config.get("vision_source") or "")).name,
    )  # fmt: skip


class Job:
    """Something that waits for the worker, runs, or is over. The page reads it while the worker writes."""

    def __init__(self, work: Callable[["Job"], object], seconds: float = MOST_SECONDS, unseen: float = MOST_UNSEEN):
        self.work, self.seconds, self.unseen = work, seconds, unseen
        self.text = ""  # of the answer so far
        self.result: object = None
        self.failure = ""  # a key of scripts.demo.words
        self.over = threading.Event()
        self._asked_to_stop = threading.Event()
        self._started: float | None = None
        self._seen = time.monotonic()

    def seen(self) -> None:
        """The page says that somebody is still there."""
        self._seen = time.monotonic()

    def stop(self) -> None:
        self._asked_to_stop.set()

    @property
    def out_of_time(self) -> bool:
        return self._started is not None and time.monotonic() - self._started > self.seconds

    def stopped(self) -> bool:
        """True when it is to end: asked to, out of time, or nobody is there any more."""
        return self._asked_to_stop.is_set() or self.out_of_time or time.monotonic() - self._seen > self.unseen

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
            self.failure = "out_of_time" if self.out_of_time and getattr(self.result, "stopped", False) else ""
        except Interrupted as error:
            self.result, self.failure = error.answer, "broke_off"
            log.warning("an answer broke off: %s", _in_a_line(error.__cause__))
        except Refused as error:
            self.failure = error.key
        except Exception as error:  # whatever it was, the next in the queue gets its turn
            self.failure = "broke_off"
            log.warning("a request failed: %s", _in_a_line(error))
        finally:
            self.over.set()


def _in_a_line(error: BaseException | None) -> str:
    text = "".join(character if character.isprintable() else " " for character in str(error))
    return f"{type(error).__name__}: {text[:300]}"


class Engine:
    """One worker for all sessions: one answer at a time, the others wait in order, at most MOST_WAITING of them."""

    def __init__(self, vision_model: str | None = None, device: str = "auto"):
        self.vision_model, self.device = vision_model, device
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
            if len(self._waiting) >= MOST_WAITING:
                raise Refused("busy", waiting=MOST_WAITING)
            self._waiting.append(job)
            self._changed.notify()
        return job

    def place(self, job: Job) -> int:
        """How many wait in front of it; 0 when it is next or runs."""
        with self._changed:
            return self._waiting.index(job) if job in self._waiting else 0

    def ask(self, weight: Weight, messages: Sequence[dict], pictures: Sequence[Image.Image], options: Options) -> Job:
        """An answer: the job's result is an Answer, its text grows. Raises Refused where too many wait."""

        def work(job: Job) -> object:
            answerer = self._answerer(weight)
            try:
                prompt = answerer.prompt(messages, pictures)
            except PromptTooLong as error:
                raise Refused("too_long") from error
            if len(prompt.ids) > MOST_PROMPT:
                raise Refused("too_long")

            def show(piece: str) -> None:
                job.text += piece

            return answerer.stream(prompt, options, show, job.stopped)

        return self.submit(Job(work))

    def look(
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
            while len(self._loaded) >= MOST_LOADED:
                self._loaded.popitem(last=False)
            try:
                self._loaded[weight] = Answerer.from_weight(weight.path, self.vision_model, self.device)
            except UserError as error:  # its sentence names files of this machine: for the terminal, not the page
                log.warning("weights cannot be used: %s", _in_a_line(error))
                raise Refused("bad_weights") from error
        self._loaded.move_to_end(weight)
        return self._loaded[weight]


def tidy_memory() -> None:
    """Let go of sessions that ended, while nobody waits: Streamlit is told not to (config.toml)."""
    gc.collect()
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:  # glibc keeps what was freed until it is asked
        trim(0)


def options_within(
    max_new_tokens: int, temperature: float, top_p: float, top_k: int, seed: int | None = None
) -> Options:
    """Options of an answer, brought within limits: what a page offers is none, its messages can be written by hand."""
    return Options(
        max_new_tokens=min(max(int(max_new_tokens), 1), MOST_NEW),
        temperature=min(max(0.0, float(temperature)), 2.0),  # in this order not-a-number becomes 0
        top_p=min(max(0.01, float(top_p)), 1.0),
        top_k=min(max(int(top_k), 0), 1000),
        seed=None if seed is None else int(seed) % 2**32,
    )
