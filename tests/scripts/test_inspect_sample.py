"""What is shown of a sample against what a step of training gets."""

import base64
import html
import io
import json
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dataset.readers.opening import read_samples
from dataset.vlm_dataset import ConversationDataset
from helpers.data import SOUND, TURNS, encoded, make_picture, turns, write_jsonl, write_parquet
from helpers.formats import save_tar
from helpers.models import IMAGE_TOKENS
from helpers.zoo import lenient
from model.config import IGNORE_INDEX
from model.messages import UserError
from model.processing import Rendered
from scripts import inspect_sample
from scripts.data.inspect import sample_row
from scripts.data.inspect.sample_row import find_sample, read_row
from scripts.data.inspect.token_page import as_html
from scripts.data.inspect.token_text import as_text, drawn, wants_colour
from scripts.data.inspect.tokens import entries

LENGTH = 64
LINE = re.compile(r" *(\d+)(?:\.\.(\d+))? +(\d+)(?:\.\.(\d+))? +(\d+) +(\d+)  (\S+) +(.*)")


@dataclass
class Seen:
    code: int
    text: str
    page: str

    def table(self) -> list[list[int]]:
        """Place, position, branch, id and label of each token, out of the printed table."""
        tokens = []
        for found in filter(None, map(LINE.fullmatch, self.text.split("  text\n")[-1].split("\n"))):
            first, last, position, _, branch, token, trained, _ = found.groups()
            for step in range(int(last or first) - int(first) + 1):
                label = int(token) if trained == "yes" else IGNORE_INDEX
                tokens.append([int(first) + step, int(position) + step, int(branch), int(token), label])
        return tokens

    def pictures(self) -> list[np.ndarray]:
        """[height, width, 3] each, out of the page."""
        sources = re.findall(r'src="data:image/png;base64,([^"]+)"', self.page)
        return [np.asarray(Image.open(io.BytesIO(base64.b64decode(source)))) for source in sources]

    def tips(self) -> list[str]:
        """What the page says over each token of the text, not of the table."""
        return re.findall(r'<span class="t[^>]* data-tip="([^"]*)"', self.page.split("<details>")[0])


@pytest.fixture
def see(tmp_path, tower_folder, capsys):
    """see(path, number, *flags): the script at the sizes of the tests."""

    def run(path: Path, number: int, *flags: str) -> Seen:
        page = tmp_path / "page.html"
        common = [f"--vision_model={tower_folder}", f"--html={page}", f"--max_seq_len={LENGTH}"]
        code = inspect_sample.main([str(path), str(number), *common, *flags])
        return Seen(code, capsys.readouterr().out, page.read_text(encoding="utf-8"))

    return run


def columns_of(row: Rendered) -> list[list[int]]:
    columns = (np.arange(len(row)), row.positions, row.branch, row.input_ids, row.labels)
    return np.stack(columns, axis=1).tolist()


def test_every_sample_is_shown_as_training_takes_it(data_folder, processor, see):
    """One picture, two, none: ids, labels, positions, and every pixel."""
    data = ConversationDataset(read_samples(data_folder / "train.jsonl"), processor, LENGTH)
    for number in (1, 2, 3, 24):
        row = data[next(n for n in range(len(data)) if data.where(n).endswith(f":{number}"))]
        seen = see(data_folder / "train.jsonl", number)
        assert seen.code == 0 and seen.table() == columns_of(row.rendered)
        assert len(seen.pictures()) == len(row.pictures)
        for shown, pixels in zip(seen.pictures(), row.pictures, strict=True):
            assert np.array_equal(shown, pixels.permute(1, 2, 0).numpy())


def test_two_pictures_side_by_side_have_a_span_each(folder, see):
    record = {"image": ["a.png", "b.png"], "conversations": turns(2)}
    seen = see(write_jsonl(folder / "train.jsonl", [record]), 1)
    for number, first in ((1, 4), (2, 4 + IMAGE_TOKENS)):
        last = first + IMAGE_TOKENS - 1
        assert f"[picture {number}: tokens {first}..{last}]" in seen.text
        assert f"<b>picture {number}: tokens {first} to {last}</b>" in seen.page
        assert f"token {last} · position {last} · picture {number}, patch in row 2, column 2" in seen.page
    assert seen.page.count("<i data-tip") == 2 * IMAGE_TOKENS


