"""Hugging Face and ModelScope behind one interface: list, fetch, push; what goes wrong comes out as a sentence."""

import logging
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

from huggingface_hub import CommitOperationAdd, HfApi, constants, errors, get_token, hf_hub_url
from huggingface_hub.file_download import http_get
from huggingface_hub.utils import build_hf_headers
from huggingface_hub.utils.sha import git_hash

from model.files import file_sha256
from model.messages import NO_ROOM

RETRY = "run the same command again: it goes on where it stopped"
REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
constants.DOWNLOAD_CHUNK_SIZE = 2**16  # bytes; a broken connection loses the unfinished piece, by default of 10 MB


class HubError(Exception):
    """What a hub refused or failed to do, as a sentence with the cure; another hub may still do it."""


class NoNetworkError(HubError):
    """The hub could not be reached, or the connection broke."""


class LocalError(HubError):
    """What no other hub can mend: a full disk, a folder that must not be written, being offline on purpose."""


@dataclass(frozen=True)
class Repository:
    id: str  # owner/name
    type: str = "model"  # or "dataset"
    revision: str | None = None  # branch, tag or commit; None: the hub's main branch


@dataclass(frozen=True)
class RemoteFile:
    path: str  # in the repository, with /
    size: int  # bytes
    digest: str | None  # hexadecimal, as the hub states it
    algorithm: str = "sha256"  # or "git": the sha1 of a git blob, which Hugging Face gives for its small files

    def __post_init__(self) -> None:
        # A hub must not write outside the folder that it is asked to fill. ModelScope's package would let it.
        parts = PurePosixPath(self.path).parts
        if not parts or self.path.startswith("/") or ".." in parts or "\\" in self.path or ":" in self.path:
            raise HubError(f"the hub names a file {self.path!r}, outside the folder: nothing was fetched")

    def problem(self, path: Path) -> str | None:
        """How the file on disk differs from what the hub states; None where it does not."""
        if not path.is_file():
            return "no such file"
        size = path.stat().st_size
        if size != self.size:
            return f"{size:,} bytes instead of {self.size:,}"
        if self.digest is None:
            return None
        digest = file_sha256(path) if self.algorithm == "sha256" else git_hash(path.read_bytes())
        return None if digest == self.digest else f"{self.algorithm} {digest[:12]} instead of {self.digest[:12]}"

    def partial_path(self, staging: Path) -> Path:
        """Where the unfinished file waits: the same name for both hubs, so one resumes what the other began."""
        return staging / f"{self.path}.incomplete"


class Hub:
    """What the two hubs have in common: the sentences for what their packages raise."""

    name: str  # for --source
    title: str
    login: str  # the command that stores a token
    token_variable: str
    package_error: type[Exception]  # the root of the package's own exceptions
    endpoint: str
    has_token: bool

    @contextmanager
    def plain_errors(self, page: str) -> Iterator[None]:
        """Turn what the package or the disk raises into a HubError about this page of the hub."""
        try:
            yield
        except (self.package_error, OSError, RuntimeError, ValueError) as error:
            raise self._explain(error, page) from error

    def _explain(self, error: Exception, page: str) -> HubError:
        cause: BaseException | None = error
        while cause:  # a refusal or a full disk may stand behind "failed after 5 retries"
            status = getattr(getattr(cause, "response", cause), "status_code", None)
            if isinstance(cause, errors.GatedRepoError):
                return HubError(f"{page} is gated: ask for access on that page, then run `{self.login}`")
            if isinstance(cause, errors.RevisionNotFoundError):
                return HubError(f"{page} has no such revision: look at its branches and commits, or leave it out")
            if isinstance(cause, errors.OfflineModeIsEnabled):
                return LocalError("HF_HUB_OFFLINE is set, so nothing is fetched: unset it where there is a network")
            if status:
                return HubError(self._refusal(status, page))
            if isinstance(cause, OSError) and cause.errno in NO_ROOM:
                return LocalError(f"the disk is full ({cause.strerror}): free some space, then {RETRY}")
            if isinstance(cause, OSError) and cause.filename:
                return LocalError(f"{cause.filename} cannot be used ({cause.strerror}): name another place (--to)")
            cause = cause.__cause__
        if isinstance(error, OSError | errors.HTTPError):
            return NoNetworkError(f"{self.endpoint} cannot be reached, or the connection broke: check the network")
        first_line = str(error).strip().partition("\n")[0] or type(error).__name__
        return HubError(f"{page}: {first_line[:200]}: try again")

    def _refusal(self, status: int, page: str) -> str:
        """A sentence for an HTTP status that no exception of the packages names better."""
        if status == 401 and self.has_token:
            return f"{page} does not accept the token (401): run `{self.login}` again, or remove the old token"
        if status in (401, 404):
            return (
                f"{page} does not exist, or is private ({status}): check the name and the revision, or run "
                f"`{self.login}` with a token that may read it"
            )
        if status == 403:
            return f"{page} forbids this (403): ask for access there, or `{self.login}` with a token that may do it"
        if status == 429:
            return f"{page} asks to slow down (429): wait some minutes, then {RETRY}"
        return f"{page} answers with error {status}: try later or the other hub, then {RETRY}"


