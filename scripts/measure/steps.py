"""How fast a step of both stages is, MiniMind-V's way against each of our switches alone and all together, and answers.

    python scripts/measure/steps.py --json benchmark.json

Weights are random, sizes real (26 M decoder, CLIP-ViT-B/16), samples synthetic: 196 + 60 tokens with 25 supervised, or
--text mixed for 60 to 460 of text with a good third supervised. The baseline pads each sample to 640 tokens, runs the
tower in every step, and computes logits everywhere, in float32 without fusing, as MiniMind-V does on a CPU. All
variants alternate, and the medians count, so that a busy machine slows them alike. Rows a second are real rows,
never padding. Answers are measured by scripts/measure/generation.py, here in short.
"""

import argparse
import gc
import json
import platform
import shutil
import statistics
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch.nn import functional as F

from model.command_line import CommandLine
from model.config import IGNORE_INDEX, IMAGE_TOKEN_ID, VLMConfig
from model.device import choose_device, choose_dtype, compile_layers, to_device
from model.messages import UserError
from model.processing import Piece, Rendered, collate_training
from model.progress import progress_over, say
from scripts.measure.generation import measure_generation
from scripts.measure.memory import Step, learning_parameters
from scripts.measure.real_step import now, update

PADDED = 640  # tokens, MiniMind-V's max_seq_len
PARTS = {"stage1": "pretrain_vlm", "stage2": "sft_vlm"}


@dataclass(frozen=True)
class Variant:
    padded: bool = True  # to PADDED tokens, or to the longest of a batch of like lengths
    everywhere: bool = True  # logits and the last layer at every position, or where the loss is
    cached: bool = False  # the tower's outputs read, or computed
    fused: bool = False  # AdamW
    bfloat16: bool = False
    compiled: bool = False


BASELINE = Variant()
ONLINE = Variant(padded=False, everywhere=False, fused=True)
CACHED = replace(ONLINE, cached=True)


def variants_for(bfloat16: bool, compiler: bool) -> dict[str, Variant]:
    """What this machine can do, by the name that the table gives it."""
    ending = ", bf16, compiled" if bfloat16 else ", compiled"
    variants = {
        "baseline": BASELINE,
        "no padding": replace(BASELINE, padded=False),
        "loss where labels are": replace(BASELINE, everywhere=False),
        "cached features": replace(BASELINE, cached=True),
        "fused AdamW": replace(BASELINE, fused=True),
        "compiled": replace(BASELINE, compiled=True),
        "all, online": ONLINE,
        "all, cached": CACHED,
        "baseline, bf16": replace(BASELINE, bfloat16=True),
        "all, online, bf16": replace(ONLINE, bfloat16=True),
        "all, cached, bf16": replace(CACHED, bfloat16=True),
        f"all, online{ending}": replace(ONLINE, bfloat16=bfloat16, compiled=True),
        f"all, cached{ending}": replace(CACHED, bfloat16=bfloat16, compiled=True),
    }
    return {
        name: variant
        for name, variant in variants.items()
        if (bfloat16 or not variant.bfloat16) and (compiler or not variant.compiled)
    }


def make_samples(count: int, text: str, config: VLMConfig, seed: int = 0) -> list[tuple[Rendered, list[torch.Tensor]]]:
    """Random conversations with one picture each."""
    generator = torch.Generator().manual_seed(seed)
    samples = []
    for _ in range(count):
        words = 60 if text == "short" else int(torch.randint(60, 461, (), generator=generator))
        answer = 25 if text == "short" else int(0.38 * words)
        ids = torch.randint(50, config.vocab_size, (words - 3,), generator=generator).tolist()
        rendered = Rendered.of([
            Piece([1, 5, 6]), Piece([IMAGE_TOKEN_ID] * config.image_tokens, image=True),
            Piece(ids[: -answer - 1]), Piece(ids[-answer - 1 : -1], trained=True), Piece(ids[-1:]),
        ])  # fmt: skip
        size = (3, config.image_size, config.image_size)
        samples.append((rendered, [torch.randint(0, 256, size, dtype=torch.uint8, generator=generator)]))
    return sorted(samples, key=lambda sample: len(sample[0].input_ids))


