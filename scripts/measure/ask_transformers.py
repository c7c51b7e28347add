"""Ask a stock folder through transformers alone, with nothing of this project.

    python scripts/measure/ask_transformers.py FOLDER QUESTIONS ANSWERS

QUESTIONS and ANSWERS are what scripts/measure/agreement.py writes and reads.
"""

import json
import sys
from pathlib import Path

import torch
from PIL import Image
from transformers import AutoModelForImageTextToText, AutoProcessor


def main(folder: str, questions: str, answers: str) -> None:
    model = AutoModelForImageTextToText.from_pretrained(folder, dtype="auto", local_files_only=True).eval()
    processor = AutoProcessor.from_pretrained(folder, local_files_only=True)
    asked, texts = json.loads(Path(questions).read_text(encoding="utf-8")), []
    for question in asked["questions"]:
        text = processor.apply_chat_template(question["messages"], add_generation_prompt=True, tokenize=False)
        pictures = [Image.open(path) for path in question["pictures"]] or None
        inputs = processor(text=text, images=pictures, return_tensors="pt").to(dtype=model.dtype)
        with torch.inference_mode():
            output = model.generate(**inputs, max_new_tokens=asked["max_new_tokens"], do_sample=False)
        texts.append(processor.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True))
    Path(answers).write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
