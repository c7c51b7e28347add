"""Teach a tower to read signs: it goes on from the one that ships, which has never seen a letter.

    python scripts/assets/teach_signs.py --output out/sign-clip

As scripts/assets/train_tower.py pairs each patch with what is true of it, so every patch of a board is paired here with
the text that stands on it and with the board's colour: a decoder that is asked what the red sign says must find both in
one place. Every other patch is held to what the tower made of it before, so that things and grounds stay as they were.
Pictures are cut out of the training scenes of dataset/emoji_signs.py, in the size of the tower.
"""

import argparse
import copy
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import torch
from PIL import Image
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset

from dataset import emoji_signs as signs
from dataset.emoji_world import GRID, IMAGE_SIZE, PATCH_SIZE
from model.command_line import CommandLine
from model.device import choose_dtype, keep_few_kernels, to_device
from model.files import ROOT, SHIPPED_TOWER
from model.messages import UserError
from model.tower_folder import read_tower
from scripts.assets.train_tower import build_optimizer, first_patches, outputs_of, rate_factor, save_tower

TEXTS = (*signs.WORDS, *signs.NUMBERS)
COLOURS = tuple(signs.BOARDS)
WARM_UP = 100  # steps
COVERED = 0.35  # of a patch: where a board covers more, the patch is the board's
AROUND = (6 * PATCH_SIZE, 2 * PATCH_SIZE)  # pixels by which a board may stick out, as where a tile ends: across, down
KEPT_PATCHES = 80  # of a picture, boards first, as train_tower.py leaves patches out
WHOLE = 0.1  # of the pictures, the last ones, are seen with all their patches
KEPT = 4.0  # weight of the patches that are to stay as they were


class CloseUps(IterableDataset):
    """Pictures around each sign of one scene after another, with the text and the colour of the board under each of
    their 196 patches; -1: none."""

    def __init__(self, seed: str, split: str, count: int):
        self.seed, self.split, self.count = seed, split, count

    def __iter__(self) -> Iterator[dict]:
        given = number = 0
        while given < self.count:
            scene, rng = signs.sample_sign_scene(self.seed, self.split, number), Random(f"{self.seed}:{number}")
            picture = signs.render(scene)
            for sign in scene.signs[: self.count - given]:
                yield close_up(picture, scene, sign, rng)
                given += 1
            number += 1


def close_up(picture: Image.Image, scene: signs.SignScene, sign: signs.Sign, rng: Random) -> dict:
    """A picture of the tower's size that holds a sign, or most of it, and where in the scene it is."""
    left, top = (
        min(max(rng.randint(high - IMAGE_SIZE - out, low + out), 0), signs.IMAGE_SIZE - IMAGE_SIZE)
        for low, high, out in zip(sign.box[:2], sign.box[2:], AROUND, strict=True)
    )
    text, colour = np.full((2, GRID, GRID), -1)
    for other in scene.signs:
        covers = np.zeros((IMAGE_SIZE, IMAGE_SIZE), bool)
        x0, y0, x1, y1 = (max(edge - shift, 0) for edge, shift in zip(other.box, (left, top) * 2, strict=True))
        covers[y0:y1, x0:x1] = True
        share = covers.reshape(GRID, PATCH_SIZE, GRID, PATCH_SIZE).mean((1, 3))
        text[share > COVERED] = TEXTS.index(other.text)
        colour[share > COVERED] = COLOURS.index(other.colour)
    cut = picture.crop((left, top, left + IMAGE_SIZE, top + IMAGE_SIZE))
    pixels = torch.from_numpy(np.array(cut).transpose(2, 0, 1).copy())
    labels = {"text": torch.from_numpy(text.flatten()), "colour": torch.from_numpy(colour.flatten())}
    return {"pixels": pixels, **labels, "left": left, "top": top}


