"""The export formats: each is one function that writes a model into an empty folder and returns what it wrote.

A new format is one function, and a line in FORMATS.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch

from model.config import IMAGE_TOKEN, IMAGE_TOKEN_ID, MiniMindConfig, VLMConfig
from model.messages import UserError
from model.processing import IMAGE_TAG
from model.vision_encoder import DEFAULT_KIND, pixel_statistics
from model.weights import EMBEDDINGS, HEAD, TOWER_PREFIX, decoder_arguments, infer_config, tied_head
from scripts.export.exported import Exported, Source
from scripts.export.gguf_folder import export_gguf
from scripts.export.onnx_files import check_packages, write_onnx
from scripts.export.proof import prove
from scripts.export.shipped import files_behind, shipped_code
from scripts.export.stock import (
    decoder_tensors,
    generation_config,
    llava_config,
    llava_tensors,
    own_ways,
    selected,
    stock_config,
)
from scripts.export.writing import (
    free_token_id,
    round_weights,
    write_json,
    write_stock,
    write_tensors,
    write_tokenizer,
)

SIGHTS = {  # of the families whose .pth does not tell it: projector, tower, the placeholder and its id
    "minimind": ("linear", "clip_vision_model", IMAGE_TOKEN, IMAGE_TOKEN_ID),
    "minimind3v": ("norm_mlp", "siglip_vision_model", "<|image_pad|>", 12),
}
# Of training, or a limit: a .pth does not tell them, and nothing that it answers depends on them.
NOT_IN_PTH = ("dropout", "router_aux_loss_coef", "max_position_embeddings")
# What an engine puts between Llava's two projector layers where a folder says "linear".
ENGINES = {"transformers": "linear", "vllm": "gelu", "mlx": "gelu"}
ONNX_TOLERANCE = 1e-3  # of fp32 logits: another engine adds up in another order
SCALED = (
    "**For inference only**: its projector is one layer, written as two with numbers that make the GELU between them "
    "exact, and their gradients are of the order 1e12. To train it on, convert it without `--engine`."
)

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
# in {family}'s checkout: out/{name}.pth; in this project:
# python eval_vlm.py --weight {name}.pth --vision_model TOWER --image picture.png"""
ASK_JAVASCRIPT = """\
import { AutoModelForImageTextToText, AutoProcessor, RawImage } from "@huggingface/transformers";

const processor = await AutoProcessor.from_pretrained(FOLDER);
const model = await AutoModelForImageTextToText.from_pretrained(FOLDER, { dtype: "fp32" });
const content = [{ type: "image" }, { type: "text", text: "\\nWhat is in the picture?" }];
const prompt = processor.apply_chat_template([{ role: "user", content }], { add_generation_prompt: true });
const inputs = await processor([await RawImage.read("picture.png")], prompt, { add_special_tokens: false });
const ids = await model.generate({ ...inputs, max_new_tokens: 128 });
const answer = ids.slice(null, [inputs.input_ids.dims.at(-1), null]);
console.log(processor.batch_decode(answer, { skip_special_tokens: true })[0]);"""


def export_transformers(source: Source, folder: Path) -> Exported:
    """MiniMindVLM with its code: loads with trust_remote_code=True, from any directory."""
    _needs_vision(source, "transformers")
    model_class = "modeling_minimind_vlm.MiniMindVLM"
    if not source.with_vision:
        _needs_tower_folder(source)
        model_class = "modeling_without_vision.MiniMindVLMWithoutVision"
    dtype = round_weights(source.model, source.dtype, source.with_vision)
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
    write_json(folder / "config.json", config)
    left_out = (*tied_head(source.model), *(() if source.with_vision else (TOWER_PREFIX,)))
    tensors = {n: v for n, v in source.model.state_dict().items() if not n.startswith(left_out)}
    write_tensors(tensors, source.dtype, folder)
    generation_config(source.model.config).save_pretrained(folder)
    write_tokenizer(source.tokenizer, folder)
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "MiniMindVLMProcessor",
            "auto_map": {"AutoProcessor": "processing_minimind_vlm.MiniMindVLMProcessor"},
            "image_tokens": source.model.config.image_tokens,
            "image_size": source.model.config.image_size,
            "image_token_id": source.model.config.image_token_id,
            "resample": source.model.config.resample,
            "tiles": source.model.config.tiles,
        },
    )
    kind = "MiniMindVLM with its own code: load it with `trust_remote_code=True`."
    tower = "" if source.with_vision else ', model_kwargs={"vision_model": TOWER}'
    usage = ASK.format(further=f", trust_remote_code=True{tower}")
    return Exported(kind, usage, sees=True, has_tower=source.with_vision, dtype=dtype)


