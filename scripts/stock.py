"""Folders as transformers saves them: stock classes through transformers' own code, ours through ours.

No code that lies in a folder is ever run.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, LlavaForConditionalGeneration, PreTrainedModel
from transformers.cache_utils import Cache, DynamicCache

from model.config import MiniMindConfig, VLMConfig
from model.errors import UserError
from model.model_minimind import CACHE_NAME, MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.processing import VLMProcessor, load_tokenizer
from model.vision_encoder import normalize_pixels
from model.weights import load_weights, weights_in
from scripts.reading import Prompt

OURS = {"minimind": (MiniMindConfig, MiniMindForCausalLM), "minimind_vlm": (VLMConfig, MiniMindVLM)}
STOCK = {"llava": LlavaForConditionalGeneration, "llama": AutoModelForCausalLM, "qwen2_moe": AutoModelForCausalLM}


def load_folder(folder: Path) -> tuple[PreTrainedModel, VLMProcessor]:
    """A model with its processor from a folder with config.json, model.safetensors and a tokenizer.

    Raises:
        UserError: something of that is missing, damaged, or of another kind than OURS and STOCK.
    """
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = facts.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            f"{folder} is no model folder: its config.json cannot be read ({error}){weights_in(folder)}"
        ) from error
    if kind not in (*OURS, *STOCK):
        raise UserError(f"{folder} holds a model of type {kind!r}: this reads {', '.join((*OURS, *STOCK))}")
    try:
        tokenizer = load_tokenizer(folder)
        if kind in OURS:
            model = _load_ours(folder, facts, kind)
        else:
            model = STOCK[kind].from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    except (OSError, RuntimeError, SafetensorError, KeyError, TypeError) as error:
        raise UserError(f"{folder} is incomplete or damaged ({str(error)[:200]}): convert or copy it again") from error
    vision = getattr(model.config, "vision_config", None)
    if vision is None:
        return model.eval(), VLMProcessor(tokenizer)
    vision = vision if isinstance(vision, dict) else vision.to_dict()
    image_tokens = (vision["image_size"] // vision["patch_size"]) ** 2
    return model.eval(), VLMProcessor(tokenizer, image_tokens, vision["image_size"])


def _load_ours(folder: Path, facts: dict, kind: str) -> MiniMindForCausalLM:
    config_class, model_class = OURS[kind]
    config = config_class.from_dict(facts)
    if kind == "minimind_vlm":
        config.vision_source = None  # the folder is whole: its tower is in it
    model = model_class(config)
    load_weights(model, folder / "model.safetensors")
    return model


@dataclass
class StockMemory:
    cache: Cache
    attention_mask: torch.Tensor  # [rows, positions], 0 at the padding on the left

    def keep(self, rows: torch.Tensor) -> None:
        self.cache.batch_select_indices(rows)
        self.attention_mask = self.attention_mask[rows]


class StockReader:
    """transformers' own models behind the same three calls as scripts/reading.py's Reader; nothing is remembered."""

    def __init__(self, model: PreTrainedModel, device: torch.device, dtype: torch.dtype):
        self.model, self.device = model.to(device, dtype), device
        self.sees = isinstance(model, LlavaForConditionalGeneration)
        self.limit = getattr(model.config, "text_config", model.config).max_position_embeddings

    def start(self, prompts: Sequence[Prompt]) -> tuple[torch.Tensor, StockMemory]:
        longest = max(len(prompt.ids) for prompt in prompts)
        ids = torch.zeros(len(prompts), longest, dtype=torch.long)
        mask, pictures = torch.zeros_like(ids), []
        for row, prompt in enumerate(prompts):
            place = torch.tensor(prompt.ids)
            if prompt.pictures:  # stock Llava tells placeholders by an id of their own
                place[torch.tensor(prompt.image_mask)] = self.model.config.image_token_id
            ids[row, longest - len(place) :], mask[row, longest - len(place) :] = place, 1
            pictures += prompt.pictures
        inputs = (
            {"pixel_values": normalize_pixels(torch.stack(pictures)).to(self.device, self.model.dtype)}
            if pictures
            else {}
        )
        memory = StockMemory(DynamicCache(), mask.to(self.device))
        return self._forward(ids.to(self.device), memory, **inputs), memory

    def step(self, tokens: torch.Tensor, memory: StockMemory) -> torch.Tensor:
        memory.attention_mask = torch.nn.functional.pad(memory.attention_mask, (0, 1), value=1)
        return self._forward(tokens[:, None], memory)

    def remember(self, prompt: Prompt, tokens: Sequence[int], memory: StockMemory) -> None:
        pass  # a beginning costs these models what it costs transformers

    def _forward(self, ids: torch.Tensor, memory: StockMemory, **inputs) -> torch.Tensor:
        positions = (memory.attention_mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        output = self.model(
            input_ids=ids, attention_mask=memory.attention_mask, position_ids=positions, use_cache=True,
            logits_to_keep=1, **{CACHE_NAME: memory.cache}, **inputs,
        )  # fmt: skip
        return output.logits[:, -1].float()
