"""How the browser demo names weights: by what they can do and where they lie, the `_best` beside its weights."""

from collections import Counter
from collections.abc import Sequence

from model.messages import plain
from scripts.demo.engine import Weight
from scripts.demo.words import WORDS, say

BEST = "_best"
SHIPPED_TOWER = "emoji-clip"
MOST_SHOWN = 60  # characters of what a file says of itself


def fold(weights: Sequence[Weight]) -> dict[Weight, Weight | None]:
    """Each of the weights with the `_best` of the same run, where there is one; a `_best` alone stands for itself."""
    by_path = {weight.path: weight for weight in weights}
    last = {path: path.with_stem(path.stem.removesuffix(BEST)) for path in by_path if path.stem.endswith(BEST)}
    folded = {path for path, of_run in last.items() if of_run in by_path}
    best = {last[path]: by_path[path] for path in folded}
    return {weight: best.get(weight.path) for weight in weights if weight.path not in folded}


def names(weights: Sequence[Weight], language: str) -> dict[Weight, str]:
    """A name for each, no two alike: what it does and its folder, then as much of its path as tells it from others."""

    def folder(weight: Weight) -> str:
        return weight.path.parent.name if weight.path.parent.name != "out" else ""

    def kind(weight: Weight) -> str:
        key, best = f"kind_{weight.stage}", weight.path.stem.endswith(BEST)
        if key not in WORDS:
            return weight.path.stem
        return say(language, "kind_best", kind=say(language, key)) if best else say(language, key)

    forms = (
        lambda weight: [kind(weight), folder(weight)],
        lambda weight: [kind(weight), folder(weight), weight.path.stem],
        lambda weight: [kind(weight), str(weight.path)],
    )
    found: dict[Weight, str] = {}
    for form in forms:
        open_ones = [weight for weight in weights if weight not in found]
        tried = {weight: plain(" · ".join(filter(None, form(weight)))) for weight in open_ones}
        count = Counter(tried.values())
        found |= {weight: name for weight, name in tried.items() if count[name] == 1}
    return found


def about(weight: Weight, language: str) -> list[str]:
    """What a file says of its training, in sentences of Markdown: its own words stand in code spans, so as text."""
    facts = (
        [say(language, "trained_on", data=_code(weight.data))] if weight.data else [say(language, "trained_unknown")]
    )
    if weight.steps.isdigit():
        facts.append(say(language, "trained_steps", steps=int(weight.steps)))
    if weight.val_loss:
        facts.append(say(language, "trained_loss", loss=_code(weight.val_loss)))
    sentences = [" · ".join([*facts, _code(weight.path.name)])]
    if weight.tower == SHIPPED_TOWER:
        sentences.append(say(language, "knows_drawings"))
    return sentences


def file_name(weight: Weight) -> str:
    """Folder and file, as Markdown that shows them as they are."""
    return _code("/".join(weight.path.parts[-2:]))


def _code(text: str) -> str:
    return f"`{plain(text)[:MOST_SHOWN].replace('`', '?')}`"
