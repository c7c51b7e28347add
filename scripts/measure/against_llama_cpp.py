"""How fast our engine and llama.cpp answer with the same weights on the same cores, in one run.

    OMP_NUM_THREADS=2 python scripts/measure/against_llama_cpp.py --json out/against_llama_cpp.json

A dense model of 26 M parameters behind a tower of CLIP-ViT-B/16's size, random weights (or --weight). Each contestant
is asked in a process of its own, one after another and the whole round again, so that a machine that grows busy slows
all of them down; medians are reported. What is compared: numbers of the same width while a single answer grows, as that
is limited by reading them. Needs requirements/gguf.txt.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from model.command_line import CommandLine
from model.config import VLMConfig
from model.inference.answerer import Answerer, Options, user_turn
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from model.tokenizer_files import read_tokenizer
from model.weights import load_model, save_weights
from scripts.export.exported import Source
from scripts.export.gguf_folder import export_gguf
from scripts.measure.generation import picture_of_noise
from scripts.measure.real_step import process_bytes
from scripts.measure.stage_runs import child_environment

WEIGHTS = "weights.safetensors"
OURS = {"ours, float32": "float32", "ours, auto": "auto"}
LLAMA_CPP = {
    "llama.cpp, f32": ("float32", None), "llama.cpp, f16": ("float16", None), "llama.cpp, q8_0": ("float32", "q8_0"),
}  # fmt: skip
NEW_TOKENS = 64  # an answer
ROWS = 16  # conversations at once
LONG_TEXT = "What do you see in the picture, and where is it? " * 40
TURNS = 4  # of which the first warms up
COLUMNS = {
    "prompt": ("prompt, tokens/s", ".0f"), "first": ("first token with a new picture, ms", ".0f"),
    "generation": ("generation, tokens/s", ".0f"), "together": ("16 together, tokens/s", ".0f"),
    "memory": ("memory, MB", ".0f"),
}  # fmt: skip


def measure_ours(dtype: str, folder: Path, threads: int) -> dict[str, float]:
    torch.set_num_threads(threads)
    engine = Answerer.from_weight(folder / WEIGHTS, device="cpu", dtype=dtype)
    engine.end_ids = frozenset()  # nothing ends an answer but its length

    def prompt(text: str, *pictures) -> object:
        return engine.prompt([user_turn(text, len(pictures))], pictures)

    figures = []
    for turn in range(TURNS):
        reading = engine.stream(prompt(f"{turn} {LONG_TEXT}"), Options(max_new_tokens=1))
        answer = engine.stream(prompt("What is it?", picture_of_noise(turn)), Options(max_new_tokens=NEW_TOKENS))
        together = engine.batch(
            [prompt(f"{turn} {row} Tell me more.") for row in range(ROWS)], Options(max_new_tokens=NEW_TOKENS)
        )
        figures.append(
            {
                "prompt": reading.prompt_tokens / reading.seconds_to_first,
                "first": 1000 * answer.seconds_to_first,
                "generation": answer.tokens_per_second,
                "together": sum(one.tokens_per_second for one in together),
            }  # fmt: skip
        )
    return medians(figures[1:])


def measure_llama_cpp(folder: Path, threads: int) -> dict[str, float]:
    from scripts.export.llama_cpp import LlamaCpp, Settings

    engine = LlamaCpp(folder, Settings(threads=threads, rows=ROWS, context=1024))
    one_by_one = {"cache_prompt": False, "ignore_eos": True}

    def ask(text: str, count: int, *pictures) -> object:
        return engine.ask([user_turn(text, len(pictures))], pictures, count, **one_by_one)

    figures = []
    for turn in range(TURNS):
        reading = ask(f"{turn} {LONG_TEXT}", 1)
        answer = ask("What is it?", NEW_TOKENS, picture_of_noise(turn))
        questions = [([user_turn(f"{turn} {row} Tell me more.", 0)], ()) for row in range(ROWS)]
        together = engine.ask_all(questions, max_new_tokens=NEW_TOKENS, **one_by_one)
        figures.append(
            {
                "prompt": reading.read_tokens / reading.prompt_seconds,
                "first": 1000 * answer.prompt_seconds,
                "generation": answer.new_tokens / answer.seconds,
                "together": sum(one.new_tokens / one.seconds for one in together),
            }  # fmt: skip
        )
    return medians(figures[1:])


def medians(figures: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(one[name] for one in figures) for name in figures[0]}


def prepare(weight: Path | None, folder: Path) -> None:
    """The weights, and a GGUF folder of each type."""
    torch.manual_seed(0)
    model = load_model(weight) if weight else MiniMindVLM(VLMConfig())
    save_weights(model, folder / WEIGHTS)
    for name, (dtype, quantized) in LLAMA_CPP.items():
        (folder / name).mkdir()
        source = Source(load_model(folder / WEIGHTS), read_tokenizer(folder / WEIGHTS), "measured")
        export_gguf(replace(source, dtype=getattr(torch, dtype), quantized=quantized), folder / name)


def measure_one(name: str, folder: Path, threads: int) -> dict[str, float]:
    """In this process, which is to end afterwards: what it took at most is told, too."""
    found = (
        measure_ours(OURS[name], folder, threads) if name in OURS else measure_llama_cpp(folder / name, threads)
    )  # fmt: skip
    return {**found, "memory": process_bytes("VmHWM") / 1e6}


def in_a_process(name: str, folder: Path, threads: int) -> dict[str, float]:
    command = [sys.executable, __file__, "--one", name, "--folder", folder, "--threads", threads]
    process = subprocess.run(
        [str(part) for part in command], env=child_environment(threads), capture_output=True, text=True, check=False
    )
    if process.returncode:
        raise UserError(f"{name}: {process.stderr[-2000:]}")
    return json.loads(process.stdout.splitlines()[-1])


def compare(names: list[str], folder: Path, threads: int, rounds: int, say: Callable[[str], None] = print) -> dict:
    """By contestant, the medians over the rounds."""
    found: dict[str, list] = {name: [] for name in names}
    for number in range(rounds):
        for name in names:
            found[name].append(in_a_process(name, folder, threads))
            say(f"round {number + 1}: {name}: {found[name][-1]}")
    return {name: medians(figures) for name, figures in found.items()}


def table(found: dict[str, dict]) -> str:
    heads = " | ".join(head for head, _ in COLUMNS.values())
    lines = [f"| | {heads} |", "|---" * (len(COLUMNS) + 1) + "|"]
    for name, figures in found.items():
        cells = " | ".join(format(figures[column], form) for column, (_, form) in COLUMNS.items())
        lines.append(f"| {name} | {cells} |")
    return "\n".join(lines)


def parse_options() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--weight", type=Path, help="by default random weights of the 26 M model")
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only", nargs="+", choices=[*OURS, *LLAMA_CPP], default=[*OURS, *LLAMA_CPP])
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--one", choices=[*OURS, *LLAMA_CPP], help="used by itself: measure one in this process")
    parser.add_argument("--folder", type=Path, help="used by itself, with --one")
    return parser.parse_args()


def main() -> None:
    options = parse_options()
    if options.one:
        print(json.dumps(measure_one(options.one, options.folder, options.threads)))
        return
    try:
        with tempfile.TemporaryDirectory() as name:
            prepare(options.weight, Path(name))
            found = compare(options.only, Path(name), options.threads, options.rounds)
    except (UserError, OSError) as error:
        raise SystemExit(f"against_llama_cpp: {error}") from error
    print(table(found))
    if options.json:
        options.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
