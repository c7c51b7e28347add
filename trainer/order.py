"""Which rows each rank sees in which step: a pure function of (seed, epoch, step), so that nothing has to be stored.

A step takes the next `global_batch` = batch_size * accumulation_steps * ranks rows of the epoch's permutation. The
same rows fall into the same step however they are split over ranks and micro-batches. Rows of like length share a step,
so that little is padded: the permutation is sorted by length in pools of a few dozen steps, and the steps are shuffled
again. What does not fill a last step is left out of that epoch, other rows each time; all ranks therefore take equally
many steps. With weights an epoch has as many rows, which trainer/mix.py chooses instead of a permutation of all.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import torch

from model.messages import UserError, counted
from trainer.distributed import Runtime
from trainer.mix import Mix

Bounds = list[tuple[int, int]]  # first row and the row after the last of each pass
POOL = 16  # steps whose rows are sorted together: fewer pad more, more make steps too alike


@dataclass(frozen=True)
class Order:
    """The rows of every step of a run.

    A run may go on with steps of another size (resumed_at). The steps that it began with, of `first_batch` rows, decide
    for good which row comes when, and the schedule follows the rows; a new step may hold the end of an epoch and the
    beginning of the next.

    Raises:
        UserError: the rows do not fill a step, or what is left does not divide into the new ones.
    """

    lengths: torch.Tensor  # [rows], tokens
    batch_size: int  # with accumulation_steps: rows that a rank takes a step
    accumulation_steps: int
    world_size: int
    epochs: int
    seed: int
    mix: Mix | None = None  # None: every row once an epoch
    first_batch: int = 0  # rows a step when the run began; 0: as many as now
    first_step: int = 0  # from which on a step has global_batch rows
    first_position: int = 0  # rows of the run that the steps before took

    def __post_init__(self) -> None:
        if not self.first_batch:
            object.__setattr__(self, "first_batch", self.global_batch)
        ranks = counted(self.world_size, "ranks")
        flags = f"--batch_size {self.batch_size} x --accumulation_steps {self.accumulation_steps} x {ranks}"
        if len(self.lengths) < self.first_batch:
            raise UserError(
                f"{len(self.lengths)} rows do not fill one step of {self.first_batch} ({flags}): make one of these "
                "smaller"
            )
        if self.mix is not None:
            self.mix.shares(self.rows_per_epoch)  # which refuses what cannot be
        left = self.total_rows - self.first_position
        if left % self.global_batch:
            raise UserError(
                f"{left} rows are left, which steps of {self.global_batch} ({flags}) do not divide: choose them "
                f"so that a step takes {self.first_batch} as before, or another divisor of {left}; or start "
                "anew: --from_resume 0"
            )

    def resumed_at(self, step: int, position: int, first_batch: int) -> "Order":
        """These steps, for a run that began with steps of first_batch rows, after `step` steps and `position` rows."""
        if self.global_batch == first_batch and position == step * first_batch:
            return self
        return replace(self, first_batch=first_batch, first_step=step, first_position=position)

    @property
    def global_batch(self) -> int:
        """Rows of a step, over all ranks."""
        return self.batch_size * self.accumulation_steps * self.world_size

    @property
    def rows_per_epoch(self) -> int:
        return len(self.lengths) // self.first_batch * self.first_batch

    @property
    def total_rows(self) -> int:
        return self.epochs * self.rows_per_epoch

    @property
    def total_steps(self) -> int:
        return self.first_step + (self.total_rows - self.first_position) // self.global_batch

    def position(self, step: int) -> int:
        """Rows that the steps before this one take, over all ranks and epochs."""
        return self.first_position + (step - self.first_step) * self.global_batch

    def epoch(self, step: int) -> float:
        return self.position(step) / self.rows_per_epoch

    def schedule(self, step: int) -> tuple[float, int]:
        """Where a step stands in the learning rate's schedule, and the schedule's length; both in the first steps."""
        return self.position(step) / self.first_batch, self.total_rows // self.first_batch

    def steps(self, epoch: int) -> torch.Tensor:
        """Row numbers of an epoch in their order, a line for each of the steps that the run began with.

        Returns [rows_per_epoch / first_batch, first_batch].
        """
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
        if self.mix is None:
            shuffled = torch.randperm(len(self.lengths), generator=generator)[: self.rows_per_epoch]
        else:
            rows = self.mix.rows(epoch, self.rows_per_epoch, self.seed)
            shuffled = rows[torch.randperm(len(rows), generator=generator)]
        pools = [pool[self.lengths[pool].argsort(stable=True)] for pool in shuffled.split(POOL * self.first_batch)]
        steps = torch.cat(pools).view(-1, self.first_batch)
        return steps[torch.randperm(len(steps), generator=generator)]

    def rows_by_rank(self, first_step: int = 0) -> Iterator[list[list[int]]]:
        """Row numbers of every rank, step by step from one on; batch_size at a time go to one rank after the other."""
        rows = self._rows_from(self.position(first_step))
        while step := list(itertools.islice(rows, self.global_batch)):
            batches = [step[start : start + self.batch_size] for start in range(0, len(step), self.batch_size)]
            yield [sum(batches[rank :: self.world_size], []) for rank in range(self.world_size)]

    def _rows_from(self, position: int) -> Iterator[int]:
        """Row numbers of the whole run, one by one, from a position on."""
        for epoch in range(position // self.rows_per_epoch, self.epochs):
            start = max(0, position - epoch * self.rows_per_epoch)
            rows = self.steps(epoch).flatten()
            for place in range(start, len(rows), self.first_batch):  # split() would make a tensor of every step at once
                yield from rows[place : place + self.first_batch].tolist()


# ---- a rank's part of a step, cut into passes through the model: by tokens, so that short rows go in fewer ones.
# ---- A loss is divided by the supervised tokens of the whole step, so where the cuts fall changes only rounding.


def micro_batches(order: Order, rank: int, budget: int, first_step: int = 0) -> Iterator[list[list[int]]]:
    """Row numbers of a rank's micro-batches, step by step from one on; in a step all ranks have equally many.

    budget: most tokens of a micro-batch, padding included. A row with more goes alone.
    """
    for by_rank in order.rows_by_rank(first_step):
        numbers = torch.tensor(by_rank)  # [ranks, rows]
        lengths, places = order.lengths[numbers].sort(dim=1, stable=True)
        lengths = lengths.tolist()
        passes = max(len(fewest_passes(of_rank, budget)) for of_rank in lengths)
        own = numbers[rank][places[rank]].tolist()
        yield [own[start:end] for start, end in cut_into(passes, lengths[rank], budget)]


def validation_passes(lengths: torch.Tensor, budget: int, runtime: Runtime) -> list[list[int]]:
    """Numbers of the rows of this rank's passes over validation data, of which it looks at every world_size-th row.

    All ranks have equally many passes; some hold nothing where a rank's rows do not suffice. The ranks agree on
    their number instead of each working it out, so that none waits for ever where their files differ.
    """
    sorted_lengths, places = lengths[runtime.rank :: runtime.world_size].sort(stable=True)
    own, sorted_lengths = (runtime.rank + places * runtime.world_size).tolist(), sorted_lengths.tolist()
    passes = runtime.max(len(fewest_passes(sorted_lengths, budget)))
    cut = [own[start:end] for start, end in cut_into(min(passes, len(own)), sorted_lengths, budget)]
    return cut + [[]] * (passes - len(cut))


def fewest_passes(lengths: Sequence[int], budget: int) -> Bounds:
    """Rising lengths cut into as few passes as have rows x longest row within the budget, each as full as can be."""
    bounds, end = [], len(lengths)
    while end:
        start = max(0, min(end - 1, end - budget // lengths[end - 1]))
        bounds.append((start, end))
        end = start
    return bounds[::-1]


def cut_into(passes: int, lengths: Sequence[int], budget: int) -> Bounds:
    """Likewise, but into exactly so many, at least the fewest and at most one a row: the largest are halved."""
    bounds = fewest_passes(lengths, budget)
    while len(bounds) < passes:
        tokens = [(end - start) * lengths[end - 1] if end - start > 1 else 0 for start, end in bounds]
        largest = tokens.index(max(tokens))
        start, end = bounds[largest]
        middle = (start + end) // 2
        bounds[largest : largest + 1] = [(start, middle), (middle, end)]
    return bounds
