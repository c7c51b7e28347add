"""Ask a trained model about pictures in a browser.

    streamlit run web_demo.py                          # the weights in out/ and in the folders in it
    streamlit run web_demo.py -- FOLDER ...            # those of other folders too

This file is the page alone. What a conversation is, what is let in, and who answers when stands in
scripts/demo_chat.py and scripts/demo_engine.py. What people and models say is shown as plain text only: as Markdown it
could fetch pictures from elsewhere. What people can mend is said in a sentence; errors go to the terminal, in a line.
"""

import argparse
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import streamlit as st
from PIL import Image

from dataset.emoji_world import attribution
from model.config import END_ID
from model.processing import MAX_PIXELS
from model.vision_encoder import ROOT
from scripts import demo_chat
from scripts.answer import Options
from scripts.attention import heat_picture
from scripts.demo_chat import MOST_BYTES, MOST_CHARACTERS, MOST_PICTURES, Refused, Turn
from scripts.demo_engine import MOST_SECONDS, Engine, Job, Weight, find_weights, options_within
from scripts.demo_words import LANGUAGES, say

POLL, POLL_WAITING = 0.08, 0.3  # seconds between two looks at a job that runs, or waits for its turn
ENOUGH_FOR_SPEED = 8  # tokens; over fewer a speed is noise
MAP_WIDTH, PICTURE_WIDTH, EXAMPLE_WIDTH = 224, 224, 150  # pixels on the page
FACTS = {"pixels": MAX_PIXELS // 1_000_000, "megabytes": MOST_BYTES // 1024**2, "seconds": round(MOST_SECONDS),
         "pictures": MOST_PICTURES}  # fmt: skip


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="streamlit run web_demo.py --", description=__doc__.split("\n")[0])
    parser.add_argument("folders", type=Path, nargs="*", help="folders with .safetensors, beside out/")
    parser.add_argument("--vision_model", help="folder of the CLIP tower; by default the one trained with")
    parser.add_argument("--device", default="auto")
    return parser.parse_args()


@st.cache_resource(show_spinner=False)
def start_engine(vision_model: str | None, device: str) -> Engine:
    return Engine(vision_model, device)


@st.cache_data(show_spinner=False)
def example_scenes(language: str) -> list[demo_chat.Example]:
    return demo_chat.examples(language)


def words(key: str, **facts: object) -> str:
    return say(st.session_state.get("language", "en"), key, **{**FACTS, **facts})


def main() -> None:
    st.set_page_config(page_title="minimind-vlm", page_icon="🔎", layout="centered")
    arguments = parse_arguments()
    state = st.session_state
    for name, value in (("turns", []), ("job", None), ("notice", "")):
        state.setdefault(name, value)
    choose_language()
    folders = [*arguments.folders, ROOT / "out"]
    weights = find_weights(folders)
    st.subheader(words("title"), anchor=False)
    if not weights:
        return no_weights(folders)
    engine = start_engine(arguments.vision_model, arguments.device)
    weight, options = sidebar(weights)
    sees = weight.image_size is not None
    if not state.turns:
        beginning(engine, weight, options)
    for number, turn in enumerate(state.turns):
        show_question(turn)
        with st.chat_message("assistant"):
            live = number == len(state.turns) - 1 and state.job is not None
            place = st.empty() if live else show_answer(engine, weight, number)
            if live:
                st.button(words("stop"), key="stop", icon=":material/stop_circle:", on_click=state.job.stop)
    if state.turns and state.job is None:
        after_the_last(engine, weight, options)
    notice = st.empty()
    if state.notice:
        notice.warning(state.notice)
    # No file_type: the browser's filter lets through what it likes, and what take_picture says is clearer.
    message = st.chat_input(
        words("ask" if sees else "ask_text"), key="message", accept_file="multiple" if sees else False,
        max_chars=MOST_CHARACTERS, disabled=state.job is not None,
    )  # fmt: skip
    if message:
        text, files = (message.text, message.files) if sees else (message, [])
        send(engine, weight, options, text, [file.getvalue() for file in files])
        if state.job is not None:
            st.rerun()
        if state.notice:
            notice.warning(state.notice)
    if state.job is not None:
        follow(engine, state.job, place)
        st.rerun()


