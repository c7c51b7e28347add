"""What a training run will take, before it is started: parameters, memory and time.

python scripts/estimate.py --stage sft_vlm --batch_size 16                 one configuration
python scripts/estimate.py --stage sft_vlm --memory_gb 4 8 12 24           the largest batch for such cards
python scripts/estimate.py --stage sft_vlm --data FILE --epochs 4          and the hours of a whole run
python scripts/estimate.py --stage sft_vlm --batch_size 4 --check 1        also run such steps here, and compare
"""

import argparse
import json
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import nn

from dataset.options import ReadOptions, add_read_flags
from dataset.quarantine import Quarantine
from dataset.readers.opening import left_out, open_data
from dataset.step_batch import conversations
from dataset.vlm_dataset import ConversationDataset
from model.command_line import CommandLine
from model.config import MiniMindConfig, VLMConfig
from model.device import choose_dtype
from model.flops import StepFlops
from model.messages import UserError, counted
from model.processing import VLMProcessor
from model.projectors import PROJECTORS
from model.tokenizer_files import read_tokenizer
from model.tower_folder import tower_sizes
from model.weights import decoder_arguments, read_sizes
from scripts.measure.memory import DEVICES, FREE, Step, StepMemory, largest_batch, step_memory
from scripts.measure.real_step import Speed, calibrate, flops_of, in_a_process, memory_here, seconds_here
from scripts.measure.stages import STAGES, choices_of
from trainer.config import SIZES
from trainer.optim import count_parts

GB = 1e9


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    try:
        if options.data:  # missing files are found before anything is measured
            open_data(options.data, ReadOptions.from_flags(options))
        figures = report(step_of(options), options)
    except (UserError, OSError) as error:
        raise SystemExit(f"estimate: {error}") from error
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--stage", choices=STAGES, default="sft_vlm")
    for name, default in SIZES.items():
        choices, meaning = ((0, 1), "1: mixture of experts") if name == "use_moe" else (None, "as the stage's flag")
        parser.add_argument(f"--{name}", type=int, choices=choices, help=f"{meaning}; {default}, or the weights'")
    parser.add_argument("--from_weight", type=Path, help="weights, a base's folder or GGUF: whose sizes count")
    parser.add_argument("--vision_model", help="folder with the tower's config.json; CLIP-ViT-B/16's sizes without")
    parser.add_argument("--projector", choices=PROJECTORS, default="linear", help="as the stage's flag; linear")
    parser.add_argument("--image_tokens", type=int, default=0, help="as the stage's flag; 0: one a patch")
    parser.add_argument("--tiles", type=int, default=0, help="as the stage's flag: every picture cut into so many")
    parser.add_argument("--max_seq_len", type=int, default=0, help="tokens of every row; 0: the stage's")
    parser.add_argument("--supervised", type=int, default=0, help="of which so many are learnt; 0: all but the picture")
    parser.add_argument("--batch_size", type=int, default=0, help="rows a micro-batch; 0: the stage's")
    parser.add_argument("--accumulation_steps", type=int, default=1, help="micro-batches a step")
    parser.add_argument("--cache_features", choices=choices_of("cache_features"), default="none")
    parser.add_argument("--checkpoint_activations", type=int, choices=(0, 1), default=0, help="as the stage's flag")
    parser.add_argument("--optimizer", choices=choices_of("optimizer"), default="adamw")
    parser.add_argument("--dtype", choices=choices_of("dtype"), default="auto",
                        help="auto: bfloat16 for --memory_gb, else this machine's")  # fmt: skip
    parser.add_argument("--device", choices=("auto", *DEVICES), default="auto",
                        help="whose memory; auto: cuda for --memory_gb, else cpu; old_cuda: before Ampere")  # fmt: skip
    parser.add_argument("--memory_gb", type=float, nargs="+", default=[], help="cards to find the largest batch for")
    parser.add_argument("--tflops", type=float, default=0.0,
                        help="sustained by the machine that is meant; 0: measure this one")  # fmt: skip
    parser.add_argument("--data", help="data of a whole run, .jsonl or .parquet")
    add_read_flags(parser)
    parser.add_argument("--epochs", type=int, default=1, help="passes over --data")
    parser.add_argument("--check", type=int, choices=(0, 1), default=0, help="1: run such steps here, and compare")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    return parser.parse_args(arguments)


