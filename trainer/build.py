"""From the flags and the file to start from to a model: what its decoder is, and what is in its weights."""

import math
from collections.abc import Callable
from dataclasses import replace

import torch
from transformers import PreTrainedTokenizerFast

from dataset.vlm_dataset import text_only
from model.config import MiniMindConfig, VLMConfig
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.tokenizer_files import picture_token, special_ids
from model.tower_folder import tower_sizes
from model.weights import (
    PROJECTOR_PREFIX,
    build_vlm,
    decoder_arguments,
    init_embeddings,
    load_weights,
    read_sizes,
    read_weights,
    seeing_arguments,
)
from trainer.checkpoint.probe import check_probe
from trainer.checkpoint.resume import last_manifest
from trainer.config import OPEN, SIZES, StageConfig
from trainer.data import StageData

LENGTH = ("rope_parameters", "rope_theta", "max_position_embeddings")  # what --rope_theta and --yarn_factor set
CHECKED_ROWS = 32  # for the text loss before training


def with_sizes(config: StageConfig) -> StageConfig:
    """The config with its open flags filled in: from the file to start from, or MiniMind2-Small's.

    A resumed run keeps its dropout; its sizes say which run that is.
    """
    known = {**SIZES, "dropout": 0.0}
    known |= {name: type(known[name])(value) for name, value in start_settings(config).items() if name in known}
    filled = replace(config, **{name: value for name, value in known.items() if getattr(config, name) == OPEN[name]})
    manifest = last_manifest(filled)
    if manifest is None or config.dropout != OPEN["dropout"]:
        return filled
    return replace(filled, dropout=manifest["fingerprints"].get("--dropout", filled.dropout))


def start_settings(config: StageConfig) -> dict:
    """What the file to start from says of its decoder, as arguments of MiniMindConfig."""
    if not config.start_path:
        return {}
    heads = config.num_attention_heads or SIZES["num_attention_heads"]  # which a .pth does not tell
    try:
        return decoder_arguments(read_sizes(config.start_path, heads))
    except UserError as error:
        raise UserError(f"--from_weight {error}") from error


def decoder_settings(config: StageConfig, say: Callable = print) -> dict:
    """Arguments of MiniMindConfig: the flags, and what these leave open as the file to start from says.

    A resumed run keeps what it was built from; checkpoints of older versions do not say, their decoders were MiniMind's
    in all that has no flag. What comes out other than in the file is printed.
    """
    in_file, manifest = start_settings(config), last_manifest(config)
    flags = {name: getattr(config, name) for name in OPEN if getattr(config, name) != OPEN[name]}
    settings = {**(in_file if manifest is None else manifest.get("decoder", {})), **flags}
    settings["use_moe"] = bool(settings.get("use_moe"))
    settings |= {name: in_file[name] for name in ("vocab_size",) if name in in_file}  # before build_model adds one
    for name, value in flags.items():
        if in_file.get(name, value) != value:
            say(f"--{name} {value} where {config.start_path} says {in_file[name]}")
    told = list(flags)  # whose difference a line has told
    if config.rope_theta or config.yarn_factor:
        settings |= longer_context(config, settings, say)
        told += LENGTH
    if manifest is not None:
        built = decoder_arguments(MiniMindConfig(**settings).to_dict())
        for name in in_file.keys() - set(told):
            if built.get(name, in_file[name]) != in_file[name]:
                say(
                    f"{name} {built[name]} as in this run's checkpoints, where {config.start_path} says {in_file[name]}"
                )
    return settings


def longer_context(config: StageConfig, settings: dict, say: Callable = print) -> dict:
    """Of arguments of MiniMindConfig those that --rope_theta and --yarn_factor change: RoPE's base, what scales it, and
    how many positions there are. What is left open stays. A line says what is other than in the file to start from.

    Raises UserError for a factor that shortens.
    """
    if 0 < config.yarn_factor < 1:
        raise UserError(f"--yarn_factor {config.yarn_factor:g} would shorten what can be read: give 1 or more, or 0")
    before = MiniMindConfig(**settings)
    rope, positions = dict(before.rope_parameters), max(before.max_position_embeddings, config.max_seq_len)
    if config.rope_theta and config.rope_theta != rope["rope_theta"]:
        if config.start_path:
            said = f"--rope_theta {config.rope_theta:g} where {config.start_path} says {rope['rope_theta']:g}"
            say(f"{said}: the new one is kept")
        rope["rope_theta"] = config.rope_theta
    if config.yarn_factor:
        rope = {"rope_type": "yarn", "rope_theta": rope["rope_theta"], "factor": config.yarn_factor,
                "original_max_position_embeddings": config.max_seq_len}  # fmt: skip
        positions = round(config.yarn_factor * config.max_seq_len)
        say(f"--yarn_factor {config.yarn_factor:g} on rows of {config.max_seq_len}: {positions} positions")
    elif config.max_seq_len > before.max_position_embeddings:
        were = before.max_position_embeddings
        say(f"--max_seq_len {config.max_seq_len} where there were {were} positions: now there are as many")
    return {"rope_parameters": rope, "rope_theta": None, "max_position_embeddings": positions}


