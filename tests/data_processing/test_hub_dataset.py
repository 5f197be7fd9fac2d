"""A dataset of the hub arrives whole, each byte once, whatever the hub, the network or the disk does."""

import hashlib
import io
import random
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from src.data_processing import hub_dataset
from src.data_processing.hub_dataset import choose_files
from src.data_processing.text_sources import SOURCES, Request, Source
from src.utils.errors import StorageError, UserError
from src.utils.rand_idx_seq_gen import permutation
from tests.data_processing.stand_in_hub import REVISION, Fault, Hub, hub, serving

REPOSITORY = "org/data"
GROUPS = (5, 1, 4)  # row groups of each file
WHERE = [(number, group) for number, groups in enumerate(GROUPS) for group in range(groups)]


def parquet(number: int, groups: int, n_bytes: int = 1_000) -> bytes:
    """Row groups of 20 texts of about 2 * n_bytes characters, and an equally large column that nobody reads."""
    chooser = random.Random(number)
    file = io.BytesIO()
    with pq.ParquetWriter(file, pa.schema({"id": pa.string(), "text": pa.string(), "score": pa.float64()})) as writer:
        for group in range(groups):
            texts = [f"{number} {group} {i} {chooser.randbytes(n_bytes).hex()}" for i in range(20)]
            ids = [chooser.randbytes(n_bytes).hex() for _ in texts]
            writer.write_table(pa.table({"id": ids, "text": texts, "score": [0.5] * 20}))
    return file.getvalue()


FILES = {f"data/train-{i:05}-of-00003.parquet": parquet(i, groups) for i, groups in enumerate(GROUPS)}
FIRST, SECOND, THIRD = FILES
SIZES = {path: len(content) for path, content in FILES.items()}


@pytest.fixture
def reach(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    """Point the client at an address, with short waits and an empty cache."""

    def set_up(address: str) -> None:
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 1)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
        monkeypatch.setattr(hub_dataset, "BASE_DELAY_S", 0.01)
        monkeypatch.delenv("HF_TOKEN", raising=False)

    return set_up


def request(**fields: Any) -> Request:
    values = {"sources": ["hub"], "paths": [], "text_field": "text", "tokens_per_shard": 1_000, "seed": 3}
    return Request(**{**values, "dataset": REPOSITORY, **fields})


def opened(downloads: Path, pinned: Any = (), **fields: Any) -> Source:
    [source] = hub_dataset.open_hub("hub", request(**fields), pinned, downloads)
    return source


def read(source: Source, first: int = 0) -> list[str]:
    """All texts from unit `first` on."""
    return [text for unit in range(first, len(source.units)) for text in source.texts(unit)]


def expected(files: dict[str, bytes]) -> list[str]:
    return [text for content in files.values() for text in pq.read_table(io.BytesIO(content))["text"].to_pylist()]


def local(tmp_path: Path, path: str) -> Path:
    return tmp_path / REVISION / path.replace("/", "--")


