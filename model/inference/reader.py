"""Prompts in, logits out, and nothing read twice: pictures and beginnings of conversations are remembered."""

import hashlib
import os
import threading
from collections import OrderedDict
from collections.abc import Hashable, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from model.inference.decoder import Decoder, Memory
from model.inference.packed_linear import pack_linears
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM

SECRET = os.urandom(16)  # so that nobody can make two pictures that pass for one


@dataclass(frozen=True)
class Prompt:
    """Token ids, which of them are placeholders, and the pictures that go there (uint8 [3, height, width])."""

    ids: list[int]
    image_mask: list[bool]
    pictures: list[torch.Tensor] = field(default_factory=list)

    def __post_init__(self) -> None:
        object.__setattr__(self, "digests", [_digest(picture) for picture in self.pictures])

    def keys(self, picture_tokens: int) -> np.ndarray:
        """What tells prompts apart: the id of a token [seq], and in a picture's place the picture's own number."""
        keys = np.array(self.ids, dtype=np.int64)
        if self.pictures:
            keys[np.array(self.image_mask)] = np.repeat(self.digests, picture_tokens)
        return keys


def _digest(picture: torch.Tensor) -> int:
    """A negative number, so that it is no token's."""
    content = hashlib.blake2b(picture.numpy().tobytes(), digest_size=8, key=SECRET).digest()
    return -1 - (int.from_bytes(content, "big") >> 1)


class Remembered:
    """Least recently used out first; several threads may ask. Each entry has a size, and their sum a limit."""

    def __init__(self, limit: int):
        self.limit, self.size, self.lock = limit, 0, threading.Lock()
        self.entries: OrderedDict[Hashable, tuple[int, object]] = OrderedDict()

    def get(self, key: Hashable) -> object | None:
        with self.lock:
            if key not in self.entries:
                return None
            self.entries.move_to_end(key)
            return self.entries[key][1]

    def put(self, key: Hashable, value: object, size: int = 1) -> None:
        with self.lock:
            self._drop(key)
            if size > self.limit:
                return
            self.entries[key] = size, value
            self.size += size
            while self.size > self.limit:
                self._drop(next(iter(self.entries)))

    def drop(self, key: Hashable) -> None:
        with self.lock:
            self._drop(key)

    def keys(self) -> list[Hashable]:
        with self.lock:
            return list(self.entries)

    def _drop(self, key: Hashable) -> None:
        if key in self.entries:
            self.size -= self.entries.pop(key)[0]


def common_length(one: np.ndarray, other: np.ndarray) -> int:
    """How many keys two prompts share from their beginning."""
    shorter = min(len(one), len(other))
    different = np.flatnonzero(one[:shorter] != other[:shorter])
    return int(different[0]) if len(different) else shorter


