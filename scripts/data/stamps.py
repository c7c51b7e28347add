"""The stamps of Tux Paint: pictures with captions in many languages, where Debian installs them.

The package is tuxpaint-stamps-default, GPL-2: it is read where it lies, and nothing of it is a part of this project.
Beside each picture stands a .txt: the English caption, then a line a language, `zh_CN.utf8=...`.
"""

import re
from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from random import Random

from PIL import Image

from dataset.emoji_world import IMAGE_SIZE, LANGUAGES
from model.messages import UserError, did_you_mean

INSTALL = "apt-get install tuxpaint-stamps-default"
# What a folder's stamps are; the deepest folder that has an entry counts, and without one nobody asks for the kind.
KINDS = {
    "animals/birds": ("A bird.", "鸟。"),
    "animals/fish": ("A sea animal.", "海洋动物。"),
    "animals/insects": ("A bug.", "虫子。"),
    "animals/mammals": ("A mammal.", "哺乳动物。"),
    "animals/marsupials": ("A mammal.", "哺乳动物。"),
    "animals/shellfish": ("A sea animal.", "海洋动物。"),
    "clothes": ("A thing to wear.", "衣物。"),
    "food/fruit": ("A fruit.", "水果。"),
    "food/vegetables": ("A vegetable.", "蔬菜。"),
    "hobbies/music": ("A musical instrument.", "乐器。"),
    "household": ("A household item.", "家庭用品。"),
    "household/tools": ("A tool.", "工具。"),
    "plants": ("A plant.", "植物。"),
    "seasonal": ("A thing for a holiday.", "节日用品。"),
    "space": ("A thing in space.", "太空中的东西。"),
    "sports": ("A thing for sports.", "体育用品。"),
    "symbols/alphabets": ("A letter.", "字母。"),
    "symbols/alphabets/asl": ("A hand sign.", "手语。"),
    "symbols/chess": ("A chess piece.", "棋子。"),
    "symbols/math": ("A number or a sign of arithmetic.", "数字或算术符号。"),
    "symbols/money": ("Money.", "钱。"),
    "symbols/music": ("A sign of music.", "音乐符号。"),
    "town": ("A building.", "建筑物。"),
    "town/flags": ("A flag.", "旗子。"),
    "town/roadsigns": ("A road sign.", "路标。"),
    "vehicles": ("A vehicle.", "交通工具。"),
}
# Slips of the set's Chinese that would teach nonsense: its lion is an onion, its bear a pear, its yak "nonsense".
CORRECTED = {
    "A balsam.": "凤仙花。",
    "A bear.": "熊。",
    "A colorful bow.": "彩色蝴蝶结。",
    "A lion.": "狮子。",
    "A mine.": "矿井。",
    "A prune.": "李子。",
    "A sliced lime.": "青柠片。",
    "A toucan.": "巨嘴鸟。",
    "A wishing well.": "许愿井。",
    "A xanthia.": "黄夜蛾。",
    "A yak.": "牦牛。",
    "Anthurium": "红掌。",
    "Balsam.": "凤仙花。",
    "Times.": "乘。",
}
ARTICLE = re.compile("(A|An|The|Some|Two|Our) ")
MEASURE = re.compile("^(一[只个条朵支颗块片辆艘把座顶枚道栋位棵株匹头])")


@dataclass(frozen=True)
class Stamp:
    picture: Path
    folder: str  # below the stamps' own, as "animals/birds"
    captions: dict[str, str]  # by language, of those that the set has

    @property
    def kind(self) -> dict[str, str]:
        """What its folder holds, by language; empty where KINDS does not say."""
        parts = self.folder.split("/")
        folders = ["/".join(parts[:count]) for count in range(len(parts), 0, -1)]
        found = next((KINDS[folder] for folder in folders if folder in KINDS), ())
        return dict(zip(LANGUAGES, found, strict=False))

    @property
    def name(self) -> dict[str, str]:
        """Its caption where that is a name, `A frog.`, and no remark, `Eat your broccoli!`; by language."""
        names = {}
        english = re.sub(r" \(.*?\)|[.!]+$", "", self.captions["en"])
        words = english.split()
        if not re.search("[.!?,;:…—]", english) and (len(words) <= 6 if ARTICLE.match(english) else len(words) <= 2):
            names["en"] = english + "."
            chinese = re.sub("（.*?）|[。！]+$|\\s", "", self.captions.get("zh", ""))
            if re.fullmatch("[\u4e00-\u9fff]{1,8}[ａ-ｚＡ-Ｚ]?", chinese):
                names["zh"] = MEASURE.sub("", chinese) + "。"
        return names