def test_every_byte_once_and_few_files_at_a_time(tmp_path: Path, reach: Callable[[str], None]) -> None:
    files = {f"data/train-{i:05}-of-00006.parquet": parquet(i, 1) for i in range(6)}
    with hub(REPOSITORY, files) as served:
        reach(served.address)
        source = opened(tmp_path)
        for unit, content in enumerate(files.values()):
            texts = list(source.texts(unit))
            assert texts == expected({"": content})
            assert len([*(tmp_path / REVISION).glob("*.parquet")]) <= 2
    assert [served.bytes_sent(path) for path in files] == list(map(len, files.values()))
    assert source.details == {
        "name": "hub",
        "config": None,
        "split": "train",
        "repository": REPOSITORY,
        "revision": REVISION,
        "hub_files": [
            {"path": path, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
            for path, content in files.items()
        ],
    }


def test_fineweb_edu_is_a_name_for_one_of_them(tmp_path: Path, reach: Callable[[str], None]) -> None:
    files = {"README.md": b"", "data/CC/000_00000.parquet": b"no", "sample/10BT/000_00000.parquet": FILES[FIRST]}
    with hub("HuggingFaceFW/fineweb-edu", files) as served:
        reach(served.address)
        [source] = SOURCES["fineweb-edu"].open(request(dataset=None), [], tmp_path)
        assert read(source) == expected({FIRST: FILES[FIRST]})
    assert list(source.details) == ["name", "config", "repository", "revision", "hub_files"]
    assert (source.details["name"], source.details["config"]) == ("fineweb-edu", "sample-10BT")


def test_faults_that_pass(tmp_path: Path, reach: Callable[[str], None], capfd: pytest.CaptureFixture[str]) -> None:
    faults = [
        (Fault(4, status=500), "Attempt 5 of 5 for {path} in 0 s: HTTP 500 Internal Server Error", 1),
        (Fault(1, status=429, headers={"RateLimit": '"resolvers";r=0;t=1'}), "for {path} in 1 s: HTTP 429", 1),
        (Fault(1, status=403), "for {path} in 0 s: HTTP 403", 1),  # the storage refuses, not the hub
        (Fault(1, stall_after=10_000), "Attempt 2 of 5 for {path} in 0 s: ReadTimeout", 1),
        (Fault(4, cut_after=10_000), "Attempt 5 of 5 for {path} in 0 s: RemoteProtocolError: peer closed", 1),
        (Fault(1, wrong=True), "for {path} in 0 s: OSError: the content differs from the", 2),
        (Fault(1, whole=True), "", 1),
    ]
    content = parquet(0, 5)
    files = {f"data/train-{i:05}-of-00007.parquet": content for i in range(len(faults))}
    with hub(REPOSITORY, files, {path: fault for path, (fault, *_) in zip(files, faults, strict=True)}) as served:
        reach(served.address)
        assert read(opened(tmp_path)) == expected(files)
    stderr = capfd.readouterr().err
    for path, (_, message, times) in zip(files, faults, strict=True):
        assert message.replace("{path}", path) in stderr
        assert sum(r.body_bytes for r in served.stored(path) if r.body_bytes > 1_000) == times * len(content)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (Fault(99, status=503), "HTTP 503 Service Unavailable.*rerun"),
        (Fault(99, wrong=True), "OSError: the content differs"),
    ],
    ids=["503", "wrong content"],
)
def test_faults_that_last(tmp_path: Path, reach: Callable[[str], None], fault: Fault, reason: str) -> None:
    with hub(REPOSITORY, FILES, {SECOND: fault}) as served:
        reach(served.address)
        with pytest.raises(UserError, match=f"Cannot get {SECOND} of org/data from .*: {reason}"):
            read(opened(tmp_path))
    assert len(served.stored(SECOND)) == 5
    assert not local(tmp_path, SECOND).exists()


def test_a_partial_file_is_resumed(tmp_path: Path, reach: Callable[[str], None]) -> None:
    partial = local(tmp_path, FIRST + ".partial")
    partial.parent.mkdir(parents=True)
    partial.write_bytes(FILES[FIRST][:70_000])
    with hub(REPOSITORY, FILES) as served:
        reach(served.address)
        assert read(opened(tmp_path)) == expected(FILES)
    assert [r.range for r in served.stored(FIRST)] == [f"bytes=70000-{SIZES[FIRST] - 1}"]


def test_a_later_start_needs_no_network_and_skips_what_was_read(tmp_path: Path, reach: Callable[[str], None]) -> None:
    with hub(REPOSITORY, FILES) as served:
        reach(served.address)
        source = opened(tmp_path)
        read(source)
    reach("http://127.0.0.1:9")
    again = opened(tmp_path, [{**source.details, "documents": 5}])
    assert again.details == source.details
    assert read(again, first=1) == expected({path: FILES[path] for path in (SECOND, THIRD)})


def test_a_file_that_cannot_get_its_name(tmp_path: Path, reach: Callable[[str], None]) -> None:
    (local(tmp_path, FIRST) / "in the way").mkdir(parents=True)
    with hub(REPOSITORY, FILES) as served:
        reach(served.address)
        with pytest.raises(StorageError, match=r"\.partial: Is a directory"):
            read(opened(tmp_path))


