"""The demo in front of a server: what it sends, how an answer grows and is stopped, what a server's trouble becomes."""

import base64
import json
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from io import BytesIO

import pytest
from PIL import Image

from helpers.data import make_picture
from helpers.repository import ROOT
from model.inference.answerer import Options, user_turn
from model.messages import UserError
from model.views import Sight
from scripts.demo import limits, remote
from scripts.demo.limits import Refused
from scripts.demo.remote import KEY, Remote
from scripts.demo.text import TEXT
from scripts.demo.weights import about, names

MODELS = {"data": [{"id": "sft_vlm_192", "object": "model"}, {"id": "org/Qwen2.5-VL", "image_size": 32, "resample": 2}]}
USAGE = {"choices": [], "usage": {"prompt_tokens": 213, "completion_tokens": 3, "total_tokens": 216}}


def piece(text: str | None = None, finish_reason: str | None = None) -> dict:
    delta = {} if text is None else {"content": text}
    return {"choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}]}


GREEDY = Options()
SOUND = [piece(""), piece("a "), piece("cat"), piece(None, "stop"), USAGE, "[DONE]"]


class StandIn:
    """A server on this machine. events: what it streams; a number waits so many seconds, bytes go as they are."""

    def __init__(self):
        self.status, self.events, self.models = 200, SOUND, json.dumps(MODELS)
        self.error: dict | str = {}
        self.asked: list[dict] = []
        self.keys: list[str | None] = []
        self.gone = threading.Event()  # whoever asked has hung up
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                stand_in.keys.append(self.headers["Authorization"])
                stand_in.reply(self, stand_in.models.encode())

            def do_POST(self) -> None:
                stand_in.keys.append(self.headers["Authorization"])
                stand_in.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
                stand_in.stream(self)

            def log_message(self, *arguments) -> None:
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, args=(0.01,), daemon=True).start()
        self.address = f"http://127.0.0.1:{self.server.server_port}"

    def reply(self, handler: BaseHTTPRequestHandler, content: bytes) -> None:
        handler.send_response(self.status)
        handler.end_headers()
        handler.wfile.write(content if self.status == 200 else json.dumps({"error": self.error}).encode())

    def stream(self, handler: BaseHTTPRequestHandler) -> None:
        if self.status != 200:
            return self.reply(handler, b"")
        handler.send_response(200)
        handler.end_headers()
        try:
            for event in self.events:
                if isinstance(event, float):
                    time.sleep(event)
                    continue
                text = event if isinstance(event, str) else json.dumps(event, ensure_ascii=False)
                handler.wfile.write(event if isinstance(event, bytes) else f"data: {text}\n\n".encode())
        except OSError:
            self.gone.set()

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def stand_in(monkeypatch) -> Iterator[StandIn]:
    monkeypatch.delenv(KEY, raising=False)
    server = StandIn()
    yield server
    server.close()


def ask(server: StandIn | Remote, options: Options = GREEDY, seconds: float = 10.0, pictures: int = 1):
    """A job that is over."""
    job = begin(server, options, pictures)
    assert job.over.wait(seconds)
    return job


def begin(server: StandIn | Remote, options: Options = GREEDY, pictures: int = 1):
    asked = server if isinstance(server, Remote) else Remote(server.address)
    shown = [make_picture(seed, size=32) for seed in range(pictures)]
    return asked.ask(asked.models()[0], [user_turn("What is it?", pictures)], shown, options)


def test_an_answer_grows_and_has_its_figures(stand_in):
    job = ask(stand_in)
    answer = job.result
    assert (job.text, job.failure) == ("a cat", "")
    assert (answer.text, answer.prompt_tokens, answer.new_tokens) == ("a cat", 213, 3)
    assert not answer.stopped and not answer.cut and answer.token_ids == ()  # so the page offers no maps
    assert 0 < answer.seconds_to_first < 5 and answer.tokens_per_second > 0