class HuggingFace(Hub):
    """huggingface.co, or the mirror that HF_ENDPOINT names."""

    name, title = "huggingface", "Hugging Face"
    login, token_variable = "hf auth login", "HF_TOKEN"
    package_error = errors.HTTPError

    def __init__(self) -> None:
        self.endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
        self.has_token = bool(get_token())
        self.api = HfApi(endpoint=self.endpoint)

    def page(self, repository: Repository) -> str:
        return f"{self.endpoint}/{'datasets/' if repository.type == 'dataset' else ''}{repository.id}"

    def list_files(self, repository: Repository) -> tuple[Repository, list[RemoteFile]]:
        """The repository at the commit that its revision means now, and its files with sizes and digests."""
        info = self.api.repo_info(
            repository.id, repo_type=repository.type, revision=repository.revision, files_metadata=True, timeout=15
        )
        files = []
        for entry in info.siblings or []:
            if entry.size is None:
                page = self.page(repository)
                raise HubError(f"{page} states no file sizes, so nothing could be checked: use another mirror")
            if entry.lfs:
                files.append(RemoteFile(entry.rfilename, entry.size, entry.lfs.sha256))
            else:
                files.append(RemoteFile(entry.rfilename, entry.size, entry.blob_id, "git"))
        return replace(repository, revision=info.sha), files

    def fetch(self, repository: Repository, file: RemoteFile, staging: Path) -> Path:
        """One file into `staging`, resumed where an earlier run left it; returns where it lies, not checked yet.

        The package's own downloads throw an unfinished file away (its issue 4196) and check no checksum, so only the
        transfer that they are made of is used.
        """
        partial = file.partial_path(staging)
        partial.parent.mkdir(parents=True, exist_ok=True)
        url = hf_hub_url(
            repository.id, file.path, repo_type=repository.type, revision=repository.revision, endpoint=self.endpoint
        )
        # Ranges count the bytes of what is sent, so it must be sent as it is stored.
        headers = build_hf_headers(headers={"accept-encoding": "identity"})
        with partial.open("ab") as stream:
            if stream.tell() < file.size:
                http_get(url, stream, resume_size=stream.tell(), headers=headers, displayed_filename=file.path)
        return partial

    def push(self, folder: Path, names: Sequence[str], repository: Repository, private: bool) -> None:
        """Create the repository where it is missing, and send these files in one commit."""
        self.api.create_repo(repository.id, private=private, exist_ok=True)
        if private and not self.api.repo_info(repository.id).private:
            raise HubError(
                f"{self.page(repository)} exists already and is public: make it private, or choose another name"
            )
        operations = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=folder / name) for name in names]
        self.api.create_commit(repository.id, operations, commit_message=f"Upload {folder.name}")


class ModelScope(Hub):
    """modelscope.cn, or what MODELSCOPE_ENDPOINT or the older MODELSCOPE_DOMAIN name."""

    name, title = "modelscope", "ModelScope"
    login, token_variable = "modelscope login", "MODELSCOPE_API_TOKEN"

    def __init__(self) -> None:
        # seconds; an hour by default, and gigabytes take longer
        os.environ.setdefault("MODELSCOPE_DOWNLOAD_TOTAL_TIMEOUT", str(24 * 3600))
        import modelscope_hub  # here, as it reads its settings when it is imported

        address = os.environ.get("MODELSCOPE_ENDPOINT") or os.environ.get("MODELSCOPE_DOMAIN") or None
        config = modelscope_hub.HubConfig(endpoint=address)
        self.endpoint, self.has_token = config.endpoint, bool(config.token)
        self.package_error = modelscope_hub.errors.HubError
        self.exists_already = modelscope_hub.errors.AlreadyExistsError
        self.api = modelscope_hub.HubApi(config=config)
        logging.getLogger("modelscope_hub").setLevel(logging.CRITICAL)  # its retries; what fails for good, we say

    def page(self, repository: Repository) -> str:
        return f"{self.endpoint}/{repository.type}s/{repository.id}"

    def list_files(self, repository: Repository) -> tuple[Repository, list[RemoteFile]]:
        """As HuggingFace.list_files, but without the commit, which ModelScope does not state."""
        repository = replace(repository, revision=repository.revision or "master")
        entries = self.api.list_repo_files(repository.id, repository.type, revision=repository.revision)
        files = [RemoteFile(entry.path, entry.size, entry.sha256 or None) for entry in entries if not entry.is_dir]
        return repository, files

    def fetch(self, repository: Repository, file: RemoteFile, staging: Path) -> Path:
        """As HuggingFace.fetch; this package resumes by itself."""
        size = file.size or None  # it would take 0 for unknown
        return self.api.download_file(
            repository.id, repository.type, file.path, revision=repository.revision, local_dir=staging, file_size=size
        )

    def push(self, folder: Path, names: Sequence[str], repository: Repository, private: bool) -> None:
        """As HuggingFace.push."""
        try:
            self.api.create_repo(repository.id, "model", visibility="private" if private else "public")
        except self.exists_already:
            if private and self.api.get_repo(repository.id, "model").visibility != 1:  # its number for private
                raise HubError(
                    f"{self.page(repository)} exists already and is public: make it private, or choose another name"
                ) from None
        # no cache file in the folder: it would be one more file that must not leave the machine
        message = f"Upload {folder.name}"
        self.api.upload_folder(
            repository.id, "model", folder, allow_patterns=list(names), use_cache=False, commit_message=message
        )


SOURCES: dict[str, type[HuggingFace | ModelScope]] = {"huggingface": HuggingFace, "modelscope": ModelScope}
