"""Ways to break a run: children that can be killed, calls that die, bytes that flip."""

import contextlib
import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import torch
from pyarrow import parquet
from safetensors.torch import load_file
from tqdm import tqdm

from helpers.data import write_jsonl
from helpers.runs import SPEEDS, tiny
from model import files
from model.process_lock import ProcessLock, is_held
from trainer import stage
from trainer.checkpoint import files as checkpoint
from trainer.checkpoint.files import checkpoints_in
from trainer.config import StageConfig
from trainer.distributed import Runtime
from trainer.train_llm import LLM

KILLED = 9  # exit status of a child that a fault ended


def small_run(folder: Path, **changes) -> StageConfig:
    """A decoder of a few thousand weights that learns 24 texts in 12 steps an epoch, with dropout."""
    path = folder / "texts.jsonl"
    if not path.exists():
        write_jsonl(path, [{"text": f"There are {n} cats and a dog" + " or two" * (n % 4)} for n in range(24)])
    settings = {"batch_size": 2, "dropout": 0.1, "save_interval": 2, "data_path": str(path), "val_samples": 0}
    return tiny(LLM, folder, folder, **{**settings, **changes})


def in_child(work: Callable[[], object], log: Path, kill_after: float | None = None) -> int:
    """Run `work` in a forked process; its exit status, or minus the signal that ended it.

    A process that has torch already costs a few milliseconds, where a new one would cost seconds.
    """
    child = start_child(work, log)
    deadline = time.monotonic() + (600 if kill_after is None else kill_after)
    while not (done := os.waitpid(child, os.WNOHANG))[0]:
        if time.monotonic() > deadline:
            os.kill(child, signal.SIGKILL)
            done = os.waitpid(child, 0)
            break
        time.sleep(0.002)
    return os.waitstatus_to_exitcode(done[1])


