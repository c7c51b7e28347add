"""What lmms-eval asks of the tasks `emoji_choices...`. Imports nothing of the project: the folder can be passed on."""

from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer
from PIL import Image


def doc_to_visual(doc: dict) -> list[Image.Image]:
    return [picture.convert("RGB") for picture in doc["images"]]


def letters(doc: dict) -> list[str]:
    return list("ABCDEFGHIJKLMNOPQRSTUVWXYZ"[: len(doc["choices"])])


def number_of_right(doc: dict) -> int:
    return letters(doc).index(doc["answer"])


def process_results(doc: dict, results: list[str]) -> dict:
    return {"acc": float(extract_mcq_answer(results[0], letters(doc)) == doc["answer"])}
