"""The list of a dataset's files: pinned to a commit, and every reason why it cannot be had said once."""

import hashlib
import itertools
import json
import time
from pathlib import Path
from typing import Any

import httpx2
import pytest
from huggingface_hub.errors import BadRequestError

from src.data_processing import hub_files
from src.data_processing.hub_files import HubFile, HubListing
from src.utils.errors import UserError
from tests.conftest import Commands
from tests.data_processing import hub_client, stand_in_hub

CLIENT = hub_client.__name__
FILES = {
    "README.md": b"a card",
    "data/000.parquet": b"another configuration",
    "sample/10BT/001_00000.parquet": b"the second",
    "sample/10BT/000_00000.parquet": b"the first",
    "sample/10BT/notes.txt": b"not data",
}


def test_the_listing_is_of_one_folder_and_one_commit(tmp_path: Path, commands: Commands) -> None:
    with stand_in_hub.hub(hub_client.REPOSITORY, FILES) as hub:
        commands.environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
        done = commands.module(CLIENT, "files", str(tmp_path), "1", "0")
    assert done.returncode == 0, done.stderr
    saved = json.loads((tmp_path / "listing.json").read_text())
    assert HubListing.from_dict(saved) == HubListing(
        hub_client.REPOSITORY,
        stand_in_hub.REVISION,
        (
            HubFile("sample/10BT/000_00000.parquet", 9, hashlib.sha256(b"the first").hexdigest()),
            HubFile("sample/10BT/001_00000.parquet", 10, hashlib.sha256(b"the second").hexdigest()),
        ),
    )
    assert all(stand_in_hub.REVISION in r.path for r in hub.requests if "/resolve/" in r.path)


@pytest.mark.parametrize(
    ("files", "token", "settings", "message"),
    [
        pytest.param(
            FILES,
            "hf_right",
            {"HF_TOKEN": "hf_wrong"},
            "(HTTP 401 Unauthorized: Access to this dataset is restricted.); accept the dataset's conditions on "
            "{address}/datasets/org/data, then set HF_TOKEN or run: hf auth login",
            id="gated",
        ),
        pytest.param({"README.md": b""}, None, {}, "holds no parquet file in sample/10BT", id="no files"),
        pytest.param(FILES, None, {"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE keeps the client", id="offline"),
        pytest.param(FILES, None, {"HF_ENDPOINT": "hub.local"}, "HF_ENDPOINT must be an address", id="no address"),
    ],
)
def test_what_no_patience_would_mend_is_said_at_once(
    tmp_path: Path, commands: Commands, files: dict[str, bytes], token: str | None, settings: dict, message: str
) -> None:
    with stand_in_hub.hub(hub_client.REPOSITORY, files, token=token) as hub:
        commands.environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), **settings}
        done = commands.module(CLIENT, "files", str(tmp_path), "1", "0")
    assert done.returncode == 2
    assert message.replace("{address}", hub.address) in done.stderr
    assert done.stderr.count("\n") == 1, "one line, no retries"


def test_a_gated_dataset_with_the_right_token(tmp_path: Path, commands: Commands) -> None:
    with stand_in_hub.hub(hub_client.REPOSITORY, FILES, token="hf_right") as hub:
        commands.environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf"), "HF_TOKEN": "hf_right"}
        done = commands.module(CLIENT, "files", str(tmp_path), "1", "0")
    assert done.returncode == 0, done.stderr
    stored = [request for request in hub.requests if request.path.startswith("/storage/")]
    assert len(stored) == 2
    assert not any(request.with_token for request in stored), "the token left the hub"


def test_an_unreachable_hub(tmp_path: Path, commands: Commands) -> None:
    done = commands.module(CLIENT, "files", str(tmp_path), "1", "0")
    assert done.returncode == 2
    assert "attempt 2 of 3 for the list of files in sample/10BT in 0 s: ConnectError" in done.stderr
    assert (
        "cannot get the list of files in sample/10BT of org/data from http://127.0.0.1:9 (ConnectError" in done.stderr
    )
    assert "after 3 attempts; check the connection, or name a mirror in HF_ENDPOINT" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("answer", [[], {"sha": "../../etc"}, {}, {"sha": 5}], ids=str)