def step_of(options: argparse.Namespace) -> Step:
    """The micro-batch that the options describe. Raises UserError where there is none."""
    for name in (*SIZES, "epochs", "accumulation_steps"):
        if (value := getattr(options, name)) is not None and value < 1 and name != "use_moe":
            raise UserError(f"--{name} {value} must be at least 1")
    for name in ("max_seq_len", "supervised", "batch_size", "tflops", "image_tokens", "tiles"):
        if getattr(options, name) < 0:
            raise UserError(f"--{name} {getattr(options, name)} must not be below 0")
    sizes = {**SIZES, **(decoder_arguments(read_sizes(options.from_weight)) if options.from_weight else {})}
    sizes |= {name: value for name in SIZES if (value := getattr(options, name)) is not None}
    config = MiniMindConfig(**{**sizes, "use_moe": bool(sizes["use_moe"])})
    if options.stage != "llm":
        tower = tower_sizes(options.vision_model) if options.vision_model else None
        seeing = {"projector": options.projector, "image_tokens": options.image_tokens or None, "tiles": options.tiles}
        config = VLMConfig(**decoder_arguments(config.to_dict()), vision_config=tower, **seeing)
    tokens = options.max_seq_len or STAGES[options.stage].max_seq_len
    for_card = bool(options.memory_gb)
    dtype = "bfloat16" if options.dtype == "auto" and for_card else options.dtype
    device = ("cuda" if for_card else "cpu") if options.device == "auto" else options.device
    step = Step(
        config, options.stage, options.batch_size or STAGES[options.stage].batch_size, tokens, options.supervised,
        cached=options.cache_features in ("float16", "int8"), dtype=choose_dtype(dtype, torch.device("cpu")),
        optimizer=options.optimizer, accumulates=options.accumulation_steps > 1, device=device,
        checkpointed=bool(options.checkpoint_activations),
    )  # fmt: skip
    left = tokens - step.before_answer
    supervised = options.supervised or left
    if not 0 < supervised <= left:
        raise UserError(
            f"a row of {tokens} tokens has {max(0, left)} that can be learnt beside its picture, not "
            f"{max(supervised, 0)}: change --max_seq_len or --supervised"
        )
    return replace(step, supervised=supervised)


def report(step: Step, options: argparse.Namespace) -> dict:
    """Print all that was asked for; returns the same figures."""
    with torch.device("meta"):
        model = step.make_model()
    memory, parts = step_memory(step), count_parts(model)
    parts["all"] = {kind: sum(part[kind] for part in parts.values()) for kind in ("parameters", "learning")}
    print(f"{describe(step, options)}\n\n{table_of_parts(parts)}\n\n{table_of_memory(memory)}")
    figures = {"parts": parts, "memory_bytes": {**asdict(memory), "rest": memory.rest}}
    if options.memory_gb:
        print("\nlargest batch for a card (counted, never measured on a GPU), 15 % of it left free:")
        figures["largest_batch"] = {}
    for card in options.memory_gb:
        rows = figures["largest_batch"][f"{card:g}"] = largest_batch(step, (1 - FREE) * card * GB)
        print(f"{card:>6g} GB  {rows if rows else 'none: not even one row'}")
    if not options.memory_gb or options.tflops or options.data:
        figures |= report_time(step, model, options)
    if options.check:
        figures["check"] = check(step, model)
    return figures


def report_time(step: Step, model: nn.Module, options: argparse.Namespace) -> dict:
    """Print how long a step takes, and all of them with --data; returns the same figures."""
    flops = flops_of(step, model)
    speed = Speed(options.tflops * 1e12, 0.0) if options.tflops else calibrate(step)
    seconds = speed.seconds(flops, options.accumulation_steps)
    source = "as told" if options.tflops else "measured here on steps of four rows"
    rows, flops = options.accumulation_steps * step.rows, options.accumulation_steps * flops
    print(
        f"\nstep: {flops / 1e9:,.1f} GFLOP, {seconds:.3g} s, {rows / seconds:,.1f} rows/s at "
        f"{speed.flops / 1e9:,.1f} GFLOP/s {source}"
    )
    figures = {"step_flops": flops, "step_seconds": seconds, "speed": asdict(speed)}
    if options.data:
        run = figures["run"] = cost_of_run(step, model, options, speed)
        print(f"{options.data} x {options.epochs}: {counted(run['rows'], 'rows')}, {counted(run['steps'], 'steps')}, "
              f"{run['flops'] / 1e15:.3g} PFLOP, {run['seconds'] / 3600:.3g} hours")  # fmt: skip
    return figures


