"""A run that goes on with steps of another size: the same rows in the same order, only cut into other steps."""

import itertools
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from model.errors import UserError
from model.text import counted
from trainer.order import Order


@dataclass(frozen=True)
class ResplitOrder:
    """The order of `whole`, from `first_position` on, in steps of batch_size * accumulation_steps * world_size.

    Serves wherever an Order does. Steps are counted on from first_step; a step may hold the end of an epoch and the
    beginning of the next. The schedule is that of `whole`: it follows the rows, not the steps.
    """

    whole: Order  # as the run began: it alone says which row comes when
    first_step: int
    first_position: int  # rows of the global order that were taken in the steps before first_step
    batch_size: int
    accumulation_steps: int
    world_size: int

    def __post_init__(self) -> None:
        left = self.whole.total_steps * self.whole.global_batch - self.first_position
        if left % self.global_batch:
            ranks = counted(self.world_size, "ranks")
            raise UserError(
                f"{left} rows are left, which steps of {self.global_batch} (--batch_size {self.batch_size} x "
                f"--accumulation_steps {self.accumulation_steps} x {ranks}) do not divide: choose them "
                f"so that a step takes {self.whole.global_batch} as before, or another divisor of {left}; or start "
                "anew: --from_resume 0"
            )

    @property
    def lengths(self) -> torch.Tensor:
        return self.whole.lengths

    @property
    def rows(self) -> int:
        return self.whole.rows

    @property
    def global_batch(self) -> int:
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def total_steps(self) -> int:
        left = self.whole.total_steps * self.whole.global_batch - self.first_position
        return self.first_step + left // self.global_batch

    def position(self, step: int) -> int:
        return self.first_position + (step - self.first_step) * self.global_batch

    def epoch(self, step: int) -> float:
        return self.position(step) / (self.whole.steps_per_epoch * self.whole.global_batch)

    def schedule(self, step: int) -> tuple[float, int]:
        return self.position(step) / self.whole.global_batch, self.whole.total_steps

    def shares(self, first_step: int = 0) -> Iterator[list[list[int]]]:
        """Row numbers of every rank's share of each step, from a step on."""
        size, position = self.whole.global_batch, self.position(first_step)
        stream = itertools.islice(self._stream(position // size), position % size, None)
        while step := list(itertools.islice(stream, self.global_batch)):
            blocks = [step[start : start + self.batch_size] for start in range(0, len(step), self.batch_size)]
            yield [sum(blocks[rank :: self.world_size], []) for rank in range(self.world_size)]

    def _stream(self, first_step: int) -> Iterator[int]:
        """Row numbers of the whole order, one by one, from one of its steps on."""
        for epoch in range(first_step // self.whole.steps_per_epoch, self.whole.epochs):
            start = max(0, first_step - epoch * self.whole.steps_per_epoch)
            yield from self.whole.steps(epoch)[start:].flatten().tolist()


def order_after(
    whole: Order, step: int, position: int, batch_size: int, accumulation_steps: int, world_size: int
) -> Order | ResplitOrder:
    """The order of a run that has taken `step` steps and `position` rows; a plain Order where nothing changed.

    Raises:
        UserError: what is left does not divide into the new steps; the message has the numbers.
    """
    if batch_size * accumulation_steps * world_size == whole.global_batch and position == step * whole.global_batch:
        return Order(whole.lengths, batch_size, accumulation_steps, world_size, whole.epochs, whole.seed)
    return ResplitOrder(whole, step, position, batch_size, accumulation_steps, world_size)
