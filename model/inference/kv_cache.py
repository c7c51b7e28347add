"""Keys and values of what the decoder has read: of the answers in progress, and of earlier conversations."""

import threading
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

STEP = 256  # positions by which a cache grows


@dataclass
class KVCache:
    """Keys and values of all positions so far, in storage that has room for more."""

    states: torch.Tensor  # [layers, 2, rows, key/value heads, capacity, head_dim]
    length: int = 0  # positions filled
    padding: torch.Tensor | None = None  # [rows], how many of the first positions are padding; None: none anywhere
    graph: Any = None  # the StepGraph over these states, on a GPU

    @property
    def filled(self) -> torch.Tensor:
        """[layers, 2, rows, key/value heads, length, head_dim], a view."""
        return self.states[..., : self.length, :]

    def make_room(self, length: int) -> None:
        missing = length - self.states.shape[-2]
        if missing > 0:
            self.states = F.pad(self.states, (0, 0, 0, -(-missing // STEP) * STEP))

    def keep(self, rows: torch.Tensor) -> None:
        """Forget the other rows."""
        self.states = self.states[:, :, rows]
        self.padding = None if self.padding is None else self.padding[rows]


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

    def add(self, keys: np.ndarray, cache: KVCache) -> None:
        """Keep a copy of a cache of one row, and drop entries that are only its beginning."""
        if len(keys) > self.limit:
            return
        key = keys.tobytes()
        with self.lock:
            for known in self.keys():
                if key.startswith(known):
                    self.drop(known)
            self.put(key, cache.filled.clone(), len(keys))


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many numbers two arrays have in common from their beginning."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter
