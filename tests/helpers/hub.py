"""A hub on this machine: speaks as much of Hugging Face's and ModelScope's protocols as their packages ask for."""

import base64
import hashlib
import json
import re
import socket
import threading
from collections.abc import Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from safetensors.torch import save
from torch import arange

from scripts import download

COMMIT = "c0ffee" * 6 + "c0ff"  # 40 digits, as a commit has
LARGE = 1000  # bytes; from here on a file is stored as a large one, with a sha256


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def git_sha1(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    token: str | None
    sent: int = 0  # bytes of a file's content


@dataclass
class Repository:
    files: dict[str, bytes] = field(default_factory=dict)
    private: bool = False


class HubStandIn:
    """repositories: "models/owner/name" or "datasets/owner/name" -> Repository; every other attribute is a fault.

    Large files of Hugging Face are redirected to another host name, as to a content network.
    """

    def __init__(self, routes: Sequence[tuple] = ()) -> None:
        """routes: as ROUTES, ahead of these."""
        self.routes = [*routes, *ROUTES]
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.created: list[dict] = []
        self.blobs: dict[str, bytes] = {}  # large files that were put, by sha256
        self.cut_after: int | None = None  # bytes of a file after which the line goes dead, for good
        self.dead = False  # content requests are dropped without an answer
        self.hang_after: int | None = None  # bytes of a file after which nothing more comes
        self.hanging, self.release = threading.Event(), threading.Event()
        self.refuse: tuple[int, dict[str, str]] | None = None  # status and headers for everything
        self.refuse_content = 0  # status for contents alone
        self.ignore_ranges = False
        self.wrong: dict[str, bytes] = {}  # path -> what is sent instead of the file
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler_for(self))
        server.daemon_threads = True
        self.server, self.port = server, server.server_address[1]
        self.address = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        self.release.set()
        self.server.shutdown()
        self.server.server_close()

    def add(self, name: str, files: dict[str, bytes], private: bool = False) -> None:
        self.repositories[name] = Repository(files, private)

    def contents_sent(self) -> list[Request]:
        return [request for request in self.requests if request.sent]

    def heal(self) -> None:
        self.cut_after = self.hang_after = self.refuse = None
        self.dead, self.refuse_content = False, 0
        self.wrong.clear()
        self.requests.clear()


def _handler_for(hub: HubStandIn) -> type[BaseHTTPRequestHandler]:
    class Bound(_Handler):
        pass

    Bound.hub = hub
    return Bound


