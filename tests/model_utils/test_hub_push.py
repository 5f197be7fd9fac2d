"""The push to the hub: dry unless asked for, with a hub on loopback that refuses, or none."""

import json
import shutil
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest

from src.model_utils import hub_push
from src.model_utils.hf_export import main
from src.utils.errors import UserError
from tests.data_processing.stand_in_hub import serving


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(hub_push.constants, "ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setattr(hub_push.constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def command(monkeypatch: pytest.MonkeyPatch, *arguments: object) -> int:
    monkeypatch.setattr("sys.argv", ["hf_export.py", *map(str, arguments)])
    return main()


def test_a_dry_run_lists_all_and_asks_nobody(
    tiny_export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    assert command(monkeypatch, "--out", tiny_export, "--push", "me/tiny") == 0
    printed = capsys.readouterr()
    result = json.loads(printed.out.splitlines()[-1])
    assert result["push"] == {"repository": "me/tiny", "uploaded": False}
    assert result["files"] == {path.name: path.stat().st_size for path in tiny_export.iterdir()}
    assert all(name in printed.err for name in result["files"])
    assert "nothing was sent" in printed.err


def test_the_upload(tiny_export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    calls = []

    class Api:
        def create_repo(self, repo_id: str, **options: Any) -> None:
            calls.append((repo_id, options))

        def upload_folder(self, **options: Any) -> None:
            calls.append(("upload", options))

    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub_push, "HfApi", Api)
    assert command(monkeypatch, "--out", tiny_export, "--push", "me/tiny", "--upload") == 0
    assert calls[0] == ("me/tiny", {"private": True, "exist_ok": True})
    assert calls[1][1]["folder_path"] == tiny_export
    assert sorted(calls[1][1]["allow_patterns"]) == sorted(path.name for path in tiny_export.iterdir())
    assert calls[1][1]["commit_message"] == "tiny, step 40"
    printed = capsys.readouterr()
    assert json.loads(printed.out)["push"]["address"] == "http://127.0.0.1:9/me/tiny"
    assert "hf_secret" not in printed.out + printed.err


def test_damaged_weights_are_not_offered(tiny_export: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    damaged = shutil.copytree(tiny_export, tmp_path / "damaged")
    with open(damaged / "model.safetensors", "r+b") as file:
        file.truncate(1_000)
    with pytest.raises(UserError, match=r"model.safetensors is missing or not as it was exported"):
        command(monkeypatch, "--out", damaged, "--push", "me/tiny")


def test_without_a_token(tiny_export: Path, monkeypatch: pytest.MonkeyPatch):
    with pytest.raises(UserError, match="set HF_TOKEN"):
        command(monkeypatch, "--out", tiny_export, "--push", "me/tiny", "--upload")


def test_a_hub_out_of_reach(tiny_export: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with pytest.raises(UserError, match=r"Cannot upload to me/tiny at http://127.0.0.1:9: ConnectError"):
        command(monkeypatch, "--out", tiny_export, "--push", "me/tiny", "--upload")


def test_a_hub_that_refuses(tiny_export: Path, monkeypatch: pytest.MonkeyPatch, refusing_hub: str):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setattr(hub_push.constants, "ENDPOINT", refusing_hub)
    with pytest.raises(UserError, match=r"HTTP 403 Forbidden: You may not.*token in HF_TOKEN"):
        command(monkeypatch, "--out", tiny_export, "--push", "me/tiny", "--upload")


@pytest.mark.parametrize("name", ["tiny", "me/tiny/more", "me/my model", "", "../tiny"])
def test_a_name_that_cannot_be(tiny_export: Path, monkeypatch: pytest.MonkeyPatch, name: str):
    with pytest.raises(UserError, match=f"--push '{name}'"):
        command(monkeypatch, "--out", tiny_export, "--push", name)


def test_options_that_say_nothing_together(tiny_export: Path, monkeypatch: pytest.MonkeyPatch):
    for options, words in (
        ([], "--checkpoint is missing"),
        (["--push", "me/tiny", "--dtype", "bf16"], "are about a new export"),
        (["--checkpoint", "x", "--upload"], "takes --push"),
        (["--checkpoint", "x", "--dtype", "q8_0"], "is a type of GGUF"),
    ):
        with pytest.raises(UserError, match=words):
            command(monkeypatch, "--out", tiny_export, *options)


def test_a_folder_that_is_no_export(tiny_run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for out in (tiny_run, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"is no export"):
            command(monkeypatch, "--out", out, "--push", "me/tiny")


@pytest.fixture
def refusing_hub() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            body = json.dumps({"error": "You may not write here"}).encode()
            self.send_response(403)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Handler) as address:
        yield address
