"""A web page where a model continues what people write.

    python -m src.model_assessment.talk --checkpoint RUN [--port 8000]

It listens on 127.0.0.1 and answers only to that address and localhost. So neither another website nor a domain name
that its owner points to this machine (DNS rebinding) can use the model or read the page. It fetches nothing.

POST /continue with {"prompt": ..., "temperature": ..., ...} returns one JSON object per line: {"text": ...} for each
piece, then {"done": {"tokens": ..., "seconds": ...}} or {"error": ...}. If the client hangs up, the model stops.
"""

import base64
import hashlib
import json
import re
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import jinja2

from src.model_assessment.run_history import compact
from src.model_assessment.sampling import TextModel
from src.model_configs.arguments import Parser, between
from src.utils.errors import UserError, exit_with, print_result, say

ADDRESS, NAMES = "127.0.0.1", ("127.0.0.1", "localhost")
SETTINGS = ("max_new_tokens", "temperature", "top_k", "top_p", "seed")
MOST_BYTES = 1_000_000  # of a request
SILENT_SECONDS = 60.0  # a client that neither reads nor writes is dropped
BUSY_SECONDS = 30.0  # how long a request waits for the previous one


class Server(ThreadingHTTPServer):
    """Serves the page of a model on this machine's loopback, with `serve_forever`. Port 0 takes a free port.

    Raises UserError if the port is taken.
    """

    daemon_threads = True  # Ctrl-C does not wait for a text to end

    def __init__(self, model: TextModel, port: int) -> None:
        facts = f"{compact(model.parameters)} parameters, {model.config.model.n_ctx:,} tokens of context"
        environment = jinja2.Environment(loader=jinja2.FileSystemLoader(Path(__file__).parent), autoescape=True)
        self.html = environment.get_template("talk_template.html").render(
            name=model.config.run_name if model.step else model.path.name,
            facts=f"{facts}, after {model.step:,} steps" if model.step else facts,
            prompt=next(iter(model.config.eval.sample_prompts), "Once upon a time"),
        )
        (script,) = re.findall("<script>(.*?)</script>", self.html, re.DOTALL)
        digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
        self.policy = (  # the browser runs this script and no other, and only this page gets answers
            f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; connect-src 'self'; "
            "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
        )
        self.model, self.busy = model, threading.Lock()
        try:
            super().__init__((ADDRESS, port), _Handler)
        except (OSError, OverflowError) as error:
            reason = getattr(error, "strerror", None) or str(error).rstrip(".")
            raise UserError(f"Cannot listen on {ADDRESS}:{port}: {reason}. Choose another --port.") from None

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Prints the error that ended an answer, unless the client hung up, which stops the model by an OSError."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


class _Refused(Exception):
    """HTTP status and message."""


class _Handler(BaseHTTPRequestHandler):
    server: Server
    timeout = SILENT_SECONDS

    def _answer(self) -> None:
        hosts = self.headers.get_all("Host") or [""]
        try:
            # Any other name belongs to a site whose owner points it to this machine.
            if len(hosts) > 1 or hosts[0].partition(":")[0] not in NAMES:
                raise _Refused(403, f"The page is only at http://{NAMES[0]} and http://{NAMES[1]}.")
            if self.command == "POST":
                self._continue()
            elif self.path != "/":
                raise _Refused(404, "The page is at /.")
            else:
                self._head(200, "text/html")
                self.wfile.write(self.server.html.encode())
        except _Refused as refused:
            self._refuse(*refused.args)
        except UserError as error:
            self._refuse(400, str(error))

    do_GET = do_POST = _answer

    def _continue(self) -> None:
        # A browser names the requesting site in this header, and a site cannot suppress it.
        if self.path != "/continue" or self.headers.get("Origin") != f"http://{self.headers['Host']}":
            raise _Refused(403, "Only this page may send requests: the header Origin names another site, or none.")
        pieces = self._request()
        # One text at a time. The previous one may not have noticed yet that its client hung up.
        if not self.server.busy.acquire(timeout=BUSY_SECONDS):
            raise _Refused(503, "The model is busy with another text. Try again later.")
        try:
            self._stream(pieces)
        finally:
            self.server.busy.release()

    def _request(self) -> Iterator[str]:
        """Returns a generator of the text's pieces, which has not started yet."""
        length = self.headers.get("Content-Length", "")
        if not re.fullmatch("[0-9]{1,9}", length) or int(length) > MOST_BYTES:
            raise _Refused(413, f"Send at most {MOST_BYTES:,} bytes, and their number in Content-Length.")
        try:
            values = json.loads(self.rfile.read(int(length)))
        except (ValueError, RecursionError):
            raise _Refused(400, "The request is not JSON.") from None
        if not isinstance(values, dict) or not isinstance(values.get("prompt"), str):
            raise _Refused(400, "The request needs the field prompt, a text.")
        chosen = {name: values[name] for name in SETTINGS if name in values}
        prompt = values["prompt"].encode(errors="replace").decode()  # JSON can hold half of a character
        return self.server.model.stream(prompt, **chosen)

    def _stream(self, pieces: Iterator[str]) -> None:
        started, tokens = time.perf_counter(), -1  # the last piece is the remaining text, without a token
        self._head(200, "application/x-ndjson")
        try:
            for piece in pieces:
                tokens += 1
                self._line(text=piece)
            self._line(done={"tokens": tokens, "seconds": round(time.perf_counter() - started, 3)})
        except (UserError, RuntimeError) as error:  # such as too little memory
            self._line(error=str(error))

    def _line(self, **values: Any) -> None:
        self.wfile.write(json.dumps(values).encode() + b"\n")

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """Answers requests that http.server refuses, such as PUT, in the same form as other refusals."""
        self._refuse(code, message or "The request is not HTTP.")

    def _refuse(self, status: int, message: str) -> None:
        self._head(status, "application/json")
        self._line(error=message)

    def _head(self, status: int, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", f"{kind}; charset=utf-8")
        self.send_header("Content-Security-Policy", self.server.policy)
        self.send_header("Cross-Origin-Resource-Policy", "same-origin")
        self.send_header("X-Content-Type-Options", "nosniff")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Prints nothing."""


def main() -> None:
    parser = Parser(
        prog="python -m src.model_assessment.talk",
        description="Serve a page on this machine where a model continues what people write. Ctrl-C ends it. To open "
        "the page of another machine: ssh -L 8000:127.0.0.1:8000 HOST.",
    )
    parser.add_argument("--checkpoint", required=True, help="a run (folder or name), a step_* folder or an export")
    parser.add_argument("--port", type=between(0, 65_535), default=8000, help="0 takes a free port (default: 8000)")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda", "mps"))
    args = parser.parse_args()
    model = TextModel(args.checkpoint, args.device)
    with Server(model, args.port) as server:
        address = f"http://{ADDRESS}:{server.server_port}/"
        say(f"Open {address} in a browser on this machine. Ctrl-C ends it.")
        print_result({"address": address, "checkpoint": str(model.path)})
        sys.stdout.flush()  # a program may be waiting for the address
        server.serve_forever()


if __name__ == "__main__":
    exit_with(main)
