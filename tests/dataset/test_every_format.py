"""Every public format: the same samples give the same tokens, labels and pixels, whoever wrote them down."""

import contextlib
import json
from pathlib import Path

import pyarrow
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet

from dataset.formats import FORMATS
from dataset.options import FORMATS as NAMES
from dataset.options import ReadOptions
from dataset.readers import json_lines
from dataset.readers.opening import read_samples
from dataset.samples import DROPPED, BadSample, DataError, parse
from dataset.vlm_dataset import ConversationDataset
from helpers.data import encoded, make_picture, write_jsonl
from helpers.formats import ANY_TALK, TAG, WRITERS, Written, images_path, minimind
from helpers.learnt import assert_same, captioned, learnt
from helpers.models import IMAGE_SIZE, IMAGE_TOKENS
from helpers.zoo import LONGEST, SOUND_LINE, lenient, make_zoo, write_lines
from model.processing import VLMProcessor


@pytest.fixture(scope="module")
def two_hundred(tmp_path_factory, tokenizer) -> tuple[list[Written], list[tuple]]:
    samples = captioned(200)
    path = minimind(tmp_path_factory.mktemp("wanted"), samples)
    return samples, learnt(path, ReadOptions(), VLMProcessor(tokenizer, IMAGE_TOKENS, IMAGE_SIZE))


@pytest.mark.parametrize("writer", WRITERS)
def test_the_same_samples_in_every_format(writer, two_hundred, tmp_path, processor):
    samples, wanted = two_hundred
    write, recognised = WRITERS[writer]
    path, options = write(tmp_path, samples), ReadOptions(images_path=images_path(writer, tmp_path))
    reader = read_samples(path, options)
    assert f": {recognised} in " in reader.describe()
    assert_same(learnt(path, options, processor), wanted)


TEXT = st.text(st.characters(exclude_categories=("Cs",)), min_size=1, max_size=20).filter(
    lambda text: TAG not in text and "<image" not in text and text.strip()
)


@st.composite
def talks(draw) -> Written:
    """Any number of turns, pictures anywhere in the questions, maybe a system's turn ahead."""
    pictures, messages = [], []
    if draw(st.booleans()):
        messages.append({"role": "system", "content": draw(TEXT)})
    for _ in range(draw(st.integers(1, 3))):
        pieces = draw(st.lists(TEXT, min_size=1, max_size=4))
        pictures += [draw(st.integers(0, 5)) for _ in pieces[1:]]
        messages.append({"role": "user", "content": TAG.join(pieces)})
        messages.append({"role": "assistant", "content": draw(TEXT)})
    return Written(messages, [encoded(make_picture(seed, 6), "PNG") for seed in pictures])


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(samples=st.lists(talks(), min_size=1, max_size=6))
def test_any_conversation_with_any_pictures(samples, tmp_path_factory, processor):
    wanted = None
    for writer, (write, _) in ANY_TALK.items():
        folder = tmp_path_factory.mktemp("any")
        path = write(folder, samples)
        found = learnt(path, ReadOptions(images_path=images_path(writer, folder)), processor, 4000)
        wanted = wanted or found
        assert_same(found, wanted)


def test_formats_have_one_list_of_names():
    assert set(FORMATS) == set(NAMES)


# ---- what each format has of its own


def lines(path: Path, *records: dict, **options) -> list:
    return list(read_samples(write_jsonl(path, list(records)), ReadOptions(**options)))


def test_llava_names_may_hold_commas(folder):
    (folder / "images" / "a,b.png").write_bytes((folder / "images" / "a.png").read_bytes())
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a cat"}]
    sample = lines(folder / "l.jsonl", {"id": "7", "image": "a,b.png", "conversations": turns})[0]
    assert [picture.name for picture in sample.pictures] == ["a,b.png"] and sample.extra == {"id": "7"}


def test_pictures_of_messages_without_places_come_first(folder):
    talk = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What?"},
            {"role": "assistant", "content": "cats"}]  # fmt: skip
    sample = lines(folder / "m.jsonl", {"messages": talk, "images": ["a.png", "b.png"]})[0]
    assert [m["content"] for m in sample.messages] == ["Be brief.", "<image><image>\nWhat?", "cats"]


