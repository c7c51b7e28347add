"""The processor that a training run would have: whose words count, and how many tokens a picture takes."""

import argparse
from pathlib import Path

from model.config import VLMConfig
from model.processing import VLMProcessor
from model.tokenizer_files import picture_token, read_tokenizer
from model.tower_folder import tower_sizes
from model.weights import read_sizes


def add_model_flags(parser: argparse.ArgumentParser) -> None:
    """The flags that processor_like reads."""
    parser.add_argument("--from_weight", type=Path, help="the weights that training will start from, a file, a base's "
                        "folder or GGUF: its words are what counts; the shipped tokenizer without")  # fmt: skip
    parser.add_argument("--vision_model", help="folder with the tower's config.json; without it the tower of "
                        "--from_weight, or CLIP-ViT-B/16's 196 tokens a picture")  # fmt: skip
    parser.add_argument("--image_tokens", type=int, default=0, help="that a picture takes, as in training; 0: those of "
                        "--from_weight, or one a patch")  # fmt: skip
    parser.add_argument("--tiles", type=int, default=0, help="into which a picture is cut at most, as in training; 0: "
                        "those of --from_weight, or none")  # fmt: skip


def processor_like(options: argparse.Namespace) -> VLMProcessor:
    """Raises UserError where the weights or the tower cannot be read."""
    tokenizer = read_tokenizer(options.from_weight)
    known = read_sizes(options.from_weight) if options.from_weight else {}
    if "vision_config" in known and not options.vision_model and not options.image_tokens:
        known["tiles"] = options.tiles or known.get("tiles", 0)
        return VLMProcessor.for_config(VLMConfig.from_dict(known), tokenizer)
    tower = tower_sizes(options.vision_model) if options.vision_model else None
    vocab_size = known.get("vocab_size", len(tokenizer))
    config = VLMConfig(
        vision_config=tower, image_tokens=options.image_tokens or None, vocab_size=vocab_size,
        image_token_id=picture_token(tokenizer, vocab_size), tiles=options.tiles,
    )  # fmt: skip
    return VLMProcessor.for_config(config, tokenizer)
