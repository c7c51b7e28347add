"""What a training run will take, before it is started: parameters, memory and time.

python scripts/estimate.py --stage sft_vlm --batch_size 16                 one configuration
python scripts/estimate.py --stage sft_vlm --memory_gb 4 8 12 24           the largest batch for such cards
python scripts/estimate.py --stage sft_vlm --data FILE --epochs 4          and the hours of a whole run
python scripts/estimate.py --stage sft_vlm --batch_size 4 --check 1        also run such steps here, and compare
"""

import argparse
import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from torch import nn
from transformers import CLIPVisionConfig

from dataset.formats import left_out, open_data
from dataset.limits import add_limits, limits_of
from dataset.quarantine import Quarantine
from dataset.step_batch import conversations
from dataset.vlm_dataset import ConversationDataset
from model.command_line import CommandLine
from model.config import MiniMindConfig, VLMConfig
from model.device import choose_dtype
from model.files import find_folder
from model.flops import StepFlops
from model.messages import UserError, counted
from model.processing import VLMProcessor
from scripts.measure.memory import AFTER_START, LEARNS, NOT_FUSED, Step, StepMemory, largest_batch, step_memory
from scripts.measure.real_step import GIVE_BACK, Speed, calibrate, flops_of, in_a_process, memory_here, seconds_here

FREE = 0.15  # of a card, left for CUDA itself, its allocator's gaps and a screen
GB = 1e9
DEFAULTS = {"llm": (512, 32), "pretrain_vlm": (640, 16), "sft_vlm": (1024, 8)}  # the stages' max_seq_len and batch_size
SIZES = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 2,
         "num_experts": 4, "num_experts_per_tok": 2}  # fmt: skip


@dataclass(frozen=True)
class RunCost:
    """Of a whole run over a file of data."""

    rows: int
    steps: int
    flops: float
    seconds: float


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    try:
        if options.data:  # what is missing is missed before anything is measured
            open_data(options.data, options.images_path, limits_of(options))
        step = step_of(options)
        found = report(step, options)
    except (UserError, OSError) as error:
        raise SystemExit(f"estimate: {error}") from error
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--stage", choices=LEARNS, default="sft_vlm")
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default, help=f"as the stage's flag; {default}")
    parser.add_argument("--use_moe", type=int, choices=(0, 1), default=0, help="1: mixture of experts")
    parser.add_argument("--vision_model", help="folder with the tower's config.json; CLIP-ViT-B/16's sizes without")
    parser.add_argument("--max_seq_len", type=int, default=0, help="tokens of every row; 0: the stage's")
    parser.add_argument("--supervised", type=int, default=0, help="of which so many are learnt; 0: all but the picture")
    parser.add_argument("--batch_size", type=int, default=0, help="rows a micro-batch; 0: the stage's")
    parser.add_argument("--accumulation_steps", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--cache_features", choices=("none", "float16", "int8", "pixels"), default="none")
    parser.add_argument("--optimizer", choices=("adamw", "muon"), default="adamw")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float16", "float32"), default="auto",
                        help="auto: bfloat16 for --memory_gb, else this machine's")  # fmt: skip
    parser.add_argument("--device", choices=("auto", *NOT_FUSED), default="auto",
                        help="whose memory; auto: cuda for --memory_gb, else cpu; old_cuda: before Ampere")  # fmt: skip
    parser.add_argument("--memory_gb", type=float, nargs="+", default=[], help="cards to find the largest batch for")
    parser.add_argument("--tflops", type=float, default=0.0,
                        help="sustained by the machine that is meant; 0: measure this one")  # fmt: skip
    parser.add_argument("--data", help="data of a whole run, .jsonl or .parquet")
    parser.add_argument("--images_path", help="folder of its pictures")
    add_limits(parser)
    parser.add_argument("--epochs", type=int, default=1, help="passes over --data")
    parser.add_argument("--check", type=int, choices=(0, 1), default=0, help="1: run such steps here, and compare")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