class _Handler(BaseHTTPRequestHandler):
    hub: HubStandIn

    def log_message(self, *_arguments) -> None:
        """Nothing on the terminal."""

    def handle_request(self) -> None:
        address = urlsplit(self.path)
        self.query = {name: values[0] for name, values in parse_qs(address.query).items()}
        token = self.headers.get("Authorization")
        self.record = Request(self.command, unquote(address.path), self.headers.get("Range"), token)
        self.hub.requests.append(self.record)
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length) if length else b""
        if self.hub.refuse:
            status, headers = self.hub.refuse
            return self.answer({"error": "refused"}, status, headers)
        for method, pattern, respond in self.hub.routes:
            if method == self.command and (match := re.fullmatch(pattern, self.record.path)):
                return respond(self, *match.groups())
        return self.answer({"error": f"no such page {self.path}"}, 404)

    do_GET = do_HEAD = do_POST = do_PUT = handle_request

    def answer(self, value: object, status: int = 200, headers: dict[str, str] | None = None) -> None:
        content = json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Type": "application/json", **(headers or {})}.items():
            self.send_header(name, text)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def repository(self, name: str) -> Repository | None:
        found = self.hub.repositories.get(name)
        if found is None or (found.private and not self.record.token):
            missing = {"X-Error-Code": "RepoNotFound"} if not self.record.path.startswith("/api/v1") else {}
            self.answer({"error": "Repository not found"}, 404, missing)
            return None
        return found

    def send_file(self, name: str, path: str, content: bytes) -> None:
        """The bytes, or as many as the faults let through."""
        hub = self.hub
        if hub.dead:
            return self.hang_up()
        if hub.refuse_content:
            return self.answer({"error": "refused"}, hub.refuse_content)
        content = hub.wrong.get(path, content)
        ranged = self.record.range and not hub.ignore_ranges
        first, last = re.fullmatch(r"bytes=(\d+)-(\d*)", self.record.range).groups() if ranged else ("0", "")
        start, total = int(first), len(content)
        content = content[: int(last) + 1] if last else content
        self.send_response(206 if start or last else 200)
        self.send_header("Content-Length", str(len(content) - start))
        if start or last:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{total}")
        self.end_headers()
        most = hub.cut_after if hub.cut_after is not None else hub.hang_after
        sent = content[start:] if most is None or len(content) < LARGE else content[start:most]
        self.wfile.write(sent)
        self.wfile.flush()
        self.record.sent = len(sent)
        if len(content) >= LARGE and hub.cut_after is not None:
            hub.dead = True
            return self.hang_up()
        if len(content) >= LARGE and hub.hang_after is not None:
            hub.hanging.set()
            hub.release.wait(30)
        return None

    def hang_up(self) -> None:
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    # Hugging Face

    def info(self, kind: str, repo_id: str, revision: str | None = None) -> None:
        found = self.repository(f"{kind}/{repo_id}")
        if found is None:
            return
        if revision not in (None, "main", COMMIT):
            return self.answer({"error": "Invalid rev id"}, 404, {"X-Error-Code": "RevisionNotFound"})
        siblings = []
        for path, content in found.files.items():
            entry = {"rfilename": path, "size": len(content), "blobId": git_sha1(content)}
            if len(content) >= LARGE:
                entry["lfs"] = {"sha256": sha256(content), "size": len(content), "pointerSize": 134}
            siblings.append(entry)
        return self.answer({"id": repo_id, "sha": COMMIT, "private": found.private, "siblings": siblings})

    def resolve(self, kind: str | None, repo_id: str, revision: str, path: str) -> None:
        name = f"{'datasets' if kind else 'models'}/{repo_id}"
        found = self.repository(name)
        if found is None:
            return
        content = found.files.get(path)
        if content is None or revision != COMMIT:
            return self.answer({"error": "Entry not found"}, 404, {"X-Error-Code": "EntryNotFound"})
        if len(content) < LARGE:
            return self.send_file(name, path, content)
        self.send_response(302)
        self.send_header("Location", f"http://localhost:{self.hub.port}/content/{name}/{path}")
        self.send_header("Content-Length", "0")
        return self.end_headers()

    def content_network(self, name: str, path: str) -> None:
        self.send_file(name, path, self.hub.repositories[name].files[path])

    def create(self) -> None:
        body = json.loads(self.body)
        repo_id = f"{body['organization']}/{body['name']}" if body.get("organization") else body["name"]
        private = body.get("private") or body.get("visibility") == "private"  # older and newer packages
        self.make_repository(repo_id, bool(private), {"url": f"{self.hub.address}/{repo_id}"}, 409)

    def make_repository(self, repo_id: str, private: bool, answer: dict, taken: int) -> None:
        self.hub.created.append({"repo_id": repo_id, "private": private})
        if f"models/{repo_id}" in self.hub.repositories:
            return self.answer({**answer, "Message": "repository already exists"}, taken)
        self.hub.add(f"models/{repo_id}", {}, private)
        return self.answer(answer)

    def preupload(self, _repo_id: str) -> None:
        files = [
            {"path": f["path"], "uploadMode": "lfs" if f["size"] >= LARGE else "regular", "shouldIgnore": False}
            for f in json.loads(self.body)["files"]
        ]
        self.answer({"files": files})

    def large_files(self, _repo_id: str) -> None:
        wanted = [
            {**entry, "actions": {"upload": {"href": f"{self.hub.address}/put/{entry['oid']}"}}}
            for entry in json.loads(self.body)["objects"]
        ]
        self.answer({"objects": wanted, "transfer": "basic", "Data": {"objects": wanted}})

    def put(self, oid: str) -> None:
        if self.hub.refuse_content or sha256(self.body) != oid:
            return self.answer({"error": "refused"}, self.hub.refuse_content or 422)
        self.hub.blobs[oid] = self.body
        return self.answer({})

    def commit(self, repo_id: str) -> None:
        files = self.hub.repositories[f"models/{repo_id}"].files
        for line in map(json.loads, self.body.splitlines()):
            if line["key"] == "file":
                files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            elif line["key"] == "lfsFile":
                files[line["value"]["path"]] = self.hub.blobs[line["value"]["oid"]]
        address = f"{self.hub.address}/{repo_id}/commit/{COMMIT}"
        self.answer({"commitUrl": address, "commitOid": COMMIT, "hookOutput": ""})

    def check_card(self) -> None:
        self.answer({"errors": [], "warnings": []})

    # ModelScope

    def scope_files(self, kind: str, repo_id: str, _page: str) -> None:
        found = self.repository(f"{kind}/{repo_id}")
        if found is None:
            return
        if self.query["Revision"] != "master":
            return self.answer({"Message": "revision not found"}, 404)
        folders = {path.rpartition("/")[0] for path in found.files} - {""}
        entries = [{"Path": folder, "Name": folder, "Type": "tree", "Size": 0} for folder in sorted(folders)]
        for path, content in found.files.items():
            entries.append({"Path": path, "Type": "blob", "Size": len(content), "Sha256": sha256(content)})
        return self.answer({"Code": 200, "Data": {"Files": entries}})

    def scope_content(self, kind: str, repo_id: str) -> None:
        name, path = f"{kind}/{repo_id}", self.query["FilePath"]
        found = self.repository(name)
        if found is not None:
            self.send_file(name, path, found.files[path])

    def scope_create(self) -> None:
        body = json.loads(self.body)
        answer = {"Code": 200, "Data": {"Path": body["Path"], "Name": body["Name"]}}
        self.make_repository(f"{body['Path']}/{body['Name']}", body["Visibility"] == 1, answer, 400)

    def scope_info(self, repo_id: str) -> None:
        found = self.repository(f"models/{repo_id}")
        if found is not None:
            self.answer({"success": True, "data": {"id": repo_id, "private": found.private}})

    def scope_commit(self, repo_id: str) -> None:
        files = self.hub.repositories[f"models/{repo_id}"].files
        for action in json.loads(self.body)["actions"]:
            large = action["type"] == "lfs"
            content = self.hub.blobs[action["sha256"]] if large else base64.b64decode(action["content"])
            files[action["path"]] = content
        self.answer({"Code": 200, "Success": True, "Data": {"oid": COMMIT}})

    def no_acceleration(self) -> None:
        self.answer({"Code": 200, "Data": {}})


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = [
    ("GET", rf"/api/(models|datasets)/{NAME}", _Handler.info),
    ("GET", rf"/api/(models|datasets)/{NAME}/revision/(.+)", _Handler.info),
    ("GET", rf"/(datasets/)?{NAME}/resolve/(\w+)/(.+)", _Handler.resolve),
    ("GET", r"/content/(\w+/[\w.-]+/[\w.-]+)/(.+)", _Handler.content_network),
    ("POST", r"/api/repos/create", _Handler.create),
    ("POST", rf"/api/models/{NAME}/preupload/main", _Handler.preupload),
    ("POST", rf"/{NAME}\.git/info/lfs/objects/batch", _Handler.large_files),
    ("PUT", r"/put/(\w+)", _Handler.put),
    ("POST", rf"/api/models/{NAME}/commit/main", _Handler.commit),
    ("POST", r"/api/validate-yaml", _Handler.check_card),
    ("GET", rf"/api/v1/(models|datasets)/{NAME}/repo/(files|tree)", _Handler.scope_files),
    ("GET", rf"/api/v1/(models|datasets)/{NAME}/repo", _Handler.scope_content),
    ("GET", r"/api/v1/repos/internalAccelerationInfo", _Handler.no_acceleration),
    ("POST", r"/api/v1/models", _Handler.scope_create),
    ("GET", rf"/openapi/v1/models/{NAME}", _Handler.scope_info),
    ("POST", rf"/api/v1/repos/models/{NAME}/info/lfs/objects/batch", _Handler.large_files),
    ("POST", rf"/api/v1/repos/models/{NAME}/commit/master", _Handler.scope_commit),
]

