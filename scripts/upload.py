"""Send a model's folder to Hugging Face or ModelScope, and nothing that must not leave the machine.

    python scripts/upload.py out/my-model --repo_id me/my-model --private

The token comes from `hf auth login` or HF_TOKEN, at ModelScope from `modelscope login` or MODELSCOPE_API_TOKEN, never
from the command line.
"""

import re
from collections.abc import Sequence
from pathlib import Path

from model.command_line import CommandLine
from scripts.hub.clients import REPO_ID, SOURCES, HubError, LocalError, Repository

# What belongs to a model's folder: weights that cannot run code, configurations, the model's own code, its card
WEIGHTS = (".safetensors", ".gguf", ".onnx")
ALLOWED_SUFFIXES = {*WEIGHTS, ".json", ".jinja", ".py", ".md", ".txt", ".png", ".jpg"}
ALLOWED_NAMES = {"LICENSE", "NOTICE", "Modelfile", ".gitattributes"}
TEXT_SUFFIXES = {".json", ".jinja", ".py", ".md", ".txt", ""}
SAFE_NAME = re.compile(r"[\w.-]+(/[\w.-]+)*", re.ASCII)
SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}\b"),
    "a ModelScope token": re.compile(r"\bms-[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}\b"),
    "a GitHub token": re.compile(r"\b(gh[pousr]_[A-Za-z0-9]{36,}|github_pat_\w{40,})\b"),
    "an API key": re.compile(r"\bsk-[A-Za-z0-9_-]{32,}\b|\bAKIA[0-9A-Z]{16}\b"),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
}


def files_to_send(folder: Path) -> list[str]:
    """Every file of a model's folder, as paths with / from there.

    Raises:
        LocalError: there is something that must not be sent; the message lists it, secrets without their text.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise LocalError(f"{folder} is no folder: name the one that convert_vlm.py wrote")
    names, problems = [], []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        problem = _problem(path, name, folder.resolve())
        if problem:
            problems.append(f"{name} {problem}")
        elif path.is_file():
            names.append(name)
    if problems:
        more = f" and {len(problems) - 8} more" if len(problems) > 8 else ""
        raise LocalError(f"nothing was sent, {folder} holds what must stay here: {'; '.join(problems[:8])}{more}")
    if not any(name.endswith(WEIGHTS) for name in names):
        raise LocalError(f"nothing was sent, {folder} holds no weights (.safetensors): is it the right folder?")
    return names


def _problem(path: Path, name: str, folder: Path) -> str | None:
    """Why a file must not be sent, or None."""
    if path.is_symlink() and (path.is_dir() or not path.resolve().is_relative_to(folder)):
        return f"is a link to {path.resolve()}: copy the file itself"
    if path.name.startswith(".") and path.name not in ALLOWED_NAMES:
        return "is hidden: remove it"
    if path.is_dir():
        return None
    if not path.is_file():
        return "is no ordinary file: remove it"
    if path.name not in ALLOWED_NAMES and path.suffix not in ALLOWED_SUFFIXES:
        return "is no part of a model: remove it"
    if not SAFE_NAME.fullmatch(name):
        return "has a name that not every system can hold: rename it"
    if path.suffix in TEXT_SUFFIXES:
        text = path.read_text(encoding="utf-8", errors="replace")
        for kind, pattern in SECRETS.items():
            if found := pattern.search(text):
                return f"line {text.count(chr(10), 0, found.start()) + 1} holds {kind}: remove it, and revoke it"
    return None


def push_folder(folder: str | Path, repo_id: str, source: str = "huggingface", private: bool = False) -> str:
    """Create the repository where it is missing, send the folder in one go, return its address.

    Raises:
        HubError: a sentence for the user: no token, refused, unreachable, or something that must not leave the machine.
    """
    folder = Path(folder)
    if not REPO_ID.fullmatch(repo_id):
        raise LocalError(f"{repo_id!r} is no repository's name: it looks like owner/name")
    names = files_to_send(folder)
    hub, repository = SOURCES[source](), Repository(repo_id)
    if not hub.has_token:
        raise HubError(f"no {hub.title} token: run `{hub.login}`, or set {hub.token_variable}, with one that may write")
    with hub.plain_errors(hub.page(repository)):
        hub.push(folder, names, repository, private)
    return hub.page(repository)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("folder", type=Path, help="a model's folder, as convert_vlm.py writes it")
    parser.add_argument("--repo_id", required=True, help="owner/name")
    parser.add_argument("--private", action="store_true", help="only you see it; refused where it is public already")
    parser.add_argument("--source", choices=tuple(SOURCES), default="huggingface")
    options = parser.parse_args(arguments)
    try:
        url = push_folder(options.folder, options.repo_id, options.source, options.private)
    except HubError as error:
        raise SystemExit(f"upload: {error}") from error
    print(f"uploaded: {url}")


if __name__ == "__main__":
    main()
