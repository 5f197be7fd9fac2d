"""What a request lets into a dataset, and what its manifest then says."""

import json
from pathlib import Path

import pytest

from src.data_processing import preparation
from src.data_processing.preparation import prepare
from src.data_processing.shards import read_manifest
from src.data_processing.text_sources import Source
from src.data_processing.tokenizer import load_tokenizer
from src.utils.errors import StorageError, UserError
from tests.conftest import Commands
from tests.data_processing.documents import MODULE, all_decoded, request, some_texts, write_json_lines


def test_several_sources_and_their_shares(tmp_path: Path) -> None:
    folder = tmp_path / "notes"
    folder.mkdir()
    texts = {"a": some_texts(30, seed=1), "b": some_texts(60, seed=2), "notes": ["One note.", "Another one."]}
    for name in "ab":
        write_json_lines(tmp_path / f"{name}.jsonl", texts[name])
    for number, text in enumerate(texts["notes"]):
        (folder / f"{number}.md").write_text(text)
    paths = [str(tmp_path / "a.jsonl"), str(folder), str(tmp_path / "*.jsonl")]
    manifest = prepare(request(folder, paths=paths), tmp_path / "out", 1)
    assert [source["path"] for source in manifest.sources] == paths
    expected = [texts["a"], texts["notes"], texts["b"]]
    tokens = [sum(1 + len(load_tokenizer().encode(text)) for text in part) for part in expected]
    for source, part, count in zip(manifest.sources, expected, tokens, strict=True):
        assert source["documents"] == len(part)
        assert source["tokens"] == count
        assert source["text_bytes"] == sum(map(len, part))
        assert source["share"] == pytest.approx(count / sum(tokens), abs=1e-6)


def test_document_lengths_by_powers_of_two(tmp_path: Path) -> None:
    tokens = [2, 2, 3, 4, 7, 8, 63, 64, 1_000]
    texts = [f"{index} " + " a" * (count - 3) for index, count in enumerate(tokens)]
    counts = [1 + len(load_tokenizer().encode(text.rstrip())) for text in texts]
    path = write_json_lines(tmp_path / "a.jsonl", [text.rstrip() for text in texts])
    manifest = prepare(request(path), tmp_path / "out", 1)
    expected = [sum(2**k <= count < 2 ** (k + 1) for count in counts) for k in range(max(counts).bit_length())]
    assert manifest.document_lengths == expected


@pytest.mark.parametrize("files", [1, 4])
def test_limits_keep_the_first_documents(tmp_path: Path, files: int) -> None:
    texts = some_texts(200)
    for number in range(files):
        part = texts[number * 200 // files : (number + 1) * 200 // files]
        write_json_lines(tmp_path / f"{number}.jsonl", [" ", *part])
    path = tmp_path / "*.jsonl"
    some = prepare(request(path, max_documents=70), tmp_path / "documents", 1)
    assert sorted(all_decoded(tmp_path / "documents")) == sorted(texts[:70])
    assert some.counts["documents"] == 70
    prepare(request(path, max_tokens=5_000), tmp_path / "tokens", 1)
    kept = all_decoded(tmp_path / "tokens")
    assert sorted(kept) == sorted(texts[: len(kept)])
    tokens = [1 + len(load_tokenizer().encode(text)) for text in texts]
    assert sum(tokens[: len(kept)]) <= 5_000 < sum(tokens[: len(kept) + 1])
    both = prepare(request(path, max_tokens=10**9, max_documents=10**9), tmp_path / "all", 1)
    assert both.counts["documents"] == 200


def test_what_lies_behind_a_limit_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": " "}\n{"text": "t\xffo"}\n{"text": ""}\n{"text": "thr\xffe"}\n')
    counts = prepare(request(path, max_documents=2), tmp_path / "out", 1).counts
    assert (counts["documents_read"], counts["skipped_empty"], counts["replaced_invalid"]) == (3, 1, 1)


def test_a_limit_that_leaves_too_little_is_named(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    with pytest.raises(UserError, match=r"at least two are needed.*; or raise the limit"):
        prepare(request(path, max_documents=1), tmp_path / "out", 1)


def test_a_trial_has_a_folder_of_its_own(tmp_path: Path, commands: Commands) -> None:
    done = commands.module(MODULE, "--source", "pydocs", "--max-tokens", "50_000")
    assert done.returncode == 0, done.stderr
    manifest = read_manifest(tmp_path / "datasets" / "pydocs-max-50000-tokens")
    assert 40_000 < manifest.counts["tokens"] <= 50_000
    assert json.loads(done.stdout)["tokens"] == manifest.counts["tokens"]


def test_too_small_a_disk_is_said_beforehand(tmp_path: Path, monkeypatch, capfd: pytest.CaptureFixture[str]) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(100))
    monkeypatch.setattr(preparation, "free_bytes", lambda _: 1_000)
    prepare(request(path), tmp_path / "out", 1)  # the estimate for files is a guess
    assert "warning: some 18.9 kB of disk needed, 1.0 kB free at" in capfd.readouterr().err
    monkeypatch.setattr(Source, "estimate_is_sure", True)
    with pytest.raises(StorageError, match=r"kB free at .*; make room, .* or use --max-tokens"):
        prepare(request(path), tmp_path / "other", 1)
    assert not (tmp_path / "other").exists()
