"""The harder exam of Emoji World: questions, names, scenes and pictures that the stages did not practise.

Every question is about held-out scenes of a seed of its own, which no other file shows. Families, by `category`:

trained     the six kinds about 128 everyday names as training asks them, for comparison with the next two
reworded    the same questions about the same scenes in words that no training has
behind      the same, with the picture behind the question
all_names   all names that there are
many        five to nine things
relations   what is beside what, and which of two things is larger
pictures    two pictures: what is in both, which one shows a thing
talks       a second question, about what the first one has named
captions    a caption; dataset/exam/caption_facts.py counts which of its facts are true
blurred, turned, grey, photographs   pictures that no training has: blurred, things upside down, without colours, on
            photographs (scikit-image's, where it is installed)
"""

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import islice
from pathlib import Path
from random import Random

from PIL import Image, ImageFilter

from dataset import emoji_talks as talks
from dataset import emoji_words as words
from dataset import emoji_world as world
from dataset.exam.emoji_wordings import UNSEEN
from dataset.photographs import photographs

SEED = 7  # of the scenes, beside those of scripts/build_emoji_world.py
EVERYDAY = 128  # names that the quickstart trains
OF_MANY = 144  # names, nine of each group, so that a scene of nine can be had
BLUR = 1.6  # pixels, the deviation


def write_exam(folder: Path, count: int, seed: int = 42) -> int:
    """exam.jsonl with its pictures under folder/images; returns how many questions it holds.

    count: scenes of each family, of the last four a half.
    """
    (folder / "images").mkdir(parents=True, exist_ok=True)
    exam = _Exam(folder / "images", count, seed)
    records = [record for family in exam.families() for record in family]
    lines = (json.dumps(record, ensure_ascii=False) + "\n" for record in records)
    (folder / "exam.jsonl").write_text("".join(lines), encoding="utf-8")
    (folder / "LICENSE.txt").write_text(world.attribution() + "\n")
    return len(records)


