"""Ask a trained model about pictures in a browser.

    streamlit run web_demo.py                          # the weights in out/ and in the folders in it
    streamlit run web_demo.py -- FOLDER ...            # those of other folders too

This file is the page alone. What a conversation is, what is let in, and who answers when stands in
scripts/demo/chat.py and scripts/demo/engine.py, how an answer is shown in scripts/demo/answers.py. What people and
models say is shown as plain text only: as Markdown it could fetch pictures from elsewhere. What people can mend is said
in a sentence; errors go to the terminal, in a line.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import streamlit as st

from dataset.emoji_world import attribution
from model.files import ROOT
from model.inference.answerer import Options
from scripts.demo import chat as demo_chat
from scripts.demo.answers import refused, show_answer, show_pictures, words
from scripts.demo.chat import MOST_CHARACTERS, Refused, Turn
from scripts.demo.engine import Engine, Weight, find_weights, log, options_within
from scripts.demo.export import as_html, as_json
from scripts.demo.start import WrongStart, no_folders, parse_arguments
from scripts.demo.style import clickable_cards
from scripts.demo.weights import about, file_name, fold, names
from scripts.demo.words import LANGUAGES

POLL, POLL_WAITING = 0.08, 0.3  # seconds between two looks at jobs that run, or wait for their turn
EXAMPLE_WIDTH = 160  # pixels on the page


@st.cache_resource(show_spinner=False)
def start_engine(vision_model: str | None, device: str) -> Engine:
    return Engine(vision_model, device)


@st.cache_data(show_spinner=False)
def example_scenes(language: str) -> list[demo_chat.Example]:
    return demo_chat.examples(language)


@dataclass(frozen=True)
class Setup:
    """Who is asked, and how, from now on."""

    engine: Engine
    weight: Weight
    second: Weight | None  # asked the same, side by side
    options: Options


def main() -> None:
    st.set_page_config(page_title="minimind-vlm", page_icon="🔎", layout="centered")
    clickable_cards()
    state = st.session_state
    for name, value in (("turns", []), ("jobs", []), ("notice", ""), ("draft", ""), ("editing", None)):
        state.setdefault(name, value)
    choose_language()
    st.subheader(words("title"), anchor=False)
    try:
        arguments = parse_arguments(__doc__.split("\n")[0])
    except WrongStart as wrong:
        return wrong_start(wrong)
    folders = [*arguments.folders, ROOT / "out"]
    missing = no_folders(arguments.folders)
    if missing and not state.turns:
        st.warning(words("no_folder"))
        st.code("\n".join(map(str, missing)), language=None)
    weights = find_weights(folders)
    if not weights:
        return no_weights(folders)
    setup = sidebar(start_engine(arguments.vision_model, arguments.device), weights)
    for sentence in about(setup.weight, state.language):
        st.caption(sentence)
    places = [place for number in range(len(state.turns)) for place in show_turn(setup, number)]
    if state.turns and not state.jobs:
        after_the_last(setup)
    if state.notice:
        st.warning(state.notice)
    if message := message_box(setup):
        send(setup, *message)
        st.rerun()
    if not state.turns:
        beginning(setup)
    if state.jobs:
        follow(setup.engine, places)
        st.rerun()


def message_box(setup: Setup) -> tuple[str, list[bytes]] | None:
    """The input, and what was sent with it: text and files.

    On an empty page it stands below the title: at the bottom of the window it would have Streamlit scroll there, past
    the title where the window is a phone's.
    """
    state, sees = st.session_state, setup.weight.image_size is not None
    if state.draft:  # what was refused is not lost
        state.message, state.draft = state.draft, ""
    # No file_type: the browser's filter lets through what it likes, and what take_picture says is clearer.
    message = (st if state.turns else st.container()).chat_input(
        words("ask" if sees else "ask_text"), key="message", accept_file="multiple" if sees else False,
        max_chars=MOST_CHARACTERS, disabled=bool(state.jobs),
    )  # fmt: skip
    if not message:
        return None
    return (message.text, [file.getvalue() for file in message.files]) if sees else (message, [])


def choose_language() -> None:
    """The browser's language to begin with; then whatever is chosen."""
    if "language" not in st.session_state:
        st.session_state.language = "zh" if str(st.context.locale or "").lower().startswith("zh") else "en"
    with st.sidebar:
        st.radio(words("language"), list(LANGUAGES), key="language", format_func=LANGUAGES.get, horizontal=True)


