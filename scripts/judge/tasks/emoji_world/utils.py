"""What lmms-eval asks of the task `emoji_world`. Imports nothing of the project: the folder can be passed on."""

from collections import defaultdict

from PIL import Image


def doc_to_visual(doc: dict) -> list[Image.Image]:
    return [picture.convert("RGB") for picture in doc["images"]]


def process_results(doc: dict, results: list[str]) -> dict:
    """Exact match, as scripts/score.py has it: the answer without the white space around it is the truth."""
    right = float(results[0].strip() == doc["answer"])
    return {"exact_match": right, "kinds_alike": {"kind": doc["kind"], "score": right}}


def mean_of_kinds(results: list[dict]) -> float:
    """Every kind of question weighs alike, however many of it there are."""
    kinds = defaultdict(list)
    for result in results:
        kinds[result["kind"]].append(result["score"])
    return sum(sum(scores) / len(scores) for scores in kinds.values()) / len(kinds)
