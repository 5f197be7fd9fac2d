"""A stand-in for the Hugging Face hub on loopback: any one dataset, one revision, and faults.

As on the real one, a parquet file is stored with LFS: its sha256 is in the listing, and the request for it is
redirected to another origin, the storage, which answers ranges and must not see the token.
"""

import hashlib
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote, urlsplit

REVISION = "f" * 40
_PIECE_BYTES = 1 << 14


@dataclass
class Fault:
    """What goes wrong with the first `times` requests for the bytes of a file. One of these, at the storage:"""

    times: int
    status: int = 0
    headers: dict[str, str] = field(default_factory=dict)
    stall_after: int = -1
    """Bytes of the body, after which nothing more comes."""
    cut_after: int = -1
    """Bytes of the body, after which the connection is closed."""
    wrong: bool = False
    """The body has the right length and another content."""
    whole: bool = False
    """Ignores the requested range."""


@dataclass
class Request:
    method: str
    path: str
    range: str | None
    with_token: bool
    body_bytes: int = 0


@dataclass
class Hub:
    """A hub that is being served, with all that it was asked."""

    repository: str
    files: dict[str, bytes]
    faults: dict[str, Fault]
    token: str | None
    """Needed for everything, if there is one: the dataset is gated."""
    piece_s: float
    """Seconds for every 16 KiB of a body."""
    card: dict[str, Any]
    """The YAML of the dataset's card."""
    address: str = ""
    requests: list[Request] = field(default_factory=list)
    closing: threading.Event = field(default_factory=threading.Event)

    def stored(self, path: str) -> list[Request]:
        """The requests that reached the storage for a file's bytes."""
        return [request for request in self.requests if request.path == f"/storage/{path}"]

    def bytes_sent(self, path: str = "") -> int:
        """Of the bodies of the file at `path`, or of all files in storage."""
        return sum(r.body_bytes for r in self.requests if r.path.startswith(f"/storage/{path}"))


@contextmanager
def hub(
    repository: str,
    files: dict[str, bytes],
    faults: dict[str, Fault] | None = None,
    token: str | None = None,
    piece_s: float = 0.0,
    card: dict[str, Any] | None = None,
) -> Iterator[Hub]:
    """Serves `files` as the dataset `repository` at the address in the hub this yields, for HF_ENDPOINT."""
    served = Hub(repository, files, faults or {}, token, piece_s, card or {})
    with serving(type("Handler", (_Handler,), {"hub": served})) as served.address:
        try:
            yield served
        finally:
            served.closing.set()


@contextmanager
def serving(handler: type[BaseHTTPRequestHandler]) -> Iterator[str]:
    """The address of an HTTP server on loopback that answers as `handler` does."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: Hub
    request_log: Request

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, api = unquote(url.path), f"/api/datasets/{self.hub.repository}"
        resolve = f"/datasets/{self.hub.repository}/resolve/"
        token = self.headers.get("Authorization")
        self.request_log = Request(self.command, path, self.headers.get("Range"), token is not None)
        self.hub.requests.append(self.request_log)
        name = path.removeprefix(resolve).removeprefix("main/").removeprefix(f"{REVISION}/")
        if path.startswith("/storage/"):
            self.send_stored(path.removeprefix("/storage/"))
        elif self.hub.token and token != f"Bearer {self.hub.token}":
            self.reply(401, {"error": "Access to this dataset is restricted."}, {"X-Error-Code": "GatedRepo"})
        elif path == api:
            self.reply(200, self.info())
        elif name in self.hub.files:
            self.redirect_to_storage(name)
        else:
            self.reply(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def info(self) -> dict[str, Any]:
        """The answer to dataset_info with files_metadata=True."""
        siblings: list[dict[str, Any]] = []
        for name, content in self.hub.files.items():
            siblings.append({"rfilename": name, "size": len(content), "blobId": hashlib.sha1(content).hexdigest()})
            if name.endswith(".parquet"):
                sha256 = hashlib.sha256(content).hexdigest()
                siblings[-1]["lfs"] = {"sha256": sha256, "size": len(content), "pointerSize": 134}
        identity = {"_id": "0", "id": self.hub.repository, "sha": REVISION, "private": False, "tags": [], "likes": 0}
        return {**identity, "downloads": 0, "cardData": self.hub.card, "siblings": siblings}

    def redirect_to_storage(self, name: str) -> None:
        content = self.hub.files[name]
        headers = {
            # Another host name, hence another origin, of this same server.
            "Location": f"{self.hub.address.replace('127.0.0.1', 'localhost')}/storage/{quote(name)}",
            "X-Repo-Commit": REVISION,
            "X-Linked-Etag": f'"{hashlib.sha256(content).hexdigest()}"',
            "X-Linked-Size": str(len(content)),
        }
        self.reply(302, b"Found. Redirecting", headers)

    def send_stored(self, name: str) -> None:
        fault = self.hub.faults.get(name, Fault(0))
        if fault.times <= 0:
            self.send_content(self.hub.files[name])
            return
        fault.times -= 1
        if fault.status:
            self.reply(fault.status, {"error": "as the test wants it"}, fault.headers)
        else:
            self.send_content(self.hub.files[name], fault)

    def send_content(self, content: bytes, fault: Fault | None = None) -> None:
        fault = fault or Fault(0)
        etag = hashlib.sha256(content).hexdigest()
        headers = {"ETag": f'"{etag}"', "X-Repo-Commit": REVISION, "Accept-Ranges": "bytes"}
        status = 200
        body = bytes(len(content)) if fault.wrong else content
        if (asked := self.headers.get("Range")) and not fault.whole:
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            status, body = 206, body[int(first) : end + 1]
        self.reply(status, body, headers, fault)

    def reply(
        self, status: int, content: Any, headers: dict[str, str] | None = None, fault: Fault | None = None
    ) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        stop = max(fault.stall_after, fault.cut_after) if fault else -1
        self.send_body(data[:stop] if stop >= 0 else data)
        if stop >= 0:
            self.close_connection = True
            if fault and fault.stall_after >= 0:
                self.hub.closing.wait(30)

    def send_body(self, data: bytes) -> None:
        try:
            for start in range(0, len(data), _PIECE_BYTES):
                piece = data[start : start + _PIECE_BYTES]
                self.wfile.write(piece)
                self.request_log.body_bytes += len(piece)
                time.sleep(self.hub.piece_s)
        except ConnectionError:  # the client is gone
            self.close_connection = True

    def log_message(self, *args: Any) -> None:
        pass
