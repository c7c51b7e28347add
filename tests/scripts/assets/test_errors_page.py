"""The page of errors: all in one file, what strangers wrote is shown and not obeyed, what has no data is left out."""

import re
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

from dataset.exam.mistakes import Mistake
from dataset.exam.questions import Question
from dataset.samples import Sample
from helpers.data import encoded, make_picture, write_jsonl
from scripts import score as scoring
from scripts.assets.errors_page import PICTURES, WORST, Findings, write_page

VOID = ("meta", "img")


class Page(HTMLParser):
    """What a reader meets: texts, headings, and every attribute by its name; tags must close what they open."""

    def __init__(self, path: Path):
        super().__init__()
        self.texts, self.headings, self.attributes, self.open = [], [], [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == ["html"] or not self.open

    def handle_starttag(self, tag: str, attributes: list) -> None:
        self.attributes += [(tag, *attribute) for attribute in attributes]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] != "style" and data.strip():
            self.texts.append(data.strip())
            if self.open[-1] == "h2":
                self.headings.append(data)

    def images(self) -> list[str]:
        return [value for tag, name, value in self.attributes if (tag, name) == ("img", "src")]


@pytest.fixture
def ask(saved, monkeypatch, tmp_path):
    """The page that scripts/score.py writes about these lines."""

    def run(*lines: dict, flags: tuple = ()) -> Page:
        data, path = write_jsonl(tmp_path / "held_out.jsonl", list(lines)), tmp_path / "errors.html"
        flags = ["--weight", saved, "--data", data, "--html", path, "--device", "cpu", "--dtype", "float32", *flags]
        monkeypatch.setattr(sys, "argv", ["score.py", *map(str, flags)])
        scoring.main()
        return Page(path)

    return run


def test_one_file_with_everything_in_it(ask, folder, capsys):
    lines = [
        {"image": "a.png", "kind": kind, "language": "en", "question": question, "answer": answer}
        for kind, question, answer in (("where", "Where is the cat?", "top left"), ("at", "What is at the top?", "cup"),
                                       ("at", "What is at the left?", "pen"), ("at", "What is at the right?", "key"))
    ]  # fmt: skip
    page = ask(*lines, flags=("--credit", "Pictures: Jane & Joe"))
    assert capsys.readouterr().out.splitlines()[-1] == f"page: {folder / 'errors.html'}"
    assert page.headings == [
        "Figures", "Which name was said for which", "Where in the picture", "All that is wrong",
    ]  # fmt: skip
    assert len(page.images()) == 2 * len(lines) and all(i.startswith("data:image/jpeg;base64,") for i in page.images())
    assert not [value for _, name, value in page.attributes if name == "href" or "http" in (value or "")]
    assert {"out/vlm.safetensors", "Pictures: Jane & Joe", "top left", "0 of 1"} <= set(page.texts)
    assert re.search("4 of .*/held_out.jsonl", " ".join(page.texts))


def test_what_has_no_pictures_places_or_names_goes_without(ask):
    page = ask({"question": "Is it <b>so</b> & so?", "answer": "</p><script>alert(1)</script>"})
    assert page.headings == ["Figures", "All that is wrong"] and not page.images()
    assert {"Is it <b>so</b> & so?", "</p><script>alert(1)</script>"} <= set(page.texts)


def test_choices_and_yes_or_no_have_the_printed_table(ask, folder):
    choice = {"image": "a.png", "question": "What?", "A": "cat", "B": "dog", "answer": "B"}
    page = ask(choice, {**choice, "image": "b.png", "answer": "A"})
    assert "Which name was said for which" not in page.headings and "plain generation" in " ".join(page.texts)
    page = ask({"image": "a.png", "question": "Is it?", "answer": "Yes"})
    assert "yes_rate" in " ".join(page.texts) and len(page.images()) == 2


def test_a_folder_that_is_not_there_is_told_before_anything_is_asked(ask, tmp_path):
    with pytest.raises(SystemExit, match="score: .*page.html cannot be written: there is no folder"):
        ask({"question": "What?", "answer": "so"}, flags=("--html", tmp_path / "nowhere/page.html"))


def test_the_most_that_a_page_holds_can_be_mailed(tmp_path):
    """Noise is what JPEG packs worst."""
    noise = tuple(encoded(make_picture(number, 300)) for number in range(PICTURES + 1))
    sample = Sample("x:1", [{"role": "user", "content": "?" * 10_000}, {"role": "assistant", "content": "a"}], noise)
    maps = torch.rand(len(noise), 14, 14, generator=torch.Generator().manual_seed(0))
    worst = [Mistake(Question(sample, "a", "all", "all"), "b" * 10_000, "a", 0.5, maps)] * WORST
    findings = Findings("w", "d", {}, "a table", [], worst, 100)
    write_page(findings, tmp_path / "errors.html")
    assert (tmp_path / "errors.html").stat().st_size < 3_000_000
    page = Page(tmp_path / "errors.html")
    assert page.headings == ["Figures", "The 40 worst of 100"] and page.texts.count("and 1 picture more") == WORST


def test_nothing_wrong_is_said(tmp_path):
    write_page(Findings("w", "d", {}, "a table", [], [], 0), tmp_path / "errors.html")
    assert "Nothing is wrong." in Page(tmp_path / "errors.html").texts