def patches_of(
    tower: nn.Module, pixels: torch.Tensor, dtype: torch.dtype, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """[batch, 196 or kept, hidden], as the decoder gets them. kept: as for outputs_of."""
    return outputs_of(tower, pixels, dtype, kept)[:, 1:]


@torch.no_grad()
def evaluate(tower: nn.Module, before: nn.Module, head: nn.Module, device: torch.device, count: int) -> dict:
    """On held-out scenes: boards read right by the vote of their patches, patches of boards that tell their colour, and
    how far other patches have moved."""
    read, coloured, moved, scale = [], [], [], []
    for batch in DataLoader(CloseUps("1", "held_out", count), batch_size=50):
        batch = to_device(batch, device)
        found, old = (patches_of(one, batch["pixels"], torch.float32) for one in (tower, before))
        said_text, said_colour = split(head(found))
        for scores, texts in zip(said_text.log_softmax(-1), batch["text"], strict=True):
            text = texts[texts >= 0].mode().values
            read.append(bool(scores[texts == text].sum(0).argmax() == text))
        other = batch["text"] < 0
        coloured.append((said_colour.argmax(-1) == batch["colour"])[~other].float().mean())
        moved.append((found - old)[other].square().mean())
        scale.append(old[other].var())
    colours = round(float(sum(coloured) / len(coloured)), 4)
    moved = round(float(sum(moved) / sum(scale)), 4)
    return {"boards_read": round(float(np.mean(read)), 4), "colours": colours, "moved": moved}


def split(scores: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The head's, of TEXTS and of COLOURS."""
    return scores.split([len(TEXTS), len(COLOURS)], -1)


def train(arguments: argparse.Namespace) -> None:
    keep_few_kernels()
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype("auto", device)
    tower = read_tower(arguments.go_on_from)[0].float().to(device)
    before, width = copy.deepcopy(tower).eval(), tower.config.hidden_size
    head = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, len(TEXTS) + len(COLOURS))).to(device)
    tower.requires_grad_(True).train()
    tower.config._attn_implementation = "eager"  # faster than torch's kernel in training on a CPU, by a third
    learning = nn.ModuleDict({"tower": tower, "head": head})
    optimizer = build_optimizer(learning, arguments.learning_rate, dtype)
    steps, start = math.ceil(arguments.pictures / arguments.batch_size), time.perf_counter()
    data = CloseUps(str(arguments.seed), "train", steps * arguments.batch_size)
    for step, batch in enumerate(DataLoader(data, arguments.batch_size, num_workers=1), 1):
        batch = to_device(batch, device)
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate_factor(step, step / steps, WARM_UP)
        texts, colours, kept = batch["text"], batch["colour"], None
        if step <= (1 - WHOLE) * steps:
            kept = first_patches(texts >= 0, KEPT_PATCHES)
            texts, colours = texts.gather(1, kept), colours.gather(1, kept)
        with torch.no_grad():
            old = patches_of(before, batch["pixels"], dtype, kept)
        found, on_board = patches_of(tower, batch["pixels"], dtype, kept), texts >= 0
        said_text, said_colour = split(head(found[on_board]))
        reading = F.cross_entropy(said_text, texts[on_board])
        colour = F.cross_entropy(said_colour, colours[on_board])
        moved = (found - old)[~on_board].square().mean() / old.var()
        optimizer.zero_grad()
        (reading + colour + KEPT * moved).backward()
        nn.utils.clip_grad_norm_(learning.parameters(), 1.0)
        optimizer.step()
        if step % arguments.log_interval == 0 or step == steps:
            minutes = (time.perf_counter() - start) / 60
            print(
                f"step {step}/{steps} {minutes:.1f} min reading {reading:.3f} colour {colour:.3f} moved {moved:.4f}",
                flush=True,
            )
    scores = evaluate(tower.eval(), before, head, device, arguments.held_out)
    entry = {"pictures": steps * arguments.batch_size, "minutes": round(minutes, 1), **scores}
    print(json.dumps(entry), flush=True)
    told = {name: str(value) for name, value in vars(arguments).items()}
    save_tower(tower, arguments.output, {"arguments": told, "history": [entry]})


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, required=True, help="folder for the tower")
    parser.add_argument("--go_on_from", type=Path, default=ROOT / SHIPPED_TOWER, help="folder of a tower")
    parser.add_argument("--pictures", type=int, default=60000, help="close-ups, each seen once")
    parser.add_argument("--held_out", type=int, default=400, help="close-ups of held-out scenes, read at the end")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--log_interval", type=int, default=50, help="steps")
    parser.add_argument("--seed", type=int, default=42)
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"teach_signs: {error}") from error
