"""A run's weights as they ship: in half the bytes, without the flags and paths of who trained them.

    python scripts/assets/ship_model.py --weight out/wide/sft_vlm_192.safetensors --output model/emoji-vlm.safetensors

The tokenizer stays out, too: model/tokenizer.json is beside them. docs/what_ships.md has the runs that come before.
"""

import argparse
from pathlib import Path

from model.command_line import CommandLine
from model.files import ROOT
from model.messages import UserError
from model.weights import SHIPPED_MODEL, load_model, read_facts, save_weights

OF_THE_RUN = "stage_config"  # its flags, paths among them


def ship(arguments: argparse.Namespace) -> None:
    model = load_model(arguments.weight)
    facts = {name: text for name, text in read_facts(arguments.weight).items() if name != OF_THE_RUN}
    save_weights(model.half(), arguments.output, facts)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--weight", type=Path, required=True, help="what a stage has left")
    parser.add_argument("--output", type=Path, default=ROOT / SHIPPED_MODEL)
    ship(parser.parse_args(arguments))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"ship_model: {error}") from error
