"""Names of a trained model moved to where its tower puts their things, and the projector solved for, in closed form.

    python scripts/assets/tie_names.py --weight out/wide/sft_vlm_192.safetensors --output out/tied.safetensors

To find a thing by its name, its patches must come out of the projector alike the name's embedding. The projector is one
linear layer: where there are more names than the tower is wide, it can do that only if the embeddings lie to each other
as the tower's concepts do. embed_names.py sees to it before a base decoder is trained; this does where the tower came
later. The tower's directions are turned as a whole until they lie as near to the embeddings as they can (orthogonal
Procrustes, Schönemann 1966), so that the decoder unlearns little. Train stage 2 again afterwards.
"""

import argparse
from pathlib import Path

import torch
from torch.nn import functional as F

from dataset import emoji_world as world
from model.command_line import CommandLine
from model.messages import UserError
from model.model_vlm import MiniMindVLM
from model.projectors import LinearProjector
from model.tokenizer_files import load_tokenizer
from model.tower_folder import tower_sizes
from model.vision_encoder import pixel_statistics
from model.weights import load_model, save_weights
from scripts.assets.embed_names import concept_directions, mixed, seen_patches, spellings, token_directions

RIDGE = 10.0  # beside 10^5 patches of length 69: keeps directions small in which no picture differs
GROUND = 6  # every so many-th patch of the ground


def tie_embeddings(table: torch.Tensor, token_ids: torch.Tensor, directions: torch.Tensor) -> None:
    """Move rows token_ids [n] of the table [vocabulary, width] towards directions [n, width], which are turned to them.

    What all names share, and how far each lies from that, stays.
    """
    rows = table[token_ids]
    shared = rows.mean(0)
    own = rows - shared
    left, _, right = torch.linalg.svd(directions.T @ F.normalize(own, dim=-1))
    moved = F.normalize(mixed(directions @ left @ right, own), dim=-1)
    table[token_ids] = shared + moved * own.norm(dim=-1, keepdim=True)


def name_directions(table: torch.Tensor) -> torch.Tensor:
    """Unit vectors [concepts, width] from the middle of all names to the tokens of each, both languages alike."""
    tokenizer, means = load_tokenizer(), []
    for concept in world.concepts():
        means.append(torch.stack([table[ids].mean(0) for ids in spellings(concept, tokenizer)]).mean(0))
    means = torch.stack(means)
    return F.normalize(means - means.mean(0), dim=-1)


def solve_projector(model: MiniMindVLM, pictures: int, statistics: tuple) -> None:
    """Least squares: patches of a thing become its name's direction, those of the ground what they became before.

    statistics: mean and deviation of pixels, as the tower wants them.
    """
    layer, names = model.vision_proj.vision_proj[0], name_directions(model.model.embed_tokens.weight)
    patches, targets = [], []
    for seen, concept in seen_patches(model.vision_encoder, statistics, pictures):
        on_thing = concept >= 0
        things, grounds = seen[on_thing], seen[~on_thing][::GROUND]
        length = layer(things).norm(dim=-1).mean()  # what the decoder is used to
        patches += [things, grounds]
        targets += [names[concept[on_thing]] * length, layer(grounds)]
    inputs = F.pad(torch.cat(patches), (0, 1), value=1.0).double()  # the bias learns with the rest
    square = inputs.T @ inputs + RIDGE * torch.eye(inputs.shape[1], dtype=torch.float64)
    solved = torch.linalg.solve(square, inputs.T @ torch.cat(targets).double())
    layer.weight.copy_(solved[:-1].T)
    layer.bias.copy_(solved[-1])


@torch.no_grad()
def tie(arguments: argparse.Namespace) -> None:
    model = load_model(arguments.weight, arguments.vision_model)
    if not isinstance(getattr(model, "vision_proj", None), LinearProjector):
        raise UserError(f"{arguments.weight} has no linear projector: this is solved for that kind alone")
    folder = arguments.vision_model or Path(model.config.vision_source)
    table = model.model.embed_tokens.weight
    directions = concept_directions(folder, arguments.pictures, table.shape[1])
    tie_embeddings(table, *token_directions(directions))
    solve_projector(model, arguments.pictures, pixel_statistics(tower_sizes(folder)))
    save_weights(model, arguments.output, {"stage": "pretrain_vlm"})
    print(f"{arguments.output}: names lie as the tower has their things; train stage 2 from it")


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--weight", type=Path, required=True, help="a model that sees, of either stage")
    parser.add_argument("--vision_model", type=Path, help="its tower; by default the one that it names")
    parser.add_argument("--output", type=Path, required=True, help="what stage 2 starts from")
    parser.add_argument("--pictures", type=int, default=3200, help="drawn to look at")
    tie(parser.parse_args(arguments))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"tie_names: {error}") from error