def choose_language() -> None:
    """The browser's language to begin with; then whatever is chosen."""
    if "language" not in st.session_state:
        st.session_state.language = "zh" if str(st.context.locale or "").lower().startswith("zh") else "en"
    with st.sidebar:
        st.radio(words("language"), list(LANGUAGES), key="language", format_func=LANGUAGES.get, horizontal=True)


def no_weights(folders: list[Path]) -> None:
    st.text(words("no_weights"))
    st.code("make quickstart", language=None)
    st.text(words("no_weights_folder"))
    st.code("streamlit run web_demo.py -- FOLDER", language=None)
    st.text("\n".join([words("searched"), *map(str, folders)]))


def sidebar(weights: list[Weight]) -> tuple[Weight, Options]:
    with st.sidebar:
        weight = st.selectbox(words("weights"), weights, key="weight", format_func=lambda weight: weight.label)
        st.button(words("clear"), key="clear", icon=":material/add_comment:", on_click=clear, width="stretch")
        with st.expander(words("drawing"), expanded=False):
            temperature = st.slider(words("temperature"), 0.0, 2.0, 0.0, 0.05, key="temperature")
            still = temperature == 0
            options = options_within(
                max_new_tokens=st.slider(words("max_new_tokens"), 1, 512, 128, key="max_new_tokens"),
                temperature=temperature,
                top_p=st.slider(words("top_p"), 0.05, 1.0, 0.9, 0.05, key="top_p", disabled=still),
                top_k=st.slider(words("top_k"), 0, 200, 0, key="top_k", disabled=still),
                seed=st.number_input(
                    words("seed"), min_value=0, max_value=2**32 - 1, value=None, key="seed", disabled=still
                ),
            )
        st.caption(words("limits"))
    return weight, options


def clear() -> None:
    if st.session_state.job is not None:
        st.session_state.job.stop()
    st.session_state.update(turns=[], job=None, notice="")


def beginning(engine: Engine, weight: Weight, options: Options) -> None:
    """What to do on an empty page, with scenes to begin with."""
    if weight.image_size is None:
        st.text(words("begin_without"))
        return
    st.text(words("begin"))
    with st.container(horizontal=True):  # as many a row as the screen is wide
        for number, example in enumerate(example_scenes(st.session_state.language)):
            with st.container(width=EXAMPLE_WIDTH):
                st.image(example.scene, width="stretch")
                st.text(example.questions[0])
                st.button(words("ask_this"), key=f"example_{number}", width="stretch",
                          on_click=begin_with, args=(engine, weight, options, example))  # fmt: skip
    st.caption(attribution())


def begin_with(engine: Engine, weight: Weight, options: Options, example: demo_chat.Example) -> None:
    picture = demo_chat.keep_picture(example.scene, weight.image_size)
    turn = Turn(example.questions[0], [picture], credit=attribution(), suggestions=example.questions[1:])
    start(engine, weight, options, turn)


def send(engine: Engine, weight: Weight, options: Options, text: str, files: list[bytes]) -> None:
    """A message as a turn of the conversation, or a notice that says why not."""
    state, question = st.session_state, text.strip()
    state.notice = ""
    if not question and not files:
        return
    try:
        turn = demo_chat.new_turn(state.turns, question or words("describe"), files, weight.image_size)
    except Refused as refusal:
        which = words("file", number=refusal.facts["number"]) if "number" in refusal.facts else ""
        state.notice = which + words(refusal.key, **refusal.facts)
        return
    if state.turns and not files:
        turn.suggestions = [other for other in state.turns[-1].suggestions if other != question]
    start(engine, weight, options, turn)


def start(engine: Engine, weight: Weight, options: Options, turn: Turn) -> None:
    state = st.session_state
    if state.job is not None:  # what is disabled on the page can still be sent by hand
        return
    try:
        state.job = engine.ask(weight, *demo_chat.conversation([*state.turns, turn]), options)
    except Refused as refusal:
        state.notice = words(refusal.key, **refusal.facts)
        return
    state.turns = [*state.turns, turn]


def follow(engine: Engine, job: Job, place: st.delta_generator.DeltaGenerator) -> None:
    """Show the answer as it grows. A click interrupts this at any call of st; the next run goes on from the job."""
    waiting = 0
    while not job.over.wait(POLL_WAITING if waiting else POLL):
        job.seen()
        waiting = engine.place(job)
        place.text(words("waiting", place=waiting) if waiting else job.text or words("thinking"))
    turn = st.session_state.turns[-1]
    turn.answer, turn.failure = job.result, job.failure
    st.session_state.job = None


