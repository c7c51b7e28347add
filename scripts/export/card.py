"""README.md of a converted model: what it is, how to ask it, what it learnt from, how well it does, the licence."""

import json
from pathlib import Path

from dataset import emoji_world
from model.model_vlm import MiniMindVLM
from scripts.export.formats import Source, portable_name

CHAT = """\
from transformers import pipeline

pipe = pipeline("image-text-to-text", model=FOLDER{trust})
picture = {{"type": "image", "path": "picture.png"}}
question = {{"type": "text", "text": "\\nWhat is in the picture?"}}
answer = pipe(text=[{{"role": "user", "content": [picture, question]}}], return_full_text=False)
print(answer[0]["generated_text"])"""
TEXT = """\
from transformers import pipeline

pipe = pipeline("text-generation", model=FOLDER)
answer = pipe([{"role": "user", "content": "Hello"}], return_full_text=False)
print(answer[0]["generated_text"])"""
PTH = """\
# in MiniMind2-V's checkout: out/{name}.pth; in this project:
# python eval_vlm.py --weight {name}.pth --vision_model TOWER --image picture.png"""
KINDS = {
    "transformers": "MiniMindVLM with its own code: load it with `trust_remote_code=True`.",
    "llava": "A stock `LlavaForConditionalGeneration`: no code of its own. Pictures with transparency should be laid "
    "on white first, as in training.",
    "llm": "The decoder alone, as a stock `{architecture}`: it sees no pictures.",
    "minimind": "A `.pth` as MiniMind2-V writes it: half precision, without the vision tower.",
}
STAGE_FACTS = ("data_path", "epochs", "batch_size", "learning_rate", "projector_learning_rate", "max_seq_len", "seed")
SCORE_COLUMNS = {"right": "right picture", "shuffled": "another picture", "none": "no picture"}


def model_card(source: Source, format_name: str, facts: dict[str, str], score: dict | None, licence: str) -> str:
    """The whole page.

    facts: the metadata of the weight file (stage, stage_config, step, val_loss), empty for a .pth.
    score: what scripts/score.py wrote, or None.
    """
    header = {
        "license": licence,
        "library_name": "transformers" if format_name != "minimind" else "pytorch",
        "pipeline_tag": "image-text-to-text" if source.sees and format_name != "llm" else "text-generation",
    }
    architecture = "Qwen2MoeForCausalLM" if source.model.config.use_moe else "LlamaForCausalLM"
    parts = [
        "---\n" + "".join(f"{name}: {value}\n" for name, value in header.items()) + "---",
        f"# {source.name}",
        KINDS[format_name].format(architecture=architecture) + " Converted by `scripts/convert_vlm.py`; "
        "`conversion.json` says from what, with the largest difference of a logit that the conversion measured.",
        _fence(_usage(source, format_name)),
        "## Model\n\n" + _model(source, format_name),
        "## Training\n\n" + _training(source, facts),
        "## Scores\n\n" + (_scores(score) if score else "None were given to the conversion (`--score score.json`)."),
        f"## Licence\n\n{licence}, code and weights. {_pictures(source)}".rstrip(),
    ]
    return "\n\n".join(parts) + "\n"


def _usage(source: Source, format_name: str) -> str:
    if format_name == "minimind":
        return PTH.format(name=source.name)
    if format_name == "llm":
        return TEXT
    usage = CHAT.format(trust=", trust_remote_code=True" if format_name == "transformers" else "")
    if format_name == "transformers" and not source.with_vision:
        usage = usage.replace("_code=True)", '_code=True, model_kwargs={"vision_model": TOWER})')
    return usage


def _fence(text: str) -> str:
    return f"```python\n{text}\n```"


def _model(source: Source, format_name: str) -> str:
    config = source.model.config
    decoder = sum(p.numel() for name, p in source.model.named_parameters() if not name.startswith("vision_"))
    rows = [
        ("decoder", f"{decoder:,} parameters, width {config.hidden_size}, {config.num_hidden_layers} layers, "
         f"{config.num_attention_heads} heads of which {config.num_key_value_heads} for keys and values"),
        ("vocabulary", f"{config.vocab_size}"),
        ("numbers", str(source.dtype).removeprefix("torch.") if format_name != "minimind" else "float16"),
    ]  # fmt: skip
    if config.use_moe:
        rows.insert(1, ("experts", f"{config.num_experts}, {config.num_experts_per_tok} a token, and a shared one"))
    if isinstance(source.model, MiniMindVLM) and format_name != "llm":
        tower = f"{portable_name(config) or 'trained with the model'}, sha256 {config.vision_sha256 or 'of no file'}"
        rows += [
            ("vision tower", f"CLIP, {config.image_size} pixels a side: {tower}"),
            ("a picture", f"{config.image_tokens} tokens; squeezed to a square, nothing is cut off"),
        ]
    return _table(("", ""), rows)


def _training(source: Source, facts: dict[str, str]) -> str:
    if "stage" not in facts:
        return "The weight file does not say."
    settings = json.loads(facts.get("stage_config", "{}"))
    rows = [("stage", facts["stage"]), ("steps", facts.get("step", "?"))]
    for name in STAGE_FACTS:
        if settings.get(name):
            value = Path(settings[name]).name if name == "data_path" else settings[name]
            rows.append((name.replace("_", " "), value))
    if settings.get("from_weight"):
        rows.append(("started from", Path(settings["from_weight"]).name))
    if "val_loss" in facts:
        rows.append(("validation loss", facts["val_loss"]))
    return _table(("", ""), rows)


def _scores(score: dict) -> str:
    """scripts/score.py's table: exact match by kind of question, and what guessing would reach."""
    modes = [mode for mode in SCORE_COLUMNS if score["exact_match"].get(mode) is not None]
    rows = []
    for kind, figures in score["by_kind"].items():
        cells = [figures[mode] for mode in modes]
        rows.append((kind, *map(_share, cells)))
    rows.append(("all, kinds alike", *(f"{score['exact_match'][mode]:.3f}" for mode in modes)))
    heads = ("exact match (95 % interval)", *(SCORE_COLUMNS[mode] for mode in modes))
    return _table(heads, rows)


def _share(figure: dict) -> str:
    """None where no question of the kind could be asked that way."""
    if figure["exact_match"] is None:
        return "-"
    return "{:.3f} ({:.2f} to {:.2f})".format(figure["exact_match"], *figure["interval"])


def _pictures(source: Source) -> str:
    shipped = isinstance(source.model, MiniMindVLM) and (portable_name(source.model.config) or "").startswith("emoji")
    return f"The vision tower learnt from Emoji World. {emoji_world.attribution()}" if shipped else ""


def _table(heads: tuple, rows: list[tuple]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(map(str, line)) + " |" for line in lines)
