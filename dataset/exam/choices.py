"""Questions with choices: which letter a model takes, by several rules, with the right picture, another one, and none.

texts              asked the plain question, without the choices: the choice that is likeliest as the whole answer, its
                   end token included (log p summed: the probability that the model gives just this answer)
per token          the same log p divided by the tokens, which favours long choices as the sum favours short ones
plain generation   asked the plain question, at temperature 0; a letter is read off the answer by VLMEvalKit's rule
letters            asked in VLMEvalKit's words, with the choices: the letter that is likeliest as the next text
generation         asked in those words, at temperature 0, and read off by that rule: what the harness itself does

A model that was never asked to name a letter knows no letters: `texts` asks it what it was trained on, and is the rule
that stands first. As MMStar has it (Chen et al. 2024), the multi-modal gain is what a picture adds, and the leakage how
much more the model knows without one than the base decoder that it was trained from, or 0.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

from dataset.exam.answering import BRIEF, batches, prompt_of, record_of
from dataset.exam.figures import MODES, SHOWN, wilson_interval
from dataset.exam.questions import Question, wrong_pictures
from dataset.formats import LETTERS
from model.inference.answerer import Answerer
from model.inference.likelihood import Likelihood, log_likelihoods
from model.inference.reader import Prompt
from model.processing import IMAGE_TAG

RULES = ("texts", "per token", "plain generation", "letters", "generation")
GENERATED = ("plain generation", "generation")
BASE = "base"  # the mode of the decoder alone, without pictures
CHARACTERS_TO_SPACES = str.maketrans(dict.fromkeys(".()[],:;!*#{}", " "))
LAST_WORDS = 4  # among which a letter must stand to be an answer


@dataclass
class Picked:
    """What one question got in one mode."""

    said: dict[str, str]  # the answers that were generated, by rule
    letters: dict[str, str | None] = field(default_factory=dict)  # by rule; None: no letter could be read off


def letter_of(answer: str, choices: Sequence[str]) -> str | None:
    """The choice that an answer names, by the rule of VLMEvalKit (can_infer), or None.

    With punctuation as spaces, the only letter of a choice that stands as a word, and first stands among the last
    four words. Else the only choice whose text the answer contains, in any case, where the answer is at most twice as
    long as all choices together.
    """
    words = answer.translate(CHARACTERS_TO_SPACES).split()
    named = [letter for letter, _ in zip(LETTERS, choices, strict=False) if letter in words]
    if len(named) == 1 and words.index(named[0]) >= len(words) - LAST_WORDS:
        return named[0]
    said = answer.lower()
    if len(said) > 2 * sum(map(len, choices)):
        return None
    contained = [letter for letter, choice in zip(LETTERS, choices, strict=False) if choice.lower() in said]
    return contained[0] if len(contained) == 1 else None


def plain(question: Question) -> Question:
    """The question without its choices."""
    tags = question.sample.messages[0]["content"].count(IMAGE_TAG)
    lines = [question.sample.extra.get("hint"), question.sample.extra["question"]]
    content = IMAGE_TAG * tags + "\n" * bool(tags) + "\n".join(filter(None, lines))
    messages = [{"role": "user", "content": content}, question.sample.messages[-1]]
    return replace(question, sample=replace(question.sample, messages=messages))


def pick_all(
    answerer: Answerer, questions: Sequence[Question], mode: str, wrong: Sequence[Question | None], batch_size: int
) -> list[Picked | None]:
    """By every rule; None where `wrong`, of wrong_pictures, has nothing to shuffle with."""
    shown = wrong if mode == "shuffled" else questions
    how = "none" if mode == BASE else mode
    picked: list[Picked | None] = [None] * len(questions)
    for numbers in batches(shown, batch_size, mode):
        asked = [questions[number] for number in numbers]
        named = [prompt_of(answerer, question, how, shown[n]) for n, question in zip(numbers, asked, strict=True)]
        bare = [prompt_of(answerer, plain(question), how, shown[n]) for n, question in zip(numbers, asked, strict=True)]
        letters = _likelihoods(answerer, named, [LETTERS[: len(question.choices)] for question in asked], False)
        texts = _likelihoods(answerer, bare, [question.choices for question in asked], True)
        answers = [answerer.batch(prompts, BRIEF) for prompts in (bare, named)]
        for row, (number, question) in enumerate(zip(numbers, asked, strict=True)):
            said = {rule: given[row].text.strip() for rule, given in zip(GENERATED, answers, strict=True)}
            picked[number] = Picked(said, {
                "texts": _best(texts[row], lambda one: one.total),
                "per token": _best(texts[row], lambda one: one.mean),
                "letters": _best(letters[row], lambda one: one.total),
                **{rule: letter_of(text, question.choices) for rule, text in said.items()},
            })  # fmt: skip
    return picked


def likeliest_texts(answerer: Answerer, questions: Sequence[Question], batch_size: int) -> list[str]:
    """The first of RULES alone, with the right pictures, for who asks while it trains: a letter for each question."""
    letters = [""] * len(questions)
    for numbers in batches(questions, batch_size, "right", silent=True):
        asked = [questions[number] for number in numbers]
        prompts = [prompt_of(answerer, plain(question), "right", question) for question in asked]
        found = _likelihoods(answerer, prompts, [question.choices for question in asked], True)
        for number, of_question in zip(numbers, found, strict=True):
            letters[number] = _best(of_question, lambda one: one.total)
    return letters


def _likelihoods(
    answerer: Answerer, prompts: Sequence[Prompt], texts: Sequence[Sequence[str]], with_end: bool
) -> list[list[Likelihood]]:
    """Of each prompt's texts."""
    pairs = [(prompt, text) for prompt, own in zip(prompts, texts, strict=True) for text in own]
    found = iter(log_likelihoods(answerer, *map(list, zip(*pairs, strict=True)), with_end))
    return [[next(found) for _ in own] for own in texts]


