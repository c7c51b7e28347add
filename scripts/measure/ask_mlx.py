"""Ask a stock folder through mlx-vlm, in a Python that has it (requirements/mlx.txt) and nothing of this project.

    .venv-mlx/bin/python scripts/measure/ask_mlx.py FOLDER QUESTIONS ANSWERS

QUESTIONS and ANSWERS are what scripts/measure/agreement.py writes and reads.
"""

import json
import sys
from pathlib import Path

from mlx_vlm import generate, load


def main(folder: str, questions: str, answers: str) -> None:
    model, processor = load(folder)
    asked, texts = json.loads(Path(questions).read_text(encoding="utf-8")), []
    for question in asked["questions"]:
        # mlx-vlm's own apply_chat_template puts pictures behind the words
        prompt = processor.apply_chat_template(question["messages"], add_generation_prompt=True)
        pictures = question["pictures"] or None
        answer = generate(model, processor, prompt, pictures, max_tokens=asked["max_new_tokens"], temperature=0.0)
        texts.append(answer.text)
    Path(answers).write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
