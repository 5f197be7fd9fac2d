"""The page to talk to a model, through plain HTTP: it streams, stops, and answers nobody but itself."""

import http.client
import json
import re
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from src.model_assessment.sampling import SamplingConfig
from src.model_assessment.talk import Server
from src.params import Config, EvalConfig

WORDS = [" one", " two", "\n", "<b>", ""]
asked: list[tuple[str, SamplingConfig]] = []


def stream(prompt: str, **settings: Any) -> Iterator[str]:
    asked.append((prompt, SamplingConfig(**settings)))
    return pieces(prompt)


def pieces(prompt: str) -> Iterator[str]:
    while prompt == "endless":
        time.sleep(0.005)
        yield " more"
    yield from WORDS


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    config = Config(run_name="<i>mine", eval=EvalConfig(sample_prompts=('"<script>',)))
    model: Any = SimpleNamespace(stream=stream, config=config, parameters=3_000_000, step=7, path=Path("x"))
    with Server(model, 0) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()


@pytest.fixture
def ask(server: Server) -> Iterator[Any]:
    """ask(body, **headers) as the page itself asks, with other headers where given; None leaves one out."""
    here, connections = f"127.0.0.1:{server.server_port}", list[http.client.HTTPConnection]()
    asked.clear()

    def ask(
        body: Any, method: str = "POST", path: str = "/continue", **headers: str | None
    ) -> http.client.HTTPResponse:
        connections.append(connection := http.client.HTTPConnection(here, timeout=20))
        content = json.dumps(body).encode()
        sent = {"Host": here, "Origin": f"http://{here}", "Content_Length": str(len(content)), **headers}
        connection.putrequest(method, path, skip_host=True)
        for name, value in sent.items():
            if value is not None:
                connection.putheader(name.replace("_", "-"), value)
        connection.endheaders(content)
        return connection.getresponse()

    yield ask
    for connection in connections:
        connection.close()


def test_the_page_runs_only_its_script(ask: Any):
    page = ask(None, "GET", "/")
    html, policy = page.read().decode(), page.headers["Content-Security-Policy"]
    assert page.status == 200
    assert "&lt;i&gt;mine" in html
    assert html.count("<script>") == 1
    assert not re.search(r"https?://|url\(|@import", html)
    assert "default-src 'none'" in policy
    assert "frame-ancestors 'none'" in policy
    assert ask(None, "GET", "/../pretrain.py").status == 404


def test_a_text_comes_in_pieces(ask: Any):
    settings: dict[str, Any] = {"temperature": 0, "top_k": 5, "max_new_tokens": 9, "seed": 2**53}
    lines = [json.loads(line) for line in ask({"prompt": "It is \ud800", **settings})]
    assert [line["text"] for line in lines[:-1]] == WORDS
    assert lines[-1]["done"]["tokens"] == len(WORDS) - 1
    assert asked == [("It is ?", SamplingConfig(**settings))]


def test_a_client_that_hangs_up_stops_the_model(ask: Any):
    endless = ask({"prompt": "endless"})
    assert json.loads(endless.readline()) == {"text": " more"}
    endless.close()
    assert len(list(ask({"prompt": "next"}))) == len(WORDS) + 1  # only one text at a time


@pytest.mark.parametrize(
    "headers",
    [
        {"Host": "evil.example"},
        {"Host": "evil.example", "Origin": "http://evil.example"},  # a name that leads to this machine
        {"Host": "127.0.0.1.evil.example"},
        {"Host": "["},
        {"Host": None},
        {"Origin": "http://evil.example"},
        {"Origin": "http://localhost:1"},  # another program's page on this machine
        {"Origin": "null"},
        {"Origin": None},
    ],
)
def test_nobody_else_is_answered(ask: Any, headers: dict[str, str | None]):
    answer = ask({"prompt": "x"}, **headers)
    assert answer.status == 403
    assert answer.headers["Access-Control-Allow-Origin"] is None
    if "Host" in headers:
        assert ask(None, "GET", "/", **headers).status == 403
    assert asked == []


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ([1], "needs the field prompt, a text"),
        ({"prompt": 5}, "needs the field prompt, a text"),
        ({"prompt": "x", "seed": 1.5}, "seed = 1.5 must be a whole number"),
        ({"prompt": "x", "temperature": "1"}, "temperature = '1' must be a number"),
        ({"prompt": "x", "temperature": float("nan")}, "temperature = nan must be"),
        ({"prompt": "x", "max_new_tokens": 10**9}, "max_new_tokens = 1000000000 must be at least"),
    ],
)
def test_what_cannot_work_is_said(ask: Any, body: Any, message: str):
    answer = ask(body)
    assert answer.status == 400
    assert message in json.load(answer)["error"]


@pytest.mark.parametrize("length", [None, "-1", "x", "99999999", "1" * 30])
def test_a_length_that_cannot_be_is_refused(ask: Any, length: str | None):
    assert ask({"prompt": "x"}, Content_Length=length).status == 413


@pytest.mark.parametrize("method", ["PUT", "DELETE", "NONSENSE"])
def test_other_methods_are_refused_in_the_same_form(ask: Any, method: str):
    answer = ask({"prompt": "x"}, method)
    assert (answer.status, answer.headers.get_content_type()) == (501, "application/json")
    assert json.load(answer) == {"error": f"Unsupported method ('{method}')"}
