"""The official client of OpenAI's protocol against our server: what its users do, and what they meet."""

import asyncio
import base64
import os
import signal
import subprocess
import sys
import threading

import pytest

from helpers.data import encoded
from helpers.models import SIZES, enliven
from helpers.repository import ROOT
from helpers.serving import as_part, serving, slow_steps
from model.inference.answerer import Answerer, Options, assistant_turn, user_turn
from model.weights import build_vlm, save_weights
from scripts.server.limits import Limits

openai = pytest.importorskip("openai", reason="openai is not here: pip install -r requirements/engines.txt")

KEY, MOST = "s3cret", 12


@pytest.fixture(scope="module")
def answerer(tower_folder) -> Answerer:
    return Answerer(enliven(build_vlm(SIZES, tower_folder)).eval())


@pytest.fixture(scope="module")
def served(answerer):
    with serving(answerer, key=KEY) as running:
        yield running


def client_of(served, **settings):
    return openai.OpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", **{"api_key": KEY, "timeout": 30, **settings})


@pytest.fixture
def client(served):
    with client_of(served) as connected:
        yield connected


def alone(answerer, text, *pictures, **options) -> str:
    prompt = answerer.prompt([user_turn(text, len(pictures))], pictures)
    return answerer.stream(prompt, Options(**{"max_new_tokens": MOST, **options})).text


def asked(*content) -> list[dict]:
    parts = [{"type": "text", "text": part} if isinstance(part, str) else part for part in content]
    return [{"role": "user", "content": parts}]


def test_a_picture_as_openai_shows_it(client, answerer, picture):
    """Words first, then the picture, with a detail: as in the examples of its pages."""
    url = f"data:image/jpeg;base64,{base64.b64encode(encoded(picture(1))).decode()}"
    part = {"type": "image_url", "image_url": {"url": url, "detail": "high"}}
    answer = client.chat.completions.create(
        model="tiny", messages=asked("What is it?", part), max_completion_tokens=MOST
    )
    assert answer.choices[0].message.content == alone(answerer, "What is it?", picture(1))
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + answer.usage.completion_tokens


def test_a_conversation_that_hands_back_what_it_got(client, answerer, picture):
    messages = asked(as_part(picture(1)), "What is it?")
    first = client.chat.completions.create(model="tiny", messages=messages, max_tokens=MOST)
    messages += [first.choices[0].message, {"role": "user", "content": "And now?"}]
    second = client.chat.completions.create(model="tiny", messages=messages, max_tokens=MOST)
    turns = [user_turn("What is it?", 1), assistant_turn(first.choices[0].message.content), user_turn("And now?", 0)]
    expected = answerer.stream(answerer.prompt(turns, [picture(1)]), Options(MOST)).text
    assert second.choices[0].message.content == expected


def test_a_stream(client, answerer, picture):
    with client.chat.completions.create(
        model="tiny", messages=asked(as_part(picture(2)), "What?"), max_tokens=MOST, stream=True,
        stream_options={"include_usage": True},
    ) as stream:  # fmt: skip
        chunks = list(stream)
    assert chunks[-1].usage.completion_tokens == MOST or chunks[-2].choices[0].finish_reason == "stop"
    text = "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    assert text == alone(answerer, "What?", picture(2))


def test_the_stream_helper_of_the_client(client, answerer):
    """It takes an answer that was cut for a mistake."""
    expected = alone(answerer, "What?", stop=("e",))
    with client.chat.completions.stream(model="tiny", messages=asked("What?"), stop="e") as stream:
        assert "".join(event.delta for event in stream if event.type == "content.delta") == expected
        assert stream.get_final_completion().choices[0].message.content == expected


def test_sampling_stops_and_logprobs(client, answerer):
    settings = {"temperature": 1.5, "top_p": 1.0, "seed": 7}
    answer = client.chat.completions.create(model="tiny", messages=asked("Say."), max_tokens=MOST, n=1, user="me",
                                            logprobs=True, top_logprobs=3, **settings)  # fmt: skip
    choice = answer.choices[0]
    assert choice.message.content == alone(answerer, "Say.", **settings)
    assert all(len(one.top_logprobs) == 3 and one.logprob <= 0 for one in choice.logprobs.content)
    cut = client.chat.completions.create(model="tiny", messages=asked("Say."), max_tokens=MOST, stop=["e"])
    assert cut.choices[0].message.content == alone(answerer, "Say.", stop=("e",))


