"""How the browser demo shows a question, its answer, and where the model looked when it gave it."""

from collections.abc import Sequence
from io import BytesIO
from pathlib import Path

import streamlit as st
from PIL import Image
from streamlit.delta_generator import DeltaGenerator

from dataset.box_drawing import draw_boxes
from model.inference.answerer import Answer
from model.inference.attention_map import heat_picture
from scripts.demo.chat import Chat, Reply, Turn, conversation
from scripts.demo.engine import Engine, Job
from scripts.demo.limits import Refused
from scripts.demo.remote import Remote
from scripts.demo.text import translate

POLL, POLL_WAITING = 0.08, 0.3  # seconds between two looks at jobs that run, or wait for their turn
ENOUGH_FOR_SPEED = 8  # tokens; over fewer a speed is noise
PICTURE_WIDTH = 224  # pixels on the page, of a map too
BOXES_WIDTH = 448  # of a picture with boxes, whose names must be read
STYLE = Path(__file__).with_name("page.css")  # the only HTML that the page is given


def text(key: str, **values: object) -> str:
    """A text of scripts.demo.text in the language of the page."""
    return translate(st.session_state.language, key, **values)


def reason(refusal: Refused) -> str:
    """Why, and which of the files."""
    which = text("file", number=refusal.file_number) if refusal.file_number else ""
    return which + text(refusal.key)


def show_pictures(turn: Turn) -> None:
    """A question's pictures, who made them, and what was left out."""
    if stills := [picture.shown for picture in turn.pictures if not picture.is_video]:
        st.image(stills, width=PICTURE_WIDTH)
    for picture in turn.pictures:
        if picture.is_video:
            st.image(picture.shown, width="stretch")
    if turn.credit:
        st.caption(turn.credit)
    for refusal in turn.left_out:
        st.warning(f"{reason(refusal)} {text('left_out')}")


def show_reply(chat: Chat, number: int, side: int) -> None:
    """An answer and its figures. number: of the turn; side: 1 for the reply on the right."""
    reply = chat.turns[number].replies[side]
    answer = reply.answer
    if reply.failure:
        st.warning(text(reply.failure))
    if answer is None:
        return
    st.text(answer.text or text("nothing"))
    pictures = [picture for turn in chat.turns[: number + 1] for picture in turn.pictures][answer.forgotten.pictures :]
    stills = [picture for picture in pictures if not picture.is_video]
    if stills and (drawn := draw_boxes(Image.open(BytesIO(stills[-1].shown)), answer.text)):
        st.image(drawn, width=BOXES_WIDTH, output_format="JPEG")
    st.caption(" · ".join(figures(answer)))
    if answer.forgotten.turns:
        st.caption(text("forgotten", turns=answer.forgotten.turns))
    can_look = reply.weight.sight is not None and pictures and answer.token_ids
    key = f"{number}_second" if side else f"{number}"
    with st.container(horizontal=True, vertical_alignment="center"):
        with st.popover(text("copy"), icon=":material/content_copy:", type="tertiary"):
            st.code(answer.text, language=None, wrap_lines=True)  # which has a button that copies
        wanted = can_look and st.toggle(text("where"), key=f"where_{key}")
    if wanted and reply.attention is None:
        ask_for_attention(chat, number, side)
    if wanted and reply.attention is not None:
        show_attention(reply, [Image.open(BytesIO(picture.shown)) for picture in pictures], key)


def figures(answer: Answer) -> list[str]:
    """What an answer took."""
    shown = [text("first", seconds=answer.seconds_to_first)]
    if answer.new_tokens >= ENOUGH_FOR_SPEED:
        shown.append(text("speed", speed=answer.tokens_per_second))
    shown.append(text("length", prompt=answer.prompt_tokens, new=answer.new_tokens))
    if answer.stopped or answer.cut:
        shown.append(text("stopped" if answer.stopped else "cut"))
    return shown


def ask_for_attention(chat: Chat, number: int, side: int) -> None:
    """Fills a reply's `attention`, or says why it cannot be had."""
    reply = chat.turns[number].replies[side]
    messages, pictures = conversation(chat.turns[: number + 1], side)
    try:
        job = chat.engine.map_attention(reply.weight, messages, pictures, reply.answer.token_ids)
    except Refused as refusal:
        st.warning(reason(refusal))
        return
    place = st.empty()
    follow(chat.engine, [(job, place)])
    place.empty()
    if job.failure:
        st.warning(text(job.failure))
    else:
        reply.attention = job.result


def show_attention(reply: Reply, pictures: list[Image.Image], key: str) -> None:
    """A heat map over each picture that the model had before it when it gave this answer."""
    attention, words = reply.attention
    left, right = st.columns(2)
    labels = [text("whole"), *(f"{place}. {word}" for place, (word, _) in enumerate(words, 1))]
    word = left.selectbox(text("which_word"), range(len(labels)), format_func=labels.__getitem__, key=f"word_{key}")
    layers = [text("all_layers"), *map(str, range(1, attention.patches.shape[1] + 1))]
    layer = right.selectbox(text("which_layer"), range(len(layers)), format_func=layers.__getitem__,
                            key=f"layer_{key}")  # fmt: skip
    whole = slice(words[0][1].start, words[-1][1].stop) if words else slice(None)  # without the token that ends it
    maps = attention.over_pictures(words[word - 1][1] if word else whole, layer - 1 if layer else None)
    most = max(float(heat.max()) for heat in maps)
    heats = [heat_picture(*pair, most) for pair in zip(pictures, maps, strict=True)]
    shares = [text("picture", number=place, share=100 * float(heat.sum())) for place, heat in enumerate(maps, 1)]
    st.image(heats, caption=shares, width=PICTURE_WIDTH, output_format="JPEG")
    st.caption(text("hint"))


def follow(engine: Engine | Remote, jobs: Sequence[tuple[Job, DeltaGenerator]]) -> None:
    """Show how far jobs are, each in its place, until they are over.

    A click interrupts this at any call of st; the next run of the page goes on from the jobs.
    """
    while going := [job for job, _ in jobs if not job.over.is_set()]:
        for job, place in jobs:
            job.seen()
            before = engine.ahead_of(job)
            place.text(text("waiting", place=before) if before else job.text or text("thinking"))
        going[0].over.wait(POLL_WAITING if engine.ahead_of(going[0]) else POLL)
