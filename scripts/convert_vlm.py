"""Convert a trained model for others to use, and prove the result before it is put in place.

    python scripts/convert_vlm.py --weight out/sft_vlm_512.safetensors --to llava --output out/llava

--to    transformers   MiniMindVLM with its code, processor and tower; loads with trust_remote_code=True
        llava          a stock LlavaForConditionalGeneration, for every engine that knows it; no code
        llm            the decoder alone, a stock Llama, Qwen2 or Qwen3, dense or MoE
        minimind       a .pth as MiniMind2-V writes it
        minimind3v     a .pth as MiniMind-3V writes it
        gguf           two files for llama.cpp, Ollama and LM Studio: docs/gguf.md
        onnx           ONNX files for browsers and phones, as transformers.js and onnxruntime read them: docs/onnx.md

What cannot be held is refused by name, with the format that takes it; docs/deploy.md has the table.
MiniMind's own files come in too: --weight sft_vlm_512.pth --vision_model clip-vit-base-patch16 --tokenizer DIR, or
--weight sft_vlm_768.pth --vision_model siglip2-base-p32-256-ve, or a folder of theirs.
A `llava` folder that others have trained on comes home: --from llava --weight FOLDER --output out/home.safetensors; or
goes on, with --to and a folder to write.
Every conversion is loaded again in a fresh process and must give the same logits (1e-4) and the same greedy text, and
three steps of AdamW must make none of its answers less likely; only then the folder appears, whole. An older conversion
at --output is replaced, anything else there is refused.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path

import torch
import transformers
from transformers import PreTrainedTokenizerFast

from model.command_line import CommandLine
from model.config import MiniMindConfig
from model.files import file_sha256, find_folder
from model.messages import UserError
from model.tokenizer_files import TOKENIZER, TOKENIZER_FILE, read_tokenizer, special_ids, tokenizer_text
from model.weights import load_model, read_facts, save_weights, weight_file
from scripts.export.card import model_card
from scripts.export.folder import claim, publish, seal
from scripts.export.formats import ENGINES, FORMATS, Exported, Source, portable_name
from scripts.export.llava_home import read_llava
from scripts.export.proof import prove, write_reference
from scripts.hub.clients import HubError
from scripts.upload import push_folder

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTIZED = ("q8_0",)  # only GGUF files hold them


def convert(options: argparse.Namespace) -> dict:
    """Convert as the options of `parse_arguments` say; returns the manifest.

    Raises:
        UserError: what the user can mend, and a proof that failed; nothing at --output has changed then.
    """
    source, facts, score = read_source(options), read_facts(options.weight), read_score(options.score)
    output = options.output.resolve()
    temporary = claim(output)
    try:
        exported = FORMATS[options.to](source, temporary)
        card = model_card(source, exported, facts, score, options.license)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        manifest = {
            "format": options.to,
            "weight": {"name": options.weight.name, "sha256": file_sha256(weight_file(options.weight))},
            "vision_tower": tower_identity(source, exported),
            **proof(source, exported, temporary, exported.trains and not options.no_training_proof),
            "versions": {"torch": torch.__version__, "transformers": transformers.__version__},
        }
        seal(temporary, manifest)
        publish(temporary, output)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return manifest


def come_home(options: argparse.Namespace) -> dict:
    """A stock folder as a weights file; returns what the proof found.

    Raises:
        UserError: the folder computes something else than our model, or --output cannot be written.
    """
    if options.output.suffix != ".safetensors":
        raise UserError(f"--output {options.output}: a weights file ends in .safetensors; with --to it is a folder")
    source = read_source(options)
    with tempfile.TemporaryDirectory() as reference:
        write_reference(source.model, source.tokenizer, Path(reference), sees=True)
        found = prove(options.weight, Path(reference), trains=False)
    save_weights(source.model, options.output, {TOKENIZER: tokenizer_text(source.tokenizer)})
    return found


def read_source(options: argparse.Namespace) -> Source:
    """The model and tokenizer that the options name."""
    quantized = options.dtype if options.dtype in QUANTIZED else None
    settings = DTYPES.get(options.dtype, torch.float32), not options.no_vision, options.engine, quantized
    if options.come_from:
        model, tokenizer = read_llava(options.weight, options.vision_model)
        return Source(model, tokenizer, options.weight.name, *settings)
    tokenizer = own_tokenizer(options.tokenizer)
    model = load_model(options.weight, options.vision_model, options.num_attention_heads, tokenizer)
    tokenizer = tokenizer or read_tokenizer(options.weight)
    check_tokenizer(tokenizer, model.config, options.tokenizer)
    return Source(model, tokenizer, options.weight.stem, *settings)


def proof(source: Source, exported: Exported, folder: Path, trains: bool) -> dict:
    """Compare the folder with the model in memory, by the engine that it is for; see scripts/export/proof.py."""
    tower = None
    if exported.sees and not exported.has_tower:
        tower = str(find_folder(source.model.config.vision_source).resolve())
    with tempfile.TemporaryDirectory() as reference:
        exported.refer(source.model, source.tokenizer, Path(reference), exported.sees)
        return exported.prove(folder, Path(reference), tower, trains)


def tower_identity(source: Source, exported: Exported) -> dict | None:
    """What the manifest says of the tower; None for a decoder without eyes."""
    if not exported.sees:
        return None
    config = source.model.config
    return {"name": portable_name(config), "sha256": config.vision_sha256, "included": exported.has_tower}


def read_score(path: Path | None) -> dict | None:
    """What scripts/score.py --json wrote."""
    if path is None:
        return None
    try:
        score = json.loads(path.read_text(encoding="utf-8"))
        if not {"exact_match", "by_kind"} <= set(score):
            raise ValueError("exact_match or by_kind is missing")
    except (OSError, ValueError, TypeError) as error:
        raise UserError(f"--score {path} is no report of scripts/score.py ({error})") from error
    return score


def own_tokenizer(folder: Path | None) -> PreTrainedTokenizerFast | None:
    """That of --tokenizer, for weights that come without one."""
    if folder is None:
        return None
    if not (folder / TOKENIZER_FILE).is_file():
        raise UserError(f"--tokenizer {folder} holds no {TOKENIZER_FILE}: name MiniMind's `model` folder")
    return read_tokenizer(folder)


def check_tokenizer(tokenizer: PreTrainedTokenizerFast, config: MiniMindConfig, folder: Path | None) -> None:
    """Raises UserError where its special tokens do not stand where the model knows them."""
    found = special_ids(tokenizer)
    wrong = [f"its {name} is {found[name]} and the model's {ids}" for name in found
             if found[name] not in _listed(ids := getattr(config, name))]  # fmt: skip
    if len(tokenizer) > config.vocab_size:
        wrong.append(f"it has {len(tokenizer)} tokens and the model {config.vocab_size}")
    if wrong:
        raise UserError(f"--tokenizer {folder or 'model'} does not fit these weights: {'; '.join(wrong)}")


def _listed(ids: int | list[int] | None) -> list[int | None]:
    return ids if isinstance(ids, list) else [ids]


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = CommandLine(__doc__)
    parser.add_argument("--weight", type=Path, required=True, help=".safetensors of a stage, or MiniMind's .pth")
    parser.add_argument("--from", dest="come_from", choices=["llava"], help="--weight is a stock Llava folder")
    parser.add_argument("--to", choices=FORMATS, help="left out with --from: a weights file")
    parser.add_argument(
        "--output",
        type=Path,
        required=True,
        help="folder to make, or an older conversion to replace; without --to a .safetensors",
    )
    parser.add_argument(
        "--dtype",
        choices=[*DTYPES, *QUANTIZED],
        default="float32",
        help="of the tensors; a .pth is always float16; q8_0 (8 bits a weight) goes with --to gguf",
    )
    parser.add_argument("--no_vision", action="store_true", help="transformers: leave the tower out, name it only")
    parser.add_argument(
        "--engine",
        choices=ENGINES,
        default="transformers",
        help="llava, of a linear projector: vllm and mlx know no other activation than GELU, and get it scaled, for "
        "inference only; every other folder is the same for all",
    )
    parser.add_argument(
        "--no_training_proof", action="store_true", help="of a large model: three steps take 4 times its memory"
    )
    parser.add_argument("--vision_model", help="folder of the vision tower; by default the one trained with")
    parser.add_argument(
        "--tokenizer", type=Path, help="folder of a tokenizer; by default the one that belongs to the weights"
    )
    parser.add_argument("--num_attention_heads", type=int, default=8, help="of a .pth, which does not say")
    parser.add_argument("--score", type=Path, help="score.json of scripts/score.py, for the model card")
    parser.add_argument("--license", default="apache-2.0", help="for the model card")
    parser.add_argument("--push_to_hub", metavar="OWNER/NAME", help="then send the folder to Hugging Face")
    options = parser.parse_args(arguments)
    if not (options.to or options.come_from):
        parser.error("--to says what to make: " + ", ".join(FORMATS))
    if options.dtype in QUANTIZED and options.to != "gguf":
        parser.error(f"--dtype {options.dtype} goes with --to gguf: elsewhere take {', '.join(DTYPES)}")
    return options


def main() -> None:
    options = parse_arguments()
    try:
        if not options.to:
            found = come_home(options)
            print(f"{found['proved']}\n{options.output}: home again")
            return
        manifest = convert(options)
        address = push_folder(options.output, options.push_to_hub) if options.push_to_hub else None
    except (UserError, OSError, HubError) as error:
        raise SystemExit(f"convert_vlm: {error}") from error
    print(f"{manifest['proved']}\n{options.output}: {manifest['format']}")
    if address:
        print(f"sent: {address}")


if __name__ == "__main__":
    main()
