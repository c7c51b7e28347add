"""What a harness found, said so that it can be checked: prompt, decoding, rule, counts, figures with intervals."""

from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from dataset.exam.figures import wilson_interval
from dataset.formats import LETTERS
from model.messages import counted


@dataclass(frozen=True)
class Rule:
    """How a task finds the answer in what the model says."""

    says: str
    metric: str  # the entry of a sample that says whether it is right
    extracts: Callable[[str, dict], object]  # from (what the model said, the question's row): nothing where it fails


def _letter(text: str, row: dict) -> str:
    from lmms_eval.tasks._task_utils.mcq_extract import extract_mcq_answer  # only here is the harness needed

    return extract_mcq_answer(text, list(LETTERS[: len(row.get("choices") or "ABCD")]))


def _letter_first(text: str, _row: dict) -> bool:
    text = text.strip()
    return len(text) == 1 or text[:1].isupper() and text[1:2] == "."


MCQ = "a letter of the choices, found by lmms-eval's extract_mcq_answer"
RULES = {
    "emoji_world": Rule(
        "the whole answer but for white space around it; right if it is the truth, character by character",
        "exact_match",
        lambda text, _row: text.strip(),
    ),
    "emoji_choices": Rule("none: the choice with the largest log p, its end included", "acc", lambda _said, _row: True),
    "emoji_choices_letters": Rule(
        "none: the letter with the largest log p, its end included", "acc", lambda _said, _row: True
    ),
    "emoji_choices_generated": Rule(MCQ, "acc", _letter),
    "mmstar": Rule(MCQ, "average", _letter),
    "pope": Rule(
        "the whole answer in small letters, which must be yes or no",
        "pope_accuracy",
        lambda text, _row: text.strip().lower() in ("yes", "no"),
    ),
    "scienceqa_img": Rule(
        "the letter alone, or a capital and a full stop at the beginning", "exact_match", _letter_first
    ),
}


def task_report(task: str, results: Mapping) -> dict:
    """What is printed and written of a task. results: as lmms-eval's simple_evaluate gives them."""
    config, samples, rule = results["configs"][task], results["samples"][task], RULES.get(task)
    report = {
        "task": task,
        "version": results["versions"].get(task),
        "decoding": _decoding(config),
        "extraction": rule.says if rule else "the task's own, by which scripts/judge/report.py counts no failures",
        "n": len(samples),
        "harness": {
            name.split(",")[0]: value
            for name, value in results["results"][task].items()
            if isinstance(value, (int, float)) and "stderr" not in name
        },
    }
    if not rule:
        return report
    right = [_is_right(sample[rule.metric]) for sample in samples]
    failed = [not rule.extracts(said(sample), sample["doc"]) for sample in samples]
    return report | {"failed_extractions": sum(failed), "figures": figures(samples, right)}


def said(sample: Mapping) -> str:
    """The model's answer; of likelihoods the pairs of loss and greediness, as text."""
    first = sample["filtered_resps"][0]
    return first if isinstance(first, str) else str(sample["filtered_resps"])


def records(task: str, samples: Sequence[Mapping]) -> list[dict]:
    """One a question: what scripts/judge/lmms.py writes to compare with other harnesses, without the pictures."""
    rule, lines = RULES.get(task), []
    for sample in samples:
        row = {name: value for name, value in sample["doc"].items() if isinstance(value, (str, int, float))}
        line = row | {"truth": sample["target"], "said": said(sample)}
        lines.append(line | ({"right": _is_right(sample[rule.metric])} if rule else {}))
    return lines


def figures(samples: Sequence[Mapping], right: Sequence[bool]) -> dict[str, dict]:
    """Right answers of all questions and of each kind, or category where there are no kinds, with intervals."""
    groups: dict[str, list[bool]] = defaultdict(list, all=list(right))
    by = next((name for name in ("kind", "category") if len({s["doc"].get(name) for s in samples}) > 1), None)
    for sample, is_right in zip(samples, right, strict=True):
        if by:
            groups[str(sample["doc"][by])].append(is_right)
    return {
        name: {
            "right": sum(found),
            "n": len(found),
            "rate": round(sum(found) / len(found), 4),
            "interval": wilson_interval(sum(found), len(found)),
        }
        for name, found in groups.items()
    }


def as_text(report: Mapping) -> str:
    """A task's part of what the command prints."""
    lines = [f"task         {report['task']} (version {report['version']})"]
    lines += [f"{name:<12} {report[name]}" for name in ("prompt", "decoding", "extraction") if name in report]
    if "failed_extractions" in report:
        lines.append(f"n            {report['n']:,}, {counted(report['failed_extractions'], 'failed extractions')}")
        for name, figure in report["figures"].items():
            low, high = figure["interval"]
            lines.append(
                f"  {name:<24}{figure['rate']:>8.4f}  {low:.2f} to {high:.2f}  {figure['right']:>6,} of {figure['n']:,}"
            )
    else:
        lines.append(f"n            {report['n']:,}")
    said_by_harness = ", ".join(f"{name} {value:.4f}" for name, value in report["harness"].items())
    return "\n".join([*lines, f"lmms-eval's  {said_by_harness}"])


def _is_right(value: object) -> bool:
    """A sample's metric is a number, or what the task adds up later, with the number inside."""
    return (value["score"] if isinstance(value, Mapping) else value) == 1


def _decoding(config: Mapping) -> str:
    if "generate" not in config["output_type"]:
        return "none: log p of each choice as the answer"
    wishes = config.get("generation_kwargs") or {}
    temperature = wishes.get("temperature") or 0
    how = f"sampled at temperature {temperature}" if temperature else "greedy"
    most, ends = wishes.get("max_new_tokens"), wishes.get("until")
    room = f"at most {most} new tokens" if most else "as many new tokens as the model's wrapper allows"
    return f"{how}, {room}" + (f", up to {ends}" if ends else "")
