"""Ask stock folders through vLLM on a CPU, in a Python that has it (requirements/vllm.txt) and nothing of ours.

    .venv-vllm/bin/python scripts/measure/ask_vllm.py ASKED ANSWERS

ASKED and ANSWERS are what scripts/measure/apart.py writes and reads.
"""

import importlib.util
import json
import os
import sys
from pathlib import Path

import torch

QUIET = {
    "VLLM_CPU_KVCACHE_SPACE": "1",  # GB
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",  # one process, which ends with this one
    "VLLM_LOGGING_LEVEL": "ERROR",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


def admit_torchvision() -> None:
    """vLLM's Llava imports torchvision and calls no operator of it.

    Index pages have its build for CUDA, whose operators do not load beside a torch for CPUs; it refuses to be imported
    where two of them are not even declared.
    """
    (library,) = Path(importlib.util.find_spec("torchvision").origin).parent.glob("_C*.so")
    try:
        torch.ops.load_library(library)
    except OSError:
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")


def main(asked: str, answers: str) -> None:
    os.environ.update(QUIET, VLLM_CACHE_ROOT=str(Path(answers).parent / "cache"))
    admit_torchvision()
    from vllm import ModelRegistry
    from vllm.model_executor.models.llava import LlavaForConditionalGeneration

    # known by its class: by its name vLLM would look at it in a process of its own, which cannot import torchvision
    ModelRegistry.register_model("LlavaForConditionalGeneration", LlavaForConditionalGeneration)
    job = json.loads(Path(asked).read_text(encoding="utf-8"))
    texts = [ask(folder, questions, job["max_new_tokens"]) for folder, questions in job["folders"].items()]
    Path(answers).write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


def ask(folder: str, questions: list[dict], max_new_tokens: int) -> list[str]:
    from PIL import Image
    from vllm import LLM, SamplingParams

    dtype = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["dtype"]
    engine = LLM(folder, dtype=dtype, max_model_len=2048, enforce_eager=True, limit_mm_per_prompt={"image": 4})
    tokenizer, prompts = engine.get_tokenizer(), []
    for question in questions:
        text = tokenizer.apply_chat_template(question["messages"], add_generation_prompt=True, tokenize=False)
        pictures = [Image.open(path).convert("RGB") for path in question["pictures"]]
        prompts.append({"prompt": text, **({"multi_modal_data": {"image": pictures}} if pictures else {})})
    outputs = engine.generate(prompts, SamplingParams(temperature=0.0, max_tokens=max_new_tokens))
    return [output.outputs[0].text for output in outputs]


if __name__ == "__main__":
    main(*sys.argv[1:])
