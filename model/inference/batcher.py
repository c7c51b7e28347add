"""Answers for many who ask when they like: all take each decoding step together, a new one joins at the next token.

A step reads the decoder's weights once for all rows, and a prompt's first pass is arithmetic that no row shares. So
prompts are read between two steps, in the order of asking, for READING seconds at a time or one prompt if that takes
longer: many short ones that arrive together begin together, and whoever is being answered waits for one picture at
most. Pictures and beginnings that one prompt read are remembered for the next: the same new picture of several who
wait passes the tower once.
"""

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import dataclass

import torch

from model.inference.answerer import Answerer
from model.inference.reader import Prompt
from model.inference.rows import Answer, Draft, Interrupted, Rows
from model.inference.sampling import Options
from model.messages import counted

READING = 0.1  # seconds between two steps that prompts may take, so that nobody's text stands still for long
PATIENCE = 5.0  # seconds that `close` waits for a step or a prompt to end that has begun


class Full(RuntimeError):
    """Too many wait already."""


class Closed(Full):
    """No more is taken."""


@dataclass(eq=False)
class _Request:
    prompt: Prompt | Callable[[], Prompt]
    options: Options
    show: Callable[[str], None] | None
    stopped: Callable[[], bool]
    asked: float  # on the clock of time.perf_counter
    future: Future
    draft: Draft | None = None  # once it is a row


class Batcher:
    """One thread that owns all rows; any thread may submit. transformers' stock models join in the same way."""

    def __init__(self, answerer: Answerer, most_rows: int = 16, most_waiting: int = 64):
        """most_rows: answers that grow at once; most_waiting: requests beyond them until Full is raised."""
        self.answerer, self.most_rows, self.most_waiting = answerer, most_rows, most_waiting
        self._changed = threading.Condition()
        self._waiting: deque[_Request] = deque()
        self._running: list[_Request] = []  # the worker's own
        self._ends: float | None = None  # when what still runs is stopped, once `close` was called
        self._worker = threading.Thread(target=self._work, name="batcher", daemon=True)
        self._worker.start()
        atexit.register(self.close, 0.0)  # a thread that is cut off in the middle of a product aborts the process

    @property
    def rows(self) -> int:
        """How many answers grow."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """How many requests wait for a row."""
        return len(self._waiting)

    def submit(
        self,
        prompt: Prompt | Callable[[], Prompt],
        options: Options,
        show: Callable[[str], None] | None = None,
        stopped: Callable[[], bool] = lambda: False,
    ) -> Future[Answer]:
        """The answer that Answerer.stream gives, by and by; its seconds count from here.

        prompt: or what makes it; the worker then does that when its turn comes, and everybody waits for it.
        show, stopped: as for Answerer.stream, called by the worker: let them take no time. `stopped` is asked while it
            waits, too: the answer is empty then.

        The future may be cancelled while it waits. It raises what `prompt` raised, or Interrupted as `stream` does; an
        error of one request leaves the others alone, one in a step that all take ends all of them.

        Raises:
            Full: most_rows run and most_waiting wait; Closed: `close` was called.
        """
        request = _Request(prompt, options, show, stopped, time.perf_counter(), Future())
        with self._changed:
            if self._ends is not None:
                raise Closed("this takes no more requests: it is being closed")
            if len(self._waiting) + len(self._running) >= self.most_rows + self.most_waiting:
                raise Full(f"{counted(len(self._waiting), 'requests')} wait already: ask again in a moment")
            self._waiting.append(request)
            self._changed.notify()
        return request.future

    def close(self, seconds: float) -> None:
        """Take no more requests; those that run or wait may end within so many seconds, then they are stopped."""
        with self._changed:
            self._ends = time.monotonic() + seconds
            self._changed.notify()
        self._worker.join(max(0.0, seconds) + PATIENCE)
        atexit.unregister(self.close)

    @torch.inference_mode()
    def _work(self) -> None:
        rows = Rows(self.answerer.reader)
        try:
            while self._something_to_do():
                self._begin_some(rows)
                if rows:
                    self._step(rows)
        finally:  # whatever ended it, nobody is left waiting
            with self._changed:
                self._ends = self._ends or 0.0
            for request in [*self._running, *self._waiting]:
                if not request.future.done():
                    request.future.set_exception(Closed("the thread that answers has ended"))

    def _something_to_do(self) -> bool:
        """Waits until there is. False where nothing will come any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._running or self._waiting or self._ends is not None)
            return bool(self._running or self._waiting)

    def _too_late(self) -> bool:
        return self._ends is not None and time.monotonic() >= self._ends

    def _drop_the_stopped(self) -> None:
        """Requests that nobody waits for any more leave the queue."""
        with self._changed:
            waiting = list(self._waiting)
        for request in waiting:
            try:
                stopped, error = self._too_late() or request.stopped(), None
            except Exception as caught:
                stopped, error = True, caught
            if not stopped and not request.future.cancelled():
                continue
            with self._changed:
                self._waiting.remove(request)
            if not request.future.set_running_or_notify_cancel():
                continue
            if error:
                request.future.set_exception(error)
            else:
                request.future.set_result(Answer("", (), 0, 0, 0.0, 0.0, "stopped"))

    def _begin_some(self, rows: Rows) -> None:
        until = time.monotonic() + READING
        while True:
            self._drop_the_stopped()
            if len(rows) >= self.most_rows or not self._waiting:
                return
            with self._changed:
                request = self._waiting.popleft()
                self._running.append(request)
            if request.future.set_running_or_notify_cancel():
                self._begin(request, rows)
            else:
                self._running.remove(request)
            if time.monotonic() >= until:
                return

    def _begin(self, request: _Request, rows: Rows) -> None:
        """Never raises: an error is that of the request."""
        try:
            prompt = request.prompt() if callable(request.prompt) else request.prompt
        except Exception as error:
            self._running.remove(request)
            request.future.set_exception(error)
            return
        stopped = request.stopped  # by itself: a draft that knew its request would keep its pictures for longer
        draft = self.answerer.draft(prompt, request.options, request.show, lambda: self._too_late() or stopped())
        draft.started = request.asked - (0.0 if callable(request.prompt) else prompt.seconds)
        request.draft = draft
        try:
            rows.join([draft])
        except Exception as error:
            draft.fail(error)
        self._answer_those_over()

    def _step(self, rows: Rows) -> None:
        """Never raises: an error is that of all who took the step."""
        try:
            rows.step()
        except Exception as error:
            for draft in rows.drafts:
                draft.fail(error)
            rows.clear()
        self._answer_those_over()

    def _answer_those_over(self) -> None:
        for request in [request for request in self._running if request.draft.ending]:
            self._running.remove(request)
            try:
                request.future.set_result(request.draft.answer())
            except Interrupted as error:
                request.future.set_exception(error)
