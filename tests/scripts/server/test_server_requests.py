"""Bodies of requests: what they come to mean, and what is refused with its place and a cure."""

import json

import pytest

from helpers.serving import as_part, question
from model.inference.answerer import Options
from scripts.server.conversation import read_conversation
from scripts.server.errors import Refused
from scripts.server.limits import Limits
from scripts.server.requests import IGNORED, NOT_DONE, parse

HELLO = {"messages": [{"role": "user", "content": "hello"}]}
URL = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}


def read(**body: object):
    return parse(json.dumps(body).encode())


def options(**parameters: object) -> Options:
    return read(**HELLO, **parameters).options(Limits())


def refusal(**body: object) -> Refused:
    with pytest.raises(Refused) as refused:
        request = read(**body)
        request.options(Limits())
        read_conversation(request.messages, Limits())
    assert refused.value.status == 400
    return refused.value


# parameters


def test_what_is_not_said_is_as_the_terminal_has_it():
    assert options() == Options()
    assert options(temperature=None, stop=None, max_tokens=None, stream=None, logprobs=None) == Options()


def test_parameters_become_options():
    asked = options(temperature=1, top_p=0.5, top_k=7, seed=-3, stop=["a", "b"], max_tokens=5, logprobs=True)
    assert asked == Options(5, 1.0, 0.5, 7, -3, ("a", "b"), 0)
    assert options(stop="one").stop == ("one",) and options(logprobs=True, top_logprobs=3).logprobs == 3
    assert options(logprobs=False).logprobs is None and options(max_completion_tokens=9).max_new_tokens == 9
    assert options(max_completion_tokens=9, max_tokens=9).max_new_tokens == 9


def test_a_short_limit_of_the_server_is_the_default_too():
    assert read(**HELLO).options(Limits(new_tokens=20)).max_new_tokens == 20


@pytest.mark.parametrize("name", IGNORED)
def test_what_changes_nothing_is_ignored(name):
    assert options(**{name: "whatever"}) == Options()


@pytest.mark.parametrize(
    ("name", "value"), [(name, value) for name, values in NOT_DONE.items() for value in (None, *values)]
)
def test_what_asks_for_nothing_is_taken(name, value):
    assert options(**{name: value}) == Options()


@pytest.mark.parametrize(
    ("parameters", "expected"),
    [
        ({"n": 2}, "n asks for what this server does not do: leave it out or send 1"),
        ({"tools": [{}]}, "tools asks for what this server does not do: leave it out or send []"),
        ({"response_format": {"type": "json_object"}}, "response_format asks for"),
        ({"temperatur": 1}, "temperatur is not known here: did you mean temperature?"),
        ({"zzz": 1}, "zzz is not known here: leave it out"),
        ({"temperature": "hot"}, "temperature is 'hot': it must be a number"),
        ({"temperature": 3}, "temperature is 3: it must be less than or equal to 2"),
        ({"temperature": True}, "temperature is True: it must be a number"),
        ({"top_p": 0}, "top_p is 0: it must be greater than 0"),
        ({"stop": [""]}, "stop[0] is '': it must be a text that is not empty"),
        ({"stop": ["a"] * 5}, "stop is ['a', 'a', 'a', 'a', 'a']: it must be 4 at most"),
        ({"seed": 2**70}, "seed is 1180591620717411303424"),
        ({"max_tokens": 0}, "max_tokens is 0: it must be greater than or equal to 1"),
        ({"max_tokens": 5000}, "max_tokens is 5,000: this server's answers have 1,024 tokens at most"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens is 3 and max_completion_tokens 4: leave one"),
        ({"top_logprobs": 2}, "top_logprobs is given, and logprobs is not: add `logprobs: true`"),
        ({"stream": 1}, "stream is 1: it must be true or false"),
        (
            {"stream_options": {"include_usages": True}},
            "stream_options.include_usages is not known here: did you mean include_usage?",
        ),
    ],
)
def test_what_cannot_be_done_is_refused_by_name(parameters, expected):
    error = refusal(**HELLO, **parameters)
    assert str(error).startswith(expected) and error.where and str(error).startswith(error.where)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"", "the body is not JSON (EOF"),
        (b"[1]", "the body is JSON, but no object"),
        (b'{"messages": "\\ud800"}', "the body is not JSON (unexpected end of hex escape"),
        (b'{"messages": [], "temperature": NaN}', "the body is not JSON"),
        (b"[" * 100_000, "the body is not JSON (recursion limit"),
        (b'{"temperature": 1e999, "messages": [{"role": "user", "content": "x"}]}', "temperature is inf: it must be a"),
    ],
)
def test_what_is_no_json_is_said_to_be_none(body, expected):
    with pytest.raises(Refused) as refused:
        parse(body)
    assert str(refused.value).startswith(expected)


