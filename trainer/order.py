"""Which samples each rank sees in which step: a pure function of (seed, epoch, step), so that nothing has to be stored.

A step takes the next `global batch` = batch_size * accumulation_steps * ranks samples of the epoch's permutation. The
same samples fall into the same step however they are split over micro-batches and ranks. What does not fill a last step
is left out of that epoch, other samples each time; all ranks therefore take equally many steps.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Order:
    samples: int
    batch_size: int  # samples a micro-batch and rank
    accumulation_steps: int
    world_size: int
    epochs: int
    seed: int

    def __post_init__(self) -> None:
        if self.samples < self.global_batch:
            raise ValueError(
                f"{self.samples} samples do not fill one step of {self.global_batch} (--batch_size {self.batch_size} x "
                f"--accumulation_steps {self.accumulation_steps} x {self.world_size} ranks): make one of these smaller"
            )

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def steps_per_epoch(self) -> int:
        return self.samples // self.global_batch

    @property
    def total_steps(self) -> int:
        return self.steps_per_epoch * self.epochs

    def permutation(self, epoch: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        return torch.randperm(self.samples, generator=generator)

    def micro_batches(self, rank: int, first_step: int = 0) -> Iterator[list[int]]:
        """Sample numbers of this rank's micro-batches from a step on; accumulation_steps of them make a step."""
        for epoch in range(first_step // self.steps_per_epoch, self.epochs):
            permutation = self.permutation(epoch)
            start = first_step - epoch * self.steps_per_epoch if epoch == first_step // self.steps_per_epoch else 0
            for step in range(start, self.steps_per_epoch):
                chunk = permutation[step * self.global_batch : (step + 1) * self.global_batch]
                parts = chunk.view(self.accumulation_steps, self.world_size, self.batch_size)
                yield from parts[:, rank].tolist()
