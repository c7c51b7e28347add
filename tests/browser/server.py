"""Starts the demo as a person would, with tiny weights or given ones, and stops it again."""

import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


@dataclass(frozen=True)
class Server:
    port: int
    process: subprocess.Popen
    log_path: Path

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def serve(weights: Path, scratch: Path, seconds: float = 120) -> Iterator[Server]:
    """The demo with the weights of a folder; from another working directory, so that its settings must find it.

    scratch: an empty folder, for the log and as home.
    """
    port, log_path = free_port(), scratch / "server.log"
    command = [sys.executable, "-m", "streamlit", "run", str(ROOT / "web_demo.py"), "--server.headless", "true",
               "--server.port", str(port), "--", str(weights)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "HOME": str(scratch)}
    with log_path.open("w") as log:
        process = subprocess.Popen(command, cwd=scratch, env=environment, stdout=log, stderr=subprocess.STDOUT)
    server = Server(port, process, log_path)
    try:
        _wait_until_healthy(server, time.monotonic() + seconds)
        yield server
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_healthy(server: Server, deadline: float) -> None:
    while True:
        try:
            with urllib.request.urlopen(f"{server.address}/_stcore/health", timeout=5) as answer:
                if answer.status == 200:
                    return
        except OSError:
            if server.process.poll() is not None or time.monotonic() > deadline:
                raise RuntimeError(f"the demo did not start: {server.log[-2000:]}") from None
        time.sleep(0.1)