def describe(step: Step, options: argparse.Namespace) -> str:
    pictures = ""
    if step.sees:
        cut = f" in {step.views} views" if step.config.tiles else ""
        pictures = f", a picture each{cut}, {'features cached' if step.cached else 'tower in every step'}"
    return (
        f"{step.stage}, {step.config.hidden_size} x {step.config.num_hidden_layers}: {options.accumulation_steps} x "
        f"{counted(step.rows, 'rows')} of {step.tokens} tokens, {step.supervised} learnt{pictures}, "
        f"{str(step.dtype).removeprefix('torch.')}, {step.optimizer}, for {step.device}"
        f"{', activations computed again' if step.checkpointed else ''}"
    )


def table_of_parts(parts: dict[str, dict[str, int]]) -> str:
    lines = [f"{'part':<28}{'parameters':>14}{'learning':>14}"]
    return "\n".join(lines + [f"{name:<28}{n['parameters']:>14,}{n['learning']:>14,}" for name, n in parts.items()])


def table_of_memory(memory: StepMemory) -> str:
    rows = {
        "weights, all parts": memory.weights, "optimizer's state": memory.optimizer, "gradients": memory.gradients,
        "kept for the backward pass": memory.activations, "rest, at the peak": memory.rest, "peak": memory.peak,
    }  # fmt: skip
    return "\n".join([f"{'memory':<28}{'GB':>14}", *(f"{name:<28}{size / GB:>14.3f}" for name, size in rows.items())])


def cost_of_run(step: Step, model: nn.Module, options: argparse.Namespace, speed: Speed) -> dict[str, float]:
    """Arithmetic and seconds of all epochs; padding, loading, validation and checkpoints come on top.

    As in training, a step that the data does not fill is left out of each epoch. Rows are assumed to be alike.
    """
    samples = open_data(options.data, ReadOptions.from_flags(options))
    lenient = Quarantine(strict=False, max_share=1.0)
    data = ConversationDataset(
        samples, VLMProcessor.for_config(step.config, read_tokenizer(options.from_weight)), step.tokens, lenient
    )
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
    pictures = int(data.views_a_row.sum()) if step.sees else 0
    count = StepFlops(model)
    flops = steps * batch / len(data) * count.count(
        float(data.lengths.sum()), squared_lengths, int(data.report.trained_tokens.sum()), pictures,
        0 if step.cached else pictures,
    )  # fmt: skip
    if step.cached:
        flops += count.per_encoded * pictures  # once
    seconds = flops / speed.flops + steps * speed.optimizer
    return {"rows": len(data), "steps": steps, "flops": flops, "seconds": seconds}


def check(step: Step, model: nn.Module) -> dict:
    """Parameters, memory and seconds of real steps, each in a process of its own, beside what was predicted."""
    if step.optimizer != "adamw" or not Path("/proc/self/clear_refs").exists():
        raise UserError("--check runs AdamW's steps, on Linux: leave out --optimizer, or --check")
    step = replace(step, accumulates=False, device="cpu")
    memory = step_memory(step)
    parameters, peak = in_a_process(memory_here, step)
    predicted, measured = in_a_process(seconds_here, step)
    rows = {
        "parameters": (sum(p.numel() for p in model.parameters()), parameters),
        "memory, GB": (memory.peak / GB, peak / GB),
        "seconds a micro-batch": (predicted, measured),
    }
    print(f"\n{'check':<28}{'predicted':>14}{'measured':>14}{'ratio':>8}")
    for name, (guess, truth) in rows.items():
        form = ",.0f" if isinstance(truth, int) else ".3f"
        print(f"{name:<28}{guess:>14{form}}{truth:>14{form}}{guess / truth:>8.3f}")
    return {name: {"predicted": guess, "measured": truth} for name, (guess, truth) in rows.items()}


if __name__ == "__main__":
    main()
