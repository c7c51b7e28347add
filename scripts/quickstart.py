"""From nothing to a model that answers about pictures: data, two stages, score, a sheet to look at.

    python scripts/quickstart.py [--from_scratch] [--output out/quickstart]

Starts from the small tower and the small base decoder that ship under model/, as training with real weights starts from
openai's CLIP and MiniMind's base. That base has looked at such pictures before, through a projector that it does not
bring. --from_scratch trains one first that has only read, which takes far longer and ends lower (docs/performance.md).
"""

import json
import sys
from pathlib import Path

from dataset import emoji_world
from model.command_line import CommandLine
from model.files import ROOT, SHIPPED_BASE, SHIPPED_TOWER
from scripts.roads.road import Road

BASE, TOWER = ROOT / SHIPPED_BASE, ROOT / SHIPPED_TOWER
CONCEPTS = 128  # the first of Emoji World's: short everyday names
PICTURES = {"pretrain": 1200, "sft": 2500, "held_out": 200}
QUESTIONS = 9  # a picture in stage 2
# Small steps, because looking things up is learnt by their number, and Muon, because it then takes fewer of them.
FLAGS = ("--batch_size", 8, "--learning_rate", 2e-3, "--optimizer", "muon")
STAGE_1 = ("--projector_learning_rate", 1e-2, *FLAGS)
STAGE_2 = ("--projector_learning_rate", 4e-3, *FLAGS)
BASE_SIZES = ("--hidden_size", 192, "--num_hidden_layers", 4, "--num_attention_heads", 6)


class Quickstart(Road):
    def build(self, name: str, **counts: int) -> None:
        flags = [part for flag, count in counts.items() for part in (f"--{flag}", count)]
        self.run(name, "scripts/build_emoji_world.py", "--output", self.data, "--questions", QUESTIONS, *flags)

    def train_base(self, texts: int) -> Path:
        """The base decoder, from nothing."""
        names = self.output / "names.safetensors"
        self.build("base data", llm=texts, strangers=texts // 10, pretrain=0, sft=0, held_out=0)
        self.run("names", "scripts/assets/embed_names.py", "--vision_model", TOWER, "--output", names)
        return self.train("base decoder", "llm", "llm.jsonl", "--init_embeddings", names, *BASE_SIZES, *FLAGS)

    def report(self, counts: dict[str, int]) -> dict:
        """What scripts/score.py found, and what it took."""
        score = json.loads((self.output / "score.json").read_text())
        report = {
            "exact_match": score["exact_match"],
            **self.effort(),
            "concepts": CONCEPTS,
            "pictures": counts,
            "by_kind": score["by_kind"],
            "by_language": score["by_language"],
            "pictures_by": emoji_world.attribution(),
        }
        (self.output / "report.json").write_text(json.dumps(report, indent=1) + "\n")
        return report


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "out/quickstart")
    parser.add_argument("--from_scratch", action="store_true", help="train the base decoder too")
    parser.add_argument("--llm_texts", type=int, default=80000, help="scenes in words for it")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the data, for a quick look")
    options = parser.parse_args()
    quickstart = Quickstart("quickstart", options.output)
    counts = {name: max(16, round(count * options.scale)) for name, count in PICTURES.items()}
    quickstart.build("data", concepts=CONCEPTS, **counts)
    base = quickstart.train_base(options.llm_texts) if options.from_scratch else BASE
    common = ("--vision_model", TOWER, "--val_samples", 64)
    pretrained = quickstart.train("stage 1", "pretrain_vlm", "pretrain.jsonl", "--from_weight", base, *STAGE_1, *common)
    weight = quickstart.train("stage 2", "sft_vlm", "sft.jsonl", "--from_weight", pretrained, *STAGE_2, *common)
    sheet, errors = options.output / "sheet.png", options.output / "errors.html"
    quickstart.run("score", "scripts/score.py", "--weight", weight, "--data", quickstart.data / "held_out.jsonl",
                   "--json", options.output / "score.json", "--answers", options.output / "answers.jsonl",
                   "--sheet", sheet, "--html", errors, "--credit", emoji_world.attribution())  # fmt: skip
    report = quickstart.report(counts)
    shown = "{right:.2f} with the right picture, {shuffled:.2f} shuffled, {none:.2f} without"
    shown = shown.format(**report["exact_match"])
    example = quickstart.data / "images/held_out_000000.jpg"
    print(f"\nexact match on held-out scenes: {shown}; {report['minutes']:.1f} minutes")
    curves = [stage.with_suffix("") / "curves.png" for stage in (pretrained, weight)]
    print("curves:", *curves, sep="\n       ")
    print(f"look:  {sheet}\nask:   {sys.executable} eval_vlm.py --weight {weight} --image {example}")
    print(f"wrong: {errors}")


if __name__ == "__main__":
    main()
