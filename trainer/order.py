"""Which rows each rank sees in which step: a pure function of (seed, epoch, step), so that nothing has to be stored.

A step takes the next `global batch` = batch_size * accumulation_steps * ranks rows of the epoch's permutation. The
same rows fall into the same step however they are split over ranks; how a rank's share is cut into micro-batches is
for cut.py. Rows of like length share a step, so that little is padded: the permutation is sorted by length in pools
of a few dozen steps, and the steps are shuffled again. What does not fill a last step is left out of that epoch, other
rows each time; all ranks therefore take equally many steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.errors import UserError
from model.text import counted

POOL = 16  # steps whose rows are sorted together: fewer pad more, more make steps too alike


@dataclass(frozen=True)
class Order:
    lengths: torch.Tensor  # [rows], tokens
    batch_size: int  # with accumulation_steps: rows that a rank takes a step
    accumulation_steps: int
    world_size: int
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        if self.rows < self.global_batch:
            ranks = counted(self.world_size, "ranks")
            raise UserError(
                f"{self.rows} rows do not fill one step of {self.global_batch} (--batch_size {self.batch_size} x "
                f"--accumulation_steps {self.accumulation_steps} x {ranks}): make one of these smaller"
            )

    @property
    def rows(self) -> int:
        return len(self.lengths)

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.rows // self.global_batch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def position(self, step: int) -> int:
        """Rows that the steps before this one take, over all ranks and epochs."""
        return step * self.global_batch

    def epoch(self, step: int) -> float:
        return self.position(step) / (self.steps_per_epoch * self.global_batch)

    def schedule(self, step: int) -> tuple[float, int]:
        """Where a step stands in the schedule, and the schedule's length."""
        return step, self.total_steps

    def steps(self, epoch: int) -> torch.Tensor:
        """Row numbers of every step of an epoch [steps_per_epoch, global_batch]."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        shuffled = torch.randperm(self.rows, generator=generator)
        shuffled = shuffled[: self.steps_per_epoch * self.global_batch]
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in shuffled.split(POOL * self.global_batch)]
        steps = torch.cat(pools).view(-1, self.global_batch)
        return steps[torch.randperm(len(steps), generator=generator)]

    def shares(self, first_step: int = 0) -> Iterator[list[list[int]]]:
        """Row numbers of every rank's share of each step, from a step on."""
        for epoch in range(first_step // self.steps_per_epoch, self.epochs):
            start = max(0, first_step - epoch * self.steps_per_epoch)
            for chunk in self.steps(epoch)[start:]:
                parts = chunk.view(self.accumulation_steps, self.world_size, self.batch_size)
                yield parts.transpose(0, 1).flatten(1).tolist()
