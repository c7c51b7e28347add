"""Which rows each rank sees in which step: a pure function of (seed, epoch, step), so that nothing has to be stored.

A step takes the next `global batch` = batch_size * accumulation_steps * ranks rows of the epoch's permutation. The
same rows fall into the same step however they are split over ranks; how a rank's share is cut into micro-batches is
for cut_shares. Rows of like length share a step, so that little is padded: the permutation is sorted by length in pools
of a few dozen steps, and the steps are shuffled again. What does not fill a last step is left out of that epoch, other
rows each time; all ranks therefore take equally many steps.
"""

import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from model.messages import UserError, counted
from trainer.distributed import Runtime

Bounds = list[tuple[int, int]]  # start and end of each run
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


# ---- a rank's share of a step, cut into micro-batches


def cut_shares(order: Order | ResplitOrder, rank: int, budget: int, first_step: int = 0) -> Iterator[list[list[int]]]:
    """Row numbers of a rank's micro-batches, step by step from one on; in a step all ranks have equally many.

    budget: most tokens of a micro-batch, padding included. A row with more goes alone.
    """
    for shares in order.shares(first_step):
        numbers = torch.tensor(shares)  # [ranks, rows]
        lengths, places = order.lengths[numbers].sort(dim=1, stable=True)
        every = lengths.tolist()
        pieces = max(len(fewest_runs(own, budget)) for own in every)
        own = numbers[rank][places[rank]].tolist()
        yield [own[start:end] for start, end in runs(every[rank], budget, pieces)]


def cut_once(lengths: torch.Tensor, budget: int, runtime: Runtime) -> list[list[int]]:
    """Numbers of this rank's passes over rows that all ranks look at once, every world_size-th each.

    All ranks have equally many passes; some hold nothing where a rank's rows do not suffice. The ranks agree on
    their number instead of each working it out, so that none waits for ever where their files differ.
    """
    sorted_lengths, places = lengths[runtime.rank :: runtime.world_size].sort(stable=True)
    own, every = (runtime.rank + places * runtime.world_size).tolist(), sorted_lengths.tolist()
    pieces = runtime.most(len(fewest_runs(every, budget)))
    passes = [own[start:end] for start, end in runs(every, budget, min(pieces, len(own)))]
    return passes + [[]] * (pieces - len(passes))


def fewest_runs(lengths: Sequence[int], budget: int) -> Bounds:
    """Rising lengths cut into as few runs as have rows x longest row within the budget, each as full as can be."""
    bounds, end = [], len(lengths)
    while end:
        start = max(0, min(end - 1, end - budget // lengths[end - 1]))
        bounds.append((start, end))
        end = start
    return bounds[::-1]


def runs(lengths: Sequence[int], budget: int, pieces: int) -> Bounds:
    """Likewise, but exactly so many, at least the fewest and at most one a row: the largest are halved."""
    bounds = fewest_runs(lengths, budget)
    while len(bounds) < pieces:
        tokens = [(end - start) * lengths[end - 1] if end - start > 1 else 0 for start, end in bounds]
        number = tokens.index(max(tokens))
        start, end = bounds[number]
        middle = (start + end) // 2
        bounds[number : number + 1] = [(start, middle), (middle, end)]
    return bounds
