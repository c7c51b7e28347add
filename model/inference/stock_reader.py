"""Folders as transformers saves them: stock classes through transformers' own code, ours through ours.

No code that lies in a folder is ever run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.nn.utils.rnn import pad_sequence
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from model.base_folder import CONFIGS
from model.config import BICUBIC, MiniMindConfig, VLMConfig
from model.files import find_folder
from model.inference.llava_projector import unscale_projector
from model.inference.reader import Prompt
from model.messages import UserError
from model.minimind_files import is_minimind
from model.model_minimind import CACHE_NAME, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor
from model.tokenizer_files import read_tokenizer
from model.tower_folder import looks_of, read_tower
from model.vision_encoder import KINDS, normalize_pixels, pixel_statistics
from model.weights import load_model, load_weights, weights_in

OURS = {"minimind": (MiniMindConfig, MiniMindForCausalLM), "minimind_vlm": (VLMConfig, MiniMindVLM)}
STOCK = {"llava": LlavaForConditionalGeneration, **dict.fromkeys(CONFIGS, AutoModelForCausalLM)}
BLIND = "MiniMindVLMWithoutVision"  # the class that a --no_vision folder names


def load_folder(folder: Path, vision_model: str | None = None) -> tuple[PreTrainedModel, VLMProcessor]:
    """A model with its processor from a folder with config.json, model.safetensors and a tokenizer.

    vision_model: the tower's folder, for one that convert_vlm wrote with --no_vision.

    Raises:
        UserError: something of that is missing, damaged, or of another kind than OURS and STOCK.
    """
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = facts.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        reason = getattr(error, "strerror", error)
        raise UserError(
            f"{folder} is no model folder: its config.json cannot be read ({reason}){weights_in(folder)}"
        ) from error
    if is_minimind(facts):
        model = load_model(folder, vision_model)
        return model, VLMProcessor.for_config(model.config, read_tokenizer(folder))
    if kind not in (*OURS, *STOCK):
        raise UserError(f"{folder} holds a model of type {kind!r}: this reads {', '.join((*OURS, *STOCK))}")
    without_tower = BLIND in (facts.get("architectures") or ())
    if vision_model and not without_tower:
        raise UserError(f"{folder} is a folder and holds a tower of its own: leave --vision_model out")
    try:
        tokenizer = read_tokenizer(folder)
        if kind in OURS:
            model = _load_ours(folder, facts, _tower_of(folder, facts, vision_model) if without_tower else None)
        else:
            model = STOCK[kind].from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, RuntimeError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is incomplete or damaged ({str(error)[:200]}): convert or copy it again") from error
    model.eval()
    if not isinstance(model, LlavaForConditionalGeneration):
        return model, VLMProcessor.for_config(model.config, tokenizer)
    vision = model.config.vision_config
    if vision.model_type not in KINDS:
        raise UserError(f"{folder} sees through a {vision.model_type}: this reads Llava with {', '.join(KINDS)}")
    looks = looks_of(folder, KINDS[vision.model_type], vision.to_dict())
    vision.image_mean, vision.image_std = looks["image_mean"], looks["image_std"]
    tokens, filter_number = (vision.image_size // vision.patch_size) ** 2, looks.get("resample", BICUBIC)
    return model, VLMProcessor(tokenizer, tokens, vision.image_size, resample=filter_number)


def _tower_of(folder: Path, facts: dict, named: str | None) -> tuple[PreTrainedModel, str]:
    """The tower of a --no_vision folder, and its path: as named, inside the folder, or among the project's."""
    name, wanted = facts.get("vision_source"), facts.get("vision_sha256")
    places = [named] if named else [folder / "vision_model", find_folder(f"model/vision_model/{name}")]
    place = next((place for place in places if find_folder(place).is_dir()), None)
    if place is None:
        raise UserError(
            f"{folder} comes without its vision tower ({name}, sha256 {str(wanted)[:12]}), which is not in "
            f"{', nor in '.join(map(str, places))}: name its folder with --vision_model DIR"
        )
    tower, sha256 = read_tower(place)
    if sha256 != wanted:
        raise UserError(
            f"{place} is another tower (sha256 {sha256[:12]}) than the one {folder} was trained with ({name}, "
            f"{str(wanted)[:12]}): name the right one with --vision_model DIR"
        )
    return tower, str(place)


