"""The command: who may come in by which flags, what is said where it cannot begin, and how it ends."""

import os
import signal
import socket
import sys
from pathlib import Path

import pytest

from helpers.faults import start_child
from helpers.serving import CHAT, Served, question, wait_until
from scripts import serve


def settings(monkeypatch, *flags: str, key: str = "") -> serve.Settings:
    monkeypatch.setattr(sys, "argv", ["serve.py", "--weight", "out/sft_vlm_192.safetensors", *flags])
    return serve.settings_of(serve.parse(), key)


def stopped(monkeypatch, *flags: str) -> str:
    monkeypatch.setattr(sys, "argv", ["serve.py", *flags])
    with pytest.raises(SystemExit) as ended:
        serve.main()
    assert str(ended.value).startswith("serve: ")
    return str(ended.value)


def test_what_is_not_said_is_safe(monkeypatch):
    found = settings(monkeypatch)
    assert (found.name, found.key, found.keep_order, found.local) == ("sft_vlm_192", "", False, True)
    assert not found.hosts.names and found.limits == serve.Limits()


def test_flags_become_settings(monkeypatch):
    found = settings(monkeypatch, "--name", "eyes", "--rows", "2", "--waiting", "0", "--max_new_tokens", "7",
                     "--max_prompt_tokens", "9", "--max_seconds", "0.5", "--keep_order",
                     "--allow-images-from", "a.example", "b.example:81")  # fmt: skip
    limits = found.limits
    assert (limits.rows, limits.waiting, limits.new_tokens, limits.prompt_tokens, limits.seconds) == (2, 0, 7, 9, 0.5)
    assert found.name == "eyes" and found.keep_order and found.hosts.names == {"a.example", "b.example:81"}


@pytest.mark.parametrize("host", ["0.0.0.0", "::", "192.168.1.2", "server.example"])
def test_others_are_let_in_with_a_key_or_when_somebody_says_so(host, monkeypatch):
    with pytest.raises(serve.UserError, match=f"--host {host} lets others in: set MINIMIND_API_KEY"):
        settings(monkeypatch, "--host", host)
    assert settings(monkeypatch, "--host", host, key="s3cret").key == "s3cret"
    everybody = settings(monkeypatch, "--host", host, "--no_key", key="s3cret")
    assert everybody.key == "" and not everybody.local


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.0.0.2"])
def test_this_machine_needs_no_key(host, monkeypatch):
    assert settings(monkeypatch, "--host", host).local


def test_a_port_that_is_taken_is_told_before_weights_are_read(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        said = stopped(monkeypatch, "--weight", "nothing", "--port", str(port))
    assert f"--port {port}: Address already in use; another server may run there, so try --port {port + 1}" in said


def test_weights_that_are_not_there_are_told_in_a_sentence(monkeypatch, tmp_path):
    assert "nothing.safetensors" in stopped(
        monkeypatch, "--weight", str(tmp_path / "nothing.safetensors"), "--port", "0"
    )
    assert "--allow_images_from http://x" in stopped(monkeypatch, "--weight", "w", "--allow_images_from", "http://x")


@pytest.mark.parametrize(("flag", "value"), [("--rows", "0"), ("--max_new_tokens", "0"), ("--waiting", "-1")])
def test_numbers_that_let_nothing_in_are_refused(flag, value, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--weight", "w", flag, value])
    with pytest.raises(SystemExit):
        serve.parse()
    assert flag in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no fork")
def test_the_command_serves_until_a_signal_and_leaves_cleanly(saved, tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["serve.py", "--weight", str(saved), "--port", "0", "--device", "cpu"])
    log = tmp_path / "log"
    child = start_child(serve.main, log)
    try:
        wait_until(lambda: "a key" in read(log))
        port = int(read(log).split("http://127.0.0.1:")[1].split("/")[0])
        served = Served(port, None, None)
        assert served.get("/v1/models").content["data"][0]["id"] == "vlm"
        assert served.post(question("hello", max_tokens=3)).status == 200
        os.kill(child, signal.SIGTERM)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    except BaseException:
        os.kill(child, signal.SIGKILL)
        raise
    assert f"POST {CHAT} 200" in read(log) and "Traceback" not in read(log)


def read(log: Path) -> str:
    return log.read_text() if log.exists() else ""
