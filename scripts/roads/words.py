"""How near a short answer comes to a caption: do they share a word, and is it of the right kind of thing.

Content words are runs of letters but for STOP_WORDS and single letters, in lower case, singular. An answer names the
kind of the training caption that it shares most content words with (the share of those that either has; of equal ones
the commonest kind), and none where it shares no word with any.
"""

import re
from collections import Counter
from collections.abc import Collection, Sequence

from dataset.exam.figures import wilson_interval

STOP_WORDS = """
    a about all an and are as at be but by can do for from has have he her his i in is it its just like my not of
    on one or our out s she so some t than that the their them there these they this those to two up us very was
    what when where which who will with you your
"""

BROAD = {  # kinds that a child would tell apart; what is none of these is a thing made by people
    "A bird.": "animal", "A bug.": "animal", "A mammal.": "animal", "A sea animal.": "animal",
    "A reptile or a frog.": "animal", "A fruit.": "food or plant", "A vegetable.": "food or plant",
    "A plant.": "food or plant", "A dish to eat.": "food or plant", "A sweet.": "food or plant",
    "A drink.": "food or plant", "A letter.": "sign", "A hand sign.": "sign", "A road sign.": "sign",
    "A number or a sign of arithmetic.": "sign", "A sign of music.": "sign",
}  # fmt: skip


def broad_kind(answer: str, kinds: Collection[str]) -> str | None:
    """Of a bird and a mammal it is `animal`; None where the answer is none of the kinds that can be asked for."""
    return BROAD.get(answer, "thing") if answer in kinds else None


def content_words(text: str) -> frozenset[str]:
    words, skipped = re.findall("[^\\W\\d_]+", text.casefold()), STOP_WORDS.split()
    return frozenset(_singular(word) for word in words if len(word) > 1 and word not in skipped)


def _singular(word: str) -> str:
    """Cherries and cherry, boxes and box, birds and bird are one word each; glass and bus stay."""
    if len(word) > 4 and word.endswith("ies"):
        return word[:-3] + "y"
    if len(word) > 4 and re.search("(ch|sh|x|ss|o)es$", word):
        return word[:-2]
    return word[:-1] if len(word) > 3 and re.search("[^sui]s$", word) else word


class KindOfCaption:
    """Answers to the kind that they name, by the captions of training."""

    def __init__(self, captions: Sequence[tuple[str, str]]):
        """captions: each with its kind."""
        self.captions = [(content_words(caption), kind) for caption, kind in captions]

    def __call__(self, answer: str) -> str | None:
        words = content_words(answer)
        shares = [(len(words & others) / len(words | others), kind) for others, kind in self.captions if words & others]
        if not shares:
            return None
        most = max(share for share, _ in shares)
        kinds = Counter(kind for share, kind in shares if share == most)
        return min(kinds, key=lambda kind: (-kinds[kind], kind))


def figures(right: Sequence[bool]) -> dict:
    """A share with its 95 % interval and count."""
    share = round(sum(right) / len(right), 4) if right else None
    return {"share": share, "interval": wilson_interval(sum(right), len(right)), "count": len(right)}


def judge(records: Sequence[dict], kinds: dict[str, str], kind_of: KindOfCaption, modes: Sequence[str]) -> dict:
    """What the answers to `what is this` are worth, by mode.

    records: of scripts/score.py, with their right answers in `truth`. kinds: by picture, of those that have one.
    """
    report = {}
    for mode in modes:
        asked = [record for record in records if record[mode] is not None]
        shares = [bool(content_words(record[mode]) & content_words(record["truth"])) for record in asked]
        of_kind = [record for record in asked if record["pictures"][0] in kinds]
        named = [kind_of(record[mode]) == kinds[record["pictures"][0]] for record in of_kind]
        report[mode] = {"shares a content word": figures(shares), "names the kind": figures(named)}
    return report
