"""Drill 25: whatever the hub does during a download, the dataset comes out right or the next start finishes it.

Runs the real command against a stand-in hub on loopback, with parquet files like the real ones.
"""

import io
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from huggingface_hub import constants

from src.data_processing.data_downloader import prepare
from src.data_processing.shards import read_manifest
from src.utils.root import ROOT
from tests.conftest import Commands
from tests.data_processing.documents import all_decoded, has_progress, request, some_texts
from tests.data_processing.stand_in_hub import Fault, Hub, hub

REPOSITORY = "HuggingFaceFW/fineweb-edu"
TEXTS = some_texts(1_200, words=150)
# Waits of some hundredths of a second instead of seconds, and progress recorded every 20,000 tokens instead of 64M.
COMMAND = (
    "from src.data_processing import data_downloader, hub_dataset, document_shuffle; "
    "from src.utils.errors import exit_with; "
    "hub_dataset.BASE_DELAY_S = 0.05; document_shuffle.FLUSH_TOKENS = 20_000; exit_with(data_downloader.main)"
)


def parquet(texts: list[str]) -> bytes:
    file = io.BytesIO()
    pq.write_table(pa.table({"text": texts, "id": list(map(str, range(len(texts))))}), file, row_group_size=40)
    return file.getvalue()


FILES = {f"sample/10BT/{i:03}_00000.parquet": parquet(TEXTS[i * 200 : i * 200 + 200]) for i in range(6)}
FIRST, SECOND, THIRD, FOURTH, *_ = FILES
TOTAL = sum(map(len, FILES.values()))


def reach(commands: Commands, served: Hub) -> None:
    home = str(commands.temp_data / "hf")
    commands.environment |= {"HF_ENDPOINT": served.address, "HF_HOME": home, "HF_HUB_DOWNLOAD_TIMEOUT": "1"}


def arguments(*options: str) -> list[str]:
    return [sys.executable, "-c", COMMAND, "--source", "fineweb-edu", "--out", "web", *options]


def kill(commands: Commands, command: list[str], is_due: Callable[[], bool]) -> None:
    process = subprocess.Popen(
        command, cwd=ROOT, env=commands.environment, stderr=subprocess.DEVNULL, stdout=subprocess.DEVNULL
    )
    while not is_due():
        assert process.poll() is None, "finished before it could be killed"
        time.sleep(0.002)
    process.kill()
    process.wait()
    with pytest.raises(ValueError, match="preparation did not finish"):
        read_manifest(commands.temp_data / "datasets" / "web")


def shards(folder: Path) -> dict[str, str]:
    return {shard.file.split("_i_")[1]: shard.sha256 for shard in read_manifest(folder).shards}


@pytest.fixture
def expected(tmp_path: Path) -> dict[str, str]:
    """The shards of the same files without a hub."""
    files = tmp_path / "files"
    files.mkdir()
    for path, content in FILES.items():
        (files / Path(path).name).write_bytes(content)
    prepare(request(files), tmp_path / "from files", 1)
    return shards(tmp_path / "from files")


def test_faults_that_pass_and_a_repair(tmp_path: Path, commands: Commands, expected: dict[str, str]) -> None:
    faults = {
        FIRST: Fault(2, status=500),
        SECOND: Fault(1, stall_after=10_000),
        THIRD: Fault(2, cut_after=15_000),
        FOURTH: Fault(1, wrong=True),
    }
    folder = tmp_path / "datasets" / "web"
    with hub(REPOSITORY, FILES, faults) as served:
        reach(commands, served)
        done = commands.run(arguments())
        assert done.returncode == 0, done.stderr
        for path in faults:
            assert f"Attempt 2 of 5 for {path} in 0 s" in done.stderr
        assert "Attempt 3 of 5" in done.stderr
        assert "Traceback" not in done.stderr
        assert shards(folder) == expected
        assert sorted(all_decoded(folder)) == sorted(TEXTS)
        assert not (tmp_path / "hf" / "hub").exists(), "no second copy in the user's cache"

        (folder / read_manifest(folder).train[0].file).unlink()
        listings = len(served.requests)
        done = commands.run([*arguments()[:3], "--repair", "--out", "web"])
        assert done.returncode == 0, done.stderr
    assert shards(folder) == expected
    assert sorted(all_decoded(folder)) == sorted(TEXTS)
    assert [request.path for request in served.requests[listings:] if "/api/datasets" in request.path] == []


def test_a_fault_that_lasts_and_a_kill(tmp_path: Path, commands: Commands, expected: dict[str, str]) -> None:
    folder = tmp_path / "datasets" / "web"
    with hub(REPOSITORY, FILES, {SECOND: Fault(99, status=503)}) as served:
        reach(commands, served)
        done = commands.run(arguments())
    assert done.returncode == 2
    assert f"Cannot get {SECOND} of {REPOSITORY} from {served.address}: HTTP 503" in done.stderr
    assert len(served.stored(SECOND)) == 5
    assert "Traceback" not in done.stderr
    assert not list(folder.glob("*.npy"))

    with hub(REPOSITORY, FILES, piece_s=0.01) as mended:
        reach(commands, mended)
        kill(commands, arguments(), lambda: mended.bytes_sent() > TOTAL / 2)
        complete = (folder / ".preparing" / "downloads").glob("*/*.parquet")
        assert all(path.stat().st_size == len(FILES[path.name.replace("--", "/")]) for path in complete)
        assert mended.stored(FIRST) == [], "it was complete"
        done = commands.run(arguments())
    assert done.returncode == 0, done.stderr
    assert shards(folder) == expected
    # A kill loses what was on its way. A file is fetched again only if it was read and the progress not yet recorded.
    assert mended.bytes_sent() < 2 * TOTAL


def test_kills_of_a_part(tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the first recorded progress, and while shards are written."""
    folder, undisturbed = tmp_path / "datasets" / "web", tmp_path / "undisturbed" / "web"
    limits = {"max_tokens": 120_000, "tokens_per_shard": 1_200}
    moments: list[Callable[[], bool]] = [
        lambda: has_progress(folder),
        lambda: len(list(folder.glob("*.npy"))) > 2,
    ]
    with hub(REPOSITORY, FILES, piece_s=0.01) as served:
        monkeypatch.setattr(constants, "ENDPOINT", served.address)
        prepare(request(tmp_path, sources=["fineweb-edu"], paths=[], **limits), undisturbed, 1)
        reach(commands, served)
        command = arguments("--max-tokens", "120_000", "--tokens-per-shard", "1_200")
        for is_due in moments:
            kill(commands, command, is_due)
        done = commands.run(command)
    assert done.returncode == 0, done.stderr
    assert (folder / "manifest.json").read_bytes() == (undisturbed / "manifest.json").read_bytes()
    manifest = read_manifest(folder)
    assert 110_000 < manifest.counts["tokens"] <= 120_000
    documents = set(all_decoded(folder))
    per_file = [len(documents & set(TEXTS[i * 200 : i * 200 + 200])) for i in range(6)]
    assert sum(per_file) == manifest.counts["documents"]
    assert sum(count > 0 for count in per_file) >= 4, "a random part has documents of most files"
