"""What the pages tell people to type: every script is there, and takes the flags that are given to it."""

import re

import pytest

from helpers.commands import commands_of, parse
from helpers.repository import ROOT

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_of_a_page_are_there_and_take_their_flags(page, monkeypatch):
    rules = re.findall(r"^([\w .-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    targets = {target for rule in rules for target in rule.split()}
    for words in commands_of(page):
        script = next((place for place, word in enumerate(words) if word.endswith(".py")), None)
        if words[0] == "make":
            assert words[1] in targets, f"make {words[1]}: there is no such target"
        elif script is not None and (words[0].endswith("python") and script == 1 or "torchrun" in words):
            parse(["python", *words[script:]], monkeypatch)


def test_scripts_that_a_page_names_in_passing_are_there():
    named = {}
    for page in PAGES:
        for path in re.findall(r"`(?:python )?((?:scripts|trainer|dataset|model|tests)/[\w/]+\.py)", page.read_text()):
            named.setdefault(path, page.name)
    assert len(named) > 30 and not {path: page for path, page in named.items() if not (ROOT / path).is_file()}


def test_figures_of_the_readme_are_to_be_had_again():
    """Each command of the page about them, also those that a table names."""
    page = (ROOT / "docs/evaluation.md").read_text()
    measures = {f"scripts/measure/{path.name}" for path in (ROOT / "scripts/measure").glob("*.py") if _is_command(path)}
    assert measures == set(re.findall(r"scripts/measure/\w+\.py", page)) and len(measures) >= 8


def _is_command(path) -> bool:
    return '__name__ == "__main__"' in path.read_text()


@pytest.mark.parametrize(
    ("line", "wrong"),
    [
        (["python", "scripts/nothing.py"], "there is no scripts/nothing.py"),
        (["python", "scripts/score.py", "--weihgt", "x"], "2"),
    ],
)
def test_a_wrong_command_would_be_found(line, wrong, monkeypatch):
    with pytest.raises((AssertionError, SystemExit), match=wrong):
        parse(line, monkeypatch)
