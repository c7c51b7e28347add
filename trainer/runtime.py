"""Where a run runs: ranks, device, arithmetic, and the few collectives that training needs."""

import contextlib
import datetime
import os
import random
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist

from model.device import choose_device, choose_dtype

TIMEOUT = datetime.timedelta(seconds=float(os.environ.get("DIST_TIMEOUT_SECONDS", "600")))


@dataclass(frozen=True)
class Runtime:
    rank: int
    world_size: int
    device: torch.device
    dtype: torch.dtype  # of the arithmetic; weights stay in float32

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, *values: float) -> list[float]:
        """Each value added up over the ranks."""
        if self.world_size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64, device="cpu" if self.device.type == "cpu" else self.device)
        dist.all_reduce(total)
        return total.tolist()

    def gather(self, value: object) -> list:
        """The value of every rank, in order."""
        if self.world_size == 1:
            return [value]
        values = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def barrier(self) -> None:
        if self.world_size > 1:
            dist.barrier()

    def to_device(self, batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        return {name: value.to(self.device, non_blocking=True) for name, value in batch.items()}


def start_runtime(device: str = "auto", dtype: str = "auto", seed: int = 42) -> Runtime:
    """Join the ranks that torchrun started, or be alone; choose device and arithmetic; seed everything."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    chosen = choose_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
        torch.backends.cuda.matmul.fp32_precision = "tf32"
    if world_size > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=TIMEOUT)
    if world_size > 1 and chosen.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // int(os.environ.get("LOCAL_WORLD_SIZE", world_size))))
    # All ranks alike: data order and first weights must agree. Dropout differs by rank, see run_stage.
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
    return Runtime(rank, world_size, chosen, choose_dtype(dtype, chosen))


def stop_runtime() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()
