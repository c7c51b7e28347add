"""Emoji World's clips: pure, apart, exact, and who has the frames but not their order knows nothing of the answers."""

import re
from collections import Counter, defaultdict
from random import Random

import numpy as np
import pytest

from dataset import emoji_clip_words as words
from dataset.emoji_clips import FRAMES, STILL, WAYS, Clip, draw_clip, sample_clip, shown
from dataset.emoji_words import PLACES
from dataset.emoji_world import GROUPS, IMAGE_SIZE, LANGUAGES, apart, name
from helpers.clips import Reader

CLIPS = 800


@pytest.fixture(scope="module")
def clips() -> list[Clip]:
    return [sample_clip(1, "held_out", index, 128) for index in range(CLIPS)]


def test_a_clip_is_a_function_of_seed_split_and_index(clips):
    assert [sample_clip(1, "held_out", index, 128) for index in (5, 3)] == [clips[5], clips[3]]
    others = [sample_clip(2, "held_out", 5, 128), sample_clip(1, "train", 5, 128), sample_clip(1, "held_out", 6, 128)]
    assert len({clips[5], *others}) == 4
    first = draw_clip(clips[5])
    assert len(first) == FRAMES and {frame.size for frame in first} == {(IMAGE_SIZE, IMAGE_SIZE)}
    assert all(np.array_equal(a, b) for a, b in zip(first, draw_clip(clips[5]), strict=True))


def test_things_meet_in_one_split_or_in_the_other(clips):
    """As in scenes: of one group in held-out clips, of different groups in training's."""
    for index, clip in enumerate(clips):
        assert len({actor.concept % GROUPS for actor in clip.actors}) == 1
        training = [actor.concept % GROUPS for actor in sample_clip(1, "train", index, 128).actors]
        assert len(set(training)) == len(training)


def test_things_never_touch_nor_leave_the_picture(clips):
    for clip in clips:
        for frame in range(FRAMES):
            there = clip.there(frame)
            assert all(apart(a, b) for place, a in enumerate(there) for b in there[:place])
            assert all(a.size / 2 <= v <= IMAGE_SIZE - a.size / 2 for a in there for v in (a.x, a.y))
            if frame in (0, FRAMES - 1):
                assert all(b.x - a.x >= 24 for a, b in zip(there, there[1:], strict=False))


def test_what_is_drawn_is_what_is_there(clips):
    """A thing is seen against the ground in the frames in which it is there, where it is."""
    for clip in clips[:20]:
        frames = [np.asarray(frame).astype(int) for frame in draw_clip(clip)]
        for number, frame in enumerate(frames):
            drawn = np.abs(frame - clip.rgb).max(2) > 40
            there = np.zeros_like(drawn)
            for thing in clip.there(number):
                half = thing.size * 0.65
                top, left = (max(0, round(v - half)) for v in (thing.y, thing.x))
                window = np.s_[top : round(thing.y + half), left : round(thing.x + half)]
                assert drawn[window].sum() > 150
                there[window] = True
            assert not drawn[~there].any()


def test_backwards_each_frame_stands_where_it_stood_from_the_other_end(clips):
    for clip in clips[:50]:
        for frame in range(FRAMES):
            back, there = clip.backwards().there(FRAMES - 1 - frame), clip.there(frame)
            assert shown(back) == shown(there)
            assert [v for t in back for v in (t.x, t.y)] == pytest.approx([v for t in there for v in (t.x, t.y)])


