"""Strict saving and loading: no tensor stays random in silence. Reads our safetensors, MiniMind's .pth, and bases."""

import inspect
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerFast

from model.base_folder import is_base, read_base, weight_files
from model.config import BICUBIC, MiniMindConfig, VLMConfig
from model.files import file_sha256, portable_path, written_aside
from model.messages import UserError, counted, did_you_mean
from model.minimind_files import EMBEDDINGS, infer_config
from model.model_minimind import MiniMindForCausalLM
from model.model_vlm import MiniMindVLM
from model.projectors import projector_named
from model.tensor_files import read_tensor_file
from model.tokenizer_files import TOKENIZER, has_tokenizer, picture_token, read_tokenizer
from model.tower_folder import read_tower, tower_sizes
from model.vision_encoder import pixel_statistics

TOWER_PREFIX = "vision_encoder."
PROJECTOR_PREFIX = "vision_proj."
WEIGHT_ENDINGS = (".safetensors", ".pth", ".pt", ".bin")
SHOWN = 6  # weights that a message lists
NOWHERE = ": check its name, or train the stage that writes it"
NO_FACTS = ("config", "format", TOKENIZER)  # of a file's metadata
WRAPPERS = ("module.", "_orig_mod.")  # what DDP and torch.compile put before every name
HEAD = "lm_head.weight"  # EMBEDDINGS once more where the config ties them


@dataclass
class LoadReport:
    """What came out of a file; `str()` is the line that every run prints."""

    path: Path
    sha256: str
    matched: int  # parameters
    total: int  # parameters of the model, the tower and a tied head left out
    left_at_start: list[str]  # tensors that the file may lack and does

    def __str__(self) -> str:
        rest = f"; new and untrained: {', '.join(self.left_at_start)}" if self.left_at_start else ""
        percent = f"{100 * self.matched / self.total:.1f} %"
        return f"matched {percent} of {self.total:,} parameters from {self.path} (sha256 {self.sha256[:12]}){rest}"


def read_weights(path: str | Path, shapes_only: bool = False) -> tuple[dict | None, dict[str, torch.Tensor]]:
    """The config (None in a .pth) and the tensors of a file, under MiniMind's names, whatever wrapped the model.

    path: a weights file of ours or MiniMind's, or a base of others: a transformers folder or a .gguf (read_base).

    shapes_only: read no more than the header; the tensors of a .safetensors then have a shape and no content.

    Raises:
        UserError: the file is missing, cut off, or holds something else than tensors.
    """
    path = Path(path)
    if is_base(path):
        return read_base(path, shapes_only)
    if path.is_dir():
        raise UserError(f"{path} is a folder without a config.json: a base is one, or a file{weights_in(path)}")
    if not path.is_file():
        raise UserError(f"{path} does not exist{did_you_mean(path) or weights_in(path.parent) or NOWHERE}")
    if path.suffix not in WEIGHT_ENDINGS:
        raise UserError(f"{path} is no weights file, those end in {', '.join(WEIGHT_ENDINGS)}{weights_in(path.parent)}")
    config, tensors = read_tensor_file(path, shapes_only)
    return config, {_canonical(name): value for name, value in tensors.items()}


def weight_file(path: str | Path) -> Path:
    """The file by whose sha256 weights are known: of a folder the first."""
    return weight_files(path)[0] if is_base(path) else Path(path)


def weights_in(folder: Path) -> str:
    """The weights of a folder and of those in it, as the end of a message; nothing where it has none."""
    paths = sorted(path for form in ("*", "*/*") for path in folder.glob(form) if path.suffix in WEIGHT_ENDINGS[:2])
    more = f" and {len(paths) - SHOWN} more" if len(paths) > SHOWN else ""
    return f": name one of the weights in {folder}, {', '.join(map(str, paths[:SHOWN]))}{more}" if paths else ""


def read_facts(path: str | Path) -> dict[str, str]:
    """The other metadata of a .safetensors: stage, step, validation loss, settings. A .pth has none."""
    if Path(path).suffix != ".safetensors":
        return {}
    with safe_open(path, framework="pt") as file:
        return {name: text for name, text in (file.metadata() or {}).items() if name not in NO_FACTS}


def _canonical(name: str) -> str:
    while name.startswith(WRAPPERS):
        name = name.split(".", 1)[1]
    return name