def _best(found: Sequence[Likelihood], key: Callable[[Likelihood], float]) -> str:
    return LETTERS[max(range(len(found)), key=lambda number: key(found[number]))]


def score_choices(
    answerer: Answerer, questions: Sequence[Question], base: Answerer | None = None, batch_size: int = 16
) -> tuple[dict, list[dict]]:
    """The report, and one record a question. base: the decoder that the model was trained from, for the leakage."""
    wrong = wrong_pictures(questions)
    picked = {mode: pick_all(answerer, questions, mode, wrong, batch_size) for mode in MODES}
    if base:
        picked[BASE] = pick_all(base, questions, BASE, wrong, batch_size)
    first = questions[0]
    report = {
        "prompts": {"letters and generation": first.text, "the others": plain(first).text},
        **_figures(questions, picked, range(len(questions))),
        "by_category": {},
    }
    for category in dict.fromkeys(question.category for question in questions):
        numbers = [number for number, question in enumerate(questions) if question.category == category]
        report["by_category"][category] = _figures(questions, picked, numbers)
    records = [
        record_of(question)
        | {"question": plain(question).text, "category": question.category, "choices": list(question.choices)}
        | {mode: found[n] and found[n].letters[RULES[0]] for mode, found in picked.items()}
        | {"picked": {mode: found[n] and vars(found[n]) for mode, found in picked.items()}}
        for n, question in enumerate(questions)
    ]
    return report, records


def _figures(questions: Sequence[Question], picked: dict[str, list[Picked | None]], numbers: Iterable[int]) -> dict:
    """Of some questions: for each rule the accuracy in every mode, the gain and, with a base, the leakage."""
    result = {}
    for rule in RULES:
        modes = {}
        for mode, found in picked.items():
            letters = [(found[n].letters[rule], questions[n].truth) for n in numbers if found[n]]
            right = sum(letter == truth for letter, truth in letters)
            modes[mode] = {
                "accuracy": round(right / len(letters), 4) if letters else None,
                "interval": wilson_interval(right, len(letters)),
                "count": len(letters),
                "failed": sum(letter is None for letter, _ in letters),
            }
        result[rule] = {**modes, "gain": round(modes["right"]["accuracy"] - modes["none"]["accuracy"], 4)}
        if BASE in modes:
            result[rule]["leakage"] = max(0.0, round(modes["none"]["accuracy"] - modes[BASE]["accuracy"], 4))
    return {"rules": result}


def table(report: dict) -> str:
    """The report as score.py prints it: a row for each rule, then one for each category by the first rule."""
    modes = [mode for mode in (*MODES, BASE) if mode in report["rules"][RULES[0]]]
    heads = {**SHOWN, BASE: "base decoder"}
    measures = ["gain", "leakage"] if BASE in modes else ["gain"]
    lines = [f"{'':<20}" + "".join(f"{heads[mode]:>24}" for mode in modes) + "".join(f"{m:>9}" for m in measures)]
    rows = [(rule, figures) for rule, figures in report["rules"].items()]
    rows += [(f"  {name}", figures["rules"][RULES[0]]) for name, figures in report["by_category"].items()]
    for name, figures in rows:
        measured = "".join(f"{figures[measure]:>9.3f}" for measure in measures)
        lines.append(f"{name:<20}" + "".join(_cell(figures[mode]) for mode in modes) + measured)
        if name == RULES[-1] and len(rows) > len(RULES):
            lines.append(f"by category, {RULES[0]}:")
    for rule in GENERATED:
        found = report["rules"][rule]["right"]
        lines.append(f"{rule}: no letter could be read off {found['failed']:,} of {found['count']:,} answers")
    for rules, prompt in report["prompts"].items():
        lines.append(f"asked for {rules}, the first: {prompt!r}")
    return "\n".join(lines)


def _cell(figure: dict) -> str:
    if figure["accuracy"] is None:
        return f"{'-':>8}{'':<16}"
    return f"{figure['accuracy']:>8.3f}  " + f"{'{:.2f} to {:.2f}'.format(*figure['interval']):<14}"
