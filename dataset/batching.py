"""Rows of several conversations, each of which sees only itself: sharing a beginning, or packed side by side.

grouped      neighbours that begin alike: what they share, a picture above all, is computed once for all of them
PackedRows   any conversations, side by side in rows of one length, so that nothing is padded
"""

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.samples import Rejected
from model.messages import UserError
from model.processing import Rendered

POOL = 64  # samples among which a packed row chooses
SHARED = 0.25  # of the shorter of two conversations: what they must share to be put into one row


class Row(NamedTuple):
    """What a data set gives by number, and a batch is made of."""

    rendered: Rendered
    pictures: list[torch.Tensor]  # uint8 [3, height, width] each, or features [patches, vision hidden size]
    rejected: tuple[Rejected, ...] = ()  # why nothing of it is learnt: pictures that could not be decoded


def grouped(conversations: Iterable[tuple[int, Hashable, Rendered]], max_length: int) -> Iterator[tuple[int, Rendered]]:
    """(number, pictures, conversation) triples to (number of a row's first conversation, row).

    Neighbours are put into one row where they show the same pictures and share enough of their beginnings, as long
    as the row stays within max_length tokens.
    """
    group: list[Rendered] = []
    number = pictures = shared = None
    for next_number, next_pictures, rendered in conversations:
        if group and next_pictures == pictures:
            common = min(shared, common_prefix(group[0], rendered))
            length = common + sum(len(row) - common for row in (*group, rendered))
            worth = common >= SHARED * min(len(group[0]), len(rendered))
            worth = worth and not rendered.image_mask[common:].any()  # a row brings each picture once
            if worth and length <= max_length:
                group.append(rendered)
                shared = common
                continue
        if group:
            yield number, share_prefix(group, shared)
        group, number, pictures, shared = [rendered], next_number, next_pictures, len(rendered)
    if group:
        yield number, share_prefix(group, shared)


def common_prefix(first: Rendered, second: Rendered) -> int:
    """Tokens with which both begin, and after which each has at least one more that is not learnt.

    What is learnt stays in the branches, and each branch's first learnt token is predicted from inside the branch.
    """
    most = max(0, min(first.trained.argmax(), second.trained.argmax()) - 1)
    differs = first.input_ids[:most] != second.input_ids[:most]
    differs |= first.image_mask[:most] != second.image_mask[:most]
    return int(differs.argmax()) if differs.any() else int(most)


def share_prefix(rows: Sequence[Rendered], shared: int) -> Rendered:
    """One row for several: the `shared` tokens that they begin with, once, then the rest of each as its own branch."""
    if len(rows) == 1:
        return rows[0]
    pieces = [rows[0][:shared], *(row[shared:] for row in rows)]
    branch = np.arange(len(pieces)).repeat([len(piece) for piece in pieces])
    return replace(Rendered.concatenate(pieces), branch=branch)


class PackedRows(Dataset):
    """A data set's rows, several to a row of at most `length` tokens.

    Which samples share a row is decided once (fill_rows); the order shuffles the rows that come of it.
    """

    def __init__(
        self, data: Dataset, lengths: Sequence[int], pictures: Sequence[int], length: int, most_pictures: int,
        apart: Sequence[int] = (),
    ):  # fmt: skip
        """lengths, pictures: of each sample, tokens and how many; most_pictures: a row; apart: how many samples, one
        after the other, share rows only with each other.

        Raises:
            UserError: a sample alone is longer than a row, or has more pictures.
        """
        if max(lengths) > length or max(pictures) > most_pictures:
            raise UserError(
                f"--pack_tokens {length} with --pack_pictures {most_pictures} cannot hold a sample of {max(lengths)} "
                f"tokens or {max(pictures)} pictures: make them larger, or --max_seq_len smaller"
            )
        self.data, self.contents = data, []
        self.sizes: list[int] = []  # rows of each part
        start = 0
        for samples in apart or [len(lengths)]:
            part = slice(start, start + samples)
            rows = fill_rows(lengths[part], pictures[part], length, most_pictures)
            self.contents += [[start + number for number in row] for row in rows]
            self.sizes.append(len(rows))
            start += samples
        self.lengths = torch.tensor([sum(lengths[number] for number in row) for row in self.contents])
        self.filled = float(self.lengths.sum()) / (length * len(self.contents))

    def __len__(self) -> int:
        return len(self.contents)

    def __getitem__(self, index: int) -> Row:
        rendered, pictures, rejected = zip(*(self.data[number] for number in self.contents[index]), strict=True)
        return Row(pack(rendered), sum(pictures, []), sum(rejected, ()))


def fill_rows(lengths: Sequence[int], pictures: Sequence[int], length: int, most_pictures: int) -> list[list[int]]:
    """Numbers of the samples of each row, which are as full as the choice among POOL samples allows.

    A row begins with the longest sample of the pool; the others that fill the rest best are a knapsack, solved exactly:
    bit (tokens, pictures) of an integer says that some of the samples so far have exactly so many.
    """
    width = most_pictures + 1  # bits a token: how many pictures
    everything = (1 << (length + 1) * width) - 1
    columns = everything // ((1 << width) - 1)  # the bit of no picture, of every number of tokens
    may_add = [columns * ((1 << width - more) - 1) for more in range(width)]  # where so many more pictures still fit
    waiting, rows = list(range(len(lengths)))[::-1], []
    pool: list[int] = []
    while waiting or pool:
        while waiting and len(pool) < POOL:
            pool.append(waiting.pop())
        pool.sort(key=lambda number: (-lengths[number], number))
        steps = [lengths[number] * width + pictures[number] for number in pool]
        reached = [1 << steps[0]]
        for number, step in zip(pool[1:], steps[1:], strict=True):
            reached.append(reached[-1] | (reached[-1] & may_add[pictures[number]]) << step & everything)
        best, row = reached[-1].bit_length() - 1, {0}
        for place in range(len(pool) - 1, 0, -1):
            if not reached[place - 1] >> best & 1:  # so full only with this one
                row.add(place)
                best -= steps[place]
        rows.append([pool[place] for place in sorted(row)])
        pool = [number for place, number in enumerate(pool) if place not in row]
    return rows


def pack(rows: Sequence[Rendered]) -> Rendered:
    """Side by side, each with prefixes and branches of its own."""
    packed = Rendered.concatenate(rows)
    first = np.cumsum([0, *(row.branch.max() + 1 for row in rows[:-1])]).repeat([len(row) for row in rows])
    return replace(packed, branch=packed.branch + first, shared_prefix=packed.shared_prefix + first)
