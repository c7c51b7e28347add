"""Pictures that a request only names: fetched from hosts that the server's flags allow, and from nowhere else."""

import http.client
import ipaddress
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from urllib.parse import SplitResult, urljoin, urlsplit

from model.messages import UserError
from scripts.server.errors import Refused
from scripts.server.limits import MEGABYTE, Limits

PORTS = {"http": 80, "https": 443}
REDIRECTS, MOST_REDIRECTS = (301, 302, 303, 307, 308), 3


@dataclass(frozen=True)
class AllowedHosts:
    """`example.org` on its ordinary ports, `10.0.0.5:9000` on that one.

    A server fetches with the rights of where it stands: an address could reach what its sender cannot. So a name that
    means an address within (loopback, private) is refused, unless the list has that very address; what was looked up
    is what is connected to; and every redirect is held to the list.
    """

    names: frozenset[str] = frozenset()

    @classmethod
    def of(cls, names: Sequence[str]) -> "AllowedHosts":
        """Raises UserError for what is no host."""
        for name in names:
            parts = split(f"//{name}")
            if not parts or parts.netloc != name or "@" in name:
                raise UserError(f"--allow_images_from {name}: write hosts, as example.org or 10.0.0.5:9000")
        return cls(frozenset(name.lower() for name in names))

    def fetch(self, url: str, place: str, limits: Limits) -> bytes:
        """place: as messages[2].content[0].image_url.url. Raises Refused."""
        until = time.monotonic() + limits.fetch_seconds
        for _ in range(MOST_REDIRECTS + 1):
            parts = split(url)
            address = self._looked_up(parts, place)
            try:
                with _answer(parts, address, until) as answer:
                    if answer.status not in REDIRECTS:
                        return _content(answer, place, limits)
                    url = urljoin(url, answer.getheader("location", ""))
            except (OSError, http.client.HTTPException, ValueError) as error:
                if isinstance(error, Refused):
                    raise
                late = f"not within {limits.fetch_seconds:g} seconds" if time.monotonic() >= until else str(error)
                raise Refused(f"could not be fetched ({late}): send the picture itself", place) from None
        raise Refused(f"leads on more than {MOST_REDIRECTS} times: send the address where it ends", place)

    def _looked_up(self, parts: SplitResult | None, place: str) -> tuple[str, int]:
        """Numbers and port of a host that may be asked. Raises Refused."""
        if not parts or parts.scheme not in PORTS or "@" in parts.netloc:
            raise Refused("leads to what is no http or https address: send the picture itself", place)
        host, port = parts.hostname, parts.port or PORTS[parts.scheme]
        written = f"[{host}]" if ":" in host else host
        if not (written in self.names and port == PORTS[parts.scheme]) and f"{written}:{port}" not in self.names:
            known = f" but {', '.join(sorted(self.names))}" if self.names else ""
            raise Refused(f"is not fetched, as this server asks no host{known} (--allow_images_from): send the picture "
                          "itself, as data:image/png;base64,...", place)  # fmt: skip
        try:
            found = [entry[4][0] for entry in socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)]
        except (OSError, UnicodeError):
            raise Refused(f"names a host that is not found, {host}: see to its spelling", place) from None
        if host != "localhost" and any(numbers != host and _is_within(numbers) for numbers in found):
            raise Refused(f"names a host, {host}, that lies within this network: only numbers in --allow_images_from "
                          "open that", place)  # fmt: skip
        return found[0], port


def split(url: str) -> SplitResult | None:
    """None where it has no host, or a port that is none."""
    try:
        parts = urlsplit(url)
        return parts if parts.hostname and parts.port != 0 else None
    except ValueError:
        return None


def is_web_address(url: str) -> bool:
    parts = split(url)
    return bool(parts) and parts.scheme in PORTS


def _is_within(numbers: str) -> bool:
    ip = ipaddress.ip_address(numbers.partition("%")[0])
    return not (getattr(ip, "ipv4_mapped", None) or ip).is_global


@contextmanager
def _answer(parts: SplitResult, address: tuple[str, int], until: float) -> Iterator[http.client.HTTPResponse]:
    """Raises OSError, HTTPException."""
    seconds = max(0.1, until - time.monotonic())
    connection = socket.create_connection(address, seconds)

    def give_up() -> None:  # a socket's own limit begins anew with every byte
        with suppress(OSError):
            connection.shutdown(socket.SHUT_RDWR)

    watch = threading.Timer(seconds, give_up)
    watch.start()
    try:
        if parts.scheme == "https":
            context = ssl.create_default_context()
            connection = context.wrap_socket(connection, server_hostname=parts.hostname, do_handshake_on_connect=False)
            connection.do_handshake()
        client = http.client.HTTPConnection(*address)
        client.sock = connection
        target = f"{parts.path or '/'}{'?' if parts.query else ''}{parts.query}"
        client.request("GET", target, headers={"Host": parts.netloc, "Connection": "close"})
        yield client.getresponse()
    finally:
        watch.cancel()
        connection.close()


def _content(answer: http.client.HTTPResponse, place: str, limits: Limits) -> bytes:
    if answer.status != 200:
        raise Refused(f"could not be fetched (its host answers {answer.status}): send the picture itself", place)
    content = answer.read(limits.picture_bytes + 1)
    if len(content) > limits.picture_bytes:
        raise Refused(f"is a picture of more than {limits.picture_bytes // MEGABYTE} MB: scale it down", place)
    if answer.length:
        raise http.client.IncompleteRead(content, answer.length)
    return content
