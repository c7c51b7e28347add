"""Languages by their letters: which writing systems a text uses. English and French are both Latin here."""

import re

LETTERS = {
    "Korean": "\u1100-\u11ff\u3131-\u318e\uac00-\ud7a3",
    "Japanese": "\u3041-\u3096\u30a1-\u30fa\u30fc\u31f0-\u31ff\uff66-\uff9d",  # kana
    "Chinese": "\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff",
    "Latin": "A-Za-z\u00aa\u00ba\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u024f\u1e00-\u1eff\uff21-\uff3a\uff41-\uff5a",
    "Cyrillic": "\u0400-\u052f",
    "Arabic": "\u0600-\u06ff\u0750-\u077f\u08a0-\u08ff\ufb50-\ufdff\ufe70-\ufeff",
    "Devanagari": "\u0900-\u097f",
    "Greek": "\u0370-\u03ff\u1f00-\u1fff",
    "Hebrew": "\u0590-\u05ff",
    "Thai": "\u0e00-\u0e7f",
}
OTHER = "other"
NAMED = {name: re.compile(f"[{letters}]") for name, letters in LETTERS.items()}
ANY_NAMED = re.compile(f"[{''.join(LETTERS.values())}]+")
ANY_LETTER = re.compile(r"[^\W\d_]")


def writing_systems(text: str) -> tuple[str, ...]:
    """Of LETTERS, in their order, and OTHER; none where there is no letter. Chinese beside kana is Japanese."""
    found = [name for name, letter in NAMED.items() if letter.search(text)]
    if "Japanese" in found and "Chinese" in found:
        found.remove("Chinese")
    if ANY_LETTER.search(ANY_NAMED.sub("", text)):
        found.append(OTHER)
    return tuple(found)
