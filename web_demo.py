"""Ask a trained model about pictures in a browser.

    make demo                                          # what was trained, in out/ and the folders in it, or what ships
    streamlit run web_demo.py                          # the same, in an environment of your own
    streamlit run web_demo.py -- FOLDER ...            # those of other folders too
    streamlit run web_demo.py -- --server http://127.0.0.1:8000    # what scripts/serve.py or another server has

From a click to an answer: a button calls a method of the tab's Chat (scripts/demo/chat.py), which puts a job into the
queue of the one Engine (scripts/demo/engine.py), or asks a server (scripts/demo/remote.py). Then Streamlit runs main()
again, and scripts/demo/view.py shows the answer, while it grows and when it is there. What is let in stands in
scripts/demo/limits.py, which weights are offered in scripts/demo/weights.py.

What people and models say is shown as plain text only: as Markdown it could fetch pictures from elsewhere. What people
can mend is said in a sentence; errors go to the terminal, in a line.
"""

import argparse
from difflib import get_close_matches
from pathlib import Path
from typing import NoReturn

import streamlit as st
from streamlit.delta_generator import DeltaGenerator

from dataset.emoji_world import attribution
from model.files import ROOT, SHIPPED_MODEL
from model.inference.answerer import Options, add_window_flag
from model.messages import UserError
from scripts.demo.chat import Chat, examples
from scripts.demo.engine import Engine, Job, log
from scripts.demo.export import as_html, as_json
from scripts.demo.limits import MAX_CHARACTERS, Refused, options_within
from scripts.demo.remote import Remote
from scripts.demo.text import LANGUAGES
from scripts.demo.view import STYLE, follow, reason, show_pictures, show_reply, text
from scripts.demo.weights import Weight, about, file_name, names, offered, runs

EXAMPLE_WIDTH = 160  # pixels on the page


class Flags(argparse.ArgumentParser):
    """argparse ends the process, which in a page is an empty one; here the page says what is wrong, and ends there."""

    def error(self, message: str) -> NoReturn:
        log.warning("%s", message)
        st.text(text("wrong_start"))
        st.code(message, language=None, wrap_lines=True)
        st.text(text("usage"))
        self.print_help()

    def print_help(self, file: object = None) -> NoReturn:
        st.code(self.format_help(), language=None, wrap_lines=True)
        st.stop()


def parse_arguments() -> argparse.Namespace:
    """What stands after the `--` of the command line."""
    parser = Flags(prog="streamlit run web_demo.py --", description=__doc__.split("\n")[0], allow_abbrev=False)
    parser.add_argument("folders", type=Path, nargs="*", help="folders with .safetensors, beside out/")
    parser.add_argument(
        "--vision_model", help="folder of the vision tower; by default the one trained with. MiniMind's .pth need it"
    )
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:N or mps")
    add_window_flag(parser)
    parser.add_argument(
        "--server", help="address of a server that answers, as http://127.0.0.1:8000; its key in MINIMIND_API_KEY"
    )
    known, unknown = parser.parse_known_args()
    if unknown:
        near = get_close_matches(
            unknown[0].split("=")[0].replace("-", "_"),
            ["__vision_model", "__device", "__context_window", "__server"],
            1,
        )
        meant = f"; did you mean --{near[0][2:]}?" if near else ""
        parser.error(f"unrecognized arguments: {' '.join(unknown)}{meant}")
    own = known.folders or known.vision_model or known.device != "auto" or known.context_window is not None
    if known.server and own:
        parser.error(
            "--server has weights, a device and a window of its own: leave folders, --vision_model, --device and "
            "--context_window out"
        )
    try:
        known.remote = reach_server(known.server) if known.server else None
    except UserError as error:
        parser.error(str(error))
    return known


@st.cache_resource(show_spinner=False)
def start_engine(vision_model: str | None, device: str, window: int | None) -> Engine:
    return Engine(vision_model, device, window)


@st.cache_resource(show_spinner=False)
def reach_server(address: str) -> Remote:
    return Remote(address)