def show_question(turn: Turn) -> None:
    with st.chat_message("user"):
        if turn.pictures:
            st.image([picture.shown for picture in turn.pictures], width=PICTURE_WIDTH)
        if turn.credit:
            st.caption(turn.credit)
        st.text(turn.question)


def show_answer(engine: Engine, weight: Weight, number: int) -> None:
    turn: Turn = st.session_state.turns[number]
    answer = turn.answer
    if turn.failure:
        st.warning(words(turn.failure))
    if answer is None:
        return
    st.text(answer.text or words("nothing"))
    figures = [words("first", seconds=answer.seconds_to_first)]
    if answer.new_tokens >= ENOUGH_FOR_SPEED:
        figures.append(words("speed", speed=answer.tokens_per_second))
    figures.append(words("length", prompt=answer.prompt_tokens, new=answer.new_tokens))
    if answer.stopped or answer.token_ids[-1:] != (END_ID,):
        figures.append(words("stopped" if answer.stopped else "cut"))
    st.caption(" · ".join(figures))
    seen = any(earlier.pictures for earlier in st.session_state.turns[: number + 1])
    if seen and answer.token_ids and weight.image_size is not None and st.toggle(words("where"), key=f"where_{number}"):
        show_where(engine, weight, number)


def after_the_last(engine: Engine, weight: Weight, options: Options) -> None:
    """Again, and for an example what else might be asked."""
    turn: Turn = st.session_state.turns[-1]
    with st.container(horizontal=True):
        st.button(words("retry"), key="retry", icon=":material/refresh:",
                  on_click=again, args=(engine, weight, options))  # fmt: skip
        for number, question in enumerate(turn.suggestions[:3]):
            st.button(question, key=f"suggestion_{number}", on_click=send, args=(engine, weight, options, question, []))


def again(engine: Engine, weight: Weight, options: Options) -> None:
    """The last question once more, with the weights and the settings of now."""
    st.session_state.notice = ""
    *before, last = st.session_state.turns
    st.session_state.turns = before
    start(engine, weight, options, replace(last, answer=None, failure="", looked=None))
    if st.session_state.job is None:
        st.session_state.turns = [*before, last]


def show_where(engine: Engine, weight: Weight, number: int) -> None:
    """A heat map over each picture that the model had before it when it gave this answer."""
    turns = st.session_state.turns[: number + 1]
    turn = turns[-1]
    if turn.looked is None and not find_where(engine, weight, turns):
        return
    looked, found = turn.looked
    left, right = st.columns(2)
    labels = [words("whole"), *(f"{place}. {word}" for place, (word, _) in enumerate(found, 1))]
    word = left.selectbox(words("which_word"), range(len(labels)), format_func=labels.__getitem__, key=f"word_{number}")
    layers = [words("all_layers"), *map(str, range(1, looked.patches.shape[1] + 1))]
    layer = right.selectbox(words("which_layer"), range(len(layers)), format_func=layers.__getitem__,
                            key=f"layer_{number}")  # fmt: skip
    whole = slice(found[0][1].start, found[-1][1].stop) if found else slice(None)  # without the token that ends it
    maps = looked.maps(found[word - 1][1] if word else whole, layer - 1 if layer else None)
    pictures = [Image.open(BytesIO(picture.shown)) for earlier in turns for picture in earlier.pictures]
    heats = [heat_picture(*pair, float(maps.max())) for pair in zip(pictures, maps, strict=True)]
    shares = [words("picture", number=place, share=100 * float(heat.sum())) for place, heat in enumerate(maps, 1)]
    st.image(heats, caption=shares, width=MAP_WIDTH, output_format="JPEG")
    st.caption(words("hint"))


def find_where(engine: Engine, weight: Weight, turns: list[Turn]) -> bool:
    """Fills the last turn's `looked`; False, with a notice, where it cannot be had."""
    try:
        job = engine.look(weight, *demo_chat.conversation(turns), turns[-1].answer.token_ids)
    except Refused as refusal:
        st.warning(words(refusal.key, **refusal.facts))
        return False
    place = st.empty()
    while not job.over.wait(POLL):
        job.seen()
        place.text(words("thinking"))
    place.empty()
    if job.failure:
        st.warning(words(job.failure))
        return False
    turns[-1].looked = job.result
    return True


if __name__ == "__main__":
    main()
