"""The way back of stock.py: a stock Llava folder that others have trained on, as our model again."""

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from transformers import LlavaConfig, PreTrainedTokenizerFast

from model.base_folder import CONFIGS, arguments_of, under_our_names, weight_files
from model.config import VLMConfig
from model.files import find_folder, portable_path
from model.inference.llava_projector import our_projector
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from model.processing import IMAGE_TAG
from model.tensor_files import read_tensor_file
from model.tokenizer_files import picture_token, read_tokenizer, tokenizer_from_text, tokenizer_text
from model.tower_folder import lacks_tower, looks_of, read_tower
from model.vision_encoder import KINDS
from model.weights import EMBEDDINGS, HEAD, PROJECTOR_PREFIX, TOWER_PREFIX
from scripts.export.stock import SELECTED

# What files call the parts, published ones and those that transformers writes; an outer `model.` may stand before.
LANGUAGE = {"language_model.model.": "model.", "language_model.lm_head.": "lm_head.", "language_model.": "model.",
            "lm_head.": "lm_head."}  # fmt: skip
SIGHT = {"multi_modal_projector.": PROJECTOR_PREFIX, "vision_tower.vision_model.": TOWER_PREFIX,
         "vision_tower.": TOWER_PREFIX}  # fmt: skip


def read_llava(folder: Path, vision_model: str | None = None) -> tuple[MiniMindVLM, PreTrainedTokenizerFast]:
    """The model of a folder, and its tokenizer as it was before a token for pictures was added.

    vision_model: the tower's folder, by default the one that our export named. Where its weights are the folder's, the
    model knows it as where it comes from; a tower that was trained on stays with the model.

    Raises:
        UserError: something is missing or damaged, or computes what our model does not.
    """
    config = _config_of(folder)
    tensors: dict[str, torch.Tensor] = {}
    for file in weight_files(folder):
        tensors |= {_our_name(name): value.float() for name, value in read_tensor_file(file)[1].items()}
    projector = {n.removeprefix(PROJECTOR_PREFIX): v for n, v in tensors.items() if n.startswith(PROJECTOR_PREFIX)}
    tower = {n.removeprefix(TOWER_PREFIX): v for n, v in tensors.items() if n.startswith(TOWER_PREFIX)}
    decoder = under_our_names({n: v for n, v in tensors.items() if not n.startswith((PROJECTOR_PREFIX, TOWER_PREFIX))})
    try:
        name, projector = our_projector(projector, config.projector_hidden_act)
        tokenizer, image_token_id, rows = _without_picture_token(read_tokenizer(folder), config)
        for table in (EMBEDDINGS, HEAD):
            if table in decoder:
                decoder[table] = decoder[table][:rows]
    except KeyError as error:
        raise UserError(f"{folder} lacks {error}: copy it again") from error
    sizes = {**arguments_of(config.text_config, folder), "vocab_size": rows}
    sizes["tie_word_embeddings"] = HEAD not in decoder
    kind = KINDS[config.vision_config.model_type]
    vision = {field: getattr(config.vision_config, field) for field in (*kind.sizes, "hidden_size", "patch_size")}
    vision = {"model_type": config.vision_config.model_type, **vision, **looks_of(folder, kind, vision)}
    model = MiniMindVLM(VLMConfig(vision_config=vision, projector=name, image_token_id=image_token_id, **sizes))
    projector = {f"{PROJECTOR_PREFIX}{name}": value for name, value in projector.items()}
    _fill(model, {**decoder, **projector, **{f"{TOWER_PREFIX}{name}": v for name, v in tower.items()}}, folder)
    _name_tower(model, vision_model or getattr(config, "vision_source", None), must=vision_model is not None)
    return model.eval(), tokenizer


