"""The proof of a conversion: load the folder as a stranger would, in a process of its own, and answer what we answered.

    python scripts/export/proof.py FOLDER REFERENCE [VISION_MODEL] [--no_training]

scripts/convert_vlm.py starts it. REFERENCE holds pictures, messages and the logits that the project's own model gave
(`write_reference`); result.json is written there. A folder that transformers reads is loaded with this project's own
packages locked away, so that what ships must be enough. Then it is trained for three steps: others will do so.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast, ProcessorMixin

from model.command_line import CommandLine
from model.messages import UserError
from scripts.export.onnx_model import OnnxModel
from scripts.export.training_proof import Batch, complaint, train_a_little, with_answer

MAX_NEW_TOKENS = 16
TOLERANCE = 1e-4  # of fp32 logits
PICTURES = {"wide.png": (320, 200), "tall.png": (97, 131), "square.png": (224, 224)}  # width, height
Read = Callable[[list[dict]], dict]  # messages to the inputs of a model
Loaded = tuple[torch.nn.Module, PreTrainedTokenizerFast, Read]


def prompts(sees: bool, folder: Path) -> list[list[dict]]:
    """Conversations: three with pictures of the folder and one without, or three of text for a bare decoder."""

    def picture(name: str) -> dict:
        return {"type": "image", "path": str(folder / name)}

    def text(words: str) -> dict:
        return {"type": "text", "text": words}

    contents = [[text("Tell me about the sea.")], [text("@@@ 你好")], [text("What is two and two?")]]
    if sees:
        ending = text(": which is brighter, at me@here.org?")
        contents = [
            [picture("wide.png"), text("\nWhat is in the picture?")],
            [text("Compare "), picture("tall.png"), text(" with "), picture("square.png"), ending],
            [picture("square.png"), text("\n图里有什么？")],
            contents[0],
        ]
    return [[{"role": "user", "content": content}] for content in contents]


def draw_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Coloured blocks and noise: edges and gradients that another way of scaling would not hide."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
    noise = random.integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8))


@torch.no_grad()
def answers(
    model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, read: Read, conversations: list[list[dict]]
) -> tuple[list[torch.Tensor], list[str], list[Batch]]:
    """For each prompt the logits [tokens, vocabulary], the greedy answer, and both as something to learn."""
    logits, texts, talks = [], [], []
    for messages in conversations:
        inputs = read(messages)
        logits.append(model(**inputs).logits[0])
        output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
        texts.append(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
        talks.append(with_answer(inputs, output))
    return logits, texts, talks


def write_reference(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path, sees: bool) -> None:
    """What the project's own model answers, and the pictures it saw, read back from their files."""
    for seed, (name, size) in enumerate(PICTURES.items()):
        draw_picture(size, seed).save(folder / name)
    logits, texts, _ = answers(model, tokenizer, own_reader(model, tokenizer), prompts(sees, folder))
    save_file({str(number): value.contiguous() for number, value in enumerate(logits)}, folder / "logits.safetensors")
    facts = {"sees": sees, "texts": texts, "heads": model.config.num_attention_heads}
    (folder / "reference.json").write_text(json.dumps(facts))


def own_reader(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast) -> Read:
    from model.pictures import open_picture
    from model.processing import VLMProcessor

    processor = VLMProcessor.for_config(model.config, tokenizer)

    def read(messages: list[dict]) -> dict:
        pictures = [open_picture(part["path"]) for part in messages[0]["content"] if part["type"] == "image"]
        return processor.prompts([(messages, pictures)])

    return read


