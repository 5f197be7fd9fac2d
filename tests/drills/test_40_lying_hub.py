"""Drill 40: a hub that lies costs seconds and ends with 2; the token stays with the host that HF_ENDPOINT names."""

import gzip
import json
import sys
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import Commands
from tests.data_processing.stand_in_hub import serving

# Waits of some hundredths of a second instead of seconds.
COMMAND = (
    "from src.data_processing import data_downloader, hub_dataset; from src.utils.errors import exit_with; "
    "hub_dataset.BASE_DELAY_S = 0.02; exit_with(data_downloader.main)"
)
SHA = "f" * 40
FILE = {"rfilename": "train.parquet", "size": 1_000, "lfs": {"sha256": "a" * 64}}
LISTING = {"sha": SHA, "siblings": [FILE], "cardData": {}}


class Handler(BaseHTTPRequestHandler):
    requests: list[tuple[str, str | None]]
    """Path and token."""

    def do_GET(self) -> None:
        self.requests.append((self.path, self.headers.get("Authorization")))
        self.answer()

    def answer(self) -> None:
        raise NotImplementedError

    def reply(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Print nothing."""


def handler(answer: Callable[[Handler], None]) -> type[Handler]:
    return type("Answering", (Handler,), {"answer": answer, "requests": []})


def ask(commands: Commands, address: str, *options: str):
    home = str(commands.temp_data / "hf")
    commands.environment |= {
        "HF_ENDPOINT": address,
        "HF_HOME": home,
        "HF_TOKEN": "hf_secret",
        "HF_HUB_DOWNLOAD_TIMEOUT": "2",
    }
    start = time.monotonic()
    command = [sys.executable, "-c", COMMAND, "--source", "hub", "--dataset", "org/data", "--out", "x", *options]
    done = commands.run(command)
    assert time.monotonic() - start < 40
    assert "Traceback" not in done.stderr, done.stderr
    assert "hf_secret" not in done.stderr
    return done


@pytest.mark.parametrize("where", ["listing", "file"])
def test_the_token_stays_with_its_host(commands: Commands, where: str) -> None:
    elsewhere = handler(lambda self: self.reply(json.dumps(LISTING).encode(), Link='</more>; rel="next"'))
    with serving(elsewhere) as other:

        def redirect(self: Handler) -> None:
            if where == "listing" or "/resolve/" in self.path:
                self.reply(b"", 302, Location=f"{other}{self.path}")
            else:
                self.reply(json.dumps(LISTING).encode(), Link=f'<{other}/api/next>; rel="next"')

        hub = handler(redirect)
        with serving(hub) as address:
            assert ask(commands, address).returncode == 2
    assert {token for _, token in hub.requests} == {"Bearer hf_secret"}
    assert elsewhere.requests
    assert {token for _, token in elsewhere.requests} == {None}
    assert not [path for path, _ in elsewhere.requests if "next" in path or "more" in path]


def test_redirects_without_end(commands: Commands) -> None:
    hub = handler(lambda self: self.reply(b"", 302, Location=f"{self.path}x"))
    with serving(hub) as address:
        done = ask(commands, address)
    assert done.returncode == 2
    assert f"Cannot get the list of files of org/data from {address}" in done.stderr
    assert len(hub.requests) < 100


@pytest.mark.parametrize(
    "change",
    [
        *({"rfilename": name} for name in ("../train.parquet", "/train.parquet", "a\0.parquet", "\ud800.parquet")),
        *({"rfilename": name} for name in (5, ["x"])),
        {"rfilename": "data/" + "漢" * 200 + "/train.parquet"},
        *({"size": size} for size in (-1, float("inf"), "5", True, 2**60, None, 10**30)),
        *({"lfs": lfs} for lfs in ("x", {"sha256": 5}, {"sha256": "../x"}, [1])),
    ],
    ids=str,
)  # fmt: skip
def test_odd_files(tmp_path: Path, commands: Commands, change: dict[str, Any]) -> None:
    content = LISTING | {
        "siblings": [FILE | change],
        "cardData": {"configs": [{"config_name": "a", "data_files": "**"}]},
    }
    with serving(handler(lambda self: self.reply(json.dumps(content).encode()))) as address:
        done = ask(commands, address)
    assert done.returncode == 2, done.stderr
    assert "Cannot use the list of files of org/data: " in done.stderr
    assert not (tmp_path / "datasets" / "x").exists()


@pytest.mark.parametrize(
    "body",
    [
        "[" * 100_000,
        "[]",
        "null",
        "not JSON",
        json.dumps(LISTING | {"siblings": {"rfilename": "train.parquet"}}),
        json.dumps(LISTING | {"sha": "../" * 20}),
        json.dumps(LISTING | {"cardData": [1]}),
        json.dumps(LISTING | {"cardData": {"configs": [{"config_name": 1e300, "data_files": 7}]}}),
        json.dumps(LISTING | {"siblings": [FILE | {"rfilename": f"train{sep}x.parquet"} for sep in ("/", "--")]}
                   | {"cardData": {"configs": [{"config_name": "a", "data_files": "**"}]}}),
    ],
    ids=range(9),
)  # fmt: skip
def test_odd_lists(commands: Commands, body: str) -> None:
    with serving(handler(lambda self: self.reply(body.encode()))) as address:
        done = ask(commands, address)
    assert done.returncode == 2, done.stderr
    assert "list of files of org/data" in done.stderr


def test_a_list_that_unpacks_without_end(commands: Commands) -> None:
    bomb = gzip.compress(b"[" + b" " * 400_000_000, compresslevel=1)
    with serving(handler(lambda self: self.reply(bomb, Content_Encoding="gzip"))) as address:
        done = ask(commands, address)
    assert done.returncode == 2
    assert "the list has no end" in done.stderr


@pytest.mark.parametrize("options", [(), ("--max-tokens", "1_000")])
def test_bytes_that_are_not_the_file(commands: Commands, options: tuple[str, ...]) -> None:
    def answer(self: Handler) -> None:
        self.reply(json.dumps(LISTING).encode() if "/api/" in self.path else b"PAR1" + b"\xff" * 992 + b"PAR1")

    with serving(handler(answer)) as address:
        done = ask(commands, address, *options)
    assert done.returncode == 2, done.stderr
    assert "train.parquet" in done.stderr


def test_a_file_larger_than_the_disk(commands: Commands) -> None:
    def answer(self: Handler) -> None:
        listing = LISTING | {"siblings": [FILE | {"size": 2**49}]}
        self.reply(json.dumps(listing).encode() if "/api/" in self.path else b"x" * 1_000)

    with serving(handler(answer)) as address:
        done = ask(commands, address)
    assert done.returncode == 4
    assert "Cannot download train.parquet: 562.9 TB of disk needed" in done.stderr