class Reader:
    """Our own models: prompts to logits through model/inference/decoder.py."""

    def __init__(
        self,
        model: MiniMindForCausalLM,
        device: torch.device,
        dtype: torch.dtype,
        remembered_tokens: int = 16384,
        remembered_pictures: int = 64,
    ):
        """remembered_tokens: of beginnings of conversations; a token takes 8 KB in the 26 M model, 0: none."""
        self.model, self.device, self.sees = model, device, isinstance(model, MiniMindVLM)
        on_cpu = device.type == "cpu"
        model.to(device) if on_cpu else model.to(device, dtype)
        if self.sees and on_cpu:
            pack_linears(model.vision_encoder, dtype)
        self.decoder = Decoder(model, dtype)
        self.picture_tokens = model.config.image_tokens if self.sees else 1
        self.beginnings, self.seen = Remembered(remembered_tokens), Remembered(remembered_pictures)

    def start(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, Memory]:
        """Read prompts of any lengths: logits of their next tokens [rows, vocabulary], and what to go on from.

        Rows are read one by one, each from the longest beginning that is known, so that questions about one picture
        read it once; then they stand in one memory, padded on the left, and take every further step together.
        """
        if len(prompts) == 1:
            return self._read(prompts[0])
        longest = max(len(prompt.ids) for prompt in prompts)
        logits, together = [], self.decoder.new_memory(len(prompts), longest)
        for row, prompt in enumerate(prompts):
            found, alone = self._read(prompt)
            logits.append(found)
            together.states[:, :, row, :, longest - alone.length : longest] = alone.copy()[:, :, 0]
            self.remember(prompt, [], alone)
        together.length = longest
        padding = [longest - len(prompt.ids) for prompt in prompts]
        together.padding = torch.tensor(padding, device=self.device) if any(padding) else None
        return torch.cat(logits), together

    def step(self, tokens: torch.Tensor, memory: Memory) -> torch.Tensor:
        """Tokens [rows] that were drawn -> logits of the next ones [rows, vocabulary]."""
        return self.decoder(self.model.model.embed_tokens(tokens[:, None]), memory)

    def remember(self, prompt: Prompt, tokens: Sequence[int], memory: Memory) -> None:
        """Keep a conversation of one row as a beginning of others. tokens: the answer's, the last of them unread."""
        keys = np.concatenate([prompt.keys(self.picture_tokens), np.array(tokens, dtype=np.int64)])[: memory.length]
        if not len(keys) or len(keys) > self.beginnings.limit:
            return
        for known in self.beginnings.keys():  # noqa: SIM118 (no dict)
            if common_length(np.frombuffer(known, dtype=np.int64), keys) * keys.itemsize == len(known):
                self.beginnings.drop(known)  # the new one begins with it
        self.beginnings.put(keys.tobytes(), memory.copy(), len(keys))

    def _read(self, prompt: Prompt) -> tuple[torch.Tensor, Memory]:
        memory = self.decoder.new_memory(1, len(prompt.ids))
        known, states = self._longest_beginning(prompt.keys(self.picture_tokens)[:-1])  # the last gives the logits
        if known:
            memory.states[..., :known, :] = states[..., :known, :]
            memory.length = known
        ids = torch.tensor([prompt.ids[known:]], device=self.device)
        embeddings = self.model.model.embed_tokens(ids)
        before = sum(prompt.image_mask[:known])
        if before < sum(prompt.image_mask):
            first = before // self.picture_tokens
            tokens = torch.cat(self._picture_tokens(prompt, first))[before - first * self.picture_tokens :]
            mask = torch.tensor([prompt.image_mask[known:]], device=self.device)
            embeddings = embeddings.masked_scatter(mask[..., None], tokens.to(embeddings.dtype))
        return self.decoder(embeddings, memory), memory

    def _longest_beginning(self, keys: np.ndarray) -> tuple[int, torch.Tensor | None]:
        lengths = {known: common_length(np.frombuffer(known, np.int64), keys) for known in self.beginnings.keys()}  # noqa: SIM118
        best = max(lengths, key=lengths.get, default=None)
        states = self.beginnings.get(best) if best is not None and lengths[best] else None
        return (lengths[best], states) if states is not None else (0, None)  # another thread may have pushed it out

    def _picture_tokens(self, prompt: Prompt, first: int) -> list[torch.Tensor]:
        """Token embeddings [image_tokens, hidden] of the pictures from `first` on; new ones pass the tower together."""
        wanted = dict(zip(prompt.digests[first:], prompt.pictures[first:], strict=True))
        found = {digest: self.seen.get(digest) for digest in wanted}
        new = [digest for digest, tokens in found.items() if tokens is None]
        if new:
            patches = self.model.encode_pictures(torch.stack([wanted[digest] for digest in new]).to(self.device))
            projector = self.model.vision_proj
            for digest, tokens in zip(new, projector(patches.to(self.model.dtype)), strict=True):
                found[digest] = tokens
                self.seen.put(digest, tokens)
        return [found[digest] for digest in prompt.digests[first:]]
