"""StageConfig: everything a stage can be told; every field is a command-line flag of the same name."""

import argparse
import dataclasses
import math
import os
import re
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from dataset.options import (
    AUTO,
    DATA_FORMAT,
    FOLLOW_LINKS,
    FORMATS,
    IMAGES_PATH,
    MAX_MEGAPIXELS,
    MAX_SAMPLES,
    MIN_RATING,
    ReadOptions,
)
from dataset.quarantine import MAX_BAD_SHARE
from model.command_line import CommandLine
from model.files import ROOT, SHIPPED_MODEL, SHIPPED_TOWER
from model.messages import UserError
from model.projectors import PROJECTORS
from model.views import FRAMES, MAX_FRAMES, MAX_TILES
from trainer.guard.ending import wait_to_be_ended

OUT = ROOT / "out"
PARTS = ("projector", "first_layer", "last_layer", "language_model")
SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
         "use_moe": 0, "num_experts": 4, "num_experts_per_tok": 2}  # fmt: skip
OPEN = {**dict.fromkeys(SIZES, 0), "dropout": -1.0}  # values that leave it to the file to start from
GROUPS = {  # of flags, in the order of --help
    "first": "what people use first",
    "stage": "the stage",
    "data": "data",
    "model": "the decoder; 0, for dropout -1: as the file of --from_weight says, and without one MiniMind2-Small's",
    "learning": "learning",
    "speed": "speed and memory",
    "saving": "saving and logging",
    "ranks": "several ranks",
}
# `--preset 8gb`: batch sizes for cards of 4, 8, 12 and 24 GB. Each is the largest power of two that scripts/estimate.py
# lets through for the 26 M decoder and a tower of CLIP-ViT-B/16's size, bfloat16 or float16, every row as long as
# max_seq_len and learnt but for its picture, 15 % of the card left free; counted for GPUs from Ampere on, not measured
# on any. Both stages take 64 rows a step on every card: a preset decides where a run fits, never what it learns.
STEP = 64  # rows of one rank