def test_what_is_sent_is_what_the_protocol_asks_for(stand_in):
    ask(stand_in, pictures=2)
    ask(stand_in, Options(max_new_tokens=7, temperature=0.5, top_p=0.8, top_k=40, seed=3))
    plain, sampled = stand_in.asked
    *pictures, question = plain["messages"][0]["content"]
    assert question == {"type": "text", "text": "\nWhat is it?"}
    for seed, part in enumerate(pictures):
        head, _, content = part["image_url"]["url"].partition(",")
        sent = Image.open(BytesIO(base64.b64decode(content)))
        assert head == "data:image/png;base64" and sent.tobytes() == make_picture(seed, size=32).tobytes()
    settings = {name: value for name, value in plain.items() if name not in ("messages", "stream", "stream_options")}
    assert settings == {"model": "sft_vlm_192", "max_tokens": 256, "temperature": 0.0}
    wanted = {"max_tokens": 7, "temperature": 0.5, "top_p": 0.8, "top_k": 40, "seed": 3}
    assert {name: sampled[name] for name in wanted} == wanted and sampled["stream"]


def test_the_key_comes_from_the_environment(stand_in, monkeypatch):
    ask(stand_in)
    monkeypatch.setenv(KEY, "a-secret")
    ask(stand_in)
    assert stand_in.keys == [None, None, "Bearer a-secret", "Bearer a-secret"]


def test_models_are_named_as_the_server_names_them(stand_in):
    models = Remote(stand_in.address + "/v1/").models()
    assert list(names(models, "en").values()) == ["sft_vlm_192", "Qwen2.5-VL · org"]
    assert [model.sight for model in models] == [Sight(224, 3, frames=0), Sight(32, 2, frames=0)]
    assert about(models[1], "en") == [f"`org/Qwen2.5-VL` answers at `{stand_in.address}`"]


@pytest.mark.parametrize(
    ("status", "error", "failure"),
    [
        (401, {"message": "no"}, "no_entry"),
        (429, {"message": "later"}, "server_busy"),
        (503, {"message": "stopping"}, "server_busy"),
        (413, {"message": "large"}, "too_long"),
        (400, {"param": "messages", "message": "take 5,000 tokens"}, "too_long"),
        (400, {"code": "context_length_exceeded"}, "too_long"),
        (400, {"param": "top_k", "message": "is not known here\x1b[31m"}, "server_refused"),
        (400, ["nonsense"], "server_refused"),
        (500, "nonsense", "server_refused"),
    ],
)
def test_a_refusal_becomes_a_sentence(stand_in, caplog, status, error, failure):
    asked = Remote(stand_in.address)
    asked.models()
    stand_in.status, stand_in.error = status, error
    assert ask(asked).failure == failure and failure in TEXT
    assert f"said {status}" in caplog.text and "\x1b" not in caplog.text