def wrong_start(wrong: WrongStart) -> None:
    if str(wrong):
        log.warning("%s", wrong)
        st.text(words("wrong_start"))
        st.code(str(wrong), language=None, wrap_lines=True)
        st.text(words("usage"))
    st.code(wrong.usage, language=None, wrap_lines=True)


def no_weights(folders: list[Path]) -> None:
    st.text(words("no_weights"))
    st.code("make quickstart", language=None)
    st.text(words("no_weights_folder"))
    st.code("streamlit run web_demo.py -- FOLDER", language=None)
    st.text("\n".join([words("searched"), *map(str, folders)]))


def sidebar(engine: Engine, weights: list[Weight]) -> Setup:
    with st.sidebar:
        st.button(words("clear"), key="clear", icon=":material/add_comment:", on_click=clear, width="stretch")
        weight, second = choose_weights(weights)
        with st.expander(words("settings"), expanded=False):
            options = choose_options()
        st.caption(words("limits"))
    return Setup(engine, weight, second, options)


def choose_weights(weights: list[Weight]) -> tuple[Weight, Weight | None]:
    """The weights to ask, and those to ask beside them."""
    language, folded = st.session_state.language, fold(weights)
    known = names(list(folded), language)
    weight = st.selectbox(words("weights"), list(folded), key="weight", format_func=known.get)
    if folded[weight] is not None and st.toggle(words("use_best"), key="use_best"):
        weight = folded[weight]
    others = [other for other in weights if other != weight and other.image_size == weight.image_size]
    if not others:
        return weight, None
    known = {"": words("no_second"), **names(others, language)}
    return weight, st.selectbox(words("second"), list(known), key="second", format_func=known.get) or None


def choose_options() -> Options:
    temperature = st.slider(words("temperature"), 0.0, 2.0, 0.0, 0.05, key="temperature")
    still = temperature == 0
    return options_within(
        max_new_tokens=st.slider(words("max_new_tokens"), 1, 512, 128, key="max_new_tokens"),
        temperature=temperature,
        top_p=st.slider(words("top_p"), 0.05, 1.0, 0.9, 0.05, key="top_p", disabled=still),
        top_k=st.slider(words("top_k"), 0, 200, 0, key="top_k", disabled=still),
        seed=st.number_input(words("seed"), min_value=0, max_value=2**32 - 1, value=None, key="seed", disabled=still),
    )


def stop() -> None:
    for job in st.session_state.jobs:
        job.stop()


def clear() -> None:
    stop()
    st.session_state.update(turns=[], jobs=[], notice="", draft="", editing=None)


def beginning(setup: Setup) -> None:
    """What to do on an empty page, with scenes to begin with: a click on one asks its question."""
    if setup.weight.image_size is None:
        st.text(words("begin_without"))
        return
    st.text(words("begin"))
    with st.container(horizontal=True):  # as many a row as the screen is wide
        for number, example in enumerate(example_scenes(st.session_state.language)):
            with st.container(width=EXAMPLE_WIDTH, key=f"card_{number}", gap="small"):
                st.image(example.scene, width="stretch")
                st.text(example.questions[0])
                st.button(example.questions[0], key=f"example_{number}", width="stretch",
                          on_click=begin_with, args=(setup, example))  # fmt: skip
    st.caption(attribution())


def begin_with(setup: Setup, example: demo_chat.Example) -> None:
    picture = demo_chat.keep_picture(example.scene, setup.weight.image_size)
    start(setup, Turn(example.questions[0], [picture], credit=attribution(), suggestions=example.questions[1:]))


def send(setup: Setup, text: str, files: list[bytes]) -> None:
    """A message as a turn of the conversation, or a notice that says why not, and the words back in the input."""
    state, question = st.session_state, text.strip()
    state.notice = ""
    if not question and not files:
        return
    try:
        turn = demo_chat.new_turn(state.turns, question or words("describe"), files, setup.weight.image_size)
    except Refused as refusal:
        state.notice, state.draft = refused(refusal), question[:MOST_CHARACTERS]
        return
    if state.turns and not files:
        turn.suggestions = [other for other in state.turns[-1].suggestions if other != question]
    if not start(setup, turn):
        state.draft = question


def start(setup: Setup, turn: Turn) -> bool:
    """Ask; False, with a notice, where it cannot be asked now."""
    state = st.session_state
    if state.jobs:  # what is disabled on the page can still be sent by hand
        return False
    state.notice, state.editing = "", None
    turn = replace(turn, weight=setup.weight, options=setup.options)
    turns = [*state.turns, turn]
    try:
        jobs = [setup.engine.ask(setup.weight, *demo_chat.conversation(turns), setup.options)]
    except Refused as refusal:
        state.notice = refused(refusal)
        return False
    if setup.second is not None:
        turn.second = replace(turn, weight=setup.second)
        told = demo_chat.conversation(demo_chat.seconds(turns))
        try:
            jobs.append(setup.engine.ask(setup.second, *told, setup.options))
        except Refused as refusal:
            turn.second.failure = refusal.key
    state.turns, state.jobs = turns, jobs
    return True