NO_TOKENS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "MODELSCOPE_API_TOKEN", "MODELSCOPE_DOMAIN")


def environment(address: str, home: Path) -> dict[str, str]:
    """What makes both packages talk to this address alone and keep their own files in `home`."""
    return {
        "HF_ENDPOINT": address, "MODELSCOPE_ENDPOINT": address, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
        "HOME": str(home), "HF_HOME": str(home / "hf"), "MODELSCOPE_HOME": str(home / "ms"),
        "MODELSCOPE_CACHE": str(home / "cache"), "NO_PROXY": "*", "MODELSCOPE_DOWNLOAD_MAX_RETRIES": "0",
    }  # fmt: skip


# Real CLIP's repository in small, and what to do with it

WEIGHTS = save({"weight": arange(50_000)})  # 400 kB
CUT = 150_000  # bytes
CLIP_FILES = {
    "config.json": b'{"model_type": "clip"}',
    "preprocessor_config.json": b'{"size": 224}',
    "model.safetensors": WEIGHTS,
    "pytorch_model.bin": b"p" * 5000,
    "flax_model.msgpack": b"f" * 5000,
    "tf_model.h5": b"t" * 5000,
    "vocab.json": b"{}",
    ".gitattributes": b"*.bin lfs",
}
NEEDED = ("config.json", "preprocessor_config.json", "model.safetensors")


def fetch(folder: Path, *arguments: str, what: str = "clip") -> None:
    download.main([what, "--to", str(folder), *arguments])


def refusal(folder: Path, *arguments: str, what: str = "clip") -> str:
    """The one sentence that a failing download ends with."""
    with pytest.raises(SystemExit) as caught:
        fetch(folder, *arguments, what=what)
    text = caught.value.code
    assert isinstance(text, str) and text.startswith("download: ") and "\n" not in text and "Traceback" not in text
    return text


def tree(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()}


def needed_files() -> dict[str, bytes]:
    return {name: CLIP_FILES[name] for name in NEEDED}
