"""Serve a model to programs that speak OpenAI's protocol: docs/server.md.

    python scripts/serve.py --weight out/sft_vlm_192.safetensors               # at http://127.0.0.1:8000/v1
    MINIMIND_API_KEY=... python scripts/serve.py --weight W --host 0.0.0.0     # for others, behind a proxy with TLS

Requests that come at the same time are answered together, a token each in every step. SIGTERM, or Ctrl-C, lets the
answers end that have begun; a second one does not.
"""

import argparse
import ipaddress
import logging
import os
import socket
import time
from types import FrameType

import uvicorn

from model.command_line import CommandLine
from model.inference.answerer import Answerer, add_weight_flags, add_window_flag
from model.messages import UserError
from scripts.demo.weights import weights_or_newest
from scripts.server.addresses import AllowedHosts
from scripts.server.app import build_app
from scripts.server.limits import Limits
from scripts.server.service import Service, Settings

KEY = "MINIMIND_API_KEY"
KEEP_ALIVE = 75  # seconds that idle connections stay open: longer than proxies keep theirs, or those meet a closed one
GRACE = 5.0  # seconds beyond --stop_seconds for replies to be sent


class Server(uvicorn.Server):
    """uvicorn closes its port at a signal. Ours still answers, with 503, until what has begun is over."""

    def __init__(self, config: uvicorn.Config, service: Service, stop_seconds: float, announcement: str = ""):
        """announcement: printed as soon as requests are answered."""
        super().__init__(config)
        self.service, self.stop_seconds, self.announcement = service, stop_seconds, announcement
        self._ends = float("inf")  # on the clock of time.monotonic

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.announcement:
            print(self.announcement, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Also keeps the signal from being raised anew at the end, for a clean exit."""
        if self.service.stopping:
            self._ends = 0.0
            return
        self._ends = time.monotonic() + self.stop_seconds + GRACE
        self.service.stop(self.stop_seconds)

    async def on_tick(self, counter: int) -> bool:
        if self.service.stopping and not self.service.active or time.monotonic() >= self._ends:
            self.should_exit = True
        return await super().on_tick(counter)


def parse() -> argparse.Namespace:
    limits, parser = Limits(), CommandLine(__doc__)
    add_weight_flags(parser)
    add_window_flag(parser)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on; another than this machine's own "
                        f"wants {KEY} in the environment")  # fmt: skip
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--no_key", action="store_true", help="answer everybody who can reach the address")
    parser.add_argument("--name", help="of the model, for clients; by default the file's")
    parser.add_argument("--rows", type=int, default=limits.rows, help="answers that grow at the same time")
    parser.add_argument("--waiting", type=int, default=limits.waiting, help="requests that may wait behind them")
    parser.add_argument("--max_prompt_tokens", type=int, default=limits.prompt_tokens)
    parser.add_argument("--max_new_tokens", type=int, default=limits.new_tokens, help="that a request may ask for")
    parser.add_argument(
        "--max_seconds", type=float, default=limits.seconds, help="of an answer, once its turn has come"
    )
    parser.add_argument("--allow_images_from", nargs="+", default=[], metavar="HOST",
                        help="whose pictures are fetched where a request names them; by default nobody's")  # fmt: skip
    parser.add_argument("--keep_order", action="store_true", help="leave pictures between the words where they were "
                        "sent; by default they come first, as in training")  # fmt: skip
    parser.add_argument("--stop_seconds", type=float, default=30.0, help="that answers get to end in at SIGTERM")
    options = parser.parse_args()
    if min(options.rows, options.max_prompt_tokens, options.max_new_tokens) < 1:
        parser.error("--rows, --max_prompt_tokens and --max_new_tokens must be at least 1")
    if min(options.waiting, options.max_seconds, options.stop_seconds) < 0:
        parser.error("--waiting, --max_seconds and --stop_seconds must be at least 0")
    return options


def settings_of(options: argparse.Namespace, key: str) -> Settings:
    """Raises UserError where everybody could come in without anybody having said so."""
    if not key and not options.no_key and not is_this_machine(options.host):
        raise UserError(f"--host {options.host} lets others in: set {KEY} in the environment, and give them that key, "
                        "or say --no_key")  # fmt: skip
    limits = Limits(
        prompt_tokens=options.max_prompt_tokens, new_tokens=options.max_new_tokens, seconds=options.max_seconds,
        rows=options.rows, waiting=options.waiting,
    )  # fmt: skip
    name = options.name or (options.weight.resolve().name if options.weight.is_dir() else options.weight.stem)
    hosts = AllowedHosts.of(options.allow_images_from)
    return Settings(name, limits, "" if options.no_key else key, options.keep_order, hosts, not options.no_key)


def is_this_machine(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def bind(host: str, port: int) -> socket.socket:
    """Before the weights are read, which takes longer. Raises UserError."""
    try:
        family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        bound = socket.socket(family)
        if os.name == "posix":  # start again at once after an end; on Windows it would let two share a port
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        bound.bind(address)
        return bound
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: {error.strerror or error}; another server may run there, so try "
                        f"--port {port + 1}") from error  # fmt: skip


def main() -> None:
    options = parse()
    try:
        options.weight = weights_or_newest(options.weight)
        settings = settings_of(options, os.environ.get(KEY, "").strip())
        bound = bind(options.host, options.port)
        service = Service(Answerer.from_flags(options), settings)
    except (UserError, OSError) as error:
        raise SystemExit(f"serve: {error}") from error
    logging.basicConfig(level=logging.WARNING, format="%(asctime)s %(message)s", force=True)
    logging.getLogger("serve").setLevel(logging.INFO)
    config = uvicorn.Config(
        build_app(service), log_config=None, access_log=False, ws="none", server_header=False, proxy_headers=False,
        timeout_keep_alive=KEEP_ALIVE, timeout_graceful_shutdown=1,
    )  # fmt: skip
    host, port = bound.getsockname()[:2]
    where = f"http://{f'[{host}]' if ':' in host else host}:{port}/v1"
    announcement = f"{settings.name} at {where} {'with' if settings.key else 'without'} a key; Ctrl-C ends it"
    Server(config, service, options.stop_seconds, announcement).run(sockets=[bound])


if __name__ == "__main__":
    main()