def _batch_of(rows: int) -> dict[str, int]:
    return {"batch_size": rows, "accumulation_steps": STEP // rows}


CARDS: dict[str, dict[str, dict[str, int]]] = {  # rows of 640 tokens in pretrain_vlm, of 1024 in sft_vlm
    "4gb": {"pretrain_vlm": _batch_of(16), "sft_vlm": _batch_of(8)},  # at most 30 and 10 rows fit
    "8gb": {"pretrain_vlm": _batch_of(64), "sft_vlm": _batch_of(16)},  # 68 and 27
    "12gb": {"pretrain_vlm": _batch_of(64), "sft_vlm": _batch_of(32)},  # 109 and 44
    "24gb": {"pretrain_vlm": _batch_of(64), "sft_vlm": _batch_of(64)},  # 230 and 94
}
# `--preset few`: tens to thousands of pictures of one's own, learnt by what ships: many small steps, large rates.
FEW = {
    "from_weight": str(ROOT / SHIPPED_MODEL), "vision_model": str(ROOT / SHIPPED_TOWER),
    "optimizer": "muon", "learning_rate": 2e-3, "projector_learning_rate": 4e-3, "epochs": 12,
}  # fmt: skip
PRESETS: dict[str, dict[str, dict[str, object]]] = {"few": {"sft_vlm": FEW}, **CARDS}


def flag(
    group: str, default: object, help: str, at_least: float | None = None, at_most: float = math.inf,
    above: float | None = None, choices: tuple[str, ...] = (),
) -> object:  # fmt: skip
    """A field of StageConfig. group: of GROUPS; the others say which values make sense, beside those of OPEN."""
    limits = {"at_least": at_least, "at_most": at_most, "above": above, "choices": choices}
    return field(default=default, metadata={"group": group, "help": help, **limits})


_first, _stage, _data, _model, _learning, _speed, _saving, _ranks = (partial(flag, group) for group in GROUPS)


@dataclass(frozen=True)
class StageConfig:
    name: str = _stage(
        "stage", "name of the stage, and of its weights: <save_dir>/<name>_<hidden_size>[_moe].safetensors"
    )
    trainable: tuple[str, ...] = _stage(
        ("language_model",), f"parts that learn, of {', '.join(PARTS)}; the tower never does"
    )
    with_vision: bool = _stage(True, "0: the bare decoder, 1: decoder, projector and tower")
    data_path: str = _first(
        "", "training data, a file or a folder; several: a.jsonl,b.parquet, or a.jsonl:0.7,b.parquet:0.3 with weights"
    )
    images_path: str = _first("", IMAGES_PATH)
    data_format: str = _data(AUTO, DATA_FORMAT, choices=(AUTO, *FORMATS))
    max_samples: int = _data(0, MAX_SAMPLES, at_least=0)
    min_rating: int = _data(0, MIN_RATING, at_least=0, at_most=5)
    follow_links: int = _data(0, FOLLOW_LINKS)
    max_megapixels: int = _data(ReadOptions().max_megapixels, MAX_MEGAPIXELS)
    val_path: str = _data("", "validation data; empty: --val_samples of the training data are held back")
    val_samples: int = _data(
        128,
        "rows for the validation loss, with all that are about their pictures; at most a tenth; 0: none",
        at_least=0,
    )
    save_dir: str = _first(str(OUT), "folder for weights and runs")
    from_weight: str = _first(
        "none",
        "weights to start from: a file, a stage's name looked up in save_dir (llm: else what ships), a folder of "
        "transformers' or a .gguf with a base of the Llama or Qwen families, or none",
    )
    init_embeddings: str = _model(
        "", "with --from_weight none: first token embeddings, of scripts/assets/embed_names.py"
    )
    from_resume: int = _first(0, "1: go on from the run's last checkpoint, if there is one; torchrun's restarts do so")
    allow_data_change: int = _saving(0, "1: go on from a checkpoint although the training data has changed since")
    vision_model: str = _first(str(ROOT / "model/vision_model/clip-vit-base-patch16"), "folder of the vision tower")
    projector: str = _model(
        "", f"from patches to tokens: {', '.join(PROJECTORS)}; empty: as --from_weight says, else linear",
        choices=("", *PROJECTORS),
    )  # fmt: skip
    image_tokens: int = _model(
        0, "tokens a picture, several patches folded into one: 49 or 98 of 196; 0: as --from_weight, or one a patch",
        at_least=0,
    )  # fmt: skip
    tiles: int = _model(
        0, "cut a picture into up to so many tiles, seen beside the whole of it; 0: as --from_weight, or into none",
        at_least=0, at_most=MAX_TILES,
    )  # fmt: skip
    frames: int = _model(
        0, f"of a video that are seen at most; 0: as --from_weight, or {FRAMES}", at_least=0, at_most=MAX_FRAMES
    )
    strict_data: int = _data(0, "1: stop at the first bad sample; 0: leave bad samples out, named in quarantine.jsonl")
    max_bad_share: float = _data(
        MAX_BAD_SHARE, "of a file's samples: where more are bad, the run stops", at_least=0, at_most=1
    )
    hidden_size: int = _model(0, "width, 512; 768 with 16 layers is the larger MiniMind", at_least=0)
    num_hidden_layers: int = _model(0, "layers, 8", at_least=0)
    num_attention_heads: int = _model(0, "query heads, 8", at_least=0)
    num_key_value_heads: int = _model(0, "key and value heads, 2", at_least=0)
    use_moe: int = _model(0, "1: mixture of experts", at_least=0)
    num_experts: int = _model(0, "routed experts a layer, 4", at_least=0)
    num_experts_per_tok: int = _model(0, "of which a token takes, 2", at_least=0)
    rope_theta: float = _model(
        0.0,
        "RoPE's base, 1e6: the larger, the more slowly positions turn; raise it to train on longer rows",
        at_least=0,
    )
    yarn_factor: float = _model(
        0.0,
        "YaRN: read rows so many times as long as --max_seq_len, which is what is trained; 0: as --from_weight says",
        at_least=0,
    )
    dropout: float = _model(
        -1.0,
        "share of activations dropped in training, none; -1: as the weights to start from say",
        at_least=0,
        at_most=1,
    )
    max_seq_len: int = _data(
        640, "tokens a row: a longer conversation loses its end, never a part of a picture", at_least=1
    )
    epochs: int = _first(1, "passes over the data", at_least=1)
    batch_size: int = _first(
        16, "rows a step and rank, times --accumulation_steps; neighbours about a picture share one", at_least=1
    )
    accumulation_steps: int = _learning(
        1, "times --batch_size: rows a step and rank, in passes of --batch_tokens", at_least=1
    )
    batch_tokens: int = _speed(
        0,
        "most tokens, padding included, that go through the model at once, in training and validation; 0: what "
        "batch_size rows of max_seq_len, or of pack_tokens, need",
        at_least=0,
    )
    optimizer: str = _learning(
        "adamw",
        "adamw, or muon for the decoder layers' matrices: far fewer steps from nothing",
        choices=("adamw", "muon"),
    )
    learning_rate: float = _first(5e-4, "peak, reached after the warm-up; a cosine leads it down to a tenth", above=0)
    projector_learning_rate: float = _learning(0.0, "peak for the projector; 0: the same", at_least=0)
    warmup_ratio: float = _learning(
        0.03, "share of the steps with a linearly rising learning rate", at_least=0, at_most=1
    )
    weight_decay: float = _learning(0.01, "AdamW's, on matrices only", at_least=0)
    grad_clip: float = _learning(1.0, "largest norm of the gradient", above=0)
    seed: int = _learning(42, "of order, initialisation and dropout", at_least=0)
    device: str = _first("auto", "auto, cpu, cuda, cuda:N or mps")
    dtype: str = _speed(
        "auto",
        "of the arithmetic: auto, bfloat16, float16 or float32; weights are kept in float32",
        choices=("auto", "bfloat16", "float16", "float32"),
    )
    compile: int = _speed(0, "1: torch.compile fuses operations; needs a C++ compiler and a minute at the start")
    checkpoint_activations: int = _speed(
        0,
        "1: keep of a decoder layer only what enters it, and compute the rest again in the backward pass: far less "
        "memory, about a third more time",
        at_least=0,
        at_most=1,
    )
    pack_tokens: int = _speed(
        0, "pack rows side by side into longer ones of so many tokens; 0: batches of like lengths", at_least=0
    )
    pack_pictures: int = _speed(8, "most pictures a packed row, each view of one that is cut counted")
    cache_features: str = _speed(
        "none",
        "float16 or int8: encode each picture once, into files under save_dir/features; pixels: decode it once",
        choices=("none", "float16", "int8", "pixels"),
    )
    shard: int = _ranks(0, "1: each rank holds a part of the model; for models that outgrow one device")
    num_workers: int = _speed(1, "processes a rank that decode pictures", at_least=0)
    profile: int = _speed(
        0, "steps to profile: a trace in the run's folder, and the ten slowest operations; 0: none", at_least=0
    )
    log_interval: int = _saving(20, "steps between log lines", at_least=1)
    save_interval: int = _saving(500, "steps between checkpoints, each with a validation", at_least=1)
    keep_last: int = _saving(2, "checkpoints kept: so many of the newest, and the best", at_least=1)
    eval_tasks: str = _saving(
        "",
        "exams, files of questions with their answers: held_out.jsonl,choices.tsv:2, a weight behind a colon; the best "
        "weights are then those with the highest exact match, not those with the lowest validation loss",
    )
    eval_interval: int = _saving(
        0, "steps between exams, each with a validation; 0: whenever the run saves", at_least=0
    )
    eval_samples: int = _saving(240, "questions of each exam, evenly chosen, kinds alike; 0: all of them", at_least=0)
    use_wandb: int = _saving(0, "1: log to Weights & Biases, offline when there is no key")
    wandb_project: str = _saving("MiniMind-VLM", "project there")

    def __post_init__(self) -> None:
        unknown = set(self.trainable) - set(PARTS)
        if unknown or not self.trainable:
            raise UserError(f"--trainable {','.join(self.trainable)}: choose from {', '.join(PARTS)}")
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value != OPEN.get(item.name) and (wrong := _what_is_wrong(value, **item.metadata)):
                raise UserError(f"--{item.name} {value}{wrong}")
        _ = self.read_options  # which refuses what cannot be
        if self.shard and self.optimizer == "muon":
            raise UserError("--shard 1 cannot go with --optimizer muon, which needs each matrix whole: take adamw")

    @property
    def resumes(self) -> bool:
        """Whether a run goes on from its last checkpoint: told to, or restarted by torchrun after a failure."""
        return bool(self.from_resume) or int(os.environ.get("TORCHELASTIC_RESTART_COUNT", 0)) > 0

    @property
    def read_options(self) -> ReadOptions:
        return ReadOptions(
            self.images_path, self.data_format, self.max_samples, self.min_rating,
            bool(self.follow_links), self.max_megapixels,
        )  # fmt: skip

    @property
    def token_budget(self) -> int:
        return self.batch_tokens or self.batch_size * (self.pack_tokens or self.max_seq_len)

    @property
    def weight_name(self) -> str:
        return f"{self.name}_{self.hidden_size}" + ("_moe" if self.use_moe else "")

    @property
    def weight_path(self) -> Path:
        return Path(self.save_dir) / f"{self.weight_name}.safetensors"

    @property
    def best_path(self) -> Path:
        return Path(self.save_dir) / f"{self.weight_name}_best.safetensors"

    @property
    def run_dir(self) -> Path:
        return Path(self.save_dir) / self.weight_name

    @property
    def start_path(self) -> Path | None:
        """What to start from: from_weight as it is, or the one of that stage's files in save_dir that fits."""
        if self.from_weight == "none":
            return None
        if names_weights(self.from_weight):
            return Path(self.from_weight)
        size = str(self.hidden_size) if self.hidden_size else "[0-9]+"
        fits = re.compile(f"{re.escape(self.from_weight)}_{size}{'_moe' if self.use_moe else '(_moe)?'}[.]safetensors")
        found = [path for path in sorted(Path(self.save_dir).glob("*.safetensors")) if fits.fullmatch(path.name)]
        if len(found) != 1:
            choice = f"{len(found)} files fit: {', '.join(map(str, found))}" if found else "there is none"
            raise UserError(
                f"--from_weight {self.from_weight} looks for {self.from_weight}_<hidden_size>.safetensors in "
                f"{self.save_dir} and {choice}: train that stage first, or name one file"
            )
        return found[0]


def names_weights(from_weight: str) -> bool:
    """Whether --from_weight is a path, of a weights file or of a base of others, rather than a stage's name."""
    path = Path(from_weight)
    folder = (path / "config.json").is_file() or (path.name != from_weight and path.is_dir())
    return folder or from_weight.endswith((".safetensors", ".pth", ".gguf"))


def _what_is_wrong(
    value: object, at_least: float | None, at_most: float, above: float | None, choices: tuple[str, ...], **_: object
) -> str:
    """The end of a message, empty where the value is within its limits."""
    if choices and value not in choices:
        return f": choose from {', '.join(choices)}"
    if above is not None and not above < value < math.inf:
        return f" must be a number above {above}"
    if at_most < math.inf and not at_least <= value <= at_most:
        return f" must lie within {at_least} and {at_most}"
    if at_least is not None and not value >= at_least:
        return f" must be at least {at_least}" if at_least else " must not be below 0"
    return ""


def parse_config(stage: StageConfig, arguments: list[str] | None = None) -> StageConfig:
    """The stage's values, each replaced by --preset's where that has one, and by the flag of its name if given."""
    parser = CommandLine(usage="%(prog)s [--flag value ...]", formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    groups = {name: parser.add_argument_group(title) for name, title in GROUPS.items()}
    groups["first"].add_argument(
        "--preset", choices=PRESETS, help="few: flags for a few pictures of your own; others: batches for such a card"
    )
    for item in dataclasses.fields(stage):
        default = getattr(stage, item.name)
        kind = {"trainable": _names, "with_vision": _bit}.get(item.name, type(default))
        group = groups[item.metadata["group"]]
        group.add_argument(f"--{item.name}", type=kind, default=default, help=item.metadata["help"])
    try:
        if preset := parser.parse_args(arguments).preset:
            parser.set_defaults(**preset_values(preset, stage.name))
        values = vars(parser.parse_args(arguments))
        del values["preset"]
        return StageConfig(**values)
    except UserError as error:
        wait_to_be_ended()
        parser.error(str(error))


def _names(text: str) -> tuple[str, ...]:
    return tuple(name for name in text.split(",") if name)


def _bit(text: str) -> bool:
    if text not in ("0", "1"):
        raise argparse.ArgumentTypeError(f"{text!r} must be 0 or 1")
    return text == "1"


def preset_values(preset: str, stage: str) -> dict[str, object]:
    """The flags that a preset sets for a stage. Raises UserError where it has none for that stage."""
    if stage not in PRESETS[preset]:
        cure = "start from what it trains, or set the flags one by one"
        if preset in CARDS:
            size = preset.removesuffix("gb")
            cure = f"find its --batch_size with `python scripts/estimate.py --stage {stage} --memory_gb {size}`"
        raise UserError(f"--preset {preset} is for {', '.join(PRESETS[preset])}, not for {stage}: {cure}")
    return PRESETS[preset][stage]
