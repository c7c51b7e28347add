"""Ask a trained model about pictures in a terminal.

    python eval_vlm.py --weight out/sft_vlm_192.safetensors --image cat.jpg --prompt "What is in the picture?"
    python eval_vlm.py --weight out/sft_vlm_192.safetensors --image cat.jpg          # asks for questions

Files given to --image together belong to one question; a folder asks the question about each of its pictures.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image

from model.processing import SampleError, open_picture
from scripts.answer import Answerer, Options

PICTURE_ENDINGS = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif"}


def picture_groups(paths: list[Path]) -> list[list[Path]]:
    """The pictures of each question: all files together, and every picture of a folder alone."""
    files = [path for path in paths if not path.is_dir()]
    groups = [files] if files or not paths else []
    for folder in (path for path in paths if path.is_dir()):
        found = [[path] for path in sorted(folder.iterdir()) if path.suffix.lower() in PICTURE_ENDINGS]
        if not found:
            raise ValueError(f"{folder} holds no picture ({', '.join(sorted(PICTURE_ENDINGS))})")
        groups += found
    return groups


def load_pictures(paths: list[Path]) -> list[Image.Image]:
    pictures = []
    for path in paths:
        try:
            pictures.append(open_picture(path))
        except SampleError as error:
            raise ValueError(f"--image {path}: {error}") from error
    return pictures


def user_turn(question: str, pictures: int) -> dict:
    """The pictures first, as in training. Parts, not a string: an <image> that a person types stays text."""
    text = f"\n{question}" if pictures else question
    return {"role": "user", "content": [{"type": "image"}] * pictures + [{"type": "text", "text": text}]}


def ask(answerer: Answerer, messages: list[dict], pictures: list[Image.Image], options: Options) -> str:
    """Stream one answer to the terminal, then its speed."""
    answer = answerer.stream(
        messages,
        pictures,
        options,
        show=lambda text: print(text, end="", flush=True),
    )
    print(
        f"\n[{answer.seconds_to_first * 1000:.0f} ms to the first token, {answer.tokens_per_second:.0f} tokens/s, "
        f"{answer.prompt_tokens} + {answer.new_tokens} tokens]",
        file=sys.stderr,
    )
    return answer.text


def talk(answerer: Answerer, pictures: list[Image.Image], options: Options) -> None:
    """Several turns about the same pictures. An empty line or the end of input leaves."""
    print(f"{len(pictures)} pictures. Ask; an empty line ends.", file=sys.stderr)
    messages: list[dict] = []
    while True:
        try:
            question = input("> ").strip()
        except EOFError:
            return
        if not question:
            return
        messages.append(user_turn(question, 0 if messages else len(pictures)))
        answer = ask(answerer, messages, pictures, options)
        messages.append({"role": "assistant", "content": [{"type": "text", "text": answer}]})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--weight", type=Path, required=True, help=".safetensors of a stage, or MiniMind's .pth")
    parser.add_argument("--image", type=Path, nargs="+", default=[], help="files for one question, or folders")
    parser.add_argument("--prompt", help="the question; without it you are asked")
    parser.add_argument("--vision_model", help="folder of the CLIP tower; by default the one trained with")
    parser.add_argument("--max_new_tokens", type=int, default=256)
    parser.add_argument("--temperature", type=float, default=0.0, help="0: always the likeliest token")
    parser.add_argument("--top_p", type=float, default=0.9, help="with a temperature: share of likelihood to draw from")
    parser.add_argument("--top_k", type=int, default=0, help="with a temperature: how many tokens to draw from; 0: all")
    parser.add_argument("--seed", type=int, default=42)
    parser.add_argument("--device", default="auto")
    options = parser.parse_args()
    drawing = Options(options.max_new_tokens, options.temperature, options.top_p, options.top_k, options.seed)
    try:
        groups = picture_groups(options.image)
        answerer = Answerer.from_weight(options.weight, options.vision_model, options.device)
        for group in groups:
            pictures = load_pictures(group)
            if len(groups) > 1:
                print(f"{group[0].name}: ", end="")
            if options.prompt:
                ask(answerer, [user_turn(options.prompt, len(pictures))], pictures, drawing)
            else:
                talk(answerer, pictures, drawing)
    except ValueError as error:
        raise SystemExit(f"eval_vlm: {error}") from error


if __name__ == "__main__":
    main()