def load_weights(
    model: torch.nn.Module, path: str | Path, may_miss: tuple[str, ...] = (), ignore: tuple[str, ...] = (),
    advice: str = "Check --hidden_size, --num_hidden_layers, --use_moe and the file's stage.",
) -> LoadReport:  # fmt: skip
    """Load a file into a model; every tensor must match.

    may_miss: prefixes of tensors that the file may lack, such as the projector's in the file of a base decoder.
    ignore: prefixes of tensors in the file that the model does not want.
    advice: the end of the message where something does not match; by default for a model that was made from flags.

    Raises:
        UserError: any other difference; the message lists it.
    """
    config, tensors = read_weights(path)
    wanted, tied = model.state_dict(), tied_head(model)
    tower_elsewhere = (TOWER_PREFIX,) if getattr(model.config, "vision_source", None) else ()
    optional = (*tower_elsewhere, *tied, *may_miss)
    tensors = {name: value for name, value in tensors.items() if not name.startswith(ignore)}
    missing = [name for name in wanted if name not in tensors]
    problems = [f"missing {name}" for name in missing if not name.startswith(optional)]
    problems += [f"unknown {name}" for name in tensors if name not in wanted]
    problems += [
        f"{name} is {list(tensors[name].shape)}, the model wants {list(wanted[name].shape)}"
        for name in tensors if name in wanted and tensors[name].shape != wanted[name].shape
    ]  # fmt: skip
    if tied and HEAD in tensors and not torch.equal(tensors[HEAD], tensors.get(EMBEDDINGS, tensors[HEAD])):
        problems.append(f"{HEAD} is not {EMBEDDINGS}, the model ties the two")
    if problems:
        sizes = f" The file says of itself: {_sizes(config)}." if config else ""
        raise UserError(
            f"{path} does not fit the model in {counted(len(problems), 'tensors')}: "
            f"{'; '.join(problems[:6])}. {advice}{sizes}"
        )
    if not PROJECTOR_PREFIX.startswith(ignore):
        _check_tower(path, config, model)
    model.load_state_dict(tensors, strict=False)
    parameters = {name: v.numel() for name, v in wanted.items() if not name.startswith((TOWER_PREFIX, *tied))}
    return LoadReport(
        path=Path(path),
        sha256=file_sha256(weight_file(path)),
        matched=sum(size for name, size in parameters.items() if name in tensors),
        total=sum(parameters.values()),
        left_at_start=[name for name in missing if name.startswith(may_miss)],
    )


def tied_head(model: torch.nn.Module) -> tuple[str, ...]:
    """The name of the head where it is the embeddings, so that no file needs it; else nothing."""
    return (HEAD,) if model.config.tie_word_embeddings else ()


def _check_tower(path: str | Path, config: dict | None, model: torch.nn.Module) -> None:
    """A projector understands one tower only. Raises UserError where the model has another."""
    trained_with, present = (config or {}).get("vision_sha256"), getattr(model.config, "vision_sha256", None)
    if trained_with and present and trained_with != present:
        raise UserError(
            f"{path} was trained with another tower (sha256 {trained_with[:12]}) than {model.config.vision_source} "
            f"({present[:12]}): name the right one with --vision_model, or start from weights without a projector"
        )


def _sizes(config: dict) -> str:
    names = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "use_moe")
    return ", ".join(f"{name} {config[name]}" for name in names if name in config)


def save_weights(
    model: MiniMindForCausalLM, path: str | Path, facts: dict[str, str] | None = None,
    state: Mapping[str, torch.Tensor] | None = None,
) -> None:  # fmt: skip
    """Write the model in one file with its config: all but the frozen tower, unless that has no folder to come from.

    The file appears complete or not at all.

    facts: further text for the file's metadata: the tokenizer, the stage, scores, data.
    state: the model's state_dict, where several processes hold a part of it each.
    """
    path = Path(path)
    keep_tower = isinstance(model, MiniMindVLM) and not model.config.vision_source
    tensors = {
        name: value.detach().to("cpu", copy=True).contiguous()
        for name, value in (state or model.state_dict()).items()
        if name not in tied_head(model) and (keep_tower or not name.startswith(TOWER_PREFIX))
    }
    path.parent.mkdir(parents=True, exist_ok=True)
    with written_aside(path) as aside:
        save_file(tensors, aside, {"config": json.dumps(model.config.to_dict()), "format": "pt", **(facts or {})})
        aside.chmod(0o644)  # safetensors leaves 0600, which a demo's user could not read


def init_embeddings(model: MiniMindForCausalLM, path: str | Path) -> str:
    """Overwrite the embeddings of some tokens in a model that is still untrained; returns what was done.

    path: {"token_ids": [n], "embeddings": [n, hidden_size]}, as scripts/assets/embed_names.py writes it.
    """
    _, tensors = read_weights(path)
    table = model.model.embed_tokens.weight
    if set(tensors) != {"token_ids", "embeddings"} or tensors["embeddings"].shape[1] != table.shape[1]:
        shapes = {name: list(value.shape) for name, value in tensors.items()}
        raise UserError(f"{path} holds {shapes}: it must be token_ids [n] and embeddings [n, {table.shape[1]}]")
    with torch.no_grad():
        table[tensors["token_ids"]] = tensors["embeddings"].to(table)
    return f"{len(tensors['token_ids'])} token embeddings from {path}"


def read_sizes(path: str | Path, num_attention_heads: int = 8) -> dict:
    """The config of a file, or for MiniMind's .pth what its tensors tell."""
    config, tensors = read_weights(path, shapes_only=True)
    return config or infer_config(tensors, num_attention_heads, path)