def test_tips_and_table_of_the_page_say_what_the_terminal_says(folder, see):
    seen = see(write_jsonl(folder / "train.jsonl", [SOUND]), 1)
    for place, position, branch, token, label in seen.table():
        learnt = "trained" if label != IGNORE_INDEX else "not trained"
        if not 4 <= place < 4 + IMAGE_TOKENS:
            assert f"token {place} · position {position} · branch {branch} · id {token} · {learnt}" in seen.tips()
            cells = "".join(f"<td>{cell}</td>" for cell in (place, position, branch, token, label))
            assert f"<tr>{cells}" in seen.page
    assert f"token 4 to {3 + IMAGE_TOKENS} · position 4 to {3 + IMAGE_TOKENS} · branch 0 · id 34 · not" in seen.page


def test_neighbours_about_one_picture_are_its_branches(folder, processor, see):
    questions = [[{"role": "user", "content": f"<image>\nIs it {n}?"}, TURNS[1]] for n in range(4)]
    records = [{"image": "b.png", "conversations": TURNS}, *({"image": "a.png", "conversations": q} for q in questions)]
    path = write_jsonl(folder / "train.jsonl", records)
    seen = see(path, 4)
    row = ConversationDataset(read_samples(path), processor, LENGTH)[1].rendered
    assert row.branch.max() == 4 and seen.table() == columns_of(row)
    assert "4 conversations begin alike" in seen.text and "this sample is branch 3" in seen.text
    assert "branch 3, train.jsonl:4, this sample" in seen.text and "branch 1, train.jsonl:2\n" in seen.text
    assert len(seen.pictures()) == 1 and seen.page.count('<section class="branch later own">') == 1


def test_rows_are_those_of_the_whole_file_wherever_one_begins(folder, processor):
    """Lines that share rows by chance, of text and of pictures, with bad ones between them."""
    rng, records = np.random.default_rng(4), []
    for _ in range(150):
        picture = rng.choice(["a.png", "b.png", "missing.png", ""], p=[0.4, 0.25, 0.1, 0.25])
        question = "<image>" * bool(picture) + " ".join(["Is it"] * rng.integers(1, 4))
        messages = [
            {"role": "user", "content": question},
            {"role": "assistant", "content": "cat " * rng.integers(1, 9)},
        ]
        records.append({"image": [str(picture)] if picture else [], "conversations": messages})
    records[70:110] = [{"conversations": turns(0)}] * 40  # a long run without any picture
    samples = read_samples(write_jsonl(folder / "train.jsonl", records))
    whole = ConversationDataset(samples, processor, 40, lenient())
    ends, usable = np.cumsum(whole.conversations_a_row), 0
    rejected = {one.where for one in whole.checked.rejections()}
    for index in range(len(samples)):
        seen = read_row(samples, index, processor, 40)
        assert (seen.refusal is not None) == (samples.where(index) in rejected)
        if not seen.refusal:
            number = int(np.searchsorted(ends, usable, side="right"))
            assert seen.rendered == whole.rendered(number)
            assert seen.conversations.index(seen.where) == usable - (ends[number] - whole.conversations_a_row[number])
            usable += 1
    assert usable == ends[-1] and 0 < len(rejected) < 40 and whole.conversations_a_row.max() > 4


def test_a_long_answer_is_cut_as_in_training(folder, processor, see):
    path = write_jsonl(folder / "train.jsonl", [{"image": "a.png", "conversations": turns(1, "cat " * 99)}])
    seen, whole = see(path, 1), len(processor.render(turns(1, "cat " * 99)))
    assert seen.code == 0 and len(seen.table()) == LENGTH
    assert f"the last {whole - LENGTH} tokens of this sample have no room" in seen.text


