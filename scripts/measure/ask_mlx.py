"""Ask stock folders through mlx-vlm, in a Python that has it (requirements/mlx.txt) and nothing of this project.

    .venv-mlx/bin/python scripts/measure/ask_mlx.py ASKED ANSWERS

ASKED and ANSWERS are what scripts/measure/apart.py writes and reads.
"""

import json
import sys
from pathlib import Path

from mlx_vlm import generate, load


def main(asked: str, answers: str) -> None:
    job, texts = json.loads(Path(asked).read_text(encoding="utf-8")), []
    for folder, questions in job["folders"].items():
        model, processor = load(folder)
        texts.append([])
        for question in questions:
            # mlx-vlm's own apply_chat_template puts pictures behind the words
            prompt = processor.apply_chat_template(question["messages"], add_generation_prompt=True)
            pictures = question["pictures"] or None
            answer = generate(model, processor, prompt, pictures, max_tokens=job["max_new_tokens"], temperature=0.0)
            texts[-1].append(answer.text)
    Path(answers).write_text(json.dumps(texts, ensure_ascii=False), encoding="utf-8")


if __name__ == "__main__":
    main(*sys.argv[1:])
