"""A base model that somebody else made, as our sizes and tensors: a folder that transformers wrote, or a GGUF file."""

import copy
import functools
import importlib.util
import json
import mmap
from pathlib import Path

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen2MoeConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)
from transformers.utils import logging

from model.config import ROPE_NUMBERS
from model.messages import UserError
from model.minimind_files import folder_arguments, is_minimind
from model.tensor_files import read_tensor_file

FAMILIES = (LlamaConfig, Qwen2Config, Qwen3Config, Qwen2MoeConfig, Qwen3MoeConfig)
CONFIGS = {config.model_type: config for config in FAMILIES}
OURS = ("minimind", "minimind_vlm")
WEIGHT_NAMES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin",
                "pytorch_model.bin.index.json")  # fmt: skip
GGUF_PACKAGES = ("gguf", "accelerate")
SCALING_KEY = b".rope.scaling.type"


def is_base(path: str | Path) -> bool:
    """Whether a path names a base model of others rather than a weights file: a folder with a config.json, or a .gguf.

    A .gguf is meant even where it does not exist, so that the message is about it.
    """
    return Path(path).suffix == ".gguf" or (Path(path) / "config.json").is_file()


def read_base(path: str | Path, shapes_only: bool = False) -> tuple[dict, dict[str, torch.Tensor]]:
    """Arguments of MiniMindConfig, and the tensors under our names in the precision of the files (of a GGUF: float32).

    shapes_only: read no weights; the tensors then have a shape and, as a rule, no content.

    Raises:
        UserError: something is missing or damaged, or the model asks for what our decoder does not do; it is named.
    """
    path = Path(path)
    if path.suffix == ".gguf":
        config, tensors = _read_gguf(path, shapes_only)
        return arguments_of(config, path), under_our_names(tensors)
    facts = _read_facts(path)
    arguments = None if is_minimind(facts) else arguments_of(_config_of(facts, path), path)
    tensors = {}
    for file in weight_files(path):
        tensors |= read_tensor_file(file, shapes_only)[1]
    if arguments is None:  # MiniMind's names are ours
        return folder_arguments(facts, tensors, path), tensors
    return arguments, under_our_names(tensors)


def weight_files(path: str | Path) -> list[Path]:
    """The files with the weights of a folder, or the .gguf itself. Raises UserError where one is missing."""
    path = Path(path)
    if path.suffix == ".gguf":
        return [path]
    found = next((path / name for name in WEIGHT_NAMES if (path / name).is_file()), None)
    if found is None:
        raise UserError(f"{path} has a config.json and no weights: it needs one of {', '.join(WEIGHT_NAMES)}")
    if found.suffix != ".json":
        return [found]
    try:
        files = sorted({path / name for name in json.loads(found.read_text(encoding="utf-8"))["weight_map"].values()})
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise UserError(f"{found} is no index of weights ({error}): copy or download it again") from error
    if absent := [file.name for file in files if not file.is_file()]:
        raise UserError(f"{path} lacks {', '.join(absent)}, which its {found.name} names: copy or download it again")
    return files