def test_an_answer_that_is_not_a_hubs(monkeypatch: pytest.MonkeyPatch, answer: Any) -> None:
    monkeypatch.setattr(hub_files, "BASE_DELAY_S", 0.0)
    monkeypatch.setattr(hub_files, "_get_json", lambda url: (answer, None))
    with pytest.raises(UserError, match=r"not an answer of a hub .* after 3 attempts"):
        hub_files.list_files("org/data", "sample/10BT", None)


def test_a_request_that_the_hub_calls_bad_is_not_repeated(monkeypatch: pytest.MonkeyPatch) -> None:
    request = httpx2.Request("GET", "http://hub/api")
    bad = BadRequestError("Invalid repo name", response=httpx2.Response(400, request=request))

    def refuse(url: str) -> None:
        raise bad

    monkeypatch.setattr(hub_files, "_get_json", refuse)
    with pytest.raises(UserError, match=r"\(HTTP 400 Bad Request\); it is gone or never was there"):
        hub_files.list_files("org/data", "sample/10BT", None)


def test_a_list_of_several_pages(tmp_path: Path, commands: Commands) -> None:
    files = {f"sample/10BT/{i:03}_00000.parquet": str(i).encode() for i in range(5)}
    with stand_in_hub.hub(hub_client.REPOSITORY, files, page_entries=2) as hub:
        commands.environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
        done = commands.module(CLIENT, "files", str(tmp_path), "5", "0")
    assert done.returncode == 0, done.stderr
    assert sum("/tree/" in request.path for request in hub.requests) == 3
    saved = HubListing.from_dict(json.loads((tmp_path / "listing.json").read_text()))
    assert [file.path for file in saved.files] == list(files)


def test_what_a_list_of_files_says(monkeypatch: pytest.MonkeyPatch) -> None:
    commit = "0123456789" * 4
    pages = {
        f"{hub_files.constants.ENDPOINT}/api/datasets/org/data/revision/refs%2Fpr%2F1": ({"sha": commit}, None),
        f"{hub_files.constants.ENDPOINT}/api/datasets/org/data/tree/{commit}/a": (
            [
                {"type": "file", "path": "a/2.parquet", "size": 2},
                {"type": "directory", "path": "a/x.parquet"},
                {"type": "file", "path": "a/1.parquet", "size": 1, "lfs": {"oid": "ab", "size": 1}},
            ],
            None,
        ),
    }
    monkeypatch.setattr(hub_files, "_get_json", pages.__getitem__)
    assert hub_files.list_files("org/data", "a", "refs/pr/1") == HubListing(
        "org/data", commit, (HubFile("a/1.parquet", 1, "ab"), HubFile("a/2.parquet", 2, None))
    )


def test_waits_grow_and_are_bounded(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(hub_files, "BASE_DELAY_S", 0.05)

    def attempt() -> None:
        times.append(time.monotonic())
        raise hub_files.BadAnswerError("no")

    times: list[float] = []
    with pytest.raises(UserError, match=r"cannot get it of org/data from .* \(no\) after 4 attempts"):
        hub_files.persist("it", "org/data", attempt, attempts=4)
    waits = [later - earlier for earlier, later in itertools.pairwise(times)]
    for wait, expected in zip(waits, (0.05, 0.1, 0.2), strict=True):
        assert 0.75 * expected <= wait < 1.25 * expected + 0.2
    assert capfd.readouterr().err.count("attempt ") == 3


def test_attempts_that_bring_much_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hub_files, "BASE_DELAY_S", 0.0)
    there = 0

    def attempt() -> str:
        nonlocal there
        if there >= 10 << 24:
            return "all"
        there += 1 << 24
        raise hub_files.BadAnswerError("cut off after 16 MiB")

    assert hub_files.persist("it", "org/data", attempt, attempts=2, bytes_there=lambda: there) == "all"
