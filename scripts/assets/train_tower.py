"""Train the small CLIP tower that ships under model/: contrastive on pictures, dense on patches.

    python scripts/assets/train_tower.py --output model/vision_model/emoji-clip

CLIP's contrastive loss (Radford et al. 2021) never touches the patch outputs, and those are what the decoder reads.
The generator knows what lies under each patch, so each of the 196 is paired with phrases that are true of it: the
name of the thing it shows (or the colour of the ground), that thing's place, how many things there are. Same form as
CLIP's: patch embedding against the embedding of the phrase. Only training scenes are used. For most of the pictures
two patches of three, ground first, are left out of the tower's input (as FLIP does, Li et al. 2022): twice the speed.
"""

import argparse
import json
import math
import time
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, Dataset, Subset
from transformers import CLIPVisionConfig, PreTrainedTokenizerFast

from dataset import emoji_words as words
from dataset import emoji_world as world
from model.command_line import CommandLine
from model.device import choose_dtype, keep_few_kernels, to_device
from model.files import ROOT, SHIPPED_TOWER
from model.messages import UserError
from model.tokenizer_files import load_tokenizer
from model.tower_folder import read_tower
from model.vision_encoder import build_tower, normalize_pixels
from trainer.optim import Muon

GROUND_PATCHES = 12  # a picture, picked at random: most of the 196 show the ground and say the same
KEPT_PATCHES = 72  # a picture, while patches are left out
WARM_UP = 200  # steps
WHOLE = 0.05  # of the pictures, the last ones, are seen with all their patches
PHRASES_ALONE = 150  # steps, after going on from a saved tower: the phrases learn where it puts things


class Scenes(Dataset):
    """Drawn scenes with a label for each of the 196 patches; -1 where a patch shows the ground."""

    def __init__(self, seed: int, split: str, count: int, max_things: int, zipf: float = 0.0):
        self.seed, self.split, self.count, self.max_things, self.zipf = seed, split, count, max_things, zipf

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> dict:
        scene = world.sample_scene(self.seed, self.split, index, max_things=self.max_things, zipf=self.zipf)
        picture, labels = world.render(scene)
        labels = torch.tensor(labels).flatten()  # [196], indices into scene.things, -1 for none
        return {
            "pixels": torch.from_numpy(np.array(picture).transpose(2, 0, 1).copy()),
            "concept": torch.tensor([thing.concept for thing in scene.things] + [-1])[labels],
            "place": torch.tensor([thing.place for thing in scene.things] + [-1])[labels],
            "ground": scene.ground,
            "count": len(scene.things) - 1,
            "caption": words.caption(scene, world.LANGUAGES[index % 2]),
        }


