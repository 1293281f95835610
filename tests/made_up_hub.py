"""A made-up Hugging Face hub on loopback: the addresses of the real one that huggingface_hub asks.

Large files are redirected to a storage at another address, as on the real hub, which must not see the token.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
import urllib.parse
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

LARGE = 4096
"""Bytes from which a file is in the storage (on the real hub: what Git LFS keeps)."""


@dataclass
class Repository:
    files: Mapping[str, bytes]
    token: str = ""
    """Needed to read it; empty: it is public."""
    gated: bool = False
    commits: dict[str, Mapping[str, bytes]] = field(init=False)
    refs: dict[str, str] = field(init=False)

    def __post_init__(self) -> None:
        self.commits, self.refs = {}, {}
        self.commit(self.files)

    def commit(self, files: Mapping[str, bytes], ref: str = "main") -> str:
        digest = hashlib.sha1(repr(sorted((n, _sha256(b)) for n, b in files.items())).encode()).hexdigest()
        self.commits[digest] = dict(files)
        self.refs[ref] = digest
        return digest


@dataclass(frozen=True)
class Asked:
    method: str
    path: str
    range: str
    token: str
    storage: bool


@dataclass
class Hub:
    """The running hub. Its fields can be changed between requests."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    asked: list[Asked] = field(default_factory=list)
    cut_after: list[int] = field(default_factory=list)
    """The next answers of the storage break off after this many bytes."""
    stop_after: int | None = None
    """Answers of the storage stop after this many bytes, without an end, until this is None again."""
    stopped: threading.Event = field(default_factory=threading.Event)
    status: int = 0
    """Not 0: every answer has this status."""
    page: str = ""
    """Not empty: every answer is this web page, as that of a network that wants a login."""
    damage: bool = False
    """Whether the storage answers with other bytes."""
    endpoint: str = ""
    storage: str = ""

    def downloaded(self) -> list[str]:
        """The files that were asked for with GET."""
        return [a.path for a in self.asked if a.method == "GET" and not a.path.startswith("/api/")]


@contextmanager
def running() -> Iterator[Hub]:
    hub = Hub()
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), _handler(hub, storage)) for storage in (False, True)]
    ports = [server.server_address[1] for server in servers]
    # Two names, because some versions of huggingface_hub take two ports of one name for one host.
    hub.endpoint, hub.storage = f"http://127.0.0.1:{ports[0]}", f"http://localhost:{ports[1]}"
    for server in servers:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield hub
    finally:
        for server in servers:
            server.shutdown()
            server.server_close()


def _handler(hub: Hub, storage: bool) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def log_message(self, *arguments: Any) -> None:
            pass

        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path, _, _query = self.path.partition("?")
            token = self.headers.get("Authorization", "").removeprefix("Bearer ")
            hub.asked.append(Asked(self.command, path, self.headers.get("Range", ""), token, storage))
            if hub.status:
                self._answer(hub.status, b"")
            elif hub.page:
                self._answer(200, hub.page.encode(), {"Content-Type": "text/html"})
            elif storage:
                self._from_storage(path)
            elif path.startswith("/api/models/"):
                self._about(path.removeprefix("/api/models/"), token)
            else:
                self._resolve(path, token)

        def _repository(self, name: str, token: str) -> Repository | None:
            found = hub.repositories.get(name)
            if found is None or (found.token and not found.gated and token != found.token):
                self._answer(
                    404 if token else 401, b'{"error": "Repository not found"}', {"X-Error-Code": "RepoNotFound"}
                )
                return None
            return found

        def _commit(self, repository: Repository, revision: str) -> str:
            revision = urllib.parse.unquote(revision)
            return revision if revision in repository.commits else repository.refs.get(revision, "")

        def _about(self, rest: str, token: str) -> None:
            name, _, revision = rest.partition("/revision/")
            repository = self._repository(name, token)
            if repository is None:
                return
            commit = self._commit(repository, revision or "main")
            if not commit:
                self._answer(404, b'{"error": "Invalid rev id"}', {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = [_sibling(path, data) for path, data in repository.commits[commit].items()]
            facts = {"_id": "1", "id": name, "modelId": name, "sha": commit, "siblings": siblings, "tags": []}
            self._answer(200, json.dumps(facts).encode(), {"Content-Type": "application/json"})

        def _resolve(self, path: str, token: str) -> None:
            name, _, rest = path.removeprefix("/").partition("/resolve/")
            repository = self._repository(name, token)
            if repository is None:
                return
            revision, _, file = rest.partition("/")
            commit = self._commit(repository, revision)
            file = urllib.parse.unquote(file)
            if not commit:
                self._answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
            elif file not in repository.commits[commit]:
                self._answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": commit})
            elif repository.gated and token != repository.token:
                self._answer(403 if token else 401, b"", {"X-Error-Code": "GatedRepo"})
            else:
                data = repository.commits[commit][file]
                headers = {"X-Repo-Commit": commit, "Accept-Ranges": "bytes"}
                if len(data) < LARGE:
                    self._answer(200, data, {**headers, "ETag": f'"{_git_hash(data)}"'})
                else:
                    linked = {"X-Linked-Etag": f'"{_sha256(data)}"', "X-Linked-Size": str(len(data))}
                    self._answer(302, b"", {**headers, **linked, "Location": f"{hub.storage}/{_sha256(data)}"})

        def _from_storage(self, path: str) -> None:
            blobs = {
                _sha256(data): data
                for repository in hub.repositories.values()
                for files in repository.commits.values()
                for data in files.values()
            }
            data = blobs[path.removeprefix("/")]
            if hub.damage:
                data = bytes(len(data))
            asked = self.headers.get("Range", "")
            begin = int(asked.removeprefix("bytes=").partition("-")[0]) if asked else 0
            headers = {"Content-Range": f"bytes {begin}-{len(data) - 1}/{len(data)}"} if asked else {}
            cut = hub.cut_after.pop(0) if hub.cut_after and self.command == "GET" else None
            self._answer(206 if asked else 200, data[begin:], headers, cut)

        def _answer(
            self, status: int, data: bytes, headers: Mapping[str, str] | None = None, cut: int | None = None
        ) -> None:
            self.send_response(status)
            for name, value in (headers or {}).items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            if self.command != "HEAD" and storage and hub.stop_after is not None:
                self.wfile.write(data[: hub.stop_after])
                hub.stopped.set()
                while hub.stop_after is not None:
                    time.sleep(0.01)
                self.close_connection = True
            elif self.command != "HEAD":
                self.wfile.write(data if cut is None else data[:cut])
            if cut is not None:
                self.close_connection = True
                self.wfile.flush()

    return Handler


def _sibling(path: str, data: bytes) -> dict[str, Any]:
    facts: dict[str, Any] = {"rfilename": path, "size": len(data), "blobId": _git_hash(data)}
    if len(data) >= LARGE:
        facts["lfs"] = {"sha256": _sha256(data), "size": len(data), "pointerSize": 130}
    return facts


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _git_hash(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
