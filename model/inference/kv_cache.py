"""Keys and values of what the decoder has read: of the answers in progress, and of earlier conversations."""

import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

STEP = 256  # positions by which a cache grows
SLACK = 64  # positions before the first, for rows that are a little longer than those that are there
ROWS = 16  # that a cache of several has room for at least


class KVCache:
    """Keys and values of all positions so far, in storage that has room for more positions and rows.

    All rows end at the same position, so that a step writes one column; shorter ones have padding before them. Rows
    that join or leave are copied alone, and as the longest leaves the others' padding is only no longer looked at.
    What lies in a row's padding, and beyond the last position, is always finite: it is masked, but 0 * NaN is NaN.
    """

    def __init__(self, storage: torch.Tensor, length: int = 0):
        """storage: [layers, 2, rows, key/value heads, positions, head_dim], zeros; length: positions filled."""
        self.storage, self.begin, self.length = storage, 0, length
        self.graph: Any = None  # the StepGraph over `states`, on a GPU
        self._set_paddings([0] * storage.shape[2])

    @property
    def filled(self) -> torch.Tensor:
        """[layers, 2, rows, key/value heads, length, head_dim], a view."""
        return self.states[..., : self.length, :]

    def filled_of(self, row: int) -> torch.Tensor:
        """[layers, 2, 1, key/value heads, the row's own length, head_dim], a view without its padding."""
        return self.filled[:, :, row : row + 1, :, self.paddings[row] :]

    def make_room(self, length: int) -> None:
        if length > self.states.shape[-2]:
            self._move(self.storage.shape[2], 0, length)

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these; they stand in this order then, and may be named twice."""
        end = self.begin + self.length
        if all(row >= place for place, row in enumerate(rows)):  # then no row is overwritten before it has moved
            for place, row in enumerate(rows):
                if place != row:
                    self.storage[:, :, place, :, :end] = self.storage[:, :, row, :, :end]
        else:
            self.storage = self.storage[:, :, list(rows)]
        self._set_paddings([self.paddings[row] for row in rows])

    def join(self, other: "KVCache") -> None:
        """Take in other rows behind the own ones."""
        own, rows = len(self.paddings), len(self.paddings) + len(other.paddings)
        longer = max(0, other.length - self.length)
        room = self.storage.shape[2]
        if longer > self.begin or rows > room:
            self._move(room if rows <= room else max(rows, 2 * own, ROWS), longer, self.length)
        self.begin, self.length = self.begin - longer, self.length + longer
        shorter, end = self.length - other.length, self.begin + self.length
        self.storage[:, :, own:rows] = 0
        self.storage[:, :, own:rows, :, self.begin + shorter : end] = other.filled
        self._set_paddings([n + longer for n in self.paddings] + [n + shorter for n in other.paddings])

    def _move(self, rows: int, longer: int, length: int) -> None:
        """To storage for so many rows, for `longer` more positions before the first, for `length` from it, and more."""
        layers, pair, _, heads, _, size = self.storage.shape
        own, begin = len(self.paddings), longer + SLACK
        storage = self.storage.new_empty(layers, pair, rows, heads, begin + length + STEP, size)
        storage[:, :, :own] = 0  # a place that no row has had yet costs nothing
        storage[:, :, :own, :, begin : begin + self.length] = self.filled
        self.storage, self.begin = storage, begin
        self._set_paddings(self.paddings)

    def _set_paddings(self, paddings: list[int]) -> None:
        """paddings: how many of the first positions of each row are padding; where it is that of all, it goes."""
        common = min(paddings, default=0)
        self.begin, self.length = self.begin + common, self.length - common
        self.paddings = [padding - common for padding in paddings]
        self.padding = torch.tensor(self.paddings, device=self.storage.device) if any(self.paddings) else None  # [rows]
        self.states = self.storage[:, :, : len(paddings), :, self.begin :]


@dataclass(frozen=True)
class Places:
    """Where the tokens that are read now stand, and what they see."""

    rotary: torch.Tensor  # [seq, 1, head_dim / 2] or [rows, seq, 1, head_dim / 2]
    new: slice | torch.Tensor  # their positions in the cache
    mask: torch.Tensor | None  # [rows or 1, 1, seq, positions], true where a query may look; None: as causal as can be

    def of_last(self) -> torch.Tensor | None:
        """The mask of the last query."""
        return self.mask if self.mask is None else self.mask[:, :, -1:]


class LRUCache:
    """Drops what was used least recently as soon as the entries' sizes exceed the limit. For several threads."""

    def __init__(self, limit: int):
        self.limit, self.size, self.lock = limit, 0, threading.RLock()
        self.entries: OrderedDict[Hashable, tuple[int, Any]] = OrderedDict()  # key: size and value

    def get(self, key: Hashable) -> Any | None:
        with self.lock:
            if key not in self.entries:
                return None
            self.entries.move_to_end(key)
            return self.entries[key][1]

    def put(self, key: Hashable, value: object, size: int = 1) -> None:
        with self.lock:
            self.drop(key)
            if size > self.limit:
                return
            self.entries[key] = size, value
            self.size += size
            while self.size > self.limit:
                self.drop(next(iter(self.entries)))

    def drop(self, key: Hashable) -> None:
        with self.lock:
            self.size -= self.entries.pop(key, (0, None))[0]

    def keys(self) -> list[Hashable]:
        with self.lock:
            return list(self.entries)


class PrefixCache(LRUCache):
    """Keys and values of conversations: one that begins like an earlier one is only read from the first difference on.

    The key of a conversation are the bytes of Prompt.keys, an int64 for each position; its size is its length.
    """

    def longest(self, keys: np.ndarray) -> tuple[int, torch.Tensor | None]:
        """The longest beginning that an earlier conversation has in common with these keys, and its states."""
        with self.lock:
            lengths = {known: common_length(np.frombuffer(known, np.int64), keys) for known in self.entries}
            best = max(lengths, key=lengths.get, default=None)
            return (lengths[best], self.get(best)) if lengths.get(best) else (0, None)

    def add(self, keys: np.ndarray, states: torch.Tensor) -> None:
        """Keep a copy of the states of one row, and drop entries that are only its beginning."""
        if len(keys) > self.limit:
            return
        key = keys.tobytes()
        with self.lock:
            for known in self.keys():
                if key.startswith(known):
                    self.drop(known)
            self.put(key, states.clone(), len(keys))


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many numbers two arrays have in common from their beginning."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter
