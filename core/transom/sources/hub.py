"""Models of the Hugging Face hub: found in the cache of huggingface_hub, or downloaded into it.

It needs the extra `transom[hub]`. Cache folder, token, address and time limits are those of huggingface_hub (HF_HOME,
HF_TOKEN, HF_ENDPOINT, …), so models that other programs have downloaded are found, and theirs find ours. Looking into
the cache imports only the package's constants.

A download that was cut continues: huggingface_hub itself begins large files anew. They are therefore written to
`blobs/<etag>.incomplete` of its cache, completed with HTTP ranges, compared with their SHA-256, and handed to it.

The layout of the cache: https://huggingface.co/docs/huggingface_hub/guides/manage-cache
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import importlib
import importlib.util
import json
import logging
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transom.contract import Progress
from transom.errors import MissingExtra, SourceError, TransomError, option
from transom.sources.base import summarize
from transom.sources.hub_names import INDEX, TOKENIZERS, HubName, Needed, needed, shown_size

_log = logging.getLogger("transom.hub")

RESUMED_FROM = 1 << 20
"""Bytes from which a file is downloaded so that it can be continued."""
_BLOCK = 1 << 22
_LOG_IN = "log in with hf auth login, or set HF_TOKEN"

Announce = Callable[[str], None]
"""Called with a sentence before something large is downloaded."""


@dataclass(frozen=True)
class Pulled:
    """A model in the hub's cache."""

    path: Path
    """What to load: a file, or a folder."""
    commit: str
    files: Mapping[str, int]
    """Bytes of each file of the model, by its path in the repository."""
    downloaded: int
    """Bytes that were not here before."""


@dataclass(frozen=True)
class _File:
    size: int
    blob: str
    """The name of its content in the cache: the SHA-256 of a large file, git's hash of a small one."""


def find(
    name: HubName, *, offline: bool = False, progress: Progress | None = None, announce: Announce | None = None
) -> Path:
    """The path of a model: from the cache without any network if it is whole there, else downloaded.

    Args:
        offline: nothing is downloaded.
        progress, announce: as for `pull`.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        SourceError: as for `pull`; or a download would be needed and is forbidden.
    """
    _require_package(f"There is no {name} here, and getting a model from the Hugging Face hub")
    if (here := cached(name)) is not None:
        return here
    if offline or _constants().HF_HUB_OFFLINE:
        if (here := cached(name, with_tokenizer=False)) is not None:
            return here
        rule = option("offline", True) if offline else "HF_HUB_OFFLINE"
        raise SourceError(
            f"{name} is neither a path here nor whole in the cache of the Hugging Face hub, and {rule} forbids "
            "downloading",
            f"Download it once: transom pull {name}",
        )
    owner, _, own = name.repository.partition("/")
    if Path(owner).is_dir():  # rather a mistyped path than a stranger's model
        raise SourceError(
            f"The folder {owner} here has no {own}",
            f"Check the path; if you mean the model of the Hugging Face hub: transom pull {name}",
        )
    return pull(name, progress=progress, announce=announce).path


def cached(name: HubName, *, with_tokenizer: bool = True) -> Path | None:
    """The path of a model that is whole in the cache, without any network; None: it is not.

    Args:
        with_tokenizer: whether a folder without a tokenizer counts as incomplete: another program may have fetched the
            weights alone.
    """
    folder = _cache() / _folder_name(name.repository)
    try:
        ref = folder / "refs" / name.revision
        commit = ref.read_text().strip() if ref.is_file() else name.revision
        snapshot = folder / "snapshots" / commit
        if not commit or not snapshot.is_dir():
            return None
        sizes = {p.relative_to(snapshot).as_posix(): p.stat().st_size for p in snapshot.rglob("*") if p.is_file()}
        choice = needed(name, sizes)
        if choice.kind == "safetensors":
            whole = all(file in sizes for file in choice.weights or _listed(snapshot))
            if not whole or (with_tokenizer and not any(file in sizes for file in TOKENIZERS)):
                return None
    except (OSError, ValueError, SourceError):
        return None
    return snapshot / choice.model


def cached_names() -> list[str]:
    """The repositories of models in the cache; empty without huggingface_hub."""
    if importlib.util.find_spec("huggingface_hub") is None:
        return []
    found = (p.name.split("--") for p in _cache().glob("models--*"))
    return sorted("/".join(parts[1:]) for parts in found if len(parts) == 3)


