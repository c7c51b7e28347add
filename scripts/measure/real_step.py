"""Real training steps on this machine, for their seconds and their memory."""

import contextlib
import ctypes
import gc
import multiprocessing
import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from model.config import CLIP_VIT_B16, MiniMindConfig, VLMConfig
from model.device import compile_layers
from model.flops import StepFlops
from scripts.measure.memory import Account, Step

CALIBRATING_ROWS = 4  # fewer do not bring a machine to the speed of many
# glibc keeps what is freed for later, which would be counted as if it were needed.
GIVE_BACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "1048576", "MALLOC_TRIM_THRESHOLD_": "1048576"}


@dataclass(frozen=True)
class Speed:
    flops: float  # a second, sustained in forward and backward
    optimizer: float  # seconds of clipping and update, whatever the batch

    def seconds(self, flops: float, micro_batches: int = 1) -> float:
        """Of a step of so many micro-batches of `flops` each."""
        return micro_batches * flops / self.flops + self.optimizer


def flops_of(step: Step, model: nn.Module) -> float:
    pictures = step.rows if step.sees else 0
    return StepFlops(model).count(
        step.rows * step.tokens, step.rows * step.tokens**2, step.rows * step.supervised, pictures,
        0 if step.cached else pictures,
    )  # fmt: skip


class RealStep:
    """A model of random weights and its AdamW; `take` makes one step and returns what it took."""

    def __init__(self, step: Step, device: str | torch.device = "cpu", compiled: bool = False):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.model = step.make_model().to(self.device)
        if compiled:
            compile_layers(self.model, self.device)
        self.learning = [parameter for parameter in self.model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.learning, lr=1e-5, fused=True)

    def batch_of(self, step: Step) -> dict:
        return {name: v.to(self.device) if torch.is_tensor(v) else v for name, v in step.make_batch().items()}

    def take(self, step: Step, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Seconds of forward and backward pass, and of the optimizer."""
        started = self._now()
        step.loss(self.model, batch).backward()
        middle = self._now()
        self._update()
        return middle - started, self._now() - middle

    def seconds(self, step: Step, batch: dict[str, torch.Tensor], count: int) -> float:
        """Of a step, the mean of so many in a row: a host that is ahead of its GPU stays so between them."""
        started = self._now()
        for _ in range(count):
            step.loss(self.model, batch).backward()
            self._update()
        return (self._now() - started) / count

    def _update(self) -> None:
        nn.utils.clip_grad_norm_(self.learning, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def _now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()


@dataclass(frozen=True)
class Throughput:
    samples_per_second: float
    flops_per_second: float  # useful ones
    peak: int | None  # bytes that tensors took, beyond what was there before; None: cannot be counted


def throughput(
    step: Step, device: torch.device, compiled: bool = False, windows: int = 5, count: int = 4
) -> Throughput:  # fmt: skip
    """The median of so many windows of `count` steps each, after two that do not count and tell the memory.

    On a GPU its allocator tells the peak; on a CPU, which has none that could, the tensors are counted, unless
    compiled code hides them.
    """
    on_gpu = device.type == "cuda"
    account = contextlib.nullcontext() if on_gpu or compiled else Account()
    if on_gpu:
        gc.collect()
        torch.cuda.empty_cache()
        before = torch.cuda.memory_allocated(device)
    with account:
        real = RealStep(step, device, compiled)
        batch = real.batch_of(step)
        real.take(step, batch)  # the optimizer has its state after it
        if on_gpu:
            torch.cuda.reset_peak_memory_stats(device)
        elif not compiled:
            account.peak = account.live
        real.take(step, batch)
    if on_gpu:
        peak = torch.cuda.max_memory_allocated(device) - before
    elif compiled:
        peak = None
    else:
        peak = account.peak
    seconds = statistics.median(real.seconds(step, batch, count) for _ in range(windows))
    return Throughput(step.rows / seconds, flops_of(step, real.model) / seconds, peak)


def calibrate(step: Step, rounds: int = 3) -> Speed:
    """The speed of steps like this one, of few rows."""
    few = replace(step, rows=CALIBRATING_ROWS)
    real, batch = RealStep(few), few.make_batch()
    taken = [real.take(few, batch) for _ in range(rounds + 1)][1:]
    passes, updates = (statistics.median(column) for column in zip(*taken, strict=True))
    return Speed(flops_of(few, real.model) / passes, updates)


def seconds_here(step: Step, rounds: int = 5) -> tuple[float, float]:
    """(predicted, measured) seconds of a step; calibrating and measuring take turns, as a machine's speed wanders."""
    few = replace(step, rows=CALIBRATING_ROWS)
    real = RealStep(step)
    of_few, of_step = [], []
    batch_of_few, batch = few.make_batch(), step.make_batch()
    for _ in range(rounds + 1):  # the first does not count
        of_few.append(real.take(few, batch_of_few))
        of_step.append(sum(real.take(step, batch)))
    passes, updates = (statistics.median(column) for column in zip(*of_few[1:], strict=True))
    predicted = Speed(flops_of(few, real.model) / passes, updates).seconds(flops_of(step, real.model))
    return predicted, statistics.median(of_step[1:])


def memory_here(step: Step) -> tuple[int, int]:
    """(parameters, bytes): the most memory that two real steps took beyond what the process had before.

    To be called in a process of its own, with GIVE_BACK in its environment. Linux alone tells and resets its peak.
    """
    small = MiniMindConfig(hidden_size=64, num_hidden_layers=1)
    if step.sees:
        tower = {**CLIP_VIT_B16, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
        small = VLMConfig(hidden_size=64, num_hidden_layers=1, vision_config=tower)
    warm = replace(step, config=small, rows=2)
    RealStep(warm).take(warm, warm.make_batch())  # loads code, which is nobody's activations
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    before = _process_bytes("VmRSS")
    real = RealStep(step)
    batch = step.make_batch()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(2):
        real.take(step, batch)
    return sum(parameter.numel() for parameter in real.model.parameters()), _process_bytes("VmHWM") - before


def _process_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_a_process(function: Callable, step: Step, environment: dict[str, str] | None = None) -> tuple:
    """function(step) in a fresh process with these variables set."""
    before = dict(os.environ)
    os.environ.update(environment or {})
    try:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            return pool.submit(function, step).result()
    finally:
        os.environ.clear()
        os.environ.update(before)