def export_llava(source: Source, folder: Path) -> Exported:
    """A stock LlavaForConditionalGeneration around Llama, Qwen2 or Qwen3, dense or MoE: no code of ours in it."""
    _needs_vision(source, "llava")
    config = source.model.config
    image_token_id = free_token_id(source.tokenizer)
    scaled = config.projector == "linear" and ENGINES[source.engine] == "gelu"
    if scaled and source.dtype == torch.float16:
        raise UserError(f"--engine {source.engine}: float16 has no room for what makes GELU linear: take bfloat16")
    stock = llava_config(
        source.model, image_token_id, "linear" if config.projector == "linear" and not scaled else "gelu"
    )
    stock.vision_source = portable_name(config)  # for the way back: transformers keeps what it does not know
    dtype = round_weights(source.model, source.dtype, with_tower=True)
    write_stock(stock, llava_tensors(source.model, stock), source.dtype, folder)
    generation_config(config, suppress_tokens=[image_token_id]).save_pretrained(folder)
    write_tokenizer(source.tokenizer, folder, {IMAGE_TAG: image_token_id})
    _write_llava_processor(config, folder)
    kind = (
        "A stock `LlavaForConditionalGeneration`: no code of its own. Pictures with transparency should be laid on "
        "white first, as in training."
    )
    if scaled:
        kind += f" {SCALED}"
    return Exported(kind, ASK.format(further=""), sees=True, has_tower=True, dtype=dtype, trains=not scaled)


def _write_llava_processor(config: VLMConfig, folder: Path) -> None:
    """How pictures enter: squeezed to a square, nothing cut off, and normalized as the tower's."""
    size = {"height": config.image_size, "width": config.image_size}
    mean, std = pixel_statistics(config.vision_config)
    clip = config.vision_config.get("model_type", DEFAULT_KIND) == DEFAULT_KIND
    cutting = {"do_center_crop": False, "crop_size": size} if clip else {}
    write_json(
        folder / "preprocessor_config.json",
        {
            "image_processor_type": "CLIPImageProcessor" if clip else "SiglipImageProcessor",
            "processor_class": "LlavaProcessor",
            "do_convert_rgb": True, "do_resize": True, "size": size, "resample": config.resample, **cutting,
            "do_rescale": True, "rescale_factor": 1 / 255,
            "do_normalize": True, "image_mean": list(mean), "image_std": list(std),
        },
    )  # fmt: skip
    write_json(
        folder / "processor_config.json",
        {
            "processor_class": "LlavaProcessor", "image_token": IMAGE_TAG,
            "patch_size": config.vision_config["patch_size"],
            "num_additional_image_tokens": int(clip),  # CLIP's class token, which "default" leaves out again
            "vision_feature_select_strategy": selected(config),
        },
    )  # fmt: skip


def export_onnx(source: Source, folder: Path) -> Exported:
    """A `llava` folder with its weights as ONNX files, for browsers and phones: transformers.js reads it.

    Raises:
        UserError: the packages that write it are not installed, or numbers other than float32 are wanted.
    """
    check_packages()
    if source.dtype != torch.float32:
        raise UserError("--to onnx writes float32: leave --dtype out, and let onnxruntime's own tools make it smaller")
    dtype = export_llava(replace(source, engine="transformers"), folder).dtype
    write_onnx(folder)
    kind = "ONNX files as transformers.js and onnxruntime read them, in browsers, phones and Node, on float32."
    return Exported(
        kind, ASK_JAVASCRIPT, sees=True, has_tower=True, dtype=dtype, library="transformers.js", language="js",
        trains=False, prove=partial(prove, tolerance=ONNX_TOLERANCE),
    )  # fmt: skip


def export_llm(source: Source, folder: Path) -> Exported:
    """The decoder alone, as a stock Llama, Qwen2 or Qwen3, dense or MoE."""
    config = source.model.config
    stock = stock_config(config)
    dtype = round_weights(source.model, source.dtype, with_tower=False)
    write_stock(stock, decoder_tensors(source.model), source.dtype, folder)
    generation_config(config).save_pretrained(folder)
    write_tokenizer(source.tokenizer, folder)
    kind = f"The decoder alone, as a stock `{stock.architectures[0]}`: it sees no pictures."
    return Exported(kind, ASK_DECODER, sees=False, has_tower=False, dtype=dtype)


