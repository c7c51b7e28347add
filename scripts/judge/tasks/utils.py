"""What lmms-eval asks of our tasks. A copy lies in every task's folder, and imports nothing of this project."""

from collections import defaultdict

from PIL import Image

IMAGE_TAG = "<image>"


def doc_to_visual(doc: dict) -> list[Image.Image]:
    return [picture.convert("RGB") for picture in doc["images"]]


def doc_to_messages(doc: dict) -> list[dict]:
    """For wrappers that fill chat templates: the pictures where the text has <image>, or before all of it."""
    pictures, pieces = doc_to_visual(doc), doc["question"].split(IMAGE_TAG)
    if len(pieces) != len(pictures) + 1:
        pieces = [""] * len(pictures) + [doc["question"]]
    content = [{"type": "text", "text": pieces[0]}]
    for picture, text in zip(pictures, pieces[1:], strict=True):
        content += [{"type": "image", "url": picture}, {"type": "text", "text": text}]
    return [{"role": "user", "content": [part for part in content if part.get("text") != ""]}]


def exact_match(doc: dict, results: list[str]) -> dict:
    """As scripts/score.py has it: the answer without the white space around it is the truth."""
    right = float(results[0].strip() == doc["answer"])
    return {"exact_match": right, "kinds_alike": {"kind": doc["kind"], "score": right}}


def mean_of_kinds(results: list[dict]) -> float:
    """Every kind of question weighs alike, however many of it there are."""
    kinds = defaultdict(list)
    for result in results:
        kinds[result["kind"]].append(result["score"])
    return sum(sum(scores) / len(scores) for scores in kinds.values()) / len(kinds)


def letters(doc: dict) -> list[str]:
    return list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(doc["choices"])])


def number_of_right(doc: dict) -> int:
    return letters(doc).index(doc["answer"])


def letter_said(doc: dict, results: list[str]) -> dict:
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer  # here, as the rest needs no harness

    return {"acc": float(extract_mcq_answer(results[0], letters(doc)) == doc["answer"])}