def decoder_arguments(config: dict) -> dict:
    """The part of a config that a new decoder is made from; all else follows from it, or is the tower's."""
    names = (*inspect.signature(MiniMindConfig).parameters, "bos_token_id", "eos_token_id", "pad_token_id")
    arguments = {name: config[name] for name in names if name in config}
    if arguments.get("head_dim") == config.get("hidden_size", 0) // config.get("num_attention_heads", 1):
        del arguments["head_dim"]  # it follows from the other two, and goes with them where a flag changes one
    return arguments


def build_vlm(sizes: dict, tower_folder: str | Path, seeing: dict | None = None) -> MiniMindVLM:
    """A new model around the tower of a folder; its config says which one that is.

    sizes: the decoder's, arguments of MiniMindConfig.
    seeing: projector, image_tokens, tiles, frames, image_token_id and the looks of pictures, as of seeing_arguments.
    """
    seeing = dict(seeing or {})
    tower, sha256 = read_tower(tower_folder)
    vision_config = {**tower_sizes(tower_folder), **seeing.pop("looks", {})}
    if vision_config.get("resample") == BICUBIC:  # goes without saying
        del vision_config["resample"]
    source = {"vision_source": portable_path(tower_folder), "vision_sha256": sha256}
    model = MiniMindVLM(VLMConfig(vision_config=vision_config, **source, **seeing, **sizes))
    model.vision_encoder = tower
    return model


def tells_sight(config: dict | None) -> bool:
    """Whether a config is of a file of ours that sees: MiniMind's .pth has none, and its folders' say little."""
    return "vision_config" in (config or {})


def seeing_arguments(config: dict | None, tensors: Mapping[str, torch.Tensor]) -> dict:
    """What a file says of the way from pixels to tokens, beside the tower's sizes; nothing where it is a decoder.

    image_tokens are left out where they are one a patch, so that another tower brings its own number.
    """
    names = [name.removeprefix(PROJECTOR_PREFIX) for name in tensors if name.startswith(PROJECTOR_PREFIX)]
    if not names:
        return {}
    if not tells_sight(config):
        return {"projector": projector_named(names)}
    vision = config["vision_config"]
    mean, std = pixel_statistics(vision)
    looks = {"image_mean": list(mean), "image_std": list(std)}
    looks |= {"picture_size": vision["picture_size"]} if "picture_size" in vision else {}
    looks["resample"] = vision.get("resample", BICUBIC)
    seeing = {"projector": config.get("projector", "linear"), "looks": looks}
    seeing |= {name: config[name] for name in ("image_token_id", "tiles", "frames") if config.get(name)}
    tokens = config.get("image_tokens")
    return (
        seeing if tokens in (None, VLMConfig(vision_config=vision).image_tokens) else {**seeing, "image_tokens": tokens}
    )


def load_model(
    path: str | Path, vision_model: str | Path | None = None, num_attention_heads: int = 8,
    tokenizer: PreTrainedTokenizerFast | None = None,
) -> MiniMindForCausalLM:  # fmt: skip
    """A trained model ready to answer: MiniMindVLM where the file has a projector, MiniMindForCausalLM where not.

    vision_model: the tower's folder; by default the one that the file names.
    num_attention_heads: for MiniMind's .pth, which does not say.
    tokenizer: for such a file, by default the one beside it.

    Raises:
        UserError: the file does not fit, or the tower is missing or another than the one trained with.
    """
    config, tensors = read_weights(path, shapes_only=True)
    sees = any(name.startswith(PROJECTOR_PREFIX) for name in tensors)
    if config and vision_model and any(name.startswith(TOWER_PREFIX) for name in tensors):
        raise UserError(f"{path} holds a tower of its own: leave --vision_model {vision_model} out")
    sizes = decoder_arguments(config or infer_config(tensors, num_attention_heads, path))
    tower_folder = vision_model or (config or {}).get("vision_source")
    if not sees:
        model = MiniMindForCausalLM(MiniMindConfig(**sizes))
    elif tower_folder:
        seeing = seeing_arguments(config, tensors)
        if not tells_sight(config):
            if tokenizer is None and seeing["projector"] == "norm_mlp" and not has_tokenizer(path):
                raise UserError(
                    f"{path} is a MiniMind-3V, whose words and placeholder are its tokenizer's: put its tokenizer.json "
                    "and tokenizer_config.json beside it"
                )
            seeing["image_token_id"] = picture_token(tokenizer or read_tokenizer(path), sizes["vocab_size"])
        model = build_vlm(sizes, tower_folder, seeing)
    elif tells_sight(config):  # a tower that came from nowhere travels in the file
        seeing = {
            name: config[name]
            for name in ("projector", "image_tokens", "image_token_id", "tiles", "frames")
            if name in config
        }
        model = MiniMindVLM(VLMConfig(vision_config=config["vision_config"], **seeing, **sizes))
    else:
        raise UserError(f"{path} does not say which tower it was trained with: name it with --vision_model DIR")
    advice = "It is cut, or was written by another program: copy or train it again."
    # a .pth may hold a CLIP: the folder's serves
    load_weights(model, path, ignore=() if tells_sight(config) else (TOWER_PREFIX,), advice=advice)
    return model.eval()