def arguments_of(config: PreTrainedConfig, path: Path) -> dict:
    """What a decoder of transformers is, as arguments of MiniMindConfig.

    Raises UserError where the config asks for what our decoder does not do.
    """
    if wrong := _not_done(config):
        raise UserError(f"{path} asks for {'; '.join(wrong)}: this decoder does not do that. Take another base")
    kind, has_experts = config.model_type, config.model_type.endswith("_moe")
    attention_bias = getattr(config, "attention_bias", False)
    ends = config.eos_token_id
    padding = config.pad_token_id
    if padding is None:  # then the end of a text fills up rows, as everywhere
        padding = ends[0] if isinstance(ends, list) else ends
    rope = {
        name: value for name, value in config.rope_parameters.items() if name not in ("type", "partial_rotary_factor")
    }
    arguments = {
        "hidden_size": config.hidden_size, "num_hidden_layers": config.num_hidden_layers,
        "num_attention_heads": config.num_attention_heads, "num_key_value_heads": config.num_key_value_heads,
        "head_dim": getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads,
        "vocab_size": config.vocab_size, "max_position_embeddings": config.max_position_embeddings,
        "intermediate_size": config.moe_intermediate_size if has_experts else config.intermediate_size,
        "rope_parameters": rope, "rms_norm_eps": config.rms_norm_eps,
        "tie_word_embeddings": config.tie_word_embeddings, "use_moe": has_experts,
        "qk_norm": kind.startswith("qwen3"), "mlp_bias": getattr(config, "mlp_bias", False),
        "qkv_bias": {"qwen2": True, "qwen2_moe": getattr(config, "qkv_bias", True)}.get(kind, attention_bias),
        "output_bias": attention_bias,
        "bos_token_id": config.bos_token_id, "eos_token_id": ends, "pad_token_id": padding,
    }  # fmt: skip
    if has_experts:
        arguments |= {
            "num_experts": config.num_experts, "num_experts_per_tok": config.num_experts_per_tok,
            "norm_topk_prob": config.norm_topk_prob, "router_aux_loss_coef": config.router_aux_loss_coef,
            "shared_expert_intermediate_size": getattr(config, "shared_expert_intermediate_size", 0),
            "shared_expert_gate": kind == "qwen2_moe",
        }  # fmt: skip
    return arguments


def _not_done(config: PreTrainedConfig) -> list[str]:
    """What a config asks for and our decoder does not do, each with its value."""

    def asked(name: str, usual: tuple) -> list[str]:
        value = getattr(config, name, None)
        return [] if value is None or value in usual else [f"{name} {value!r}"]

    rope = config.rope_parameters or {}
    wrong = [f"rope_parameters {rope}"] if any(isinstance(value, dict) for value in rope.values()) else []
    if not wrong and rope.get("rope_type", "default") not in ROPE_NUMBERS:
        wrong.append(f"RoPE of type {rope['rope_type']!r} (known are {', '.join(ROPE_NUMBERS)})")
    if rope.get("partial_rotary_factor", 1.0) != 1.0:
        wrong.append(f"partial_rotary_factor {rope['partial_rotary_factor']}")
    if others := {kind for kind in getattr(config, "layer_types", None) or () if kind != "full_attention"}:
        window = getattr(config, "sliding_window", None)
        wrong.append(f"layer_types {', '.join(sorted(others))}" + (f" of sliding_window {window}" if window else ""))
    elif config.model_type == "qwen3_moe":  # the only one without layer_types; its window is 0 or None if not in use
        wrong += asked("sliding_window", (0,))
    if (quantization := getattr(config, "quantization_config", None)) is not None:
        method = quantization.get("quant_method") if isinstance(quantization, dict) else quantization.quant_method
        wrong.append(f"quantization_config of method {method!r}")
    return [
        *wrong, *asked("hidden_act", ("silu", "swish")), *asked("attention_dropout", (0,)),
        *asked("decoder_sparse_step", (1,)), *asked("mlp_only_layers", ([],)),
    ]  # fmt: skip


def _read_facts(folder: Path) -> dict:
    """config.json of a model that this reads."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = facts.get("model_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(f"{folder}/config.json cannot be read ({error}): copy or download it again") from error
    if is_minimind(facts):
        return facts
    if kind in OURS:
        raise UserError(
            f"{folder} holds a MiniMind model as this project exports it: name the weights file that it was made from, "
            "or ask the folder with `python eval_vlm.py --weight FOLDER`"
        )
    if kind == "llava":
        raise UserError(
            f"{folder} holds a whole Llava: bring it home with `python scripts/convert_vlm.py --from llava --weight "
            f"{folder} --output out/home.safetensors`, and name that file"
        )
    if kind not in CONFIGS:
        raise UserError(
            f"{folder} holds a model of type {kind!r}: as a base this reads {', '.join(CONFIGS)}, minimind-v"
        )
    return facts


def _config_of(facts: dict, folder: Path) -> PreTrainedConfig:
    """By transformers' own class of its type, which knows the names of older versions, too."""
    kind = facts["model_type"]
    try:
        return CONFIGS[kind].from_dict(facts)
    except Exception as error:  # its checks raise classes of their own, or what Python raises over a wrong value
        raise UserError(f"{folder}/config.json is none of a {kind} ({str(error)[:200]}): mend or copy it") from error