class _Exam:
    def __init__(self, images: Path, count: int, seed: int):
        self.images, self.count, self.seed = images, count, seed * 10 + SEED

    def families(self) -> Iterator[Iterable[dict]]:
        yield from self.three_ways()
        yield self.kinds("all_names", words.KINDS, self.scenes("all_names", None))
        yield self.kinds("many", words.KINDS, self.scenes("many", OF_MANY, min_things=5, max_things=9), OF_MANY)
        yield self.kinds("relations", words.RELATIONS, self.scenes("relations", EVERYDAY, min_things=2), EVERYDAY)
        yield self.pictures()
        yield self.talks()
        yield self.captions()
        no_colours = tuple(kind for kind in words.KINDS if kind != "colour")
        strange = {
            "blurred": (words.KINDS, _blurred), "turned": (words.KINDS, _turned), "grey": (no_colours, _grey),
        }  # fmt: skip
        if grounds := _photographs():
            strange["photographs"] = (no_colours, lambda scene, rng: world.render(scene, rng.choice(grounds))[0])
        for category, (kinds, draw) in strange.items():
            scenes = islice(self.scenes(category, EVERYDAY), max(1, self.count // 2))
            yield self.kinds(category, kinds, scenes, EVERYDAY, draw)

    def scenes(self, category: str, vocabulary: int | None, min_things: int = 1, max_things: int = 4) -> Iterator:
        """A family's own scenes, each with the name of its picture and a generator for its words."""
        for index in range(self.count):
            scene = world.sample_scene(
                f"{self.seed}:{category}", "held_out", index, vocabulary, max_things, min_things=min_things
            )
            yield scene, f"{category}_{index:04d}", Random(f"exam:{self.seed}:{category}:{index}")

    def save(self, name: str, picture: Image.Image) -> str:
        picture.save(self.images / f"{name}.jpg", quality=world.QUALITY)
        return f"{name}.jpg"

    def three_ways(self) -> Iterator[Iterable[dict]]:
        """The same questions three times: as trained, in other words, and with the picture behind them."""
        scenes = list(self.scenes("wordings", EVERYDAY))
        trained = list(self.kinds("trained", words.KINDS, scenes, EVERYDAY))
        yield trained
        yield self.kinds("reworded", words.KINDS, scenes, EVERYDAY, wordings=UNSEEN)
        yield (
            record | {"category": "behind", "conversations": talks.picture_behind(record["conversations"])}
            for record in trained
        )

    def kinds(
        self, category: str, kinds: Sequence[str], scenes: Iterable, vocabulary: int | None = None,
        draw: Callable = lambda scene, rng: world.render(scene)[0], wordings: dict = words.QUESTIONS,
    ) -> Iterator[dict]:  # fmt: skip
        """A question of each kind about each scene that can be asked it, in both languages by turns."""
        for index, (scene, name, _) in enumerate(scenes):
            image = self.save(name, draw(scene, Random(f"draw:{name}")))
            for number, kind in enumerate(kinds):
                if kind in words.askable(scene):
                    language = world.LANGUAGES[(index + number) % 2]
                    about = Random(f"{self.seed}:{name}:{kind}")  # of a scene that is asked again, the same thing
                    pair = words.ask(scene, kind, language, about, vocabulary, wordings)
                    yield _record(category, kind, language, image, talks.conversation([pair], talks.TAG))

    def pictures(self) -> Iterator[dict]:
        for index in range(self.count):
            *scenes, shared = world.sample_pair(f"{self.seed}:pictures", "held_out", index, EVERYDAY)
            rng, images = Random(f"exam:{self.seed}:pictures:{index}"), []
            for number, scene in enumerate(scenes, 1):
                images.append(self.save(f"pictures_{index:04d}_{number}", world.render(scene)[0]))
            for number, kind in enumerate(talks.askable_of_pair(scenes)):
                language = world.LANGUAGES[(index + number) % 2]
                pair = talks.ask_pair(scenes, shared, kind, language, rng)
                conversation = talks.conversation([pair], f"{talks.TAG}\n{talks.TAG}")
                yield _record("pictures", kind, language, ",".join(images), conversation)

    def talks(self) -> Iterator[dict]:
        for scene, name, rng in self.scenes("talks", EVERYDAY, min_things=2):
            image = self.save(name, world.render(scene)[0])
            for kind in ("where", "what", "beside"):
                if kind != "beside" or words.neighbours(scene):
                    language = rng.choice(world.LANGUAGES)
                    turns = talks.reference_talk(scene, rng, kind, language)
                    yield _record("talks", kind, language, image, talks.conversation(turns, talks.TAG))

    def captions(self) -> Iterator[dict]:
        for index, (scene, name, rng) in enumerate(self.scenes("captions", EVERYDAY)):
            image, language = self.save(name, world.render(scene)[0]), world.LANGUAGES[index % 2]
            pair = (rng.choice(words.CAPTION_REQUESTS[language]), words.caption(scene, language))
            yield _record("captions", "caption", language, image, talks.conversation([pair], talks.TAG))


def _record(category: str, kind: str, language: str, image: str, conversation: list[dict]) -> dict:
    facts = {"category": category, "kind": kind, "language": language}
    return {"image": image, **facts, "conversations": conversation}


def _blurred(scene: world.Scene, _: Random) -> Image.Image:
    return world.render(scene)[0].filter(ImageFilter.GaussianBlur(BLUR))


def _turned(scene: world.Scene, rng: Random) -> Image.Image:
    """Every thing turned further than training turns any."""
    turned = tuple(replace(thing, angle=rng.uniform(60, 300)) for thing in scene.things)
    return world.render(replace(scene, things=turned))[0]


def _grey(scene: world.Scene, _: Random) -> Image.Image:
    return world.render(scene)[0].convert("L").convert("RGB")


def _photographs() -> list[Image.Image]:
    try:
        return list(photographs().values())
    except ImportError:
        print("scikit-image is not installed: the exam has no photographs behind the things; `make real` brings it")
        return []
