"""Documents become the same shards however they are prepared, and what goes wrong is said."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

from src import launcher_settings
from src.data_processing import data_downloader, text_sources
from src.data_processing.data_downloader import prepare, repair
from src.data_processing.shards import check_shard, ensure_verified, read_manifest
from src.utils import root
from src.utils.errors import StorageError, UserError, exit_with
from tests.conftest import Commands
from tests.data_processing.documents import (
    MODULE,
    contents,
    request,
    some_texts,
    write_json_lines,
)


def test_the_result_is_one_json_object_and_a_second_start_writes_nothing(tmp_path: Path, commands: Commands) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(100))
    arguments = ["--source", "files", "--path", str(path), "--out", "mine"]
    first = commands.module(MODULE, *arguments)
    folder = tmp_path / "datasets" / "mine"
    before = {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())}
    second = commands.module(MODULE, *arguments)
    assert {path: path.stat().st_mtime_ns for path in (folder, *folder.iterdir())} == before
    manifest = read_manifest(tmp_path / "datasets" / "mine")
    for done in (first, second):
        assert done.returncode == 0
        result = json.loads(done.stdout.splitlines()[-1])
        seconds = result.pop("seconds")
        assert 0 <= seconds < 60
        assert result == {
            "dataset": str(tmp_path / "datasets" / "mine"),
            "documents": 100,
            "tokens": manifest.counts["tokens"],
            "text_bytes": manifest.counts["text_bytes"],
            "validation_tokens": manifest.validation[0].tokens,
            "shards": 2,
        }
    assert second.stderr == f"already prepared: {tmp_path / 'datasets' / 'mine'}\n"


@pytest.mark.parametrize("source", ["pydocs", "fineweb-edu"])
@pytest.mark.parametrize("limit", ["", "10_000_000"])
def test_the_launcher_gives_datasets_the_names_that_the_command_does(
    monkeypatch: pytest.MonkeyPatch, source: str, limit: str
) -> None:
    variables = {"PRESET": "debug", "DATA_SOURCE": source, "DATA_MAX_TOKENS": limit}
    folder = launcher_settings.settings(variables, [])["DATASET"]
    monkeypatch.setattr(
        sys, "argv", ["data_downloader", "--source", source, *(["--max-tokens", limit] if limit else [])]
    )
    assert Path(str(folder)).name == data_downloader._parse_arguments().out


def test_another_request_is_refused_naming_the_difference(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    prepare(request(path), tmp_path / "out", 1)
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match=r"seed was 42, is 43\. Choose another --out"):
        prepare(request(path, seed=43), tmp_path / "out", 1)
    write_json_lines(path, some_texts(11))
    with pytest.raises(UserError, match=rf"{path} was sha256 .*, is sha256 .*\. Choose"):
        prepare(request(path), tmp_path / "out", 1)
    path.unlink()
    assert prepare(request(path), tmp_path / "out", 1).counts["documents"] == 10
    assert contents(tmp_path / "out") == before


def test_a_file_more_or_less_is_another_request(tmp_path: Path) -> None:
    for name in "ab":
        write_json_lines(tmp_path / f"{name}.jsonl", some_texts(10))
    prepare(request(tmp_path / "*.jsonl"), tmp_path / "out", 1)
    (tmp_path / "a.jsonl").rename(tmp_path / "c.jsonl")
    with pytest.raises(UserError, match=r"/a.jsonl is gone; \S+/c.jsonl is new"):
        prepare(request(tmp_path / "*.jsonl"), tmp_path / "out", 1)


def test_a_link_that_leads_elsewhere_since_is_another_request(tmp_path: Path) -> None:
    for name in "ab":
        (tmp_path / f"{name} blob").write_text(json.dumps({"text": f"{name} text"}) + '\n{"text": "one more"}\n')
        os.utime(tmp_path / f"{name} blob", (0, 0))
    link = tmp_path / "x.jsonl"
    link.symlink_to("a blob")
    prepare(request(link), tmp_path / "out", 1)
    assert prepare(request(link), tmp_path / "out", 1).sources[0]["files"][0]["path"] == str(link)
    link.unlink()
    link.symlink_to("b blob")
    os.utime(link, (2**32, 2**32), follow_symlinks=False)
    with pytest.raises(UserError, match=f"{link} was sha256 .*, is sha256"):
        prepare(request(link), tmp_path / "out", 1)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        pytest.param(["--source", "files", "--path", "nowhere.txt", "--out", "x"], 2, "does not exist", id="no file"),
        pytest.param(["--source", "files", "--path", "{}/empty.txt", "--out", "x"], 2, "0 document(s)", id="empty"),
        pytest.param(["--source", "files", "--path", "{}/one.txt", "--out", "x"], 2, "at least two", id="one document"),
        pytest.param(["--source", "files", "--path", "{}/a.jsonl", "--out", "x"], 2, "found body", id="no field"),
        pytest.param(["--source", "files", "--path", "{}", "--out", "{}/one.txt/x"], 4, "annot write", id="unwritable"),
        pytest.param(["--source", "files", "--out", "x"], 2, "needs --path", id="no path"),
        pytest.param(["--source", "files", "--path", "", "--out", "x"], 2, "option is empty", id="empty path"),
        pytest.param([], 2, "Name files or folders: ./llm data my_texts/", id="nothing"),
        pytest.param(["--source", "files", "--path", "{}/pydoc"], 2, "or the source pydocs.", id="nearly a source"),
        pytest.param(["--source", "files", "--path", "{}/elf.txt"], 2, "elf.txt: it is a binary file", id="program"),
        pytest.param(["--source", "files", "--path", "{}/pdf.txt"], 2, "pdf.txt: it is a binary file", id="pdf"),
        pytest.param(["--source", "pydocs", "--at", "0:0-9"], 2, "--at is for --inspect", id="needless place"),
        pytest.param(["--verify"], 2, "--out DIR is needed", id="no out"),
        pytest.param(["--source", "pydocs", "--path", "x"], 2, "--path is for --source files", id="needless path"),
        pytest.param(["--source", "pydocs", "--dataset", "a/b"], 2, "is for --source hub", id="needless dataset"),
        pytest.param(
            ["--source", "pydocs", "--workers", "0"], 2, "'0' is not a whole number from 1 to 1,024", id="no workers"
        ),
        pytest.param(["--verify", "--out", "absent"], 2, "find a dataset at", id="nothing to verify"),
    ],
)
def test_errors_of_the_command(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    arguments: list[str],
    code: int,
    message: str,
) -> None:
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "empty.txt").write_text(" \n")
    (texts / "one.txt").write_text("Only one document.")
    (texts / "elf.txt").write_bytes(b"ELF" + bytes(range(64)) + bytes(40))
    (texts / "pdf.txt").write_bytes(b"%PDF-1.7\n" + bytes(range(256)))
    (texts / "a.jsonl").write_text('{"body": "a"}\n')
    monkeypatch.setattr(root, "DATASETS", tmp_path / "datasets")
    monkeypatch.setattr(
        sys, "argv", ["data_downloader", *(argument.replace("{}", str(texts)) for argument in arguments)]
    )
    with pytest.raises(SystemExit) as ended:
        exit_with(data_downloader.main)
    said = capfd.readouterr()
    assert (ended.value.code, said.out) == (code, "")
    assert message in said.err
    assert "Traceback" not in said.err
    assert not (tmp_path / "datasets" / "x").exists()


def test_verify_names_every_fault(tmp_path: Path, commands: Commands) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(100))
    folder = tmp_path / "datasets" / "mine"
    manifest = prepare(request(path, tokens_per_shard=2_000), folder, 1)
    (folder / "notes.txt").touch()
    sound = commands.module(MODULE, "--verify", "--out", "mine")
    assert sound.returncode == 0
    assert json.loads(sound.stdout)["shards"] == len(manifest.shards)
    assert f"ignoring 1 file(s) in {folder} that its manifest does not list: notes.txt" in sound.stderr

    changed, cut = folder / manifest.shards[1].file, folder / manifest.shards[2].file
    array = np.load(changed, mmap_mode="r+")
    array[10], array[11] = array[11], array[10]
    array.flush()
    os.truncate(cut, cut.stat().st_size - 1)
    damaged = commands.module(MODULE, "--verify", "--out", "mine")
    assert damaged.returncode == 2
    assert f"{changed}: expected sha256 {manifest.shards[1].sha256}" in damaged.stderr
    assert f"{cut}: expected {cut.stat().st_size + 1} bytes, found {cut.stat().st_size}" in damaged.stderr
    assert damaged.stdout == ""
    check_shard(folder, manifest.shards[0], manifest.n_vocab, full=True)
    with pytest.raises(UserError, match="2 of"):
        ensure_verified(folder, manifest, trust_stamp=False)


def test_a_damaged_dataset_is_not_called_prepared(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    manifest = prepare(request(path), tmp_path / "out", 1)
    shard = tmp_path / "out" / manifest.train[0].file
    shard.write_bytes(shard.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"cut short\. Repair it with: .* --repair --out '{tmp_path / 'out'}'"):
        prepare(request(path), tmp_path / "out", 1)
    shard.unlink()
    with pytest.raises(UserError, match=r"is missing: .*\. Repair it with"):
        prepare(request(path), tmp_path / "out", 1)


def test_a_trial_has_a_separate_folder(tmp_path: Path, commands: Commands) -> None:
    done = commands.module(MODULE, "--source", "pydocs", "--max-tokens", "50_000", "--max-documents", "60")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "datasets" / "pydocs-max-50000-tokens-max-60-documents")
    assert manifest.sources[0]["name"] == "pydocs"
    assert manifest.counts["documents"] <= 60
    assert 40_000 < manifest.counts["tokens"] <= 50_000
    assert manifest.shards[0].file == f"pydocs_i_000000_t_{manifest.shards[0].tokens}.npy"
    assert json.loads(done.stdout)["tokens"] == manifest.counts["tokens"]


def test_too_small_a_disk_is_said_beforehand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(100))
    monkeypatch.setattr(data_downloader, "free_bytes", lambda _: 1_000)
    with monkeypatch.context() as patch:
        patch.setattr(
            data_downloader, "free_bytes", lambda _: 20_000
        )  # more than the least: half of what such text usually holds
        prepare(request(path), tmp_path / "out", 1)
    with pytest.raises(StorageError, match=r"at least 17\.\d kB of disk needed, 1\.0 kB free\. .* or use --max-tokens"):
        prepare(request(path), tmp_path / "other", 1)
    assert not (tmp_path / "other").exists()


@pytest.mark.parametrize("limits", [{}, {"max_tokens": 20_000}, {"max_documents": 300, "drop_duplicates": True}])
def test_only_the_damaged_shards_are_written_again(tmp_path: Path, limits: dict) -> None:
    texts = some_texts(250) + some_texts(100) + some_texts(150, seed=1)
    for part in range(5):
        write_json_lines(tmp_path / f"{part}.jsonl", texts[part * 100 : part * 100 + 100])
    folder = tmp_path / "out"
    manifest = prepare(request(tmp_path / "*.jsonl", tokens_per_shard=3_000, **limits), folder, 1)
    before = contents(folder)
    times = {path.name: path.stat().st_mtime_ns for path in folder.iterdir()}
    validation, second, third, *_, last = (folder / shard.file for shard in manifest.shards)
    for path in (validation, last):
        data = bytearray(path.read_bytes())
        data[500:502] = data[502:504][::-1]
        path.write_bytes(data)
    second.unlink()
    os.truncate(third, 17)
    with pytest.raises(UserError, match=r"4 of \d+ shards differ from the manifest"):
        ensure_verified(folder, manifest, trust_stamp=False)
    assert repair(folder, 1) == repair(folder, 1) == manifest
    assert contents(folder) == before
    changed = {name for name in before if (folder / name).stat().st_mtime_ns != times[name]}
    assert changed == {path.name for path in (validation, second, third, last)}


def test_a_shard_around_the_validation_documents(tmp_path: Path) -> None:
    """Where the first document of the order is too long to validate on, validation lies among the training keys."""
    for seed in range(4):
        folder = tmp_path / f"texts {seed}"
        folder.mkdir()
        (folder / "long.txt").write_text("word " * 20_000)
        for number in range(4):
            (folder / f"{number}.txt").write_text(f"other {number} " * 500)
        out = tmp_path / f"out {seed}"
        manifest = prepare(request(folder, seed=seed), out, 1)
        before = contents(out)
        (out / manifest.train[0].file).unlink()
        repair(out, 1)
        assert contents(out) == before


def test_a_dataset_from_before_long_texts_were_divided_is_repaired_as_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number in range(2):
        (tmp_path / f"{number}.txt").write_text(f"line {number}\n" * 10_000)
    files = sorted(tmp_path.glob("*.txt"))
    folder, divided = tmp_path / "out", prepare(request(tmp_path), tmp_path / "divided", 1)
    with monkeypatch.context() as earlier:
        earlier.setattr(
            text_sources, "open_files", lambda *_: [text_sources.Files(str(tmp_path), files, "text", False)]
        )
        whole = prepare(request(tmp_path), folder, 1)
    assert (whole.counts["documents"], divided.counts["documents"]) == (2, 8)
    before = contents(folder)
    (folder / whole.train[0].file).unlink()
    repair(folder, 1)
    assert contents(folder) == before
    assert prepare(request(tmp_path), folder, 1) == whole  # and is still taken for what the request describes


def test_a_source_that_has_changed_cannot_mend(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    folder = tmp_path / "out"
    shard = folder / prepare(request(path), folder, 1).train[0].file
    shard.unlink()
    before = contents(folder)
    write_json_lines(path, some_texts(51))
    with pytest.raises(UserError, match=rf"Cannot repair .* have changed: {path} was sha256 .*, is sha256"):
        repair(folder, 1)
    path.unlink()
    with pytest.raises(UserError, match="does not exist"):
        repair(folder, 1)
    assert contents(folder) == before


def test_shards_that_cannot_be_put_in_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    folder = tmp_path / "out"
    shard = folder / prepare(request(path), folder, 1).train[0].file
    shard.unlink()
    real = os.replace

    def refuse(source: Path, target: Path) -> None:
        if Path(target).parent == folder:
            raise PermissionError(13, "Permission denied")
        real(source, target)

    monkeypatch.setattr(os, "replace", refuse)
    with pytest.raises(StorageError, match=f"Cannot write {folder}: Permission denied"):
        repair(folder, 1)


def test_the_command(tmp_path: Path, commands: Commands) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    folder = tmp_path / "datasets" / "mine"
    shard = folder / prepare(request(path), folder, 1).train[0].file
    sound = commands.module(MODULE, "--repair", "--out", "mine")
    assert (sound.returncode, sound.stderr) == (0, f"nothing to repair: {folder}\n")
    shard.write_bytes(b"")
    done = commands.module(MODULE, "--repair", "--out", "mine")
    assert done.returncode == 0, done.stderr
    assert f"{shard}: expected a .npy file" in done.stderr
    assert f"repaired 1 of 2 shards in {folder}" in done.stderr
    assert commands.module(MODULE, "--verify", "--out", "mine").returncode == 0
    assert commands.module(MODULE, "--repair", "--verify", "--out", "mine").returncode == 2