def test_models(client):
    assert [model.id for model in client.models.list()] == ["tiny"] and client.models.retrieve("tiny").id == "tiny"


def test_errors_are_the_clients_own(served, client):
    with pytest.raises(openai.BadRequestError, match="temperature is 3") as refused:
        client.chat.completions.create(model="tiny", messages=asked("x"), temperature=3)
    assert refused.value.param == "temperature" and refused.value.type == "invalid_request_error"
    with pytest.raises(openai.BadRequestError, match=r"messages\[0\].content\[1\] is no picture that can be used"):
        client.chat.completions.create(model="tiny", messages=asked("x", as_part(b"no picture")))
    with pytest.raises(openai.NotFoundError, match="this server has 'tiny'"):
        client.chat.completions.create(model="gpt-4o", messages=asked("x"))
    with (
        pytest.raises(openai.AuthenticationError, match="not the right one"),
        client_of(served, api_key="wrong") as other,
    ):
        other.models.list()
    with pytest.raises(openai.APIStatusError) as too_large:
        client.chat.completions.create(model="tiny", messages=asked("x" * 80_000_000))
    assert too_large.value.status_code == 413


def test_the_client_comes_again_where_too_many_are_asking(answerer, monkeypatch):
    slow_steps(answerer, 0.02, monkeypatch)
    with serving(answerer, key=KEY, limits=Limits(rows=1, waiting=0)) as served, client_of(served) as client:
        stream = client.chat.completions.create(model="tiny", messages=asked("x"), max_tokens=1000, stream=True)
        next(stream)
        with pytest.raises(openai.RateLimitError):
            client.with_options(max_retries=0).chat.completions.create(model="tiny", messages=asked("x"))
        threading.Timer(0.3, stream.close).start()
        again = client.with_options(max_retries=3).chat.completions.create(
            model="tiny", messages=asked("x"), max_tokens=1
        )
        assert again.choices[0].finish_reason == "length"


def test_many_at_once_without_threads(served, answerer, picture):
    async def ask_all() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"http://127.0.0.1:{served.port}/v1", api_key=KEY) as client:
            requests = [
                client.chat.completions.create(model="tiny", messages=asked(as_part(picture(number % 4)), f"{number}?"),
                                               max_tokens=MOST)
                for number in range(24)
            ]  # fmt: skip
            return [answer.choices[0].message.content for answer in await asyncio.gather(*requests)]

    assert asyncio.run(ask_all()) == [alone(answerer, f"{number}?", picture(number % 4)) for number in range(24)]


def test_the_command_lets_a_stream_end_at_a_signal(answerer, tmp_path):
    """A process of its own, as a person starts it, that gets SIGTERM in the middle of an answer."""
    weight = tmp_path / "sft_vlm_32.safetensors"
    save_weights(enliven(answerer.model), weight, {"stage": "sft_vlm"})
    command = [
        sys.executable,
        str(ROOT / "scripts/serve.py"),
        "--weight",
        str(weight),
        "--port",
        "0",
        "--device",
        "cpu",
    ]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MINIMIND_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, cwd=tmp_path, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          text=True) as process:  # fmt: skip
        try:
            address = process.stdout.readline().split()[2]
            with openai.OpenAI(base_url=address, api_key=KEY) as client:
                stream = client.chat.completions.create(model="sft_vlm_32", messages=asked("What?"), max_tokens=1000,
                                                        stream=True)  # fmt: skip
                next(stream)
                process.send_signal(signal.SIGTERM)
                *_, last = stream
                assert last.choices[0].finish_reason in ("stop", "length")
            assert process.wait(20) == 0
        finally:
            process.kill()
        assert "Traceback" not in process.stderr.read()
