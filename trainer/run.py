"""A run: all that its steps read and change, as one object."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import nn

from model.model_minimind import MiniMindForCausalLM
from trainer.config import StageConfig
from trainer.distributed import Runtime
from trainer.order import Order


@dataclass
class RunState:
    """What a run carries from step to step beside its tensors."""

    step: int = 0  # done
    position: int = 0  # rows of the global order that these steps took
    best: float = math.inf  # validation loss so far
    best_exam: float = -1.0  # with --eval_tasks the mean of the exams that comes before it; below 0: none was taken
    exams: str = ""  # which ones they were
    window: list[dict] = field(default_factory=list)  # this rank's values of the steps since the last log line
    tracker_id: str = ""
    steps_skipped: int = 0  # because loss or gradient was not finite
    samples_skipped: int = 0  # rows that these steps took
    skipped_in_a_row: int = 0
    recent_losses: list[float] = field(default_factory=list)  # logged, newest last
    resumed_from: Path | None = None


@dataclass
class Run:
    config: StageConfig
    runtime: Runtime
    model: MiniMindForCausalLM
    parallel_model: nn.Module  # what the loop calls: the model itself, or spread over the ranks
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    order: Order
    fingerprints: dict  # what a checkpoint must have in common with the run that goes on from it
    state: RunState = field(default_factory=RunState)
