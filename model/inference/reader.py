"""Prompts in, logits out, and nothing is read twice: pictures and beginnings of conversations are remembered."""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Protocol

import numpy as np
import torch

from model.inference.decoder import Decoder
from model.inference.kv_cache import KVCache, LRUCache, PrefixCache
from model.inference.packed_linear import pack_linears
from model.inference.window import Forgotten
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.views import Cut

REMEMBERED_TOKENS = 16384  # of earlier conversations; a token takes 8 KB in the 26 M model
REMEMBERED_PICTURES = 64
AT_ONCE = 16  # views in the tower: tiles and frames are many
SECRET = os.urandom(16)  # so that nobody can make two pictures with the same digest


@dataclass(frozen=True)
class Prompt:
    """A conversation as the model reads it: made by Answerer.prompt."""

    ids: list[int]
    image_mask: list[bool]  # which of the ids are placeholders of pictures
    pictures: list[torch.Tensor] = field(default_factory=list)  # the views of all, uint8 [3, height, width] each
    cuts: list[Cut] = field(default_factory=list)  # how each picture was cut into them
    seconds: float = 0.0  # that it took to make; they count for the first token of its answer
    forgotten: Forgotten = Forgotten()  # by the window, before the first of the ids

    @cached_property
    def digests(self) -> list[int]:
        """A number of each picture's content, negative so that it is no token's id."""
        contents = (picture.numpy().tobytes() for picture in self.pictures)
        hashes = (hashlib.blake2b(content, digest_size=8, key=SECRET).digest() for content in contents)
        return [-1 - (int.from_bytes(content, "big") >> 1) for content in hashes]

    def keys(self, picture_tokens: int) -> np.ndarray:
        """What tells prompts apart [seq]: the ids of the tokens, and the digest of a picture at its placeholders."""
        keys = np.array(self.ids, dtype=np.int64)
        if self.pictures:
            keys[np.array(self.image_mask)] = np.repeat(self.digests, picture_tokens)
        return keys


class RowCache(Protocol):
    """Keys and values of the rows of a batch."""

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these; they stand in this order then, and may be named twice."""

    def join(self, other: "RowCache") -> None:
        """Take in the rows of another cache behind the own ones."""


class PromptReader(Protocol):
    """What an Answerer asks of a model. Reader does it for our own, StockReader for transformers'."""

    sees: bool  # whether prompts may have pictures

    def start(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, RowCache]:
        """Read prompts of any lengths -> logits of their next tokens [rows, vocabulary], and what to go on from."""

    def step(self, tokens: torch.Tensor, cache: RowCache) -> torch.Tensor:
        """Read a further token of each row [rows] -> logits of the next ones [rows, vocabulary]."""

    def remember(self, prompt: Prompt, tokens: Sequence[int], cache: RowCache, row: int = 0) -> None:
        """Keep a row's conversation for others that begin with it. tokens: the answer's, the last not yet read."""


class Reader:
    """Our own models: prompts to logits through model/inference/decoder.py."""

    def __init__(self, model: MiniMindForCausalLM, device: torch.device, dtype: torch.dtype):
        self.model, self.device, self.sees = model, device, isinstance(model, MiniMindVLM)
        on_cpu = device.type == "cpu"
        model.to(device) if on_cpu else model.to(device, dtype)
        if self.sees and on_cpu:
            pack_linears(model.vision_encoder, dtype)
        elif self.sees:
            model.round_tower(dtype)  # to which all of it was cast, but for a tower that needs float32
        self.decoder = Decoder(model, dtype)
        self.picture_tokens = model.config.image_tokens if self.sees else 1
        views = 1 + (model.config.tiles if self.sees else 0)  # of a picture
        self.prefixes, self.pictures = PrefixCache(REMEMBERED_TOKENS), LRUCache(REMEMBERED_PICTURES * views)

    def start(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, KVCache]:
        """See PromptReader.

        Rows are read one by one, each from the longest beginning that is known, so that questions about one picture
        read it once; then they stand in one cache, padded on the left, and take every further step together.
        """
        logits, together = [], None
        for prompt in prompts:
            row_logits, alone = self._read(prompt)
            self.remember(prompt, [], alone)
            logits.append(row_logits)
            if together is None:
                together = alone
            else:
                together.join(alone)
        return torch.cat(logits), together

    def step(self, tokens: torch.Tensor, cache: KVCache) -> torch.Tensor:
        return self.decoder(self.model.model.embed_tokens(tokens[:, None]), cache)

    def remember(self, prompt: Prompt, tokens: Sequence[int], cache: KVCache, row: int = 0) -> None:
        keys = np.concatenate([prompt.keys(self.picture_tokens), np.array(tokens, dtype=np.int64)])
        states = cache.filled_of(row)
        self.prefixes.add(keys[: states.shape[-2]], states)

    def _read(self, prompt: Prompt) -> tuple[torch.Tensor, KVCache]:
        cache = self.decoder.new_cache(1, len(prompt.ids))
        known, states = self.prefixes.longest(prompt.keys(self.picture_tokens)[:-1])  # the last token gives the logits
        if known:
            cache.states[..., :known, :] = states[..., :known, :]
            cache.length = known
        embeddings = self.model.model.embed_tokens(torch.tensor([prompt.ids[known:]], device=self.device))
        # A known beginning never ends within a picture: all of its positions have one key.
        first = sum(prompt.image_mask[:known]) // self.picture_tokens
        if first < len(prompt.pictures):
            tokens = self._picture_tokens(prompt.digests[first:], prompt.pictures[first:])
            mask = torch.tensor([prompt.image_mask[known:]], device=self.device)
            embeddings = embeddings.masked_scatter(mask[..., None], tokens.to(embeddings.dtype))
        return self.decoder(embeddings, cache), cache

    def _picture_tokens(self, digests: list[int], pictures: list[torch.Tensor]) -> torch.Tensor:
        """Token embeddings of pictures [pictures * image_tokens, hidden]; new ones pass the tower, AT_ONCE of them."""
        tokens = {digest: self.pictures.get(digest) for digest in digests}
        new = {digest: picture for digest, picture in zip(digests, pictures, strict=True) if tokens[digest] is None}
        projected: list[torch.Tensor] = []
        if new:
            for part in torch.stack(list(new.values())).split(AT_ONCE):
                patches = self.model.encode_pictures(part.to(self.device))
                projected += self.model.vision_proj(patches.to(self.model.dtype))  # [part, image_tokens, hidden]
            for digest, of_picture in zip(new, projected, strict=True):
                tokens[digest] = of_picture
                self.pictures.put(digest, of_picture)
        return torch.cat([tokens[digest] for digest in digests])
