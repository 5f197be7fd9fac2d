"""Documents become the same shards however they are prepared, interrupted and resumed."""

import errno
import hashlib
import itertools
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from src.data_processing import document_shuffle
from src.data_processing.data_downloader import prepare
from src.data_processing.document_shuffle import (
    JOURNAL,
    START,
    WORK,
    Document,
    Journal,
    SortedDocuments,
    claimed_work,
    encode_all,
    encode_batch,
    plan_shards,
)
from src.data_processing.shards import read_manifest
from src.data_processing.text_sources import Source
from src.data_processing.tokenizer import load_tokenizer
from src.utils.errors import BusyError, StorageError, UserError
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing.documents import (
    MODULE,
    all_decoded,
    contents,
    decoded,
    has_progress,
    request,
    some_texts,
    write_json_lines,
)


class Batches(Source):
    """Batches of given texts, in one unit."""

    def __init__(self, lists: list[list[str]]) -> None:
        super().__init__({"name": "batches"}, ["batches"])
        self.lists, self.taken = lists, 0

    def texts(self, unit: int) -> Iterator[Any]:
        for texts in self.lists:
            self.taken += 1
            yield texts


@pytest.fixture
def lists(monkeypatch: pytest.MonkeyPatch) -> None:
    """The lists of Batches are the batches."""
    monkeypatch.setattr(document_shuffle, "_batched", lambda lists: lists)


def test_a_batch_holds_ids_lengths_and_keys() -> None:
    one, empty, white, cafe = encode_batch(["one two", "", " \n", "caf\udce9"], 7, 2, "b.txt")
    assert empty == white == Document()
    for document, text, name in ((one, "one two", None), (cafe, "caf\ufffd", "b.txt")):
        assert np.frombuffer(document.ids, "<u2").tolist() == [50256, *load_tokenizer().encode(text)]
        key = hashlib.blake2b(text.encode(), digest_size=16, key=b"7").digest()
        assert document == (key, document.ids, len(text.encode()), 2, name, 1 if name else 0)


@pytest.mark.parametrize("workers", [1, 3])
def test_batches_come_in_order_from_any_position(lists: None, workers: int) -> None:
    texts = [some_texts(30, seed=number) for number in range(20)]
    encoded = list(encode_all([Batches([]), Batches(texts)], START._replace(source=1, batch=3), workers, 0, ahead=4))
    assert [position.batch for position, _ in encoded] == list(range(4, 21))
    for (_, batch), expected in zip(encoded, texts[3:], strict=True):
        assert batch == encode_batch(expected, 0, 1, "batches")


def test_memory_does_not_grow_with_the_corpus(lists: None) -> None:
    """Batches are read when needed, not before."""
    source = Batches([["word " * 20_000]] * 100)
    encoded = encode_all([source], START, workers=2, seed=0, ahead=7)
    for number in range(1, 9):
        next(encoded)
        assert number <= source.taken < number + 7
    before = source.taken
    encoded.close()  # type: ignore[attr-defined]
    assert source.taken == before