BROKEN = {
    "gone in the middle": ([piece("a "), piece("cat")], "a cat"),
    "an error in the middle": ([piece("a "), {"error": {"message": "out of memory"}}], "a "),
    "no JSON": ([piece("a "), "{nonsense"], "a "),
    "another form": ([piece("a "), {"choices": [{"text": "cat"}]}], "a "),
    "no UTF-8": ([piece("a "), b"data: \xff\xfe\n\n"], "a "),
    "nothing at all": ([], ""),
    "a page": ([b"<html>\n<body>\n"], ""),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_came_is_kept_when_the_rest_does_not(stand_in, what):
    stand_in.events, text = BROKEN[what]
    job = ask(stand_in)
    assert (job.failure, job.result.text, job.result.stopped) == ("broke_off", text, False)


def test_an_endless_answer_has_an_end(stand_in, monkeypatch):
    monkeypatch.setattr(remote, "LONGEST_TEXT", 1000)
    stand_in.events = [piece("a" * 100)] * 1000
    job = ask(stand_in)
    assert len(job.result.text) < 1200 and job.result.stopped


@pytest.mark.parametrize("before", [0, 1])
def test_stop_hangs_up_even_while_nothing_comes(stand_in, before):
    """Also before the first piece: the server's queue is long."""
    stand_in.events = [piece("a ")] * before + [1.5] + [piece("cat")] * 2000
    job = begin(stand_in)
    while len(job.text) < 2 * before:
        time.sleep(0.01)
    job.stop()
    assert job.over.wait(1.0)
    assert (job.result.text, job.result.stopped, job.failure) == ("a " * before, True, "")
    assert stand_in.gone.wait(6.0)


def test_out_of_time_is_told(stand_in, monkeypatch):
    monkeypatch.setattr(limits, "MAX_SECONDS", 0.3)
    stand_in.events = [piece("a "), 2.0, *SOUND]
    job = ask(stand_in)
    assert (job.failure, job.result.text) == ("out_of_time", "a ")


def test_a_server_that_is_gone_is_unreachable(stand_in):
    asked = Remote(stand_in.address)
    asked.models()
    stand_in.close()
    assert ask(asked).failure == "unreachable"  # the list that it gave still stands
    with pytest.raises(Refused, match="unreachable"):
        Remote(stand_in.address).models()


@pytest.mark.parametrize("models", ["nonsense", "[]", '{"data": [{}]}', '{"data": [{"id": ""}]}', '{"data": 1}',
                                    '{"data": [{"id": "m", "image_size": 1000000}]}',
                                    '{"data": [{"id": "m", "resample": 77}]}'])  # fmt: skip
def test_a_list_that_is_none_is_refused(stand_in, models):
    stand_in.models = models
    with pytest.raises(Refused, match="server_refused"):
        Remote(stand_in.address).models()


def test_only_so_many_ask_at_once(stand_in, monkeypatch):
    monkeypatch.setattr(limits, "MAX_WAITING", 2)
    stand_in.events = [0.5, *SOUND]
    asked = Remote(stand_in.address)
    jobs = [begin(asked), begin(asked)]
    with pytest.raises(Refused, match="server_busy"):
        begin(asked)
    assert all(job.over.wait(5.0) and job.result.text == "a cat" for job in jobs)


@pytest.mark.parametrize(
    "address",
    ["127.0.0.1:8000", "ftp://host", "http://", "http://me:secret@host", "http://host:port", "http://h?key=1"],
)
def test_what_is_no_address_is_refused(address):
    with pytest.raises(UserError, match="an address is like"):
        Remote(address)


@pytest.fixture
def page(stand_in, monkeypatch):
    """page(): a session of a page in front of the stand-in."""
    testing = pytest.importorskip("streamlit.testing.v1", reason="the demo needs streamlit")

    def open_page(*flags: str):
        monkeypatch.setattr(sys, "argv", ["web_demo.py", "--server", stand_in.address, *flags])
        found = testing.AppTest.from_file(str(ROOT / "web_demo.py"), default_timeout=30).run()
        assert not found.exception
        return found

    return open_page


def test_the_page_asks_the_server(page, stand_in):
    shown = page()
    assert [box.options for box in shown.selectbox] == [["sft_vlm_192", "Qwen2.5-VL · org"]]  # which sees another size
    shown.button(key="example_0").click()
    shown.run()
    assert not shown.exception and "a cat" in [element.value for element in shown.text]
    assert len(stand_in.asked[0]["messages"][0]["content"]) == 2 and not shown.toggle
    stand_in.status = 429
    shown.chat_input[0].set_value("And now?")
    shown.run()
    assert shown.warning[0].value == TEXT["server_busy"]["en"]
    assert [turn["role"] for turn in stand_in.asked[1]["messages"]] == ["user", "assistant", "user"]


def test_the_page_says_what_is_wrong_with_the_server(page, stand_in):
    stand_in.status = 401
    shown = page()
    assert shown.warning[0].value == TEXT["no_entry"]["en"] and shown.code[0].value == stand_in.address
    assert not shown.chat_input


def test_what_a_server_decides_is_no_flag_beside_it(page):
    assert "leave folders, --vision_model, --device and --context_window out" in page("--device", "cpu").code[0].value
