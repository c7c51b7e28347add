"""The export formats: each is one function that writes a model into an empty folder and returns what it wrote.

A new format is one function, and a line in FORMATS.
"""

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import PreTrainedConfig, PreTrainedTokenizerFast

from model.config import MiniMindConfig, VLMConfig
from model.files import ROOT
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.processing import IMAGE_TAG
from model.vision_encoder import pixel_statistics
from model.weights import EMBEDDINGS, HEAD, TOWER_PREFIX, infer_config, tied_head
from scripts.export.stock import decoder_tensors, generation_config, llava_config, llava_tensors, stock_config

TEMPLATES = Path(__file__).resolve().parent / "templates"
# What a `transformers` folder ships where its model needs it, and which file of this project it is; only import lines
# differ.
SHIPPED_CODE = {
    "messages.py": ROOT / "model/messages.py",
    "files.py": ROOT / "model/files.py",
    "configuration_minimind_vlm.py": ROOT / "model/config.py",
    "layers.py": ROOT / "model/layers.py",
    "attention.py": ROOT / "model/attention.py",
    "loss.py": ROOT / "model/loss.py",
    "modeling_minimind.py": ROOT / "model/model_minimind.py",
    "modeling_minimind_vlm.py": ROOT / "model/model_vlm.py",
    "projectors.py": ROOT / "model/projectors.py",
    "efficientnet_lite.py": ROOT / "model/efficientnet_lite.py",
    "vision_encoder.py": ROOT / "model/vision_encoder.py",
    "tower_folder.py": ROOT / "model/tower_folder.py",
    "chat_format.py": ROOT / "model/chat_format.py",
    "tokenizer_files.py": ROOT / "model/tokenizer_files.py",
    "rendering.py": ROOT / "model/processing.py",
    "processing_minimind_vlm.py": TEMPLATES / "processing_minimind_vlm.py",
    "modeling_without_vision.py": TEMPLATES / "modeling_without_vision.py",
}
MINIMIND_SETTINGS = ("num_key_value_heads", "intermediate_size", "rope_parameters", "rms_norm_eps",
                     "num_experts_per_tok", "tie_word_embeddings", "head_dim", "qk_norm", "qkv_bias", "output_bias",
                     "mlp_bias", "weights_sum_to_one", "shared_expert_size", "shared_expert_gate")  # fmt: skip
OWN_IMPORT = re.compile(r"^from model\.(\w+) import", re.MULTILINE)
GENERATION_MARK = re.compile(r"\{%-? (end)?generation -?%\}")  # for training only, and other engines do not know it


ASK = """\
from transformers import pipeline

pipe = pipeline("image-text-to-text", model=FOLDER{further})
picture = {{"type": "image", "path": "picture.png"}}
question = {{"type": "text", "text": "\\nWhat is in the picture?"}}
answer = pipe(text=[{{"role": "user", "content": [picture, question]}}], return_full_text=False)
print(answer[0]["generated_text"])"""
ASK_DECODER = """\
from transformers import pipeline

pipe = pipeline("text-generation", model=FOLDER)
answer = pipe([{"role": "user", "content": "Hello"}], return_full_text=False)
print(answer[0]["generated_text"])"""
ASK_PTH = """\
# in MiniMind2-V's checkout: out/{name}.pth; in this project:
# python eval_vlm.py --weight {name}.pth --vision_model TOWER --image picture.png"""


@dataclass(frozen=True)
class Source:
    """What is converted, and how."""

    model: MiniMindForCausalLM  # in fp32; the export rounds it to what it writes, as the proof compares the two
    tokenizer: PreTrainedTokenizerFast
    name: str  # of the weight file, without its ending
    dtype: torch.dtype = torch.float32  # of the tensors written
    with_vision: bool = True  # ship the tower in a `transformers` folder

    @property
    def sees(self) -> bool:
        return isinstance(self.model, MiniMindVLM)


@dataclass(frozen=True)
class Exported:
    """What was written: for the card, the manifest and the proof."""

    kind: str  # the card's first sentence
    usage: str  # Python, for the card
    sees: bool
    has_tower: bool
    dtype: str
    library: str = "transformers"


