"""The command, with a file from a hub on loopback and with settings to train on with."""

import json
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from src.model_utils import reference_import
from src.model_utils.load_model import load_model
from src.utils.errors import UserError
from tests.conftest import Commands
from tests.data_processing.stand_in_hub import serving
from tests.model_utils.reference_files.files import (
    Content,
)


@pytest.fixture
def hub(content: Content, save: Callable[[Any], Path]) -> Iterator[str]:
    """Serves the file as me/small's model.pth, and no other."""
    body = save(content).read_bytes()

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            found = self.path == "/me/small/resolve/main/model.pth"
            self.send_response(200 if found else 404)
            self.send_header("Content-Length", str(len(body) if found else 0))
            self.send_header("X-Repo-Commit", "f" * 40)
            self.send_header("ETag", '"a"')
            if not found:
                self.send_header("X-Error-Code", "EntryNotFound")
                self.send_header("X-Error-Message", "Entry not found")
            self.end_headers()
            if found and self.command == "GET":
                self.wfile.write(body)

        do_HEAD = do_GET

        def log_message(self, *args: Any) -> None:
            pass

    with serving(Handler) as address:
        yield address


def ask(address: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sets what HF_ENDPOINT sets when the client is imported."""
    monkeypatch.setattr(constants, "ENDPOINT", address)
    template = address + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


def test_the_command_with_a_file_from_the_hub(hub: str, commands: Commands, tmp_path: Path):
    commands.environment |= {"HF_ENDPOINT": hub, "HF_HOME": str(tmp_path / "hf")}
    command = ("src.model_utils.reference_import", "--hub", "me/small", "model.pth", "--run-name", "fetched")
    done = commands.module(*command)
    assert done.returncode == 0, done.stderr
    made = json.loads(done.stdout.splitlines()[-1])
    assert made["checkpoint"] == str(tmp_path / "runs/fetched/checkpoints/step_0000003")
    assert load_model(Path(made["run"])).step == 3
    again = commands.module(*command)
    assert (again.returncode, again.stdout) == (2, "")
    assert again.stderr.startswith("reference_import.py: error: ")
    assert again.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("repository", "file", "words"),
    [
        (
            "me/small",
            "other.pth",
            r"Cannot get other.pth of me/small from http.*: HTTP 404 Not Found: Entry not found.*\. Check",
        ),
        ("me/small/more", "x", "--hub 'me/small/more' cannot be a repository"),
    ],
)
def test_what_the_hub_does_not_have(hub: str, monkeypatch: pytest.MonkeyPatch, repository: str, file: str, words: str):
    ask(hub, monkeypatch)
    monkeypatch.setattr("sys.argv", ["x", "--hub", repository, file, "--run-name", "fetched"])
    with pytest.raises(UserError, match=words):
        reference_import.main()


def test_a_hub_out_of_reach(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    ask("http://127.0.0.1:9", monkeypatch)
    monkeypatch.setattr("sys.argv", ["x", "--hub", "me/small", "model.pth", "--run-name", "fetched"])
    with pytest.raises(
        UserError, match=r"Cannot get model.pth of me/small from http://127.0.0.1:9: ConnectError: .*refused"
    ):
        reference_import.main()
    assert capsys.readouterr() == ("", "")  # it is not tried again and again


def test_settings_on_the_command_line(
    content: Content, save: Callable[[Any], Path], monkeypatch: pytest.MonkeyPatch, dataset: Callable[..., Path]
):
    folder = dataset(train_tokens=[2_000], n_vocab=300)
    command = ["x", "--checkpoint", str(save(content)), "--run-name", "imported"]
    sizes = {"n-vocab": 300, "n-ctx": 16, "n-embd": 16, "n-head": 2, "n-layer": 2}
    shape = [word for name, value in sizes.items() for word in (f"--model.{name}", str(value))]
    monkeypatch.setattr("sys.argv", [*command, "laptop", *shape, "--data.dir", str(folder)])
    with pytest.raises(UserError, match=r"the settings .*: model.residual_dropout = 0.1, in the file 0.0; model.ffn_"):
        reference_import.main()
    no_dropout = ["--model.residual-dropout", "0", "--model.ffn-dropout", "0"]
    monkeypatch.setattr("sys.argv", [*command, "laptop", *shape, *no_dropout, "--data.dir", str(folder)])
    assert reference_import.main() == 0
    loaded = load_model(Path("imported"))
    assert loaded.config.run_name == "imported"
    assert loaded.config.data.dir == str(folder)
    assert len(loaded.dataset_sha256) == 64
    monkeypatch.setattr("sys.argv", [*command, "--train.total-steps", "5"])
    with pytest.raises(UserError, match=r"--train\.total-steps is unknown here"):
        reference_import.main()
