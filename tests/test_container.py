"""The container's files agree with the project: names, flags, ports, and that nothing secret or trained goes in."""

import re
import tomllib
from fnmatch import fnmatch

import yaml

from helpers.commands import parse
from helpers.repository import ROOT
from model.files import SHIPPED_MODEL
from scripts.demo.remote import Remote
from scripts.serve import KEY

DOCKERFILE = (ROOT / "Dockerfile").read_text()
CADDYFILE = (ROOT / "Caddyfile").read_text()
SERVICES = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]
IGNORED = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
PLACES = re.compile(r"\$\{(\w+)(:-|:\?)([^}]*)\}")  # of compose.yaml: name, what if it is not set


def set_in(text: str, **values: str) -> str:
    """A value of compose.yaml as compose would read it."""
    return PLACES.sub(lambda place: values.get(place[1], place[3]), text)


def test_the_image_holds_the_project_and_nothing_that_was_trained():
    kept = [line[1:] for line in IGNORED if line.startswith("!")]
    assert IGNORED[0] == "*" and {"model", "dataset", "trainer", "scripts", "web_demo.py", ".streamlit"} <= set(kept)
    assert not [name for name in kept if not (ROOT / name).exists()]
    assert not {"out", ".", ".env", ".git"} & set(kept)
    assert IGNORED.index("model/vision_model/*") < IGNORED.index("!model/vision_model/emoji-clip")
    assert not [line for line in IGNORED[1:] if fnmatch(SHIPPED_MODEL, line)]


def test_the_image_runs_as_nobody_on_a_python_that_the_project_takes():
    lines = [line.split(maxsplit=1) for line in DOCKERFILE.splitlines() if line]
    (made,) = re.findall(r"useradd .* (\w+)$", DOCKERFILE, re.MULTILINE)
    assert [rest for word, rest in lines if word == "USER"] == [made] != ["root"]
    assert lines.index(["USER", made]) > max(place for place, (word, _) in enumerate(lines) if word in ("RUN", "COPY"))
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    assert wanted == ">=" + re.search(r"^FROM python:([\d.]+)", DOCKERFILE, re.MULTILINE)[1]
    assert re.search(r"^torch==", (ROOT / "requirements.txt").read_text(), re.MULTILINE)  # which a line greps for


def test_the_server_takes_its_flags(monkeypatch):
    parse([set_in(word, WEIGHT="sft.safetensors") for word in SERVICES["server"]["command"]], monkeypatch)
    assert f"/{SERVICES['server']['volumes'][0].split(':/')[1]}" == "/weights:ro"


def test_the_demo_reaches_the_server_and_the_proxy_both():
    *_, flag, address = SERVICES["demo"]["command"]
    assert flag == "--server" and Remote(address).address == "http://server:8000"
    assert set(re.findall(r"reverse_proxy \{\$\w+:(\w+):(\d+)\}", CADDYFILE)) == {("server", "8000"), ("demo", "8501")}
    ports = re.search(r"^EXPOSE (.*)$", DOCKERFILE, re.MULTILINE)[1].split()
    assert ports == ["8501", "8000"]  # Streamlit's, and serve.py's own
    assert [name for name, service in SERVICES.items() if "ports" in service] == ["proxy"]
    assert set_in(SERVICES["proxy"]["environment"]["SITE"], SITE="x.org") in map(
        lambda word: set_in(word, SITE="x.org"), SERVICES["demo"]["command"]
    )  # the address that the browser shows is the one whose pages Streamlit answers


def test_secrets_come_from_outside():
    for service in SERVICES.values():
        for name, value in service["environment"].items():
            place = PLACES.fullmatch(value)
            assert place and place[1] == name and (place[2] == ":?" or name == "SITE"), value
    assert {KEY} <= SERVICES["server"]["environment"].keys() & SERVICES["demo"]["environment"].keys()
    used = set(re.findall(r"\{\$(\w+)[:}]", CADDYFILE)) - {"SERVER", "DEMO"}
    assert used == set(SERVICES["proxy"]["environment"])
    assert ".env" in (ROOT / ".gitignore").read_text().split()


def test_ours_can_write_nowhere_but_to_what_is_forgotten():
    for name in ("server", "demo"):
        service = SERVICES[name]
        assert service["read_only"] and service["cap_drop"] == ["ALL"] and "/tmp" in service["tmpfs"]
        assert service["networks"] == ["inside"]