def main() -> None:
    st.set_page_config(page_title="minimind-vlm", page_icon="🔎", layout="centered")
    st.html(STYLE)
    choose_language()
    st.subheader(text("title"), anchor=False)
    arguments = parse_arguments()
    engine = arguments.remote or start_engine(arguments.vision_model, arguments.device, arguments.context_window)
    chat = st.session_state.setdefault("chat", Chat(engine))
    weights = models_of(arguments.remote) if arguments.remote else weights_of(arguments, not chat.turns)
    if not weights:
        return
    sidebar(chat, weights)
    for sentence in about(chat.weights[0], st.session_state.language):
        st.caption(sentence)
    growing = [shown for number in range(len(chat.turns)) for shown in show_turn(chat, number)]
    if chat.turns and not chat.answering:
        after_the_last(chat)
    if chat.notice:
        st.warning(reason(chat.notice))
    message_box(chat)
    if not chat.turns:
        beginning(chat)
    if chat.answering:
        follow(chat.engine, growing)
        chat.finish()
        st.rerun()


def weights_of(arguments: argparse.Namespace, begins: bool) -> list[Weight]:
    """Those of the folders; where there are none, the page says how to get some."""
    missing = [folder for folder in arguments.folders if not folder.is_dir()]
    if missing and begins:
        st.warning(text("no_folder"))
        st.code("\n".join(map(str, missing)), language=None)
    weights = offered(arguments.folders, ROOT, arguments.vision_model)
    if not weights:
        no_weights([*arguments.folders, ROOT / "out"])
    return weights


def models_of(server: Remote) -> list[Weight]:
    """Those that a server offers; where there are none, the page says why."""
    try:
        weights, why = server.models(), text("no_models")
    except Refused as refusal:
        weights, why = [], reason(refusal)
    if not weights:
        st.warning(why)
        st.code(server.address, language=None)
    return weights


def choose_language() -> None:
    """The browser's language to begin with; then whatever is chosen."""
    if "language" not in st.session_state:
        st.session_state.language = "zh" if str(st.context.locale or "").lower().startswith("zh") else "en"
    with st.sidebar:
        st.radio(text("language"), list(LANGUAGES), key="language", format_func=LANGUAGES.get, horizontal=True)


def no_weights(folders: list[Path]) -> None:
    st.text(text("no_weights"))
    st.code("make quickstart", language=None)
    st.text(text("no_weights_shipped"))
    st.code(f"git checkout {SHIPPED_MODEL}", language=None)
    st.text(text("no_weights_folder"))
    st.code("streamlit run web_demo.py -- FOLDER", language=None)
    st.text("\n".join([text("searched"), *map(str, folders)]))


def sidebar(chat: Chat, weights: list[Weight]) -> None:
    """Who is asked from now on, and how."""
    with st.sidebar:
        st.button(text("clear"), key="clear", icon=":material/add_comment:", on_click=chat.clear, width="stretch")
        chat.weights = choose_weights(weights)
        with st.expander(text("settings"), expanded=False):
            chat.options = choose_options()
        st.caption(text("limits"))


def choose_weights(weights: list[Weight]) -> list[Weight]:
    """The weights to ask; a second of them where two are compared."""
    language, best = st.session_state.language, runs(weights)
    known = names(list(best), language)
    weight = st.selectbox(text("weights"), list(best), key="weight", format_func=known.get)
    if best[weight] is not None and st.toggle(text("use_best"), key="use_best"):
        weight = best[weight]
    others = [other for other in weights if other != weight and other.sight == weight.sight]
    if not others:
        return [weight]
    known = {"": text("no_second"), **names(others, language)}
    second = st.selectbox(text("second"), list(known), key="second", format_func=known.get)
    return [weight, second] if second else [weight]


def choose_options() -> Options:
    temperature = st.slider(text("temperature"), 0.0, 2.0, 0.0, 0.05, key="temperature")
    still = temperature == 0
    return options_within(
        max_new_tokens=st.slider(text("max_new_tokens"), 1, 512, 128, key="max_new_tokens"),
        temperature=temperature,
        top_p=st.slider(text("top_p"), 0.05, 1.0, 0.9, 0.05, key="top_p", disabled=still),
        top_k=st.slider(text("top_k"), 0, 200, 0, key="top_k", disabled=still),
        seed=st.number_input(text("seed"), min_value=0, max_value=2**32 - 1, value=None, key="seed", disabled=still),
    )