def pull(name: HubName, *, progress: Progress | None = None, announce: Announce | None = None) -> Pulled:
    """Download what is missing of a model, and return its place.

    Args:
        progress: called with `"list"`, then with `"download"` and the share done. It may raise `Cancelled`; what has
            arrived is kept.
        announce: None: the sentence is logged as a warning, which Python shows on stderr.

    Raises:
        MissingExtra: huggingface_hub is not installed.
        SourceError: the hub cannot be reached, refuses, or has no such model, revision or file; the model is of a kind
            that cannot be run; the disk is full, or the cache cannot be written.
    """
    _require_package("Getting a model from the Hugging Face hub")
    progress = progress or (lambda stage, share: None)
    progress("list", None)
    with _explaining(name), _package_quiet():
        info = _module("hf_api").HfApi().model_info(name.repository, revision=name.revision, files_metadata=True)
        files = {f.rfilename: _File(f.size or 0, f.lfs.sha256 if f.lfs else f.blob_id) for f in info.siblings or ()}
        choice = needed(name, {path: file.size for path, file in files.items()})
        return _Download(name, str(info.sha), files, progress, announce or _log.warning).run(choice)


class _Download:
    """The download of one model's files of one commit."""

    def __init__(
        self, name: HubName, commit: str, files: Mapping[str, _File], progress: Progress, announce: Announce
    ) -> None:
        self._name, self._commit, self._files = name, commit, files
        self._progress, self._announce = progress, announce
        self._folder = _cache() / _folder_name(name.repository)
        self._snapshot = self._folder / "snapshots" / commit
        self._done = self._total = 0

    def run(self, choice: Needed) -> Pulled:
        # The weights come last: where they are, everything is.
        sides = [f for f in dict.fromkeys(choice.sides) if f not in choice.weights]
        downloaded = self._left(sides)
        self._fetch(sides)
        weights = list(choice.weights)
        if choice.kind == "safetensors":
            _require_family(self._snapshot)
            weights = weights or self._shards()
        downloaded += self._begin(weights)
        self._fetch(weights)
        everything = [*sides, *weights]
        self._note_revision(min(everything, key=lambda f: self._files[f].size))
        return Pulled(
            self._snapshot / choice.model, self._commit, {f: self._files[f].size for f in everything}, downloaded
        )

    def _shards(self) -> list[str]:
        """The weight files that the index names."""
        shards = _listed(self._snapshot)
        if lacking := [f for f in shards if f not in self._files]:
            raise SourceError(
                f"{self._name.repository} lacks {len(lacking)} of {len(shards)} weight files: {summarize(lacking)}",
                "Choose another revision, or another model",
            )
        return shards

    def _left(self, paths: Iterable[str]) -> int:
        """Bytes that are still to be downloaded."""
        total = 0
        for path in paths:
            file = self._files[path]
            if not (self._snapshot / path).is_file() and not self._blob(file).is_file():
                part = _part(self._blob(file))
                begun = part.stat().st_size if _continues(file) and part.is_file() else 0
                total += max(file.size - begun, 0)
        return total

    def _begin(self, weights: list[str]) -> int:
        """Say what is downloaded, after a look whether the disk has room for it. Returns the bytes."""
        left = self._left(weights)
        self._total = sum(self._files[f].size for f in weights)
        self._done = self._total - left
        if not left:
            return 0
        place = next(p for p in (self._folder, *self._folder.absolute().parents) if p.is_dir())
        free = shutil.disk_usage(place).free
        if left > free:
            raise _no_room(self._name, f"{shown_size(left)} are to be downloaded, and {shown_size(free)} are free")
        what = shown_size(left) + (f" of {shown_size(self._total)}" if left < self._total else "")
        self._announce(f"Downloading {self._name} ({what}) from {_constants().ENDPOINT} to {_cache()}")
        self._progress("download", self._done / self._total)
        return left

    def _fetch(self, paths: Iterable[str]) -> None:
        for path in paths:
            if (self._snapshot / path).is_file():
                continue
            if _continues(self._files[path]):
                self._fetch_blob(path, self._files[path].size)
            self._fetch_by_package(path, self._commit)

    def _fetch_by_package(self, path: str, revision: str) -> None:
        """By huggingface_hub, which links the content into the snapshot if it is in `blobs` already."""
        _module("file_download").hf_hub_download(self._name.repository, path, revision=revision, tqdm_class=self._bar())

    def _fetch_blob(self, path: str, size: int) -> None:
        """Download a file into `blobs`, from where an earlier download was cut."""
        from filelock import FileLock

        package = _module("file_download")
        url = package.hf_hub_url(self._name.repository, path, revision=self._commit)
        headers = _module("utils").build_hf_headers()
        about = package.get_hf_file_metadata(url, headers=headers)
        if not about.etag or about.commit_hash != self._commit:
            return  # huggingface_hub reports what is wrong with such an answer
        blob = self._folder / "blobs" / about.etag
        lock = _cache() / ".locks" / self._folder.name / f"{about.etag}.lock"  # the one that huggingface_hub uses
        for folder in (blob.parent, lock.parent):
            folder.mkdir(parents=True, exist_ok=True)
        headers["Accept-Encoding"] = "identity"  # a range of a compressed answer is none of the file
        part = _part(blob)
        with FileLock(lock):
            if blob.is_file():
                return
            if part.is_file() and part.stat().st_size > size:
                part.unlink()
            with part.open("ab") as target:
                # Not from `about.location`, an address of the storage that expires: each attempt asks the hub for one.
                package.http_get(
                    url,
                    target,
                    resume_size=target.tell(),
                    headers=headers,
                    expected_size=size,
                    displayed_filename=path,
                    tqdm_class=self._bar(),
                )
            self._require_whole(path, part, about.etag)
            part.replace(blob)

    def _require_whole(self, path: str, part: Path, etag: str) -> None:
        """Compare a file with its SHA-256, which is its etag. A damaged one is removed."""
        if len(etag) != 64:
            return  # a file that git keeps itself
        total, done, digest = part.stat().st_size or 1, 0, hashlib.sha256()
        with part.open("rb") as source:
            while block := source.read(_BLOCK):
                digest.update(block)
                done += len(block)
                self._progress("hash", done / total)
        if digest.hexdigest() != etag:
            part.unlink()
            raise SourceError(
                f"{path} of {self._name.repository} arrived damaged: its SHA-256 is not the one that the hub names",
                f"The damaged file is removed; download it again: transom pull {self._name}",
            )

    def _note_revision(self, smallest: str) -> None:
        """Have huggingface_hub note that the revision is this commit, now that everything is here."""
        ref = self._folder / "refs" / self._name.revision
        if self._name.revision != self._commit and not (ref.is_file() and ref.read_text() == self._commit):
            self._fetch_by_package(smallest, self._name.revision)

    def _blob(self, file: _File) -> Path:
        return self._folder / "blobs" / file.blob

    def _bar(self) -> type:
        """A class in the place of tqdm's, which reports to `progress`."""
        download = self

        class Bar:
            """What huggingface_hub calls of such a class."""

            def __init__(self, *args: object, **kwargs: object) -> None:
                pass

            def __enter__(self) -> Bar:
                return self

            def __exit__(self, *error: object) -> None:
                pass

            def update(self, count: float | None = 1) -> None:
                if download._total:
                    download._done += int(count or 0)
                    download._progress("download", min(max(download._done / download._total, 0.0), 1.0))

            def _ignore(self, *args: object, **kwargs: object) -> None:
                pass

            close = refresh = set_description = set_postfix_str = _ignore
            update_transfer = set_transfer_postfix_str = _ignore  # of compressed bytes

        return Bar


