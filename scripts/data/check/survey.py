"""A look at every sample of a data file, by several processes: what training does with it, and what is in it.

The samples stay where they are: a process is told their numbers, and gives a Look for each and the Facts of their
pictures, in the order of the file however many processes there are.
"""

import hashlib
import json
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dataset.check import fitted, render_whole
from dataset.samples import BadSample, Rejected, Sample
from model.files import file_sha256
from model.messages import UserError
from model.processing import IMAGE_TAG, VLMProcessor
from scripts.data.check.lookalikes import thumbnail
from scripts.data.check.writing import writing_systems

CHUNK = 128  # samples that a process is told at once
REMEMBERED = 1024  # pictures of which a process keeps the facts: questions about one picture are neighbours
DIGEST = 16  # bytes
ALIVE = 2.0  # seconds between a process's looks at whether its parent still lives


class Facts(NamedTuple):
    """Of a picture that could be decoded."""

    sha256: str  # of its file
    format: str
    width: int  # pixels, as its file has them
    height: int
    thumbnail: bytes  # uint8 [16, 16, 3], see scripts.data.check.lookalikes


class Look(NamedTuple):
    """One sample."""

    number: int
    where: str  # file:line
    rejected: Rejected | None = None  # why training leaves it out
    only_decoding: bool = False  # shows the fault: the header of its picture is sound
    tokens: int = 0  # before they are cut; 0 where it could not be rendered
    trained: int = 0  # of those within --max_seq_len
    lost: int = 0  # trained tokens behind it
    pictures: tuple[str, ...] = ()  # sha256 of each
    names: tuple[str, ...] = ()  # path of each, empty for one that is no file
    shows: int = 0  # pictures, also where they could not be opened
    writing: tuple[str, ...] = ()
    content: bytes = b""  # a digest of its text and its pictures
    questions: tuple[bytes, ...] = ()  # digests of each question with the pictures; none without pictures
    empty_answer: bool = False


@dataclass
class Surveyor:
    """What looks at samples, as training does, but that every picture is decoded to its end."""

    samples: Sequence[Sample]
    processor: VLMProcessor
    max_seq_len: int
    _facts: dict[str, Facts] = field(default_factory=dict, init=False)  # by path, or sha256 of the bytes

    def look_at(self, numbers: range) -> tuple[list[Look], dict[str, Facts]]:
        """Samples, and the facts of their pictures by sha256."""
        facts: dict[str, Facts] = {}
        return [self._look(number, facts) for number in numbers], facts

    def _look(self, number: int, facts: dict[str, Facts]) -> Look:
        look = Look(number, self.samples.where(number))
        opening = False
        try:
            sample = self.samples[number]
            whole = render_whole(sample, self.processor)
            look = look._replace(tokens=len(whole), shows=len(sample.pictures))
            kept = fitted(whole, sample.where, self.max_seq_len)
            opening = True
            shown = [self._facts_of(sample, place) for place in range(len(sample.pictures))]
        except BadSample as error:
            return look._replace(rejected=error.rejected, only_decoding=opening and _headers_are_sound(sample))
        facts |= {fact.sha256: fact for fact in shown}
        trained = int(kept.trained.sum())
        return look._replace(
            trained=trained,
            lost=int(whole.trained.sum()) - trained,
            names=tuple(str(picture) if isinstance(picture, Path) else "" for picture in sample.pictures),
            **_of_text(sample, tuple(fact.sha256 for fact in shown)),
        )

    def _facts_of(self, sample: Sample, place: int) -> Facts:
        """Raises BadSample where the picture cannot be decoded."""
        source = sample.pictures[place]
        name = hashlib.sha256(source).hexdigest() if isinstance(source, bytes) else str(source)
        if name not in self._facts:
            with sample.open_picture(place, decode=False) as header:
                kind, width, height = header.format or "video", header.width, header.height
            small = thumbnail(sample.open_picture(place))
            sha256 = name if isinstance(source, bytes) else file_sha256(source)
            if len(self._facts) >= REMEMBERED:
                del self._facts[next(iter(self._facts))]
            self._facts[name] = Facts(sha256, kind, width, height, small)
        return self._facts[name]


def _headers_are_sound(sample: Sample) -> bool:
    try:
        sample.open_pictures(decode=False)
    except BadSample:
        return False
    return True


def _of_text(sample: Sample, pictures: tuple[str, ...]) -> dict:
    """Fields of a Look."""
    texts = [(m["role"], m["content"].replace(IMAGE_TAG, "").strip()) for m in sample.messages]
    asked = [text for role, text in texts if role == "user"] if pictures else ()
    return {
        "pictures": pictures,
        "writing": writing_systems(sample.text or "\n".join(text for _, text in texts)),
        "content": _digest(sample.text, sample.messages, pictures),
        "questions": tuple(_digest(question, pictures) for question in asked),
        "empty_answer": any(role == "assistant" and not text for role, text in texts),
    }


def _digest(*parts: object) -> bytes:
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=DIGEST).digest()


def survey(surveyor: Surveyor, workers: int) -> Iterator[tuple[list[Look], dict[str, Facts]]]:
    """Every sample of the file, CHUNK at a time, in order. Raises UserError where a process dies."""
    count = len(surveyor.samples)
    chunks = [range(start, min(start + CHUNK, count)) for start in range(0, count, CHUNK)]
    if workers == 1 or len(chunks) < 2:
        yield from map(surveyor.look_at, chunks)
        return
    # Forked processes share the lines' places with their parent; elsewhere each process reads those anew.
    context = multiprocessing.get_context("fork" if sys.platform == "linux" else "spawn")
    pool = ProcessPoolExecutor(min(workers, len(chunks)), context, _begin, (surveyor, os.getpid()))
    done = 0
    try:
        for result in pool.map(_look_at, chunks):
            done += CHUNK
            yield result
    except BrokenProcessPool as error:
        raise UserError(
            f"a process that looked at samples from {surveyor.samples.where(done)} on was ended, as by a "
            "system that ran out of memory: run again with fewer --workers; with 1 it happens at the sample itself"
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


_own: Surveyor | None = None  # of a process of the pool


def _begin(surveyor: Surveyor, parent: int) -> None:
    """A process of the pool starts."""
    global _own
    _own = surveyor
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends the pool
    threading.Thread(target=_end_with, args=(parent,), daemon=True).start()


def _end_with(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(ALIVE)
    os._exit(1)


def _look_at(numbers: range) -> tuple[list[Look], dict[str, Facts]]:
    return _own.look_at(numbers)