def greedily(groups: list[int], tokens: list[int], limit: int) -> list[list[int]]:
    """Shards of as many groups in a row as fit."""
    shards: list[list[int]] = []
    for group in groups:
        if not shards or sum(tokens[g] for g in [*shards[-1], group]) > limit:
            shards.append([])
        shards[-1].append(group)
    return shards


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("tokens_per_shard", [1, 300, 1_500, 10**9])
def test_the_plan_is_that_of_a_plain_loop(tokens_per_shard: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    group_tokens = rng.integers(1, 100, 120) * rng.choice([1, 30], 120, p=[0.9, 0.1])
    plans = plan_shards(group_tokens, tokens_per_shard)

    tokens = group_tokens.tolist()
    limit = min(tokens_per_shard, max(sum(tokens) // 20, min(sum(tokens) // 4, 16_384)))
    first = next((n for n, count in enumerate(tokens) if count <= limit), tokens.index(min(tokens)))
    validation = greedily(list(range(first, 120)), tokens, limit)[0]
    rest = [group for group in range(120) if group not in validation]
    expected = [validation, *greedily(rest, tokens, tokens_per_shard)]
    assert [groups.tolist() for groups in plans] == expected


def random_journal(work: Path, documents: int, different: int) -> tuple[Journal, list[tuple[bytes, list[int]]]]:
    """A journal of random documents, some of which have the same key, and the documents in their order."""
    rng = np.random.default_rng(documents)
    keys = [b"\0" * 16, b"\xff" * 16, b"\x80" + b"\0" * 15, *(rng.bytes(16) for _ in range(different - 3))]
    journal = Journal({}, [{"name": "random"}])
    added: list[tuple[bytes, list[int]]] = []
    for _ in range(3):
        chosen = [keys[number] for number in rng.integers(0, different, documents // 3)]
        ids = [rng.integers(0, 50_000, rng.integers(1, 90)).astype(np.uint16) for _ in chosen]
        batch = [Document(key, part.tobytes(), 4 * part.size) for key, part in zip(chosen, ids, strict=True)]
        journal.counts["documents"] += len(batch)
        journal.counts["tokens"] += sum(map(len, ids))
        journal.append(work, batch)
        added += [(key, part.tolist()) for key, part in zip(chosen, ids, strict=True)]
    return journal, added


@pytest.mark.parametrize("drop", [True, False])
def test_documents_come_back_sorted_and_equal_ones_together(tmp_path: Path, drop: bool) -> None:
    journal, added = random_journal(tmp_path, 900, different=300)
    ordered = sorted(added, key=lambda document: document[0])  # stable
    groups = [list(group) for _, group in itertools.groupby(ordered, key=lambda document: document[0])]
    groups = [group[:1] for group in groups] if drop else groups
    documents = SortedDocuments(tmp_path, journal, drop)
    assert documents.group_tokens.tolist() == [sum(len(ids) for _, ids in group) for group in groups]
    assert len(documents.records) == sum(map(len, groups))
    for begin, end in ((0, len(groups)), (3, 4), (17, 250)):
        chosen = np.delete(np.arange(begin, end), 1) if end > 100 else np.arange(begin, end)
        records, tokens = documents.read(chosen)
        expected = [document for group in chosen for document in groups[group]]
        assert [key.ljust(16, b"\0") for key in records["key"].tolist()] == [key for key, _ in expected]
        assert [part.tolist() for part in tokens] == [ids for _, ids in expected]


def test_every_document_is_in_one_shard_whole(tmp_path: Path) -> None:
    texts = some_texts(500)
    manifest = prepare(
        request(write_json_lines(tmp_path / "a.jsonl", texts), tokens_per_shard=7_000), tmp_path / "out", 1
    )
    found = [decoded(tmp_path / "out", shard.file) for shard in manifest.shards]
    assert sorted(all_decoded(tmp_path / "out")) == sorted(texts)
    assert all_decoded(tmp_path / "out") != texts, "not shuffled"
    for shard, documents in zip(manifest.shards, found, strict=True):
        assert shard.tokens == len(np.load(tmp_path / "out" / shard.file)) <= 7_000
        assert (shard.documents, shard.text_bytes) == (len(documents), len("".join(documents).encode()))
    assert manifest.counts["documents"] == 500
    assert manifest.counts["text_bytes"] == sum(len(text.encode()) for text in texts)
    assert manifest.counts["tokens"] == sum(len(load_tokenizer().encode(text)) + 1 for text in texts)


def test_a_shard_that_begins_with_a_long_document_takes_no_more(tmp_path: Path) -> None:
    """For any number of tokens a shard may hold; and validation never takes all."""
    texts = some_texts(30, words=500) + some_texts(3, words=9_000, seed=1)
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    for limit in (1, 700, 20_000):
        manifest = prepare(request(path, tokens_per_shard=limit), tmp_path / str(limit), 1)
        for shard in manifest.shards:
            assert shard.tokens <= limit or shard.documents == 1
    for seed in range(8):
        few = request(write_json_lines(tmp_path / "few.jsonl", texts[-2:]), seed=seed)
        manifest = prepare(few, tmp_path / f"few {seed}", 1)
        assert [shard.documents for shard in manifest.shards] == [1, 1]


def test_equal_documents_are_never_on_both_sides(tmp_path: Path) -> None:
    """Whether they are dropped or not."""
    texts = some_texts(200) * 3 + ["once"]
    path = write_json_lines(tmp_path / "a.jsonl", texts)
    kept = prepare(request(path, tokens_per_shard=3_000), tmp_path / "kept", 1)
    assert sorted(all_decoded(tmp_path / "kept")) == sorted(texts)
    sides = [set(decoded(tmp_path / "kept", shard.file)) for shard in kept.shards]
    assert len(sides) > 5
    assert sum(map(len, sides)) == len(set.union(*sides)) == 201
    dropped = prepare(request(path, drop_duplicates=True), tmp_path / "dropped", 1)
    assert sorted(all_decoded(tmp_path / "dropped")) == sorted(set(texts))
    assert (dropped.counts["dropped_duplicates"], dropped.counts["documents_read"]) == (400, 601)


def test_the_order_of_the_files_does_not_matter(tmp_path: Path) -> None:
    texts = some_texts(100)
    for name, part in (("a", texts), ("b", texts[::-1])):
        write_json_lines(tmp_path / f"{name}.jsonl", part)
        prepare(request(tmp_path / f"{name}.jsonl"), tmp_path / name, 1)
    assert all_decoded(tmp_path / "a") == all_decoded(tmp_path / "b")


def test_what_lies_behind_a_limit_is_not_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "one"}\n{"text": " "}\n{"text": "t\xffo"}\n{"text": ""}\n{"text": "thr\xffe"}\n')
    counts = prepare(request(path, max_documents=2), tmp_path / "out", 1).counts
    assert (counts["documents_read"], counts["skipped_empty"], counts["replaced_invalid"]) == (4, 2, 1)


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


def test_a_limit_that_leaves_too_little_is_named(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", ["one", "one", "two"])
    for changes in ({"max_documents": 2}, {"max_tokens": 1}):
        with pytest.raises(UserError, match=r"at least two are needed.* raise the limit"):
            prepare(request(path, **changes), tmp_path / "out", 1)
        assert not (tmp_path / "out").exists()


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


SMALL_STEPS = (
    "import sys; from src.data_processing import document_shuffle; document_shuffle.FLUSH_TOKENS = 100_000; "
    "from src.data_processing.data_downloader import main; main()"
)


def test_a_killed_preparation_resumes_where_it_was(tmp_path: Path, commands: Commands) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(30, words=20_000))
    arguments = ["--source", "files", "--path", str(path), "--workers", "2", "--out"]
    folder = tmp_path / "datasets" / "killed"
    process = subprocess.Popen(
        [sys.executable, "-c", SMALL_STEPS, *arguments, "killed"],
        cwd=ROOT,
        env=commands.environment,
        stderr=subprocess.PIPE,
    )
    while not has_progress(folder):
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.005)
    with pytest.raises(BusyError, match="another process is preparing"):
        prepare(request(path), folder, 1)
    process.send_signal(signal.SIGKILL)
    _, _ = process.communicate(timeout=10)
    with pytest.raises(UserError, match="did not finish"):
        read_manifest(folder)

    again = commands.module(MODULE, *arguments, "killed")
    fresh = commands.module(MODULE, *arguments, "fresh")
    assert (again.returncode, fresh.returncode) == (0, 0), again.stderr
    assert re.search(r"resuming after [\d,]+ tokens", again.stderr)
    assert contents(folder) == contents(tmp_path / "datasets" / "fresh")


@pytest.mark.parametrize(("kind", "points"), [("same", 45), ("other", 30), ("repair", 45)])
def test_a_kill_at_any_disk_operation_changes_nothing(
    tmp_path: Path, commands: Commands, kind: str, points: int
) -> None:
    texts = some_texts(8) + some_texts(3)
    path = write_json_lines(tmp_path / "a.jsonl", texts[:4])
    (tmp_path / "b.txt").write_text(texts[6])
    write_json_lines(tmp_path / "c.jsonl", texts[4:])
    done = commands.module("tests.data_processing.crash_sweep", str(path.parent / "*.*"), str(tmp_path / "out"), kind)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > points


@pytest.mark.parametrize("change", ["grows", "is rewritten", "is replaced", "is touched"])
def test_a_file_that_changes_while_it_is_prepared_is_named(tmp_path: Path, monkeypatch, change: str) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    real = document_shuffle.encode_batch

    def changing(*arguments: Any) -> list[Document]:
        before = path.stat()
        if change == "grows":
            path.write_text(path.read_text() + '{"text": "more"}\n')
        elif change == "is rewritten":
            path.write_text(path.read_text().replace("Document 7", "Document 8"))
            os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
        elif change == "is replaced":
            os.replace(write_json_lines(tmp_path / "b", some_texts(50, seed=1)), path)
        else:
            path.touch()
        return real(*arguments)

    monkeypatch.setattr(document_shuffle, "encode_batch", changing)
    if change == "is touched":  # as by a backup
        prepare(request(path), tmp_path / "out", 1)
        return
    with pytest.raises(UserError, match=f"{path}: it changed while it was being prepared"):
        prepare(request(path), tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@contextmanager
def preparing(folder: Path, commands: Commands) -> Iterator[tuple[subprocess.Popen[str], list[int]]]:
    """Prepare a corpus of 200 MB with two workers; yield the process and its workers once they are at it."""
    path = write_json_lines(folder / "a.jsonl", some_texts(20, words=20_000) * 100)
    command = [sys.executable, "-m", MODULE, "--source", "files", "--path", str(path), "--out", "x", "--workers", "2"]
    with subprocess.Popen(
        command, cwd=ROOT, env=commands.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        while not (folder / "datasets" / "x" / WORK / JOURNAL).exists() or len(children(process.pid)) < 3:
            assert process.poll() is None, "ended before it could be stopped"
            time.sleep(0.05)
        # The first child is multiprocessing's resource tracker, which ends with the others.
        yield process, children(process.pid)


def test_ctrl_c_ends_soon_and_leaves_nothing_behind(tmp_path: Path, commands: Commands) -> None:
    with preparing(tmp_path, commands) as (process, _):
        os.killpg(process.pid, signal.SIGINT)
        said = process.communicate(timeout=30)[1]  # ends once no worker holds stderr
    assert process.returncode == 130
    assert said.splitlines()[-1] == "interrupted", said
    assert "Traceback" not in said
    assert not (tmp_path / "datasets" / "x").exists()


def test_workers_end_with_a_killed_parent(tmp_path: Path, commands: Commands) -> None:
    with preparing(tmp_path, commands) as (process, _):
        process.kill()
        process.communicate(timeout=10)  # ends once no worker holds stderr
    assert process.returncode == -signal.SIGKILL


def test_a_killed_worker_is_named(tmp_path: Path, commands: Commands) -> None:
    with preparing(tmp_path, commands) as (process, workers):
        os.kill(workers[-1], signal.SIGKILL)
        said = process.communicate(timeout=30)[1]
    assert process.returncode == 2
    assert "one of 2 worker processes was killed" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_full_disk_is_a_storage_error_and_the_work_is_resumed_later(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for part in range(5):
        write_json_lines(tmp_path / f"{part}.jsonl", some_texts(60, seed=part))
    path = tmp_path / "*.jsonl"
    monkeypatch.setattr(document_shuffle, "FLUSH_TOKENS", 4_000)
    real, left = os.fsync, 10

    def full(descriptor: int) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(StorageError, match=r"Cannot write .*(tokens|records): No space left on device"):
        prepare(request(path), tmp_path / "out", 1)
    monkeypatch.undo()
    prepare(request(path), tmp_path / "out", 1)
    prepare(request(path), tmp_path / "fresh", 1)
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("damaged", ["tokens", "records", JOURNAL])
def test_damaged_unfinished_work_is_prepared_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], damaged: str
) -> None:
    for part in range(8):
        write_json_lines(tmp_path / f"{part}.jsonl", some_texts(30, seed=part))
    path = tmp_path / "*.jsonl"
    prepare(request(path), tmp_path / "fresh", 1)
    monkeypatch.setattr(os, "fsync", lambda _: None)
    monkeypatch.setattr(document_shuffle, "FLUSH_TOKENS", 1)
    monkeypatch.setattr(document_shuffle, "plan_shards", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        prepare(request(path), tmp_path / "out", 1)
    monkeypatch.undo()
    victim = tmp_path / "out" / WORK / damaged
    victim.write_bytes(victim.read_bytes()[:-1])
    prepare(request(path), tmp_path / "out", 1)
    assert "starting over" in capfd.readouterr().err
    assert contents(tmp_path / "out") == contents(tmp_path / "fresh")


@pytest.mark.parametrize("content", ["5", "{}", '{"version": 3, "request": []}'])
def test_a_journal_of_other_json_is_not_resumed(tmp_path: Path, content: str) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    (tmp_path / "out" / WORK).mkdir(parents=True)
    (tmp_path / "out" / WORK / JOURNAL).write_text(content)
    assert prepare(request(path), tmp_path / "out", 1).counts["documents"] == 10


def test_a_failure_leaves_nothing_behind(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    path.write_text(path.read_text() + "{")
    with pytest.raises(UserError, match="line 11: not JSON"):
        prepare(request(path), tmp_path / "out", 1)
    assert not (tmp_path / "out").exists()


def test_one_holder_at_a_time(tmp_path: Path) -> None:
    with claimed_work(tmp_path / "out"), pytest.raises(BusyError, match="is preparing"), claimed_work(tmp_path / "out"):
        pass
    assert os.listdir(tmp_path / "out") == [], "nothing is left of the work when it ends well"


def test_shards_of_unknown_origin_are_not_touched(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(10))
    stray = tmp_path / "out" / "edu_i_000000_t_5.npy"
    stray.parent.mkdir()
    np.save(stray, np.arange(5, dtype=np.uint16))
    with pytest.raises(UserError, match=r"holds 1 shards without a manifest, such as edu_i_000000_t_5.npy"):
        prepare(request(path), tmp_path / "out", 1)
    assert set(os.listdir(tmp_path / "out")) == {stray.name, WORK}


@pytest.mark.parametrize(
    ("documents", "tokens_per_shard", "validation"),
    [(100, 10**8, 25), (10_000, 10**8, 500), (10_000, 5_000, 78)],
)
def test_validation_is_a_modest_share(documents: int, tokens_per_shard: int, validation: int) -> None:
    """A twentieth; of a small corpus up to a quarter; never more than a shard. Documents have 64 tokens."""
    first, *_ = plan_shards(np.full(documents, 64), tokens_per_shard)
    assert len(first) == validation


def test_seeds_decide_the_order(tmp_path: Path) -> None:
    path = write_json_lines(tmp_path / "a.jsonl", some_texts(50))
    orders = [
        decoded(tmp_path / out, prepare(request(path, seed=seed), tmp_path / out, 1).shards[1].file)
        for out, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    assert orders[0] == orders[1] != orders[2]


def test_a_long_document_is_not_validation_where_a_short_one_will_do(tmp_path: Path) -> None:
    """Whatever the order in which the seed shuffles them."""
    for seed in range(4):
        folder = tmp_path / f"texts {seed}"
        folder.mkdir()
        (folder / "long.txt").write_text("word " * 20_000)
        (folder / "short.txt").write_text("other " * 500)
        manifest = prepare(request(folder, seed=seed), tmp_path / f"out {seed}", 1)
        assert manifest.validation[0].tokens < 1_000
        assert manifest.train[0].tokens > 19_000


def test_document_lengths_by_powers_of_two(tmp_path: Path) -> None:
    tokens = [2, 2, 3, 4, 7, 8, 63, 64, 1_000]
    texts = [f"{index} " + " a" * (count - 3) for index, count in enumerate(tokens)]
    counts = [1 + len(load_tokenizer().encode(text.rstrip())) for text in texts]
    path = write_json_lines(tmp_path / "a.jsonl", [text.rstrip() for text in texts])
    manifest = prepare(request(path), tmp_path / "out", 1)
    expected = [sum(2**k <= count < 2 ** (k + 1) for count in counts) for k in range(max(counts).bit_length())]
    assert manifest.document_lengths == expected