def message_box(chat: Chat) -> None:
    """The input.

    On an empty page it stands below the title: at the bottom of the window it would have Streamlit scroll there, past
    the title where the window is a phone's.
    """
    sees = chat.sight is not None
    if chat.draft:  # what was refused is not lost
        st.session_state.message, chat.draft = chat.draft, ""
    # No file_type: the browser's filter lets through what it likes, and what read_upload says is clearer.
    message = (st if chat.turns else st.container()).chat_input(
        text("ask" if sees else "ask_text"), key="message", accept_file="multiple" if sees else False,
        max_chars=MAX_CHARACTERS, disabled=bool(chat.answering),
    )  # fmt: skip
    if message:
        question, files = (message.text, message.files) if sees else (message, [])
        chat.send(question.strip(), [file.getvalue() for file in files], wordless=text("describe"))
        st.rerun()


def beginning(chat: Chat) -> None:
    """What to do on an empty page, with scenes to begin with: a click on one asks its question."""
    if chat.sight is None:
        st.text(text("begin_without"))
        return
    st.text(text("begin"))
    with st.container(horizontal=True):  # as many a row as the screen is wide
        for number, (scene, questions) in enumerate(examples(st.session_state.language)):
            with st.container(width=EXAMPLE_WIDTH, key=f"card_{number}", gap="small"):
                st.image(scene, width="stretch")
                st.text(questions[0])
                st.button(questions[0], key=f"example_{number}", width="stretch",
                          on_click=chat.begin_with, args=(scene, questions))  # fmt: skip
    st.caption(attribution())


def show_turn(chat: Chat, number: int) -> list[tuple[Job, DeltaGenerator]]:
    """A question with its answers. Returns the jobs of those still to come, each with its place on the page."""
    turn = chat.turns[number]
    with st.chat_message("user"):
        show_pictures(turn)
        if chat.editing == number and not chat.answering:
            edit(chat, number)
        else:
            st.text(turn.question)
            if not chat.answering:
                st.button(text("edit"), key=f"edit_{number}", icon=":material/edit:", type="tertiary",
                          on_click=setattr, args=(chat, "editing", number))  # fmt: skip
    growing = []
    with st.chat_message("assistant"):
        columns = st.columns(2) if len(turn.replies) == 2 else [st.container()]
        for side, (reply, column) in enumerate(zip(turn.replies, columns, strict=True)):
            with column:
                if len(turn.replies) == 2:
                    st.caption(file_name(reply.weight))
                if reply.job:
                    growing.append((reply.job, st.empty()))
                else:
                    show_reply(chat, number, side)
        if growing:
            st.button(text("stop"), key="stop", icon=":material/stop_circle:", on_click=chat.stop)
    return growing


def edit(chat: Chat, number: int) -> None:
    """The question of a turn, to be asked anew in other words. What came after it is gone then."""
    with st.form(key=f"form_{number}", border=False):
        question = st.text_area(text("edited"), chat.turns[number].question, key=f"edited_{number}",
                                max_chars=MAX_CHARACTERS).strip()  # fmt: skip
        with st.container(horizontal=True):
            asked = st.form_submit_button(text("send"), key=f"edit_ask_{number}", type="primary")
            cancelled = st.form_submit_button(text("cancel"), key=f"edit_cancel_{number}")
    if asked and question:
        chat.ask_again(number, question)
    elif asked or cancelled:
        chat.editing = None
    if asked or cancelled:
        st.rerun()


def after_the_last(chat: Chat) -> None:
    """Again, take it home, and for an example what else might be asked."""
    turn, language = chat.turns[-1], st.session_state.language
    with st.container(horizontal=True):
        st.button(text("retry"), key="retry", icon=":material/refresh:",
                  on_click=chat.ask_again, args=(len(chat.turns) - 1, turn.question))  # fmt: skip
        with st.popover(text("save"), icon=":material/download:"):
            # Made now and not at the click: what Streamlit puts off it may have forgotten by then.
            for form, content in (("html", as_html(chat.turns, language)), ("json", as_json(chat.turns))):
                st.download_button(text(f"save_{form}"), content, f"conversation.{form}", key=f"save_{form}",
                                   on_click="ignore", width="stretch")  # fmt: skip
        for number, question in enumerate(turn.suggestions[:3]):
            st.button(question, key=f"suggestion_{number}", on_click=chat.send, args=(question,))


if __name__ == "__main__":
    main()
