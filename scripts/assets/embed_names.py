"""Token embeddings for a base decoder from a frozen tower: a name starts where the tower puts its thing's pictures.

    python scripts/assets/embed_names.py --vision_model model/vision_model/emoji-clip --output out/names.safetensors
    python trainer/train_llm.py --init_embeddings out/names.safetensors ...

CLIP's text half does this by training; a frozen tower allows it in closed form (linear discriminant analysis, Fisher
1936): the mean patch of each concept, seen through the inverse of the spread within concepts. The names of a cat in
both languages and its patches then lie together: what is read in one carries over to the other, and later to pictures.
"""

from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader
from transformers import PreTrainedTokenizerFast

from dataset import emoji_world as world
from model.command_line import CommandLine
from model.messages import UserError
from model.tokenizer_files import load_tokenizer
from model.tower_folder import read_tower, tower_sizes
from model.vision_encoder import encode_patches, normalize_pixels, pixel_statistics
from scripts.assets.train_tower import Scenes

COMMON = 0.8  # of a name's embedding is its thing's; the rest, 0.6 of the length, tells its tokens apart
LENGTH = 0.28  # of an embedding, as the decoder's own initialisation has it at 192 wide


def seen_patches(
    tower: nn.Module, statistics: tuple, pictures: int, batch_size: int = 32
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Training scenes as a tower sees them: patches [batch, 196, width] and the concept of each [batch, 196], or -1.

    statistics: mean and deviation of pixels, as the tower wants them.
    """
    for batch in DataLoader(Scenes(9, "train", pictures, max_things=9), batch_size):
        yield encode_patches(tower, normalize_pixels(batch["pixels"], *statistics)), batch["concept"]


@torch.no_grad()
def concept_directions(vision_model: Path, pictures: int, width: int) -> torch.Tensor:
    """Unit vectors [concepts, width], from the patches that things cover in training scenes.

    width: at most the tower's; of its directions those in which concepts differ most.
    """
    sizes = tower_sizes(vision_model)
    if width > sizes["hidden_size"]:
        raise UserError(
            f"--hidden_size {width} is more than the {sizes['hidden_size']} of {vision_model}: at most those"
        )
    tower, _ = read_tower(vision_model)
    features, labels = [], []
    for patches, concept in seen_patches(tower, pixel_statistics(sizes), pictures):
        features.append(patches[concept >= 0])
        labels.append(concept[concept >= 0])
    features, labels = torch.cat(features).double(), torch.cat(labels)
    count = len(world.concepts())
    sums = torch.zeros(count, features.shape[1], dtype=torch.float64).index_add_(0, labels, features)
    means = sums / labels.bincount(minlength=count).clamp(min=1)[:, None]
    spread = torch.cov((features - means[labels]).T)
    values, vectors = torch.linalg.eigh(spread + 1e-3 * spread.diagonal().mean() * torch.eye(len(spread)))
    whitened = (means - means.mean(0)) @ (vectors * values.rsqrt()) @ vectors.T
    strongest = torch.linalg.svd(whitened, full_matrices=False).Vh[:width]
    return F.normalize(whitened @ strongest.T, dim=-1).float()


def spellings(concept: world.Concept, tokenizer: PreTrainedTokenizerFast) -> list[list[int]]:
    """Its names as tokens: English at a text's beginning and within, Chinese."""
    return [tokenizer(spelling)["input_ids"] for spelling in (concept.en, " " + concept.en, concept.zh)]


def token_directions(directions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [n] of every token that spells a name, in either language, and unit vectors [n, width]: their things'."""
    tokenizer = load_tokenizer()
    parts: dict[int, list[torch.Tensor]] = {}
    for number, concept in enumerate(world.concepts()):
        for ids in spellings(concept, tokenizer):
            for token in ids:  # a token of several names gets their mean, nearer to those that it spells alone
                parts.setdefault(token, []).append(directions[number] / len(ids))
    token_ids = torch.tensor(sorted(parts))
    return token_ids, F.normalize(torch.stack([torch.stack(parts[int(token)]).sum(0) for token in token_ids]), dim=-1)


def mixed(common: torch.Tensor, own: torch.Tensor) -> torch.Tensor:
    """What a thing's names have in common and what each of their tokens has alone, [n, width], of length 1 or near it.

    common: unit vectors. own: of any length.
    """
    return COMMON * common + (1 - COMMON**2) ** 0.5 * F.normalize(own, dim=-1)


def token_embeddings(directions: torch.Tensor, seed: int = 42) -> dict[str, torch.Tensor]:
    """{"token_ids": [n], "embeddings": [n, width]} for every token that spells a name, in both languages."""
    token_ids, common = token_directions(directions)
    own = torch.randn(common.shape, generator=torch.Generator().manual_seed(seed))
    return {"token_ids": token_ids, "embeddings": LENGTH * mixed(common, own)}


def main() -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--vision_model", type=Path, required=True)
    parser.add_argument("--output", type=Path, required=True, help=".safetensors for train_llm's --init_embeddings")
    parser.add_argument("--pictures", type=int, default=3200)
    parser.add_argument("--hidden_size", type=int, default=192, help="the decoder's, at most the tower's")
    arguments = parser.parse_args()
    directions = concept_directions(arguments.vision_model, arguments.pictures, arguments.hidden_size)
    tensors = token_embeddings(directions)
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    save_file(tensors, arguments.output)
    print(f"{arguments.output}: embeddings of {len(tensors['token_ids'])} tokens")


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"embed_names: {error}") from error