class Trainer:
    """A model in one stage, and a step of any variant over the same samples."""

    def __init__(self, part: str, config: VLMConfig, device: torch.device, compiled: bool = False):
        torch.manual_seed(0)
        self.model = Step(config, PARTS[part], rows=1, tokens=PADDED, supervised=1).make_model().to(device)
        learning = learning_parameters(self.model)
        self.optimizers = {
            True: torch.optim.AdamW(learning, lr=1e-5, fused=True),
            False: torch.optim.AdamW(learning, lr=1e-5, fused=False, foreach=False),
        }
        self.device = device
        if compiled:
            compile_layers(self.model, device)

    def batches(self, samples: list, size: int) -> dict[str, list[dict]]:
        """The micro-batches with pixels and with features, all made before the clock starts."""
        groups = [samples[start : start + size] for start in range(0, len(samples), size)]
        with_pixels = [collate_training(group) for group in groups]
        with_features = []
        for batch in with_pixels:
            features = self.model.encode_pictures(batch["pixel_values"][:, 0].to(self.device)).half().cpu()
            rest = {name: value for name, value in batch.items() if name != "pixel_values"}
            with_features.append({**rest, "patch_features": features[:, None]})
        return {"pixels": with_pixels, "features": with_features}

    def step(self, batch: dict, variant: Variant) -> None:
        batch = to_device(batch, self.device)
        labels, positions = batch.pop("labels"), batch.pop("loss_positions")
        if variant.padded:
            right = (0, PADDED - labels.shape[1])
            labels = F.pad(labels, right, value=IGNORE_INDEX)
            batch["input_ids"] = F.pad(batch["input_ids"], right)
            batch["image_mask"] = F.pad(batch["image_mask"], right)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=variant.bfloat16):
            if variant.everywhere:
                logits = self.model(**batch).logits.float()
                loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=IGNORE_INDEX)
            else:
                loss = self.model(**batch, labels=labels, loss_positions=positions).loss
        loss.backward()
        update(self.optimizers[variant.fused])


def measure(
    part: str, device: torch.device, options: argparse.Namespace, variants: dict[str, Variant]
) -> dict[str, float]:
    """Rows a second of each variant: the median of options.rounds rounds, after one that does not count."""
    config = VLMConfig(hidden_size=options.hidden_size, num_hidden_layers=options.layers, use_moe=options.moe)
    kinds = {variant.compiled for variant in variants.values()}
    trainers = {compiled: Trainer(part, config, device, compiled) for compiled in sorted(kinds)}
    samples = make_samples(options.batch_size * options.batches, options.text, config)
    batches = trainers[False].batches(samples, options.batch_size)
    seconds: dict[str, list[float]] = {name: [] for name in variants}
    for repetition in progress_over(range(options.rounds + 1), part, "round"):
        for name, variant in variants.items():
            started = now(device)
            for batch in batches["features" if variant.cached else "pixels"]:
                trainers[variant.compiled].step(batch, variant)
            if repetition:  # the first warms up
                seconds[name].append(now(device) - started)
        gc.collect()
    speeds = {name: len(samples) / statistics.median(times) for name, times in seconds.items()}
    for name, speed in speeds.items():
        say(f"{part}  {name:<24}{speed:>9.2f} rows/s{speed / speeds['baseline']:>8.2f} x")
    return speeds


def report(speeds: dict[str, float]) -> dict[str, dict]:
    """online and cached, each with all switches: rows a second, ratio to the baseline, in float32 and bfloat16."""
    figures: dict[str, dict] = {}
    for name in ("online", "cached"):
        speed = max(speed for variant, speed in speeds.items() if variant.startswith(f"all, {name}"))
        bfloat16 = speeds.get("baseline, bf16")
        figures[name] = {
            "rows_per_second": speed,
            "ratio": speed / speeds["baseline"],
            "ratio_bf16": speed / bfloat16 if bfloat16 else None,
        }
    return {**figures, "switches": speeds}


def answers(dtype: torch.dtype) -> dict[str, float]:
    """Tokens a second of an answer and seconds to its first token, and how often MiniMind-V's way they are."""
    measured = measure_generation(repetitions=3, batches=1, dtype=dtype)
    figures = {
        "tokens_per_second": measured["medians"]["engine_tokens_per_second"],
        "tokens_per_second_ratio": measured["decode_ratio"],
        "first_token_seconds": measured["medians"]["engine_first_seconds"],
        "first_token_ratio": measured["first_token_ratio"],
    }
    say("answers  " + ", ".join(f"{name.replace('_', ' ')} {value:.3g}" for name, value in figures.items()))
    return figures


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--parts", nargs="+", choices=(*PARTS, "answers"), default=[*PARTS, "answers"])
    parser.add_argument("--text", choices=("short", "mixed"), default="short")
    parser.add_argument("--batch_size", type=int, default=8, help="rows a step")
    parser.add_argument("--batches", type=int, default=1, help="steps a turn")
    parser.add_argument("--rounds", type=int, default=3, help="turns of every variant")
    parser.add_argument("--hidden_size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--moe", action="store_true")
    parser.add_argument("--json", type=Path, help="where to write the figures")
    options = parser.parse_args(arguments)
    try:
        device = choose_device(options.device)
    except UserError as error:
        raise SystemExit(f"steps: {error}") from error
    dtype = choose_dtype("auto", device)
    if dtype != torch.bfloat16:
        print("this device has no bfloat16 instructions: everything in float32, ratio_bf16 is left out")
    compiler = bool(shutil.which("g++"))
    if not compiler:
        print("there is no C++ compiler: --compile is left out")
    facts = {name: str(value) for name, value in vars(options).items() if name != "json"}
    facts |= {"torch": torch.__version__, "threads": torch.get_num_threads(), "machine": platform.processor()}
    result: dict = {"settings": facts}
    variants = variants_for(dtype == torch.bfloat16, compiler)
    for part in options.parts:
        result[part] = answers(dtype) if part == "answers" else report(measure(part, device, options, variants))
    if options.json:
        options.json.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