# messages


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        (None, "messages is missing"),
        ([], "messages is []: it must be 1 at least"),
        (["x"], "messages[0] is 'x': it must be an object"),
        ([{"role": "tool", "content": "x"}], "messages[0].role is 'tool': it must be 'system', 'developer'"),
        ([{"role": "user"}], "messages[0].content is missing"),
        ([{"role": "user", "content": None}], "messages[0].content is None: it must be a list"),
        ([{"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]}],
         "messages[0].content[0].type is 'input_audio': it must be 'text' or 'image_url'"),
        ([{"role": "user", "content": [{"type": "text", "txt": "x"}]}],
         "messages[0].content[0].txt is not known here: did you mean text?"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0].content[0] is of the type text: it must have"),
        ([{"role": "user", "content": [{"type": "text", "image_url": {"url": "x"}}]}],
         "messages[0].content[0] is of the type text: it must have 'text', and no 'image_url'"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}],
         "messages[0].content[0].image_url is 'x': it must be an object"),
        ([{"role": "user", "content": [{"type": "image_url", "image_url": {"uri": "x"}}]}],
         "messages[0].content[0].image_url.uri is not known here: did you mean url?"),
        ([{"role": "system", "content": [URL]}],
         "messages[0].content[0] is a picture in a message of the role system: only a user's may have some"),
        ([{"role": "user", "content": "x"}, {"role": "assistant", "content": "y"}],
         "messages[1] is of the role assistant: the last message must be a user's"),
        ([{"role": "user", "content": [URL] * 5}], "messages[0] has 5 pictures, and a message may have 4"),
        ([{"role": "user", "content": [URL] * 3}] * 3, "messages hold 9 pictures, and a conversation may have 8"),
        ([{"role": "user", "content": "x" * 70_000}], "messages hold 70,000 characters in 1 message, more than 65,536"),
        ([{"role": "user", "content": "x", "tool_calls": [1]}], "messages[0].tool_calls is not known here"),
    ],
)  # fmt: skip
def test_messages_are_refused_at_their_place(messages, expected):
    assert str(refusal(messages=messages)).startswith(expected)


def test_an_earlier_answer_is_taken_as_it_came():
    earlier = {"role": "assistant", "content": "a cat", "refusal": None, "tool_calls": [], "annotations": []}
    messages = [*HELLO["messages"], earlier, {"role": "user", "content": "and?", "name": "anna"}]
    found = read_conversation(read(messages=messages).messages, Limits())
    assert [message["role"] for message in found.messages] == ["user", "assistant", "user"]
    assert found.messages[1]["content"] == [{"type": "text", "text": "a cat"}]


def test_pictures_come_first_wherever_they_were_sent(picture):
    one, other = as_part(picture(1)), as_part(picture(2))
    request = read(**question("What", one, "differs?", other))
    image, text = {"type": "image"}, {"type": "text", "text": "\nWhat\ndiffers?"}
    found = read_conversation(request.messages, Limits())
    assert found.messages == [{"role": "user", "content": [image, image, text]}]
    assert found.pictures == [
        (one["image_url"]["url"], "messages[0].content[1]"),
        (other["image_url"]["url"], "messages[0].content[3]"),
    ]
    kept = read_conversation(request.messages, Limits(), keep_order=True).messages[0]["content"]
    assert kept == [{"type": "text", "text": "What"}, image, {"type": "text", "text": "differs?"}, image]


def test_a_line_break_that_is_there_is_not_doubled(picture):
    found = read_conversation(read(**question(as_part(picture(1)), "\nWhat is it?")).messages, Limits())
    assert found.messages[0]["content"][1]["text"] == "\nWhat is it?"


def test_a_developer_speaks_as_the_system():
    messages = [{"role": "developer", "content": "Be brief."}, *HELLO["messages"]]
    assert read_conversation(read(messages=messages).messages, Limits()).messages[0]["role"] == "system"