def _read_gguf(path: Path, shapes_only: bool) -> tuple[PreTrainedConfig, dict[str, torch.Tensor]]:
    """By transformers' own loading; weights that were quantized come back as the numbers that they stand for."""
    if not path.is_file():
        raise UserError(f"{path} does not exist: check its name")
    if lacking := [package for package in GGUF_PACKAGES if importlib.util.find_spec(package) is None]:
        raise UserError(
            f"{path} is a GGUF file, which cannot be read without {' and '.join(lacking)}: "
            "`pip install -r requirements/real.txt`"
        )
    logging.disable_progress_bar()
    facts = path.stat()
    try:
        config = copy.deepcopy(_gguf_config(path, facts.st_size, facts.st_mtime_ns))
        if shapes_only:
            with torch.device("meta"):
                return config, AutoModelForCausalLM.from_config(config).state_dict()
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, config=config, local_files_only=True, dtype=torch.float32
        )
        return config, model.state_dict()
    except UserError:
        raise
    except Exception as error:  # gguf raises what Python raises over bytes that are something else
        raise UserError(f"{path} is damaged or of an unknown kind ({str(error)[:200]}): copy it again") from error


@functools.cache
def _gguf_config(path: Path, size: int, changed: int) -> PreTrainedConfig:
    """What a GGUF file says of its model; remembered, because gguf takes seconds to read a large vocabulary.

    size, changed: the file's, so that another one under the same name is read.
    """
    config = AutoConfig.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    if config.model_type not in CONFIGS:
        raise UserError(f"{path} holds a model of type {config.model_type!r}: this reads {', '.join(CONFIGS)}")
    if scaled := _scaled_rope(path):
        raise UserError(f"{path} asks for {scaled}, which is lost on the way: take the model's transformers folder")
    return config


def _scaled_rope(path: Path) -> str:
    """How a GGUF file stretches its positions, which transformers does not read from it; nothing where it does not."""
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        if content.find(b"rope_freqs.weight") >= 0:
            return "rope_freqs.weight (Llama 3's RoPE)"
        place = content.find(SCALING_KEY)
        if place < 0:
            return ""
        after = place + len(SCALING_KEY) + 4  # behind the number of the value's type: a length and so many characters
        length = int.from_bytes(content[after : after + 8], "little")
        kind = content[after + 8 : after + 8 + min(length, 20)].decode(errors="replace")
        return "" if kind == "none" else f"rope.scaling.type {kind!r}"


def under_our_names(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors as MiniMindForCausalLM calls them; experts that lie in one tensor are taken apart."""
    named = {}
    for name, value in tensors.items():
        if name.endswith("rotary_emb.inv_freq"):  # which old files carry, and follow from the config
            continue
        if not name.startswith(("model.", "lm_head.")):  # saved without its head
            name = f"model.{name}"
        name = name.replace(".mlp.shared_expert.", ".mlp.shared_experts.0.")
        experts, _, fused = name.rpartition(".experts.")
        if fused not in ("gate_up_proj", "down_proj"):
            named[name] = value
            continue
        for number, expert in enumerate(value):  # [2 * intermediate, hidden] or [hidden, intermediate]
            parts = {"down_proj": expert}
            if fused == "gate_up_proj":
                parts = dict(zip(("gate_proj", "up_proj"), expert.chunk(2), strict=True))
            named |= {f"{experts}.experts.{number}.{part}.weight": tensor for part, tensor in parts.items()}
    return named