# A random part


def row_groups(source: Source, first: int = 0) -> list[tuple[int, int]]:
    """File and row group of each unit."""
    places = []
    for unit in range(first, len(source.units)):
        texts = list(source.texts(unit))
        number, group = map(int, texts[0].split()[:2])
        content = io.BytesIO(list(FILES.values())[number])
        assert texts == pq.ParquetFile(content).read_row_group(group)["text"].to_pylist()
        places.append((number, group))
    return places


def settled(served: Hub) -> int:
    """The bytes sent, once the server's threads have counted all: they do so after the client has its answer."""
    before, sent = -1, served.bytes_sent()
    while before != sent:
        time.sleep(0.2)
        before, sent = sent, served.bytes_sent()
    return sent


def test_a_part_is_the_row_groups_in_one_order(tmp_path: Path, reach: Callable[[str], None]) -> None:
    """In the order that datasets of today's users have: permutation(all row groups, seed)."""
    with hub(REPOSITORY, FILES) as served:
        reach(served.address)
        source = opened(tmp_path, max_tokens=10**9)
        assert source.details["order"] == "row groups"
        assert row_groups(source) == [WHERE[i] for i in permutation(len(WHERE), 3)]
        other = row_groups(opened(tmp_path, max_documents=10**9, seed=4))
        before = settled(served)
        last = row_groups(source, first=7)
        sent = settled(served) - before
    assert last == [WHERE[i] for i in permutation(len(WHERE), 3)][7:]
    assert sorted(other) == WHERE
    assert other != [WHERE[i] for i in permutation(len(WHERE), 3)]
    footers = [pq.read_metadata(io.BytesIO(content)) for content in FILES.values()]
    sizes = [footers[number].row_group(group).column(1).total_compressed_size for number, group in last]
    assert sent == sum(sizes)
    assert not tmp_path.joinpath(REVISION).exists()


@pytest.mark.parametrize(
    "fault",
    [Fault(3, cut_after=1_000), Fault(3, wrong=True), Fault(3, whole=True)],
    ids=["short body", "wrong content", "no ranges"],
)
def test_faults_of_a_part_that_pass(
    tmp_path: Path, reach: Callable[[str], None], fault: Fault, capfd: pytest.CaptureFixture[str]
) -> None:
    with hub(REPOSITORY, FILES, {FIRST: fault}) as served:
        reach(served.address)
        assert sorted(row_groups(opened(tmp_path, max_tokens=10**9))) == WHERE
    assert capfd.readouterr().err.count("Attempt ") == (0 if fault.whole else 3)


FOOTER = FILES[FIRST][-8 - int.from_bytes(FILES[FIRST][-8:-4], "little") :]


@pytest.mark.parametrize(
    ("files", "fields", "message"),
    [
        (FILES, {"text_field": "body"}, "parquet: expected one field 'body', found id, text, score"),
        (FILES, {"text_field": "score"}, "column 'score' must hold text, found type double"),
        ({FIRST: b""}, {}, f"Cannot get the footer of {FIRST} .*: ArrowInvalid"),
        ({FIRST: FOOTER}, {}, f"Cannot get row group . of {FIRST} "),
        ({FIRST: FOOTER[:-8] + b"\xff\xff\xff\x7fPAR1"}, {}, "Cannot get the footer"),
    ],
    ids=["no column", "not text", "an empty file", "a footer without its file", "a footer of 2 GB"],
)
def test_a_part_that_cannot_be_read(
    tmp_path: Path, reach: Callable[[str], None], files: dict[str, bytes], fields: Any, message: str
) -> None:
    with hub(REPOSITORY, files) as served:
        reach(served.address)
        with pytest.raises(UserError, match=message):
            list(opened(tmp_path, max_tokens=1_000, **fields).texts(0))


# The list of files


def refusal(tmp_path: Path, **fields: Any) -> str:
    with pytest.raises(UserError) as refused:
        opened(tmp_path, **fields)
    return str(refused.value)