def step_of(options: argparse.Namespace) -> Step:
    """The micro-batch that the options describe. Raises UserError where there is none."""
    for name in (*SIZES, "epochs", "accumulation_steps"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)} must be at least 1")
    for name in ("max_seq_len", "supervised", "batch_size", "tflops"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)} must not be below 0")
    sizes = {name: getattr(options, name) for name in SIZES} | {"use_moe": bool(options.use_moe)}
    config = MiniMindConfig(**sizes)
    taken = 1  # a first token has none before it that could predict it
    if options.stage != "llm":
        config = VLMConfig(**sizes, vision_config=tower_config(options.vision_model) if options.vision_model else None)
        taken = AFTER_START + config.image_tokens
    tokens, rows = (given or usual for given, usual in zip(
        (options.max_seq_len, options.batch_size), DEFAULTS[options.stage], strict=True))  # fmt: skip
    supervised = options.supervised or tokens - taken
    if not 0 < supervised <= tokens - taken:
        raise UserError(
            f"a row of {tokens} tokens has {max(0, tokens - taken)} that can be learnt beside its picture, not "
            f"{max(supervised, 0)}: change --max_seq_len or --supervised"
        )
    dtype = torch.bfloat16 if options.dtype == "auto" and options.memory_gb else None
    return Step(
        config=config, stage=options.stage, rows=rows, tokens=tokens, supervised=supervised,
        cached=options.cache_features in ("float16", "int8"),
        dtype=dtype or choose_dtype(options.dtype, torch.device("cpu")),
        optimizer=options.optimizer, accumulates=options.accumulation_steps > 1,
        device=options.device if options.device != "auto" else "cuda" if options.memory_gb else "cpu",
    )  # fmt: skip


def tower_config(folder: str) -> dict:
    """The sizes of a tower. Raises UserError where the folder holds none."""
    folder = find_folder(folder)
    if not (folder / "config.json").is_file():
        raise UserError(f"--vision_model {folder} has no config.json: leave it out for CLIP-ViT-B/16's sizes")
    return CLIPVisionConfig.from_pretrained(folder, local_files_only=True).to_dict()


def report(step: Step, options: argparse.Namespace) -> dict:
    """Print all that was asked for; returns the same figures."""
    with torch.device("meta"):
        model = step.make_model()
    memory, parts = step_memory(step), parts_of(model)
    print(f"{describe(step, options)}\n\n{table_of_parts(parts)}\n\n{table_of_memory(memory)}")
    found = {"parts": parts, "memory_bytes": {**asdict(memory), "rest": memory.rest}}
    if options.memory_gb:
        print("\nlargest batch for a card (counted, never measured on a GPU), 15 % of it left free:")
        found["largest_batch"] = {}
    for card in options.memory_gb:
        rows = found["largest_batch"][f"{card:g}"] = largest_batch(step, (1 - FREE) * card * GB)
        print(f"{card:>6g} GB  {rows if rows else 'none: not even one row'}")
    if not options.memory_gb or options.tflops or options.data:
        flops = flops_of(step, model)
        speed = Speed(options.tflops * 1e12, 0.0) if options.tflops else calibrate(step)
        seconds = speed.seconds(flops, options.accumulation_steps)
        source = "as told" if options.tflops else "measured here on steps of four rows"
        rows, flops = options.accumulation_steps * step.rows, options.accumulation_steps * flops
        print(
            f"\nstep: {flops / 1e9:,.1f} GFLOP, {seconds:.3g} s, {rows / seconds:,.1f} rows/s at "
            f"{speed.flops / 1e9:,.1f} GFLOP/s {source}"
        )
        found |= {"step_flops": flops, "step_seconds": seconds, "speed": asdict(speed)}
        if options.data:
            cost = cost_of_run(step, model, options, speed)
            found["run"] = asdict(cost)
            print(f"{options.data} x {options.epochs}: {counted(cost.rows, 'rows')}, {counted(cost.steps, 'steps')}, "
                  f"{cost.flops / 1e15:.3g} PFLOP, {cost.seconds / 3600:.3g} hours")  # fmt: skip
    if options.check:
        found["check"] = check(step, model)
    return found


def describe(step: Step, options: argparse.Namespace) -> str:
    pictures = ", a picture each" if step.sees else ""
    tower = (", features cached" if step.cached else ", tower in every step") if step.sees else ""
    return (
        f"{step.stage}, {step.config.hidden_size} x {step.config.num_hidden_layers}: {options.accumulation_steps} x "
        f"{counted(step.rows, 'rows')} of {step.tokens} tokens, {step.supervised} learnt{pictures}{tower}, "
        f"{str(step.dtype).removeprefix('torch.')}, {step.optimizer}, for {step.device}"
    )


