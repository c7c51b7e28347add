"""The proof of a conversion: load the folder as a stranger would, in a process of its own, and answer what we answered.

    python scripts/export/proof.py FOLDER REFERENCE [VISION_MODEL]

scripts/convert_vlm.py starts it. REFERENCE holds pictures, messages and the logits that the project's own model gave
(`write_reference`); result.json is written there. A folder that transformers reads is loaded with this project's own
packages locked away, so that what ships must be enough.
"""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import PreTrainedTokenizerFast

from model.command_line import CommandLine
from model.messages import UserError

MAX_NEW_TOKENS = 16
TOLERANCE = 1e-4  # of fp32 logits
PICTURES = {"wide.png": (320, 200), "tall.png": (97, 131), "square.png": (224, 224)}  # width, height
SEEING = [
    [{"type": "image", "path": "wide.png"}, {"type": "text", "text": "\nWhat is in the picture?"}],
    [{"type": "text", "text": "Compare "}, {"type": "image", "path": "tall.png"}, {"type": "text", "text": " with "},
     {"type": "image", "path": "square.png"}, {"type": "text", "text": ": which is brighter, at me@here.org?"}],
    [{"type": "image", "path": "square.png"}, {"type": "text", "text": "\n图里有什么？"}],
]  # fmt: skip
TEXTS = ["Tell me about the sea.", "@@@ 你好", "What is two and two?"]


def prompts(sees: bool) -> list[list[dict]]:
    """Conversations: three with pictures and one without, or three of text for a bare decoder."""
    contents = (
        [*SEEING, [{"type": "text", "text": TEXTS[0]}]] if sees else [[{"type": "text", "text": t}] for t in TEXTS]
    )
    return copy.deepcopy([[{"role": "user", "content": content}] for content in contents])  # callers fill in paths


def draw_picture(size: tuple[int, int], seed: int) -> Image.Image:
    """Coloured blocks and noise: edges and gradients that another way of scaling would not hide."""
    random = np.random.default_rng(seed)
    coarse = Image.fromarray(random.integers(0, 255, (5, 7, 3), dtype=np.uint8)).resize(size, Image.Resampling.NEAREST)
    noise = random.integers(-30, 30, (size[1], size[0], 3))
    return Image.fromarray(np.clip(np.asarray(coarse).astype(int) + noise, 0, 255).astype(np.uint8))


@torch.no_grad()
def write_reference(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """What the project's own model answers, and the pictures it saw, read back from their files."""
    from model.processing import VLMProcessor, open_picture

    sees = hasattr(model, "vision_encoder")
    for seed, (name, size) in enumerate(PICTURES.items()):
        draw_picture(size, seed).save(folder / name)
    processor, logits, texts = VLMProcessor.for_config(model.config, tokenizer), {}, []
    for number, messages in enumerate(prompts(sees)):
        names = [part["path"] for part in messages[0]["content"] if part["type"] == "image"]
        inputs = processor.prompts([(messages, [open_picture(folder / name) for name in names])])
        if not sees:
            del inputs["image_mask"]
        logits[str(number)] = model(**inputs).logits[0].contiguous()
        texts.append(answer(model, tokenizer, inputs))
    save_file(logits, folder / "logits.safetensors")
    (folder / "reference.json").write_text(
        json.dumps({"sees": sees, "texts": texts, "heads": model.config.num_attention_heads})
    )


def answer(model: torch.nn.Module, tokenizer: PreTrainedTokenizerFast, inputs: dict) -> str:
    output = model.generate(**inputs, max_new_tokens=MAX_NEW_TOKENS, do_sample=False)
    return tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)


def load_stranger(folder: Path, sees: bool, vision_model: str | None) -> tuple:
    """Model, tokenizer, and messages -> inputs, by nothing but transformers and what is in the folder."""
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

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
    return (
        model.eval(),
        getattr(processor, "tokenizer", processor),
        lambda messages: processor.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=True, return_tensors="pt"
        ),
    )


