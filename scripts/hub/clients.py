"""Hugging Face and ModelScope behind one interface: list, fetch, push; what goes wrong comes out as a sentence."""

import hashlib
import logging
import os
import time
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import BinaryIO

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token, hf_hub_url
from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_stream_backoff

from model.messages import NO_ROOM
from model.progress import Progress

# The package's HTTP library has changed more than once; the base class of its errors is in every version's ancestry.
HTTP_ERROR = next(kind for kind in errors.HfHubHTTPError.__mro__ if kind.__name__ == "HTTPError")
RETRY = "run the same command again: it goes on where it stopped"
CONNECT_SECONDS = 15
RECONNECTIONS = 3
PRIVATE = 1  # ModelScope's number for it
DAY = str(24 * 3600)  # seconds


class HubError(Exception):
    """What a hub refused or failed to do, as a sentence with the cure; another hub may still do it."""


class NoNetworkError(HubError):
    """The hub could not be reached at all."""


class LocalError(HubError):
    """What no other hub can mend: a full disk, a folder that must not be written, being offline on purpose."""


@dataclass(frozen=True)
class RemoteFile:
    path: str  # in the repository, with /
    size: int  # bytes
    digest: str | None  # hexadecimal, as the hub states it
    algorithm: str  # "sha256", or "git": the sha1 of a git blob, which Hugging Face gives for its small files

    def problem(self, path: Path) -> str | None:
        """How the file on disk differs from the hub's statement; None where it does not."""
        if path.stat().st_size != self.size:
            return f"{path.stat().st_size:,} bytes instead of {self.size:,}"
        found = _digest(path, self.algorithm) if self.digest else None
        return None if found == self.digest else f"{self.algorithm} {found[:12]} instead of {self.digest[:12]}"


def _digest(path: Path, algorithm: str) -> str:
    start = b"" if algorithm == "sha256" else b"blob %d\0" % path.stat().st_size
    seeded = hashlib.sha256() if algorithm == "sha256" else hashlib.sha1(start, usedforsecurity=False)
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: seeded).hexdigest()


def partial_path(staging: Path, file: RemoteFile) -> Path:
    """Where an unfinished file waits to be gone on with: the same name at both hubs."""
    target = staging / file.path
    return target.with_name(f"{target.name}.incomplete")


def _checked_name(path: str) -> str:
    """A hub must not write outside the folder that it is asked to fill."""
    parts = PurePosixPath(path).parts
    if not parts or path.startswith("/") or ".." in parts or "\\" in path or ":" in path:
        raise HubError(f"the hub names a file {path!r}, which would land outside the folder: nothing was fetched")
    return path


def _system_failure(error: OSError, page: str) -> HubError:
    """OSErrors that are no hub's own: the disk, a path, a connection that broke."""
    if error.errno in NO_ROOM:
        return LocalError(f"the disk is full ({error.strerror}): free some space or name another place, then {RETRY}")
    if error.filename:
        return LocalError(f"{error.filename} cannot be used ({error.strerror}): name another place")
    return HubError(f"the connection to {page} broke ({_first_line(error)}): {RETRY}")


def _no_network(endpoint: str, error: BaseException) -> HubError:
    """The packages' word for it, unless the disk is behind it."""
    cause: BaseException | None = error
    while cause:
        if isinstance(cause, OSError) and cause.errno in NO_ROOM:
            return _system_failure(cause, endpoint)
        cause = cause.__cause__
    return NoNetworkError(f"{endpoint} cannot be reached, or the connection broke")


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__)[:200].rstrip(".:")


def _receive_all(url: str, stream: BinaryIO, file: RemoteFile) -> None:
    """Append to the stream until it has the file's size or the server has no more; reconnect where the line breaks."""
    idle = 0  # attempts in a row that brought nothing
    with Progress(file.size, file.path, "B") as bar:
        while (have := stream.tell()) < file.size:
            bar.update(have - bar.n)
            try:
                _receive(url, stream, bar, file.size)
                if stream.tell() <= have:
                    return  # it is shorter than stated; the check afterwards will say so
            except HTTP_ERROR as error:
                idle = idle + 1 if stream.tell() == have else 0
                if isinstance(error, errors.HfHubHTTPError) or idle == RECONNECTIONS:
                    raise
                time.sleep(1 + idle)


