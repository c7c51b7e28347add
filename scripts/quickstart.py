"""From nothing to a model that answers about pictures: data, two stages, score, a sheet to look at.

    python scripts/quickstart.py [--from_scratch] [--output out/quickstart]

Starts from the small tower and the small base decoder that ship under model/, as training with real weights starts from
openai's CLIP and MiniMind's base. --from_scratch trains the base decoder first, which takes far longer.
"""

import json
import platform
import subprocess
import sys
import time
from pathlib import Path

import torch
import transformers

from dataset import emoji_world
from model.command_line import CommandLine
from model.files import ROOT
from scripts.assets.sheet import draw_sheet

BASE = ROOT / "model/language_model/emoji-llm.safetensors"
TOWER = ROOT / "model/vision_model/emoji-clip"
CONCEPTS = 128  # the first of Emoji World's: short everyday names
PICTURES = {"pretrain": 3000, "sft": 8500, "held_out": 200}
QUESTIONS = 9  # a picture in stage 2
# Small steps, because looking things up is learnt by their number, and Muon, because it then takes fewer of them.
FLAGS = ("--batch_size", 8, "--learning_rate", 2e-3, "--optimizer", "muon")
STAGE_2 = ("--projector_learning_rate", 4e-3, *FLAGS)
BASE_SIZES = ("--hidden_size", 192, "--num_hidden_layers", 4, "--num_attention_heads", 6)


class Quickstart:
    """Runs each step as a process, as a user would, and keeps the minutes."""

    def __init__(self, output: Path):
        self.output, self.minutes = output, {}

    def run(self, name: str, script: str, *arguments: object) -> None:
        print(f"\n== {name}", flush=True)
        started = time.perf_counter()
        command = [sys.executable, str(ROOT / script), *map(str, arguments)]
        code = subprocess.run(command, check=False).returncode
        if code:
            raise SystemExit(f"quickstart: {script} ended with code {code}; its message stands above")
        self.minutes[name] = round((time.perf_counter() - started) / 60, 2)

    def weight(self, stage: str) -> Path:
        (path,) = self.output.glob(f"{stage}_[0-9]*[0-9].safetensors")
        return path


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "out/quickstart")
    parser.add_argument("--from_scratch", action="store_true", help="train the base decoder too")
    parser.add_argument("--llm_texts", type=int, default=80000, help="scenes in words for it")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the data, for a quick look")
    options = parser.parse_args()
    torch.manual_seed(0)
    quickstart, data = Quickstart(options.output), options.output / "data"
    counts = {name: max(16, round(count * options.scale)) for name, count in PICTURES.items()}
    numbers = [part for name, count in counts.items() for part in (f"--{name}", count)]
    quickstart.run("data", "scripts/build_emoji_world.py", "--output", data, "--concepts", CONCEPTS,
                   "--questions", QUESTIONS, *numbers)  # fmt: skip
    base = BASE
    if options.from_scratch:
        names = options.output / "names.safetensors"
        quickstart.run("base data", "scripts/build_emoji_world.py", "--output", data, "--questions", QUESTIONS,
                       "--llm", options.llm_texts, "--strangers", options.llm_texts // 10,
                       "--pretrain", 0, "--sft", 0, "--held_out", 0)  # fmt: skip
        quickstart.run("names", "scripts/assets/embed_names.py", "--vision_model", TOWER, "--output", names)
        quickstart.run("base decoder", "trainer/train_llm.py", "--data_path", data / "llm.jsonl",
                       "--init_embeddings", names, *BASE_SIZES, *FLAGS, "--save_dir", options.output)  # fmt: skip
        base = quickstart.weight("llm")
    common = ("--vision_model", TOWER, "--save_dir", options.output, "--val_samples", 64)
    quickstart.run("stage 1", "trainer/train_pretrain_vlm.py", "--data_path", data / "pretrain.jsonl",
                   "--from_weight", base, "--projector_learning_rate", 1e-2, *FLAGS, *common)  # fmt: skip
    seeing = quickstart.weight("pretrain_vlm")
    quickstart.run("stage 2", "trainer/train_sft_vlm.py", "--data_path", data / "sft.jsonl",
                   "--from_weight", seeing, *STAGE_2, *common)  # fmt: skip
    weight = quickstart.weight("sft_vlm")
    quickstart.run("score", "scripts/score.py", "--weight", weight, "--data", data / "held_out.jsonl",
                   "--json", options.output / "score.json", "--answers", options.output / "answers.jsonl")  # fmt: skip

    score = json.loads((options.output / "score.json").read_text())
    lines = (options.output / "answers.jsonl").read_text(encoding="utf-8").split("\n")
    answers = [json.loads(line) for line in lines if line]
    sheet = options.output / "sheet.png"
    draw_sheet(answers, sheet, emoji_world.attribution())
    report = {
        "exact_match": score["exact_match"],
        "minutes": round(sum(quickstart.minutes.values()), 2),
        "minutes_by_step": quickstart.minutes,
        "concepts": CONCEPTS,
        "pictures": counts,
        "by_kind": score["by_kind"],
        "by_language": score["by_language"],
        "versions": {"python": platform.python_version(), "torch": torch.__version__,
                     "transformers": transformers.__version__},
        "pictures_by": emoji_world.attribution(),
    }  # fmt: skip
    (options.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
    shown = "{right:.2f} with the right picture, {shuffled:.2f} shuffled, {none:.2f} without"
    example = data / "images" / "held_out_000000.jpg"
    shown = shown.format(**report["exact_match"])
    print(f"\nexact match on held-out scenes: {shown}; {report['minutes']:.1f} minutes")
    print(f"look:  {sheet}\nask:   {sys.executable} eval_vlm.py --weight {weight} --image {example}")


if __name__ == "__main__":
    main()
