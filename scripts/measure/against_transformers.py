"""Stage 2 and answers of a real-sized model, against transformers' own Trainer and generate(), in one run.

    python scripts/measure/against_transformers.py --json out/against.json      six minutes on two quiet cores

The same model on both sides: ours, and the stock Llava folder that convert_vlm writes of it. Without --weight it is of
SmolLM2-135M's size behind a tower of CLIP-ViT-B/16's, with random weights. Training: conversations a second of the real
stage script, with the tower in every step and with cached features, and of Trainer, on the same lines of Emoji World,
nine questions a picture, as many conversations a step, bfloat16 autocast where the CPU has it. Trainer gets each
conversation as a sample, processed alone and padded to the longest of its batch. Answers: tokens a second after the
first, greedy, the same prompts with pictures; generate() in whichever of float32 and bfloat16 is faster.
Both sides take turns on the same number of threads. Needs the package accelerate.
"""

import argparse
import gc
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from transformers import CLIPVisionConfig, CLIPVisionModel
from transformers.utils import logging

from dataset.readers.opening import read_samples
from dataset.samples import Sample
from model.command_line import CommandLine
from model.config import CLIP_VIT_B16
from model.device import choose_dtype
from model.inference.answerer import Answerer, Options
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from model.tokenizer_files import read_tokenizer
from model.weights import build_vlm, load_model, save_weights
from scripts.export.formats import Source, export_llava
from scripts.measure.figures import write_figures
from scripts.measure.real_step import in_a_process
from scripts.measure.stage_runs import WARM_UP, arguments_of, build_data, stage_metrics
from scripts.measure.stock_way import StockAnswers, StockRun, check_accelerate, train_with_trainer
from scripts.quickstart import QUESTIONS

SMOLLM2_135M = {"hidden_size": 576, "num_hidden_layers": 30, "num_attention_heads": 9, "num_key_value_heads": 3,
                "intermediate_size": 1536, "vocab_size": 49152, "rope_theta": 1e5}  # fmt: skip
BARS = {"training": 3.0, "answers": 2.0}  # times transformers' speed
OURS = {"online": "none", "cached": "float16"}  # --cache_features


@dataclass(frozen=True)
class Subject:
    """The model that both sides have, and the data."""

    weight: Path
    tower: Path | None  # None: the one that the weights name
    stock: Path
    data: Path
    bfloat16: bool

    def samples(self) -> list[Sample]:
        return list(read_samples(self.data))


def prepare(options: argparse.Namespace, folder: Path) -> Subject:
    """The model in both forms, and pictures enough that no step of ours sees one twice."""
    weight, tower = options.weight, options.vision_model
    if weight is None:
        weight, tower = folder / "random.safetensors", folder / "tower"
        torch.manual_seed(0)
        CLIPVisionModel(CLIPVisionConfig(**options.tower_sizes)).save_pretrained(tower)
        save_weights(build_vlm(options.sizes, tower), weight)
    model = load_model(weight, tower)
    if not isinstance(model, MiniMindVLM):
        raise UserError(f"--weight {weight} is a decoder without eyes: name the weights of a stage that sees")
    (folder / "stock").mkdir()
    export_llava(Source(model, read_tokenizer(weight), weight.stem), folder / "stock")
    build_data(folder / "data", sft=options.batch_size * (options.steps + WARM_UP))
    bfloat16 = choose_dtype("auto", torch.device("cpu")) == torch.bfloat16
    return Subject(weight, tower, folder / "stock", folder / "data/sft.jsonl", bfloat16)


def train_ours(subject: Subject, cached: str, options: argparse.Namespace, folder: Path) -> float:
    """Conversations a second of the stage script."""
    flags = {
        "data_path": subject.data, "from_weight": subject.weight, "batch_size": options.batch_size,
        "cache_features": cached, "device": "cpu", "learning_rate": 1e-6, "log_interval": 1,
    }  # fmt: skip
    if subject.tower:
        flags["vision_model"] = subject.tower
    lines = stage_metrics("train_sft_vlm", arguments_of(flags), folder, threads=options.threads)
    return statistics.harmonic_mean([line["conversations_per_second"] for line in lines])


def measure_training(subject: Subject, options: argparse.Namespace, folder: Path) -> dict[str, float]:
    """Conversations a second of each way: the median of the rounds, in which they take turns."""
    trainer = StockRun(
        subject.stock, subject.data, QUESTIONS, options.batch_size, options.trainer_steps, subject.bfloat16,
        options.threads,
    )  # fmt: skip
    found: dict[str, list[float]] = {}
    for number in range(options.rounds):
        for name, cached in OURS.items():
            speed = train_ours(subject, cached, options, folder / f"round_{number}_{name}")
            found.setdefault(name, []).append(speed)
            print(f"training, ours, {name}: {speed:.3g} conversations/s", flush=True)
        speed = in_a_process(train_with_trainer, trainer)
        found.setdefault("trainer", []).append(speed)
        print(f"training, transformers' Trainer: {speed:.3g} conversations/s", flush=True)
    return with_ratios({name: statistics.median(speeds) for name, speeds in found.items()}, "trainer")


def with_ratios(speeds: dict[str, float], reference: str) -> dict[str, float]:
    """And how often the reference's speed each of the others has."""
    return speeds | {f"{name}_ratio": speed / speeds[reference] for name, speed in speeds.items() if name != reference}