def _receive(url: str, stream: BinaryIO, bar: Progress, most: int) -> None:
    """One answer of the server, from where the stream ends."""
    have = stream.tell()
    headers = {**build_hf_headers(), "accept-encoding": "identity"}  # ranges count bytes as they are stored
    if have:
        headers["range"] = f"bytes={have}-"
    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with http_stream_backoff(
        "GET", url, headers=headers, timeout=seconds, max_retries=RECONNECTIONS, retry_on_exceptions=()
    ) as response:
        if response.status_code == 416:
            return  # nothing lies beyond what is here
        hf_raise_for_status(response)
        if have and response.status_code != 206:  # a server without ranges begins again
            stream.seek(0)
            stream.truncate()
        for chunk in response.iter_bytes():
            stream.write(chunk)
            bar.update(len(chunk))
            if stream.tell() > most:
                return


class HuggingFace:
    """huggingface.co, or the mirror that HF_ENDPOINT names."""

    name = "huggingface"

    def __init__(self) -> None:
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.api = HfApi(endpoint=self.endpoint)

    def page(self, repo_id: str, repo_type: str = "model") -> str:
        return f"{self.endpoint}/{'datasets/' if repo_type == 'dataset' else ''}{repo_id}"

    def list_files(self, repo_id: str, repo_type: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
        """The commit that a revision (default main) is, and its files with sizes and digests.

        Raises:
            HubError: a sentence for the user.
        """
        page = self.page(repo_id, repo_type)
        with self._plainly(page):
            info = self.api.repo_info(
                repo_id, repo_type=repo_type, revision=revision, files_metadata=True, timeout=CONNECT_SECONDS
            )
        files = []
        for entry in info.siblings or []:
            if entry.size is None:
                raise HubError(f"{page} states no file sizes, so nothing could be checked: use another mirror")
            large = {"digest": entry.lfs.sha256, "algorithm": "sha256"} if entry.lfs else None
            small = {"digest": entry.blob_id, "algorithm": "git"}
            files.append(RemoteFile(_checked_name(entry.rfilename), entry.size, **(large or small)))
        return info.sha, files

    def fetch(self, repo_id: str, repo_type: str, revision: str, file: RemoteFile, staging: Path) -> Path:
        """One file into `staging`, going on with what an earlier run left there.

        The package's own download throws an unfinished file away when its process ends, and its transfer the last 10 MB
        of one that is cut; so only its requests are used.

        Raises:
            HubError: a sentence for the user; what came so far stays.
        """
        partial = partial_path(staging, file)
        url = hf_hub_url(repo_id, file.path, repo_type=repo_type, revision=revision, endpoint=self.endpoint)
        with self._plainly(self.page(repo_id, repo_type)):
            partial.parent.mkdir(parents=True, exist_ok=True)
            if partial.exists() and partial.stat().st_size > file.size:
                partial.unlink()
            with partial.open("ab") as stream:
                _receive_all(url, stream, file)
                stream.flush()
                os.fsync(stream.fileno())
            return partial.replace(staging / file.path)

    def push(self, folder: Path, names: Sequence[str], repo_id: str, private: bool) -> str:
        """Create the repository where it is missing, send these files in one commit, return its address.

        Raises:
            HubError: a sentence for the user.
        """
        page = self.page(repo_id)
        if not get_token():
            raise HubError("no Hugging Face token: run `hf auth login`, or set HF_TOKEN, with one that may write")
        with self._plainly(page):
            self.api.create_repo(repo_id, private=private, exist_ok=True)
            if private and not self.api.repo_info(repo_id).private:
                raise HubError(f"{page} exists already and is public: make it private there, or choose another name")
            operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
            self.api.create_commit(repo_id, operations, commit_message=f"Upload {folder.name}")
        return page

    @contextmanager
    def _plainly(self, page: str) -> Iterator[None]:
        try:
            yield
        except errors.GatedRepoError as error:
            raise HubError(f"{page} is gated: ask for access on that page, then run `hf auth login`") from error
        except errors.RevisionNotFoundError as error:
            raise HubError(f"{page} has no such revision: look at its branches and commits, or leave it out") from error
        except errors.RepositoryNotFoundError as error:
            raise HubError(_refusal(page, 401, "hf auth login", has_token=False)) from error
        except errors.HfHubHTTPError as error:
            status = getattr(error.response, "status_code", 0)
            raise HubError(_refusal(page, status, "hf auth login", bool(get_token()))) from error
        except errors.OfflineModeIsEnabled as error:
            raise LocalError(
                "HF_HUB_OFFLINE is set, so nothing is fetched: unset it where there is a network"
            ) from error
        except HTTP_ERROR as error:
            raise _no_network(self.endpoint, error) from error
        except OSError as error:
            raise _system_failure(error, page) from error
        except (RuntimeError, ValueError) as error:  # what the package makes of a failed large file
            raise HubError(f"{page}: {_first_line(error.__cause__ or error)}: try again") from error


def _refusal(page: str, status: int, login: str, has_token: bool) -> str:
    """A sentence for an HTTP status that no exception of the packages names better."""
    if status == 401 and not has_token:
        return f"{page} does not exist, or is private: check the name, or run `{login}` with a token that may read it"
    if status == 401:
        return f"{page} does not accept the token (401): run `{login}` again, or remove the old token"
    if status == 403:
        return f"{page} forbids this (403): ask for access on that page, or `{login}` with a token that may do it"
    if status == 404:
        return f"{page} or a file of it does not exist (404): check the name and the revision"
    if status == 429:
        return f"{page} asks to slow down (429): wait some minutes, then {RETRY}"
    return f"{page} answers with error {status}: try later or the other hub, then {RETRY}"


class ModelScope:
    """modelscope.cn, or what MODELSCOPE_ENDPOINT or MODELSCOPE_DOMAIN name."""

    name = "modelscope"

    def __init__(self) -> None:
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", DAY)  # an hour by default: gigabytes take longer
        try:
            import modelscope_hub
        except ImportError as error:
            raise HubError("the package modelscope is missing or too old: `pip install -U modelscope`") from error
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # MODELSCOPE_DOMAIN is called old, and still read
            config = modelscope_hub.HubConfig()
        self.errors, self.endpoint, self.has_token = modelscope_hub.errors, config.endpoint, bool(config.token)
        self.api = modelscope_hub.HubApi(config=config)
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # its retries; what fails for good, we say

    def page(self, repo_id: str, repo_type: str = "model") -> str:
        return f"{self.endpoint}/{repo_type}s/{repo_id}"

    def list_files(self, repo_id: str, repo_type: str, revision: str | None) -> tuple[str, list[RemoteFile]]:
        """As HuggingFace.list_files; the default revision is master, and the name stands for the commit."""
        with self._plainly(self.page(repo_id, repo_type)):
            entries = self.api.list_repo_files(repo_id, repo_type, revision=revision or "master")
        files = [
            RemoteFile(_checked_name(entry.path), entry.size, entry.sha256 or None, "sha256")
            for entry in entries if not entry.is_dir
        ]  # fmt: skip
        return revision or "master", files

    def fetch(self, repo_id: str, repo_type: str, revision: str, file: RemoteFile, staging: Path) -> Path:
        """As HuggingFace.fetch; here the package itself keeps what is unfinished and goes on with it."""
        with self._plainly(self.page(repo_id, repo_type)):
            staging.mkdir(parents=True, exist_ok=True)
            return self.api.download_file(repo_id, repo_type, file.path, revision=revision, local_dir=staging,
                                          expected_sha256=file.digest, file_size=file.size or None)  # fmt: skip

    def push(self, folder: Path, names: Sequence[str], repo_id: str, private: bool) -> str:
        """As HuggingFace.push."""
        page = self.page(repo_id)
        if not self.has_token:
            raise HubError("no ModelScope token: run `modelscope login`, or set MODELSCOPE_API_TOKEN")
        with self._plainly(page):
            try:
                self.api.create_repo(repo_id, "model", visibility="private" if private else "public")
            except self.errors.AlreadyExistsError:
                if private and self.api.get_repo(repo_id, "model").visibility != PRIVATE:
                    raise HubError(f"{page} exists already and is public: choose another name") from None
            # no cache file in the folder: it would be one more file that must not leave the machine
            self.api.upload_folder(repo_id, "model", folder, allow_patterns=list(names), use_cache=False,
                                   commit_message=f"Upload {folder.name}")  # fmt: skip
        return page

    @contextmanager
    def _plainly(self, page: str) -> Iterator[None]:
        kinds, login = self.errors, ("modelscope login", self.has_token)
        try:
            yield
        except (kinds.AuthenticationError, kinds.PermissionDeniedError) as error:
            raise HubError(_refusal(page, error.status_code or 403, *login)) from error
        except kinds.NotExistError as error:
            raise HubError(_refusal(page, 404, *login)) from error
        except kinds.FileIntegrityError as error:
            raise HubError(f"{page} sent something else than it states ({_first_line(error)}): {RETRY}") from error
        except kinds.APIError as error:
            raise HubError(_refusal(page, error.status_code or 0, *login)) from error
        except kinds.NetworkError as error:
            raise _no_network(self.endpoint, error) from error
        except OSError as error:
            raise _system_failure(error, page) from error
        except (kinds.HubError, RuntimeError, ValueError) as error:
            raise HubError(f"{page}: {_first_line(error)}: try again") from error


SOURCES = {"huggingface": HuggingFace, "modelscope": ModelScope}
