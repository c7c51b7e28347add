"""A real decoder, a real tower, real pictures: SmolLM2-135M learns to say in English what a picture shows.

    make real                                                     # the packages that bring the weights
    apt-get install tuxpaint-stamps-default                       # where Debian is; OpenMoji alone without it
    python scripts/realstart.py [--output out/realstart]

Everything comes out of packages, so nothing is downloaded while it runs. What is scored are pictures of things that
training never shows. docs/real_models.md says what comes of it, and does the same with weights from a hub.
"""

import json
import sys
from pathlib import Path

from dataset.exam.figures import MODES
from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError
from scripts.assets.sheet import draw_sheet
from scripts.build_real_pictures import CREDIT, KIND, NAME
from scripts.hub.packages import INSTALL, PACKAGED, SMOLLM2_FILE, installed_at
from scripts.roads.photographs import write_photographs
from scripts.roads.road import Road, read_records
from scripts.roads.words import KindOfCaption, broad_kind, figures, judge

BASE = PACKAGED["smollm2"].folder / SMOLLM2_FILE
TOWER = PACKAGED["efficientnet-lite0"].folder
COMMON = ("--vision_model", TOWER, "--batch_size", 16, "--val_samples", 64)
STAGE_1 = ("--trainable", "projector", "--projector", "norm_mlp", "--image_tokens", 49, "--learning_rate", 1e-3)
STAGE_2 = ("--projector_learning_rate", 5e-4, "--learning_rate", 2e-4)


def check_packages() -> None:
    """Raises UserError where a package is missing, before minutes have passed."""
    for what in PACKAGED.values():
        if installed_at(what.module) is None:
            raise UserError(f"the package {what.package} is not installed: {INSTALL}")


def report(road: Road) -> dict:
    """The figures, from the answers that scripts/score.py wrote."""
    captions, held_out, records = map(read_records, (road.data / "captions.jsonl", road.data / "held_out.jsonl",
                                                     road.output / "answers.jsonl"))  # fmt: skip
    kind_of = KindOfCaption([(line["caption"], line["kind"]) for line in captions if line["kind"]])
    folders = {record["image"]: record["folder"] for record in held_out}
    of = {kind: [record for record in records if record["kind"] == kind] for kind in ("name", "kind of thing")}
    known = {line["kind"] for line in captions} | {record["truth"] for record in of["kind of thing"]}
    kinds = {record["pictures"][0]: record["truth"] for record in of["kind of thing"]}

    def is_thing(record: dict) -> bool:
        return not folders[Path(record["pictures"][0]).name].startswith("symbols")

    result = {}
    for part, chosen in (("all", lambda _: True), ("without letters and signs", is_thing)):
        asked = {kind: [record for record in found if chosen(record)] for kind, found in of.items()}
        captions_judged = judge(asked["name"], kinds, kind_of, MODES)
        of_kind = asked["kind of thing"]
        result[part] = {
            mode: {
                "kind of thing": figures([record[mode] == record["truth"] for record in of_kind]),
                "broad kind": figures(
                    [broad_kind(record[mode], known) == broad_kind(record["truth"], known) for record in of_kind]
                ),
            }
            | {f"caption {what}": figure for what, figure in captions_judged[mode].items()}
            for mode in MODES
        }
    return {"figures": result, **road.effort(), "pictures_by": CREDIT}


def table(figures: dict) -> str:
    lines = []
    for part, modes in figures.items():
        lines.append(f"{part:<34}" + "".join(f"{mode:>26}" for mode in modes))
        for what in next(iter(modes.values())):
            cells = [modes[mode][what] for mode in modes]
            shown = (
                f"{cell['share'] or 0:>10.3f}  {'{:.2f} to {:.2f}'.format(*cell['interval']):<14}" for cell in cells
            )
            lines.append(f"  {what:<32}" + "".join(shown))
    return "\n".join(lines)


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / "out/realstart")
    parser.add_argument("--epochs", type=int, default=1, help="of stage 2")
    parser.add_argument("--choose", type=float, default=0.0, help="score this share of the training things instead")
    parser.add_argument("--scale", type=float, default=1.0, help="share of the things, for a quick look")
    options = parser.parse_args()
    try:
        check_packages()
    except UserError as error:
        raise SystemExit(f"realstart: {error}") from error
    road = Road("realstart", options.output)
    road.run("decoder", "scripts/download.py", "smollm2", "--source", "package")
    road.run("tower", "scripts/download.py", "efficientnet-lite0")
    road.run("data", "scripts/build_real_pictures.py", "--output", road.data, "--scale", options.scale,
             "--choose", options.choose)  # fmt: skip
    pretrained = road.train("stage 1", "pretrain_vlm", "pretrain.jsonl", "--from_weight", BASE, *COMMON, *STAGE_1)
    weight = road.train("stage 2", "sft_vlm", "sft.jsonl", "--from_weight", pretrained, *COMMON, *STAGE_2,
                        "--epochs", options.epochs)  # fmt: skip
    road.run("score", "scripts/score.py", "--weight", weight, "--data", road.data / "held_out.jsonl",
             "--json", options.output / "score.json", "--answers", options.output / "answers.jsonl")  # fmt: skip
    shown = read_records(road.output / "answers.jsonl")
    if write_photographs(road.data, (NAME, KIND)):
        road.run("photographs", "scripts/score.py", "--weight", weight, "--data", road.data / "photographs.jsonl",
                 "--answers", options.output / "photographs.jsonl")  # fmt: skip
        shown = read_records(road.output / "photographs.jsonl") + shown
    draw_sheet(shown, options.output / "sheet.png", CREDIT.replace("\n", " "))
    result = report(road)
    (options.output / "report.json").write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"\n{table(result['figures'])}\n{result['minutes']:.1f} minutes")
    print(
        f"look:  {options.output / 'sheet.png'}\nask:   {sys.executable} eval_vlm.py --weight {weight} --image PICTURE"
    )
    print(f"chat:  {sys.executable} -m streamlit run web_demo.py -- --weights {options.output}")


if __name__ == "__main__":
    main()
