"""What the library `datasets` asks a hub beyond what models need: which files lie where, and facts of single files."""

import json
from http.server import BaseHTTPRequestHandler
from urllib.parse import parse_qs

from helpers.hub import COMMIT, NAME, HubStandIn, git_sha1


def dataset_hub() -> HubStandIn:
    return HubStandIn(ROUTES)


def file_facts(handler: BaseHTTPRequestHandler, repo_id: str, _revision: str, path: str) -> None:
    """What a HEAD request asks for."""
    found = handler.repository(f"datasets/{repo_id}")
    if found is None:
        return
    if path not in found.files:
        return handler.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
    content = found.files[path]
    handler.send_response(200)
    handler.send_header("X-Repo-Commit", COMMIT)
    handler.send_header("ETag", f'"{git_sha1(content)}"')
    handler.send_header("Content-Length", str(len(content)))
    handler.end_headers()


def tree(handler: BaseHTTPRequestHandler, repo_id: str, _revision: str, folder: str | None) -> None:
    """What lies in a folder, with all that lies below it where that is asked for."""
    found = handler.repository(f"datasets/{repo_id}")
    if found is None:
        return
    start = f"{folder}/" if folder else ""
    below = {path: path.removeprefix(start) for path in found.files if path.startswith(start)}
    if not below:
        return handler.answer({}, 404, {"X-Error-Code": "EntryNotFound"})
    is_deep = handler.query.get("recursive", "").lower() == "true"
    folders = {start + rest.split("/")[0] for rest in below.values() if "/" in rest}
    entries = [{"type": "directory", "path": path, "oid": COMMIT} for path in sorted(folders)]
    entries += [_entry(path, found.files[path]) for path, rest in below.items() if is_deep or "/" not in rest]
    return handler.answer(entries)


def facts_of_paths(handler: BaseHTTPRequestHandler, repo_id: str, _revision: str) -> None:
    found = handler.repository(f"datasets/{repo_id}")
    if found is not None:
        body = handler.body.decode()
        paths = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        handler.answer([_entry(path, found.files[path]) for path in paths if path in found.files])


def _entry(path: str, content: bytes) -> dict:
    return {"type": "file", "path": path, "size": len(content), "oid": git_sha1(content)}


ROUTES = [
    ("HEAD", rf"/datasets/{NAME}/resolve/(\w+)/(.+)", file_facts),
    ("GET", rf"/api/datasets/{NAME}/tree/(\w+)(?:/(.+))?", tree),
    ("POST", rf"/api/datasets/{NAME}/paths-info/(\w+)", facts_of_paths),
]
