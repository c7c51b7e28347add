"""scripts/check_data.py: every planted defect is found where it was planted, nothing else is, and training agrees."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image, ImageEnhance

from dataset import check
from dataset.quarantine import Quarantine
from dataset.readers import json_lines
from dataset.readers.opening import read_samples
from dataset.samples import BAD, DAMAGED, DROPPED, DataError
from dataset.vlm_dataset import ConversationDataset
from helpers.data import encoded, make_picture, write_jsonl, write_parquet
from helpers.zoo import LINES, LONGEST, as_bytes, lenient, make_zoo, turns, with_picture, write_lines
from model.processing import VLMProcessor
from scripts import check_data
from scripts.data.check.findings import REJECTED, TITLES, Tally
from scripts.data.check.survey import Surveyor, survey

REPORTS = ("report.json", "report.md", "sheet.png")
MOST = 300  # tokens: a picture takes 196
KINDS = {  # of the zoo's lines; its pictures tell by their reason
    "line-too-long": ["too long a line"],
    "no-object": ["a list", "a text", "null", "a number"],
    "no-turns": ["nothing", "no turns", "turns as text", "turns as an object", "turns of text",
                 "900 deep"],
    "foreign-turns": ["other names"],
    "content": ["no content", "content null", "content a number", "content parts"],
    "role": ["unknown role", "no role", "role a list"],
    "text": ["empty text", "text null", "text a number"],
    "text-with-picture": ["a text with a picture"],
    "no-unicode": ["half a pair in a question", "half a pair in an answer", "half a pair in a text"],
    "tags": ["no tag", "no picture", "more tags", "fewer tags", "a tag in the answer"],
    "many-pictures": ["1,001 pictures"],
    "picture-name": ["an empty name", "name a number", "name true", "names numbers", "name an object", "zero byte",
                     "too long a name", "surrogate name", "links in a circle"],
    "picture-outside": ["parent", "parent by a detour", "a sibling that begins alike", "absolute", "a device",
                        "a link outwards", "a folder's link outwards", "a link to a device"],
    "picture-address": ["https", "file address"],
    "picture-no-file": ["a pipe", "a link to a pipe", "a folder"],
    "picture-missing": ["home", "absent", "a name with escapes"],
    "picture-broken": ["a file as a folder"],
}  # fmt: skip
KIND_OF_LINE = {line: kind for kind, lines in KINDS.items() for line in lines}


def kind_of_zoo(name: str, reason: str) -> str:
    if name in LINES:
        return KIND_OF_LINE.get(name, "no-json")
    return "picture-broken" if "cannot be read" in reason or name == "square.png" else "picture-size"


def pictured(name: str | list[str], question: str, answer: str = "a cat") -> dict:
    tags = "<image>" * (1 if isinstance(name, str) else len(name))
    return {"image": name, **turns(f"{tags}\n{question}", answer)}


def smooth_picture(seed: int) -> Image.Image:
    """What a copy can be recognised by."""
    return make_picture(seed, 6).resize((96, 96), Image.Resampling.BICUBIC)


def plant_repeats(images: Path) -> list[tuple[list[dict], list[str]]]:
    """Records of what training does not mind, and the kinds that are to be found at the last of each."""
    first = smooth_picture(1000)
    first.save(images / "first.png")
    (images / "same.png").write_bytes((images / "first.png").read_bytes())
    first.save(images / "jpeg.jpg", quality=60)
    first.resize((60, 60), Image.Resampling.BICUBIC).save(images / "small.png")
    ImageEnhance.Brightness(first).enhance(0.95).save(images / "dark.webp", quality=80)
    for name in ("held_out.png", "held_out_too.png", "held_out_similar.png"):
        smooth_picture(hash_of(name)).save(images / name)
    smooth_picture(hash_of("held_out_similar.png")).save(images / "similar.jpg", quality=70)
    many = "a cat and " * 400
    return [
        ([pictured("first.png", "Once?")], []),
        ([pictured("same.png", "Twice?")], ["same-picture"]),
        ([pictured("jpeg.jpg", "As JPEG?")], ["similar-picture"]),
        ([pictured("small.png", "Smaller?")], ["similar-picture"]),
        ([pictured("dark.webp", "Darker?")], ["similar-picture"]),
        ([pictured("first.png", "Same?")] * 2, ["same-sample"]),
        ([turns("The same without a picture?")] * 2, ["same-sample"]),
        ([{"text": "One text."}, {"text": "One text."}], ["same-sample"]),
        ([turns("Long?", many)], ["cut"]),
        ([pictured("first.png", "Long, with a picture?", many)], ["cut"]),
        ([{"text": many}], ["cut"]),
        ([pictured(["first.png", "first.png"], "Two that do not fit?")], ["too-long"]),
        ([turns("Too long a question? " * 100)], ["nothing-to-learn"]),
        ([{"conversations": [{"role": "user", "content": "Nobody answers?"}]}], ["nothing-to-learn"]),
        ([turns("Nothing?", "")], ["empty-answer"]),
        ([turns("Nothing but a space?", " ")], ["empty-answer"]),
        ([pictured("held_out.png", "A question of its own?")], ["held-out-picture"]),
        ([pictured("held_out_too.png", "Asked there, too?")], ["held-out-picture", "held-out-question"]),
        ([pictured("similar.jpg", "Similar to one there?")], ["held-out-similar"]),
        ([turns("Without a picture, there, too?")], ["held-out-question"]),
        ([{"text": "A text that is held out."}], ["held-out-question"]),
        ([{"conversations": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "!"}]}], ["foreign-turns"]),
    ]


def hash_of(name: str) -> int:
    return 2000 + sum(name.encode())


def write_held_out(folder: Path) -> Path:
    return write_jsonl(
        folder / "held_out.jsonl",
        [
            pictured("held_out.png", "What is it?"), pictured("held_out_too.png", "Asked there, too?", "another"),
            pictured("held_out_similar.png", "What is it?"), turns("Without a picture, there, too?"),
            {"text": "A text that is held out."},
        ],
    )  # fmt: skip


@pytest.fixture
def planted(tmp_path, monkeypatch) -> tuple[Path, list[tuple[int, str]]]:
    """A file with every kind of defect once, between sound lines; and (line, kind) of each."""
    monkeypatch.setattr(json_lines, "MAX_LINE", LONGEST)
    zoo = [([line], [kind_of_zoo(name, reason)]) for name, line, reason in make_zoo(tmp_path)]
    images, lines, wanted = tmp_path / "images", [], []
    write_held_out(tmp_path)
    for number, (records, kinds) in enumerate(zoo + plant_repeats(images)):
        lines += map(as_bytes, records)
        wanted += [(len(lines), kind) for kind in kinds]
        if number % 4 == 0:
            make_picture(number, 40).save(images / f"sound_{number}.png")
            lines.append(as_bytes(pictured(f"sound_{number}.png", f"What is sound {number}?")))
        lines.append(as_bytes(turns(f"What is number {number}?", "猫")))
    return write_lines(tmp_path / "train.jsonl", lines), wanted


def run(path: Path, *flags: object) -> tuple[int, Path]:
    """The exit status, and the folder of the report."""
    folder = path.parent / "report"
    try:
        check_data.main([str(path), "--report", str(folder), *map(str, flags)])
    except SystemExit as end:
        return end.code, folder
    return 0, folder


def figures(folder: Path) -> dict:
    return json.loads((folder / "report.json").read_text(encoding="utf-8"))


def test_every_planted_defect_is_found_and_nothing_else(planted, capsys):
    path, wanted = planted
    flags = ("--max_seq_len", MOST, "--held_out", path.parent / "held_out.jsonl")
    status, folder = run(path, *flags, "--workers", 2)
    last = capsys.readouterr().out.strip().splitlines()[-1]
    found = [(int(f["where"].rpartition(":")[2]), f["kind"]) for f in figures(folder)["findings"]]
    assert sorted(found) == sorted(wanted) and len(wanted) > 110
    assert len({kind for _, kind in wanted}) > 24 and not {kind for _, kind in wanted} - TITLES.keys()
    bad = [kind for _, kind in wanted if kind in REJECTED and kind not in ("too-long", "nothing-to-learn")]
    assert status == 1 and last.startswith(f"check_data: training would refuse: {len(bad)} of ")

    reports = [(folder / name).read_bytes() for name in REPORTS]
    assert run(path, *flags, "--workers", 1)[0] == 1
    assert reports == [(folder / name).read_bytes() for name in REPORTS]


def test_training_leaves_out_the_same_for_the_same_reasons(planted, tokenizer):
    path, _ = planted
    processor = VLMProcessor(tokenizer)
    data = ConversationDataset(read_samples(path), processor, MOST, lenient())
    tally = tally_of(path, processor, MOST)
    assert tally.rejected[BAD] == data.report.bad and tally.rejected[DROPPED] == data.report.dropped
    assert tally.trained.tolist() == data.report.trained_tokens.tolist() and tally.shown == data.report.pictures


def tally_of(path: Path, processor: VLMProcessor, max_seq_len: int = 64, workers: int = 1) -> Tally:
    samples = read_samples(path)
    tally = Tally(samples.where, None, max_seq_len)
    for looks, facts in survey(Surveyor(samples, processor, max_seq_len), workers):
        for look in looks:
            tally.add(look, facts)
    return tally


@pytest.mark.parametrize(
    ("bad", "lines", "share", "strict"),
    [((2,), 24, 0.05, False), ((2, 3), 24, 0.05, False), ((2, 3), 24, 0.1, False), ((2,), 24, 0.05, True),
     ((), 24, 0.0, True), ((1, 2), 2, 1.0, False), (tuple(range(1, 61)), 1000, 0.05, False),
     (tuple(range(1, 51)), 1000, 0.05, False)],
)  # fmt: skip
def test_the_verdict_is_that_of_training(bad, lines, share, strict, tmp_path, processor):
    content = [b"nonsense" if n in bad else as_bytes(turns(f"What is {n}?")) for n in range(1, lines + 1)]
    path = write_lines(tmp_path / "train.jsonl", content)
    try:
        ConversationDataset(read_samples(path), processor, 64, Quarantine(strict=strict, max_share=share))
        said = None
    except DataError as error:
        said = str(error)
    refusal = tally_of(path, processor).refusal(share, strict)
    assert (refusal is None) == (said is None)
    if refusal and "no sample" not in refusal:
        assert f"{path}:{bad[0]}: this line is no JSON" in refusal and f"{path}:{bad[0]}: this line is no JSON" in said


def test_damage_that_training_would_meet_on_its_way(data_folder, processor, monkeypatch):
    """Sound headers, half of the pixels: within the first pictures a bad sample, later a damaged one."""
    for name in ("0_0.png", "1_1.png", "12_0.png"):
        picture = data_folder / "images" / name
        picture.write_bytes(picture.read_bytes()[: picture.stat().st_size // 2])
    monkeypatch.setattr(check, "FULLY_DECODED", 6)
    tally = tally_of(data_folder / "train.jsonl", processor)
    places = {kind: [int(entry.where.rpartition(":")[2]) for entry in found] for kind, found in tally.rejected.items()}
    assert places == {BAD: [1, 2], DROPPED: [], DAMAGED: [13]} and tally.used == 21
    assert [finding.kind for finding in tally.findings] == ["picture-broken"] * 3
    assert "2 of 24" in tally.refusal(0.05, False) and tally.refusal(0.1, False) is None
    assert ":1: " in tally.refusal(1.0, True)


def test_a_process_that_dies_ends_in_a_sentence(tmp_path, monkeypatch, capsys):
    path = write_jsonl(tmp_path / "train.jsonl", [turns(f"What is {n}?") for n in range(300)])
    look = Surveyor._look
    monkeypatch.setattr(Surveyor, "_look", lambda self, n, facts: os._exit(9) if n == 290 else look(self, n, facts))
    status, folder = run(path, "--workers", 2)
    (said,) = capsys.readouterr().out.splitlines()
    assert status == 2 and said.startswith("check_data: a process that looked at samples from ") and "--workers" in said
    assert not list(folder.iterdir())


@pytest.mark.parametrize(
    ("flags", "status", "said"),
    [
        (("--images_path", "absent"), 1, "training would refuse: --images_path absent does not exist"),
        (("--held_out", "absent.jsonl"), 2, "absent.jsonl does not exist"),
        (("--max_seq_len", 0), 2, "--max_seq_len and --workers must be at least 1"),
        (("--max_seqlen", 9), 2, "did you mean --max_seq_len?"),
        (("--vision_model", "absent"), 2, "no config.json"),
    ],
)
def test_what_cannot_be_checked_is_said(flags, status, said, tmp_path, capsys):
    path = write_jsonl(tmp_path / "train.jsonl", [turns("What?")])
    assert run(path, *flags)[0] == status
    assert said in "".join(capsys.readouterr())


def test_a_file_that_cannot_be_opened_is_refused(tmp_path, capsys):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, reason in (("absent.jsonl", "does not exist"), ("empty.jsonl", "holds no sample")):
        status, folder = run(tmp_path / name)
        assert status == 1 and not folder.exists()
        assert f"check_data: training would refuse: {tmp_path / name} {reason}" in capsys.readouterr().out


def test_the_report_of_sound_data(data_folder, tower_folder, capsys):
    status, folder = run(data_folder / "train.jsonl", "--vision_model", tower_folder, "--workers", 1)
    found, text = figures(folder), (folder / "report.md").read_text(encoding="utf-8")
    assert status == 0 and capsys.readouterr().out.strip().endswith("check_data: training would start")
    assert text.splitlines()[2] == "**Training would start.**" and "Nothing to mend." in text
    assert found["samples"] == {"all": 24, "used": 24, "bad": 0, "dropped": 0, "damaged": 0, "cut": 0}
    assert found["pictures"]["different"] == found["pictures"]["shown"] == 24 and found["image_tokens"] == 4
    assert found["languages"] == {"Latin": 24} and found["findings"] == []
    for name in ("tokens", "trained_tokens"):
        rows = found[name]["histogram"]
        assert sum(count for *_, count in rows) == 24 and rows[0][0] <= found[name]["least"] <= rows[0][1]
    assert f"`--max_seq_len {found['tokens']['most']}` would hold every sample" in text


def test_pictures_of_a_parquet(tmp_path):
    """They have no names: one that several rows show is no finding, one that was encoded anew is."""
    picture, other = smooth_picture(1), encoded(smooth_picture(2))
    pictures = [encoded(picture), encoded(picture), encoded(picture, "JPEG", quality=80), other, other[:99]]
    texts = [json.dumps(turns(f"<image>What is {n}?")["conversations"]) for n in range(5)]
    path = write_parquet(tmp_path / "train.parquet", texts, pictures)
    status, folder = run(path, "--max_bad_share", 0.5, "--workers", 1)
    found = [(finding["where"], finding["kind"]) for finding in figures(folder)["findings"]]
    assert status == 0 and found == [(f"{path}:3", "similar-picture"), (f"{path}:5", "picture-broken")]
    assert "train.parquet:3`: picture 1 looks like picture 1 of train.parquet:1" in (folder / "report.md").read_text()


def test_names_cannot_steer_the_report(tmp_path):
    (tmp_path / "images").mkdir()
    path = write_jsonl(tmp_path / "train.jsonl", [with_picture("<b>|`*\n.png"), turns("What?")])
    _, folder = run(path, "--workers", 1)
    text = (folder / "report.md").read_text(encoding="utf-8")
    assert "<b>" not in text and "\\<b\\>\\|" in text


def test_the_sheet_shows_pictures_and_what_was_found(planted):
    path, _ = planted
    _, folder = run(path, "--max_seq_len", MOST, "--workers", 1)
    with Image.open(folder / "sheet.png") as sheet:
        assert sheet.width == 1200 and sheet.height > 1500
        assert len(sheet.resize((60, 60)).getcolors(3600)) > 300
