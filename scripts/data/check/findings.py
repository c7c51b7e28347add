"""What a survey found: one Finding for each place where something is to be told, and the sums over the whole file."""

import os
import re
from array import array
from collections import Counter
from collections.abc import Callable
from typing import NamedTuple

from dataset import check
from dataset.quarantine import Quarantine
from dataset.samples import BAD, DAMAGED, DROPPED, DataError, Rejected
from model.messages import counted, plain
from scripts.data.check.lookalikes import Lookalikes
from scripts.data.check.survey import Facts, Look

# Kinds of rejected samples: what they are called, and what the reason of dataset.check holds.
REJECTED = {
    "line-too-long": ("a line too long to be read", r"this line has [\d,]+ bytes"),
    "no-json": ("a line that is no JSON", r"is no JSON|is no UTF-8"),
    "no-object": ("a line that is no object", r"it must be an object"),
    "picture-name": ("'image' names no file", r"'image' is|no file can be called"),
    "picture-address": ("an address instead of a picture", r"is an address"),
    "picture-outside": ("a picture outside of the folder", r"lies outside"),
    "picture-no-file": ("a picture that is no regular file", r"is no regular file"),
    "many-pictures": ("too many pictures in one sample", r"pictures, more than"),
    "text-with-picture": ("a plain text with a picture", r"'text' is learnt without pictures"),
    "text": ("'text' is no text", r"'text' must be text"),
    "foreign-turns": ("a record of another format", r"it looks like \w+ in data of"),
    "no-turns": ("'conversations' is no list of turns", r"'conversations' must be a list"),
    "content": ("a turn whose 'content' is no text", r"'content' must be text"),
    "text-too-long": ("a text too long to be rendered", r"a text of [\d,]+ letters"),
    "tags": ("not as many <image> as pictures", r"<image> but"),
    "role": ("a turn of an unknown role", r"needs a role"),
    "no-unicode": ("text that is no Unicode", r"half a surrogate pair"),
    "rows-damaged": ("damaged rows of a parquet", r"row group \d+ cannot be read"),
    "picture-missing": ("a picture that does not exist", r"does not exist"),
    "picture-unreadable": ("a picture that the disk or its rights keep back", r"file could not be read"),
    "picture-size": ("a picture of a size that is refused", r"it has \d+ x \d+ pixels"),
    "picture-broken": ("a picture that cannot be decoded", r"cannot be read as a picture"),
    "picture-archive": (
        "a picture that its archive does not give",
        r"is not in |cannot be used: |in .* cannot be",
    ),
    "no-caption": ("a picture without a caption", r"says nothing|no caption stands beside"),
    "answer": ("a question or an answer that is empty", r"must be text that is not empty|must be a caption"),
    "too-long": ("no room for all of its pictures", r"its last picture ends at token"),
    "nothing-to-learn": ("no answer within --max_seq_len", r"no token of an answer within"),
    "other": ("something else", r""),
}
TOLD = {  # of samples that are learnt from
    "cut": "a conversation that loses its end",
    "empty-answer": "an answer without text",
    "same-sample": "the same sample once more",
    "same-picture": "one picture in two files",
    "similar-picture": "a picture that looks like another one",
    "held-out-picture": "a picture of the held-out file",
    "held-out-similar": "a picture that looks like one of the held-out file",
    "held-out-question": "a question of the held-out file",
}
TITLES = {kind: title for kind, (title, _) in REJECTED.items()} | TOLD


class Place(NamedTuple):
    """Where a picture is shown first."""

    number: int  # of the sample
    picture: int  # of the sample's
    where: str
    name: str


class Finding(NamedTuple):
    kind: str  # of TITLES
    where: str  # file:line
    reason: str  # and the cure
    number: int  # of the sample
    picture: int = 0  # of the sample's
    like: Place | None = None  # the picture that this one repeats; the held-out file's where the kind begins so


def kind_of(rejected: Rejected) -> str:
    """Of REJECTED."""
    return next(kind for kind, (_, pattern) in REJECTED.items() if re.search(pattern, rejected.reason))


class Seen:
    """What a file shows, says and asks, and where it does so first."""

    def __init__(self, where: Callable[[int], str]):
        """where: file and line of a sample."""
        self.where, self.samples = where, 0
        self.pictures: dict[str, Place] = {}  # by sha256
        self.names: set[str] = set()  # of all files that were shown
        self.contents: dict[bytes, int] = {}  # numbers of samples, by digest
        self.questions: dict[bytes, int] = {}
        self._different = Lookalikes()
        self._places: list[Place] = []

    def similar(self, thumbnail: bytes) -> Place | None:
        number = self._different.find(thumbnail)
        return None if number is None else self._places[number]

    def add_picture(self, sha256: str, place: Place, thumbnail: bytes, similar: Place | None) -> None:
        """similar: what self.similar has said of it."""
        self.pictures[sha256] = place
        if similar is None:
            self._different.add(len(self._places), thumbnail)
            self._places.append(place)

    def add_all(self, look: Look, facts: dict[str, Facts]) -> None:
        """Of a sample of the held-out file."""
        self.samples += 1
        self.contents.setdefault(look.content, look.number)
        for question in look.questions:
            self.questions.setdefault(question, look.number)
        for number, sha256 in enumerate(look.pictures):
            if sha256 not in self.pictures:
                thumbnail = facts[sha256].thumbnail
                self.add_picture(sha256, _place(look, number), thumbnail, self.similar(thumbnail))


