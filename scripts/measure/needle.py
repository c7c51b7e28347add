"""Whether a model finds a fact in a long text, or in a long row of pictures, at any depth; and how well it reads there.

    python scripts/measure/needle.py --weight out/llm_192.safetensors --lengths 1024 4096 16384 --json out/needle.json
    python scripts/measure/needle.py --weight out/llm_192.safetensors --rope '{"rope_type": "yarn", "factor": 4.0,
        "original_max_position_embeddings": 4096}'
    python scripts/measure/needle.py --weight out/sft_vlm_192.safetensors --lengths --pictures 10 40

Each held-out text hides ten facts, one at each tenth of the depth, and each is asked alone: exact match of the whole
answer. A text is read once, its ten questions share the beginning. Perplexity: of the same texts, in buckets of
positions. Everything is made from --seed (dataset/needles.py); nothing of it is in a training file.
"""

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
from torch.nn import functional as F

from dataset import emoji_world as world
from dataset.exam.figures import wilson_interval
from dataset.needles import MOST_PICTURES, haystack, picture_row, word_counter
from model.attention import RotaryEmbedding
from model.command_line import CommandLine
from model.config import MiniMindConfig
from model.device import choose_device, choose_dtype
from model.inference.answerer import Answerer, Options, add_weight_flags
from model.messages import UserError
from model.model_minimind import MiniMindForCausalLM
from model.processing import VLMProcessor
from model.progress import progress_over
from model.tokenizer_files import read_tokenizer
from model.weights import load_model
from scripts.build_needles import TENTHS
from scripts.demo.weights import weights_or_newest
from scripts.measure.figures import write_figures

ANSWER = Options(max_new_tokens=32)
BUCKET = 512  # positions of the first bucket; each further one ends at twice the position
CHUNK = 1024  # positions whose logits are there at once


@dataclass(frozen=True)
class Found:
    """The exact matches at one length: right[tenth] of `asked` each."""

    right: tuple[int, ...]
    asked: int

    def record(self) -> dict:
        lowest = min(self.right)
        return {
            "by_tenth": [round(right / self.asked, 4) for right in self.right], "asked_each": self.asked,
            "lowest": round(lowest / self.asked, 4), "interval_of_lowest": wilson_interval(lowest, self.asked),
            "all": round(sum(self.right) / (self.asked * len(self.right)), 4),
        }  # fmt: skip


def find_facts(answerer: Answerer, length: int, texts: int, seed: int) -> Found:
    """Raises PromptTooLong where the model reads less than a text with its question."""
    count_tokens, right = word_counter(answerer.processor.encode), [0] * len(TENTHS)
    answerer.reader.prefixes.limit = max(answerer.reader.prefixes.limit, 2 * length + 1024)  # a text, and its branches
    for index in progress_over(range(texts), f"texts of {length} tokens", "text"):
        found = haystack((seed, "held_out", index), length, TENTHS, count_tokens)
        for tenth, fact in enumerate(found.facts):
            question, truth = found.talk([fact])
            right[tenth] += answerer.stream(answerer.prompt([question]), ANSWER).text.strip() == truth["content"]
    return Found(tuple(right), texts)


def find_pictures(answerer: Answerer, count: int, rows: int, seed: int, concepts: int) -> Found:
    """The same of rows of so many pictures. A tenth of fewer than ten pictures is that of the picture at its middle."""
    right = [0] * len(TENTHS)
    tokens = count * (answerer.processor.image_tokens + 16)
    answerer.reader.prefixes.limit = max(answerer.reader.prefixes.limit, 2 * tokens)
    for index in progress_over(range(rows), f"rows of {count} pictures", "row"):
        row, rng = picture_row((seed, "held_out", index), count, concepts), Random(f"{seed}:{index}")
        drawn = [world.render(scene)[0] for scene in row.scenes]
        for tenth, depth in enumerate(TENTHS):
            question, truth = row.talk([1 + int(depth * count)], rng)
            answer = answerer.stream(answerer.prompt([question], drawn), ANSWER)
            right[tenth] += answer.text.strip() == truth["content"]
    return Found(tuple(right), rows)


@torch.inference_mode()
def perplexity_by_position(model: MiniMindForCausalLM, rows: Sequence[torch.Tensor]) -> dict[str, float]:
    """Of texts [length] each: e to the mean loss of the tokens in each bucket of positions, "512-1024" and so on."""
    sums: dict[str, list[float]] = {}
    for ids in rows:
        inputs = ids[None].to(model.model.embed_tokens.weight.device)
        hidden, _ = model.model(model.model.embed_tokens(inputs), None, None, None)  # [1, length, hidden]
        for start in range(0, len(ids) - 1, CHUNK):
            targets = inputs[0, start + 1 : start + 1 + CHUNK]
            logits = model.lm_head(hidden[0, start : start + len(targets)]).float()
            losses = F.cross_entropy(logits, targets, reduction="none")
            for position, loss in enumerate(losses.tolist(), start + 1):
                sums.setdefault(bucket_of(position), []).append(loss)
    return {bucket: round(math.exp(sum(losses) / len(losses)), 2) for bucket, losses in sums.items()}