def export_transformers(source: Source, folder: Path) -> Exported:
    """MiniMindVLM with its code: loads with trust_remote_code=True, from any directory."""
    _needs_vision(source, "transformers")
    model_class = "modeling_minimind_vlm.MiniMindVLM"
    if not source.with_vision:
        _needs_tower_folder(source)
        model_class = "modeling_without_vision.MiniMindVLMWithoutVision"
    dtype = _round_weights(source, source.dtype, source.with_vision)
    for name in files_behind("processing_minimind_vlm.py", f"{model_class.split('.')[0]}.py"):
        (folder / name).write_text(shipped_code(name), encoding="utf-8")
    config = source.model.config.to_dict()
    config |= {
        "architectures": [model_class.split(".")[1]],
        "auto_map": {
            "AutoConfig": "configuration_minimind_vlm.VLMConfig",
            "AutoModelForCausalLM": model_class,
            "AutoModelForImageTextToText": model_class,
        },
        "custom_pipelines": {
            "image-text-to-text": {
                "impl": "processing_minimind_vlm.MiniMindVLMPipeline",
                "pt": ["AutoModelForImageTextToText"],
            }
        },
        "dtype": dtype,
        "vision_source": portable_name(source.model.config),
    }
    _write_json(folder / "config.json", config)
    left_out = (*tied_head(source.model), *(() if source.with_vision else (TOWER_PREFIX,)))
    _write_tensors({n: v for n, v in source.model.state_dict().items() if not n.startswith(left_out)}, source, folder)
    generation_config(source.model.config).save_pretrained(folder)
    _write_tokenizer(source.tokenizer, folder)
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "MiniMindVLMProcessor",
            "auto_map": {"AutoProcessor": "processing_minimind_vlm.MiniMindVLMProcessor"},
            "image_tokens": source.model.config.image_tokens,
            "image_size": source.model.config.image_size,
            "image_token_id": source.model.config.image_token_id,
        },
    )
    kind = "MiniMindVLM with its own code: load it with `trust_remote_code=True`."
    tower = "" if source.with_vision else ', model_kwargs={"vision_model": TOWER}'
    usage = ASK.format(further=f", trust_remote_code=True{tower}")
    return Exported(kind, usage, sees=True, has_tower=source.with_vision, dtype=dtype)


def export_llava(source: Source, folder: Path) -> Exported:
    """A stock LlavaForConditionalGeneration around a stock decoder: no code of ours in it."""
    _needs_vision(source, "llava")
    dtype = _round_weights(source, source.dtype, with_tower=True)
    config = source.model.config
    image_token_id = config.vocab_size
    activation = "linear" if source.dtype == torch.float16 else "gelu"
    stock = llava_config(source.model, image_token_id, activation)
    tensors = llava_tensors(source.model, stock)
    _write_stock(source, folder, "LlavaForConditionalGeneration", stock, tensors)
    generation_config(config, suppress_tokens=[image_token_id]).save_pretrained(folder)
    _write_tokenizer(source.tokenizer, folder, {IMAGE_TAG: image_token_id})
    mean, std = pixel_statistics(config.vision_config)
    size = {"height": config.image_size, "width": config.image_size}
    _write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor", "processor_class": "LlavaProcessor",
            "do_convert_rgb": True, "do_resize": True, "size": size, "resample": 3,  # bicubic
            "do_center_crop": False, "crop_size": size, "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(mean), "image_std": list(std),
        },
    )  # fmt: skip
    _write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor", "image_token": IMAGE_TAG,
            "patch_size": config.vision_config["patch_size"], "num_additional_image_tokens": 1,  # CLIP's class token,
            "vision_feature_select_strategy": "default",  # which this leaves out again
        },
    )  # fmt: skip
    kind = (
        "A stock `LlavaForConditionalGeneration`: no code of its own. Pictures with transparency should be laid on "
        "white first, as in training."
    )
    return Exported(kind, ASK.format(further=""), sees=True, has_tower=True, dtype=dtype)


def export_llm(source: Source, folder: Path) -> Exported:
    """The decoder alone, as a stock Llama, Qwen2, Qwen3, Qwen2-MoE or Qwen3-MoE."""
    config = source.model.config
    stock = stock_config(config)
    dtype = _round_weights(source, source.dtype, with_tower=False)
    name = type(stock).__name__.replace("Config", "ForCausalLM")
    _write_stock(source, folder, name, stock, decoder_tensors(source.model))
    generation_config(config).save_pretrained(folder)
    _write_tokenizer(source.tokenizer, folder)
    kind = f"The decoder alone, as a stock `{name}`: it sees no pictures."
    return Exported(kind, ASK_DECODER, sees=False, has_tower=False, dtype=dtype)


def export_minimind(source: Source, folder: Path) -> Exported:
    """A .pth as MiniMind2-V's trainer writes it: half precision, their names, head and embeddings, no tower.

    Raises:
        UserError: a setting that such a file cannot tell, and that is not MiniMind's.
    """
    config = source.model.config
    inferred = MiniMindConfig(**infer_config(source.model.state_dict(), config.num_attention_heads))
    lost = [
        f"{name} {getattr(config, name)}" for name in MINIMIND_SETTINGS
        if getattr(config, name) != getattr(inferred, name)
    ]  # fmt: skip
    if lost:
        raise UserError(f"--to minimind: a .pth cannot tell {', '.join(lost)}: choose another format")
    if source.sees:
        _needs_tower_folder(source)
    dtype = _round_weights(source, torch.float16, with_tower=False)
    tensors = {n: v.detach().half() for n, v in source.model.state_dict().items() if not n.startswith(TOWER_PREFIX)}
    if source.model.config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDINGS]  # one tensor under both names, as there
    torch.save(tensors, folder / f"{source.name}.pth")
    _write_tokenizer(source.tokenizer, folder)
    kind = "A `.pth` as MiniMind2-V writes it: half precision, without the vision tower."
    usage = ASK_PTH.format(name=source.name)
    return Exported(kind, usage, sees=source.sees, has_tower=False, dtype=dtype, library="pytorch")


