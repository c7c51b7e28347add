"""Pictures that a request names: in the address itself, or on listed hosts, for which this machine stands in."""

import base64
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from helpers.data import encoded
from model.messages import UserError
from scripts.server import addresses
from scripts.server.addresses import AllowedHosts
from scripts.server.errors import Refused
from scripts.server.limits import Limits
from scripts.server.pictures import read_picture

WHERE = "messages[0].content[1]"
PLACE = f"{WHERE}.image_url.url"
LIMITS = Limits(picture_bytes=20_000, fetch_seconds=5.0)


class Host:
    """paths: path -> (status, headers, body), of which /slow sends a byte at a time."""

    def __init__(self, paths: dict):
        self.paths, self.asked = paths, []
        host = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                host.asked.append((self.path, self.headers["Host"]))
                status, headers, body = host.paths[self.path]
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, str(value))
                self.end_headers()
                for piece in map(bytes, zip(body, strict=True)) if self.path == "/slow" else [body]:
                    self.wfile.write(piece)
                    time.sleep(0.02 if self.path == "/slow" else 0)

            def log_message(self, *_words):
                pass

            def handle(self):
                try:
                    super().handle()
                except OSError:
                    host.asked.append("cut off")

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.port = self.server.server_address[1]
        self.name = f"127.0.0.1:{self.port}"
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()


@pytest.fixture
def host(picture):
    good = encoded(picture(1))
    made = Host({
        "/cat.png?size=1": (200, {"Content-Length": len(good)}, good),
        "/cat.png": (200, {}, good),
        "/large": (200, {}, bytes(30_000)),
        "/short": (200, {"Content-Length": len(good) + 9}, good),
        "/slow": (200, {}, good),
        "/missing": (404, {}, b""),
        "/text": (200, {}, b"no picture"),
        "/": (200, {}, good),
    })  # fmt: skip
    made.paths["/moved"] = (302, {"Location": "/cat.png"}, b"")
    made.paths["/loop"] = (302, {"Location": "/loop"}, b"")
    made.paths["/away"] = (302, {"Location": "http://169.254.169.254/latest"}, b"")
    made.paths["/file"] = (302, {"Location": "file:///etc/passwd"}, b"")
    yield made
    made.server.shutdown()
    made.server.server_close()


def fetch(host: Host, path: str, limits: Limits = LIMITS, hosts: AllowedHosts | None = None):
    return read_picture(f"http://{host.name}{path}", WHERE, limits, hosts or AllowedHosts.of([host.name]))


def refusal(url: str, *names: str, limits: Limits = LIMITS) -> str:
    with pytest.raises(Refused) as refused:
        read_picture(url, WHERE, limits, AllowedHosts.of(names))
    assert refused.value.status == 400 and refused.value.where in (PLACE, WHERE)
    return str(refused.value)


# data addresses


def test_a_picture_is_in_its_address(picture):
    content = base64.b64encode(encoded(picture(3))).decode()
    for head in ("data:image/png;base64,", "DATA:text/plain;charset=x;BASE64,"):
        assert read_picture(head + content, WHERE, LIMITS, AllowedHosts()).tobytes() == picture(3).tobytes()


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("data:image/png,abc", f"{PLACE} is a data address, but not of the form `data:image/png;base64,...`"),
        ("data:image/png;base64", f"{PLACE} is a data address, but not of the form"),
        ("data:image/png;base64,a*b", f"{PLACE} is not base64 behind its comma"),
        ("data:image/png;base64,aGVsbG8=", f"{WHERE} is no picture that can be used: it is none of JPEG, PNG"),
        ("data:image/png;base64," + "A" * 27_000, f"{PLACE} is a picture of more than 0 MB: scale it down"),
        ("/etc/passwd", f"{PLACE} is no address of a picture: send `data:image/png;base64,...`"),
        ("file:///etc/passwd", f"{PLACE} is no address of a picture"),
        ("ftp://example.org/a.png", f"{PLACE} is no address of a picture"),
        ("", f"{PLACE} is no address of a picture"),
        ("http://[::1", f"{PLACE} is no address of a picture"),
        ("http://x:99999/", f"{PLACE} is no address of a picture"),
    ],
)
def test_what_is_no_picture_is_refused(url, expected):
    assert refusal(url).startswith(expected)


# hosts


