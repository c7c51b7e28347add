"""Where the model looked: how much each token of an answer attended to each patch of each picture.

Attention says where information was read from, not why the answer is what it is: what a layer passes on was itself
mixed by the layers below, and some heads rest on a patch that means nothing to them. Read a map as a hint.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import nn
from transformers import PreTrainedTokenizerFast

from model.attention import Attention, rotate
from model.inference.reader import Prompt
from model.model_minimind import MiniMindForCausalLM
from model.views import UNCUT, Cut, Times

# Dark to light through violet, red and orange, the same order of lightness for every eye: RGB at equal steps.
RAMP = np.array([(10, 5, 40), (90, 20, 110), (190, 50, 85), (250, 140, 20), (255, 250, 170)], dtype=np.float32)


@dataclass(frozen=True)
class Looked:
    """Attention of an answer's tokens to the pictures of its conversation."""

    patches: torch.Tensor  # [tokens, layers, views, patches], mean over heads; a token's attention sums to at most 1
    grid: tuple[int, int]  # rows and columns of a view's patches, or of what several were folded into
    cuts: Sequence[Cut] = ()  # how each picture was cut into views
    side: int = 0  # pixels of a view

    def over_pictures(self, tokens: slice = slice(None), layer: int | None = None) -> list[torch.Tensor]:
        """[rows, columns] over the whole of each picture, as fine as its views are."""
        views = self.maps(tokens, layer).split([len(cut.headings) for cut in self.cuts])
        return [self._together(maps, cut) for maps, cut in zip(views, self.cuts, strict=True)]

    def _together(self, maps: torch.Tensor, cut: Cut) -> torch.Tensor:
        """Views [views, rows, columns] of a picture; what lies beyond its edges is left out."""
        if cut == UNCUT:
            return maps[0]
        if isinstance(cut, Times):
            return torch.cat(list(maps), 1)  # side by side, as Frames.strip has the frames
        rows, columns = self.grid
        tiles = maps[1:].view(cut.rows, cut.columns, rows, columns).transpose(1, 2)
        tiles = tiles.reshape(cut.rows * rows, cut.columns * columns)
        tiles = tiles[: -(-cut.height * rows // self.side), : -(-cut.width * columns // self.side)]
        whole = nn.functional.interpolate(maps[None, :1], tiles.shape, mode="bilinear")[0, 0]
        return tiles + whole * (maps[0].sum() / whole.sum().clamp(min=1e-12))  # as much in all, over more places

    def maps(self, tokens: slice = slice(None), layer: int | None = None) -> torch.Tensor:
        """[views, rows, columns]: the attention's mean over these tokens and over the layers, or in one layer."""
        chosen = self.patches[tokens].float()
        chosen = chosen.mean((0, 1)) if layer is None else chosen[:, layer].mean(0)
        return chosen.view(-1, *self.grid)


def attention_weights(
    attention: Attention, x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor], rows: torch.Tensor
) -> torch.Tensor:
    """What scaled_dot_product_attention computes inside and does not return: softmax(QK^T / sqrt(head_dim)), causal.

    x: the layer's normed input [1, seq, hidden]; rows: positions of the queries [n]. Returns [heads, n, seq] in fp32.
    """
    _, length, _ = x.shape
    query, key = (
        rotate(heads, *rotary)[0].float() for heads in attention.query_and_key(x, x)
    )  # [heads, seq, head_dim]
    key = key.repeat_interleave(attention.groups, dim=0)
    scores = query[:, rows] @ key.transpose(1, 2) / attention.head_dim**0.5
    later = torch.arange(length, device=x.device) > rows[:, None]
    return scores.masked_fill(later, -torch.inf).softmax(-1)


@contextmanager
def watch_attention(model: MiniMindForCausalLM, see: Callable[[Attention, tuple], None]) -> Iterator[None]:
    """Calls see(attention, arguments) as each layer's attention is entered."""
    hooks = [layer.self_attn.register_forward_pre_hook(see) for layer in model.model.layers]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.inference_mode()
def look(model: MiniMindForCausalLM, prompt: Prompt, token_ids: Sequence[int]) -> Looked:
    """Run the model once over prompt and answer, and keep how much the answer's tokens attended to the pictures.

    A token is sampled at the position before it, so token k of the answer looks from position len(prompt.ids) + k - 1.

    Raises:
        ValueError: there is no picture or no answer to look from.
    """
    pictures = prompt.pictures
    if not pictures or not token_ids:
        raise ValueError(f"{len(pictures)} pictures and {len(token_ids)} tokens: a map needs one of each at least")
    device = model.model.embed_tokens.weight.device
    ids = torch.tensor([[*prompt.ids, *token_ids[:-1]]], device=device)  # [1, seq]
    image_mask = torch.tensor([prompt.image_mask + [False] * (len(token_ids) - 1)], device=device)
    rows = torch.arange(len(prompt.ids) - 1, ids.shape[1], device=device)
    layers = []

    def see(attention: Attention, arguments: tuple) -> None:
        weights = attention_weights(attention, *arguments[:2], rows).mean(0)  # [tokens, seq]
        layers.append(weights[:, image_mask[0]].view(len(rows), len(pictures), -1).half().cpu())

    with watch_attention(model, see):
        model(ids, image_mask=image_mask, pixel_values=torch.stack(pictures)[None].to(device), logits_to_keep=1)
    return Looked(torch.stack(layers, dim=1), model.config.image_grid, prompt.cuts, model.config.image_size)


def words(tokenizer: PreTrainedTokenizerFast, token_ids: Sequence[int]) -> list[tuple[str, slice]]:
    """An answer's words (in Chinese: characters, or what one token holds), each with its tokens.

    A token that begins with a space, or follows a word that is complete, begins a new one; the pieces of a character
    that took several tokens stay together. Control tokens belong to no word.
    """
    pieces: list[tuple[str, slice]] = []
    start, special = 0, set(tokenizer.all_special_ids)
    for end in range(1, len(token_ids) + 1):
        if token_ids[end - 1] in special:
            start = end
            continue
        text = tokenizer.decode(token_ids[start:end])
        if text.endswith("\ufffd"):
            continue
        if pieces and pieces[-1][1].stop == start and _goes_on(pieces[-1][0], text):
            before, tokens = pieces.pop()
            text, start = before + text, tokens.start
        pieces.append((text, slice(start, end)))
        start = end
    return [(text.strip(), tokens) for text, tokens in pieces if text.strip()]


def _goes_on(before: str, text: str) -> bool:
    """Letters of one alphabetic word that the tokenizer cut in two."""
    return before[-1:].isascii() and before[-1:].isalnum() and text[:1].isascii() and text[:1].isalnum()


def heat_picture(picture: Image.Image, heat: torch.Tensor, most: float) -> Image.Image:
    """The picture in grey under its map: light where it was looked at most.

    heat: [rows, columns]; most: the value that is drawn lightest, the same for pictures that are to be compared.
    """
    levels = Image.fromarray((heat / max(most, 1e-9)).clamp(0, 1).numpy().astype(np.float32))
    level = np.asarray(levels.resize(picture.size, Image.Resampling.BICUBIC)).clip(0, 1)
    steps = np.linspace(0, 1, len(RAMP))
    colour = np.stack([np.interp(level, steps, RAMP[:, channel]) for channel in range(3)], axis=-1)
    grey = np.asarray(picture.convert("L"), dtype=np.float32)[..., None]
    opacity = 0.15 + 0.6 * level[..., None]
    return Image.fromarray((grey * (1 - opacity) + colour * opacity).astype(np.uint8))