def test_a_clip_is_as_likely_backwards(clips):
    """Else the frames alone would tell something of their order."""
    forwards, backwards = Counter(), Counter()
    for clip in clips:
        for counter, seen in ((forwards, clip), (backwards, clip.backwards())):
            for actor in seen.actors:
                counter["span", actor.comes, actor.leaves] += 1
                counter["way", actor.way, actor.x // 75, actor.y // 75] += 1
            counter["events", len(seen.comers()), len(seen.leavers())] += 1
    for key in forwards | backwards:
        one, other = forwards[key], backwards[key]
        assert abs(one - other) < 4.5 * max(one + other, 10) ** 0.5, key


def test_answers_are_what_an_independent_reader_finds(clips):
    """From nothing but which things are where in which frame."""
    asked = Counter()
    for clip in clips:
        reader = Reader([clip.there(frame) for frame in range(FRAMES)])
        for (kind, about), fact in words.askable(clip).items():
            assert reader.answer(kind, about) == fact, (kind, about)
            asked[kind] += 1
    assert set(asked) == set(words.KINDS) and min(asked.values()) > CLIPS / 4


def test_with_the_frames_shuffled_even_a_perfect_reader_guesses(clips):
    rng, right = Random(0), defaultdict(list)
    for clip in clips:
        order = rng.sample(range(FRAMES), FRAMES)
        reader = Reader([clip.there(frame) for frame in order])
        for (kind, about), fact in words.askable(clip).items():
            right[kind].append(reader.answer(kind, about) == fact)
    shares = {kind: sum(found) / len(found) for kind, found in right.items()}
    assert max(shares.values()) < 0.56 and sum(shares.values()) / len(shares) < 0.45, shares


@pytest.mark.parametrize("frame", [0, 3, 4, FRAMES - 1])
def test_no_kind_can_be_answered_from_one_frame(clips, frame):
    """The best that can be said after it: which of the things there, from the left, is the answer."""
    seen: dict = defaultdict(Counter)
    for clip in clips:
        there = clip.there(frame)
        names = shown(there)

        def place(concept: object, names: tuple = names) -> object:
            return names.index(concept) if concept in names else "elsewhere"

        for (kind, about), fact in words.askable(clip).items():
            situation = [kind, len(there)]
            if kind == "way":
                thing = next((thing for thing in there if thing.concept == about), None)
                situation += [thing and (thing.x // 56, thing.y // 56)]
            else:
                situation.append((about[0], place(about[1])) if kind == "after" else about)
            answer = fact if kind in ("way", "count") or fact is None else place(fact)
            if kind == "story":
                answer = (fact[0] == names, len(fact[1]), fact[1][0][0], place(fact[1][0][1]))
            seen[tuple(situation)][answer] += 1
    right, all_of_kind = Counter(), Counter()
    for (kind, *_), answers in seen.items():
        right[kind] += max((count for answer, count in answers.items() if answer != "elsewhere"), default=0)
        all_of_kind[kind] += sum(answers.values())
    shares = {kind: right[kind] / all_of_kind[kind] for kind in words.KINDS if kind != "ends"}
    assert max(shares.values()) < 0.65, shares


def test_answers_are_balanced(clips):
    """Whoever says the commonest answer of a question's kind, without a look, is mostly wrong."""
    answers: dict = defaultdict(Counter)
    for clip in clips:
        for (kind, about), fact in words.askable(clip).items():
            answers[kind, about if kind == "count" else about[0] if kind == "after" else ""][fact] += 1
    shares = {key: max(found.values()) / sum(found.values()) for key, found in answers.items()}
    assert max(shares.values()) < 0.55, shares
    assert {way for key, found in answers.items() if key[0] == "way" for way in found} == set(range(len(WAYS)))


def test_every_wording_is_a_question_in_its_language(clips):
    rng, said = Random(1), defaultdict(set)
    for clip in clips:
        for key, fact in words.askable(clip).items():
            for language in LANGUAGES:
                question, answer = words.ask(key, fact, language, rng)
                assert "{" not in question + answer and "  " not in question and answer
                is_chinese = [any("\u4e00" <= letter <= "\u9fff" for letter in text) for text in (question, answer)]
                assert is_chinese == [language == "zh"] * 2
                said[language, key[0]].add(question)
                if key[0] in ("after", "way"):
                    concept = key[1][1] if key[0] == "after" else key[1]
                    assert name(concept, language) in question
    assert min(map(len, said.values())) >= 5
    assert all(len(set(w)) == len(w) for kinds in words.QUESTIONS.values() for w in kinds.values())


def test_conversations_of_a_clip(clips):
    clip = next(clip for clip in clips if len(words.askable(clip)) > 6)
    talks = words.question_conversations(clip, Random(0), 9)
    assert 6 <= len(talks) <= 11 and len({str(talk) for talk in talks}) == len(talks)
    assert all(talk[0]["content"].startswith("<video>\n") and len(talk) == 2 for talk in talks)
    said = talks[-1][1]["content"]
    assert said == words.log(clip, "en") or said == words.log(clip, "zh")
    frames = words.log(clip, "en").split("; ")
    assert len(frames) == FRAMES and frames[3].startswith("0:03 ")
    assert talks[-2][1]["content"] in (words.roll_call(clip, "en"), words.roll_call(clip, "zh"))
    told = [f"{name(thing.concept, 'en')} {PLACES['en'][thing.place]}" for thing in clip.there(3)]
    assert frames[3] == "0:03 " + (", ".join(told) or "nothing")


def test_a_roll_call_says_when_each_thing_is_there_and_which_way_it_goes(clips):
    """By the frames alone: the first and the last that show it, and how far it is from one to the other."""
    for clip in clips[:200]:
        said = dict(
            re.fullmatch(r"(.+?) (0:0\d 0:0\d .+)", part).groups() for part in words.roll_call(clip, "en").split(", ")
        )
        assert len(said) == len(clip.actors) == len(words.roll_call(clip, "zh").split("，"))
        for actor in clip.actors:
            seen = {f: t for f in range(FRAMES) for t in clip.there(f) if t.concept == actor.concept}
            first, last = min(seen), max(seen)
            x, y = (round(getattr(seen[last], axis) - getattr(seen[first], axis), 3) for axis in "xy")
            way = "left" if x < 0 else "right" if x > 0 else "up" if y < 0 else "down" if y > 0 else "still"
            assert said[name(actor.concept, "en")] == f"0:0{first} 0:0{last} {way}"


def test_the_place_of_a_thing_goes_with_it(clips):
    for actor in (actor for clip in clips[:200] for actor in clip.actors):
        things = [actor.at(frame) for frame in range(actor.comes, actor.leaves)]
        for thing in things:
            assert divmod(thing.place, 3) == (thing.y // (IMAGE_SIZE / 3), thing.x // (IMAGE_SIZE / 3))
        assert actor.way != STILL or len({thing.place for thing in things}) == 1


def test_a_story_in_words():
    fact = ((0, 1), ((True, 2), (False, 0)))
    zero, one, two = (name(concept, "en") for concept in range(3))
    assert words.answer_in_words("story", fact, "en") == f"{zero}, {one}, {two} comes, {zero} leaves"
    assert words.answer_in_words("story", ((), ((True, 2),)), "zh") == f"什么都没有，{name(2, 'zh')}来了"
    assert words.answer_in_words("after", None, "en") == "nothing"


def test_who_stays_still_is_not_asked_for_its_way(clips):
    for clip in clips[:200]:
        asked = {about for kind, about in words.askable(clip) if kind == "way"}
        moving = {actor.concept for actor in clip.actors if actor.way != STILL}
        assert asked <= moving
