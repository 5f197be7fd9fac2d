"""FineWeb-Edu, whole or a part of it that is drawn from all of it."""

import gzip
import hashlib
import io
import json
import random
import re
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from src.data_processing.shards import read_manifest
from src.data_processing.tokenizer import load_tokenizer
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing import stand_in_hub
from tests.data_processing.documents import MODULE, all_decoded, some_texts

FINEWEB_EDU = ("HuggingFaceFW/fineweb-edu", "sample-10BT")


def test_an_unreachable_hub_is_said_soon(commands: Commands) -> None:
    start = time.monotonic()
    done = commands.module(MODULE, "--source", "fineweb-edu", "--out", "web")
    assert time.monotonic() - start < 30
    assert done.returncode == 2
    assert "of HuggingFaceFW/fineweb-edu from http://127.0.0.1:9 (ConnectError" in done.stderr
    assert "--source files --path" in done.stderr
    assert "--source pydocs" in done.stderr
    assert not (commands.temp_data / "datasets" / "web").exists()


def test_fineweb_edu_from_a_hub(tmp_path: Path, commands: Commands) -> None:
    texts = some_texts(300)
    served = {"README.md": b"a card", "data/CC-MAIN-2013-20/000_00000.parquet": b"not asked for"}
    for index in range(2):
        file = io.BytesIO()
        rows = texts[index * 150 : index * 150 + 150]
        table = pa.table({"text": rows, "id": [str(i) for i in range(150)]})
        pq.write_table(table, file, row_group_size=10)
        served[f"sample/10BT/00{index}_00000.parquet"] = file.getvalue()
    with stand_in_hub.hub(FINEWEB_EDU[0], served) as hub:
        commands.environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
        whole = commands.module(MODULE, "--source", "fineweb-edu")
        part = commands.module(MODULE, "--source", "fineweb-edu", "--max-documents", "40", "--out", "part")
    assert (whole.returncode, part.returncode) == (0, 0), whole.stderr + part.stderr
    manifest = read_manifest(tmp_path / "datasets" / "fineweb-edu-sample-10BT")
    [source] = manifest.sources
    asked = {"name": "fineweb-edu", "repository": FINEWEB_EDU[0], "config": FINEWEB_EDU[1]}
    assert asked.items() <= source.items()
    assert source["revision"] == stand_in_hub.REVISION
    assert source["hub_files"] == [
        {"path": name, "bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        for name, content in served.items()
        if name.startswith("sample/")
    ]
    assert sorted(all_decoded(tmp_path / "datasets" / "fineweb-edu-sample-10BT")) == sorted(texts)
    sample = all_decoded(tmp_path / "datasets" / "part")
    assert len(sample) == 40
    assert set(sample) < set(texts)
    assert set(sample) != set(texts[:40]), "not a sample, but the head of the first file"


def test_real_text_becomes_the_same_shards_from_the_hub_and_from_files(
    shared: Path, tmp_path: Path, commands: Commands
) -> None:
    """The whole way twice, by processes of another number: only where the documents come from may differ."""
    paths = [shared / "text" / f"{name}.jsonl.gz" for name in ("rust_book", "cpp_docs")]
    texts = [[json.loads(line)["text"] for line in gzip.decompress(path.read_bytes()).splitlines()] for path in paths]
    served = {}
    for number, part in enumerate(texts):
        file = io.BytesIO()
        pq.write_table(pa.table({"text": part, "id": [str(i) for i in range(len(part))]}), file, row_group_size=500)
        served[f"sample/10BT/00{number}_00000.parquet"] = file.getvalue()
    options = ["--tokens-per-shard", "1_000_000", "--out"]
    with stand_in_hub.hub(FINEWEB_EDU[0], served) as hub:
        commands.environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
        web = commands.module(MODULE, "--source", "fineweb-edu", "--workers", "2", *options, "web")
    files = commands.module(
        MODULE, "--source", "files", "--path", *map(str, paths), "--workers", "1", *options, "files"
    )
    assert (web.returncode, files.returncode) == (0, 0), web.stderr + files.stderr
    found, expected = (read_manifest(tmp_path / "datasets" / name) for name in ("web", "files"))
    assert len(expected.shards) >= 3
    assert [replace(shard, file="") for shard in found.shards] == [replace(shard, file="") for shard in expected.shards]
    assert (found.counts, found.document_lengths) == (expected.counts, expected.document_lengths)
    encode = load_tokenizer()._encoding.encode_ordinary
    tokens = [sum(1 + len(encode(text)) for text in part if text.strip()) for part in texts]
    assert [source["tokens"] for source in expected.sources] == tokens
    assert [source["tokens"] for source in found.sources] == [sum(tokens)]


OFTEN = (
    "from src.data_processing import data_downloader, progress; from src.utils.errors import exit_with; "
    "progress._EVERY_S = 0.2; exit_with(data_downloader.main)"
)


def test_what_a_slow_hub_leaves_to_wait_for_is_said_from_its_first_bytes_on(tmp_path: Path, commands: Commands) -> None:
    """One file in some 6 s, and next to nothing to tokenise."""
    file = io.BytesIO()
    chooser = random.Random(0)
    table = pa.table({"text": some_texts(100), "id": [chooser.randbytes(12_000) for _ in range(100)]})
    pq.write_table(table, file, compression="none")
    path = "sample/10BT/000_00000.parquet"
    with stand_in_hub.hub(FINEWEB_EDU[0], {path: file.getvalue()}, piece_s=0.08) as hub:
        commands.environment |= {"HF_ENDPOINT": hub.address, "HF_HOME": str(tmp_path / "hf")}
        command = [sys.executable, "-c", OFTEN, "--source", "fineweb-edu", "--out", "web", "--workers", "1"]
        with subprocess.Popen(
            command,
            cwd=ROOT,
            env=commands.environment,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
        ) as process:
            assert process.stderr is not None
            said = [(time.monotonic(), line) for line in process.stderr]
            ended = time.monotonic()
    assert process.returncode == 0, said
    lines = [(ended - moment, line) for moment, line in said if line.startswith("0%")]
    assert len(lines) > 10, said
    for left, line in lines:
        told = re.search(r"about (\d+) s left", line)
        if "1.2 MB of 1.2 MB" in line:  # all is there, and nothing left to wait for but what this machine does
            continue
        if left > 1:
            assert (told is None) == ("downloaded 0 of 1 files, 0 bytes of" in line), line
        if told and 1 < left < 5:  # with the first piece or two the speed is a guess
            assert left / 2 - 1 < int(told[1]) < left * 2 + 1, f"{left} s were left: {line}"
