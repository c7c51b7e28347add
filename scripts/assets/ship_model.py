"""A run's weights as they ship: in half the bytes, without the flags and paths of who trained them.

    python scripts/assets/ship_model.py --weight out/wide/sft_vlm_192.safetensors --output model/emoji-vlm.safetensors

--decoder leaves the projector out, too: a base to start from.

The tokenizer stays out, too: model/tokenizer.json is beside them. docs/what_ships.md has the runs that come before.
"""

import argparse
from pathlib import Path

from model.command_line import CommandLine
from model.config import MiniMindConfig
from model.files import ROOT, SHIPPED_MODEL
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.weights import (
    PROJECTOR_PREFIX,
    TOWER_PREFIX,
    decoder_arguments,
    load_model,
    load_weights,
    read_facts,
    read_sizes,
    save_weights,
)

OF_THE_RUN = "stage_config"  # its flags, paths among them


def decoder_of(path: Path) -> MiniMindForCausalLM:
    """The decoder of a file, with nothing that sees."""
    decoder = MiniMindForCausalLM(MiniMindConfig(**decoder_arguments(read_sizes(path))))
    load_weights(decoder, path, ignore=(PROJECTOR_PREFIX, TOWER_PREFIX))
    return decoder


def ship(arguments: argparse.Namespace) -> None:
    weight = arguments.weight
    model = decoder_of(weight) if arguments.decoder else load_model(weight, arguments.vision_model)
    facts = {name: text for name, text in read_facts(weight).items() if name != OF_THE_RUN}
    save_weights(model.half(), arguments.output, facts)
    print(f"{arguments.output}: {arguments.output.stat().st_size / 1e6:.1f} MB")


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--weight", type=Path, required=True, help="what a stage has left")
    parser.add_argument("--vision_model", type=Path, help="its tower, if it lies elsewhere than while it was trained")
    parser.add_argument("--decoder", action="store_true", help="the decoder alone")
    parser.add_argument("--output", type=Path, default=ROOT / SHIPPED_MODEL)
    ship(parser.parse_args(arguments))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"ship_model: {error}") from error
