"""Real training steps on this machine, for their seconds and their memory."""

import ctypes
import gc
import multiprocessing
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from model.config import CLIP_VIT_B16, MiniMindConfig, VLMConfig
from model.device import compile_layers, to_device
from model.flops import StepFlops
from scripts.measure.memory import Step, learning_parameters
from trainer.config import StageConfig
from trainer.optim import build_optimizer

CALIBRATING_ROWS = 4  # fewer do not bring a machine to the speed of many
# glibc keeps freed memory for later, which would be counted as if it were needed. With these options it gives it back.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8  # of mallopt
GIVE_BACK = {M_TRIM_THRESHOLD: 1 << 20, M_MMAP_THRESHOLD: 1 << 20, M_ARENA_MAX: 1}


@dataclass(frozen=True)
class Speed:
    flops: float  # a second, sustained in forward and backward
    optimizer: float  # seconds of clipping and update, whatever the batch

    def seconds(self, flops: float, micro_batches: int = 1) -> float:
        """Of a step of so many micro-batches of `flops` each."""
        return micro_batches * flops / self.flops + self.optimizer


def flops_of(step: Step, model: nn.Module) -> float:
    pictures = step.rows * step.views
    return StepFlops(model).count(
        tokens=step.rows * step.tokens,
        squared_lengths=step.rows * step.tokens**2,
        supervised=step.rows * step.supervised,
        pictures=pictures,
        encoded=0 if step.cached else pictures,
    )


def update(optimizer: torch.optim.Optimizer) -> None:
    """What follows the backward pass: clip the gradients, step, drop them."""
    nn.utils.clip_grad_norm_([p for group in optimizer.param_groups for p in group["params"]], 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def now(device: torch.device) -> float:
    """Seconds, once the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


class RealStep:
    """A model of random weights and its AdamW, for steps whose sizes the caller gives."""

    def __init__(self, step: Step, device: str | torch.device = "cpu", compiled: bool = False):
        torch.manual_seed(0)
        self.device = torch.device(device)
        self.model = step.make_model().to(self.device)
        if compiled:
            compile_layers(self.model, self.device)
        self.learning = learning_parameters(self.model)
        self.optimizer = build_optimizer(self.model, StageConfig())

    def make_batch(self, step: Step) -> dict:
        return to_device(step.make_batch(), self.device)

    def timed(self, step: Step, batch: dict[str, torch.Tensor]) -> tuple[float, float]:
        """Make one step. Seconds of its forward and backward pass, and of the optimizer."""
        started = now(self.device)
        step.loss(self.model, batch).backward()
        middle = now(self.device)
        update(self.optimizer)
        return middle - started, now(self.device) - middle

    def mean_seconds(self, step: Step, batch: dict[str, torch.Tensor], count: int) -> float:
        """Of so many steps in a row: a host that is ahead of its GPU stays so between them."""
        started = now(self.device)
        for _ in range(count):
            step.loss(self.model, batch).backward()
            update(self.optimizer)
        return (now(self.device) - started) / count


def calibrate(step: Step, rounds: int = 3) -> Speed:
    """The speed of steps like this one, of few rows."""
    few = replace(step, rows=CALIBRATING_ROWS)
    real, batch = RealStep(few), few.make_batch()
    return _speed([real.timed(few, batch) for _ in range(rounds + 1)], flops_of(few, real.model))


def _speed(timed: list[tuple[float, float]], flops: float) -> Speed:
    """From what RealStep.timed gave for steps of so many FLOP; the first was a warm-up."""
    passes, updates = (statistics.median(seconds) for seconds in zip(*timed[1:], strict=True))
    return Speed(flops / passes, updates)


def seconds_here(step: Step, rounds: int = 5) -> tuple[float, float]:
    """(predicted, measured) seconds of a step; calibrating and measuring alternate, as a machine's speed wanders."""
    few = replace(step, rows=CALIBRATING_ROWS)
    real = RealStep(step)
    batch_of_few, batch = few.make_batch(), step.make_batch()
    of_few, of_step = [], []
    for _ in range(rounds + 1):  # the first does not count
        of_few.append(real.timed(few, batch_of_few))
        of_step.append(sum(real.timed(step, batch)))
    speed = _speed(of_few, flops_of(few, real.model))
    return speed.seconds(flops_of(step, real.model)), statistics.median(of_step[1:])


def memory_here(step: Step) -> tuple[int, int]:
    """(parameters, bytes): the most memory that two real steps took beyond what the process had before.

    To be called in a process of its own. Linux alone tells and resets its peak.
    """
    libc = ctypes.CDLL(None)
    for option, value in GIVE_BACK.items():
        libc.mallopt(option, value)
    small = MiniMindConfig(hidden_size=64, num_hidden_layers=1)
    if step.sees:
        tower = {**CLIP_VIT_B16, "hidden_size": 24, "intermediate_size": 32, "num_hidden_layers": 1}
        small = VLMConfig(hidden_size=64, num_hidden_layers=1, vision_config=tower)
    warm = replace(step, config=small, rows=2)
    RealStep(warm).timed(warm, warm.make_batch())  # loads code, which is nobody's activations
    gc.collect()
    libc.malloc_trim(0)
    before = process_bytes("VmRSS")
    real = RealStep(step)
    batch = step.make_batch()
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    for _ in range(2):
        real.timed(step, batch)
    return sum(parameter.numel() for parameter in real.model.parameters()), process_bytes("VmHWM") - before


def process_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_a_process(function: Callable, asked: object) -> Any:
    """function(asked) in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, asked).result()