def load_minimind(path: Path, sees: bool, vision_model: str | None, heads: int) -> tuple:
    """The same of a .pth, which only this project reads."""
    from model.processing import VLMProcessor, load_tokenizer, open_picture
    from model.weights import load_model

    model, tokenizer = load_model(path, vision_model, heads), load_tokenizer(path.parent)
    processor = VLMProcessor.for_config(model.config, tokenizer)

    def read(messages: list[dict]) -> dict:
        pictures = [open_picture(part["path"]) for part in messages[0]["content"] if part["type"] == "image"]
        inputs = processor.prompts([(messages, pictures)])
        return inputs if sees else {name: value for name, value in inputs.items() if name != "image_mask"}

    return model, tokenizer, read


@torch.no_grad()
def compare(folder: Path, reference: Path, vision_model: str | None) -> dict:
    """The largest difference of a logit, and every answer beside ours."""
    expected, facts = (
        load_file(reference / "logits.safetensors"),
        json.loads((reference / "reference.json").read_text()),
    )
    pth = next(folder.glob("*.pth"), None)
    if pth:
        model, tokenizer, read = load_minimind(pth, facts["sees"], vision_model, facts["heads"])
    else:
        model, tokenizer, read = load_stranger(folder, facts["sees"], vision_model)
    largest, texts = 0.0, []
    for number, messages in enumerate(prompts(facts["sees"])):
        for part in messages[0]["content"]:
            if part["type"] == "image":
                part |= {"path": str(reference / part["path"])}
        inputs, ours = read(messages), expected[str(number)]
        theirs = model(**inputs).logits[0]
        if len(theirs) != len(ours):
            raise SystemExit(f"prompt {number} is {len(theirs)} tokens there, {len(ours)} here")
        largest = max(largest, float((theirs[:, : ours.shape[1]] - ours).abs().max()))
        texts.append(answer(model, tokenizer, inputs))
    return {"largest_logit_difference": largest, "texts": texts, "expected": facts["texts"]}


def prove(folder: Path, reference: Path, vision_model: str | None = None) -> float:
    """Run this file in a fresh process; returns the largest difference.

    Raises:
        UserError: it does not load, differs by more than TOLERANCE, or answers otherwise.
    """
    environment = {**os.environ, "HF_MODULES_CACHE": str(reference / "modules"), "HF_HUB_OFFLINE": "1"}
    command = [
        sys.executable,
        __file__,
        folder.resolve(),
        reference.resolve(),
        *([vision_model] if vision_model else []),
    ]
    process = subprocess.run(list(map(str, command)), env=environment, capture_output=True, text=True, check=False)
    if process.returncode:
        raise UserError(f"the converted folder does not load in a fresh process:\n{process.stderr[-2000:]}")
    result = json.loads((reference / "result.json").read_text())
    largest = result["largest_logit_difference"]
    if not largest <= TOLERANCE:
        raise UserError(f"the converted model's logits differ by {largest:.2g}, more than {TOLERANCE}")
    if result["texts"] != result["expected"]:
        raise UserError(f"the converted model answers {result['texts']} and not {result['expected']}")
    return largest


if __name__ == "__main__":
    parser = CommandLine(__doc__)
    parser.add_argument("folder", type=Path, help="the conversion")
    parser.add_argument("reference", type=Path, help="folder that write_reference has filled")
    parser.add_argument("vision_model", nargs="?", help="folder of the tower, where the conversion leaves it out")
    options = parser.parse_args()
    for path in (options.folder, options.reference / "reference.json"):
        if not path.exists():
            parser.error(f"{path} does not exist")
    torch.set_num_threads(min(2, torch.get_num_threads()))
    if not any(options.folder.glob("*.pth")):
        for package in ("model", "scripts", "dataset", "trainer"):
            sys.modules[package] = None  # importing them raises ImportError
    outcome = compare(options.folder, options.reference, options.vision_model)
    (options.reference / "result.json").write_text(json.dumps(outcome))