def test_ratings_leave_out_turns_and_samples(folder):
    def record(*ratings: int | None) -> dict:
        texts = [{"user": f"q{n}", "assistant": f"a{n}"} for n in range(len(ratings))]
        fives = [5] * len(ratings)
        return {"texts": texts, "images": ["a.png"], "relevance_ratings": list(ratings), "formatting_ratings": fives}

    path = write_jsonl(folder / "f.jsonl", [record(3, 5), record(2, 1), record(None, 4)])
    samples = read_samples(path, ReadOptions(min_rating=4))
    assert [m["content"] for m in samples[0].messages] == ["<image>\nq1", "a1"]
    assert len(samples[2].messages) == 4  # what nobody rated stays
    with pytest.raises(BadSample, match=r"f\.jsonl:2: no turn is rated 4 or better") as dropped:
        samples[1]
    assert dropped.value.rejected.kind == DROPPED
    assert len(read_samples(path)[1].messages) == 4


def test_the_first_of_several_right_answers_is_learnt(folder):
    sample = lines(folder / "q.jsonl", {"image": "a.png", "question": "What?", "answer": ["a cat", "cat"]})[0]
    assert [m["content"] for m in sample.messages] == ["<image>\nWhat?", "a cat"]


@pytest.mark.parametrize(
    ("names", "captions"),
    [
        (["tea.png", "red_bicycle-2.jpg", "猫_01.png"], ["red bicycle", "tea", "猫"]),
        (["cats/IMG_0001.png", "cats/rex.png", "dogs/1.png"], ["cats", "cats", "dogs"]),  # all lie in folders
        (["cats/IMG_0001.png", "tea (3).png"], ["cats", "tea"]),  # not all do
    ],
)
def test_captions_from_names(names, captions, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        make_picture(0, 8).save(tmp_path / name)
    (tmp_path / "notes.md").touch()
    (tmp_path / ".hidden.png").touch()
    reader = read_samples(tmp_path)
    assert [sample.messages[1]["content"] for sample in reader] == captions
    assert "a folder of pictures" in reader.describe()


def test_a_name_that_says_nothing_is_bad(tmp_path):
    for name in ("IMG_0001.jpg", "tea.png"):
        make_picture(0, 8).save(tmp_path / name)
    with pytest.raises(BadSample, match=r"IMG_0001\.jpg: .*'IMG_0001\.jpg' says nothing: rename it"):
        read_samples(tmp_path)[0]


def test_where_some_have_texts_the_others_lack_one(tmp_path):
    for name in ("a.png", "b.png"):
        make_picture(0, 8).save(tmp_path / name)
    (tmp_path / "a.txt").write_text("a cup of tea\n")
    reader = read_samples(tmp_path)
    assert reader[0].messages[1]["content"] == "a cup of tea"
    with pytest.raises(BadSample, match=r"b\.png: no caption stands beside it: write b\.txt"):
        reader[1]


def test_a_table_with_bad_rows(tmp_path):
    make_picture(0, 8).save(tmp_path / "a.png")
    rows = ["file_name,text", 'a.png,"a cat, a dog"', "a.png,a cat, a dog", "b.png", "../x.png,out"]
    (tmp_path / "metadata.csv").write_text("\n".join(rows), encoding="utf-8-sig")
    reader = read_samples(tmp_path)
    assert reader[0].messages[1]["content"] == "a cat, a dog"
    for number, reason in ((2, "more fields than the first line has names"), (3, "must be a caption"), (4, "outside")):
        with pytest.raises(BadSample, match=rf"metadata\.csv:{number + 1}: .*{reason}"):
            reader[number - 1]


def test_plain_text(tmp_path):
    path, long = tmp_path / "book.txt", "many words of one paragraph\n" * 200
    short = "\ufeff\n\nOne line.\nAnother.\n\n \n猫\n\n"
    path.write_bytes(short.encode() + long.encode() + b"\n\xff\xfe\n\nend")
    reader = read_samples(path)
    assert (reader[0].text, reader.where(0)) == ("One line.\nAnother.", f"{path}:3")
    assert (reader[1].text, reader.where(1)) == ("猫", f"{path}:7")
    texts = [reader[number].text for number in range(2, len(reader) - 2)]
    assert len(texts) == 3 and "\n".join(texts) == long.strip() and max(map(len, texts)) <= 2048
    with pytest.raises(BadSample, match=r"book\.txt:\d+: it is no UTF-8"):
        reader[len(reader) - 2]
    assert reader[len(reader) - 1].text == "end" and ": text in paragraphs" in reader.describe()
    table = pyarrow.table({"text": [reader[n].text for n in (0, 1)], "url": ["", ""]})
    parquet.write_table(table, tmp_path / "wiki.parquet")
    assert [sample.text for sample in read_samples(tmp_path / "wiki.parquet")] == ["One line.\nAnother.", "猫"]


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf", b" \n"])
def test_a_list_is_split_where_json_splits_it(indent, mark, tmp_path):
    texts = ("[", "]},{", '"', "\\", '\\"', "猫\u2028", "{", ",")
    records = [{"text": text, "n": [1, {"a": [text]}]} for text in texts]
    path = tmp_path / "list.json"
    path.write_bytes(mark + json.dumps(records, indent=indent, ensure_ascii=False).encode())
    reader = read_samples(path)
    assert [reader.record(number) for number in range(len(reader))] == records
    assert reader.where(2) == f"{path}:3" and "a JSON list" in reader.describe()


def test_a_list_with_bad_entries(tmp_path):
    sound = '{"text": "x"}'
    entries = [sound, "3", '{"text": }', sound, '"a"', "[1]", sound]
    path = tmp_path / "list.json"
    path.write_text(f'[{", ".join(entries)}, {{"text": "cut')
    reader = read_samples(path)
    assert len(reader) == 8
    bad = {2: "this entry is int", 3: "no JSON", 5: "this entry is str", 6: "this entry is list", 8: "no JSON"}
    for number in range(1, 9):
        if number in bad:
            with pytest.raises(BadSample, match=rf"list\.json:{number}: .*{bad[number]}"):
                reader[number - 1]
        else:
            assert reader[number - 1].text == "x"
    (tmp_path / "lines.json").write_text(f"{sound}\n{sound}\n")
    assert len(read_samples(tmp_path / "lines.json")) == 2


# ---- which format it is


def test_a_format_that_is_told_is_not_looked_for(folder):
    record = {"image": "a.png", "text": "a cat", "conversations": [{"role": "user", "content": "<image>?"},
              {"role": "assistant", "content": "yes"}]}  # fmt: skip
    path = write_jsonl(folder / "both.jsonl", [record])
    assert read_samples(path, ReadOptions(data_format="captions"))[0].messages[1]["content"] == "a cat"
    assert read_samples(path, ReadOptions(data_format="text"))[0].text == "a cat"
    assert read_samples(path).format == "captions"


def test_a_record_of_another_format_says_so(folder):
    talk = [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]
    path = write_jsonl(folder / "mixed.jsonl", [{"text": "x"}, {"conversations": talk}])
    with pytest.raises(BadSample, match=r"mixed\.jsonl:2: .*it looks like llava in data of minimind: give each a file"):
        read_samples(path)[1]


def test_a_text_beside_conversations_is_not_dropped_in_silence(folder):
    path = write_jsonl(folder / "both.jsonl", [{"text": "x", "conversations": [{"role": "user", "content": "y"}]}])
    with pytest.raises(BadSample, match=r"both\.jsonl:1: it has 'text' and 'conversations': delete one"):
        read_samples(path)[0]


def test_no_format_at_all(folder):
    path = write_jsonl(folder / "odd.jsonl", [{"prompt": "x", "response": "y"}])
    with pytest.raises(
        DataError, match=r"odd\.jsonl: no record holds .*the first have \['prompt', 'response'\]: rename"
    ):
        read_samples(path)


# ---- only so many


def test_no_more_samples_are_read_than_are_asked_for(tmp_path, monkeypatch):
    samples = captioned(20)
    for number, (writer, (write, _)) in enumerate(WRITERS.items()):
        folder = tmp_path / str(number)
        folder.mkdir()
        path = write(folder, samples)
        options = ReadOptions(images_path=images_path(writer, folder), max_samples=13)
        reader = read_samples(path, options)
        assert len(reader) == 13
        assert [sample.messages[-1] for sample in reader] == [sample.messages[-1] for sample in samples[:13]]
        assert reader.identity() != read_samples(path, ReadOptions(options.images_path)).identity()
    path = write_jsonl(tmp_path / "many.jsonl", [{"text": str(n)} for n in range(5000)])
    lines = []
    found = json_lines._line_places
    monkeypatch.setattr(json_lines, "_line_places", lambda file: (lines.append(1) or place for place in found(file)))
    assert len(read_samples(path, ReadOptions(max_samples=3))) == 3 and len(lines) == 3


def test_copies_of_a_part_and_of_all_stand_side_by_side(tmp_path):
    path = WRITERS["minimind's parquet"][0](tmp_path, captioned(200))
    assert [len(read_samples(path, ReadOptions(max_samples=n))) for n in (3, 0, 70, 3)] == [3, 200, 70, 3]
    copies = sorted(copy.name.split(".")[-3] for copy in tmp_path.glob("*.arrow"))
    assert len(copies) == 3 and {"first-3", "first-70"} < set(copies)


# ---- the same bad input in every text format


def as_llava(record: dict) -> dict:
    """A record of minimind's in LLaVA's words, however wrong it is."""
    names, speakers = {"role": "from", "content": "value"}, {"user": "human", "assistant": "gpt"}

    def turn(message: object) -> object:
        if not isinstance(message, dict):
            return message
        said = {names.get(name, name): value for name, value in message.items()}
        return said | ({"from": speakers.get(said["from"], said["from"])} if isinstance(said.get("from"), str) else {})

    turns = record.get("conversations")
    return record | ({"conversations": [turn(message) for message in turns]} if isinstance(turns, list) else {})


def as_messages(record: dict) -> dict:
    named = {"conversations": "messages", "image": "images"}
    return {named.get(name, name): value for name, value in record.items()}


CHANGES = {"llava": as_llava, "messages": as_messages}
NOT_BAD = {"llava": (), "messages": ("content parts", "no tag")}  # what these formats read and minimind refuses
OF_PICTURES = ("outside", "exist", "be called", "address", "regular file", "as a picture", "more than", "thin", "JSON")


@pytest.mark.parametrize("format", CHANGES)
def test_every_kind_of_bad_line_is_named(format, tmp_path, processor, monkeypatch):
    monkeypatch.setattr(json_lines, "MAX_LINE", LONGEST)
    sound, wanted = json.dumps(CHANGES[format](json.loads(SOUND_LINE))).encode(), {}
    lines = [sound]
    for kind, line, reason in make_zoo(tmp_path):
        with contextlib.suppress(ValueError, RecursionError):  # what is no JSON stays as it is
            record = parse(line.decode())
            line = json.dumps(CHANGES[format](record)).encode() if isinstance(record, dict) else line
        lines += [line, sound]
        if kind not in NOT_BAD[format]:
            wanted[f"{tmp_path / 'train.jsonl'}:{len(lines) - 1}"] = (kind, reason)
    path = write_lines(tmp_path / "train.jsonl", lines)
    data = ConversationDataset(read_samples(path), processor, 64, lenient())
    found = {rejected.where: rejected.reason for rejected in data.report.bad}
    assert {where: kind for where, (kind, _) in wanted.items() if where not in found} == {}
    assert {where: reason for where, reason in found.items() if where not in wanted} == {}
    alike = {where: kind for where, (kind, reason) in wanted.items() if any(said in reason for said in OF_PICTURES)}
    assert len(alike) > 60
    assert {kind: found[where] for where, kind in alike.items() if wanted[where][1] not in found[where]} == {}
    assert len(found) > 85 and read_samples(path).format == format


def test_a_folder_with_a_data_file_is_not_taken_for_captions(folder):
    """`images` would be learnt as what every picture shows."""
    assert [sample.messages[1]["content"] for sample in read_samples(folder / "images")] == ["a", "b", "c"]
    (folder / "outside.png").unlink()
    assert [sample.messages[1]["content"] for sample in read_samples(folder)] == ["a", "b", "c"]
    (folder / "train.json").write_text("[]")
    with pytest.raises(DataError, match=r"holds train\.json: name the data file itself"):
        read_samples(folder)


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_tables_of_any_separator(folder, separator):
    rows = (("image", "question", "answer"), ("a.png", "What?", "a cat"), ("a.png", "And?", ""))
    (folder / "qa.csv").write_text("\n".join(map(separator.join, rows)))
    reader = read_samples(folder / "qa.csv")
    assert [message["content"] for message in reader[0].messages] == ["<image>\nWhat?", "a cat"]
    with pytest.raises(BadSample, match=r"qa\.csv:3: 'answer' must be text that is not empty"):
        reader[1]


def test_pictures_in_what_is_no_archive_of_ours(folder):
    path = write_jsonl(folder / "t.jsonl", [{"text": "x"}])
    (folder / "images.tar.gz").touch()
    with pytest.raises(DataError, match=r"images\.tar\.gz is no folder, no \.zip and no uncompressed \.tar: unpack it"):
        read_samples(path, ReadOptions(images_path=str(folder / "images.tar.gz")))