def _load_ours(folder: Path, facts: dict, tower: tuple[PreTrainedModel, str] | None) -> MiniMindForCausalLM:
    config_class, model_class = OURS[facts["model_type"]]
    config = config_class.from_dict(facts)
    if model_class is MiniMindVLM:
        config.vision_source = tower[1] if tower else None  # the tower of a complete folder lies in it
    model = model_class(config)
    if tower:
        model.vision_encoder = tower[0]
    load_weights(model, folder / "model.safetensors")
    return model


@dataclass
class StockCache:
    cache: Cache
    attention_mask: torch.Tensor  # [rows, positions], 0 at the padding on the left

    def keep(self, rows: Sequence[int]) -> None:
        kept = torch.tensor(rows, device=self.attention_mask.device)
        self.cache.batch_select_indices(kept)
        mask = self.attention_mask[kept]
        common = int(mask.argmax(1).min()) if len(rows) else 0  # positions that are padding in every row
        self.attention_mask = mask[:, common:]
        for layer in self.cache.layers:
            layer.keys, layer.values = layer.keys[:, :, common:], layer.values[:, :, common:]

    def join(self, other: "StockCache") -> None:
        longest = max(self.attention_mask.shape[1], other.attention_mask.shape[1])

        def together(own: torch.Tensor, others: torch.Tensor, after: int) -> torch.Tensor:
            """As long as the longest, filled up in front; `after`: dimensions behind that of the positions."""
            filled = (nn.functional.pad(t, (0, 0) * after + (longest - t.shape[-1 - after], 0)) for t in (own, others))
            return torch.cat([*filled])

        for layer, more in zip(self.cache.layers, other.cache.layers, strict=True):
            layer.keys, layer.values = together(layer.keys, more.keys, 1), together(layer.values, more.values, 1)
        self.attention_mask = together(self.attention_mask, other.attention_mask, 0)


class StockReader:
    """transformers' own models as a PromptReader; nothing is remembered."""

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype):
        self.sees = isinstance(model, LlavaForConditionalGeneration)
        if self.sees:
            unscale_projector(model.model.multi_modal_projector)
            self.statistics = pixel_statistics(vars(model.config.vision_config))
        self.model, self.device = model.to(device, dtype), device

    def start(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, StockCache]:
        rows = [torch.tensor(prompt.ids) for prompt in prompts]
        mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True, padding_side="left")
        pictures = []
        for row, prompt in zip(rows, prompts, strict=True):
            if prompt.pictures:  # stock Llava knows placeholders by an id of their own
                row[torch.tensor(prompt.image_mask)] = self.model.config.image_token_id
            pictures += prompt.pictures
        ids = pad_sequence(rows, batch_first=True, padding_side="left")  # [rows, longest]
        inputs = {}
        if pictures:
            inputs["pixel_values"] = normalize_pixels(torch.stack(pictures), *self.statistics).to(
                self.device, self.model.dtype
            )
        cache = StockCache(DynamicCache(), mask.to(self.device))
        return self._forward(ids.to(self.device), cache, **inputs), cache

    def step(self, tokens: torch.Tensor, cache: StockCache) -> torch.Tensor:
        cache.attention_mask = nn.functional.pad(cache.attention_mask, (0, 1), value=1)
        return self._forward(tokens[:, None], cache)

    def remember(self, prompt: Prompt, tokens: Sequence[int], cache: StockCache, row: int = 0) -> None:
        pass  # a conversation that begins like an earlier one costs what it costs in transformers

    def _forward(self, ids: torch.Tensor, cache: StockCache, **inputs) -> torch.Tensor:
        """ids [rows, seq] -> logits of the next token [rows, vocabulary] in float32."""
        positions = (cache.attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids, attention_mask=cache.attention_mask, position_ids=positions, use_cache=True,
            logits_to_keep=1, **{CACHE_NAME: cache.cache}, **inputs,
        )  # fmt: skip
        return output.logits[:, -1].float()