class Tally:
    """Findings and sums of a file, sample by sample in its order."""

    def __init__(self, where: Callable[[int], str], held_out: Seen | None, max_seq_len: int):
        self.held_out, self.max_seq_len = held_out, max_seq_len
        self.own = Seen(where)
        self.findings: list[Finding] = []
        self.rejected: dict[str, list[Rejected]] = {BAD: [], DROPPED: [], DAMAGED: []}
        self.samples = self.used = self.shown = self.lost = 0  # shown: pictures of samples that are used
        self.tokens, self.trained = array("q"), array("q")  # of what can be rendered, before a cut; of what is used
        self.writing: Counter[str] = Counter()  # samples by writing system
        self.formats: Counter[str] = Counter()  # different pictures
        self.sizes: list[tuple[int, int]] = []  # of these, pixels

    def add(self, look: Look, facts: dict[str, Facts]) -> None:
        """facts: of all its pictures, by sha256."""
        self.samples += 1
        if look.tokens:
            self.tokens.append(look.tokens)
        if look.rejected:
            self._reject(look)
            return
        self.used, self.shown, self.lost = self.used + 1, self.shown + look.shows, self.lost + look.lost
        self.trained.append(look.trained)
        self.writing.update(look.writing)
        self._judge_text(look)
        for number, sha256 in enumerate(look.pictures):
            self._judge_picture(look, number, facts[sha256])
        if self.held_out:
            self._judge_questions(look)

    def _reject(self, look: Look) -> None:
        """Training decodes the first pictures before it starts; it meets the others' damage on its way."""
        rejected = look.rejected
        if look.only_decoding and self.shown + look.shows > check.FULLY_DECODED:
            rejected = rejected._replace(kind=DAMAGED)
            self.shown += look.shows
        self.rejected[rejected.kind].append(rejected)
        self.findings.append(Finding(kind_of(rejected), rejected.where, rejected.reason, look.number))

    def _tell(self, kind: str, look: Look, reason: str, picture: int = 0, like: Place | None = None) -> None:
        self.findings.append(Finding(kind, plain(look.where), plain(reason), look.number, picture, like))

    def _judge_text(self, look: Look) -> None:
        if look.tokens > self.max_seq_len:
            of = counted(look.trained + look.lost, "trained tokens")
            reason = f"{look.tokens:,} tokens, of which {self.max_seq_len:,} are kept; {look.lost:,} of {of} are lost: "
            self._tell("cut", look, f"{reason}split it, or raise --max_seq_len to {look.tokens}")
        if look.empty_answer:
            self._tell("empty-answer", look, "an answer without text teaches to say nothing: write it, or delete it")
        first = self.own.contents.setdefault(look.content, look.number)
        if first != look.number:
            reason = f"the same text and pictures as in {self.own.where(first)}: delete one, or it counts twice"
            self._tell("same-sample", look, reason)

    def _judge_picture(self, look: Look, number: int, facts: Facts) -> None:
        place, own = _place(look, number), self.own
        first = own.pictures.get(facts.sha256)
        if first is None:
            self.formats[facts.format] += 1
            self.sizes.append((facts.width, facts.height))
            if self.held_out:
                self._judge_held_out(look, number, facts)
            similar = own.similar(facts.thumbnail)
            own.add_picture(facts.sha256, place, facts.thumbnail, similar)
            if similar:
                cure = "keep one, or keep both on one side of a split"
                reason = f"{place.name} looks like {similar.name} of {similar.where}: {cure}"
                self._tell("similar-picture", look, reason, number, similar)
        elif look.names[number] and look.names[number] not in own.names:
            reason = f"{place.name} is, byte for byte, {first.name} of {first.where}: name one file in both places"
            self._tell("same-picture", look, reason, number, first)
        own.names.add(look.names[number])

    def _judge_held_out(self, look: Look, number: int, facts: Facts) -> None:
        name = _place(look, number).name
        cure = "take it out of one of the files, or the score tells what was learnt by heart"
        if same := self.held_out.pictures.get(facts.sha256):
            self._tell("held-out-picture", look, f"{name} is {same.name} of {same.where}: {cure}", number, same)
        elif similar := self.held_out.similar(facts.thumbnail):
            reason = f"{name} looks like {similar.name} of {similar.where}: {cure}"
            self._tell("held-out-similar", look, reason, number, similar)

    def _judge_questions(self, look: Look) -> None:
        """A question about the same pictures; of what has none, the whole sample."""
        known = [
            self.held_out.questions[question] for question in look.questions if question in self.held_out.questions
        ]
        if not look.pictures and look.content in self.held_out.contents:
            known = [self.held_out.contents[look.content]]
        if known:
            what = "a question about this picture" if look.pictures else "this text"
            reason = f"{what} stands in {self.held_out.where(known[0])}, too: take it out of one of the files"
            self._tell("held-out-question", look, reason)

    def refusal(self, max_share: float, strict: bool) -> str | None:
        """What training would say instead of starting, or of going on to its end; None where it would do neither."""
        bad, damaged = self.rejected[BAD], self.rejected[DAMAGED]
        if strict and (bad or damaged):
            return f"{(bad or damaged)[0]} (--strict_data 1)"
        try:
            for rejected in (bad, damaged):
                Quarantine(strict=False, max_share=max_share).refuse_too_many(rejected, len(rejected), self.samples)
        except DataError as error:
            return str(error)
        return None if self.used else f"no sample of {self.samples:,} can be used"


def _place(look: Look, number: int) -> Place:
    name = look.names[number]
    if name.startswith(here := os.getcwd() + os.sep):
        name = name.removeprefix(here)
    name = name or f"picture {number + 1}"
    return Place(look.number, number, look.where, plain(name))
