"""Row groups come in one shuffled order, at the cost of their own bytes, whatever the hub does."""

import io
import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from src.utils.rand_idx_seq_gen import permutation
from tests.conftest import Commands
from tests.data_processing import hub_client
from tests.data_processing.stand_in_hub import Fault, Hub, hub

CLIENT = hub_client.__name__
FOOTER_READ_BYTES = 64 << 10  # what is read of a file's end at first
GROUPS = (5, 1, 4)  # in each file


def parquet(number: int, groups: int) -> bytes:
    """Row groups of 20 texts of some 2,000 characters, and a column as large that nobody asks for."""
    chooser = random.Random(number)
    file = io.BytesIO()
    with pq.ParquetWriter(file, pa.schema({"id": pa.string(), "text": pa.string(), "score": pa.float64()})) as writer:
        for group in range(groups):
            texts = [f"{number} {group} {i} {chooser.randbytes(1_000).hex()}" for i in range(20)]
            ids = [chooser.randbytes(1_000).hex() for _ in texts]
            writer.write_table(pa.table({"id": ids, "text": texts, "score": [0.5] * 20}))
    return file.getvalue()


FILES = {f"{hub_client.FOLDER}/{i:03}_00000.parquet": parquet(i, groups) for i, groups in enumerate(GROUPS)}
FOOTERS = [pq.read_metadata(io.BytesIO(content)) for content in FILES.values()]
FIRST = next(iter(FILES.values()))
FOOTER = FIRST[-8 - int.from_bytes(FIRST[-8:-4], "little") :]
WHERE = [(number, group) for number, groups in enumerate(GROUPS) for group in range(groups)]


@pytest.fixture
def rows(tmp_path: Path, commands: Commands) -> Callable[..., tuple[list[tuple[int, int]], str]]:
    """File and row group of what comes, in order, and what was said on stderr."""

    def fetch(served: Hub, seed: int, first: int = 0) -> tuple[list[tuple[int, int]], str]:
        commands.environment |= {"HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path / "hf")}
        done = commands.module(CLIENT, "rows", "text", str(seed), str(first))
        assert done.returncode == 0, done.stderr
        came = []
        for line in done.stdout.splitlines():
            texts = json.loads(line)["texts"]
            number, group = map(int, texts[0].split()[:2])
            content = io.BytesIO(list(FILES.values())[number])
            assert texts == pq.ParquetFile(content).read_row_group(group)["text"].to_pylist()
            came.append((number, group))
        return came, done.stderr

    return fetch


def test_one_order_of_all_row_groups(rows: Callable[..., tuple[list[tuple[int, int]], str]]) -> None:
    with hub(hub_client.REPOSITORY, FILES) as served:
        came, said = rows(served, seed=3)
        later, _ = rows(served, seed=3, first=6)
        other, _ = rows(served, seed=4)
    assert came == [WHERE[i] for i in permutation(len(WHERE), 3)]
    assert later == came[6:]
    assert sorted(other) == sorted(came) == WHERE
    assert other != came
    assert said == ""


def test_only_the_bytes_of_the_column_are_fetched(rows: Callable[..., tuple[list[tuple[int, int]], str]]) -> None:
    with hub(hub_client.REPOSITORY, FILES) as served:
        came, _ = rows(served, seed=3, first=7)
    sizes = [FOOTERS[number].row_group(group).column(1).total_compressed_size for number, group in came]
    ends = [min(len(content), FOOTER_READ_BYTES) for content in FILES.values()]
    assert served.bytes_sent() == sum(sizes) + sum(ends)
    assert sum(r.path.startswith("/storage/") for r in served.requests) == 3 + len(FILES)
    assert np.sum(sizes) < sum(map(len, FILES.values())) / 5


@pytest.mark.parametrize(
    "fault",
    [
        pytest.param(Fault(3, status=500), id="500"),
        pytest.param(Fault(3, cut_after=1_000), id="short body"),
        pytest.param(Fault(3, wrong=True), id="wrong content"),
        pytest.param(Fault(3, whole=True), id="no ranges"),
    ],
)
def test_faults_that_pass(rows: Callable[..., tuple[list[tuple[int, int]], str]], fault: Fault) -> None:
    with hub(hub_client.REPOSITORY, FILES, {next(iter(FILES)): fault}) as served:
        came, said = rows(served, seed=3)
    assert came == [WHERE[i] for i in permutation(len(WHERE), 3)]
    assert said.count("attempt ") == (0 if fault.whole else 3)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            b"",
            "the footer of sample/10BT/0.parquet of org/data at f+ would be bytes 0 to 0 of 0, so what the hub sent",
        ),
        (
            FOOTER,  # alone, while it tells of row groups before it
            r"row group [0-4] of sample/10BT/0.parquet of org/data at f+ would be bytes \d+ to \d+ of \d+, so what",
        ),
    ],
    ids=["an empty file", "a footer of another file"],
)
def test_a_file_that_cannot_be_sound(tmp_path: Path, commands: Commands, content: bytes, message: str) -> None:
    with hub(hub_client.REPOSITORY, {"sample/10BT/0.parquet": content}) as served:
        commands.environment |= {"HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path / "hf")}
        done = commands.module(CLIENT, "rows", "text", "0", "0")
    assert done.returncode == 2
    assert re.search(message, done.stderr)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("column", "times", "message"),
    [
        ("body", 0, "000_00000.parquet: no field 'body'; fields found: id, text, score"),
        ("score", 0, "000_00000.parquet: column 'score' must hold text, found type double"),
        ("text", 99, "cannot get the footer of sample/10BT/000_00000.parquet of org/data from"),
    ],
)
def test_what_cannot_be_had(tmp_path: Path, commands: Commands, column: str, times: int, message: str) -> None:
    with hub(hub_client.REPOSITORY, FILES, {next(iter(FILES)): Fault(times, wrong=True)}) as served:
        commands.environment |= {"HF_ENDPOINT": served.address, "HF_HOME": str(tmp_path / "hf")}
        done = commands.module(CLIENT, "rows", column, "0", "0")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