def parts_of(model: nn.Module) -> dict[str, dict[str, int]]:
    """Parameters of each part, and how many of them learn."""
    layers = model.model.layers
    parts = {"language model, other": [model.model.embed_tokens, *layers[:-1], model.model.norm],
             "language model, last layer": [layers[-1]]}  # fmt: skip
    for name, attribute in (("projector", "vision_proj"), ("vision encoder", "vision_encoder")):
        if hasattr(model, attribute):
            parts[name] = [getattr(model, attribute)]
    lists = {name: [p for module in modules for p in module.parameters()] for name, modules in parts.items()}
    lists["all"] = list(model.parameters())
    counts = {}
    for name, every in lists.items():
        learning = [parameter for parameter in every if parameter.requires_grad]
        counts[name] = {"parameters": _size(every), "learning": _size(learning)}
    return counts


def _size(parameters: list[nn.Parameter]) -> int:
    return sum(parameter.numel() for parameter in parameters)


def table_of_parts(parts: dict[str, dict[str, int]]) -> str:
    lines = [f"{'part':<28}{'parameters':>14}{'learning':>14}"]
    return "\n".join(lines + [f"{name:<28}{n['parameters']:>14,}{n['learning']:>14,}" for name, n in parts.items()])


def table_of_memory(memory: StepMemory) -> str:
    rows = {
        "weights, all parts": memory.weights, "optimizer's state": memory.optimizer, "gradients": memory.gradients,
        "kept for the backward pass": memory.activations, "rest, at the peak": memory.rest, "peak": memory.peak,
    }  # fmt: skip
    return "\n".join([f"{'memory':<28}{'GB':>14}", *(f"{name:<28}{size / GB:>14.3f}" for name, size in rows.items())])


def cost_of_run(step: Step, model: nn.Module, options: argparse.Namespace, speed: Speed) -> RunCost:
    """Arithmetic and seconds of all epochs; padding, loading, validation and checkpoints come on top.

    As in training, a step that the data does not fill is left out of each epoch. Rows are taken to be alike.
    """
    samples = open_data(options.data, options.images_path, limits_of(options))
    lenient = Quarantine(strict=False, max_share=1.0)
    data = ConversationDataset(samples, VLMProcessor.for_config(step.config), step.tokens, lenient)
    if data.report.bad:
        print(left_out(data.report.bad, len(samples), "samples"))
    batch = step.rows * options.accumulation_steps
    if len(data) < batch:
        raise UserError(
            f"{options.data} has {len(data):,} rows, which do not fill one step of {batch:,} (--batch_size {step.rows} "
            f"x --accumulation_steps {options.accumulation_steps}): make one of these smaller"
        )
    steps = options.epochs * (len(data) // batch)
    squared_lengths = sum(conversations(data.rendered(row))[1] for row in range(len(data)))
    pictures = int(data.pictures_a_row.sum()) if step.sees else 0
    count = StepFlops(model)
    flops = steps * batch / len(data) * count.count(
        float(data.lengths.sum()), squared_lengths, sum(data.report.trained_tokens), pictures,
        0 if step.cached else pictures,
    )  # fmt: skip
    if step.cached:
        flops += count.per_encoded * pictures  # once
    return RunCost(len(data), steps, flops, flops / speed.flops + steps * speed.optimizer)


def check(step: Step, model: nn.Module) -> dict:
    """Parameters, memory and seconds of real steps, each in a process of its own, beside what was predicted."""
    if step.optimizer != "adamw" or not Path("/proc/self/clear_refs").exists():
        raise UserError("--check runs AdamW's steps, on Linux: leave out --optimizer, or --check")
    step = replace(step, accumulates=False, device="cpu")
    memory = step_memory(step)
    parameters, taken = in_a_process(memory_here, step, GIVE_BACK)
    predicted, measured = in_a_process(seconds_here, step)
    rows = {
        "parameters": (_size(list(model.parameters())), parameters),
        "memory, GB": (memory.peak / GB, taken / GB),
        "seconds a micro-batch": (predicted, measured),
    }
    print(f"\n{'check':<28}{'predicted':>14}{'measured':>14}{'ratio':>8}")
    for name, (guess, truth) in rows.items():
        form = ",.0f" if isinstance(truth, int) else ".3f"
        print(f"{name:<28}{guess:>14{form}}{truth:>14{form}}{guess / truth:>8.3f}")
    return {name: {"predicted": guess, "measured": truth} for name, (guess, truth) in rows.items()}


if __name__ == "__main__":
    main()