def test_a_gated_dataset(tmp_path: Path, reach: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    with hub(REPOSITORY, FILES, token="hf_right") as served:
        reach(served.address)
        monkeypatch.setenv("HF_TOKEN", "hf_wrong")
        message = refusal(tmp_path)
        assert "HTTP 401 Unauthorized: Access to this dataset is restricted. Check " in message
        assert "accept its conditions" in message
        assert len(served.requests) == 1, "no retry"
        monkeypatch.setenv("HF_TOKEN", "hf_right")
        assert read(opened(tmp_path)) == expected(FILES)
    stored = [request for request in served.requests if request.path.startswith("/storage/")]
    assert len(stored) == 3
    assert not any(request.with_token for request in stored), "the token left the hub"


def test_a_hub_that_is_out_of_reach(
    tmp_path: Path, reach: Callable[[str], None], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    reach("http://127.0.0.1:9")
    assert "Cannot get the list of files of org/data from http://127.0.0.1:9: ConnectError" in refusal(tmp_path)
    assert capfd.readouterr().err.count("Attempt ") == 2
    monkeypatch.setattr(constants, "ENDPOINT", "hub.local")
    assert "UnsupportedProtocol" in refusal(tmp_path)
    reach("http://127.0.0.1:9")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE" in refusal(tmp_path)
    assert capfd.readouterr().err == "", "no retry"


def test_a_dataset_that_does_not_exist(tmp_path: Path, reach: Callable[[str], None]) -> None:
    with hub(REPOSITORY, {"notes.txt": b"", "a.jsonl": b""}) as served:
        reach(served.address)
        assert f"Check {served.address}/datasets/org/other" in refusal(tmp_path, dataset="org/other")
        assert "no parquet file belongs to split 'train'" in refusal(tmp_path)
        assert "it holds a.jsonl, notes.txt" in refusal(tmp_path)
        assert "Cannot use the list of files of ../../etc" in refusal(tmp_path, dataset="../../etc")


SIBLING = {"rfilename": FIRST, "size": 5, "lfs": {"sha256": "a" * 64}}


@pytest.mark.parametrize(
    "info",
    [
        [],
        {},
        {"sha": "../../etc", "siblings": [SIBLING]},
        {"sha": 5, "siblings": [SIBLING]},
        {"sha": REVISION, "siblings": 7},
        {"sha": REVISION, "siblings": [SIBLING], "cardData": [1]},
        {"sha": REVISION, "siblings": [SIBLING], "cardData": {"configs": [{"data_files": 5}]}},
        {"sha": REVISION, "siblings": [SIBLING | {"rfilename": "../x.parquet"}],
         "cardData": {"configs": [{"config_name": "a", "data_files": "../*"}]}},
        {"sha": REVISION, "siblings": [SIBLING], "cardData": {"configs": [{"config_name": "a", "data_files": 5}]}},
        *({"sha": REVISION, "siblings": [SIBLING | lie]} for lie in (
            {"size": -1}, {"size": 2**60}, {"size": "5"}, {"size": True}, {"lfs": {"sha256": "x"}}, {"lfs": 5},
            {"rfilename": "train-\n.parquet"}, {"rfilename": "train-\ud800.parquet"},
            {"rfilename": "train-" + "x" * 300 + ".parquet"},
        )),
    ],
    ids=str,
)  # fmt: skip
def test_lies_of_a_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, info: Any) -> None:
    monkeypatch.setattr(hub_dataset, "BASE_DELAY_S", 0.0)
    monkeypatch.setattr(hub_dataset, "_fetch_info", lambda repository: info)
    assert "Cannot use the list of files of org/data" in refusal(tmp_path)


def test_a_list_without_an_end(tmp_path: Path, reach: Callable[[str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(200)
            self.end_headers()
            try:
                while True:
                    self.wfile.write(b" " * 65_536)
            except ConnectionError:
                pass

        def log_message(self, *args: Any) -> None:
            pass

    monkeypatch.setattr(hub_dataset, "_LISTING_BYTES", 1_000_000)
    with serving(Endless) as address:
        reach(address)
        assert "OSError: the list has no end after" in refusal(tmp_path)


# Config and split


def card(*configs: dict[str, Any]) -> dict[str, Any]:
    return {"configs": list(configs)}


PLAIN = {"config_name": "default", "data_files": [{"split": "train", "path": "data/train-*"}]}
NESTED = ["en/train/0.parquet", "en/dev/0.parquet", "de/train/0.parquet", "de/test.parquet"]
SHARDS = ["data/test-00000-of-00001.parquet", "data/extra_2-00000-of-00001.parquet", FIRST, SECOND, "train.txt"]


@pytest.mark.parametrize(
    ("paths", "card", "config", "split", "chosen"),
    [
        (["train.parquet", "train-1.parquet", "training.parquet"], {}, None, "train",
         ["train-1.parquet", "train.parquet"]),
        (SHARDS, {}, None, "train", [FIRST, SECOND]),
        (SHARDS, {}, None, "extra_2", ["data/extra_2-00000-of-00001.parquet"]),
        (NESTED, {}, "en", "train", ["en/train/0.parquet"]),
        (NESTED, {}, "de/", "test", ["de/test.parquet"]),
        (SHARDS, card(PLAIN), None, "train", [FIRST, SECOND]),
        (SHARDS, card(PLAIN), "default", "train", [FIRST, SECOND]),
        (NESTED, card({"config_name": "de", "data_files": "de/**"}), None, "train", NESTED[2:][::-1]),
        (NESTED, card({"config_name": "de", "data_dir": "de"}, PLAIN), "de", "train", ["de/train/0.parquet"]),
        (NESTED, card({"config_name": "a", "data_files": ["*/dev/*", "*.*"]}), "a", "train", ["en/dev/0.parquet"]),
        (NESTED, card({"config_name": "a", "data_dir": "en", "data_files": "*/0.*"}), "a", "train", NESTED[:2][::-1]),
        (NESTED, card({"config_name": "a"}, {"config_name": "b", "default": True, "data_dir": "de"}), None, "test",
         ["de/test.parquet"]),
        (NESTED, card({"config_name": "a", "data_files": [{"split": "x", "path": ["en/**/*.parquet", "en/dev/*"]}]}),
         "a", "x", NESTED[:2][::-1]),
    ],
)  # fmt: skip
def test_files_of_a_config_and_a_split(
    paths: list[str], card: dict[str, Any], config: str | None, split: str, chosen: list[str]
) -> None:
    assert choose_files(REPOSITORY, paths, card, config, split) == chosen


@pytest.mark.parametrize(
    ("paths", "card", "config", "split", "message"),
    [
        (NESTED, {}, None, "train", "no parquet file .* split 'train' .* it holds de/test.parquet, .* Give --config"),
        (NESTED, {}, "fr", "train", "config 'fr'"),
        (NESTED, card({"config_name": "a"}, {"config_name": "b"}), None, "train", "Give --config, one of: a, b"),
        (SHARDS, card(PLAIN), "c", "train", "Give --config, one of: default"),
        (SHARDS, card(PLAIN), None, "test", "split 'test' of config 'default'"),
        ([f"{i}/x.parquet" for i in range(99)], {}, None, "train", "and 69 more"),
        (SHARDS, card({"config_name": "a", "data_files": "hf://other/*"}), None, "train", "split 'train'"),
    ],
)
def test_an_unclear_choice_lists_what_exists(
    paths: list[str], card: dict[str, Any], config: str | None, split: str, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        choose_files(REPOSITORY, paths, card, config, split)


def test_a_pattern_takes_bounded_time() -> None:
    paths = ["/".join(["a"] * 60) + ".parquet"]
    entry = {"config_name": "a", "data_files": "/".join(["**", "a"] * 25 + ["b"]) + "*a" * 50}
    start = time.monotonic()
    with pytest.raises(UserError, match="no parquet file"):
        choose_files(REPOSITORY, paths, card(entry), None, "train")
    assert time.monotonic() - start < 2