def bucket_of(position: int) -> str:
    end = BUCKET
    while position >= end:
        end *= 2
    return f"{end // 2 if end > BUCKET else 0}-{end}"


def texts_of(processor: VLMProcessor, length: int, texts: int, seed: int) -> list[torch.Tensor]:
    """Token ids of the texts that find_facts asks about."""
    count_tokens = word_counter(processor.encode)
    found = [haystack((seed, "held_out", index), length, TENTHS, count_tokens).text for index in range(texts)]
    return [torch.from_numpy(processor.render_text(text).input_ids) for text in found]


def with_rope(model: MiniMindForCausalLM, changes: dict) -> None:
    """Other rope_parameters for weights that are there, as if their config had them. Raises UserError as check_rope."""
    settings = {**model.config.rope_parameters, **changes}
    MiniMindConfig(rope_parameters=settings)  # refuses what cannot be
    model.config.rope_parameters = settings
    model.model.rotary = RotaryEmbedding(model.config)


def measure(options: argparse.Namespace) -> dict:
    model = load_model(options.weight, options.vision_model, options.num_attention_heads)
    if options.rope:
        with_rope(model, options.rope)
    processor = VLMProcessor.for_config(model.config, read_tokenizer(options.weight))
    result = {"weight": str(options.weight), "rope_parameters": model.config.rope_parameters, "seed": options.seed}
    if options.perplexity_texts and options.lengths:
        rows = texts_of(processor, max(options.lengths), options.perplexity_texts, options.seed)
        result["perplexity"] = perplexity_by_position(model, rows)
    device = choose_device(options.device)
    answerer = Answerer(model, device, choose_dtype(options.dtype, device), processor)
    result["tokens"] = {
        length: find_facts(answerer, length, options.texts, options.seed).record() for length in options.lengths
    }
    result["pictures"] = {
        count: find_pictures(answerer, count, options.texts, options.seed, options.concepts).record()
        for count in options.pictures
    }
    return result


def table(result: dict) -> str:
    """By length a row; by tenth of the depth a column."""
    lines = [f"{result['weight']}, {result['rope_parameters']}"]
    for what in ("tokens", "pictures"):
        if result[what]:
            lines.append(f"{what:>9}" + "".join(f"{f'{depth:.0%}':>6}" for depth in TENTHS) + f"{'all':>7}{'each':>6}")
        for size, record in result[what].items():
            cells = "".join(f"{share:>6.2f}" for share in record["by_tenth"])
            lines.append(f"{size:>9}{cells}{record['all']:>7.3f}{record['asked_each']:>6}")
    if "perplexity" in result:
        lines.append("perplexity by position")
        lines += [f"{bucket:>14}{value:>10.2f}" for bucket, value in result["perplexity"].items()]
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    parser = CommandLine(__doc__)
    add_weight_flags(parser)
    parser.add_argument("--lengths", type=int, nargs="*", default=[1024, 4096, 16384], help="tokens of the texts")
    parser.add_argument("--pictures", type=int, nargs="*", default=[], help="pictures of the rows, up to 40")
    parser.add_argument("--texts", type=int, default=20, help="texts, or rows, of each length: questions at each tenth")
    parser.add_argument("--perplexity_texts", type=int, default=4, help="of the longest length; 0: no perplexity")
    parser.add_argument("--concepts", type=int, default=128, help="things in the pictures: Emoji World's first so many")
    parser.add_argument("--rope", type=json.loads, help="JSON: rope_parameters to ask with, over the weights' own")
    parser.add_argument("--seed", type=int, default=7)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if min([240, *options.lengths]) < 240 or not set(options.pictures) <= set(range(1, MOST_PICTURES + 1)):
        parser.error(f"--lengths of 240 tokens at least, which ten facts need; --pictures 1 to {MOST_PICTURES}")
    if options.texts < 1:
        parser.error("--texts must be at least 1")
    return options


def main() -> None:
    options = parse()
    try:
        options.weight = weights_or_newest(options.weight)
        result = measure(options)
    except UserError as error:
        raise SystemExit(f"needle: {error}") from error
    print(table(result))
    write_figures(options.json, result)


if __name__ == "__main__":
    main()