def seeing_settings(config: StageConfig, image_token_id: int) -> dict:
    """Projector, tokens a picture, its looks and placeholder: as the weights to start from have them, else as the flags
    say. image_token_id: a token that can be had for the placeholder.

    Raises:
        UserError: the weights have a projector of another kind, or for another number of tokens.
    """
    flags = {"projector": config.projector, "image_tokens": config.image_tokens, "tiles": config.tiles}
    flags = {name: value for name, value in flags.items() if value}
    frames = {"frames": config.frames} if config.frames else {}  # of any number: a model sees them one by one
    start = seeing_arguments(*read_weights(config.start_path, shapes_only=True)) if config.start_path else {}
    if not start:
        return {"image_token_id": image_token_id, **flags, **frames}
    patches = VLMConfig(vision_config=tower_sizes(config.vision_model)).image_tokens
    trained = {"image_tokens": patches, "tiles": config.tiles, **start}  # who knows no tiles may learn to see them
    for name, value in flags.items():
        if value != trained[name]:
            raise UserError(
                f"--{name} {value} is not what {config.start_path} was trained with, {trained[name]}: leave --{name} "
                "out, or start from weights without a projector"
            )
    return {"image_token_id": image_token_id, **flags, **start, **frames}


def build_model(config: StageConfig, tokenizer: PreTrainedTokenizerFast, say: Callable = print) -> MiniMindForCausalLM:
    """The model that flags and start file describe, with its tower, filled from that file. tokenizer: the file's."""
    settings = decoder_settings(config, say) | special_ids(tokenizer)
    if config.with_vision:
        vocab_size = MiniMindConfig(**settings).vocab_size
        seeing = seeing_settings(config, picture_token(tokenizer, vocab_size))
        model = build_vlm(settings, config.vision_model, seeing)
    else:
        model = MiniMindForCausalLM(MiniMindConfig(**settings))
    if config.start_path and config.init_embeddings:
        raise UserError("--init_embeddings is for --from_weight none: weights bring their own embeddings")
    if config.start_path:
        may_miss, ignore = ((PROJECTOR_PREFIX,), ()) if config.with_vision else ((), (PROJECTOR_PREFIX,))
        say(load_weights(model, config.start_path, may_miss, ignore))
    elif config.init_embeddings:
        say(init_embeddings(model, config.init_embeddings))
    elif config.with_vision:
        say("the decoder starts from nothing: it will first have to learn to speak (--from_weight names a base)")
    if config.with_vision and model.config.image_token_id >= model.config.vocab_size:
        model.resize_token_embeddings(model.config.image_token_id + 1, mean_resizing=False)
        say("every token of this base is taken: the embeddings grow by one, for the placeholder of pictures")
    return model


@torch.no_grad()
def check_start(config: StageConfig, model: MiniMindForCausalLM, data: StageData, say: Callable = print) -> None:
    """Hold the weights to what their file says of them, and say how well they know the words of this data.

    Pictures are left out. New words are told, never refused. A resumed run has its weights from a checkpoint.
    """
    if not config.start_path:
        return
    if last_manifest(config) is None:
        check_probe(model, data.processor, config.start_path)
    rows = [data.train.dataset.rendered(number) for number in data.train.indices[:CHECKED_ROWS]]
    loss, guess = float(model.eval()(**text_only(rows)).loss), math.log(model.config.vocab_size)
    say(f"text loss before training, pictures left out: {loss:.2f}")
    if loss > 0.8 * guess:
        say(
            f"these words are new to this decoder: text loss {loss:.1f} (a uniform guess has {guess:.1f}); it will "
            "learn them, and forget others unless old data is mixed in: docs/your_own_data.md"
        )