def load_stranger(folder: Path, sees: bool, vision_model: str | None) -> Loaded:
    """By nothing but transformers, or onnxruntime, and what is in the folder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    if (folder / "onnx").is_dir():
        model = OnnxModel(folder)
        return model, model.processor.tokenizer, reader(model.processor)
    own_code = "auto_map" in json.loads((folder / "config.json").read_text())
    if not own_code and (found := sorted(path.name for path in folder.glob("*.py"))):
        raise SystemExit(f"{folder} is to need no code, but holds {found}")
    model_class, processor_class = AutoModelForCausalLM, AutoTokenizer
    if sees:
        model_class, processor_class = AutoModelForImageTextToText, AutoProcessor
    tower = {"vision_model": vision_model} if vision_model else {}
    model = model_class.from_pretrained(
        folder, dtype=torch.float32, local_files_only=True, trust_remote_code=own_code, **tower
    )
    processor = processor_class.from_pretrained(folder, local_files_only=True, trust_remote_code=own_code)
    return model.eval(), getattr(processor, "tokenizer", processor), reader(processor)


def reader(processor: ProcessorMixin | PreTrainedTokenizerFast) -> Read:
    def read(messages: list[dict]) -> dict:
        return processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        )

    return read


def load_minimind(path: Path, heads: int, vision_model: str | None) -> Loaded:
    """A .pth, which only this project reads."""
    from model.tokenizer_files import read_tokenizer
    from model.weights import load_model

    model, tokenizer = load_model(path, vision_model, heads), read_tokenizer(path)
    return model, tokenizer, own_reader(model, tokenizer)


def compare(folder: Path, reference: Path, vision_model: str | None, trains: bool = True) -> dict:
    """The largest difference of a logit, every answer beside ours, and what three steps of training did.

    trains: whether that is tried: it takes four times the memory of the weights.
    """
    facts = json.loads((reference / "reference.json").read_text())
    if pth := next(folder.glob("*.pth"), None):
        loaded = load_minimind(pth, facts["heads"], vision_model)
    else:
        loaded = load_stranger(folder, facts["sees"], vision_model)
    logits, texts, talks = answers(*loaded, prompts(facts["sees"], reference))
    expected, largest = load_file(reference / "logits.safetensors"), 0.0
    for number, theirs in enumerate(logits):
        ours = expected[str(number)]
        if len(theirs) != len(ours):
            raise SystemExit(f"prompt {number} is {len(theirs)} tokens there, {len(ours)} here")
        largest = max(largest, float((theirs[:, : ours.shape[1]] - ours).abs().max()))  # llava's vocabulary is larger
    found = {"largest_logit_difference": largest, "texts": texts, "expected": facts["texts"]}
    return {**found, "trained": train_a_little(loaded[0], talks)} if trains else found


def prove(
    folder: Path,
    reference: Path,
    vision_model: str | None = None,
    trains: bool = True,
    tolerance: float = TOLERANCE,
) -> dict:
    """Run this file in a fresh process; returns what it found: the sentence `proved`, the largest difference, and what
    three steps of training did.

    Raises:
        UserError: it does not load, differs by more than `tolerance`, answers otherwise, or cannot be trained on.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(reference / "modules"), "HF_HUB_OFFLINE": "1"}
    further = [*filter(None, [vision_model]), *([] if trains else ["--no_training"])]
    command = [sys.executable, __file__, folder.resolve(), reference.resolve(), *further]
    process = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise UserError(f"the converted folder does not load in a fresh process:\n{process.stderr[-2000:]}")
    result = json.loads((reference / "result.json").read_text())
    largest = result["largest_logit_difference"]
    if not largest <= tolerance:
        raise UserError(f"the converted model's logits differ by {largest:.2g}, more than {tolerance}")
    if result["texts"] != result["expected"]:
        raise UserError(f"the converted model answers {result['texts']} and not {result['expected']}")
    if trains and (wrong := complaint(result["trained"])):
        raise UserError(f"the converted model cannot be trained on: {wrong}")
    proved = f"largest difference of a logit, from a fresh process: {largest:.2g}; the same greedy text"
    return {"proved": proved, **{n: result[n] for n in ("largest_logit_difference", "trained") if n in result}}


if __name__ == "__main__":
    parser = CommandLine(__doc__)
    parser.add_argument("folder", type=Path, help="the conversion")
    parser.add_argument("reference", type=Path, help="folder that write_reference has filled")
    parser.add_argument("vision_model", nargs="?", help="folder of the tower, where the conversion leaves it out")
    parser.add_argument("--no_training", action="store_true", help="try no steps of training")
    options = parser.parse_args()
    for path in (options.folder, options.reference / "reference.json"):
        if not path.exists():
            parser.error(f"{path} does not exist")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if not any(options.folder.glob("*.pth")):
        for package in ("model", "scripts", "dataset", "trainer"):
            sys.modules[package] = None  # importing them raises ImportError
    outcome = compare(options.folder, options.reference, options.vision_model, not options.no_training)
    (options.reference / "result.json").write_text(json.dumps(outcome))
