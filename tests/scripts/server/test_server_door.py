"""Who comes in: keys and hosts; what is done with bodies that are too large, too slow, or none that was asked for."""

import json
import logging
import socket
import time
import zlib

import pytest
from PIL import Image

from helpers.data import BLACK, encoded, make_picture
from helpers.models import SIZES, enliven
from helpers.serving import CHAT, as_part, question, reply_of, serving, wait_until
from model.inference.answerer import Answerer
from model.weights import build_vlm
from scripts import serve
from scripts.server.limits import MEGABYTE, Limits

SMALL = Limits(body_bytes=MEGABYTE, picture_bytes=100_000, body_seconds=0.3, bodies_bytes=3 * MEGABYTE // 2)


@pytest.fixture(scope="module")
def answerer(tower_folder) -> Answerer:
    return Answerer(enliven(build_vlm(SIZES, tower_folder)).eval())


@pytest.fixture(scope="module")
def served(answerer):
    with serving(answerer, limits=SMALL) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(answerer):
    with serving(answerer, key="s3cret") as running:
        yield running


# keys and hosts


@pytest.mark.parametrize("path", ["/v1/models", "/metrics", "/nothing"])
def test_without_the_key_nothing_is_told(guarded, path):
    assert guarded.get(path).error.startswith("the API key is missing: send `Authorization: Bearer KEY`")
    for wrong in ("Bearer wrong", "s3cret", "Bearer s3cre", "Bearer ", "Bearer s3cret\u00e9"):
        reply = guarded.get(path, Authorization=wrong)
        assert reply.status == 401 and reply.error.startswith("the API key is not the right one")


def test_with_the_key_all_is_told(guarded):
    key = {"Authorization": "Bearer s3cret"}
    assert guarded.get("/v1/models", **key).status == guarded.get("/metrics", **key).status == 200
    assert guarded.post(question("x", max_tokens=1), **key).status == 200
    assert guarded.post(question("x", max_tokens=1)).status == 401


def test_health_needs_no_key_and_any_name_of_the_host_is_fine_with_one(guarded):
    assert guarded.get("/health").status == 200
    assert guarded.get("/v1/models", Host="pictures.example", Authorization="Bearer s3cret").status == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [
        ("127.0.0.1:8000", 200),
        ("localhost", 200),
        ("[::1]:80", 200),
        ("evil.example:8000", 401),
        ("127.0.0.1.evil.example", 401),
    ],
)
def test_without_a_key_a_page_of_elsewhere_cannot_ask(served, host, status):
    """A browser would let a page do that whose name has come to mean this machine."""
    assert served.get("/v1/models", Host=host).status == status


def test_a_form_of_a_page_elsewhere_cannot_ask_either(served):
    reply = served.request("POST", CHAT, json.dumps(question("x")).encode(), Content_Type="text/plain")
    assert (reply.status, reply.error) == (415, "the content type must be application/json")


def test_whoever_says_that_everybody_may_ask_is_believed(answerer):
    with serving(answerer, local=False) as served:
        assert served.get("/v1/models", Host="pictures.example").status == 200


def test_what_is_not_there_says_what_is(served):
    reply = served.get("/v1/completions")
    assert reply.status == 404 and reply.error.endswith(f"it has {CHAT}, /v1/models, /health, /metrics")
    assert served.get(CHAT).status == 405


# bodies


def test_a_large_body_is_refused_before_it_is_read(served):
    with served.send_head(200 * MEGABYTE) as line:
        started = time.monotonic()
        assert line.recv(4096).startswith(b"HTTP/1.1 413") and time.monotonic() - started < 1


def test_a_client_that_sends_first_and_reads_then_is_told_too(served):
    reply = served.post(b"x" * (40 * MEGABYTE))
    assert reply.status == 413 and reply.error == "the body has more than 1 MB: send fewer or smaller pictures"
    assert served.ask("x", max_tokens=1).status == 200


def test_a_large_body_that_says_not_how_large_it_is_is_refused_on_the_way(served):
    connection = served.connect()
    pieces = (b"x" * 100_000 for _ in range(50))
    connection.request("POST", CHAT, pieces, {"Content-Type": "application/json"}, encode_chunked=True)
    assert reply_of(connection.getresponse()).status == 413


