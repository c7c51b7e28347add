"""Lines and pictures made by chance: left out or used, never a crash, never ten seconds."""

import io
import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dataset.readers.opening import read_samples
from dataset.vlm_dataset import ConversationDataset
from helpers.data import TURNS, encoded, make_picture
from helpers.zoo import SOUND_LINE, lenient, make_zoo, odd_pictures, turns, with_picture, write_lines
from model.pictures import MAX_PIXELS, SampleError, open_picture

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=8,
)
MESSAGE = st.fixed_dictionaries({}, optional={"role": st.sampled_from(["user", "assistant", "system"]) | JSON,
                                              "content": st.text(max_size=30) | JSON})  # fmt: skip
NAME = st.sampled_from(["a.png", "b.png", "half.png", "../a.png", "pipe.png"]) | st.text(max_size=30)
TALK = {"conversations": st.lists(MESSAGE, max_size=3) | st.just(TURNS) | JSON,
        "image": NAME | st.lists(NAME, max_size=2) | JSON}  # fmt: skip
TEXT = {"text": st.text(max_size=30) | JSON}
RECORD = st.one_of(*(st.fixed_dictionaries({}, optional=fields) for fields in (TALK, TEXT, TALK | TEXT)))
EDIT = st.tuples(st.integers(0, 10**4), st.binary(max_size=6), st.integers(0, 40))  # place, new bytes, how many go


def edited(content: bytes, edits: list[tuple[int, bytes, int]]) -> bytes:
    for place, new, gone in edits:
        place %= len(content) + 1
        content = content[:place] + new + content[place + gone :]
    return content


SOUND_LINES = [json.dumps(record).encode() for record in (turns(), with_picture("a.png"), {"text": "a cat"})]
LINE = st.one_of(
    st.binary(max_size=60), RECORD.map(lambda record: json.dumps(record).encode()),
    st.builds(edited, st.sampled_from(SOUND_LINES), st.lists(EDIT, min_size=1, max_size=3)),
)  # fmt: skip
SOUND_PICTURES = [encoded(make_picture(4, 24), kind) for kind in ("JPEG", "PNG", "WEBP", "BMP", "GIF")] + [
    content for content, _ in odd_pictures().values()
]
PICTURE = st.binary(max_size=60) | st.builds(
    edited, st.sampled_from(SOUND_PICTURES), st.lists(EDIT, min_size=1, max_size=3)
)


def fuzz(examples: int, strategy: st.SearchStrategy, check) -> None:
    """Every example within ten seconds."""
    limits = {"deadline": 10_000, "database": None, "derandomize": True, "suppress_health_check": list(HealthCheck)}
    settings(max_examples=examples, **limits)(given(strategy)(check))()


def fuzz_lines(examples: int, folder: Path, processor) -> dict[str, int]:
    """Two sound lines stay what they are, whatever stands between them."""
    make_zoo(folder)
    path, outcomes = folder / "train.jsonl", {"sound": 0, "dropped": 0, "bad": 0, "blank": 0}

    def check(line: bytes) -> None:
        line = line.replace(b"\n", b" ")
        write_lines(path, [SOUND_LINE.encode(), line, SOUND_LINE.encode()])
        data = ConversationDataset(read_samples(path), processor, 64, lenient())
        report = data.report
        assert all(rejected.where == f"{path}:2" for rejected in (*report.bad, *report.dropped))
        kind = "bad" if report.bad else "dropped" if report.dropped else "sound" if line.strip() else "blank"
        assert report.conversations == 2 + (kind == "sound")
        for row in range(len(data)):
            assert any(data[row][0].trained)
        outcomes[kind] += 1

    fuzz(examples, LINE, check)
    return outcomes


def fuzz_pictures(examples: int) -> dict[str, int]:
    outcomes = {"picture": 0, "refused": 0}

    def check(content: bytes) -> None:
        try:
            picture = open_picture(io.BytesIO(content))
        except SampleError:
            outcomes["refused"] += 1
            return
        assert picture.mode == "RGB" and 0 < picture.width * picture.height <= MAX_PIXELS
        outcomes["picture"] += 1

    fuzz(examples, PICTURE, check)
    return outcomes


@pytest.mark.filterwarnings("ignore")
def test_300_lines_and_300_pictures_by_chance(tmp_path, processor):
    lines, pictures = fuzz_lines(300, tmp_path, processor), fuzz_pictures(300)
    assert min(lines["bad"], lines["sound"], pictures["picture"], pictures["refused"]) > 10, (lines, pictures)


@pytest.mark.soak
@pytest.mark.filterwarnings("ignore")
def test_10000_lines_and_10000_pictures_by_chance(tmp_path, processor):
    print("\n", fuzz_lines(10_000, tmp_path, processor), fuzz_pictures(10_000))