def measure_answers(subject: Subject, options: argparse.Namespace) -> dict[str, float]:
    """Tokens a second after the first, and seconds to it, of each way: medians over the prompts.

    Raises:
        UserError: in float32 both do not say the same: then two different things would be compared.
    """
    dtype = torch.bfloat16 if subject.bfloat16 else torch.float32
    # Lines about one picture stand together: each prompt brings a new one, and the first warms up.
    asked = subject.samples()[::QUESTIONS][: options.prompts + 1]
    found: dict[str, list[tuple[float, float]]] = {}
    exact: dict[str, list[int]] = {}
    for name, kind in {"float32": torch.float32, "bfloat16": torch.bfloat16}.items():
        if name == "bfloat16" and not subject.bfloat16:
            continue
        stock = StockAnswers(subject.stock, kind)
        for sample in asked:
            first, speed, tokens = stock.answer(sample.messages[:-1], sample.open_picture(0), options.new_tokens)
            found.setdefault(f"generate_{name}", []).append((first, speed))
            exact.setdefault(name, tokens)
        del stock
        gc.collect()
    for kind in dict.fromkeys((torch.float32, dtype)):
        engine = Answerer(load_model(subject.weight, subject.tower), dtype=kind)
        engine.end_ids = frozenset()  # nothing but its length ends an answer
        for sample in asked:
            prompt = engine.prompt(sample.messages[:-1], [sample.open_picture(0)])
            answer = engine.stream(prompt, Options(max_new_tokens=options.new_tokens))
            if kind == torch.float32 and exact.setdefault("ours", list(answer.token_ids)) != exact["float32"]:
                raise UserError(f"ours says {exact['ours'][:8]}..., generate() {exact['float32'][:8]}...")
            if kind == dtype:
                found.setdefault("ours", []).append((answer.seconds_to_first, answer.tokens_per_second))
        del engine
        gc.collect()
    return answers_report(found)


def answers_report(found: dict[str, list[tuple[float, float]]]) -> dict[str, float]:
    """Medians without the first prompt, which warms up, and our ratio to the faster of generate()'s dtypes."""
    report = {}
    for name, answers in found.items():
        firsts, speeds = zip(*answers[1:], strict=True)
        report |= {f"{name}_first_seconds": statistics.median(firsts), name: statistics.median(speeds)}
        print(f"answers, {name}: {report[name]:.3g} tokens/s after {report[f'{name}_first_seconds']:.3g} s", flush=True)
    best = max((name for name in found if name != "ours"), key=report.get)
    ratios = {"ours_ratio": report["ours"] / report[best],
              "first_token_ratio": report[f"{best}_first_seconds"] / report["ours_first_seconds"]}  # fmt: skip
    return {**report, "generate_best": best.removeprefix("generate_"), **ratios}


def parse_options(arguments: list[str] | None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument(
        "--weight", type=Path, help="of a stage that sees; without it random ones of SmolLM2-135M's size"
    )
    parser.add_argument("--vision_model", type=Path, help="with --weight: folder of its tower, if the file names none")
    parser.add_argument("--parts", nargs="+", choices=BARS, default=list(BARS))
    parser.add_argument("--threads", type=int, default=2, help="of both ways")
    parser.add_argument("--batch_size", type=int, default=2, help="rows a step of ours; Trainer: their conversations")
    parser.add_argument("--steps", type=int, default=8, help="of ours that count")
    parser.add_argument("--trainer_steps", type=int, default=2, help="of Trainer's that count")
    parser.add_argument("--rounds", type=int, default=1, help="turns of each way in training")
    parser.add_argument("--prompts", type=int, default=4, help="that count")
    parser.add_argument("--new_tokens", type=int, default=64)
    parser.add_argument("--json", type=Path, help="where to write the figures")
    parser.set_defaults(sizes=SMOLLM2_135M, tower_sizes=CLIP_VIT_B16)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse_options(arguments)
    settings = {name: str(value) for name, value in vars(options).items() if name != "json"}
    versions = {"torch": torch.__version__, "transformers": transformers.__version__, "python": sys.version.split()[0]}
    result: dict = {"settings": settings, "versions": versions, "cores": os.cpu_count()}
    torch.set_num_threads(options.threads)
    logging.disable_progress_bar()
    with tempfile.TemporaryDirectory() as temporary:
        try:
            if "training" in options.parts:
                check_accelerate()
            subject = prepare(options, Path(temporary))
            result["bfloat16"] = subject.bfloat16
            if "training" in options.parts:
                result["training"] = measure_training(subject, options, Path(temporary))
            if "answers" in options.parts:
                result["answers"] = measure_answers(subject, options)
        except (UserError, OSError) as error:
            raise SystemExit(f"against_transformers: {error}") from error
    print(summary(result))
    write_figures(options.json, result)


def summary(result: dict) -> str:
    """Each ratio beside its bar."""
    lines = []
    for part, names in (("training", ("cached_ratio", "online_ratio")), ("answers", ("ours_ratio",))):
        for name in names if part in result else ():
            ratio, bar = result[part][name], BARS[part]
            lines.append(f"{part}, {name.removesuffix('_ratio')}: {ratio:.2f} x transformers' speed, bar {bar:g}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
