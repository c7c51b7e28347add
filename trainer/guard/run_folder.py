"""The folder of a run: one writer at a time, and status.json, which says what the run is doing and how it ended."""

import contextlib
import json
import os
import socket
import time

from model.files import written_aside
from model.messages import UserError
from model.process_lock import ProcessLock
from trainer.config import StageConfig
from trainer.distributed import RanksLost, Runtime
from trainer.guard.signals import Stopped

LOCK, STATUS, FAILURES = "lock", "status.json", "failures.jsonl"
LAUNCHED = "launched"  # of a line of failures.jsonl: the failures before it are of earlier launches
EVERY = 5.0  # seconds between updates of status.json while all goes well


class Fatal(UserError):
    """What a restart would meet again; `state` is what status.json says then."""

    state = "fatal-input"


class RunFolder:
    """Held while a run writes: `with RunFolder(config, runtime) as folder`.

    Raises Fatal where the folder cannot be written, another process holds it, or a restart by torchrun would only
    repeat the failure before it. Rank 0 holds the lock and writes status.json; the lock is one of the process, so it
    ends with it, and processes that read data for it do not prolong it.
    """

    def __init__(self, config: StageConfig, runtime: Runtime):
        self.path, self.config, self.runtime = config.run_dir, config, runtime
        self.status: dict = {}
        self._lock: ProcessLock | None = None
        self._written = 0.0
        self._launch = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}:{os.getppid()}"
        self._restarts = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0))

    def __enter__(self) -> "RunFolder":
        refuse = self._refuse_to_repeat()
        if self.runtime.is_main:
            self._take()
            if not self._restarts and (self.path / FAILURES).is_file():
                self._note(LAUNCHED, None)  # in a container `launch` is the same every time
            self.status = {
                "state": "running", "stage": self.config.name, "step": 0, "total_steps": None, "epoch": 0.0,
                "samples_seen": 0, "samples_skipped": 0, "steps_skipped": 0, "last_checkpoint": None, "reason": None,
                "ranks": self.runtime.world_size, "restarts": self._restarts, "pid": os.getpid(),
                "host": socket.gethostname(), "started": time.time(),
            }  # fmt: skip
            self.update()
        if refuse:
            error = Fatal(refuse)
            self._end(error)
            raise error
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, _: object) -> None:
        self._end(error)

    def update(self, **values: object) -> None:
        """Change entries of status.json; on the other ranks nothing. A full disk does not stop a run here."""
        if not self.runtime.is_main:
            return
        self.status |= {**values, "updated": time.time()}
        self._written = time.monotonic()
        with contextlib.suppress(OSError), written_aside(self.path / STATUS, durable=False) as aside:
            aside.write_text(json.dumps(self.status, indent=1) + "\n")

    def update_seldom(self, **values: object) -> None:
        if time.monotonic() - self._written > EVERY:
            self.update(**values)

    # ---- one writer

    def _take(self) -> None:
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            (self.path / ".writable").write_text("")
            (self.path / ".writable").unlink()
            lock = ProcessLock(self.path / LOCK)
            taken = lock.acquire(f"process {os.getpid()} on {socket.gethostname()}")
        except OSError as error:
            raise Fatal(
                f"the run folder {self.path} cannot be written ({error.strerror}): give a --save_dir that can"
            ) from error
        if not taken:
            raise Fatal(
                f"the run folder {self.path} is in use by {lock.holder()}: wait for it, stop it, or give another "
                "--save_dir"
            )
        self._lock = lock

    def _end(self, error: BaseException | None) -> None:
        state, reason = _ending(error)
        failed = state.startswith("fatal") or state == "crashed"
        if failed and not isinstance(error, RanksLost):  # the rank that caused that tells its own story
            self._note(state, reason)
        if self._lock is not None:
            self.update(state=state, reason=reason)
            self._lock.release()
            self._lock = None

    # ---- failures that a restart would repeat

    def _note(self, state: str, reason: str | None) -> None:
        line = {"rank": self.runtime.rank, "state": state, "reason": reason, "step": self.status.get("step"),
                "launch": self._launch, "restarts": self._restarts, "time": time.time()}  # fmt: skip
        with contextlib.suppress(OSError), (self.path / FAILURES).open("a") as file:
            file.write(json.dumps(line) + "\n")

    def _refuse_to_repeat(self) -> str | None:
        """Why a restart by torchrun would fail as the attempt before did, None where it may help."""
        if not self._restarts or not (self.path / FAILURES).is_file():
            return None
        lines = [json.loads(line) for line in (self.path / FAILURES).read_text().splitlines() if line.endswith("}")]
        begun = max((number for number, line in enumerate(lines, 1) if line["state"] == LAUNCHED), default=0)
        seen = set()
        for line in (line for line in lines[begun:] if line["launch"] == self._launch):
            what = (line["rank"], line["reason"])
            if line["state"].startswith("fatal") or what in seen:
                return f"not tried again after rank {line['rank']} ended with: {line['reason']}"
            seen.add(what)
        return None


def _ending(error: BaseException | None) -> tuple[str, str | None]:
    """State and reason for status.json."""
    if error is None:
        return "done", None
    if isinstance(error, Stopped):
        return "stopped-resumable", str(error)
    if isinstance(error, RanksLost):
        return "crashed", str(error)
    if isinstance(error, UserError):
        return getattr(error, "state", "fatal-input"), str(error)
    return "crashed", f"{type(error).__name__}: {error}"
