"""How the browser demo shows a question, its answer, and where the model looked when it gave it."""

from collections.abc import Sequence
from io import BytesIO

import streamlit as st
from PIL import Image

from model.config import END_ID
from model.inference.answerer import Answer
from model.inference.attention_map import heat_picture
from model.processing import MAX_PIXELS
from scripts.demo.chat import MOST_BYTES, MOST_PICTURES, Refused, Turn, conversation
from scripts.demo.engine import MOST_SECONDS, MOST_WAITING, Engine
from scripts.demo.words import say

POLL = 0.08  # seconds between two looks at a job
ENOUGH_FOR_SPEED = 8  # tokens; over fewer a speed is noise
MAP_WIDTH, PICTURE_WIDTH = 224, 224  # pixels on the page
FACTS = {"pixels": MAX_PIXELS // 1_000_000, "megabytes": MOST_BYTES // 1024**2, "seconds": round(MOST_SECONDS),
         "pictures": MOST_PICTURES, "waiting": MOST_WAITING}  # fmt: skip


def words(key: str, **facts: object) -> str:
    """A sentence in the language of the page."""
    return say(st.session_state.get("language", "en"), key, **{**FACTS, **facts})


def refused(refusal: Refused) -> str:
    """Why, and which of the files."""
    which = words("file", number=refusal.facts["number"]) if "number" in refusal.facts else ""
    return which + words(refusal.key, **refusal.facts)


def show_pictures(turn: Turn) -> None:
    """A question's pictures, who made them, and what was left out."""
    if turn.pictures:
        st.image([picture.shown for picture in turn.pictures], width=PICTURE_WIDTH)
    if turn.credit:
        st.caption(turn.credit)
    for refusal in turn.left_out:
        st.warning(f"{refused(refusal)} {words('left_out')}")


def show_answer(engine: Engine, turns: Sequence[Turn], side: int = 0) -> None:
    """The last answer of a conversation. side: 1 for the one on the right, so that its switches are others."""
    turn, name = turns[-1], f"{len(turns) - 1}{'_second' * side}"
    answer = turn.answer
    if turn.failure:
        st.warning(words(turn.failure))
    if answer is None:
        return
    st.text(answer.text or words("nothing"))
    st.caption(" · ".join(figures(answer)))
    sees = turn.weight is not None and turn.weight.image_size is not None
    seen = sees and answer.token_ids and any(earlier.pictures for earlier in turns)
    with st.container(horizontal=True, vertical_alignment="center"):
        with st.popover(words("copy"), icon=":material/content_copy:", type="tertiary"):
            st.code(answer.text, language=None, wrap_lines=True)  # which has a button that copies
        wanted = seen and st.toggle(words("where"), key=f"where_{name}")
    if wanted:
        show_where(engine, turns, name)


def figures(answer: Answer) -> list[str]:
    """What an answer took."""
    found = [words("first", seconds=answer.seconds_to_first)]
    if answer.new_tokens >= ENOUGH_FOR_SPEED:
        found.append(words("speed", speed=answer.tokens_per_second))
    found.append(words("length", prompt=answer.prompt_tokens, new=answer.new_tokens))
    if answer.stopped or answer.token_ids[-1:] != (END_ID,):
        found.append(words("stopped" if answer.stopped else "cut"))
    return found


def show_where(engine: Engine, turns: Sequence[Turn], name: str) -> None:
    """A heat map over each picture that the model had before it when it gave this answer."""
    turn = turns[-1]
    if turn.looked is None and not find_where(engine, turns):
        return
    looked, found = turn.looked
    left, right = st.columns(2)
    labels = [words("whole"), *(f"{place}. {word}" for place, (word, _) in enumerate(found, 1))]
    word = left.selectbox(words("which_word"), range(len(labels)), format_func=labels.__getitem__, key=f"word_{name}")
    layers = [words("all_layers"), *map(str, range(1, looked.patches.shape[1] + 1))]
    layer = right.selectbox(words("which_layer"), range(len(layers)), format_func=layers.__getitem__,
                            key=f"layer_{name}")  # fmt: skip
    whole = slice(found[0][1].start, found[-1][1].stop) if found else slice(None)  # without the token that ends it
    maps = looked.maps(found[word - 1][1] if word else whole, layer - 1 if layer else None)
    pictures = [Image.open(BytesIO(picture.shown)) for earlier in turns for picture in earlier.pictures]
    heats = [heat_picture(*pair, float(maps.max())) for pair in zip(pictures, maps, strict=True)]
    shares = [words("picture", number=place, share=100 * float(heat.sum())) for place, heat in enumerate(maps, 1)]
    st.image(heats, caption=shares, width=MAP_WIDTH, output_format="JPEG")
    st.caption(words("hint"))


def find_where(engine: Engine, turns: Sequence[Turn]) -> bool:
    """Fills the last turn's `looked`; False, with a notice, where it cannot be had."""
    turn = turns[-1]
    try:
        job = engine.look(turn.weight, *conversation(turns), turn.answer.token_ids)
    except Refused as refusal:
        st.warning(refused(refusal))
        return False
    place = st.empty()
    while not job.over.wait(POLL):
        job.seen()
        place.text(words("thinking"))
    place.empty()
    if job.failure:
        st.warning(words(job.failure))
        return False
    turn.looked = job.result
    return True