def test_a_client_that_waits_to_be_asked_for_its_body_never_sends_it(served):
    with served.send_head(200 * MEGABYTE, "Expect: 100-continue\r\n") as line:
        assert line.recv(4096).startswith(b"HTTP/1.1 413")


def test_a_body_that_does_not_come_is_given_up(served):
    with served.send_head(100) as line:
        line.sendall(b'{"messages": ')
        assert line.recv(4096).startswith(b"HTTP/1.1 408")


def test_a_client_that_leaves_in_the_middle_of_its_body_costs_nothing(served):
    with served.send_head(100) as line:
        line.sendall(b'{"messages": ')
        wait_until(lambda: served.service.held_bytes)
    wait_until(lambda: not served.service.held_bytes and not served.service.active)


def test_all_bodies_together_have_a_limit(served):
    """Each alone would be small enough."""
    lines = [served.send_head(MEGABYTE) for _ in range(2)]
    try:
        lines[0].sendall(b"x" * 900_000)
        wait_until(lambda: served.service.held_bytes > 800_000)
        lines[1].sendall(b"x" * 900_000)
        assert lines[1].recv(4096).startswith(b"HTTP/1.1 429")
    finally:
        for line in lines:
            line.close()
    wait_until(lambda: not served.service.held_bytes)


def test_a_body_that_does_not_come_holds_no_server_that_is_to_end(answerer, monkeypatch, caplog):
    monkeypatch.setattr(serve, "GRACE", 0.1)
    with serving(answerer, stop_seconds=0.0) as served, served.send_head(100) as line:
        line.sendall(b'{"messages": ')
        wait_until(lambda: served.service.active)
        served.server.handle_exit(15, None)
        assert line.recv(4096).startswith(b"HTTP/1.1 503")
    assert "Traceback" not in caplog.text


def bomb() -> bytes:
    """A PNG of 60,000 x 60,000 in 100 bytes."""
    content = bytearray(encoded(Image.new("1", (8, 8))))
    content[16:24] = (60000).to_bytes(4, "big") * 2
    content[29:33] = zlib.crc32(content[12:29]).to_bytes(4, "big")
    return bytes(content)


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (bomb(), "no picture that can be used: it"),
        (b"#!/bin/sh\n", "no picture that can be used: it is none of JPEG, PNG, WEBP, BMP, GIF"),
        (encoded(make_picture(1))[:300], "no picture that can be used: it cannot be read"),
        (BLACK + bytes(200_000), "a picture of more than"),
    ],
    ids=["bomb", "script", "cut short", "large"],
)
def test_hostile_pictures_are_refused_at_their_place(served, content, expected):
    reply = served.ask("What?", as_part(BLACK), as_part(content), max_tokens=1)
    assert reply.status == 400 and reply.error.startswith("messages[0].content[2]") and f"is {expected}" in reply.error
    assert reply.content["error"]["param"].startswith("messages[0].content[2]")


def test_the_log_tells_what_was_asked_for_and_never_what_was_said(served, caplog):
    def lines() -> list[str]:
        return [record.getMessage() for record in caplog.records if record.name == "serve"]

    wait_until(lambda: not served.service.active)  # on a busy machine the test before is still being logged
    with caplog.at_level(logging.INFO):
        assert served.ask("a secret of mine", max_tokens=1).status == 200
        assert served.get("/health").status == 200
        assert served.get("/%1b[31mred").status == 404
        wait_until(lambda: len(lines()) == 2)  # a line is written when the reply has gone
    assert [line.rsplit(" ", 2)[0] for line in lines()] == [f"POST {CHAT} 200", "GET /?[31mred 404"]
    assert "secret" not in caplog.text


def test_what_is_no_http_is_not_answered(served):
    with socket.create_connection(("127.0.0.1", served.port), 5) as line:
        line.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        assert line.recv(100).startswith(b"HTTP/1.1 400")
    assert served.get("/health").status == 200