def start_child(work: Callable[[], object], log: Path) -> int:
    """The process number of a forked process that runs `work` in a session of its own, its words in `log`."""
    child = os.fork()
    if child == 0:
        os.setsid()
        torch.set_num_threads(1)  # makes torch's pool anew: a fork's may wait for threads that it has not
        tqdm.set_lock(
            threading.RLock()
        )  # its own is shared with forks: whoever is killed holding it stops all later ones
        descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(descriptor, 1)
        os.dup2(descriptor, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w", buffering=1), os.fdopen(2, "w", buffering=1)
        status = 70
        try:
            work()
            status = 0
        except SystemExit as stopped:
            print(stopped)
            status = stopped.code if isinstance(stopped.code, int) else 1
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(status)
    return child


def run_in_child(config: StageConfig, kill_after: float | None = None) -> int:
    return in_child(lambda: stage.run_stage(config), Path(config.save_dir).parent / "child.log", kill_after)


def start_ranks(config: StageConfig, world_size: int, at_step: Callable = lambda rank, step: None) -> list[int]:
    """Ranks of a run as forked processes, joined as torchrun would join them.

    at_step(rank, step) is called in each of them after every step, before the ranks agree on what to do next.
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    rendezvous = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(world_size)}
    original = Runtime.leave_step

    def rank(number: int) -> None:
        os.environ.update(rendezvous, RANK=str(number), LOCAL_RANK=str(number), LOCAL_WORLD_SIZE=str(world_size))

        def leave_step(self, step):
            original(self, step)
            at_step(number, step)

        Runtime.leave_step = leave_step
        stage.run_stage(config)

    log = Path(config.save_dir).parent
    return [start_child(lambda n=n: rank(n), log / f"rank_{n}.log") for n in range(world_size)]


def wait_for(children: list[int], seconds: float = 60.0) -> list[int]:
    """Exit statuses; what has not ended by then is killed and fails the test."""
    statuses, deadline = {}, time.monotonic() + seconds
    while len(statuses) < len(children):
        for child in set(children) - set(statuses):
            done, status = os.waitpid(child, os.WNOHANG)
            if done:
                statuses[child] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > deadline:
            for child in set(children) - set(statuses):
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
            raise AssertionError(f"still running after {seconds} s: {set(children) - set(statuses)}")
        time.sleep(0.01)
    return [statuses[child] for child in children]


def run_ranks(config: StageConfig, world_size: int, at_step: Callable = lambda rank, step: None) -> list[int]:
    return wait_for(start_ranks(config, world_size, at_step))


@contextlib.contextmanager
def held_by_another(path: Path) -> Iterator[None]:
    """The lock of this file, held by a process that shows no other sign of life."""

    def hold():
        lock = ProcessLock(path)
        assert lock.acquire()
        signal.pause()

    child = start_child(hold, Path(os.devnull))
    try:
        while not is_held(path):
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
        yield
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def outcome(config: StageConfig) -> dict:
    """All that a finished run has made, to the bit: weights, the optimizer's state, every logged value."""
    last = checkpoints_in(config.run_dir / "checkpoints")[-1]
    lines = [json.loads(line) for line in (config.run_dir / "metrics.jsonl").read_text().splitlines()]
    return {
        "weights": digest_of_tensors(config.weight_path),
        "trained": digest_of_tensors(last / checkpoint.TRAINED),
        "optimizer": digest_of_tensors(last / checkpoint.OPTIMIZER),
        "step": last.name,
        "log": [{name: value for name, value in line.items() if name not in SPEEDS} for line in lines],
    }


def digest_of_tensors(path: Path) -> str:
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


class Calls:
    """Every call that changes the disk, in order; a fault can be put on the n-th.

    Stands in for `os` and `open` of trainer.checkpoint.files, and for `os` of model.files, whose sync_to_disk it
    calls. A fault on a write happens when half of it is written.
    """

    CHANGING = ("makedirs", "mkdir", "rename", "unlink", "rmdir", "fsync")

    def __init__(self, patch, fault_at: int = -1, fault: Callable[[], None] = lambda: os._exit(KILLED)):
        self.trace: list[tuple[str, str]] = []
        self.fault_at, self.fault = fault_at, fault
        self._paths: dict[int, str] = {}  # of open descriptors
        members = {name: getattr(os, name) for name in dir(os) if not name.startswith("_")}
        members |= {name: self._wrapped(name, members[name]) for name in self.CHANGING}
        members["open"] = self._open_descriptor
        for module in (checkpoint, files):
            patch.setattr(module, "os", SimpleNamespace(**members))
        patch.setattr(checkpoint, "open", self._open, raising=False)

    def _count(self, name: str, path: object) -> bool:
        """Note a call; True where the fault belongs here."""
        self.trace.append((name, str(self._paths.get(path, path))))
        return len(self.trace) - 1 == self.fault_at

    def _wrapped(self, name: str, function: Callable) -> Callable:
        def call(*arguments, **options):
            if self._count(name, arguments[0]):
                self.fault()
            return function(*arguments, **options)

        return call

    def _open_descriptor(self, path, flags):
        descriptor = os.open(path, flags)
        self._paths[descriptor] = str(path)
        return descriptor

    def _open(self, path, mode):
        if self._count("create", path):
            self.fault()
        file = open(path, mode)  # noqa: SIM115 - the caller's `with` closes it, see _Context
        self._paths[file.fileno()] = str(path)
        write = file.write

        def half_or_all(content):
            if self._count("write", path):
                write(content[: len(content) // 2])
                file.flush()
                self.fault()
            return write(content)

        wrapped = SimpleNamespace(write=half_or_all, flush=file.flush, fileno=file.fileno)
        return _Context(wrapped, file)


class _Context:
    def __init__(self, value: object, file):
        self.value, self.file = value, file

    def __enter__(self):
        return self.value

    def __exit__(self, *_):
        self.file.close()


def said_by(config, rank: int) -> str:
    return (Path(config.save_dir).parent / f"rank_{rank}.log").read_text()


class FaultyDisk:
    """Every call that changes the disk, in order; a fault can be put on the n-th, on a write when half is written.

    Of a parquet the calls that write a row group, or the end.
    """

    def __init__(self, patch, fault_at: int = -1, fault: Callable[[], None] = lambda: None):
        self.trace: list[str] = []
        self.fault_at, self.fault = fault_at, fault
        for name in ("mkdir", "replace", "unlink", "fsync"):
            patch.setattr(os, name, self._wrapped(name, getattr(os, name)))
        for name in ("write_table", "close"):
            method = getattr(parquet.ParquetWriter, name)
            patch.setattr(parquet.ParquetWriter, name, self._wrapped(f"parquet {name}", method))
        opened = Path.open

        def open_path(path: Path, mode: str = "r", *arguments, **options):
            file = opened(path, mode, *arguments, **options)
            return FaultyFile(self, file) if "w" in mode else file

        patch.setattr(Path, "open", open_path)

    def worth_a_try(self) -> list[int]:
        """Of the calls that do the same with the same file the first, one in the middle and the last."""
        alike: dict[str, list[int]] = {}
        for number, what in enumerate(self.trace):
            alike.setdefault(what, []).append(number)
        return sorted(
            {place for all_of in alike.values() for place in (all_of[0], all_of[len(all_of) // 2], all_of[-1])}
        )

    def happens(self, what: str) -> bool:
        self.trace.append(what)
        return len(self.trace) - 1 == self.fault_at

    def _wrapped(self, name: str, function: Callable) -> Callable:
        def call(path, *arguments, **options):
            if self.happens(f"{name} {path if isinstance(path, str | Path) else ''}"):
                self.fault()
            return function(path, *arguments, **options)

        return call


class FaultyFile:
    def __init__(self, disk: FaultyDisk, file):
        self.disk, self.file = disk, file

    def __getattr__(self, name: str):
        return getattr(self.file, name)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.file.close()

    def write(self, content):
        if self.disk.happens(f"write {self.file.name}"):
            self.file.write(content[: len(content) // 2])
            self.file.flush()
            self.disk.fault()
        return self.file.write(content)