class PhraseEncoder(nn.Module):
    """The text half: the mean of a phrase's token embeddings, projected. Names are one to three tokens long."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, width: int):
        super().__init__()
        self.tokenizer = tokenizer
        self.embedding = nn.EmbeddingBag(len(tokenizer), width)
        self.projection = nn.Linear(width, width, bias=False)
        self.ids: dict[str, torch.Tensor] = {}  # names come again in every step

    def forward(self, phrases: list[str]) -> torch.Tensor:
        rows = [self._ids(phrase) for phrase in phrases]
        offsets = torch.tensor([0] + [len(row) for row in rows[:-1]]).cumsum(0)
        device = self.projection.weight.device
        mean = self.embedding(torch.cat(rows).to(device), offsets.to(device))
        return F.normalize(self.projection(mean), dim=-1)  # [phrases, width]

    def _ids(self, phrase: str) -> torch.Tensor:
        if phrase not in self.ids:
            self.ids[phrase] = torch.tensor(self.tokenizer(phrase)["input_ids"])
        return self.ids[phrase]


def outputs_of(
    tower: nn.Module, pixels: torch.Tensor, dtype: torch.dtype, kept: torch.Tensor | None = None
) -> torch.Tensor:
    """A CLIP tower's outputs in float32 [batch, 1 + 196 or kept, hidden], the class token's first.

    kept: [batch, number] patches that enter the tower, all without it.
    """
    with torch.autocast(pixels.device.type, dtype, enabled=dtype != torch.float32):
        hidden = tower.embeddings(normalize_pixels(pixels))  # [batch, 197, hidden]
        if kept is not None:
            kept = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], 1)  # the class token stays
            hidden = hidden.gather(1, kept[..., None].expand(-1, -1, hidden.shape[-1]))
        return tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden)).last_hidden_state.float()


def first_patches(wanted: torch.Tensor, number: int) -> torch.Tensor:
    """So many patches of each picture [batch, number], at random; wanted: [batch, patches], those that come first."""
    return (torch.rand(wanted.shape, device=wanted.device) + wanted).topk(number, dim=1).indices


def rate_factor(step: int, done: float, warm_up: int) -> float:
    """Of the learning rate: it rises over the first steps, counted from 1; a cosine leads it down to a hundredth."""
    return min(step / warm_up, 0.01 + 0.99 * (1 + math.cos(math.pi * done)) / 2)


class PatchTextModel(nn.Module):
    """A CLIP vision tower with a projection for its patches and pictures, beside the phrase encoder."""

    def __init__(
        self,
        config: CLIPVisionConfig,
        tokenizer: PreTrainedTokenizerFast,
        dtype: torch.dtype = torch.float32,
        width: int = 192,
    ):
        super().__init__()
        self.dtype = dtype  # of the tower's arithmetic; likenesses are told apart in float32
        self.tower = build_tower(config)
        self.text = PhraseEncoder(tokenizer, width)
        self.patch_projection = nn.Linear(config.hidden_size, width, bias=False)
        self.picture_projection = nn.Linear(config.hidden_size, width, bias=False)
        self.log_scale = nn.Parameter(torch.full((4,), 2.5))  # one temperature a kind of phrase
        self.phrases = {
            language: {
                "names": [world.name(concept, language) for concept in range(len(world.concepts()))],
                "grounds": [words.ground_phrase(ground, language) for ground in range(len(world.GROUND_RGB))],
                "places": list(words.PLACES[language]),
                "counts": list(words.NUMBERS[language]),
            }
            for language in world.LANGUAGES
        }

    def patches(self, pixels: torch.Tensor, kept: torch.Tensor | None = None) -> tuple[torch.Tensor, torch.Tensor]:
        """Unit embeddings of the patches [batch, 196 or kept, width] and of the pictures [batch, width].

        kept: [batch, number] patches that enter the tower, all without it.
        """
        hidden = outputs_of(self.tower, pixels, self.dtype, kept)
        pictures = self.picture_projection(self.tower.post_layernorm(hidden[:, 0]))
        return F.normalize(self.patch_projection(hidden[:, 1:]), dim=-1), F.normalize(pictures, dim=-1)

    def losses(self, batch: dict, language: str, leave_out: bool) -> dict[str, torch.Tensor]:
        kept = None
        if leave_out:
            kept = first_patches(batch["concept"] >= 0, KEPT_PATCHES)
            batch = {**batch, **{key: batch[key].gather(1, kept) for key in ("concept", "place")}}
        patches, pictures = self.patches(batch["pixels"], kept)
        scale = self.log_scale.clamp(max=4.6).exp()
        phrases = {kind: self.text(texts) for kind, texts in self.phrases[language].items()}
        names = torch.cat([phrases["names"], phrases["grounds"]])
        on_thing = batch["concept"] >= 0  # [batch, patches]
        on_ground = ~on_thing & (torch.rand(on_thing.shape, device=on_thing.device) < GROUND_PATCHES / 196)
        things, grounds = patches[on_thing], patches[on_ground]
        ground_names = len(phrases["names"]) + batch["ground"][:, None].expand_as(on_thing)[on_ground]
        counts = batch["count"][:, None].expand_as(on_thing)
        counts = torch.cat([counts[on_thing], counts[on_ground]])
        pairs = scale[3] * pictures @ self.text(batch["caption"]).T  # [batch, batch]
        diagonal = torch.arange(len(pairs), device=pairs.device)
        return {
            "name": F.cross_entropy(scale[0] * things @ names.T, batch["concept"][on_thing]),
            "ground": F.cross_entropy(scale[0] * grounds @ names.T, ground_names),
            "place": F.cross_entropy(scale[1] * things @ phrases["places"].T, batch["place"][on_thing]),
            "count": F.cross_entropy(scale[2] * torch.cat([things, grounds]) @ phrases["counts"].T, counts),
            "contrastive": (F.cross_entropy(pairs, diagonal) + F.cross_entropy(pairs.T, diagonal)) / 2,
        }


LOSS_WEIGHTS = {"name": 1.0, "ground": 0.2, "place": 0.3, "count": 0.2, "contrastive": 0.1}


@torch.no_grad()
def evaluate(model: PatchTextModel, device: torch.device, count: int = 400) -> dict[str, float]:
    """On held-out scenes of one to four things, all concepts alike: fractions of patches and pictures named right."""
    model.eval()
    correct = defaultdict(list)
    phrases = {language: {kind: model.text(texts) for kind, texts in kinds.items()}
               for language, kinds in model.phrases.items()}  # fmt: skip
    for batch in DataLoader(Scenes(1, "held_out", count, 4), batch_size=50):
        batch = to_device(batch, device)
        patches, pictures = model.patches(batch["pixels"])
        on_thing, alone = batch["concept"] >= 0, batch["count"] == 0
        things, truth = patches[on_thing], batch["concept"][on_thing]
        grounds, true_grounds = patches[~on_thing], batch["ground"][:, None].expand_as(on_thing)[~on_thing]
        for language in world.LANGUAGES:
            correct[f"patch_{language}"].append(nearest(things, phrases[language]["names"]) == truth)
        english = phrases["en"]
        correct["common_patch_en"].append(correct["patch_en"][-1][truth < 128])
        correct["place"].append(nearest(things, english["places"]) == batch["place"][on_thing])
        correct["count"].append((patches @ english["counts"].T).mean(1).argmax(-1) == batch["count"])
        correct["ground"].append(nearest(grounds, english["grounds"]) == true_grounds)
        lone_concepts = batch["concept"][alone].amax(-1)
        correct["zero_shot_en"].append(nearest(pictures[alone], english["names"]) == lone_concepts)
    model.train()
    return {key: round(torch.cat(hits).float().mean().nan_to_num().item(), 4) for key, hits in correct.items()}


def nearest(embeddings: torch.Tensor, phrases: torch.Tensor) -> torch.Tensor:
    """For each embedding the index of the phrase that is most like it."""
    return (embeddings @ phrases.T).argmax(-1)


def save_tower(tower: nn.Module, output: Path, record: dict) -> None:
    """As a folder of transformers'; record: how it was made."""
    output.mkdir(parents=True, exist_ok=True)
    # Not the tower's save_pretrained, whose names of tensors and of the architecture follow transformers' version.
    tensors = {name: value.half().cpu().contiguous() for name, value in tower.state_dict().items()}
    save_file(tensors, output / "model.safetensors", {"format": "pt"})
    (output / "model.safetensors").chmod(0o644)  # safetensors leaves 0600
    config = {**tower.config.to_diff_dict(), "architectures": ["CLIPVisionModel"], "dtype": "float16"}
    (output / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    (output / "training.json").write_text(json.dumps(record, indent=1) + "\n")


def build_optimizer(model: nn.Module, learning_rate: float, dtype: torch.dtype) -> Muon:
    """Muon for the matrices of the tower's layers, AdamW for everything else."""
    groups: dict[tuple[bool, float], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        muon, decay = ".layers." in name and parameter.dim() == 2, 0.02 if parameter.dim() > 1 else 0.0
        groups.setdefault((muon, decay), []).append(parameter)
    listed = [
        {"params": parameters, "muon": muon, "weight_decay": decay} for (muon, decay), parameters in groups.items()
    ]
    return Muon(listed, dtype, lr=learning_rate, betas=(0.9, 0.98))


def read_saved(model: PatchTextModel, folder: Path) -> int:
    """A tower that this script has saved, into the model; returns how many pictures it had seen."""
    tower, _ = read_tower(folder)
    model.tower.load_state_dict({name: value.float() for name, value in tower.state_dict().items()})
    return json.loads((folder / "training.json").read_text())["history"][-1]["pictures"]


def train(arguments: argparse.Namespace) -> None:
    keep_few_kernels()
    torch.manual_seed(arguments.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    dtype = choose_dtype("auto", device)
    config = CLIPVisionConfig(
        hidden_size=arguments.hidden_size, num_hidden_layers=arguments.num_hidden_layers,
        num_attention_heads=arguments.hidden_size // 64, intermediate_size=4 * arguments.hidden_size,
        image_size=world.IMAGE_SIZE, patch_size=world.PATCH_SIZE, projection_dim=arguments.hidden_size,
    )  # fmt: skip
    model = PatchTextModel(config, load_tokenizer(), dtype).to(device)
    before = read_saved(model, arguments.go_on_from) if arguments.go_on_from else 0
    if before >= arguments.pictures:
        raise UserError(f"{arguments.go_on_from} has seen {before:,} pictures: --pictures must be more, all together")
    model.tower.config._attn_implementation = "eager"  # faster than torch's kernel in training on a CPU, by a third
    optimizer = build_optimizer(model, arguments.learning_rate, dtype)
    steps = math.ceil(arguments.pictures / arguments.batch_size)
    scenes = Scenes(arguments.seed, "train", steps * arguments.batch_size, arguments.max_things, arguments.zipf)
    left = Subset(scenes, range(before, len(scenes)))
    loader = DataLoader(left, arguments.batch_size, num_workers=arguments.num_workers)
    record = {"arguments": {k: str(v) for k, v in vars(arguments).items()}, "history": []}
    if before:
        record["history"] += json.loads((arguments.go_on_from / "training.json").read_text())["history"]
    start = time.perf_counter()
    first = before // arguments.batch_size + 1
    for step, batch in enumerate(loader, first):
        done, since = step / steps, step - first
        model.tower.requires_grad_(not before or since >= PHRASES_ALONE)
        for group in optimizer.param_groups:
            group["lr"] = arguments.learning_rate * rate_factor(since + 1, done, WARM_UP)
        losses = model.losses(to_device(batch, device), world.LANGUAGES[step % 2], leave_out=done <= 1 - WHOLE)
        loss = sum(LOSS_WEIGHTS[key] * value for key, value in losses.items())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        minutes = (time.perf_counter() - start) / 60
        if step % arguments.log_interval == 0:
            shown = " ".join(f"{key} {value.item():.3f}" for key, value in losses.items())
            speed = (since + 1) * arguments.batch_size / minutes / 60
            print(f"step {step} {minutes:.1f} min {speed:.0f}/s {shown}", flush=True)
        if step % arguments.save_interval == 0 or step == steps:
            scores = evaluate(model, device)
            record["history"].append({"pictures": step * arguments.batch_size, "minutes": round(minutes, 1), **scores})
            print(json.dumps(record["history"][-1]), flush=True)
            save_tower(model.tower, arguments.output, record)


def main(arguments: list[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("--output", type=Path, default=ROOT / SHIPPED_TOWER)
    parser.add_argument("--go_on_from", type=Path, help="folder of a tower that a run of this script has left")
    parser.add_argument("--pictures", type=int, default=320000, help="scenes, each seen once")
    parser.add_argument("--batch_size", type=int, default=64, help="pictures")
    parser.add_argument("--learning_rate", type=float, default=2e-3)
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_hidden_layers", type=int, default=4)
    parser.add_argument("--max_things", type=int, default=9, help="things a picture, at most")
    parser.add_argument("--zipf", type=float, default=0.8, help="how much oftener everyday names are shown; 0: alike")
    parser.add_argument("--num_workers", type=int, default=1, help="processes that draw")
    parser.add_argument("--log_interval", type=int, default=50, help="steps")
    parser.add_argument("--save_interval", type=int, default=500, help="steps between evaluations, each of which saves")
    parser.add_argument("--seed", type=int, default=42)
    train(parser.parse_args(arguments))


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(f"train_tower: {error}") from error
