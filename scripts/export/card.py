"""README.md of a converted model: what it is, how to ask it, what it learnt from, how well it does, the licence."""

import json
from pathlib import Path

from dataset import emoji_world
from dataset.exam.figures import SHOWN
from dataset.sources import short_names
from model.config import VLMConfig
from model.vision_encoder import DEFAULT_KIND
from scripts.export.exported import Exported, Source
from scripts.export.formats import portable_name

STAGE_FACTS = ("data_path", "epochs", "batch_size", "learning_rate", "projector_learning_rate", "max_seq_len", "seed")
TOWER_NAMES = {
    "clip_vision_model": "CLIP", "siglip_vision_model": "SigLIP", "dinov2": "DINOv2",
    "dinov2_with_registers": "DINOv2 with registers", "efficientnet_lite": "EfficientNet-Lite",
}  # fmt: skip


def model_card(source: Source, exported: Exported, facts: dict[str, str], score: dict | None, licence: str) -> str:
    """The page.

    facts: the metadata of the weight file (stage, stage_config, step, val_loss), empty for a .pth.
    score: what scripts/score.py wrote, or None.
    """
    header = {
        "license": licence,
        "library_name": exported.library,
        "pipeline_tag": "image-text-to-text" if exported.sees else "text-generation",
    }
    parts = [
        "---\n" + "".join(f"{name}: {value}\n" for name, value in header.items()) + "---",
        f"# {source.name}",
        f"{exported.kind} Converted by `scripts/convert_vlm.py`; `conversion.json` says from what, with the largest "
        "difference of a logit that the conversion measured.",
        f"```{exported.language}\n{exported.usage}\n```",
        *filter(None, [exported.further.strip()]),
        "## Model\n\n" + _model(source, exported),
        "## Training\n\n" + _training(source, facts),
        "## Scores\n\n" + (_scores(score) if score else "None were given to the conversion (`--score score.json`)."),
        f"## Licence\n\n{licence}, code and weights. {_pictures(source)}".rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def _model(source: Source, exported: Exported) -> str:
    config = source.model.config
    decoder = sum(p.numel() for name, p in source.model.named_parameters() if not name.startswith("vision_"))
    rows = [
        ("decoder", f"{decoder:,} parameters, width {config.hidden_size}, {config.num_hidden_layers} layers, "
         f"{config.num_attention_heads} heads of which {config.num_key_value_heads} for keys and values"),
        ("vocabulary", f"{config.vocab_size}"),
        ("numbers", exported.dtype),
    ]  # fmt: skip
    if config.use_moe:
        shared = ", and a shared one" if config.shared_expert_size else ""
        rows.insert(1, ("experts", f"{config.num_experts}, {config.num_experts_per_tok} a token{shared}"))
    if exported.sees:
        tower = f"{portable_name(config) or 'trained with the model'}, sha256 {config.vision_sha256 or 'of no file'}"
        rows += [
            ("vision tower", f"{_tower_name(config)}, {config.image_size} pixels a side: {tower}"),
            ("projector", config.projector),
            ("a picture", f"{config.image_tokens} tokens; squeezed to a square, nothing is cut off{_tiles(config)}"),
        ]
    return _table(("", ""), rows)


def _tiles(config: VLMConfig) -> str:
    return f"; beside it up to {config.tiles} tiles of as many, unsqueezed" if config.tiles else ""


def _tower_name(config: VLMConfig) -> str:
    kind = config.vision_config.get("model_type", DEFAULT_KIND)
    return TOWER_NAMES.get(kind, kind)


def _training(source: Source, facts: dict[str, str]) -> str:
    if "stage" not in facts:
        return "The weight file does not say."
    settings = json.loads(facts.get("stage_config", "{}"))
    rows = [("stage", facts["stage"]), ("steps", facts.get("step", "?"))]
    for name in STAGE_FACTS:
        if settings.get(name):
            value = short_names(settings[name]) if name == "data_path" else settings[name]
            rows.append((name.replace("_", " "), value))
    if settings.get("from_weight"):
        rows.append(("started from", Path(settings["from_weight"]).name))
    if "val_loss" in facts:
        rows.append(("validation loss", facts["val_loss"]))
    return _table(("", ""), rows)


def _scores(score: dict) -> str:
    """scripts/score.py's table: exact match by kind of question, and what guessing would reach."""
    modes = [mode for mode in SHOWN if score["exact_match"].get(mode) is not None]
    rows = [(kind, *(_exact_match(figures[mode]) for mode in modes)) for kind, figures in score["by_kind"].items()]
    rows.append(("all, kinds alike", *(f"{score['exact_match'][mode]:.3f}" for mode in modes)))
    heads = ("exact match (95 % interval)", *(SHOWN[mode] for mode in modes))
    return _table(heads, rows)


def _exact_match(figure: dict) -> str:
    """None where no question of the kind could be asked that way."""
    if figure["exact_match"] is None:
        return "-"
    return "{:.3f} ({:.2f} to {:.2f})".format(figure["exact_match"], *figure["interval"])


def _pictures(source: Source) -> str:
    shipped = source.sees and (portable_name(source.model.config) or "").startswith("emoji")
    return f"The vision tower learnt from Emoji World. {emoji_world.attribution()}" if shipped else ""


def _table(heads: tuple, rows: list[tuple]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