def _continues(file: _File) -> bool:
    """Whether a download of the file can be continued: the hub gives larger ones only by a protocol of its own."""
    return RESUMED_FROM <= file.size <= int(_constants().MAX_HTTP_DOWNLOAD_SIZE)


def _part(blob: Path) -> Path:
    """The file for the beginning of a blob, named as by huggingface_hub 1.x."""
    return blob.with_name(f"{blob.name}.incomplete")


def _listed(snapshot: Path) -> list[str]:
    """The weight files that the index of a snapshot names. Raises SourceError, ValueError or OSError."""
    table = json.loads((snapshot / INDEX).read_bytes()).get("weight_map")
    names = sorted(set(table.values())) if isinstance(table, Mapping) else []
    if not names or not all(isinstance(n, str) and Path(n).name == n for n in names):
        raise SourceError(f"{snapshot / INDEX} names no weight files of its folder", "Choose another model")
    return names


def _require_family(snapshot: Path) -> None:
    """Refuse an architecture that no source can build, before its weights are downloaded."""
    from transom.models import family_for_hf
    from transom.sources import mobius
    from transom.sources.architectures import refusal_of_directory
    from transom.sources.hf import read_config

    config = read_config(snapshot)
    if family_for_hf(config, str(snapshot / "config.json")) is not None:
        return
    if not mobius.installed():
        raise refusal_of_directory(config, snapshot)
    mobius.require_built(config, snapshot)


