"""Languages by their letters."""

import pytest

from scripts.data.check.writing import writing_systems


@pytest.mark.parametrize(
    ("text", "systems"),
    [
        ("a cat", ("Latin",)), ("Größe, œuvre, Việt", ("Latin",)), ("猫", ("Chinese",)), ("猫です", ("Japanese",)),
        ("カメラ", ("Japanese",)), ("コーヒー", ("Japanese",)), ("고양이", ("Korean",)),
        ("кот", ("Cyrillic",)), ("قطة", ("Arabic",)),
        ("बिल्ली", ("Devanagari",)), ("γάτα", ("Greek",)), ("חתול", ("Hebrew",)), ("แมว", ("Thai",)),
        ("პურ", ("other",)), ("cat 猫", ("Chinese", "Latin")), ("", ()), ("3 + 4 × 5 = ?! @@ 🐱 、。", ()),
    ],
)  # fmt: skip
def test_letters_tell_writing_systems(text, systems):
    assert writing_systems(text) == systems