def _config_of(folder: Path) -> LlavaConfig:
    """Raises UserError where it is none, or sees in another way than our model."""
    try:
        facts = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        kind = facts.get("model_type")
        config = LlavaConfig.from_dict(facts) if kind == "llava" else None
    except Exception as error:  # transformers' checks raise classes of their own
        raise UserError(f"{folder}/config.json cannot be read ({str(error)[:200]}): copy it again") from error
    if config is None:
        raise UserError(f"--from llava: {folder} holds a model of type {kind!r}, and no Llava")
    tower, decoder = config.vision_config.model_type, config.text_config.model_type
    reasons = {
        f"a {tower} and none of {', '.join(SELECTED)}": tower not in SELECTED,
        f"a decoder of type {decoder!r} and none of {', '.join(CONFIGS)}": decoder not in CONFIGS,
        f"the tower's layer {config.vision_feature_layer} and not the last": config.vision_feature_layer != -1,
        f"vision_feature_select_strategy {config.vision_feature_select_strategy!r}":
        config.vision_feature_select_strategy != SELECTED.get(tower),
    }  # fmt: skip
    if found := [reason for reason, there in reasons.items() if there]:
        raise UserError(f"--from llava: {folder} has {'; '.join(found)}: our model does not do that")
    return config


def _our_name(name: str) -> str:
    inner = name.removeprefix("model.")
    for theirs, ours in {**SIGHT, **LANGUAGE}.items():
        if inner.startswith(theirs):
            return ours + inner.removeprefix(theirs)
    return name


def _without_picture_token(
    tokenizer: PreTrainedTokenizerFast, config: LlavaConfig
) -> tuple[PreTrainedTokenizerFast, int, int]:
    """Undo what the export added: the tokenizer, the id of the placeholder, and the rows of the embeddings.

    A token for pictures that stands among the others, as in folders that were never ours, stays as it is.
    """
    number, rows = config.image_token_id, config.text_config.vocab_size
    if tokenizer.convert_ids_to_tokens(number) != IMAGE_TAG or number != max(tokenizer.get_vocab().values()):
        return tokenizer, number, rows
    facts = json.loads(tokenizer_text(tokenizer))
    content = facts["tokenizer.json"]
    content["added_tokens"] = [token for token in content["added_tokens"] if token["id"] != number]
    shorter, rows = tokenizer_from_text(json.dumps(facts)), rows - 1 if number == rows - 1 else rows
    placeholder = picture_token(shorter, rows)
    if placeholder == rows:  # every id is taken: the added one is needed
        return tokenizer, number, config.text_config.vocab_size
    return shorter, placeholder, rows


def _fill(model: MiniMindVLM, tensors: Mapping[str, torch.Tensor], folder: Path) -> None:
    """Strictly: a tied head may be missing, and nothing else."""
    try:
        missing, unknown = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:
        raise UserError(f"{folder} does not fit its config.json ({str(error)[:300]}): copy it again") from error
    missing = [name for name in missing if not (name == HEAD and model.config.tie_word_embeddings)]
    if missing or unknown:
        raise UserError(f"{folder} does not fit its config.json: missing {missing[:6]}, unknown {unknown[:6]}")


def _name_tower(model: MiniMindVLM, name: str | None, must: bool) -> None:
    """Record where the tower comes from, if it still is that folder's. must: whether anything else is wrong."""
    places = [find_folder(name), find_folder(f"model/vision_model/{name}")] if name else []
    place = next((place for place in places if lacks_tower(place) is None), None)
    if place is None:
        if must:
            raise UserError(f"--vision_model {name} holds no tower: {lacks_tower(places[0])}")
        return
    tower, sha256 = read_tower(place)
    known, held = tower.state_dict(), model.vision_encoder.state_dict()
    if known.keys() == held.keys() and all(torch.equal(known[name], held[name]) for name in known):
        model.config.vision_source, model.config.vision_sha256 = portable_path(place), sha256
    elif must:
        raise UserError(f"--vision_model {name} is not the tower that this folder holds: leave it out")
