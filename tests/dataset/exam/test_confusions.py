"""Which name was said for which, and how much is right where in the picture, read off answers alone."""

from dataset.exam.confusions import NOTHING, confusions, kinds_of_names, right_by_place


def record(kind: str, truth: str, said: str, question: str = "?", language: str = "en") -> dict:
    return {"kind": kind, "language": language, "question": question, "truth": truth, "right": said}


def answers(kind: str, truths: str) -> list[dict]:
    return [record(kind, truth, truth) for truth in truths.split("|")]


NAMES = answers("at", "cat|dog|cow|fox|owl|bee") + answers("what", "cat, dog|cow, fox, owl, bee, ram, red panda|pen")


def test_names_are_the_short_answers_of_which_there_are_many():
    few = answers("colour", "red|blue") + answers("yesno", "yes|no|yes")
    long = answers("caption", "One thing on a white ground: a cat at the top.|橙色背景上有一样东西：左下是渡轮。")
    assert kinds_of_names(NAMES + few + long) == {"at", "what"}
    assert kinds_of_names(few) == set() and kinds_of_names([]) == set()
    assert kinds_of_names(answers("all", "A pen.|A cup.|A key.")) == {"all"}  # of data that has but a few


def test_lists_are_compared_name_by_name():
    wrong = [
        record("at", "cat", "dog"), record("at", "cat", "dog"), record("at", "dog", ""),
        record("what", "cat, dog, owl", "owl, cat, bee"),  # in another order, and one for another
        record("what", "cat, dog", "cat"), record("what", "cow", "cow, cow"), record("colour", "red", "blue"),
        record("what", "猫、狗", "猫，牛", language="zh"),
    ]  # fmt: skip
    found = confusions(NAMES + wrong)
    assert found == {
        "en": {("cat", "dog"): 2, ("dog", NOTHING): 2, ("dog", "bee"): 1, (NOTHING, "cow"): 1}, "zh": {("狗", "牛"): 1},
    }  # fmt: skip
    assert found["en"].most_common(1) == [(("cat", "dog"), 2)]


def test_a_place_is_the_answer_or_stands_in_the_question():
    grids = right_by_place([
        record("where", "top left", "top left"), record("where", "top left", "top"),
        record("where", "右下", "右下", language="zh"), record("at", "a cat", "a cat", "What is at the top left?"),
        record("at", "a dog", "a cat", "What is in the Top of the picture?"),
        record("at", "猫", "狗", "图中右边是什么？", "zh"), *NAMES[6:],
        record("what", "cat", "cat", "What is the top?"),
    ])  # fmt: skip
    assert grids["where"] == [(1, 2)] + [(0, 0)] * 7 + [(1, 1)]
    assert grids["at"] == [(1, 1), (0, 1), (0, 0), (0, 0), (0, 0), (0, 1), (0, 0), (0, 0), (0, 0)]
    assert set(grids) == {"where", "at"}  # one question that names a place makes no kind of places


def test_what_is_beside_a_thing_is_no_place_of_the_picture():
    said = ("What is left of the cat?", "What is above the cat?", "猫的左边是什么？", "猫下面有什么？")
    assert right_by_place([record("beside", "dog", "dog", question) for question in said]) == {}
