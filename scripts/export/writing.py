"""What all exports write: JSON, tensors, the tokenizer with its template, and a config that old engines read too."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from model.model_minimind import MiniMindForCausalLM
from model.tokenizer_files import SPECIAL
from model.weights import TOWER_PREFIX


def write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, added: dict[str, int] | None = None) -> None:
    """tokenizer.json with further special tokens, its chat template, and a config that old and new versions read."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"truncation": None, "padding": None}  # the last call's, not the tokenizer's
    if tokenizer("a")["input_ids"] != tokenizer("a", add_special_tokens=False)["input_ids"]:
        content["post_processor"] = None  # it put a token before every text, which the template does where it belongs
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": number, "content": text, **plain} for text, number in (added or {}).items()]
    write_json(folder / "tokenizer.json", content)
    if tokenizer.chat_template:
        (folder / "chat_template.jinja").write_text(tokenizer.chat_template, encoding="utf-8")
    special = {name: str(token) for name in SPECIAL if (token := getattr(tokenizer, name)) is not None}
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", **special, "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False, "padding_side": "left", "add_bos_token": False,
    }  # fmt: skip
    write_json(folder / "tokenizer_config.json", settings)


def free_token_id(tokenizer: PreTrainedTokenizerFast) -> int:
    """The first id that no text becomes."""
    return max(tokenizer.get_vocab().values()) + 1


def write_tensors(tensors: Mapping[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    tensors = {name: value.detach().to(dtype).contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


def write_stock(config: PreTrainedConfig, tensors: dict[str, torch.Tensor], dtype: torch.dtype, folder: Path) -> None:
    """config.json and model.safetensors of one of transformers' own classes."""
    config.dtype = str(dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    _add_old_names(folder)
    write_tensors(tensors, dtype, folder)


def _add_old_names(folder: Path) -> None:
    """rope_theta and rope_scaling as they were called before transformers 5: engines that read config.json themselves
    would else assume Llama's 10,000."""
    path = folder / "config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    decoder = config.get("text_config", config)
    rope = decoder["rope_parameters"]
    decoder["rope_theta"] = rope["rope_theta"]
    if rope["rope_type"] != "default":
        decoder["rope_scaling"] = {name: value for name, value in rope.items() if name != "rope_theta"}
    write_json(path, config)


@torch.no_grad()
def round_weights(model: MiniMindForCausalLM, dtype: torch.dtype, with_tower: bool) -> str:
    """Round the model to the precision that is written, but not a tower that is left out; returns its name."""
    for name, parameter in model.named_parameters():
        if with_tower or not name.startswith(TOWER_PREFIX):
            parameter.copy_(parameter.to(dtype).float())
    return str(dtype).removeprefix("torch.")
