"""Ask stock folders through transformers alone, with nothing of this project.

    python scripts/measure/ask_transformers.py ASKED ANSWERS

ASKED and ANSWERS are what scripts/measure/agreement.py writes and reads.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


@torch.inference_mode()
def main(asked: str, answers: str) -> None:
    job, texts = json.loads(Path(asked).read_text(encoding="utf-8")), []
    for folder, questions in job["folders"].items():
        model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
        processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
        texts.append([])
        for question in questions:
            text = processor.apply_chat_template(question["messages"], add_generation_prompt=True, tokenize=False)
            pictures = [Image.open(path) for path in question["pictures"]] or None
            inputs = processor(text=text, images=pictures, return_tensors="pt").to(dtype=model.dtype)
            output = model.generate(**inputs, max_new_tokens=job["max_new_tokens"], do_sample=False)
            new = output[0, inputs["input_ids"].shape[1] :]
            texts[-1].append(processor.decode(new, skip_special_tokens=True))
    Path(answers).write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