def read_stamps(folder: Path) -> tuple[list[Stamp], dict[str, int]]:
    """The PNG stamps that have an English caption, sorted, and how many others there are. Raises UserError if none."""
    if not folder.is_dir():
        raise UserError(f"--stamps {folder} is no folder{did_you_mean(folder)}: `{INSTALL}` puts the stamps there")
    stamps = []
    pictures = sorted(folder.rglob("*.png"))
    for picture in pictures:
        if captions := _captions(picture.with_suffix(".txt")):
            stamps.append(Stamp(picture, picture.parent.relative_to(folder).as_posix(), captions))
    if not stamps:
        raise UserError(f"--stamps {folder} holds no .png with a .txt beside it: `{INSTALL}` installs the stamps")
    return stamps, {"without a caption": len(pictures) - len(stamps), "as SVG alone": len(list(folder.rglob("*.svg")))}


def _captions(path: Path) -> dict[str, str]:
    """English and Chinese, where they stand in the file; empty without English."""
    if not path.is_file():
        return {}
    english, *others = path.read_text(encoding="utf-8").splitlines() or [""]
    if not english.strip():
        return {}
    captions = {"en": english.strip()}
    for line in others:
        language, _, text = line.partition("=")
        if language == "zh_CN.utf8" and text.strip():
            captions["zh"] = text.strip()
    if captions["en"] in CORRECTED:
        captions["zh"] = CORRECTED[captions["en"]]
    return captions


def families(stamps: list[Stamp]) -> list[list[Stamp]]:
    """Stamps that must stand on one side: of one caption, or of one name in their folder but for what it ends with.

    So frog and frog-1, tower_round and tower_round_flag, tugboat and tugboat_mirror.
    """
    leader: dict[str, str] = {}  # of each mark, another of the same family; a mark without an entry leads

    def lead(mark: str) -> str:
        while mark in leader:
            mark = leader[mark]
        return mark

    def join(first: str, second: str) -> None:
        if (first := lead(first)) != (second := lead(second)):
            leader[second] = first

    marks = [f"{stamp.folder}/{re.sub('[^a-z]+$', '', stamp.picture.stem.lower())}" for stamp in stamps]
    marks = [
        mark if mark[-1] != "/" else f"{mark}{stamp.picture.stem}" for mark, stamp in zip(marks, stamps, strict=True)
    ]
    known = set(marks)
    for mark, stamp in zip(marks, stamps, strict=True):
        join(f"caption {stamp.captions['en'].casefold()}", mark)
        for place in re.finditer("[^a-z/]", mark):
            if mark[: place.start()] in known:
                join(mark[: place.start()], mark)
    found = defaultdict(list)
    for mark, stamp in zip(marks, stamps, strict=True):
        found[lead(mark)].append(stamp)
    return list(found.values())


def split(stamps: list[Stamp], share: float, seed: int) -> tuple[list[Stamp], list[Stamp]]:
    """Stamps to learn from, and those held out: of each kind a share, whole families."""
    return split_families(families(stamps), share, f"stamps:{seed}")


def split_families(families: list[list], share: float, seed: str) -> tuple[list, list]:
    """As split does, of any things that have a kind."""
    by_kind: dict[str, list[list]] = defaultdict(list)
    for family in families:
        by_kind[family[0].kind.get("en", "")].append(family)
    train, held_out = [], []
    for kind, of_kind in sorted(by_kind.items()):
        Random(f"{seed}:{kind}").shuffle(of_kind)
        wanted, taken = share * sum(map(len, of_kind)), 0
        for family in of_kind:
            out = taken + len(family) / 2 <= wanted
            (held_out if out else train).extend(family)
            taken += len(family) if out else 0
    return train, held_out


def draw(stamp: Stamp, rng: Random) -> Image.Image:
    """The stamp on white, large, somewhere; RGB, 224 x 224.

    The shipped tower told 24 kinds of stamps apart no better where they stood on coloured grounds, or were small.
    """
    cut_out = open_cut_out(stamp)
    scale = rng.uniform(0.6, 1.0) * IMAGE_SIZE / max(cut_out.size)
    size = tuple(max(1, round(side * scale)) for side in cut_out.size)
    cut_out = cut_out.resize(size, Image.Resampling.LANCZOS)
    picture = Image.new("RGB", (IMAGE_SIZE, IMAGE_SIZE), "white")
    picture.paste(cut_out, tuple(rng.randint(0, IMAGE_SIZE - side) for side in size), cut_out)
    return picture


def open_cut_out(stamp: Stamp) -> Image.Image:
    with Image.open(stamp.picture) as opened:
        return opened.convert("RGBA")
