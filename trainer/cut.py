"""How a rank's share of a step or a validation is cut into passes: by tokens, so that short rows go in fewer ones.

The shares are the order's and stay as they are. A loss is divided by the supervised tokens of the whole step, so where
the cuts fall changes nothing but rounding.
"""

from collections.abc import Iterator, Sequence

import torch

from trainer.order import Order
from trainer.resplit import ResplitOrder
from trainer.runtime import Runtime

Bounds = list[tuple[int, int]]  # start and end of each run


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