def test_nothing_is_fetched_where_nobody_allowed_it(host):
    expected = f"{PLACE} is not fetched, as this server asks no host (--allow_images_from): send the picture itself"
    assert refusal(f"http://{host.name}/cat.png").startswith(expected)
    assert "asks no host but example.org (" in refusal(f"http://{host.name}/cat.png", "example.org")
    assert not host.asked


def test_a_listed_host_is_asked(host, picture):
    assert fetch(host, "/cat.png?size=1").tobytes() == picture(1).tobytes()
    assert host.asked == [("/cat.png?size=1", host.name)]
    assert fetch(host, "").tobytes() == picture(1).tobytes() and host.asked[-1][0] == "/"


def test_redirects_are_held_to_the_list(host, picture):
    assert fetch(host, "/moved").tobytes() == picture(1).tobytes()
    assert "leads on more than 3 times" in refusal(f"http://{host.name}/loop", host.name)
    assert "is not fetched" in refusal(f"http://{host.name}/away", host.name)
    assert "leads to what is no http or https address" in refusal(f"http://{host.name}/file", host.name)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("/large", f"{PLACE} is a picture of more than 0 MB"),
        ("/short", f"{PLACE} could not be fetched (IncompleteRead"),
        ("/missing", f"{PLACE} could not be fetched (its host answers 404)"),
        ("/text", f"{WHERE} is no picture that can be used"),
    ],
)
def test_what_a_host_sends_is_limited_too(host, path, expected):
    assert refusal(f"http://{host.name}{path}", host.name).startswith(expected)


def test_a_host_that_takes_its_time_is_given_up(host):
    started = time.monotonic()
    said = refusal(f"http://{host.name}/slow", host.name, limits=Limits(fetch_seconds=0.3))
    assert said.startswith((f"{PLACE} could not be fetched (not within 0.3 seconds)", f"{WHERE} is no picture"))
    assert time.monotonic() - started < 3


def test_a_host_that_is_not_there_is_said_to_be_none(host):
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        name = f"127.0.0.1:{unused.getsockname()[1]}"
    assert f"{PLACE} could not be fetched ([Errno" in refusal(f"http://{name}/", name)


@pytest.mark.parametrize(
    "numbers", ["127.0.0.1", "10.1.2.3", "169.254.169.254", "::1", "::ffff:192.168.0.1", "fe80::1%1"]
)
def test_a_name_that_means_an_address_within_is_refused(numbers, monkeypatch):
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", (numbers, 80))])
    expected = f"{PLACE} names a host, pictures.example, that lies within this network"
    assert refusal("http://pictures.example/cat.png", "pictures.example").startswith(expected)


def test_one_address_within_among_others_is_enough(monkeypatch):
    found = [(2, 1, 6, "", (numbers, 80)) for numbers in ("93.184.215.14", "127.0.0.1")]
    monkeypatch.setattr(addresses.socket, "getaddrinfo", lambda *_, **__: found)
    assert "lies within this network" in refusal("http://pictures.example/cat.png", "pictures.example")


def test_what_was_looked_up_is_what_is_connected_to(host, monkeypatch):
    """Asked a second time, a name may mean another address (DNS rebinding)."""
    asked = []

    def look_up(name, _port, *_rest, **_options):
        asked.append(name)
        return [(2, 1, 6, "", ("127.0.0.1", host.port))]

    monkeypatch.setattr(addresses.socket, "getaddrinfo", look_up)
    monkeypatch.setattr(addresses, "_is_within", lambda numbers: False)
    name = f"pictures.example:{host.port}"
    read_picture(f"http://{name}/cat.png", WHERE, LIMITS, AllowedHosts.of([name]))
    assert asked == ["pictures.example"] or set(asked[1:]) == {
        "127.0.0.1"
    }  # numbers are looked up without asking anybody
    assert host.asked == [("/cat.png", name)]


@pytest.mark.parametrize(
    "url", ["http://example.org:8080/", "http://example.org.evil.net/", "https://user@example.org/"]
)
def test_other_ports_names_and_users_are_not_in_the_list(url):
    said = refusal(url, "example.org")
    assert "is not fetched" in said or "no http or https address" in said


@pytest.mark.parametrize("name", ["http://example.org", "example.org/path", "user@example.org", "", "a:b"])
def test_what_is_no_host_cannot_be_listed(name):
    with pytest.raises(UserError, match="--allow_images_from"):
        AllowedHosts.of([name])
