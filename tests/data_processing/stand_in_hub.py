"""The part of the Hugging Face hub that `load_dataset` needs, on loopback: one dataset, one revision."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

REVISION = "f" * 40


@contextmanager
def serving(repository: str, files: dict[str, bytes]) -> Iterator[str]:
    """Serves `files` as the dataset `repository` at the address this yields, for HF_ENDPOINT."""
    handler = type("Handler", (_Handler,), {"repository": repository, "files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    repository: str
    files: dict[str, bytes]

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path, api = unquote(url.path), f"/api/datasets/{self.repository}"
        resolve = f"/datasets/{self.repository}/resolve/{REVISION}/"
        if path in (api, f"{api}/revision/{REVISION}", f"{api}/revision/main"):
            siblings = [{"rfilename": name} for name in self.files]
            self.reply(
                200, {"_id": "0", "id": self.repository, "sha": REVISION, "private": False, "siblings": siblings}
            )
        elif path.startswith(f"{api}/tree/{REVISION}"):
            folder = path.removeprefix(f"{api}/tree/{REVISION}").strip("/")
            self.reply(200, self.tree(folder, "true" in parse_qs(url.query).get("recursive", [""])[0].lower()))
        elif path.removeprefix(resolve) in self.files:
            self.send_file(self.files[path.removeprefix(resolve)])
        else:
            self.reply(404, {"error": "not found"}, {"X-Error-Code": "EntryNotFound"})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"])).decode()
        asked = parse_qs(body).get("paths", [])
        everything = {entry["path"]: entry for entry in self.tree("", recursive=True)}
        self.reply(200, [everything[path] for path in asked if path in everything])

    def tree(self, folder: str, recursive: bool) -> list[dict[str, Any]]:
        entries: dict[str, dict[str, Any]] = {}
        inside = f"{folder}/" if folder else ""
        for name, content in self.files.items():
            if name.startswith(inside):
                parts = name.removeprefix(inside).split("/")
                for depth in range(1, len(parts)) if recursive else range(1, len(parts))[:1]:
                    path = inside + "/".join(parts[:depth])
                    entries[path] = {"type": "directory", "path": path, "oid": "0" * 40, "size": 0}
                if recursive or len(parts) == 1:
                    oid = hashlib.sha1(content).hexdigest()
                    entries[name] = {"type": "file", "path": name, "oid": oid, "size": len(content)}
        return list(entries.values())

    def send_file(self, content: bytes) -> None:
        headers = {
            "ETag": f'"{hashlib.sha1(content).hexdigest()}"',
            "X-Repo-Commit": REVISION,
            "Accept-Ranges": "bytes",
        }
        if asked := self.headers.get("Range"):
            first, _, last = asked.removeprefix("bytes=").partition("-")
            end = min(int(last or len(content)), len(content) - 1)
            headers["Content-Range"] = f"bytes {first}-{end}/{len(content)}"
            self.reply(206, content[int(first) : end + 1], headers)
        else:
            self.reply(200, content, headers)

    def reply(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args: Any) -> None:
        pass