def export_minimind(source: Source, folder: Path) -> Exported:
    """A .pth as MiniMind2-V's trainer writes it: half precision, their names, head and embeddings, no tower.

    Raises:
        UserError: a setting that such a file cannot tell, and that is not MiniMind's.
    """
    if source.model.config.qk_norm:
        raise UserError(f"--to minimind: MiniMind2's decoder has no q/k norms: {_other_format(source)} takes them")
    return _export_pth(source, folder, "minimind", "MiniMind2-V")


def export_minimind3v(source: Source, folder: Path) -> Exported:
    """A .pth as MiniMind-3V's trainer writes it: a Qwen3-like decoder, a SigLIP2 tower named beside it.

    Raises:
        UserError: a part that MiniMind-3V has not, or a setting that such a file cannot tell.
    """
    if not source.model.config.qk_norm:
        other = _other_format(source)
        raise UserError(f"--to minimind3v: its decoder has q/k norms, this one has none: {other} takes it")
    return _export_pth(source, folder, "minimind3v", "MiniMind-3V")


def _check_sight(source: Source, format_name: str) -> None:
    """Raises UserError where a model sees in another way than those whose .pth it would be."""
    config, known = source.model.config, source.tokenizer.get_vocab()
    kind = config.vision_config.get("model_type", DEFAULT_KIND)
    projector, tower, text, number = SIGHTS[format_name]
    reasons = {
        f"the projector {config.projector} and not {projector}": config.projector != projector,
        f"a {kind} and not a {tower}": kind != tower,
        **own_ways(config),
        f"token {config.image_token_id} for pictures and not {text}, {number}":
        (config.image_token_id, known.get(text, number)) != (number, number),
    }  # fmt: skip
    if found := [reason for reason, there in reasons.items() if there]:
        raise UserError(f"--to {format_name}: this model has {'; '.join(found)}: {_other_format(source)} takes it")


def _export_pth(source: Source, folder: Path, format_name: str, family: str) -> Exported:
    """Tensors as a family's trainer saves them, without a word about what they do not tell."""
    model, config = source.model, source.model.config
    told = _settings(MiniMindConfig(**infer_config(model.state_dict(), config.num_attention_heads)))
    lost = [f"{name} {value}" for name, value in _settings(config).items() if told.get(name) != value]
    if lost:
        raise UserError(f"--to {format_name}: a .pth cannot tell {', '.join(lost)}: {_other_format(source)} can")
    if source.sees:
        _check_sight(source, format_name)
        _needs_tower_folder(source)
    dtype = round_weights(model, torch.float16, with_tower=False)
    tensors = {n: v.detach().half() for n, v in model.state_dict().items() if not n.startswith(TOWER_PREFIX)}
    if config.tie_word_embeddings:
        tensors[HEAD] = tensors[EMBEDDINGS]  # one tensor under both names, as there
    torch.save(tensors, folder / f"{source.name}.pth")
    write_tokenizer(source.tokenizer, folder)
    kind = f"A `.pth` as {family} writes it: half precision, without the vision tower."
    usage = ASK_PTH.format(name=source.name, family=family)
    return Exported(kind, usage, sees=source.sees, has_tower=False, dtype=dtype, library="pytorch")


def _settings(config: MiniMindConfig) -> dict:
    """All of a decoder that decides what it answers."""
    settings = {n: v for n, v in decoder_arguments(config.to_dict()).items() if n not in NOT_IN_PTH}
    if not config.use_moe:
        return {n: v for n, v in settings.items() if "expert" not in n and n != "norm_topk_prob"}
    summed, shared = config.weights_sum_to_one, config.shared_expert_size  # whatever was said, or left unsaid
    return {**settings, "norm_topk_prob": summed, "shared_expert_intermediate_size": shared}


def _other_format(source: Source) -> str:
    return "--to transformers" if source.sees else "--to llm"


FORMATS: dict[str, Callable[[Source, Path], Exported]] = {
    "transformers": export_transformers,
    "llava": export_llava,
    "onnx": export_onnx,
    "llm": export_llm,
    "minimind": export_minimind,
    "minimind3v": export_minimind3v,
    "gguf": export_gguf,
}


def portable_name(config: VLMConfig) -> str | None:
    """What the tower is called where paths of this machine mean nothing."""
    return Path(config.vision_source).name if config.vision_source else None


def _needs_vision(source: Source, format_name: str) -> None:
    if not source.sees:
        raise UserError(f"--to {format_name}: these weights are a decoder without eyes; --to llm takes them")


def _needs_tower_folder(source: Source) -> None:
    if not source.model.config.vision_source:
        raise UserError("the tower came from no folder and travels with the model: it cannot be left out")
