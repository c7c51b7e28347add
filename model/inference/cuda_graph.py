"""A decoding step as a CUDA graph: launched at once, where a CPU launches some hundred kernels one after another."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

from model.inference.kv_cache import KVCache, Places

if TYPE_CHECKING:
    from model.inference.decoder import Decoder

# Of the largest logit: other kernels sum in another order.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.05, torch.float16: 0.01}
log = logging.getLogger(__name__)
EAGER_STEPS = 4  # over the same states before they are worth a graph: recording one takes as long as some of them


class StepGraph:
    """Steps of one token a row over the states of one cache, whose place in memory the graph knows.

    All that changes from step to step lies in tensors: the position, how much is padding, the embeddings.
    """

    def __init__(self, decoder: Decoder, states: torch.Tensor):
        """states: of the cache; once they lie elsewhere, another StepGraph is needed."""
        self.decoder, self.states, self.eager_steps = decoder, states, EAGER_STEPS
        self.replay: Callable[[], None] | None = None  # once it is recorded

    def __call__(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """See Decoder.__call__; the cache has room for the token."""
        if self.eager_steps:
            self.eager_steps -= 1
            return self.decoder.read(x, cache)
        if self.replay is None:
            return self._begin(x, cache)
        logits = self._replayed(x, cache)
        cache.length += 1
        return logits

    def _begin(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        """A step kernel by kernel, then recorded, replayed and compared; a graph that is no good is the last one."""
        self._prepare(x, cache)
        expected = self.decoder.read(x, cache)
        cache.length -= 1
        try:
            self.replay = record(self._step)
            far = (self._replayed(x, cache) - expected).abs().max().item() / expected.abs().max().item()
            if not far <= TOLERANCE[x.dtype]:
                raise RuntimeError(f"its logits differ by {far:.2g} of the largest")
        except RuntimeError as error:
            self.decoder.graphs = False
            log.warning("answering goes on without CUDA graphs, which do not work here: %s", error)
        self.decoder.read(x, cache)  # whatever a bad graph has written
        return expected

    def _replayed(self, x: torch.Tensor, cache: KVCache) -> torch.Tensor:
        if cache.padding is not self.known_padding:
            self._know_padding(cache)
        self.x.copy_(x)
        self.position.fill_(cache.length)
        self.replay()
        return self.logits.clone()  # the next step writes over them

    def _prepare(self, x: torch.Tensor, cache: KVCache) -> None:
        device, rows, capacity = x.device, len(x), self.states.shape[-2]
        self.x = torch.zeros_like(x)
        self.position = torch.full((1,), cache.length, device=device)
        self.padding = torch.zeros(rows, dtype=torch.long, device=device)
        self.seen = torch.arange(capacity, device=device)
        self._know_padding(cache)

    def _know_padding(self, cache: KVCache) -> None:
        self.known_padding = cache.padding
        self.padding.copy_(cache.padding) if cache.padding is not None else self.padding.zero_()

    def _step(self) -> None:
        """What is recorded: reads and writes the same tensors whenever it runs."""
        padding = self.padding[:, None]
        rotary = self.decoder.rotary_at(self.position - padding)  # [rows, 1, head_dim / 2]
        visible = (self.seen <= self.position) & (self.seen >= padding)  # [rows, capacity]
        places = Places(rotary.unsqueeze(-2), self.position, visible[:, None, None])
        self.logits = self.decoder.logits(self.x, self.states, places)


def record(step: Callable[[], None]) -> Callable[[], None]:
    """The graph of a step that only reads and writes tensors that stay where they are."""
    aside = torch.cuda.Stream()
    aside.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(aside):  # kernels are loaded and work space taken before, not while it is recorded
        step()
    torch.cuda.current_stream().wait_stream(aside)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, capture_error_mode="thread_local"):  # other threads may answer meanwhile
        step()
    return graph.replay
