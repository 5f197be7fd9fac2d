"""The page on skipped steps shows the texts of the windows that the run names, and survives what its files say."""

import json
from pathlib import Path
from typing import Any

import pytest

from src.data_processing.shards import Manifest
from src.data_processing.skipped_steps import inspect_skipped
from src.utils.errors import UserError
from tests.conftest import Commands
from tests.data_processing.documents import MODULE, contents, some_texts
from tests.data_processing.text_datasets import write_texts

N_CTX = 64
BOUNDARY = "──── document ────"


@pytest.fixture(autouse=True)
def width(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "datasets" / "texts"


@pytest.fixture
def manifest(folder: Path) -> Manifest:
    """Shards of 900, 1,300 and 1,300 tokens or so; every document says which it is."""
    return write_texts(folder, some_texts(14), some_texts(20, seed=1), [f"Second {t}" for t in some_texts(20, seed=2)])


@pytest.fixture
def run(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "spiky"


def skipped(step: int, windows: Any, detail: Any = "loss nan, gradient norm nan", n_ctx: Any = N_CTX) -> str:
    event = {"kind": "event", "step": step, "time": 0.0, "name": "skipped step"}
    return json.dumps(event | {"detail": detail, "n_ctx": n_ctx, "windows": windows})


def write_run(run: Path, sha256: str, *lines: str) -> Path:
    run.mkdir(parents=True, exist_ok=True)
    (run / "config.json").write_text(json.dumps({"dataset": {"name": "texts", "manifest_sha256": sha256}}))
    (run / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    return run


def test_each_skipped_step_shows_the_text_of_its_windows(folder: Path, manifest: Manifest, run: Path) -> None:
    lines = [
        '{"kind": "train", "step": 4, "time": 0.0, "loss": 3.0}',
        skipped(5, [[2, 0], [1, 3]]),
        '{"kind": "event", "step": 6, "time": 0.0, "name": "resume", "detail": "from step 5"}',
        skipped(8, [[1, 0]], "loss 9.5, 12 standard deviations above"),
    ]
    before = contents(folder)
    found = inspect_skipped(folder, write_run(run, manifest.sha256, *lines), windows=4)
    summary, five, first, second, eight, third = found.page.split("\n\n")
    assert summary == f"{run} skipped 2 step(s)"
    assert five == "== step 5: loss nan, gradient norm nan\n2 window(s) of 64 tokens"
    assert first.split("\n")[:2] == [f"window 0 of shard 2: from token 0 of {manifest.shards[2].file}", BOUNDARY]
    assert first.split("\n")[2].startswith("│ Second Document 0. ")
    # documents of 60 words take 64 tokens and a few for their heading, so token 192 lies in number 2
    assert second.startswith(f"window 3 of shard 1: from token 192 of {manifest.shards[1].file}\n│ ")
    assert f"\n{BOUNDARY}\n│ Document 3. " in second
    assert eight.startswith("== step 8: loss 9.5, 12 standard")
    assert "│ Document 0. " in third
    assert max(map(len, found.page.split("\n")[1:])) <= 80
    assert json.loads(json.dumps(found.figures)) == {
        "run": str(run),
        "dataset": str(folder),
        "skipped_steps": 2,
        "windows": 3,
        "unreadable_lines": 0,
    }
    assert contents(folder) == before


def test_a_few_windows_of_each_step_and_a_few_lines_of_each_document(folder: Path, run: Path) -> None:
    long, short = "\n".join(f"line {i}" for i in range(40)), ["a", "b\nc", "d", "e", "f"]
    manifest = write_texts(folder, ["unseen"], [long, *short, "end " * 2_000])
    write_run(run, manifest.sha256, skipped(5, [[1, 0]] * 9, n_ctx=512))
    page = inspect_skipped(folder, run, windows=2).page
    assert "9 window(s) of 512 tokens; the first 2 follow, --windows 9 shows all" in page
    assert page.count("window 0 of shard 1") == 2
    assert page.split("\n\n")[-1].split("\n")[1:] == [
        BOUNDARY,
        *(f"│ line {i}" for i in range(3)),
        "(37 more line(s))",
        *(BOUNDARY, "│ a", BOUNDARY, "│ b", "│ c", BOUNDARY, "│ d"),
        "(3 more document(s))",
    ]
    write_run(run, manifest.sha256, skipped(5, [[1, 0]], n_ctx=32))
    alone = inspect_skipped(folder, run, windows=2).page.split("\n\n")[-1].split("\n")
    assert alone[1:] == [
        BOUNDARY,
        *(f"│ line {i}" for i in range(11)),
    ]  # three tokens a line, no more of them shown than the window has

    write_run(run, manifest.sha256, skipped(5, [[1, 0]] * 9, n_ctx=512))
    assert inspect_skipped(folder, run, windows=9).page.count("window 0 of shard 1") == 9


def test_a_run_that_skipped_nothing(folder: Path, manifest: Manifest, run: Path) -> None:
    found = inspect_skipped(folder, write_run(run, manifest.sha256, '{"kind": "train", "step": 1}'), windows=4)
    assert found.page == f"{run} skipped no step"
    assert found.figures["skipped_steps"] == 0


def test_windows_outside_the_shards_say_what_there_is(folder: Path, manifest: Manifest, run: Path) -> None:
    windows = (manifest.shards[1].tokens - 1) // N_CTX
    places = [[1, windows - 1], [1, windows], [1, 10**30], [3, 0]]
    page = inspect_skipped(folder, write_run(run, manifest.sha256, skipped(5, places)), windows=4).page
    last, *outside, no_shard = page.split("\n\n")[2:]
    assert last.startswith(f"window {windows - 1} of shard 1")
    for text, number in zip(outside, (windows, 10**30), strict=True):
        assert text == (
            f"cannot be shown: window {number} of shard 1, {manifest.shards[1].file}, which has {windows} windows"
        )
    assert f"there is no shard 3 in {folder}: it has shards 0 to 2" in no_shard


@pytest.mark.parametrize("place", [None, 7, "1", [1], [1, -2], [True, 0], [1, 2.0], [1, 2, 3], {"\x1b[2J": 0}])
def test_a_window_that_is_none(folder: Path, manifest: Manifest, run: Path, place: Any) -> None:
    page = inspect_skipped(folder, write_run(run, manifest.sha256, skipped(5, [place, [1, 0]])), windows=4).page
    assert "cannot be shown: a window is a shard and a number, found " in page
    assert page.count("window 0 of shard 1") == 1
    assert "\x1b" not in page


@pytest.mark.parametrize(
    ("windows", "n_ctx"), [(None, N_CTX), ("all", N_CTX), ([], N_CTX), ([[1, 0]], 0), ([[1, 0]], "x")]
)
def test_a_step_without_its_windows(folder: Path, manifest: Manifest, run: Path, windows: Any, n_ctx: Any) -> None:
    write_run(run, manifest.sha256, skipped(5, windows, n_ctx=n_ctx), skipped(6, [[1, 0]]))
    page = inspect_skipped(folder, run, windows=4).page
    assert "== step 5: loss nan, gradient norm nan\nthe run did not record which windows these were" in page
    assert "window 0 of shard 1" in page


def test_damaged_lines_are_counted_and_passed_over(folder: Path, manifest: Manifest, run: Path) -> None:
    damaged = ["", "[" * 100_000, "null", '{"kind": "event", "na']
    write_run(run, manifest.sha256, damaged[0], skipped(5, [[1, 0]]), *damaged[1:])
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(b"\xff\xfe\x00\n")
    found = inspect_skipped(folder, run, windows=4)
    assert "5 line(s) of its metrics.jsonl are damaged" in found.page
    assert (found.figures["skipped_steps"], found.figures["unreadable_lines"]) == (1, 5)


def test_a_terminal_is_shown_control_characters_and_does_not_get_them(
    folder: Path, manifest: Manifest, run: Path
) -> None:
    bad = "\x1b]0;title\x07\r\n== step 6: forged \u202e \ud800"
    page = inspect_skipped(folder, write_run(run, manifest.sha256, skipped(5, [[1, 0]], bad)), windows=4).page
    assert r"== step 5: \x1b]0;title\x07\r\n== step 6: forged \u202e \ud800" in page
    assert not set("\x1b\x07\r\u202e\ud800") & set(page)


def test_a_damaged_shard_leaves_the_rest(folder: Path, manifest: Manifest, run: Path) -> None:
    (folder / manifest.shards[2].file).unlink()
    page = inspect_skipped(folder, write_run(run, manifest.sha256, skipped(5, [[2, 0], [1, 0]])), windows=4).page
    assert f"cannot be shown: {folder / manifest.shards[2].file} is missing" in page
    assert "window 0 of shard 1" in page


def test_a_run_on_another_dataset_is_refused(folder: Path, manifest: Manifest, run: Path) -> None:
    write_run(run, "5" * 64, skipped(5, [[1, 0]]))
    with pytest.raises(UserError, match=rf"trained on another dataset: texts, .* 5{{64}}; .* {manifest.sha256}"):
        inspect_skipped(folder, run, windows=4)


@pytest.mark.parametrize("content", ["", "[]", '{"dataset": null}', '{"dataset": {"name": "texts"}}', "[" * 100_000])
def test_a_run_that_does_not_say_its_dataset(folder: Path, manifest: Manifest, run: Path, content: str) -> None:
    (write_run(run, manifest.sha256) / "config.json").write_text(content)
    with pytest.raises(UserError, match=r"config\.json is damaged: it does not say which dataset"):
        inspect_skipped(folder, run, windows=4)


def test_no_such_run(folder: Path, manifest: Manifest, run: Path) -> None:
    with pytest.raises(UserError, match=f"there is no run directory {run}"):
        inspect_skipped(folder, run, windows=4)
    run.mkdir(parents=True)
    with pytest.raises(UserError, match=r"cannot read .*config\.json: No such file.* Is it a run directory"):
        inspect_skipped(folder, run, windows=4)
    (write_run(run, manifest.sha256) / "metrics.jsonl").unlink()
    with pytest.raises(UserError, match=r"cannot read .*metrics\.jsonl: No such file"):
        inspect_skipped(folder, run, windows=4)


def test_the_command(commands: Commands) -> None:
    folder, run = commands.temp_data / "datasets" / "texts", commands.temp_data / "runs" / "spiky"
    sha256 = write_texts(folder, some_texts(3), some_texts(9)).sha256
    look = ["--inspect", "--out", "texts", "--skipped", "spiky"]
    assert commands.module(MODULE, *look).returncode == 2
    write_run(run, sha256)
    nothing = commands.module(MODULE, *look)
    assert nothing.returncode == 0
    assert nothing.stdout.startswith(f"{run} skipped no step\n")
    write_run(run, sha256, skipped(5, [[1, 0], [1, 1], [1, 2]]))
    shown = commands.module(MODULE, *look, "--windows", "2")
    assert shown.returncode == 0
    assert "window 1 of shard 1" in shown.stdout
    assert "window 2 of shard 1" not in shown.stdout
    assert json.loads(shown.stdout.splitlines()[-1])["windows"] == 3
    assert not list(folder.parent.glob("*.png"))
    for mistake in (
        ["--verify", "--out", "texts", "--skipped", "spiky"],
        ["--inspect", "--out", "texts", "--windows", "2"],
    ):
        assert commands.module(MODULE, *mistake).returncode == 2
