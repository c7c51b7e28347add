"""The sheet: every kind and both languages, chosen by order alone."""

from scripts.assets import sheet


def records(kinds: int, scenes: int, questions: int) -> list[dict]:
    """Kinds and languages by turns over the file, as Emoji World's are; every answer is right, or none."""
    return [
        {
            "pictures": [f"{scene}.png"],
            "kind": f"kind {(scene * questions + number) % kinds}",
            "language": ("en", "zh")[(scene + number) % 2],
            "question": f"{scene}, {number}?",
            "truth": "yes",
            "right": "yes",
        }
        for scene in range(scenes)
        for number in range(questions)
    ]


def groups(chosen: list) -> set[tuple[str, str]]:
    return {(record["kind"], record["language"]) for _, questions in chosen for record in questions}


def test_every_kind_in_both_languages_appears_in_the_files_order():
    asked = records(kinds=6, scenes=40, questions=6)
    chosen = sheet.choose(asked)
    assert len(groups(chosen)) == 12 and len(chosen) == sheet.COLUMNS * sheet.ROWS
    assert all(len(questions) == sheet.QUESTIONS for _, questions in chosen)
    assert [picture for picture, _ in chosen] == [f"{scene}.png" for scene in range(12)]


def test_a_kind_that_stands_at_the_end_of_the_file_is_shown():
    asked = records(kinds=1, scenes=500, questions=1) + [
        {**record, "kind": "late", "pictures": [f"late {record['pictures'][0]}"]} for record in records(1, 3, 1)
    ]
    assert groups(sheet.choose(asked)) == {(kind, language) for kind in ("kind 0", "late") for language in ("en", "zh")}


def test_whether_an_answer_is_right_decides_nothing():
    asked = records(kinds=6, scenes=40, questions=6)
    wrong = [record | {"right": "no" if number % 3 else "yes"} for number, record in enumerate(asked)]

    def where(chosen: list) -> list[str]:
        return [record["question"] for _, questions in chosen for record in questions]

    assert where(sheet.choose(asked)) == where(sheet.choose(wrong))


def test_few_questions_are_all_shown():
    asked = records(kinds=2, scenes=3, questions=2)
    assert [questions for _, questions in sheet.choose(asked)] == [asked[:2], asked[2:4], asked[4:]]
    assert sheet.choose([]) == []


def test_every_category_has_its_picture():
    asked = [
        {**record, "category": f"family {family}", "pictures": [f"{family} {record['pictures'][0]}"]}
        for family in range(12) for record in records(kinds=6, scenes=5, questions=6)
    ]  # fmt: skip
    chosen = sheet.choose(asked)
    assert {questions[0]["category"] for _, questions in chosen} == {f"family {number}" for number in range(12)}
    assert len(groups(chosen)) == 12