FORMATS: dict[str, Callable[[Source, Path], Exported]] = {
    "transformers": export_transformers,
    "llava": export_llava,
    "llm": export_llm,
    "minimind": export_minimind,
}


def shipped_code(name: str) -> str:
    """A file of SHIPPED_CODE as it ships: the project's own, importing its neighbours in the folder."""
    neighbours = {path.stem: shipped.removesuffix(".py") for shipped, path in SHIPPED_CODE.items()}
    text = SHIPPED_CODE[name].read_text(encoding="utf-8")
    shipped = OWN_IMPORT.sub(lambda match: f"from .{neighbours[match[1]]} import", text)
    further = sorted(neighbours[module] for module in _needs(text) - set(OWN_IMPORT.findall(text)))
    if further:  # what its neighbours import
        shipped += "\n\n# transformers 5.3 copies no file but those that are named here\n"
        shipped += "".join(f"from .{module} import __name__ as _  # noqa: E402, F401\n" for module in further)
    return shipped


def files_behind(*names: str) -> list[str]:
    """These files of SHIPPED_CODE, and all that they import."""
    needed = set().union(*(_needs(SHIPPED_CODE[name].read_text(encoding="utf-8")) for name in names))
    return [shipped for shipped, path in SHIPPED_CODE.items() if shipped in names or path.stem in needed]


def _needs(text: str) -> set[str]:
    """Modules of model/ that code imports, and that those import."""
    imported = set(OWN_IMPORT.findall(text))
    return imported.union(*(_needs((ROOT / f"model/{name}.py").read_text(encoding="utf-8")) for name in imported))


def portable_name(config: VLMConfig) -> str | None:
    """What the tower is called where paths of this machine mean nothing."""
    return Path(config.vision_source).name if config.vision_source else None


def _needs_vision(source: Source, format_name: str) -> None:
    if not source.sees:
        raise UserError(f"--to {format_name}: these weights are a decoder without eyes; --to llm takes them")


def _needs_tower_folder(source: Source) -> None:
    if not source.model.config.vision_source:
        raise UserError("the tower came from no folder and travels with the model: it cannot be left out")


@torch.no_grad()
def _round_weights(source: Source, dtype: torch.dtype, with_tower: bool) -> str:
    """Round the model to the precision that is written, but not a tower that is left out; returns its name."""
    for name, parameter in source.model.named_parameters():
        if with_tower or not name.startswith(TOWER_PREFIX):
            parameter.copy_(parameter.to(dtype).float())
    return str(dtype).removeprefix("torch.")


def _write_json(path: Path, content: dict) -> None:
    path.write_text(json.dumps(content, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path, added: dict[str, int] | None = None) -> None:
    """tokenizer.json with further special tokens, our chat template, and a config that old and new versions read."""
    content = json.loads(tokenizer.backend_tokenizer.to_str())
    content |= {"truncation": None, "padding": None}  # the last call's, not the tokenizer's
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    content["added_tokens"] += [{"id": number, "content": text, **plain} for text, number in (added or {}).items()]
    _write_json(folder / "tokenizer.json", content)
    template = (ROOT / "model/chat_template.jinja").read_text(encoding="utf-8")
    (folder / "chat_template.jinja").write_text(GENERATION_MARK.sub("", template), encoding="utf-8")
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<|im_start|>", "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>", "unk_token": "<|endoftext|>", "model_max_length": tokenizer.model_max_length,
        "clean_up_tokenization_spaces": False, "padding_side": "left", "add_bos_token": False,
    }  # fmt: skip
    _write_json(folder / "tokenizer_config.json", settings)


def _write_stock(
    source: Source, folder: Path, architecture: str, config: PreTrainedConfig, tensors: dict[str, torch.Tensor]
) -> None:
    """config.json and model.safetensors of one of transformers' own classes."""
    config.architectures, config.dtype = [architecture], str(source.dtype).removeprefix("torch.")
    config.save_pretrained(folder)
    _add_old_names(folder)
    _write_tensors(tensors, source, folder)


def _write_tensors(tensors: dict[str, torch.Tensor], source: Source, folder: Path) -> None:
    tensors = {name: value.detach().to(source.dtype).contiguous() for name, value in tensors.items()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})


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
    _write_json(path, config)