def test_what_training_leaves_out_is_shown_with_its_reason(folder, processor, see):
    late = [{"role": "user", "content": "word " * 80 + "<image>"}, TURNS[1]]
    records = [
        {"image": "a.png", "conversations": late},
        {"image": ["a.png", "no.png"], "conversations": turns(2)},
        {"image": "a.png", "conversations": turns(2)},
        {"conversations": [{"role": "user", "content": "word " * 80}, TURNS[1]]},
        {"conversations": [{"role": "robot", "content": "hi"}, TURNS[1]]},
        SOUND,
    ]
    path = write_jsonl(folder / "train.jsonl", records)
    reasons = ConversationDataset(read_samples(path), processor, LENGTH, lenient()).checked.rejections()
    assert len(reasons) == 5
    for number, rejected in enumerate(reasons, 1):
        seen = see(path, number)
        assert seen.code == 1 and f"training leaves this sample out: {rejected.reason}" in seen.text
        assert html.escape(rejected.reason) in seen.page
        if number in (1, 4):
            assert " beyond " in seen.text and "has no room within --max_seq_len" in seen.page
            assert len(seen.table()) == len(processor.render(records[number - 1]["conversations"])) > LENGTH
        if number == 2:
            assert len(seen.pictures()) == 1 and "it cannot be opened" in seen.text and "cannot be opened" in seen.page


def test_plain_text_and_parquet(tmp_path, processor, see):
    seen = see(write_jsonl(tmp_path / "texts.jsonl", [{"text": "a cat"}, {"text": "a dog"}]), 2)
    assert "«a dog<|im_end|>»" in seen.text and not seen.pictures()
    table = write_parquet(tmp_path / "t.parquet", [json.dumps(TURNS)], [encoded(make_picture(3))])
    seen = see(table, 1)
    assert np.array_equal(seen.pictures()[0], processor.pixels(make_picture(3)).permute(1, 2, 0).numpy())
    assert f"picture 1 of {table}:1" in seen.text


class Names(HTMLParser):
    """Of all tags and attributes of a page."""

    def __init__(self):
        super().__init__()
        self.tags, self.attributes = set(), set()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes.update(name for name, _ in attrs)


HOSTILE = "<script>alert(1)</script>\x1b[31m\x9b2J\u202e\"'&<|im_end|>$title\u2028<image_>螃"


def test_hostile_text_steers_neither_terminal_nor_page(folder, processor):
    name = '"><img src=x onerror=alert(1)>\x1b[2J$notes.png'
    make_picture(1).save(folder / "images" / "odd.png")
    (folder / "images" / "odd.png").rename(folder / "images" / name)
    answered = [{"role": "user", "content": f"<image>{HOSTILE}"}, {"role": "assistant", "content": HOSTILE}]
    samples = read_samples(write_jsonl(folder / "\x1b[2J<b>.jsonl", [{"image": name, "conversations": answered}]))
    row = read_row(samples, 0, processor, 900)
    assert row.refusal is None
    text, page = (as_text(row, processor.tokenizer, colour=False), as_html(row, processor.tokenizer).decode())
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert "\x1b" not in re.sub("\x1b\\[[0-9;]+m", "", as_text(row, processor.tokenizer, colour=True))
    assert not re.search("[\x00-\x09\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2028]", page)
    assert "<script" not in page and "<img src=x" not in page and "<b>.jsonl" not in page and "$notes.png" in page
    shown = [entry.id for entry in entries(row, processor.tokenizer) if not entry.picture]
    assert shown == row.rendered.input_ids[~row.rendered.image_mask].tolist()
    names = Names()
    names.feed(page)
    assert names.attributes == {"lang", "charset", "http-equiv", "content", "name", "class", "data-tip", "alt", "src",
                                "style", "type", "id", "checked"}  # fmt: skip
    assert not names.tags & {"script", "iframe", "a", "form", "link"} and "default-src 'none'" in page


def test_colour_only_where_it_is_wanted(folder, processor, monkeypatch):
    row = read_row(read_samples(write_jsonl(folder / "train.jsonl", [SOUND])), 0, processor, LENGTH)
    text = as_text(row, processor.tokenizer, colour=True)
    assert "\x1b[1;32ma cat<|im_end|>\x1b[0m" in text and "\x1b[35m<|im_start|>\x1b[0m" in text and "▀" in text
    assert "\x1b" not in as_text(row, processor.tokenizer, colour=False)

    class Terminal(io.StringIO):
        isatty = staticmethod(lambda: True)

    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.delenv("NO_COLOR", raising=False)
    assert wants_colour(Terminal()) and not wants_colour(io.StringIO())
    monkeypatch.setenv("NO_COLOR", "1")
    assert not wants_colour(Terminal())