def show_turn(setup: Setup, number: int) -> list[st.delta_generator.DeltaGenerator]:
    """A question with its answers; the places of those that are still to come."""
    state = st.session_state
    turn: Turn = state.turns[number]
    jobs = state.jobs if number == len(state.turns) - 1 else []
    with st.chat_message("user"):
        show_pictures(turn)
        if state.editing == number and not state.jobs:
            edit(setup, number)
        else:
            st.text(turn.question)
            if not state.jobs:
                st.button(words("edit"), key=f"edit_{number}", icon=":material/edit:", type="tertiary",
                          on_click=state.update, kwargs={"editing": number})  # fmt: skip
    places = []
    with st.chat_message("assistant"):
        columns = [st.container()] if turn.second is None else st.columns(2)
        for side, column in enumerate(columns):
            turns = demo_chat.seconds(state.turns[: number + 1]) if side else state.turns[: number + 1]
            with column:
                if turn.second is not None:
                    st.caption(file_name(turns[-1].weight))
                if side < len(jobs):
                    places.append(st.empty())
                else:
                    show_answer(setup.engine, turns, side)
        if jobs:
            st.button(words("stop"), key="stop", icon=":material/stop_circle:", on_click=stop)
    return places


def edit(setup: Setup, number: int) -> None:
    """The question of a turn, to be asked anew in other words. What came after it is gone then."""
    with st.form(key=f"form_{number}", border=False):
        question = st.text_area(words("edited"), st.session_state.turns[number].question, key=f"edited_{number}",
                                max_chars=MOST_CHARACTERS)  # fmt: skip
        with st.container(horizontal=True):
            asked = st.form_submit_button(words("send"), key=f"edit_ask_{number}", type="primary")
            cancelled = st.form_submit_button(words("cancel"), key=f"edit_cancel_{number}")
    if cancelled or asked and not question.strip():
        st.session_state.editing = None
        st.rerun()
    if asked:
        ask_anew(setup, number, question.strip())
        st.rerun()


def follow(engine: Engine, places: list[st.delta_generator.DeltaGenerator]) -> None:
    """Show answers as they grow. A click interrupts this at any call of st; the next run goes on from the jobs."""
    state = st.session_state
    turn = state.turns[-1]
    asked = list(zip(state.jobs, places, (turn, turn.second), strict=False))
    waiting = 0
    while going := [job for job in state.jobs if not job.over.is_set()]:
        going[0].over.wait(POLL_WAITING if waiting else POLL)
        waiting = engine.place(going[0])
        for job, place, _ in asked:
            job.seen()
            before = engine.place(job)
            place.text(words("waiting", place=before) if before else job.text or words("thinking"))
    for job, _, answered in asked:
        answered.answer, answered.failure = job.result, job.failure
    state.jobs = []


def after_the_last(setup: Setup) -> None:
    """Again, take it home, and for an example what else might be asked."""
    state = st.session_state
    last = len(state.turns) - 1
    turn: Turn = state.turns[last]
    with st.container(horizontal=True):
        st.button(words("retry"), key="retry", icon=":material/refresh:",
                  on_click=ask_anew, args=(setup, last, turn.question))  # fmt: skip
        with st.popover(words("save"), icon=":material/download:"):
            for form, content in (("html", partial(as_html, state.turns, state.language)),
                                  ("json", partial(as_json, state.turns))):  # fmt: skip
                st.download_button(words(f"save_{form}"), content, f"conversation.{form}", key=f"save_{form}",
                                   on_click="ignore", width="stretch")  # fmt: skip
        for number, question in enumerate(turn.suggestions[:3]):
            st.button(question, key=f"suggestion_{number}", on_click=send, args=(setup, question, []))


def ask_anew(setup: Setup, number: int, question: str) -> None:
    """A question once more or in other words, with the weights and the settings of now; what came after it goes."""
    state = st.session_state
    before = state.turns
    if state.jobs:
        return
    try:
        turn = demo_chat.asked_otherwise(before[number], question)
    except Refused as refusal:
        state.notice = refused(refusal)
        return
    state.turns = before[:number]
    if not start(setup, turn):
        state.turns = before


if __name__ == "__main__":
    main()