def _require_package(what: str) -> None:
    """Raise MissingExtra without huggingface_hub. Imports nothing."""
    if importlib.util.find_spec("huggingface_hub") is None:
        raise MissingExtra(f"{what} needs the package huggingface_hub", "hub")


def _module(name: str) -> Any:
    """A module of huggingface_hub. Only its constants are quick to import."""
    return importlib.import_module(f"huggingface_hub.{name}")


def _constants() -> Any:
    return _module("constants")


def _cache() -> Path:
    return Path(_constants().HF_HUB_CACHE).expanduser()


def _folder_name(repository: str) -> str:
    return "models--" + repository.replace("/", "--")


@contextlib.contextmanager
def _package_quiet() -> Iterator[None]:
    """Keep warnings of huggingface_hub from stderr: each retry is one, and what fails in the end becomes an error."""
    log = _module("utils.logging")  # importing it sets the level
    before = log.get_verbosity()
    log.set_verbosity_error()
    try:
        yield
    finally:
        log.set_verbosity(before)


@contextlib.contextmanager
def _explaining(name: HubName) -> Iterator[None]:
    """Turn the errors of huggingface_hub, of the network and of the disk into errors for users."""
    errors = _module("errors")
    try:
        yield
    except TransomError:
        raise
    except (errors.HTTPError, OSError, ValueError) as error:
        raise _explained(name, error) from error


def _explained(name: HubName, error: Exception) -> SourceError:
    errors, host = _module("errors"), _constants().ENDPOINT
    page = f"{host}/{name.repository}"
    if isinstance(error, errors.LocalEntryNotFoundError) and isinstance(error.__cause__, Exception):
        error = error.__cause__
    if isinstance(error, errors.GatedRepoError):
        return SourceError(
            f"{name.repository} is gated: its owner decides who may download it",
            f"Ask for access on {page}, then {_LOG_IN}",
        )
    if isinstance(error, errors.RevisionNotFoundError):
        return SourceError(
            f'{name.repository} has no revision "{name.revision}"',
            f"Leave it out, or choose a branch, tag or commit of {page}/tree/main",
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return SourceError(
            f"There is no model {name.repository} on {host}, or it is private",
            f"Check the name or the path; for a private model, {_LOG_IN}",
        )
    if isinstance(error, errors.OfflineModeIsEnabled):
        return SourceError("HF_HUB_OFFLINE forbids downloading", f"Unset it, then: transom pull {name}")
    if isinstance(error, errors.HfHubHTTPError):
        return _refused(name, error.response.status_code)
    if isinstance(error, errors.HTTPError):
        reason = " ".join(str(error).split()) or type(error).__name__
        return SourceError(
            f"{host} cannot be reached, or the connection broke: {reason}",
            "Check the network, HF_ENDPOINT and the proxy, and run it again: what has arrived is kept",
        )
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return _no_room(name, "it is full")
    if isinstance(error, OSError) and error.errno is not None:
        where = f" ({error.filename})" if error.filename else ""
        return SourceError(
            f"The cache of the Hugging Face hub {_cache()} cannot be written: {error.strerror}{where}",
            "Check its permissions, or choose another folder with HF_HOME",
        )
    reason = (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
    return SourceError(
        f"{host} does not answer as the Hugging Face hub does: {reason}",
        "Check HF_ENDPOINT, and whether a proxy or a login page of the network answers in its place",
    )


def _refused(name: HubName, status: int) -> SourceError:
    host = _constants().ENDPOINT
    if status == 401:
        return SourceError(f"{host} does not accept the token", "Check HF_TOKEN, or log in again with hf auth login")
    if status == 403:
        return SourceError(
            f"{host} refuses access to {name.repository}",
            f"Ask its owner for access, or use a token that may read it: {_LOG_IN}",
        )
    if status == 429:
        return SourceError(
            f"{host} has had too many requests from this address", f"Wait some minutes; for a higher limit, {_LOG_IN}"
        )
    return SourceError(
        f"{host} answers with the HTTP status {status} for {name.repository}",
        "Try again later: what has arrived is kept",
    )


def _no_room(name: HubName, why: str) -> SourceError:
    return SourceError(
        f"The disk of the hub's cache {_cache()} has no room for {name}: {why}",
        "Remove models with hf cache rm, or choose a folder on another disk with HF_HOME",
    )