def test_a_picture_in_blocks_has_its_colours():
    pixels = torch.zeros(3, 28, 28, dtype=torch.uint8)
    pixels[0, :, :14], pixels[2, :14, 14:] = 255, 255  # left red; right blue over black
    lines = list(drawn(pixels))
    assert len(lines) == 24 and {line.count("▀") for line in lines} == {48}
    corners = [(line.split("▀")[0], line.split("▀")[-2]) for line in (lines[0], lines[-1])]
    codes = [[re.findall("5;([0-9]+)", block) for block in pair] for pair in corners]
    assert codes == [[["196", "196"], ["21", "21"]], [["196", "196"], ["16", "16"]]]


def test_characters_of_several_tokens_are_shown_whole(folder, processor, see):
    answered = [TURNS[0], {"role": "assistant", "content": "螃😀"}]
    seen = see(write_jsonl(folder / "train.jsonl", [{"image": "a.png", "conversations": answered}]), 1)
    assert "«螃😀<|im_end|>»" in seen.text and "‹" in seen.text
    assert seen.page.count('<span class="group">') == 2 and '<span class="group">螃 = ' in seen.page


def test_numbers_are_those_of_messages(folder):
    lines = ["", json.dumps(SOUND), "", json.dumps(SOUND), ""]
    (folder / "train.jsonl").write_text("\n".join(lines))
    path = folder / "train.jsonl"
    samples = read_samples(path)
    assert [find_sample(samples, path, number) for number in ("2", "4")] == [0, 1]
    for number in (-1, 0, 1, 3, 5, 10**9):
        with pytest.raises(ValueError, match=f"has no sample {number}: it has 2 samples, from .*:2 to .*:4"):
            find_sample(samples, path, str(number))


def test_refusals_are_one_sentence(folder, see):
    path = write_jsonl(folder / "train.jsonl", [SOUND])
    wrong = {("9",): "has no sample 9", ("1", "--images_path=nowhere"): "does not exist",
             ("1", "--html=nowhere/page.html"): "there is no folder nowhere", ("1", "--max_seq_len=0"): None,
             ("1", f"--vision_model={folder}"): "has no config.json"}  # fmt: skip
    for (number, *flags), sentence in wrong.items():
        with pytest.raises(SystemExit) as stopped:
            inspect_sample.main([str(path), number, *flags])
        assert sentence is None or sentence in str(stopped.value)
    with pytest.raises(SystemExit, match="does not exist"):
        inspect_sample.main([str(folder / "trian.jsonl"), "1"])


def test_who_waits_is_told_why(tmp_path, processor, monkeypatch):
    monkeypatch.setattr(sample_row, "MANY", 20)
    samples, said = read_samples(write_jsonl(tmp_path / "texts.jsonl", [{"text": "a cat"}] * 60)), []
    row = read_row(samples, 50, processor, LENGTH, said.append)
    assert row.where.endswith(":51") and said and all("samples rendered to find the row's ends" in s for s in said)


def test_samples_without_numbers_are_found_by_what_messages_call_them(tmp_path):
    for name in ("tea_01.png", "dog_01.png"):
        make_picture(0).save(tmp_path / name)
    photos = read_samples(tmp_path)
    found = [find_sample(photos, tmp_path, called) for called in ("tea_01.png", "1", "dog_01.png")]
    assert found == [1, 0, 0]
    content = (tmp_path / "tea_01.png").read_bytes()
    files = [(f"{key:04}.{kind}", content if kind == "png" else b"tea") for key in (5, 6, 7) for kind in ("png", "txt")]
    path = save_tar(tmp_path / "x.tar", files)
    assert [find_sample(read_samples(path), path, called) for called in ("0006", "2", "3")] == [1, 1, 2]
    with pytest.raises(UserError, match=r"has no sample 0009: it has 3 samples, from .*x\.tar:0005 to .*x\.tar:0007"):
        find_sample(read_samples(path), path, "0009")
